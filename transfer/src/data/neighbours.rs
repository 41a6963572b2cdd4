//! Tokens that mean nearly the same: the nearest in a model's own table of words.

use std::collections::{BTreeSet, HashMap, HashSet};

use ndarray::{Array2, Axis};
use rayon::prelude::*;

/// Neighbours of a token.
const COUNT: usize = 8;
/// Rows among which they are looked for: of larger tables, as many, evenly spread.
const MOST_CANDIDATES: usize = 32_768;
/// Tokens whose neighbours are looked for at once.
const AT_ONCE: usize = 256;

/// The nearest tokens by cosine.
pub(super) struct Neighbours {
    /// Rows of norm 1, or of zeros.
    table: Array2<f32>,
    /// Rows of the table that may stand for others.
    candidates: Vec<usize>,
    /// The same rows side by side.
    rows: Array2<f32>,
    nearest: HashMap<i64, Vec<i64>>,
}

impl Neighbours {
    /// Among the rows of a table `[vocabulary, channels]`, without the special tokens.
    pub(super) fn new(mut table: Array2<f32>, special: &HashSet<i64>) -> Self {
        for mut row in table.rows_mut() {
            let norm = row.dot(&row).sqrt();
            let scale = if norm.is_normal() { norm.recip() } else { 0.0 };
            row.mapv_inplace(|v| v * scale);
        }
        let is_word = |row: &usize| !special.contains(&(*row as i64)) && table.row(*row).iter().any(|v| *v != 0.0);
        let words: Vec<usize> = (0..table.nrows()).filter(is_word).collect();
        let candidates: Vec<usize> = match words.len() {
            0..=MOST_CANDIDATES => words,
            count => (0..MOST_CANDIDATES).map(|at| words[at * count / MOST_CANDIDATES]).collect(),
        };
        let rows = table.select(Axis(0), &candidates);
        Self { table, candidates, rows, nearest: HashMap::new() }
    }

    /// Looks for the neighbours of these tokens.
    pub(super) fn look_up(&mut self, ids: &BTreeSet<i64>) {
        let is_row = |id: &i64| usize::try_from(*id).is_ok_and(|row| row < self.table.nrows());
        let new: Vec<i64> = ids.iter().copied().filter(|id| is_row(id) && !self.nearest.contains_key(id)).collect();
        let found: Vec<_> = new.par_chunks(AT_ONCE).flat_map_iter(|ids| self.nearest_to(ids)).collect();
        self.nearest.extend(found);
    }

    fn nearest_to(&self, ids: &[i64]) -> Vec<(i64, Vec<i64>)> {
        let rows: Vec<usize> = ids.iter().map(|id| *id as usize).collect();
        let cosines = self.table.select(Axis(0), &rows).dot(&self.rows.t());
        let nearest = |(&id, cosines): (&i64, ndarray::ArrayView1<'_, f32>)| {
            let others = (0..cosines.len()).filter(|at| self.candidates[*at] as i64 != id);
            let mut others: Vec<usize> = others.collect();
            let count = COUNT.min(others.len());
            let nearer = |a: &usize, b: &usize| cosines[*b].total_cmp(&cosines[*a]).then(a.cmp(b));
            if count < others.len() {
                others.select_nth_unstable_by(count, nearer);
                others.truncate(count);
            }
            others.sort_by(nearer);
            (id, others.into_iter().map(|at| self.candidates[at] as i64).collect())
        };
        ids.iter().zip(cosines.rows()).map(nearest).collect()
    }

    /// The tokens nearest to one that was looked up, the nearest first.
    pub(super) fn nearest(&self, id: i64) -> &[i64] {
        self.nearest.get(&id).map_or(&[], Vec::as_slice)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_are_those_of_the_smallest_angle() {
        // A fan of vectors, of lengths that do not matter; row 3 is special and row 5 nothing.
        let row = |at: usize| {
            let (angle, length) = (0.05 * at as f32, 1.0 + (at * 7 % 5) as f32);
            if at == 5 { [0.0; 2] } else { [length * angle.cos(), length * angle.sin()] }
        };
        let table = Array2::from_shape_fn((30, 2), |(at, column)| row(at)[column]);
        let mut neighbours = Neighbours::new(table, &HashSet::from([3]));
        neighbours.look_up(&BTreeSet::from([0, 4, 29, 99, -1]));
        assert_eq!(neighbours.nearest(0), [1, 2, 4, 6, 7, 8, 9, 10]);
        assert_eq!(neighbours.nearest(4)[..2], [2, 6]);
        assert_eq!(neighbours.nearest(29)[..3], [28, 27, 26]);
        assert!(neighbours.nearest(99).is_empty() && neighbours.nearest(-1).is_empty());
    }
}
