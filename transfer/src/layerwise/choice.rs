//! Which form stands in the place of a layer's softmax: what each costs, and how far each is from the teacher.

use mabert_passes::lower::{Form, HingeSizes};
use mabert_passes::sites::SiteId;
use serde::{Deserialize, Serialize};

/// What a student will run on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Target {
    /// tract with this project's fused operators.
    #[default]
    Tract,
    /// onnxruntime, and engines like it that run the graph node by node.
    Onnxruntime,
    /// Both: costs are the geometric means of theirs.
    Any,
}

impl Target {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Tract, Self::Onnxruntime, Self::Any];

    /// The name on the command line and in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tract => "tract",
            Self::Onnxruntime => "onnxruntime",
            Self::Any => "any",
        }
    }
}

/// One value for each form.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ByForm<T> {
    /// Of hinges.
    pub hinges: T,
    /// Of networks.
    pub network: T,
}

impl<T: Copy> ByForm<T> {
    /// That of a form.
    pub fn get(&self, form: Form) -> T {
        match form {
            Form::Hinges => self.hinges,
            Form::Network => self.network,
        }
    }

    pub(super) fn set(&mut self, form: Form, value: T) {
        match form {
            Form::Hinges => self.hinges = value,
            Form::Network => self.network = value,
        }
    }
}

/// Why a layer has its form.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Reason {
    /// It was asked for, or an option was that one form alone has.
    AskedFor,
    /// The student that was gone on from has it.
    AsBefore,
    /// Without text nothing tells how close either is: hinges, which are bound to no length.
    NoText,
    /// Attention needs its scores or probabilities as a value, and so a network would lose its linear order.
    NoLinearOrder,
    /// It is the cheaper, and within the bound.
    CheaperWithinBound,
    /// The cheaper is not within the bound, and it is.
    OtherNotWithinBound,
    /// Neither is within the bound, and its error is the lesser.
    LesserError,
}

/// What became of a layer's softmax, and why.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[non_exhaustive]
pub struct FormChoice {
    /// The site.
    pub site: SiteId,
    /// What it is now.
    pub form: Form,
    /// What attention costs in each form, in multiply-adds a head, for a text of the longest length that the student is
    /// fitted to.
    pub cost: ByForm<f64>,
    /// The contexts' squared error over their variance, mean over heads, on calibration text; `None` where a form was not
    /// tried.
    pub squared_error: ByForm<Option<f64>>,
    /// Why.
    pub reason: Reason,
}

/// How forms are weighed against each other.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Weighing {
    /// What the student will run on.
    pub target: Target,
    /// The largest squared error of contexts, relative to their variance, at which the cheaper form is taken.
    pub bound: f64,
}

/// The sizes of one head's attention.
#[derive(Clone, Copy, Debug)]
pub struct AttentionSize {
    /// Tokens, `n`.
    pub tokens: usize,
    /// A network's hidden size, `h`.
    pub hidden: usize,
    /// A head's size, `d`.
    pub head: usize,
    /// Those of hinges.
    pub hinges: HingeSizes,
}

/// What one elementwise node costs an element on an engine that runs the graph node by node, in multiply-adds, as measured
/// with onnxruntime.
const NODE: f64 = 4.0;
/// What a hinge of one score costs where scores stay in cache, in multiply-adds, as measured with the fused operator.
const STEP: f64 = 6.0;

impl AttentionSize {
    /// What attention costs in each form, in multiply-adds a head.
    pub fn cost(&self, target: Target) -> ByForm<f64> {
        match target {
            Target::Tract => self.fused(),
            Target::Onnxruntime => self.node_by_node(),
            Target::Any => {
                let (a, b) = (self.fused(), self.node_by_node());
                ByForm { hinges: (a.hinges * b.hinges).sqrt(), network: (a.network * b.network).sqrt() }
            }
        }
    }

    fn fused(&self) -> ByForm<f64> {
        let [n, h, d] = self.numbers();
        let steps = (self.hinges.statistics + self.hinges.hinges) as f64;
        ByForm { hinges: n * n * (2.0 * d + STEP * steps), network: 4.0 * n * h * d }
    }

    /// Each hinge has a product with the values, each statistic one with a column; before that are a difference and a ReLU.
    fn node_by_node(&self) -> ByForm<f64> {
        let [n, h, d] = self.numbers();
        let [r, g] = [self.hinges.statistics, self.hinges.hinges].map(|count| count as f64);
        let hinges = n * n * ((1.0 + g) * d + r + NODE * 2.0 * (r + g));
        ByForm { hinges, network: n * h * (4.0 * d + NODE * 2.0) }
    }

    fn numbers(&self) -> [f64; 3] {
        [self.tokens, self.hidden, self.head].map(|size| size as f64)
    }
}

/// The form to take, with the reason: `first` is the cheaper and not within the bound.
pub(super) fn neither_or_other(first: Form, errors: &ByForm<Option<f64>>, bound: f64) -> (Form, Reason) {
    let second = if first == Form::Hinges { Form::Network } else { Form::Hinges };
    let [first_error, second_error] = [first, second].map(|form| errors.get(form).unwrap_or(f64::NAN));
    match () {
        () if second_error <= bound => (second, Reason::OtherNotWithinBound),
        // What is no number is no error to compare with.
        () if second_error < first_error || (first_error.is_nan() && second_error.is_finite()) => {
            (second, Reason::LesserError)
        }
        () => (first, Reason::LesserError),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size(tokens: usize) -> AttentionSize {
        AttentionSize { tokens, hidden: tokens.min(128), head: 32, hinges: HingeSizes::default() }
    }

    #[test]
    fn networks_are_cheaper_for_long_texts_and_sooner_where_nodes_are_run_one_by_one() {
        for target in Target::ALL {
            let cost = size(512).cost(target);
            assert!(cost.network < cost.hinges, "{target:?} {cost:?}");
        }
        for tokens in [16, 64, 128] {
            let cost = size(tokens).cost(Target::Tract);
            assert!(cost.hinges < cost.network, "{tokens}: {cost:?}");
        }
        let ratio = |target| {
            let cost = size(256).cost(target);
            cost.hinges / cost.network
        };
        let [tract, onnxruntime, any] = Target::ALL.map(ratio);
        assert!(tract < any && any < onnxruntime);
    }

    #[test]
    fn the_other_form_is_taken_within_the_bound_or_for_its_lesser_error() {
        let errors = |hinges, network| ByForm { hinges: Some(hinges), network: Some(network) };
        let (hinges, network) = (Form::Hinges, Form::Network);
        for (first, errors, expected) in [
            (network, errors(0.05, 0.4), (hinges, Reason::OtherNotWithinBound)),
            (network, errors(0.2, 0.4), (hinges, Reason::LesserError)),
            (network, errors(0.5, 0.4), (network, Reason::LesserError)),
            (hinges, errors(0.2, 0.09), (network, Reason::OtherNotWithinBound)),
            (hinges, errors(0.2, 0.3), (hinges, Reason::LesserError)),
            (hinges, errors(0.2, f64::NAN), (hinges, Reason::LesserError)),
            (network, errors(0.2, f64::NAN), (hinges, Reason::LesserError)),
        ] {
            assert_eq!(neither_or_other(first, &errors, 0.1), expected, "{errors:?}");
        }
    }
}
