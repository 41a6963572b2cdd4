//! Questions with contexts that may be longer than a model takes: windows of them, which overlap.

use std::path::Path;

use tokenizers::{Encoding, PostProcessor as _, TruncationDirection};

use super::tokens::{Sequence, TextEncoder};
use crate::{Error, Result, Setting};

/// A question with all of its context, or a part of it.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Window {
    /// What a model reads.
    pub sequence: Sequence,
    /// Of each token that is of the context, its first byte there and the one behind its last.
    pub places: Vec<Option<(usize, usize)>>,
}

/// Tokens that two windows of a context share, where half a window has as many.
const OVERLAP: usize = 128;

impl TextEncoder {
    /// Makes token ids of a question with its context: of a long one in several windows, which overlap.
    ///
    /// # Errors
    /// As those of [`Self::encode`]; or no room is left for the context.
    pub fn windows(&self, file: &Path, question: &str, context: &str, line: usize) -> Result<Vec<Window>> {
        let tokenizer = self.tokenizer(file)?;
        let fault = |e| self.fault(e);
        let mut question = tokenizer.encode_fast(question, false).map_err(fault)?;
        let mut context = tokenizer.encode(context, false).map_err(fault)?;
        context.set_type_ids(vec![1; context.len()]);
        let special = tokenizer.get_post_processor().map_or(0, |p| p.added_tokens(true));
        let room = self.longest().saturating_sub(special);
        if room < 2 {
            let reason = format!("{} tokens leave no room for a question and a context", self.longest());
            return Err(Error::line(file, line, reason).helped_by(&[Setting::MaxSeq]));
        }
        let truncated = question.len() > room / 2;
        question.truncate(room / 2, 0, TruncationDirection::Right);
        question.set_overflowing(Vec::new());
        let room = room - question.len();
        context.truncate(room, OVERLAP.min(room / 2), TruncationDirection::Right);
        let others = context.take_overflowing();
        let window = |part: Encoding| {
            let encoding = tokenizer.post_process(question.clone(), Some(part), true).map_err(fault)?;
            let of_context =
                |(sequence, &bytes): (&Option<usize>, &(usize, usize))| (*sequence == Some(1)).then_some(bytes);
            let places = encoding.get_sequence_ids().iter().zip(encoding.get_offsets()).map(of_context).collect();
            Ok(Window { sequence: self.checked(file, Self::sequence((encoding, truncated), None, line))?, places })
        };
        std::iter::once(context).chain(others).map(window).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Overlong;

    fn encoder(longest: usize) -> TextEncoder {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/bert-mini-sst2/tokenizer.json");
        TextEncoder::new(Some(&path), longest, Overlong::Truncate).unwrap()
    }

    #[test]
    fn windows_overlap_and_cover_the_context() {
        let context = (0..300).map(|n| format!("good{n}é")).collect::<Vec<_>>().join(" ");
        for longest in [24, 64, 5000] {
            let windows = encoder(longest).windows(Path::new("x"), "what is good ?", &context, 3).unwrap();
            assert_eq!(windows.len() == 1, longest == 5000);
            let mut behind = 0;
            for window in &windows {
                let Window { sequence, places } = window;
                assert!(sequence.ids.len() <= longest && places.len() == sequence.ids.len());
                let real: Vec<(usize, usize)> = places.iter().copied().flatten().collect();
                let first = places.iter().position(Option::is_some).unwrap();
                assert!(first > 1 && sequence.types[first] == 1 && sequence.types[first - 1] == 0);
                assert!(real[0].0 <= behind, "{longest}: {} after {behind}", real[0].0);
                assert!(real.iter().all(|(start, end)| context.get(*start..*end).is_some()));
                behind = real.last().unwrap().1;
            }
            assert_eq!(behind, context.len());
        }
        let refused = encoder(4).windows(Path::new("x"), "what ?", "good", 3).unwrap_err().to_string();
        assert!(refused.contains("no room"), "{refused}");
        let cut = encoder(16).windows(Path::new("x"), &"what ".repeat(40), "good film", 3).unwrap();
        assert!(cut.iter().all(|w| w.sequence.truncated && w.sequence.ids.len() <= 16));
    }
}
