//! What stages that take gradient steps share: in which order they see their data, and how their rate falls.

use rand::rngs::StdRng;
use rand::seq::SliceRandom as _;

/// Indices in shuffled rounds, each of which holds every index once.
pub(crate) struct Rounds {
    count: usize,
    waiting: Vec<usize>,
    rng: StdRng,
}

impl Rounds {
    /// Of the indices below `count`.
    ///
    /// # Panics
    /// There are none.
    pub(crate) fn new(count: usize, rng: StdRng) -> Self {
        assert!(count > 0, "there must be something to see");
        Self { count, waiting: Vec::new(), rng }
    }

    /// The next `wanted` indices.
    pub(crate) fn draw(&mut self, wanted: usize) -> Vec<usize> {
        while self.waiting.len() < wanted {
            let mut round: Vec<usize> = (0..self.count).collect();
            round.shuffle(&mut self.rng);
            self.waiting.append(&mut round);
        }
        self.waiting.drain(..wanted).collect()
    }
}

/// The share of the rate at a step: it falls from 1 to nothing as a cosine.
pub(crate) fn cosine(step: usize, steps: usize) -> f32 {
    0.5 * (1.0 + (std::f32::consts::PI * step as f32 / steps as f32).cos())
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng as _;

    use super::*;

    #[test]
    fn every_round_holds_every_index_once() {
        let mut rounds = Rounds::new(5, StdRng::seed_from_u64(1));
        let seen: Vec<usize> = (0..10).flat_map(|_| rounds.draw(3)).collect();
        assert_eq!(seen.len(), 30);
        for round in seen.chunks(5) {
            let mut sorted = round.to_vec();
            sorted.sort_unstable();
            assert_eq!(sorted, [0, 1, 2, 3, 4]);
        }
        assert!(seen.chunks(5).any(|round| round != &seen[..5]), "rounds differ");
    }

    #[test]
    fn the_rate_falls_from_all_to_nothing() {
        assert_eq!(cosine(0, 10), 1.0);
        approx::assert_abs_diff_eq!(cosine(5, 10), 0.5, epsilon = 1e-6);
        assert!((0..9).all(|step| cosine(step + 1, 10) < cosine(step, 10)));
    }
}
