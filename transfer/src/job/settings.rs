//! What a job is asked to do.

use std::path::{Path, PathBuf};

use mabert_passes::inputs::Role;
use mabert_passes::lower::{Form, Sharing};
use mabert_passes::pipeline::{Keep, Order, Pass};
use serde::{Deserialize, Serialize};

use super::DEFAULT_SOFTMAX_ERROR;
use crate::data::Data;
use crate::evaluate::Metric;
use crate::full::FullOptions;
use crate::layerwise::Target;
use crate::pooling::{Features, Pooling};

/// How the student's parameters are found, with what belongs to that way alone.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Transfer {
    /// They are not: for looking at the structure.
    None,
    /// Layer by layer, by least squares.
    ClosedForm,
    /// The same, with gradient steps on each attention block.
    Blockwise,
    /// After that, gradient steps on everything at once.
    Full(FullStage),
}

impl Transfer {
    /// The way without its options.
    pub fn kind(&self) -> TransferKind {
        match self {
            Self::None => TransferKind::None,
            Self::ClosedForm => TransferKind::ClosedForm,
            Self::Blockwise => TransferKind::Blockwise,
            Self::Full(_) => TransferKind::Full,
        }
    }

    /// The full stage, where there is one.
    pub(super) fn full(&self) -> Option<&FullStage> {
        match self {
            Self::Full(stage) => Some(stage),
            _ => None,
        }
    }
}

/// A way to find the student's parameters, as reports and students name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum TransferKind {
    /// They are not found at all.
    None,
    /// Layer by layer, by least squares.
    ClosedForm,
    /// The same, with gradient steps on each attention block.
    Blockwise,
    /// After that, gradient steps on everything at once.
    Full,
}

impl TransferKind {
    /// All of them, each with what the one before does.
    pub const ALL: [Self; 4] = [Self::None, Self::ClosedForm, Self::Blockwise, Self::Full];

    /// This way; `full` says how its end-to-end stage works, where it has one.
    pub fn with(self, full: FullStage) -> Transfer {
        match self {
            Self::None => Transfer::None,
            Self::ClosedForm => Transfer::ClosedForm,
            Self::Blockwise => Transfer::Blockwise,
            Self::Full => Transfer::Full(full),
        }
    }

    /// The name on the command line and in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::ClosedForm => "closed-form",
            Self::Blockwise => "blockwise",
            Self::Full => "full",
        }
    }
}

/// The end-to-end stage.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct FullStage {
    /// How it works; its seed is the job's.
    pub options: FullOptions,
    /// Where it leaves its state, and takes it up.
    pub checkpoint: Option<CheckpointFolder>,
    /// A student that was not folded: its parameters are gone on from in place of the closed form's, and the options of
    /// the passes that made it are taken in place of the job's.
    pub start: Option<PathBuf>,
}

impl From<FullOptions> for FullStage {
    fn from(options: FullOptions) -> Self {
        Self { options, ..Self::default() }
    }
}

/// A folder for the state of the full stage, see [`full::Checkpoint`](crate::full::Checkpoint).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckpointFolder {
    /// The folder.
    pub path: PathBuf,
    /// Whether an interrupted run is gone on with.
    pub resume: bool,
}

/// A labelled file on which teacher and student are compared.
#[derive(Clone, Debug)]
pub struct Dev {
    /// The file, and its columns: with the label's, but for sets of tagged words and of questions, which say it themselves.
    pub data: Data,
    /// What is measured; without one, what fits labels and outputs best.
    pub metric: Option<Metric>,
}

