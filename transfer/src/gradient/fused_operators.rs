//! Operators for which candle would go over memory several times, there and back.

use candle_core::{CpuStorage, CustomOp1, CustomOp2, DType, Layout, Result, Shape, Tensor as Real};

use super::accumulating::{elements, with_elements};

/// What is negative becomes 0. At 0 itself the gradient is 0, where candle's own has 1.
pub(super) fn relu(x: &Real) -> Result<Real> {
    if x.device().is_cpu() { x.contiguous()?.apply_op1(Relu) } else { x.relu() }
}

/// Of rows `[rows, columns]`, the sum of each row's weight times the mean of its squared differences, beyond `bound` as
/// [`bounded`] has it; a scalar. What is in rows of no weight does not matter. `constant` gets no gradient.
pub(crate) fn squared_distance(x: &Real, constant: &Real, weights: &Real, bound: f64) -> Result<Real> {
    let weights = weights.flatten_all()?;
    let rows = weights.elem_count();
    let of_rows = |value: &Real| value.reshape((rows, value.elem_count() / rows.max(1)))?.contiguous();
    let (x, constant) = (of_rows(x)?, of_rows(constant)?);
    if x.device().is_cpu() {
        return x.apply_op2(&constant, SquaredDistance { weights: weights.to_vec1()?, bound });
    }
    of_candle(&x, &constant, &weights, bound)
}

/// The same by candle's own operators.
fn of_candle(x: &Real, constant: &Real, weights: &Real, bound: f64) -> Result<Real> {
    let weights = weights.unsqueeze(1)?;
    let counts = weights.ne(0f32)?.broadcast_as(x.shape())?.contiguous()?;
    let squares = (counts.where_cond(x, constant)? - constant)?.to_dtype(DType::F64)?.sqr()?;
    (bounded(&squares.mean_keepdim(1)?, bound)?.to_dtype(DType::F32)? * weights)?.sum_all()
}

/// Distances as they are up to `bound`, and as `bound (1 + ln(distance / bound))` beyond: there the gradient is that of their
/// logarithm. A student without norms can be wrong by any power of ten, and one such row would drown all others of a step.
pub(crate) fn bounded(distances: &Real, bound: f64) -> Result<Real> {
    if bound.is_infinite() {
        return Ok(distances.clone());
    }
    distances.minimum(bound)? + ((distances / bound)?.maximum(1.0)?.log()? * bound)?
}

struct Relu;

impl CustomOp1 for Relu {
    fn name(&self) -> &'static str {
        "relu"
    }

    fn cpu_fwd(&self, x: &CpuStorage, at: &Layout) -> Result<(CpuStorage, Shape)> {
        let made = elements(x, at)?.iter().map(|v| v.max(0.0)).collect();
        Ok((CpuStorage::F32(made), at.shape().clone()))
    }

    fn bwd(&self, x: &Real, y: &Real, g: &Real) -> Result<Option<Real>> {
        let g = g.contiguous()?;
        let dx = with_elements(&[y, &g], |[y, g]| {
            Ok(y.iter().zip(g).map(|(y, g)| if *y > 0.0 { *g } else { 0.0 }).collect::<Vec<f32>>())
        })?;
        Ok(Some(Real::from_vec(dx, x.dims(), x.device())?))
    }
}

struct SquaredDistance {
    weights: Vec<f32>,
    bound: f64,
}

/// The mean of the squared differences of a row.
fn mean_square(x: &[f32], y: &[f32]) -> f64 {
    x.iter().zip(y).map(|(x, y)| f64::from(x - y).powi(2)).sum::<f64>() / x.len() as f64
}

impl SquaredDistance {
    /// Rows that count, with their weights.
    fn rows<'v>(&self, x: &'v [f32], y: &'v [f32]) -> impl Iterator<Item = (usize, f32, &'v [f32], &'v [f32])> {
        let columns = x.len() / self.weights.len().max(1);
        let rows = x.chunks_exact(columns.max(1)).zip(y.chunks_exact(columns.max(1)));
        let weighted = self.weights.iter().zip(rows).enumerate();
        weighted.filter(|(_, (w, _))| **w != 0.0).map(|(row, (w, (x, y)))| (row, *w, x, y))
    }
}

