//! What can be set of a job, as errors speak of it.

/// Something that can be set, to which an error points: it does not fit, or setting it so would help. Messages say it in
/// words; a program that has options for it can add how it spells them, see [`Error::settings`](crate::Error::settings).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Setting {
    /// The longest sequence, see [`Job::max_seq`](crate::job::Job::max_seq).
    MaxSeq,
    /// The hidden size of the approximators.
    Hidden,
    /// The paper's order of attention's products.
    PaperOrder,
    /// Networks in the place of softmax, see [`Job::softmax`](crate::job::Job::softmax).
    Network,
    /// Softmax is kept.
    KeepSoftmax,
    /// Norms are kept.
    KeepNorm,
    /// The student is not folded.
    Unfolded,
    /// Parameters are found by the closed form.
    ClosedForm,
    /// The file of texts.
    Data,
    /// How the file of texts holds them.
    DataFormat,
    /// The column that holds the text.
    TextColumn,
    /// The column that holds the label.
    LabelColumn,
    /// The words that name the classes of labels.
    Classes,
    /// Texts that are too long are cut.
    Truncate,
    /// Ready arrays in place of texts.
    Arrays,
    /// What an input of the model holds.
    InputRole,
    /// How vectors of texts are made of a feature model's outputs.
    Pooling,
    /// The second text of a pair's column.
    PairColumn,
    /// The model's tokenizer.
    Tokenizer,
    /// Tokens that go through the student.
    CalibrationTokens,
    /// The full stage learns from the teacher alone, not from labels.
    NoLabels,
    /// What hidden states count in the full stage.
    HiddenWeight,
    /// The learning rate of the full stage.
    Rate,
    /// The folder for the state of the full stage.
    Checkpoint,
    /// An interrupted full stage is gone on with.
    Resume,
}

impl Setting {
    /// All of them.
    pub const ALL: [Self; 25] = [
        Self::MaxSeq,
        Self::Hidden,
        Self::PaperOrder,
        Self::Network,
        Self::KeepSoftmax,
        Self::KeepNorm,
        Self::Unfolded,
        Self::ClosedForm,
        Self::Data,
        Self::DataFormat,
        Self::TextColumn,
        Self::LabelColumn,
        Self::Classes,
        Self::Truncate,
        Self::Arrays,
        Self::InputRole,
        Self::Pooling,
        Self::PairColumn,
        Self::Tokenizer,
        Self::CalibrationTokens,
        Self::NoLabels,
        Self::HiddenWeight,
        Self::Rate,
        Self::Checkpoint,
        Self::Resume,
    ];
}
