//! Random tokens of many lengths, where there is no text.

use rand::{Rng as _, SeedableRng as _, rngs::StdRng};

use super::tokens::Sequence;

/// Sequences of random token ids below `vocabulary`, `tokens` in all, of 1 to `longest` tokens each.
pub fn made_up_sequences(vocabulary: usize, longest: usize, tokens: usize, seed: u64) -> Vec<Sequence> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut sequences = Vec::new();
    let mut left = tokens.max(1);
    while left > 0 {
        let length = rng.random_range(1..=longest).min(left);
        left -= length;
        let ids = (0..length).map(|_| rng.random_range(0..vocabulary.max(1)) as i64).collect();
        let line = sequences.len() + 1;
        sequences.push(Sequence { ids, types: vec![0; length], label: None, line, truncated: false });
    }
    sequences
}
