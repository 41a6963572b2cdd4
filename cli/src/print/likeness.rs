//! How alike two models' outputs are, in columns that say something of what the outputs are.

use mabert_transfer::compare::OutputDistance;
use mabert_transfer::pooling::Pooling;

use super::{one_line, percentage};

/// The columns beside those of every value: of classes the share of the same ones, of vectors that of the same neighbours.
pub(crate) struct Likeness {
    classes: bool,
    vectors: bool,
}

impl Likeness {
    /// Those that any of the outputs has something for.
    pub(crate) fn new(outputs: &[&OutputDistance]) -> Self {
        let vectors = outputs.iter().any(|o| o.vectors.is_some());
        Self { classes: outputs.iter().any(|o| o.agreement.is_some()), vectors }
    }

    pub(crate) fn header(&self) -> Vec<&'static str> {
        let columns = [(self.vectors, "Same neighbour"), (self.classes, "Same argmax")];
        columns.into_iter().filter_map(|(is_shown, name)| is_shown.then_some(name)).collect()
    }

    pub(crate) fn cells(&self, output: &OutputDistance) -> Vec<String> {
        let neighbours = output.vectors.as_ref().and_then(|vectors| vectors.same_neighbour);
        let columns = [(self.vectors, neighbours), (self.classes, output.agreement)];
        columns.into_iter().filter(|(is_shown, _)| *is_shown).map(|(_, share)| percentage(share)).collect()
    }

    /// Whether any output is compared by vectors of texts.
    pub(crate) fn has_vectors(&self) -> bool {
        self.vectors
    }

    /// A line that says what is compared, where that is vectors of texts.
    pub(crate) fn vectors(&self, outputs: &[&OutputDistance]) -> Option<String> {
        let described = outputs.iter().filter_map(|output| {
            let vectors = output.vectors.as_ref()?;
            let what = match vectors.pooling {
                Pooling::Mean => "the mean over its tokens",
                Pooling::First => "its first token's",
                _ => "as the model gives it",
            };
            Some(one_line(format!("{} ({what})", output.output)))
        });
        let described: Vec<String> = described.collect();
        (!described.is_empty())
            .then(|| format!("Cosines and nearest neighbours are of each text's vector: {}.", described.join(", ")))
    }
}

/// What one line says of how alike two models' outputs are.
pub(crate) fn in_words(output: &OutputDistance) -> String {
    let mut words = output.cosines().map_or_else(String::new, |(_, mean)| format!(", mean cosine {mean:.4}"));
    let neighbours = output.vectors.as_ref().and_then(|vectors| vectors.same_neighbour);
    for (name, share) in [("same neighbour", neighbours), ("same argmax", output.agreement)] {
        words += &share.map_or_else(String::new, |share| format!(", {name} {:.1} %", 100.0 * share));
    }
    words
}
