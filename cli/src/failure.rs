//! What went wrong: exit codes, and messages that name options.
//!
//! Exit codes: 1 a check did not hold, 2 usage, 3 the model or the data cannot be used.

use mabert_transfer::Setting;

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
        Passes::PositionBias(_) | Passes::NoLinearOrder => 2,
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
                Transfer::Check { .. } => 1,
                Transfer::Setting { .. } => 2,
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

/// The error and its causes, and the options that it is about; most messages name their cause already.
pub(crate) fn message(error: &anyhow::Error) -> String {
    let mut message = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if message.is_empty() {
            message = cause;
        } else if !message.contains(&cause) {
            message = format!("{message}: {cause}");
        }
    }
    match options(error).as_slice() {
        [] => message,
        options => format!("{message} ({})", options.join(", ")),
    }
}

/// How the settings that an error is about are spelled here.
fn options(error: &anyhow::Error) -> Vec<&'static str> {
    for cause in error.chain() {
        if let Some(e) = cause.downcast_ref::<mabert_transfer::Error>() {
            return e.settings().iter().filter_map(|setting| option(*setting)).collect();
        } else if let Some(mabert_runtime::Error::NoOnnxruntime(_)) = cause.downcast_ref() {
            return vec!["--ort-lib"];
        }
    }
    Vec::new()
}

fn option(setting: Setting) -> Option<&'static str> {
    Some(match setting {
        Setting::MaxSeq => "--max-seq",
        Setting::Hidden => "--hidden",
        Setting::PaperOrder => "--attention paper",
        Setting::Network => "--softmax network",
        Setting::KeepSoftmax => "--keep softmax",
        Setting::KeepNorm => "--keep norm",
        Setting::Unfolded => "--no-fold",
        Setting::ClosedForm => "--transfer closed-form",
        Setting::Data => "--data",
        Setting::DataFormat => "--data-format",
        Setting::TextColumn => "--text-column",
        Setting::LabelColumn => "--label-column",
        Setting::Classes => "--classes",
        Setting::Truncate => "--truncate",
        Setting::Arrays => "--npz",
        Setting::InputRole => "--input",
        Setting::Pooling => "--pooling",
        Setting::PairColumn => "--pair-column",
        Setting::Tokenizer => "--tokenizer",
        Setting::CalibrationTokens => "--calibration-tokens",
        Setting::NoLabels => "--alpha 1",
        Setting::HiddenWeight => "--hidden-weight",
        Setting::Rate => "--lr",
        Setting::Checkpoint => "--checkpoint",
        Setting::Resume => "--resume",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;
    use crate::arguments::Arguments;

    /// Every setting has an option that some command takes, with the value that it is given.
    #[test]
    fn every_setting_is_an_option() {
        let program = Arguments::command();
        for setting in Setting::ALL {
            let spelling = option(setting).unwrap_or_else(|| panic!("{setting:?} has no option"));
            let (name, value) = spelling.split_once(' ').unwrap_or((spelling, ""));
            let has_option = |command: &clap::Command| {
                let option = command.get_arguments().find(|a| a.get_long() == name.strip_prefix("--"));
                let values = option.map(|option| option.get_possible_values()).unwrap_or_default();
                option.is_some()
                    && (value.is_empty() || values.is_empty() || values.iter().any(|v| v.matches(value, false)))
            };
            assert!(program.get_subcommands().any(has_option), "{spelling}");
        }
    }

    #[test]
    fn messages_end_in_the_options_that_they_are_about() {
        let settings = &[Setting::Resume, Setting::Checkpoint];
        let error = mabert_transfer::Error::Setting { reason: "it is there already".to_owned(), settings };
        let error = anyhow::Error::from(error).context("folder");
        assert_eq!(message(&error), "folder: it is there already (--resume, --checkpoint)");
        assert_eq!(exit_code(&error), 2);
    }
}
