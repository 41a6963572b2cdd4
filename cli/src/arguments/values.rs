//! What the values of options may be: choices that help lists, and numbers within bounds.

use std::time::Duration;

use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser as _, ValueParser};
use mabert_passes::lower::{Form, Sharing};
use mabert_passes::pipeline::{Order, Pass};
use mabert_transfer::data::DataFormat;
use mabert_transfer::evaluate::Metric;
use mabert_transfer::job::{Target, TransferKind};
use mabert_transfer::pooling::Pooling;

/// A type whose values are chosen by name. The libraries know their names; what help says of them is said here.
pub(crate) trait Choice: Copy + Send + Sync + 'static {
    fn name(self) -> &'static str;

    fn help(self) -> Option<&'static str> {
        None
    }
}

/// One of `choices`, by its name.
pub(crate) fn one_of<T: Choice>(choices: impl IntoIterator<Item = T>) -> ValueParser {
    let choices: Vec<T> = choices.into_iter().collect();
    let listed: Vec<PossibleValue> =
        choices.iter().map(|choice| PossibleValue::new(choice.name()).help(choice.help())).collect();
    ValueParser::new(PossibleValuesParser::new(listed).map(move |name| {
        let chosen = choices.iter().find(|choice| choice.name() == name);
        *chosen.expect("the parser takes the listed names alone")
    }))
}

/// `on` or `off`.
pub(crate) fn on_or_off() -> ValueParser {
    ValueParser::new(PossibleValuesParser::new(["on", "off"]).map(|value| value == "on"))
}

/// What stands in the place of softmax, as `--softmax` says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Softmax {
    /// Without one each layer gets the one that suits it.
    pub(crate) form: Option<Form>,
    /// Which heads share a network, where the name says it.
    pub(crate) sharing: Option<Sharing>,
}

/// No form in particular.
const AUTO: &str = "auto";

impl Softmax {
    /// The name of the default.
    pub(crate) const DEFAULT: &str = AUTO;

    /// All of them; which heads share a network is said by `--share` too.
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        let forms = [None].into_iter().chain(Form::ALL.map(Some)).map(|form| Self { form, sharing: None });
        let network = |sharing| Self { form: Some(Form::Network), sharing: Some(sharing) };
        forms.chain(Sharing::ALL.map(network))
    }
}

impl Choice for Softmax {
    fn name(self) -> &'static str {
        self.sharing.map_or(self.form.map_or(AUTO, Form::name), Sharing::name)
    }

    fn help(self) -> Option<&'static str> {
        match (self.form, self.sharing) {
            (None, _) => Some("Layer by layer the cheaper of the two, if it is close enough, else the closer"),
            (Some(Form::Hinges), _) => Some("A hinge a key, its threshold by the row: any length"),
            (Some(Form::Network), None) => Some("The paper's: cost linear in the length, up to --max-seq"),
            (_, Some(Sharing::PerHead)) => Some("The same as network --share head"),
            (_, Some(Sharing::PerLayer)) => Some("The same as network --share layer"),
            (_, Some(Sharing::Shared)) => Some("The same as network --share all"),
        }
    }
}

/// What the student will run on, as `--for` says it.
impl Choice for Target {
    fn name(self) -> &'static str {
        self.name()
    }

    fn help(self) -> Option<&'static str> {
        match self {
            Self::Tract => Some("tract with this project's fused operators"),
            Self::Onnxruntime => Some("onnxruntime, and what else runs the graph node by node"),
            Self::Any => Some("Both: the geometric mean of what either costs"),
        }
    }
}

/// Which heads share a network, as `--share` says it.
impl Choice for Sharing {
    fn name(self) -> &'static str {
        match self {
            Self::PerHead => "head",
            Self::PerLayer => "layer",
            Self::Shared => "all",
        }
    }
}

impl Choice for Order {
    fn name(self) -> &'static str {
        self.name()
    }

    fn help(self) -> Option<&'static str> {
        match self {
            Self::Auto => Some("Probabilities are no value of the graph, unless the model needs them"),
            Self::Linear => Some("Of networks: no matrix of the length squared is formed"),
            Self::Paper => Some("Probabilities are a value of the graph"),
        }
    }
}

impl Choice for Pass {
    fn name(self) -> &'static str {
        self.name()
    }
}

impl Choice for TransferKind {
    fn name(self) -> &'static str {
        self.name()
    }

    fn help(self) -> Option<&'static str> {
        match self {
            Self::None => Some("Not at all: only the structure"),
            Self::ClosedForm => Some("Layer by layer, by least squares"),
            Self::Blockwise => Some("The same, with gradient steps on each attention block"),
            Self::Full => Some("After that, gradient steps on everything at once"),
            _ => None,
        }
    }
}

