//! What an output of a model is, told by its shapes.

/// How an output is read, and compared with another model's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HeadKind {
    /// Logits `[batch, classes]`, a row a text.
    Classes,
    /// Logits `[batch, n, classes]`, a row a token.
    TokenClasses,
    /// Logits `[batch, n]` over the tokens of a text, as the start and the end of an answer.
    Positions,
    /// Anything else, a row a text.
    Values,
    /// The same, a row a token.
    TokenValues,
}

/// What a row of a value stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RowUnit {
    /// A text of the batch.
    Text,
    /// A token of a text.
    Token,
}

impl HeadKind {
    /// Told by the output's name and its shapes in several batches, each after the batch's length, of different lengths
    /// where there are any. `channels` are the stream's: hidden states and what a pooler makes of them are as wide, or
    /// are called what they are.
    pub(crate) fn from_shapes(name: &str, shapes: &[(usize, Vec<usize>)], channels: usize) -> Self {
        let lengths_differ = shapes.iter().any(|(length, _)| *length != shapes[0].0);
        let over_tokens = shapes.iter().all(|(length, shape)| shape.get(1) == Some(length));
        let last = shapes[0].1.last().copied().unwrap_or(1);
        let is_embedding = EMBEDDINGS.iter().any(|part| name.contains(part));
        let values = last == channels || last == 1 || is_embedding;
        match shapes[0].1.len() {
            3 if over_tokens && values => Self::TokenValues,
            3 if over_tokens => Self::TokenClasses,
            2 if over_tokens && (lengths_differ || name.contains("start") || name.contains("end")) => Self::Positions,
            2 if !values => Self::Classes,
            _ => Self::Values,
        }
    }

    /// What a row of the output stands for.
    pub(crate) fn row_unit(self) -> RowUnit {
        match self {
            Self::TokenClasses | Self::TokenValues => RowUnit::Token,
            Self::Classes | Self::Positions | Self::Values => RowUnit::Text,
        }
    }

    /// Whether rows are logits, of which a softmax makes probabilities.
    pub(crate) fn has_logits(self) -> bool {
        !matches!(self, Self::Values | Self::TokenValues)
    }
}

/// What exporters call outputs that are no logits, whatever their width.
const EMBEDDINGS: [&str; 3] = ["embedding", "pooler", "hidden_state"];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_told_by_shapes() {
        let kind =
            |name: &str, a: &[usize], b: &[usize]| HeadKind::from_shapes(name, &[(5, a.to_vec()), (7, b.to_vec())], 16);
        assert_eq!(kind("logits", &[2, 3], &[2, 3]), HeadKind::Classes);
        assert_eq!(kind("score", &[2, 1], &[2, 1]), HeadKind::Values);
        assert_eq!(kind("pooler_output", &[2, 16], &[2, 16]), HeadKind::Values);
        assert_eq!(kind("sentence_embedding", &[2, 8], &[2, 8]), HeadKind::Values);
        assert_eq!(kind("token_embeddings", &[2, 5, 8], &[2, 7, 8]), HeadKind::TokenValues);
        assert_eq!(kind("hidden", &[2, 5, 16], &[2, 7, 16]), HeadKind::TokenValues);
        assert_eq!(kind("logits", &[2, 5, 9], &[2, 7, 9]), HeadKind::TokenClasses);
        assert_eq!(kind("start_logits", &[2, 5], &[2, 7]), HeadKind::Positions);
        // Where all are as long, its name has to tell.
        assert_eq!(HeadKind::from_shapes("end_logits", &[(5, vec![2, 5])], 16), HeadKind::Positions);
        assert_eq!(HeadKind::from_shapes("logits", &[(5, vec![2, 5])], 16), HeadKind::Classes);
    }
}
