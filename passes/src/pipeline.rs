//! The passes in order, and how far to go.
//!
//! [`Rewriting::new`] prepares and recognises; [`Rewriting::approximate`] makes the student, whose parameters are then
//! for calibration to set; [`Student::finish`] runs the exact passes that make it fast.

use mabert_graph::Model;
use serde::{Deserialize, Serialize};

use crate::lower::{self, Approximator, ApproximatorOptions, FoldReport};
use crate::recognise::{Miss, recognise};
use crate::sites::Encoder;
use crate::{Error, Result};

/// The `metadata_props` key that marks a rewritten model; its value is the tool's version.
pub const VERSION_KEY: &str = "onnx_mabert.version";

/// Whether a pass changes what the model computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Outputs are equal within rounding.
    Exact,
    /// A function is replaced by one that matrix arithmetic and ReLU compute.
    Approximating,
}

/// A pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Pass {
    /// The model's own functions, and fused operators, spelled out.
    DecomposeFused,
    /// What depends on no input is computed once, and what does nothing is taken out.
    FoldConstants,
    /// Attention and linear maps in one spelling.
    Canonical,
    /// Softmax to approximator.
    Softmax,
    /// GELU to ReLU.
    Activation,
    /// Layer normalisation to affine map.
    Norm,
    /// Attention in linear order.
    Reassociate,
    /// Affine maps into their neighbours.
    Fold,
    /// The last layer for first tokens alone, where the head reads no others.
    FirstToken,
    /// One product for queries, keys and values.
    MergeQkv,
    /// Equal constants once.
    ShareConstants,
    /// A model of half precision, worked on in single precision, back in half precision.
    Narrow,
}

impl Pass {
    /// All passes in the order in which they run.
    pub const ALL: [Self; 12] = [
        Self::DecomposeFused,
        Self::FoldConstants,
        Self::Canonical,
        Self::Softmax,
        Self::Activation,
        Self::Norm,
        Self::Reassociate,
        Self::Fold,
        Self::FirstToken,
        Self::MergeQkv,
        Self::ShareConstants,
        Self::Narrow,
    ];

    /// The name on the command line and on the nodes that the pass makes.
    pub fn name(self) -> &'static str {
        match self {
            Self::DecomposeFused => "decompose-fused",
            Self::FoldConstants => "fold-constants",
            Self::Canonical => "canonical",
            Self::Softmax => "softmax",
            Self::Activation => "activation",
            Self::Norm => "norm",
            Self::Reassociate => "reassociate",
            Self::Fold => "fold",
            Self::FirstToken => "first-token",
            Self::MergeQkv => "merge-qkv",
            Self::ShareConstants => "share-constants",
            Self::Narrow => "narrow",
        }
    }

    /// Whether it is exact.
    pub fn kind(self) -> Kind {
        match self {
            Self::Softmax | Self::Activation | Self::Norm => Kind::Approximating,
            _ => Kind::Exact,
        }
    }
}

/// The order of attention's products.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// Cost linear in length.
    Linear,
    /// As the paper has it: probabilities are a value of the graph.
    Paper,
}

impl Order {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Linear, Self::Paper];

    /// The name on the command line and in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Linear => "linear",
            Self::Paper => "paper",
        }
    }
}

/// Sites that are left as they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Keep {
    /// Keep softmax.
    pub softmax: bool,
    /// Keep GELU.
    pub activation: bool,
    /// Keep layer normalisation.
    pub norm: bool,
}

/// How to rewrite.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PassOptions {
    /// What the approximators look like.
    pub approximator: ApproximatorOptions,
    /// The order of attention's products.
    pub order: Order,
    /// What is left as it is.
    pub keep: Keep,
    /// Whether norms are folded; otherwise parameters keep their names and places, for more training.
    pub fold: bool,
    /// The last pass to run.
    pub until: Option<Pass>,
    /// Whether missed sites are accepted.
    pub partial: bool,
}

impl PassOptions {
    /// Why `pass` does not run, or nothing if it does.
    fn skipped(&self, pass: Pass) -> Option<String> {
        let kept = |what: &str| Some(format!("--keep {what}"));
        if self.until.is_some_and(|last| pass > last) {
            return Some(format!("--until {}", self.until.map_or("", Pass::name)));
        }
        match pass {
            Pass::Softmax if self.keep.softmax => kept("softmax"),
            Pass::Activation if self.keep.activation => kept("activation"),
            Pass::Norm if self.keep.norm => kept("norm"),
            Pass::Reassociate if self.keep.softmax => kept("softmax"),
            Pass::Reassociate if self.order == Order::Paper => Some("--attention paper".to_owned()),
            // A student that is not folded is one to be trained on: its parameters stay where they are found by name.
            Pass::Fold | Pass::FirstToken | Pass::MergeQkv | Pass::ShareConstants if !self.fold => {
                Some("--no-fold".to_owned())
            }
            Pass::Fold if self.keep.norm => kept("norm"),
            _ => None,
        }
    }
}

/// What a pass did.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// The pass.
    pub pass: Pass,
    /// Whether it is exact.
    pub kind: Kind,
    /// How many sites, nodes or constants it changed.
    pub changed: usize,
    /// Why it did not run.
    pub skipped: Option<String>,
}

