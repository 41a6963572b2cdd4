//! How vectors of texts are made of what a feature model gives: told by its outputs, by the file that sentence-transformers
//! writes beside a model, or by the user.

use std::path::{Path, PathBuf};

use mabert_graph::{ElementType, Model};
use mabert_runtime::Tensor;
use serde::{Deserialize, Serialize};

use crate::heads::HeadKind;
use crate::{Error, Result, Setting};

/// What a text's vector is, which users of a feature model (sentence embeddings) compare with those of other texts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Pooling {
    /// The mean of the hidden states of the text's tokens.
    Mean,
    /// The hidden state of its first token.
    First,
    /// What the model gives for the text as a whole, `[batch, channels]`.
    Output,
    /// There is none: outputs are not compared as vectors of texts.
    None,
}

impl Pooling {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Mean, Self::First, Self::Output, Self::None];

    /// The name on the command line and in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Mean => "mean",
            Self::First => "first",
            Self::Output => "output",
            Self::None => "none",
        }
    }

    /// Reads what sentence-transformers keeps of its pooling, `1_Pooling/config.json`.
    ///
    /// # Errors
    /// The file cannot be read, or names a pooling that is none of these.
    pub fn read(config: &Path) -> Result<Self> {
        let fault = |reason: String| Error::data(config, reason).helped_by(&[Setting::Pooling]);
        let bytes = std::fs::read(config).map_err(|e| fault(format!("cannot be read: {e}")))?;
        let json: serde_json::Map<String, serde_json::Value> =
            serde_json::from_slice(&bytes).map_err(|e| fault(format!("not a JSON object: {e}")))?;
        let switched_on = json.iter().filter(|(_, value)| value.as_bool() == Some(true));
        let mut modes: Vec<&str> = switched_on.filter_map(|(key, _)| key.strip_prefix("pooling_mode_")).collect();
        modes.extend(json.get("pooling_mode").and_then(|mode| mode.as_str()));
        match modes.as_slice() {
            ["cls_token" | "cls"] => Ok(Self::First),
            // A vector's direction is all that counts, and a text's length does not change that of its sum.
            ["mean_tokens" | "mean" | "mean_sqrt_len_tokens" | "mean_sqrt_len"] => Ok(Self::Mean),
            [] => Err(fault("it names no pooling: say which it is".to_owned())),
            [other] => Err(fault(format!(
                "it pools by `{other}`, which is neither the mean over tokens nor the first token: say what comes nearest, or \
                 none"
            ))),
            several => Err(fault(format!(
                "it joins several poolings ({}), of which only one can be fitted to: say which",
                several.join(", ")
            ))),
        }
    }
}

/// What is known of a model's features from elsewhere than its outputs.
#[derive(Clone, Debug, Default)]
pub struct Features {
    channels: usize,
    asked: Option<Pooling>,
    config: Option<PathBuf>,
}

/// Where sentence-transformers says how it pools, below a model's folder.
const CONFIG: &str = "1_Pooling/config.json";
/// Below that folder, exporters put a model here.
const EXPORTS: &str = "onnx";

impl Features {
    /// Pooled as asked for; without that, as outputs and files say.
    pub fn new(asked: Option<Pooling>) -> Self {
        Self { asked, ..Self::default() }
    }

    /// How wide the model's hidden states are, where it is known: what is as wide are features.
    #[must_use]
    pub fn channels(mut self, channels: Option<usize>) -> Self {
        self.channels = channels.unwrap_or(0);
        self
    }

