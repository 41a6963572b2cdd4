//! Entities in the tags of words, and what precision and recall of them are: as seqeval counts them.

use std::collections::HashSet;

/// A run of words that are one entity: its type, its first word and its last.
pub(super) type Entity<'t> = (&'t str, usize, usize);

/// A tag's letter and the type of its entity, `_` where it names none.
fn parts(tag: &str) -> (char, &str) {
    let mut letters = tag.chars();
    let letter = letters.next().unwrap_or('O');
    let rest = letters.as_str();
    let kind = rest.split_once('-').map_or(rest, |(_, kind)| kind);
    (letter, if kind.is_empty() { "_" } else { kind })
}

/// Whether an entity ends between two tags.
fn ends((before, kind_before): (char, &str), (tag, kind): (char, &str)) -> bool {
    let by_letters = matches!(before, 'E' | 'S') || (matches!(before, 'B' | 'I') && matches!(tag, 'B' | 'S' | 'O'));
    by_letters || (!matches!(before, 'O' | '.') && kind_before != kind)
}

/// Whether an entity begins between two tags.
fn begins((before, kind_before): (char, &str), (tag, kind): (char, &str)) -> bool {
    let by_letters = matches!(tag, 'B' | 'S') || (matches!(before, 'E' | 'S' | 'O') && matches!(tag, 'E' | 'I'));
    by_letters || (!matches!(tag, 'O' | '.') && kind_before != kind)
}

/// The entities of a sentence's tags, in BIO, BIOES or plain, whichever way they begin (`get_entities` of seqeval).
pub(super) fn entities<'t>(tags: &[&'t str]) -> Vec<Entity<'t>> {
    let mut found = Vec::new();
    let (mut before, mut start) = (('O', ""), 0);
    for (at, tag) in tags.iter().copied().chain(["O"]).enumerate() {
        let now = parts(tag);
        if ends(before, now) {
            found.push((before.1, start, at - 1));
        }
        if begins(before, now) {
            start = at;
        }
        before = now;
    }
    found
}

/// Entities of many sentences, counted.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Counts {
    pub(super) right: usize,
    pub(super) predicted: usize,
    pub(super) real: usize,
}

impl Counts {
    /// Adds a sentence.
    pub(super) fn add(&mut self, predicted: &[&str], real: &[&str]) {
        let (predicted, real): (HashSet<_>, HashSet<_>) =
            (entities(predicted).into_iter().collect(), entities(real).into_iter().collect());
        self.right += predicted.intersection(&real).count();
        self.predicted += predicted.len();
        self.real += real.len();
    }

    /// Of those predicted, the share that is right; 0 where there are none.
    pub(super) fn precision(self) -> f64 {
        self.right as f64 / self.predicted.max(1) as f64
    }

    /// Of the real ones, the share that is found; 0 where there are none.
    pub(super) fn recall(self) -> f64 {
        self.right as f64 / self.real.max(1) as f64
    }

    /// The harmonic mean of both.
    pub(super) fn f1(self) -> f64 {
        2.0 * self.right as f64 / (self.predicted + self.real).max(1) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(tags: &str) -> Vec<(String, usize, usize)> {
        let tags: Vec<&str> = tags.split(' ').collect();
        entities(&tags).into_iter().map(|(kind, start, end)| (kind.to_owned(), start, end)).collect()
    }

    fn expected(found: &[(&str, usize, usize)]) -> Vec<(String, usize, usize)> {
        found.iter().map(|(kind, start, end)| ((*kind).to_owned(), *start, *end)).collect()
    }

    /// What seqeval 1.2.2's `get_entities` gives.
    #[test]
    fn entities_are_those_of_seqeval() {
        assert_eq!(of("B-PER I-PER O B-LOC"), expected(&[("PER", 0, 1), ("LOC", 3, 3)]));
        assert_eq!(of("O O"), expected(&[]));
        // An entity may begin with I, and one of another type begins a new one.
        assert_eq!(of("I-PER I-PER O I-LOC"), expected(&[("PER", 0, 1), ("LOC", 3, 3)]));
        assert_eq!(of("B-PER I-LOC I-LOC"), expected(&[("PER", 0, 0), ("LOC", 1, 2)]));
        assert_eq!(of("B-PER B-PER I-PER"), expected(&[("PER", 0, 0), ("PER", 1, 2)]));
        assert_eq!(of("S-ORG B-PER E-PER E-PER"), expected(&[("ORG", 0, 0), ("PER", 1, 2), ("PER", 3, 3)]));
        // Types may have hyphens in them, or no name at all.
        assert_eq!(of("B-art-film I-art-film"), expected(&[("art-film", 0, 1)]));
        assert_eq!(of("B I O I"), expected(&[("_", 0, 1), ("_", 3, 3)]));
    }

    /// The example of seqeval's README: one entity of two is right.
    #[test]
    fn f1_is_that_of_seqevals_example() {
        let real = ["O O O B-MISC I-MISC I-MISC O", "B-PER I-PER O"];
        let predicted = ["O O B-MISC I-MISC I-MISC I-MISC O", "B-PER I-PER O"];
        let mut counts = Counts::default();
        for (predicted, real) in predicted.iter().zip(real) {
            let split = |tags: &'static str| tags.split(' ').collect::<Vec<_>>();
            counts.add(&split(predicted), &split(real));
        }
        assert_eq!((counts.precision(), counts.recall(), counts.f1()), (0.5, 0.5, 0.5));
        assert_eq!(Counts::default().f1(), 0.0);
    }
}
