//! Random tokens: of many lengths, where there is no text, and of what text has next to nothing of.

use rand::{Rng as _, SeedableRng as _, rngs::StdRng};

use super::tokens::Sequence;

/// A length from 1 to `longest`: half the time all are as likely, half the time all octaves are. Short sentences hold few
/// tokens, and would hardly count otherwise.
pub(super) fn any_length(longest: usize, rng: &mut StdRng) -> usize {
    if rng.random_bool(0.5) {
        return rng.random_range(1..=longest);
    }
    let exponent = rng.random_range(0.0..=((longest + 1) as f64).ln());
    (exponent.exp() as usize).clamp(1, longest)
}

/// What made-up sequences are made of.
#[derive(Clone, Debug, Default)]
pub struct Vocabulary {
    /// Token ids are below it.
    pub size: usize,
    /// The special tokens before a text and after it, where a tokenizer tells them. A model answers to them as to no
    /// other, and no random tokens stand for them.
    pub frame: (Vec<i64>, Vec<i64>),
}

impl Vocabulary {
    /// Whether `id` is one of its tokens.
    pub fn holds(&self, id: i64) -> bool {
        usize::try_from(id).is_ok_and(|id| id < self.size)
    }

    /// Random ids.
    fn random(&self, length: usize, rng: &mut StdRng) -> Sequence {
        let ids = (0..length).map(|_| rng.random_range(0..self.size.max(1)) as i64).collect();
        Sequence { ids, types: vec![0; length], label: None, line: 0, truncated: false, made_up: true }
    }

    /// Random ids between the special tokens, where there is room for these.
    fn random_in_frame(&self, length: usize, rng: &mut StdRng) -> Sequence {
        let mut sequence = self.random(length, rng);
        let (before, after) = &self.frame;
        if length >= before.len() + after.len() {
            sequence.ids[..before.len()].copy_from_slice(before);
            sequence.ids[length - after.len()..].copy_from_slice(after);
        }
        sequence
    }
}

/// Sequences of random token ids, `tokens` in all, of 1 to `longest` tokens each.
pub fn made_up_sequences(vocabulary: &Vocabulary, longest: usize, tokens: usize, seed: u64) -> Vec<Sequence> {
    const FRAMED: f64 = 7.0 / 8.0;
    let mut rng = StdRng::seed_from_u64(seed);
    let mut sequences = Vec::new();
    let mut left = tokens.max(1);
    while left > 0 {
        let length = any_length(longest, &mut rng).min(left);
        left -= length;
        sequences.push(match rng.random_bool(FRAMED) {
            true => vocabulary.random_in_frame(length, &mut rng),
            false => vocabulary.random(length, &mut rng),
        });
    }
    sequences
}

/// What text has next to nothing of, but users send: a few random tokens, and one token over and over. No norm bounds
/// a student: what it does with tokens unlike any that it was fitted to grows from layer to layer, until it overflows.
pub fn odd_sequences(vocabulary: &Vocabulary, longest: usize, seed: u64) -> Vec<Sequence> {
    const TOKENS_OF_EACH_LENGTH: usize = 192;
    const REPEATED: usize = 4;
    let mut rng = StdRng::seed_from_u64(seed);
    let mut sequences = Vec::new();
    for length in 2..=longest.min(7) {
        sequences.extend((0..TOKENS_OF_EACH_LENGTH / length).map(|i| match i % 2 {
            0 => vocabulary.random(length, &mut rng),
            _ => vocabulary.random_in_frame(length, &mut rng),
        }));
    }
    let octaves = std::iter::successors(Some(longest), |length| Some(length / 2));
    for length in octaves.take_while(|length| *length > 7) {
        sequences.extend((0..REPEATED).map(|_| {
            let one = vocabulary.random(1, &mut rng);
            Sequence { ids: one.ids.repeat(length), types: one.types.repeat(length), ..one }
        }));
    }
    sequences
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn odd_sequences_are_short_or_repeat_one_token() {
        let vocabulary = Vocabulary { size: 500, frame: (vec![7], vec![8]) };
        let made = odd_sequences(&vocabulary, 40, 1);
        let (short, repeated): (Vec<_>, Vec<_>) = made.iter().partition(|s| s.ids.len() < 8);
        assert!((2..8).all(|length| short.iter().any(|s| s.ids.len() == length)));
        let lengths: Vec<usize> = repeated.iter().map(|s| s.ids.len()).collect();
        assert_eq!(lengths, [[40; 4], [20; 4], [10; 4]].concat());
        assert!(repeated.iter().all(|s| s.ids.iter().all(|id| *id == s.ids[0])));
        assert!(made.iter().flat_map(|s| &s.ids).all(|id| (0..500).contains(id)));
        assert_ne!(odd_sequences(&vocabulary, 40, 2), made);
        assert!(odd_sequences(&vocabulary, 2, 1).iter().all(|s| s.ids.len() == 2));
    }

    #[test]
    fn most_made_up_sequences_stand_between_special_tokens() {
        let vocabulary = Vocabulary { size: 500, frame: (vec![7], vec![8, 9]) };
        let made = made_up_sequences(&vocabulary, 20, 4000, 1);
        assert_eq!(made.iter().map(|s| s.ids.len()).sum::<usize>(), 4000);
        let long: Vec<_> = made.iter().filter(|s| s.ids.len() >= 3).collect();
        let framed = long.iter().filter(|s| s.ids[0] == 7 && s.ids.ends_with(&[8, 9])).count();
        assert!(framed > long.len() * 3 / 4 && framed < long.len(), "{framed} of {}", long.len());
    }
}