    /// Looks for `1_Pooling/config.json` beside these files (a model, its tokenizer), and above a folder `onnx`.
    #[must_use]
    pub fn beside<'p>(mut self, files: impl IntoIterator<Item = &'p Path>) -> Self {
        let folders = files.into_iter().filter_map(Path::parent).flat_map(|folder| {
            let above = folder.parent().filter(|_| folder.file_name().is_some_and(|name| name == EXPORTS));
            [Some(folder), above]
        });
        self.config = folders.flatten().map(|folder| folder.join(CONFIG)).find(|config| config.is_file());
        self
    }

    /// The file that says how the model's vectors are pooled, where there is one.
    pub fn config(&self) -> Option<&Path> {
        self.config.as_deref()
    }

    /// An output's kind, see [`HeadKind::from_shapes`]; what is asked to be pooled are features.
    pub(crate) fn kind(&self, name: &str, shapes: &[(usize, Vec<usize>)]) -> HeadKind {
        match (self.asked, HeadKind::from_shapes(name, shapes, self.channels)) {
            (Some(Pooling::Output), HeadKind::Classes) => HeadKind::Values,
            (Some(Pooling::Mean | Pooling::First), HeadKind::TokenClasses) => HeadKind::TokenValues,
            (_, kind) => kind,
        }
    }

    /// Which outputs are vectors of texts, and how they are made.
    ///
    /// # Errors
    /// No output is such as is asked for, or the file beside the model names a pooling that is not known.
    pub(crate) fn vectors(&self, outputs: &[Form]) -> Result<Vectors> {
        let levels: Vec<Level> = outputs.iter().map(Form::level).collect();
        let first = |wanted: &[Level]| levels.iter().position(|level| wanted.contains(level));
        let pooled = [Level::Text, Level::Pooler];
        let none = Vectors { poolings: vec![None; outputs.len()], main: None };
        match self.asked {
            Some(Pooling::None) => return Ok(none),
            // Hidden states beside answers are there to be looked at.
            None if first(&[Level::Answer]).is_some() => return Ok(none),
            Some(Pooling::Output) if first(&pooled).is_none() => {
                return Err(without("vector a text, `[batch, channels]`", outputs));
            }
            Some(Pooling::Mean | Pooling::First) if first(&[Level::Token]).is_none() => {
                return Err(without("vector a token, `[batch, n, channels]`", outputs));
            }
            _ => {}
        }
        let of_tokens = match first(&[Level::Token]) {
            Some(_) => self.token_pooling(first(&[Level::Text]).is_some())?,
            None => None,
        };
        let usual = outputs.iter().position(|o| o.level() == Level::Token && USUAL.contains(&o.name.as_str()));
        let token = usual.or_else(|| first(&[Level::Token])).filter(|_| of_tokens.is_some());
        let text = first(&[Level::Text]);
        let main = match self.asked {
            Some(Pooling::Mean | Pooling::First) => token,
            // A pooler's output is what classifiers are trained on; sentence embeddings are rarely read from it.
            None => text.or(token).or_else(|| first(&pooled)),
            Some(_) => text.or_else(|| first(&pooled)),
        };
        let pooling = |level: &Level| match level {
            Level::Text | Level::Pooler => Some(Pooling::Output),
            Level::Token => of_tokens,
            Level::Answer | Level::Other => None,
        };
        Ok(Vectors { poolings: levels.iter().map(pooling).collect(), main })
    }

    /// How hidden states are pooled; where the model pools them itself, it need not be known.
    fn token_pooling(&self, model_pools: bool) -> Result<Option<Pooling>> {
        match (self.asked, &self.config) {
            (Some(Pooling::Output), _) => Ok(None),
            (Some(asked), _) => Ok(Some(asked)),
            (None, Some(config)) => match Pooling::read(config) {
                Err(_) if model_pools => Ok(None),
                read => read.map(Some),
            },
            (None, None) => Ok(Some(Pooling::Mean)),
        }
    }
}

/// What exporters call the hidden states that are pooled.
const USUAL: [&str; 2] = ["last_hidden_state", "token_embeddings"];

fn without(wanted: &str, outputs: &[Form]) -> Error {
    let names: Vec<String> = outputs.iter().map(|output| format!("`{}`", output.name)).collect();
    let reason = format!("no output has a {wanted}, to be pooled so; the model gives {}", names.join(", "));
    Error::setting(reason, &[Setting::Pooling])
}

/// An output as several batches show it.
#[derive(Clone, Debug)]
pub(crate) struct Form {
    pub(crate) name: String,
    pub(crate) kind: HeadKind,
    pub(crate) rank: usize,
    /// Elements along the last axis.
    pub(crate) columns: usize,
    /// Whether they are no integers.
    pub(crate) real: bool,
}

/// What an output is, where vectors are concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Level {
    /// A vector a text.
    Text,
    /// The same, of a pooler.
    Pooler,
    /// A vector a token.
    Token,
    /// Logits or a score.
    Answer,
    /// Inputs that are given back, attention's probabilities...
    Other,
}

