//! Least squares of `y` on `a * (x + z W + b) + c`, channel by channel, with a ridge that pulls `W` towards what it was.
//!
//! With `v = a (W - W0)` and `r = x + z W0 + b0` the problem is linear: `y = a r + z v + d` for each channel, with `r`
//! of its own and `z` common to all. One Cholesky factor of the Gram matrix of `z` serves every channel, and `a` follows
//! from the Schur complement. Sums are kept in float64 and add up, whatever the amount of text.

use faer::linalg::matmul::triangular::{self, BlockStructure};
use faer::linalg::solvers::Solve as _;
use faer::{Accum, Mat, MatRef, Par, Side};
use ndarray::{Array1, Array2, ArrayView2, Axis};

/// The ridge, as a part of the mean diagonal of the Gram matrix.
const RIDGE: f64 = 1e-3;

/// Sums over rows (tokens) of `z` `[rows, F]`, `r` and `y` `[rows, C]`.
pub(super) struct Regression {
    rows: f64,
    z: Array1<f64>,
    r: Array1<f64>,
    y: Array1<f64>,
    /// Lower half of `z' z`, `[F, F]`.
    zz: Mat<f64>,
    /// `[F, C]`.
    zr: Mat<f64>,
    /// `[F, C]`.
    zy: Mat<f64>,
    rr: Array1<f64>,
    ry: Array1<f64>,
    yy: Array1<f64>,
}

/// What the student's part becomes.
pub(super) struct Solution {
    /// What is added to the weight, `[F, C]`.
    pub(super) weight: Array2<f64>,
    /// The norm's scale, `[C]`.
    pub(super) scale: Array1<f64>,
    /// The norm's offset, `[C]`.
    pub(super) offset: Array1<f64>,
}

/// Which unknowns are solved for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Unknowns {
    /// The norm's affine map only: `z` plays no part.
    Affine,
    /// The weight and the affine map.
    WeightAndAffine,
    /// The weight and the offset; the scale is 1, as where the norm is kept and the target is its input.
    WeightAndOffset,
}

impl Regression {
    pub(super) fn new(features: usize, channels: usize) -> Self {
        let vector = || Array1::zeros(channels);
        Self {
            rows: 0.0,
            z: Array1::zeros(features),
            r: vector(),
            y: vector(),
            zz: Mat::zeros(features, features),
            zr: Mat::zeros(features, channels),
            zy: Mat::zeros(features, channels),
            rr: vector(),
            ry: vector(),
            yy: vector(),
        }
    }

    /// Adds rows, each with a weight (1 where none are given). With no features, `z` is `[rows, 0]`.
    pub(super) fn add(
        &mut self,
        z: ArrayView2<'_, f32>,
        r: ArrayView2<'_, f32>,
        y: ArrayView2<'_, f32>,
        weights: Option<&[f64]>,
    ) {
        let [mut z, mut r, mut y] = [z, r, y].map(|m| m.mapv(f64::from).as_standard_layout().into_owned());
        let mut ones = Array2::ones((z.nrows(), 1));
        if let Some(weights) = weights {
            let roots = Array1::from_iter(weights.iter().map(|w| w.sqrt())).insert_axis(Axis(1));
            [&mut z, &mut r, &mut y, &mut ones].into_iter().for_each(|m| *m *= &roots);
        }
        let total = |m: &Array2<f64>| ones.column(0).dot(m);
        self.rows += ones.column(0).dot(&ones.column(0));
        self.z += &total(&z);
        self.r += &total(&r);
        self.y += &total(&y);
        self.rr += &(&r * &r).sum_axis(Axis(0));
        self.ry += &(&r * &y).sum_axis(Axis(0));
        self.yy += &(&y * &y).sum_axis(Axis(0));
        let [zm, rm, ym] = [&z, &r, &y].map(matrix);
        let par = Par::rayon(0);
        let (lower, whole) = (BlockStructure::TriangularLower, BlockStructure::Rectangular);
        triangular::matmul(&mut self.zz, lower, Accum::Add, zm.transpose(), whole, zm, whole, 1.0, par);
        faer::linalg::matmul::matmul(&mut self.zr, Accum::Add, zm.transpose(), rm, 1.0, par);
        faer::linalg::matmul::matmul(&mut self.zy, Accum::Add, zm.transpose(), ym, 1.0, par);
    }

