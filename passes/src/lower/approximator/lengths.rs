//! How parameters depend on the number of real tokens. Tables with a row for each length would be large; a length is
//! turned into a few features, read from one small table with `Gather`, and each layer multiplies them by its own knots.
//! It is the same family of tables, piecewise linear between knots, at a fraction of the size.

use mabert_graph::Tensor;

/// The features of a length: how much each knot counts.
#[derive(Clone, Debug)]
pub struct LengthFeatures {
    /// The lengths at which parameters are given.
    pub knots: Vec<usize>,
    longest: usize,
}

impl LengthFeatures {
    /// Two knots an octave up to `max_seq`, for lengths up to `longest`; beyond the last knot its parameters hold.
    pub fn new(max_seq: usize, longest: usize) -> Self {
        let octaves = (0..).map(|i| 1usize << i).take_while(|&k| k < max_seq);
        let mut knots: Vec<usize> = octaves.flat_map(|k| [k, k + k / 2]).filter(|&k| k < max_seq).collect();
        knots.push(max_seq);
        knots.dedup();
        Self { knots, longest }
    }

    /// The same parameters at every length.
    pub fn single(max_seq: usize) -> Self {
        Self { knots: vec![max_seq], longest: max_seq }
    }

    /// The weights of the knots at `length`, which sum to 1: linear between the two neighbours.
    pub fn at(&self, length: usize) -> Vec<f32> {
        let mut weights = vec![0.0; self.knots.len()];
        match self.knots.iter().position(|&k| k >= length) {
            Some(0) => weights[0] = 1.0,
            Some(next) => {
                let (low, high) = (self.knots[next - 1] as f32, self.knots[next] as f32);
                let share = (length as f32 - low) / (high - low);
                (weights[next - 1], weights[next]) = (1.0 - share, share);
            }
            None => *weights.last_mut().expect("there is a knot") = 1.0,
        }
        weights
    }

    /// A row for each length from 0 to the longest, and the same divided by the length; a sentence of no tokens shares
    /// nothing.
    pub(super) fn tables(&self) -> [Tensor; 2] {
        let shape = [self.longest + 1, self.knots.len()];
        let rows = |divisor: fn(usize) -> f32| {
            let row = move |length: usize| {
                let divisor = divisor(length);
                self.at(length).into_iter().map(move |w| if length == 0 { 0.0 } else { w / divisor })
            };
            Tensor::new(&shape, (0..=self.longest).flat_map(row).collect())
        };
        [rows(|_| 1.0), rows(|length| length as f32)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn knots_are_two_an_octave_and_the_last_holds_beyond() {
        let features = LengthFeatures::new(12, 20);
        assert_eq!(features.knots, [1, 2, 3, 4, 6, 8, 12]);
        assert_eq!(features.at(5), [0.0, 0.0, 0.0, 0.5, 0.5, 0.0, 0.0]);
        assert_eq!(features.at(17), features.at(12));
        let [plain, over_length] = features.tables().map(|t| t.to_f32());
        assert_eq!(plain.shape(), [21, 7]);
        assert!(plain.row_sum(0) == 0.0 && plain.row_sum(20) == 1.0);
        assert!((over_length.row_sum(20) - 0.05).abs() < 1e-7);
    }

    trait RowSum {
        fn row_sum(&self, row: usize) -> f32;
    }

    impl RowSum for ndarray::ArrayD<f32> {
        fn row_sum(&self, row: usize) -> f32 {
            self.index_axis(ndarray::Axis(0), row).sum()
        }
    }
}