impl Form {
    /// An output's form, told by a value of it and by its shapes.
    pub(crate) fn new(features: &Features, name: &str, value: &Tensor, shapes: &[(usize, Vec<usize>)]) -> Self {
        let shape = value.shape();
        Self {
            name: name.to_owned(),
            kind: features.kind(name, shapes),
            rank: shape.len(),
            columns: shape.last().copied().unwrap_or(1),
            real: has_reals(value),
        }
    }

    fn level(&self) -> Level {
        let Self { name, kind, rank, columns, real } = self;
        match (kind, rank) {
            _ if !real => Level::Other,
            (HeadKind::Values, 2) if *columns > 1 && name.contains("pooler") => Level::Pooler,
            (HeadKind::Values, 2) if *columns > 1 => Level::Text,
            (HeadKind::TokenValues, _) if *columns > 1 => Level::Token,
            (HeadKind::Values, 3..) => Level::Other,
            _ => Level::Answer,
        }
    }
}

/// Whether a value's elements are no integers.
pub(crate) fn has_reals(value: &Tensor) -> bool {
    matches!(value.element_type(), ElementType::F32 | ElementType::F64 | ElementType::F16)
}

/// Vectors of texts among a model's outputs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Vectors {
    /// How each output's are made, where it has any.
    pub(crate) poolings: Vec<Option<Pooling>>,
    /// The output that users compare.
    pub(crate) main: Option<usize>,
}

