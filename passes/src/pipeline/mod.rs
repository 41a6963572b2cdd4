//! The passes in order, and how far to go.
//!
//! [`Rewriting::new`] prepares and recognises; [`Rewriting::approximate`] makes the student, whose parameters are then
//! for calibration to set; [`Student::bound`] makes its stream saturate beyond what calibration saw; [`Student::finish`]
//! runs the exact passes that make it fast. Each walks its part of the table of passes, and the graph's wiring is checked
//! after every pass.

mod options;
mod outcome;
mod student;
mod table;
mod wiring;

use mabert_graph::Model;

use crate::lower::{Bounds, FoldReport, Form, NormRanges};
use crate::recognise::{Miss, recognise};
use crate::sites::{Encoder, Precision};
use crate::{Error, Result};
pub use options::{Keep, Order, PassOptions};
pub use outcome::{Outcome, Skipped};
use student::Completeness;
pub use student::Student;
use table::{Decision, Stage, Work};
pub use table::{Pass, PassKind, UnknownPass};

/// The `metadata_props` key that marks a rewritten model; its value is the tool's version.
pub const VERSION_KEY: &str = "onnx_mabert.version";

/// The `metadata_props` key of a rewritten model whose value names the value that its encoder ends in.
pub const ENCODER_END_KEY: &str = "onnx_mabert.encoder_end";

/// What simplifying did to a model.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Simplified {
    /// What the model came in; it is in single precision then.
    pub precision: Precision,
    /// What the passes did.
    pub outcomes: Vec<Outcome>,
}

/// Brings a model into the form that the recogniser reads: functions and fused operators spelled out, single precision,
/// constants folded, what does nothing taken out.
///
/// # Errors
/// The graph's wiring is broken, a constant cannot be computed, or a weight is not finite.
pub fn simplify(model: &mut Model) -> Result<Simplified> {
    let mut simplified = Simplified { precision: Precision::Single, outcomes: Vec::new() };
    for pass in Pass::all_in(Stage::Simplify) {
        if let Work::Graph { applies, run } = &pass.row().work
            && applies(model)
        {
            let changed = run(model, &mut simplified.precision);
            let outcome = checked(pass, model, changed).map_err(|e| e.in_model(model.origin()))?;
            simplified.outcomes.push(outcome);
        }
    }
    Ok(simplified)
}

/// Spells what is quantised in single precision, without the roundings of what is computed: the first step of
/// [`simplify`]. Returns how many operators worked on quantised numbers.
///
/// # Errors
/// The graph's wiring is broken, or a constant cannot be read.
pub fn dequantise(model: &mut Model) -> Result<usize> {
    crate::lower::dequantise(model)
}

/// A model prepared and recognised.
#[derive(Debug)]
#[non_exhaustive]
pub struct Rewriting {
    /// The teacher, in canonical form.
    pub teacher: Model,
    /// Its encoder.
    pub encoder: Encoder,
    /// Sites that were missed and accepted.
    pub misses: Vec<Miss>,
    /// What the model came in; the teacher is in single precision.
    pub precision: Precision,
    options: PassOptions,
    outcomes: Vec<Outcome>,
}

impl Rewriting {
    /// Prepares `model`, recognises its sites, and brings them into canonical form.
    ///
    /// # Errors
    /// The model was rewritten before, is no encoder, or has sites that are not recognised (unless `partial`).
    pub fn new(mut model: Model, options: PassOptions) -> Result<Self> {
        if model.metadata(VERSION_KEY).is_some() {
            return Err(Error::AlreadyRewritten(model.origin().to_owned()));
        }
        let Simplified { precision, outcomes } = simplify(&mut model)?;
        let mut recognition = recognise(&model)?;
        let accepts_misses = options.partial && recognition.encoder.is_some();
        let misses = if accepts_misses { std::mem::take(&mut recognition.misses) } else { vec![] };
        let encoder = recognition.complete(model.origin())?;
        let order = order_in_effect(&model, &encoder, &options)?;
        let options = PassOptions { order, ..options };
        let mut student = Student {
            model,
            encoder,
            approximators: Vec::new(),
            options,
            outcomes,
            fold: FoldReport::default(),
            seen: None,
            bounds: Bounds::new(),
            completeness: completeness(&misses),
            precision,
        };
        student.run(Stage::Canonicalise)?;
        // What exporters declared of inner values no longer holds for all of them.
        student.model.graph_mut().value_info.clear();
        let Student { model: teacher, encoder, options, outcomes, .. } = student;
        Ok(Self { teacher, encoder, misses, precision, options, outcomes })
    }

    /// The student: a copy of the teacher whose functions are replaced, its parameters not yet calibrated.
    ///
    /// # Errors
    /// The graph's wiring is broken.
    pub fn approximate(&self) -> Result<Student> {
        self.approximate_with(self.options.clone())
    }

    /// The same with a form for each layer, in order.
    ///
    /// # Errors
    /// The graph's wiring is broken.
    pub fn approximate_as(&self, forms: &[Form]) -> Result<Student> {
        self.approximate_with(self.options.clone().with_forms(forms))
    }

    fn approximate_with(&self, options: PassOptions) -> Result<Student> {
        let mut student = Student {
            model: self.teacher.clone(),
            encoder: self.encoder.clone(),
            approximators: Vec::new(),
            options,
            outcomes: self.outcomes.clone(),
            fold: FoldReport::default(),
            seen: None,
            bounds: Bounds::new(),
            completeness: completeness(&self.misses),
            precision: self.precision,
        };
        student.run(Stage::Approximate)?;
        Ok(student)
    }
}