/// A model prepared and recognised.
#[derive(Debug)]
pub struct Rewriting {
    /// The teacher, in canonical form.
    pub teacher: Model,
    /// Its encoder.
    pub encoder: Encoder,
    /// Sites that were missed and accepted.
    pub misses: Vec<Miss>,
    /// Whether the model came in half precision; the teacher is in single precision then.
    pub half: bool,
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
        let mut outcomes = Vec::new();
        let changed = mabert_graph::inline_functions(&mut model)?;
        let half = mabert_graph::widen_half(&mut model)?;
        lower::refuse_unusable_weights(&model)?;
        let changed = changed + mabert_graph::decompose_fused(&mut model)?;
        outcomes.push(done(Pass::DecomposeFused, changed));
        let changed = lower::fold_constants(&mut model)? + lower::remove_idle(&mut model)?;
        outcomes.push(done(Pass::FoldConstants, changed));
        let mut found = recognise(&model)?;
        let misses =
            if options.partial && found.encoder.is_some() { std::mem::take(&mut found.misses) } else { vec![] };
        let mut encoder = found.complete(model.origin())?;
        if encoder.has_position_bias() && options.order == Order::Linear && !options.keep.softmax {
            return Err(Error::Option(format!(
                "{}: its attention adds a bias by relative position to the scores, an n x n matrix that the linear order \
                 cannot keep apart from them; add --attention paper (or --keep softmax)",
                model.origin()
            )));
        }
        match options.skipped(Pass::Canonical) {
            Some(reason) => outcomes.push(not_done(Pass::Canonical, reason)),
            None => {
                lower::canonicalise(&mut model, &mut encoder, options.approximator.max_seq)?;
                outcomes.push(done(Pass::Canonical, encoder.layers.len()));
            }
        }
        // What exporters declared of inner values no longer holds for all of them.
        model.graph_mut().value_info.clear();
        Ok(Self { teacher: model, encoder, misses, half, options, outcomes })
    }

    /// The student: a copy of the teacher whose functions are replaced, its parameters not yet calibrated.
    ///
    /// # Errors
    /// The graph's wiring is broken.
    pub fn approximate(&self) -> Result<Student> {
        let mut student = Student {
            model: self.teacher.clone(),
            encoder: self.encoder.clone(),
            approximators: Vec::new(),
            options: self.options.clone(),
            outcomes: self.outcomes.clone(),
            fold: FoldReport::default(),
            complete: self.misses.is_empty(),
            half: self.half,
        };
        student.pass(Pass::Softmax, |s| {
            s.approximators = lower::approximate_softmax(&mut s.model, &s.encoder, &s.options.approximator)?;
            Ok(s.approximators.len())
        })?;
        student.pass(Pass::Activation, |s| lower::approximate_activations(&mut s.model, &s.encoder))?;
        student.pass(Pass::Norm, |s| lower::approximate_norms(&mut s.model, &s.encoder))?;
        Ok(student)
    }
}

/// A student under way.
#[derive(Debug)]
pub struct Student {
    /// Its graph.
    pub model: Model,
    /// Its sites.
    pub encoder: Encoder,
    /// The approximator of each layer; empty where softmax is kept.
    pub approximators: Vec<Approximator>,
    /// How it is made.
    pub options: PassOptions,
    /// What the passes did so far.
    pub outcomes: Vec<Outcome>,
    /// What folding did.
    pub fold: FoldReport,
    complete: bool,
    half: bool,
}

impl Student {
    /// Whether a pass ran and was not skipped.
    pub fn ran(&self, pass: Pass) -> bool {
        self.outcomes.iter().any(|o| o.pass == pass && o.skipped.is_none())
    }

    /// Runs the exact passes that follow calibration.
    ///
    /// # Errors
    /// The graph's wiring is broken.
    pub fn finish(&mut self) -> Result<()> {
        if !self.ran(Pass::Canonical) {
            return Ok(());
        }
        self.pass(Pass::Reassociate, |s| {
            lower::reassociate_attention(&mut s.model, &s.encoder, &s.approximators, &s.options.approximator)?;
            Ok(s.encoder.layers.len())
        })?;
        if self.complete {
            self.pass(Pass::Fold, |s| {
                s.fold = lower::fold_norms(&mut s.model, &mut s.encoder, s.half)?;
                Ok(s.fold.norms)
            })?;
        } else {
            self.outcomes.push(not_done(Pass::Fold, "--partial: the stream is not affine throughout".to_owned()));
        }
        self.pass(Pass::FirstToken, |s| lower::keep_first_token(&mut s.model, &mut s.encoder))?;
        self.pass(Pass::MergeQkv, |s| lower::merge_query_key_value(&mut s.model, &s.encoder))?;
        self.pass(Pass::ShareConstants, |s| Ok(lower::share_equal_constants(&mut s.model)))?;
        if self.half {
            self.pass(Pass::Narrow, |s| {
                mabert_graph::narrow_to_half(&mut s.model)?;
                Ok(s.model.graph().initializer.len())
            })?;
        }
        Ok(())
    }

    fn pass(&mut self, pass: Pass, run: impl FnOnce(&mut Self) -> Result<usize>) -> Result<()> {
        let outcome = match self.options.skipped(pass) {
            Some(reason) => not_done(pass, reason),
            None => done(pass, run(self)?),
        };
        self.outcomes.push(outcome);
        Ok(())
    }
}

fn done(pass: Pass, changed: usize) -> Outcome {
    Outcome { pass, kind: pass.kind(), changed, skipped: None }
}

fn not_done(pass: Pass, reason: String) -> Outcome {
    Outcome { pass, kind: pass.kind(), changed: 0, skipped: Some(reason) }
}