    /// The solution; `None` where the sums are not finite or there are no rows.
    pub(super) fn solve(&self, unknowns: Unknowns) -> Option<Solution> {
        if self.rows == 0.0 || self.rr.iter().chain(&self.yy).any(|v| !v.is_finite()) {
            return None;
        }
        let (features, channels) = (self.z.len(), self.r.len());
        let mean = |sum: &Array1<f64>| sum / self.rows;
        let (mz, mr, my) = (mean(&self.z), mean(&self.r), mean(&self.y));
        // Centred sums: the offset then needs no unknown of its own.
        let var_r = &self.rr - &(&self.r * &mr);
        let cov_ry = &self.ry - &(&self.r * &my);
        let var_y = &self.yy - &(&self.y * &my);
        if unknowns == Unknowns::Affine {
            let scale = Array1::from_shape_fn(channels, |c| bounded(cov_ry[c] / var_r[c], var_r[c], var_y[c]));
            let offset = &my - &(&scale * &mr);
            return Some(Solution { weight: Array2::zeros((features, channels)), scale, offset });
        }
        let mut gram =
            Mat::from_fn(features, features, |i, j| if i >= j { self.zz[(i, j)] - self.z[i] * mz[j] } else { 0.0 });
        let ridge = RIDGE * (0..features).map(|i| gram[(i, i)]).sum::<f64>() / features as f64;
        // Features that never move leave the ridge alone to decide.
        let ridge = ridge.max(f64::MIN_POSITIVE.sqrt());
        (0..features).for_each(|i| gram[(i, i)] += ridge);
        let cov_zr = Mat::from_fn(features, channels, |i, c| self.zr[(i, c)] - self.z[i] * mr[c]);
        let cov_zy = Mat::from_fn(features, channels, |i, c| self.zy[(i, c)] - self.z[i] * my[c]);
        let factor = gram.llt(Side::Lower).ok()?;
        let solved_r = factor.solve(&cov_zr);
        let solved_y = factor.solve(&cov_zy);
        let dot = |a: &Mat<f64>, b: &Mat<f64>, c: usize| (0..features).map(|i| a[(i, c)] * b[(i, c)]).sum::<f64>();
        let scale = Array1::from_shape_fn(channels, |c| {
            if unknowns == Unknowns::WeightAndOffset {
                return 1.0;
            }
            let numerator = cov_ry[c] - dot(&cov_zr, &solved_y, c);
            let denominator = var_r[c] - dot(&cov_zr, &solved_r, c);
            bounded(numerator / denominator, var_r[c], var_y[c])
        });
        // v = G^-1 (Z'y - a Z'r), and W = W0 + v / a.
        let weight =
            Array2::from_shape_fn((features, channels), |(i, c)| solved_y[(i, c)] / scale[c] - solved_r[(i, c)]);
        let offset = Array1::from_shape_fn(channels, |c| my[c] - scale[c] * (mr[c] + weight.column(c).dot(&mz)));
        let solution = Solution { weight, scale, offset };
        solution.offset.iter().all(|v| v.is_finite()).then_some(solution)
    }
}

/// A scale that does not vanish: the weight is divided by it. Channels of the teacher without variance keep a small one.
fn bounded(scale: f64, var_r: f64, var_y: f64) -> f64 {
    const SMALLEST: f64 = 1e-3;
    let unit = if var_r > 0.0 { (var_y / var_r).sqrt() } else { 1.0 };
    let floor = (SMALLEST * unit).max(1e-6);
    if !scale.is_finite() || scale.abs() < floor { if scale < 0.0 { -floor } else { floor } } else { scale }
}