/// Columns of the table that has so many rows, where it is as its file holds it: an encoder's hidden states are mostly as
/// wide as its embeddings.
pub fn table_columns(model: &Model, rows: usize) -> Option<usize> {
    let tables = &model.graph().initializer;
    let table = tables.iter().find(|t| t.dims.len() == 2 && usize::try_from(t.dims[0]) == Ok(rows));
    usize::try_from(table?.dims[1]).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEAN: &str = r#"{"word_embedding_dimension": 384, "pooling_mode_cls_token": false,
        "pooling_mode_mean_tokens": true, "pooling_mode_max_tokens": false,
        "pooling_mode_mean_sqrt_len_tokens": false, "include_prompt": true}"#;

    /// A folder with a model's `1_Pooling/config.json` in it.
    fn folder(config: &str) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("1_Pooling")).unwrap();
        std::fs::write(folder.path().join(CONFIG), config).unwrap();
        folder
    }

    #[test]
    fn what_sentence_transformers_writes_is_read() {
        let read = |config: &str| Pooling::read(&folder(config).path().join(CONFIG));
        assert_eq!(read(MEAN).unwrap(), Pooling::Mean);
        let swapped = MEAN.replace("true, \"pooling_mode_max", "false, \"pooling_mode_max");
        let first = swapped.replace("cls_token\": false", "cls_token\": true");
        assert_eq!(read(&first.replace("mean_tokens\": true", "mean_tokens\": false")).unwrap(), Pooling::First);
        assert_eq!(read(r#"{"pooling_mode": "cls"}"#).unwrap(), Pooling::First);
        assert_eq!(read(r#"{"pooling_mode_mean_sqrt_len_tokens": true}"#).unwrap(), Pooling::Mean);
        for (config, part) in [
            (r#"{"pooling_mode_max_tokens": true}"#, "pools by `max_tokens`"),
            (r#"{"pooling_mode_lasttoken": true}"#, "pools by `lasttoken`"),
            (r#"{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": true}"#, "(cls_token, mean_tokens)"),
            (r#"{"pooling_mode_mean_tokens": false}"#, "names no pooling"),
            ("[]", "not a JSON object"),
        ] {
            let error = read(config).unwrap_err();
            assert!(error.to_string().contains(part) && error.to_string().contains("config.json"), "{error}");
            assert_eq!(error.settings(), [Setting::Pooling]);
        }
    }

    #[test]
    fn the_file_is_looked_for_where_tools_put_it() {
        let folder = folder(MEAN);
        let config = folder.path().join(CONFIG);
        std::fs::create_dir(folder.path().join("other")).unwrap();
        let found = |model: &str, tokenizer: Option<&str>| {
            let paths = [Some(model), tokenizer].map(|name| name.map(|name| folder.path().join(name)));
            Features::default().beside(paths.iter().flatten().map(PathBuf::as_path)).config().map(Path::to_owned)
        };
        assert_eq!(found("model.onnx", None), Some(config.clone()));
        assert_eq!(found("onnx/model.onnx", None), Some(config.clone()));
        assert_eq!(found("other/model.onnx", None), None);
        assert_eq!(found("other/model.onnx", Some("tokenizer.json")), Some(config));
    }

    fn form(name: &str, kind: HeadKind, shape: &[usize]) -> Form {
        Form { name: name.to_owned(), kind, rank: shape.len(), columns: *shape.last().unwrap(), real: true }
    }

    fn hidden(name: &str) -> Form {
        form(name, HeadKind::TokenValues, &[2, 5, 16])
    }

    fn text(name: &str) -> Form {
        form(name, HeadKind::Values, &[2, 16])
    }

    fn logits() -> Form {
        form("logits", HeadKind::Classes, &[2, 3])
    }

    fn told(features: &Features, outputs: &[Form]) -> (Vec<Option<Pooling>>, Option<usize>) {
        let vectors = features.vectors(outputs).unwrap();
        (vectors.poolings, vectors.main)
    }

    #[test]
    fn vectors_are_told_by_the_outputs() {
        let features = Features::default();
        let (mean, output) = (Some(Pooling::Mean), Some(Pooling::Output));
        assert_eq!(told(&features, &[hidden("x")]), (vec![mean], Some(0)));
        assert_eq!(told(&features, &[hidden("x"), text("y")]), (vec![mean, output], Some(1)));
        // Hidden states are what is pooled, not a pooler's.
        assert_eq!(told(&features, &[text("pooler_output"), hidden("x")]), (vec![output, mean], Some(1)));
        assert_eq!(told(&features, &[text("pooler_output")]), (vec![output], Some(0)));
        assert_eq!(told(&features, &[hidden("inner"), hidden("last_hidden_state")]).1, Some(1));
        // What is given back does not matter, answers do.
        let ids = Form { real: false, ..form("ids", HeadKind::Positions, &[2, 5]) };
        assert_eq!(told(&features, &[ids, text("y")]), (vec![None, output], Some(1)));
        assert_eq!(told(&features, &[logits(), hidden("x")]), (vec![None; 2], None));
        let score = form("score", HeadKind::Values, &[2, 1]);
        assert_eq!(told(&features, &[score, hidden("x")]), (vec![None; 2], None));
        let attention = form("attention", HeadKind::Values, &[2, 4, 5, 5]);
        assert_eq!(told(&features, &[attention, hidden("x")]), (vec![None, mean], Some(1)));
    }

    #[test]
    fn what_is_asked_for_comes_first_and_then_what_the_folder_says() {
        let asked = |pooling| Features::new(Some(pooling));
        let (first, output) = (Some(Pooling::First), Some(Pooling::Output));
        assert_eq!(told(&asked(Pooling::None), &[hidden("x"), text("y")]), (vec![None; 2], None));
        assert_eq!(told(&asked(Pooling::First), &[text("y"), hidden("x")]), (vec![output, first], Some(1)));
        assert_eq!(told(&asked(Pooling::Output), &[hidden("x"), text("pooler_output")]), (vec![None, output], Some(1)));
        for (pooling, outputs, part) in [
            (Pooling::Output, hidden("x"), "`[batch, channels]`"),
            (Pooling::Mean, text("y"), "`[batch, n, channels]`"),
        ] {
            let error = asked(pooling).vectors(&[outputs]).unwrap_err();
            assert!(error.to_string().contains(part) && error.settings() == [Setting::Pooling], "{error}");
        }
        // Of a width that nothing tells.
        let shapes = [(5, vec![2, 8]), (7, vec![2, 8])];
        assert_eq!(asked(Pooling::Output).kind("y", &shapes), HeadKind::Values);
        assert_eq!(asked(Pooling::Mean).kind("y", &shapes), HeadKind::Classes);

        let [cls, max] = ["cls_token", "max_tokens"].map(|mode| folder(&format!("{{\"pooling_mode_{mode}\": true}}")));
        let of = |folder: &tempfile::TempDir| Features::default().beside([folder.path().join("a.onnx").as_path()]);
        assert_eq!(told(&of(&cls), &[hidden("x"), text("pooler_output")]), (vec![first, output], Some(0)));
        // Nobody needs to know it where the model pools.
        assert_eq!(told(&of(&max), &[hidden("x"), text("y")]), (vec![None, output], Some(1)));
        assert_eq!(told(&of(&max), &[logits(), hidden("x")]), (vec![None; 2], None));
        assert!(of(&max).vectors(&[hidden("x")]).unwrap_err().to_string().contains("max_tokens"));
    }
}
