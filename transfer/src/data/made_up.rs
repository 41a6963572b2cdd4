//! Random tokens of many lengths, where there is no text.

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

/// Sequences of random token ids below `vocabulary`, `tokens` in all, of 1 to `longest` tokens each.
pub fn made_up_sequences(vocabulary: usize, longest: usize, tokens: usize, seed: u64) -> Vec<Sequence> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut sequences = Vec::new();
    let mut left = tokens.max(1);
    while left > 0 {
        let length = any_length(longest, &mut rng).min(left);
        left -= length;
        let ids = (0..length).map(|_| rng.random_range(0..vocabulary.max(1)) as i64).collect();
        let line = sequences.len() + 1;
        sequences.push(Sequence { ids, types: vec![0; length], label: None, line, truncated: false });
    }
    sequences
}