fn matrix(array: &Array2<f64>) -> MatRef<'_, f64> {
    let (rows, columns) = array.dim();
    MatRef::from_row_major_slice(array.as_slice().expect("made in standard layout"), rows, columns)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{Rng as _, SeedableRng as _, rngs::StdRng};

    fn noise(rows: usize, columns: usize, seed: u64) -> Array2<f32> {
        let mut rng = StdRng::seed_from_u64(seed);
        Array2::from_shape_fn((rows, columns), |_| rng.random_range(-1f32..1.0))
    }

    /// `y = a (r + z D) + c` with known `a`, `D`, `c` is recovered, however the rows are split.
    #[test]
    fn a_known_map_is_recovered() {
        let (rows, features, channels) = (4000, 6, 3);
        let (z, r) = (noise(rows, features, 1), noise(rows, channels, 2) + 0.3);
        let d = noise(features, channels, 3);
        let (a, c) = (ndarray::arr1(&[1.5f32, -0.7, 0.4]), ndarray::arr1(&[0.2f32, 1.0, -3.0]));
        let y = (&r + &z.dot(&d)) * &a + &c;
        let mut sums = Regression::new(features, channels);
        for part in [0..1000, 1000..rows] {
            let cut = |m: &Array2<f32>| m.slice(ndarray::s![part.clone(), ..]).to_owned();
            sums.add(cut(&z).view(), cut(&r).view(), cut(&y).view(), None);
        }
        let solution = sums.solve(Unknowns::WeightAndAffine).unwrap();
        for channel in 0..channels {
            approx::assert_abs_diff_eq!(solution.scale[channel], f64::from(a[channel]), epsilon = 5e-3);
            approx::assert_abs_diff_eq!(solution.offset[channel], f64::from(c[channel]), epsilon = 5e-3);
            for feature in 0..features {
                // The ridge of one thousandth shrinks what is added by about as much.
                let expected = f64::from(d[[feature, channel]]);
                approx::assert_abs_diff_eq!(solution.weight[[feature, channel]], expected, epsilon = 5e-3);
            }
        }
        let affine = sums.solve(Unknowns::Affine).unwrap();
        assert!(affine.weight.iter().all(|w| *w == 0.0));
        let shifted = sums.solve(Unknowns::WeightAndOffset).unwrap();
        assert!(shifted.scale.iter().all(|s| *s == 1.0));
    }

    #[test]
    fn a_weight_counts_like_as_many_rows() {
        let (z, r, y) = (noise(40, 3, 1), noise(40, 2, 2), noise(40, 2, 3));
        let mut weighted = Regression::new(3, 2);
        let weights: Vec<f64> = (0..40).map(|i| f64::from(1 + u8::from(i < 10))).collect();
        weighted.add(z.view(), r.view(), y.view(), Some(&weights));
        let mut repeated = Regression::new(3, 2);
        for rows in [0..40, 0..10] {
            let cut = |m: &Array2<f32>| m.slice(ndarray::s![rows.clone(), ..]).to_owned();
            repeated.add(cut(&z).view(), cut(&r).view(), cut(&y).view(), None);
        }
        let [a, b] = [weighted, repeated].map(|s| s.solve(Unknowns::WeightAndAffine).unwrap());
        for (a, b) in a.weight.iter().chain(&a.offset).zip(b.weight.iter().chain(&b.offset)) {
            approx::assert_abs_diff_eq!(*a, *b, epsilon = 1e-9);
        }
    }

    #[test]
    fn channels_without_variance_stay_finite() {
        let (z, r) = (noise(50, 2, 1), Array2::from_elem((50, 2), 0.5f32));
        let y = Array2::from_elem((50, 2), -2f32);
        let mut sums = Regression::new(2, 2);
        sums.add(z.view(), r.view(), y.view(), None);
        for unknowns in [Unknowns::Affine, Unknowns::WeightAndAffine] {
            let solution = sums.solve(unknowns).unwrap();
            assert!(solution.scale.iter().all(|s| s.is_finite() && *s != 0.0));
            let at_mean = solution.scale[0] * 0.5 + solution.offset[0];
            approx::assert_abs_diff_eq!(at_mean, -2.0, epsilon = 1e-3);
        }
        assert!(Regression::new(2, 2).solve(Unknowns::Affine).is_none());
    }
}