impl CustomOp2 for SquaredDistance {
    fn name(&self) -> &'static str {
        "squared distance"
    }

    fn cpu_fwd(&self, x: &CpuStorage, at: &Layout, y: &CpuStorage, of: &Layout) -> Result<(CpuStorage, Shape)> {
        let sum: f64 = self
            .rows(elements(x, at)?, elements(y, of)?)
            .map(|(_, w, x, y)| {
                let square = mean_square(x, y);
                let beyond = square / self.bound;
                f64::from(w) * if beyond > 1.0 { self.bound * (1.0 + beyond.ln()) } else { square }
            })
            .sum();
        Ok((CpuStorage::F32(vec![sum as f32]), Shape::from(())))
    }

    fn bwd(&self, x: &Real, y: &Real, _: &Real, g: &Real) -> Result<(Option<Real>, Option<Real>)> {
        let g = g.to_scalar::<f32>()?;
        let dx = with_elements(&[x, y], |[x_values, y_values]| {
            let mut dx = vec![0f32; x_values.len()];
            for (row, w, x, y) in self.rows(x_values, y_values) {
                let beyond = if self.bound.is_finite() { (mean_square(x, y) / self.bound).max(1.0) } else { 1.0 };
                let scale = 2.0 * f64::from(w) * f64::from(g) / x.len() as f64 / beyond;
                let dx = &mut dx[row * x.len()..][..x.len()];
                // In double precision: a row that is far off has a scale too small for the single one.
                let pull = |x: &f32, y: &f32| (scale * f64::from(x - y)) as f32;
                dx.iter_mut().zip(x.iter().zip(y)).for_each(|(dx, (x, y))| *dx = pull(x, y));
            }
            Ok(dx)
        })?;
        Ok((Some(Real::from_vec(dx, x.dims(), x.device())?), None))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;

    /// Values and gradients are those of candle's own operators, of a value that is not contiguous, whatever stands in
    /// rows that do not count.
    #[test]
    fn they_do_what_candles_operators_do() {
        let mut values: Vec<f32> = (0..24).map(|i| ((i * 7) % 11) as f32 / 5.0 - 1.1).collect();
        // Turned, the second row.
        values[1] = f32::INFINITY;
        let var = || Var::from_slice(&values, (2, 4, 3), &Device::Cpu).unwrap();
        let (ours, theirs) = (var(), var());
        let constant = Real::arange(0f32, 24.0, &Device::Cpu).unwrap().reshape((6, 4)).unwrap();
        let weights = Real::from_slice(&[1f32, 0.0, 2.0, 1.0, 1.0, 0.0], 6, &Device::Cpu).unwrap();
        let turned = |x: &Real| x.permute((0, 2, 1)).unwrap();
        assert!(!turned(&ours).is_contiguous());
        // Two of the rows that count are further, two nearer.
        let bound = 100.0;
        let found = squared_distance(&relu(&turned(&ours)).unwrap(), &constant, &weights, bound).unwrap();
        let rows = turned(&theirs).contiguous().unwrap().relu().unwrap().reshape((6, 4)).unwrap();
        let expected = of_candle(&rows, &constant, &weights, bound).unwrap();
        let value = |x: &Real| x.to_scalar::<f32>().unwrap();
        assert!(value(&found).is_finite());
        approx::assert_relative_eq!(value(&found), value(&expected), max_relative = 1e-6);
        let gradient = |loss: &Real, of: &Var| {
            let store = loss.backward().unwrap();
            store.get(of).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
        };
        let (a, b) = (gradient(&found, &ours), gradient(&expected, &theirs));
        assert!(a.iter().any(|g| *g != 0.0) && a[1] == 0.0);
        a.iter().zip(&b).for_each(|(a, b)| approx::assert_relative_eq!(*a, *b, max_relative = 1e-5));
    }

    /// Its gradient is that of the logarithm, however far it is.
    #[test]
    fn a_row_far_off_still_pulls() {
        for far in [1e3f32, 1e10, 1e24] {
            let x = Var::from_slice(&[far, 0.0], (2, 1), &Device::Cpu).unwrap();
            let zeros = Real::zeros((2, 1), DType::F32, &Device::Cpu).unwrap();
            let weights = Real::from_slice(&[1f32, 1.0], 2, &Device::Cpu).unwrap();
            let bound = 8.0;
            for found in [squared_distance(&x, &zeros, &weights, bound), of_candle(&x, &zeros, &weights, bound)] {
                let store = found.unwrap().backward().unwrap();
                let gradient = store.get(&x).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
                approx::assert_relative_eq!(gradient[0], 2.0 * bound as f32 / far, max_relative = 1e-4);
                assert_eq!(gradient[1], 0.0);
            }
        }
    }
}