/// What is to be done. By default: everything, on made-up tokens, by the closed form.
///
/// ```
/// use mabert_transfer::job::{Job, Transfer};
///
/// let job = Job::default().max_seq(64).transfer(Transfer::Blockwise).seed(7);
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Job {
    pub(super) max_seq: Option<usize>,
    pub(super) hidden: Option<usize>,
    pub(super) softmax: Option<Form>,
    pub(super) target: Target,
    pub(super) softmax_error: f64,
    pub(super) sharing: Sharing,
    pub(super) length_tables: bool,
    pub(super) order: Order,
    pub(super) keep: Keep,
    pub(super) fold: bool,
    pub(super) bounds: bool,
    pub(super) until: Option<Pass>,
    pub(super) partial: bool,
    pub(super) transfer: Transfer,
    pub(super) data: Option<Data>,
    pub(super) extra_data: Vec<PathBuf>,
    pub(super) augmentation: bool,
    pub(super) dev: Option<Dev>,
    pub(super) tokenizer: Option<PathBuf>,
    pub(super) input_roles: Vec<(Role, String)>,
    pub(super) calibration_tokens: Option<usize>,
    pub(super) pooling: Option<Pooling>,
    pub(super) seed: u64,
}

impl Default for Job {
    fn default() -> Self {
        Self {
            max_seq: None,
            hidden: None,
            softmax: None,
            target: Target::default(),
            softmax_error: DEFAULT_SOFTMAX_ERROR,
            sharing: Sharing::PerHead,
            length_tables: true,
            order: Order::Auto,
            keep: Keep::default(),
            fold: true,
            bounds: true,
            until: None,
            partial: false,
            transfer: Transfer::ClosedForm,
            data: None,
            extra_data: Vec::new(),
            augmentation: true,
            dev: None,
            tokenizer: None,
            input_roles: Vec::new(),
            calibration_tokens: None,
            pooling: None,
            seed: 0,
        }
    }
}

impl Job {
    /// The longest sequence in tokens, `n`, at least 2; without it the model's own limit, up to
    /// [`DEFAULT_MAX_SEQ`](super::DEFAULT_MAX_SEQ).
    #[must_use]
    pub fn max_seq(mut self, tokens: impl Into<Option<usize>>) -> Self {
        self.max_seq = tokens.into();
        self
    }

    /// The approximators' hidden size, `h`, at least 1; without it `n`, up to
    /// [`DEFAULT_HIDDEN`](super::DEFAULT_HIDDEN).
    #[must_use]
    pub fn hidden(mut self, size: impl Into<Option<usize>>) -> Self {
        self.hidden = size.into();
        self
    }

    /// What stands in the place of softmax. Without a form each layer gets the one that is cheaper on the
    /// [`target`](Self::target), if it is [close enough](Self::softmax_error), else the closer one; hinges where there is
    /// no text to tell, or where a network would lose its linear order.
    #[must_use]
    pub fn softmax(mut self, form: impl Into<Option<Form>>) -> Self {
        self.softmax = form.into();
        self
    }

    /// What the student will run on; by default tract. Costs of forms are counted for it.
    #[must_use]
    pub fn target(mut self, target: Target) -> Self {
        self.target = target;
        self
    }

    /// How close is close enough: the squared error of a layer's contexts, relative to their variance; by default
    /// [`DEFAULT_SOFTMAX_ERROR`](super::DEFAULT_SOFTMAX_ERROR).
    #[must_use]
    pub fn softmax_error(mut self, bound: f64) -> Self {
        self.softmax_error = bound;
        self
    }

    /// Which heads share an approximator; by default none do.
    #[must_use]
    pub fn sharing(mut self, sharing: Sharing) -> Self {
        self.sharing = sharing;
        self
    }

    /// Whether approximators depend on the number of real tokens; by default they do.
    #[must_use]
    pub fn length_tables(mut self, length_tables: bool) -> Self {
        self.length_tables = length_tables;
        self
    }

    /// The order of attention's products; by default linear, and the paper's for a model that needs it.
    #[must_use]
    pub fn order(mut self, order: Order) -> Self {
        self.order = order;
        self
    }

    /// What is left as it is; by default nothing.
    #[must_use]
    pub fn keep(mut self, keep: Keep) -> Self {
        self.keep = keep;
        self
    }

    /// Whether norms are folded into the weights; by default they are. A student that is not folded can be the
    /// [`start`](FullStage::start) of another job.
    #[must_use]
    pub fn fold(mut self, fold: bool) -> Self {
        self.fold = fold;
        self
    }