fn completeness(misses: &[Miss]) -> Completeness {
    if misses.is_empty() { Completeness::Whole } else { Completeness::Partial }
}

/// A network's linear order forms no `n x n` matrix: it cannot add one to the scores, as a bias by position is. Where a model
/// gives out its probabilities, other orders only come on top of them. The paper's order is taken then, unless the other is
/// asked for.
fn order_in_effect(model: &Model, encoder: &Encoder, options: &PassOptions) -> Result<Order> {
    let is_network = options.approximator.form == Form::Network;
    let has_bias = is_network && encoder.has_position_bias();
    match options.order {
        Order::Auto if has_bias || encoder.shows_probabilities() => Ok(Order::Paper),
        Order::Auto if is_network => Ok(Order::Linear),
        Order::Linear if has_bias && !options.keep.softmax => Err(Error::PositionBias(model.origin().to_owned())),
        Order::Linear if !is_network => Err(Error::NoLinearOrder),
        order => Ok(order),
    }
}

impl Student {
    /// Bounds what the norms put out, told what calibration `saw` of that. Without it, or where options say so, nothing is
    /// bounded, and the outcome says why.
    ///
    /// # Errors
    /// The graph's wiring is broken.
    pub fn bound(&mut self, saw: Option<NormRanges>) -> Result<()> {
        self.seen = saw;
        self.run(Stage::Bound)
    }

    /// Runs the exact passes that follow calibration.
    ///
    /// # Errors
    /// The graph's wiring is broken.
    pub fn finish(&mut self) -> Result<()> {
        self.run(Stage::Finish)
    }

    fn run(&mut self, stage: Stage) -> Result<()> {
        for pass in Pass::all_in(stage) {
            let Work::Sites { decide, run } = &pass.row().work else { continue };
            let outcome = match (decide(self), self.options.until) {
                (Decision::Omit, _) => continue,
                (_, Some(last)) if pass > last => Outcome::skipped(pass, Skipped::Until(last)),
                (Decision::Skip(reason), _) => Outcome::skipped(pass, reason),
                (Decision::Run, _) => {
                    let changed = run(self);
                    checked(pass, &self.model, changed).map_err(|e| e.in_model(self.model.origin()))?
                }
            };
            self.outcomes.push(outcome);
        }
        Ok(())
    }
}

/// What a pass did to `model`, whose wiring must hold. Errors of the graph say which pass met them.
fn checked(pass: Pass, model: &Model, changed: Result<usize>) -> Result<Outcome> {
    let named = |source: mabert_graph::Error| Error::Pass { pass, source };
    let changed = changed.map_err(|error| match error {
        Error::Graph(source) => named(source),
        other => other,
    })?;
    wiring::check(model).map_err(named)?;
    Ok(Outcome::ran(pass, changed))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{encoder, norm_ranges, options};

    #[test]
    fn a_pass_that_breaks_the_graph_is_named() {
        let mut model = encoder();
        assert_eq!(checked(Pass::Fold, &model, Ok(3)).unwrap().changed, 3);
        let met = mabert_graph::Error::Graph("its own fault".to_owned());
        let message = checked(Pass::Fold, &model, Err(met.into())).unwrap_err().to_string();
        assert_eq!(message, "pass `fold`: graph: its own fault");
        model.graph_mut().node.remove(3);
        let message = checked(Pass::MergeQkv, &model, Ok(1)).unwrap_err().to_string();
        assert!(message.starts_with("pass `merge-qkv`: graph: ") && message.contains("nothing before it"), "{message}");
    }

    #[test]
    fn every_pass_is_told_of_with_the_reason_where_it_did_not_run() {
        let outcomes = |options: PassOptions| {
            let mut student = Rewriting::new(encoder(), options).unwrap().approximate().unwrap();
            let seen = student.ran(Pass::Norm).then(|| norm_ranges(&student.model, &student.encoder, &[5, 2]));
            student.bound(seen).unwrap();
            student.finish().unwrap();
            let told: Vec<(Pass, String)> = student
                .outcomes
                .iter()
                .map(|o| (o.pass, o.skipped.map_or_else(|| "ran".to_owned(), |reason| reason.to_string())))
                .collect();
            told
        };
        let passes = |told: &[(Pass, String)]| told.iter().map(|(pass, _)| *pass).collect::<Vec<_>>();
        let all = outcomes(options(None));
        // All but those for quantised models and for half precision.
        assert_eq!(passes(&all), Pass::ALL[1..13]);
        assert!(all.iter().all(|(_, told)| told == "ran"), "{all:?}");
        let kept = Keep { softmax: true, activation: true, norm: true };
        let kept = outcomes(PassOptions { keep: kept, fold: false, ..options(None) });
        let kept: Vec<&str> = kept[3..].iter().map(|(_, told)| told.as_str()).collect();
        let unfolded = "the student is not folded";
        let norms = "norms are kept";
        assert_eq!(kept[..5], ["softmax is kept", "activations are kept", norms, norms, "softmax is kept"]);
        assert_eq!(kept[5..], [unfolded; 4]);
        let paper = outcomes(PassOptions { order: Order::Paper, ..options(Some(Pass::Reassociate)) });
        assert_eq!(passes(&paper), Pass::ALL[1..13]);
        assert_eq!(paper[7].1, "attention is in the paper's order");
        assert_eq!(paper[8].1, "reassociate was to be the last");
        let early = outcomes(options(Some(Pass::FoldConstants)));
        assert!(early[2..].iter().all(|(_, told)| told == "fold-constants was to be the last"), "{early:?}");
    }
}