impl Choice for DataFormat {
    fn name(self) -> &'static str {
        self.name()
    }

    fn help(self) -> Option<&'static str> {
        match self {
            Self::Text => Some("A text a line"),
            Self::Tsv => Some("A table with a header, between tabs"),
            Self::Csv => Some("The same between commas"),
            Self::Json => Some("JSON: an object a line, an array of them, or an object of lists"),
            Self::Npz => Some("Arrays of token ids"),
            Self::Conll => Some("A word and its tag a line, a blank line after each sentence"),
            _ => None,
        }
    }
}

impl Choice for Pooling {
    fn name(self) -> &'static str {
        self.name()
    }

    fn help(self) -> Option<&'static str> {
        match self {
            Self::Mean => Some("The mean of the hidden states of a text's tokens"),
            Self::First => Some("The hidden state of its first token"),
            Self::Output => Some("What the model itself gives for the text"),
            Self::None => Some("No vectors: outputs are compared row by row"),
            _ => None,
        }
    }
}

impl Choice for Metric {
    fn name(self) -> &'static str {
        self.name()
    }

    fn help(self) -> Option<&'static str> {
        match self {
            Self::F1 => Some("Of class 1 of two"),
            Self::MacroF1 => Some("The mean of that of every class"),
            Self::MicroF1 => Some("Of all classes counted together"),
            Self::Mcc => Some("Matthews' correlation"),
            Self::EntityF1 => Some("Of the entities in tagged words, as seqeval counts them"),
            Self::AnswerF1 => Some("Of the words of answers to questions, as SQuAD has it"),
            Self::ExactMatch => Some("Of the same answers"),
            Self::Sts => Some("Spearman's correlation of the cosines of pairs of texts, each read alone"),
            _ => None,
        }
    }
}

pub(crate) fn positive(text: &str) -> Result<f64, String> {
    number(text, |v| v > 0.0, "it must be a number above 0")
}

pub(crate) fn not_negative(text: &str) -> Result<f64, String> {
    number(text, |v| v >= 0.0, "it must be a number, 0 or more")
}

pub(crate) fn share(text: &str) -> Result<f64, String> {
    number(text, |v| (0.0..=1.0).contains(&v), "it must be a number from 0 to 1")
}

/// A count from 1 to `most`.
pub(crate) fn count(most: usize) -> ValueParser {
    ValueParser::new(move |text: &str| -> Result<usize, String> {
        let demand = || format!("it must be a whole number from 1 to {most}");
        text.trim().parse().ok().filter(|n| (1..=most).contains(n)).ok_or_else(demand)
    })
}

/// Hours, minutes and seconds, in this order, each at most once.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let mut rest = text.trim();
    let mut seconds = 0u64;
    for (unit, of_unit) in [('h', 3600), ('m', 60), ('s', 1)] {
        if let Some((number, behind)) = rest.split_once(unit) {
            let number: u32 = number.parse().map_err(|_| NO_DURATION.to_owned())?;
            seconds += u64::from(number) * of_unit;
            rest = behind;
        }
    }
    match rest.is_empty() && seconds > 0 {
        true => Ok(Duration::from_secs(seconds)),
        false => Err(NO_DURATION.to_owned()),
    }
}

const NO_DURATION: &str = "it must be a time such as 90s, 10m or 1h30m";

fn number(text: &str, is_allowed: impl Fn(f64) -> bool, demand: &str) -> Result<f64, String> {
    text.parse().ok().filter(|v: &f64| v.is_finite() && is_allowed(*v)).ok_or_else(|| demand.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_hours_minutes_and_seconds() {
        let seconds = |text: &str| duration(text).map(|time| time.as_secs());
        for (text, expected) in [("90s", 90), ("10m", 600), ("1h30m", 5400), (" 2h ", 7200), ("1h2m3s", 3723)] {
            assert_eq!(seconds(text), Ok(expected));
        }
        for text in ["", "10", "0s", "m", "3s2m", "-1m", "1.5h", "10m 3", "1m1m", "99999999999h"] {
            assert!(seconds(text).is_err(), "{text}");
        }
    }

    #[test]
    fn numbers_are_bounded() {
        assert_eq!(share("0.5"), Ok(0.5));
        for (refused, parser) in
            [("1.5", share as fn(&str) -> Result<f64, String>), ("0", positive), ("-1", not_negative)]
        {
            assert!(parser(refused).is_err(), "{refused}");
        }
        assert!(["NaN", "inf", "", "one"].iter().all(|text| not_negative(text).is_err()));
    }
}