    /// Whether the student's stream saturates beyond what calibration saw, so that no input makes it overflow; by default
    /// it does.
    #[must_use]
    pub fn bounds(mut self, bounds: bool) -> Self {
        self.bounds = bounds;
        self
    }

    /// The last pass to run.
    #[must_use]
    pub fn until(mut self, pass: impl Into<Option<Pass>>) -> Self {
        self.until = pass.into();
        self
    }

    /// Whether sites that are not recognised are accepted; by default they are not.
    #[must_use]
    pub fn partial(mut self, partial: bool) -> Self {
        self.partial = partial;
        self
    }

    /// How parameters are found; by default by the closed form.
    #[must_use]
    pub fn transfer(mut self, transfer: Transfer) -> Self {
        self.transfer = transfer;
        self
    }

    /// Text to calibrate, train and measure on; random tokens are made up without it. Where [`FullOptions::alpha`] is below
    /// 1 its labels are trained on: the label's column is named, unless the file is of tagged words or of questions.
    #[must_use]
    pub fn data(mut self, data: impl Into<Option<Data>>) -> Self {
        self.data = data.into();
        self
    }

    /// Files of more text, to calibrate and train on but not to measure on: half of all comes from them. Without
    /// [`data`](Self::data) they are not read.
    #[must_use]
    pub fn extra_data(mut self, files: Vec<PathBuf>) -> Self {
        self.extra_data = files;
        self
    }

    /// Whether more is made of the data where it holds fewer tokens than the student sees; by default it is. See
    /// [`Augmentation`](crate::data::Augmentation).
    #[must_use]
    pub fn augmentation(mut self, augmentation: bool) -> Self {
        self.augmentation = augmentation;
        self
    }

    /// Labelled data to measure on after each stage.
    #[must_use]
    pub fn dev(mut self, dev: impl Into<Option<Dev>>) -> Self {
        self.dev = dev.into();
        self
    }

    /// The model's `tokenizer.json`: for data that is text, and for the special tokens around random ones.
    #[must_use]
    pub fn tokenizer(mut self, file: impl Into<PathBuf>) -> Self {
        self.tokenizer = Some(file.into());
        self
    }

    /// What inputs of the model hold, by their names, where neither the graph nor the name tells.
    #[must_use]
    pub fn input_roles(mut self, roles: Vec<(Role, String)>) -> Self {
        self.input_roles = roles;
        self
    }

    /// Tokens that go through the student to calibrate it; without a number [`DEFAULT_TOKENS`](super::DEFAULT_TOKENS), of
    /// text for a feature model [`VECTOR_TOKENS`](super::VECTOR_TOKENS).
    #[must_use]
    pub fn calibration_tokens(mut self, tokens: impl Into<Option<usize>>) -> Self {
        self.calibration_tokens = tokens.into();
        self
    }

    /// How vectors of texts are made of a feature model's outputs, by which it is fitted and measured. Without it that is
    /// told by the outputs (one vector a text is that vector), by sentence-transformers' `1_Pooling/config.json` beside the
    /// model or its tokenizer, and is the mean over tokens where neither tells.
    #[must_use]
    pub fn pooling(mut self, pooling: impl Into<Option<Pooling>>) -> Self {
        self.pooling = pooling.into();
        self
    }

    /// Seed of everything drawn at random; 0 by default.
    #[must_use]
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// What tells how vectors of texts are made, but for the outputs of the model that came from `origin`.
    pub(super) fn features(&self, origin: &str) -> Features {
        Features::new(self.pooling).beside([Path::new(origin)].into_iter().chain(self.tokenizer.as_deref()))
    }

    /// The student that is gone on from.
    pub(super) fn start(&self) -> Option<&Path> {
        self.transfer.full()?.start.as_deref()
    }

    /// Whether an interrupted run is gone on with.
    pub(super) fn resumes(&self) -> bool {
        self.transfer.full().and_then(|stage| stage.checkpoint.as_ref()).is_some_and(|folder| folder.resume)
    }

    /// The options of the full stage, with the job's seed.
    pub(super) fn full_options(&self) -> Option<FullOptions> {
        Some(FullOptions { seed: self.seed, ..self.transfer.full()?.options })
    }
}
