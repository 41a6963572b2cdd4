//! Exit codes: 1 a check did not hold, 2 usage, 3 the model or the data cannot be used.

/// A check that did not hold; what was measured has been printed already.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct CheckFailed(pub(crate) String);

/// An option that does not fit.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Usage(pub(crate) String);

pub(crate) fn exit_code(error: &anyhow::Error) -> u8 {
    use mabert_passes::Error as Passes;
    use mabert_transfer::Error as Transfer;
    let passes = |e: &Passes| match e {
        Passes::Option(_) => 2,
        Passes::Incomplete { .. } => 1,
        _ => 3,
    };
    for cause in error.chain() {
        if cause.is::<CheckFailed>() {
            return 1;
        } else if cause.is::<Usage>() {
            return 2;
        } else if let Some(e) = cause.downcast_ref::<Passes>() {
            return passes(e);
        } else if let Some(e) = cause.downcast_ref::<Transfer>() {
            return match e {
                Transfer::Passes(e) => passes(e),
                Transfer::Check(_) => 1,
                _ => 3,
            };
        }
    }
    3
}

/// Whether standard output holds the result already.
pub(crate) fn is_reported(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| cause.is::<CheckFailed>())
}

/// The error and its causes; most messages name their cause already.
pub(crate) fn message(error: &anyhow::Error) -> String {
    let mut message = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if message.is_empty() {
            message = cause;
        } else if !message.contains(&cause) {
            message = format!("{message}: {cause}");
        }
    }
    message
}
