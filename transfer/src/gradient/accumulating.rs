//! Operators of an activation and a variable whose gradient is added up in place: candle would make several tensors as
//! large as the variable for each, at every step.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Storage, Tensor as Real};
use faer::{Accum, MatMut, MatRef, Par};

/// The gradient of every variable of a graph, in their order, while it is added up.
pub(crate) struct Gradient {
    of: Vec<Mutex<Sum>>,
}

#[derive(Default)]
struct Sum {
    values: Vec<f32>,
    /// Whether `values` means anything yet.
    begun: bool,
}

impl Gradient {
    /// For variables of these sizes. `buffers` is memory to use.
    pub(super) fn new(sizes: impl Iterator<Item = usize>, buffers: Vec<Vec<f32>>) -> Self {
        let mut buffers = buffers.into_iter();
        let sum = |size: usize| {
            let mut values = buffers.next().unwrap_or_default();
            values.resize(size, 0.0);
            Mutex::new(Sum { values, begun: false })
        };
        Self { of: sizes.map(sum).collect() }
    }

    fn lock(&self, variable: usize) -> MutexGuard<'_, Sum> {
        self.of[variable].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds to the gradient of a variable.
    pub(super) fn add(&self, variable: usize, gradient: &[f32]) {
        let mut sum = self.lock(variable);
        if std::mem::replace(&mut sum.begun, true) {
            sum.values.iter_mut().zip(gradient).for_each(|(a, b)| *a += b);
        } else {
            sum.values.copy_from_slice(gradient);
        }
    }

    /// The sums; zeros where nothing was added.
    pub(super) fn take(&self) -> Vec<Vec<f32>> {
        let take = |at: usize| {
            let sum = std::mem::take(&mut *self.lock(at));
            if sum.begun { sum.values } else { vec![0.0; sum.values.len()] }
        };
        (0..self.of.len()).map(take).collect()
    }
}

/// What an activation `[..., k]` is combined with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Combination {
    /// `x W`, `W [k, m]`.
    Product,
    /// `x + v`, `v [k]`.
    Sum,
    /// `x v`, element by element, `v [k]`.
    Scale,
}

/// An activation, contiguous, with a variable.
struct Accumulating {
    combination: Combination,
    /// Where the variable's gradient goes, if it is wanted.
    gradient: Option<(Arc<Gradient>, usize)>,
}

/// Whether `combination` takes these shapes, on the CPU. On a GPU candle's own operators do.
pub(super) fn fits(combination: Combination, x: &Real, variable: &Real) -> bool {
    if !x.device().is_cpu() {
        return false;
    }
    let width = x.dims().last();
    match combination {
        Combination::Product => x.rank() >= 2 && variable.rank() == 2 && width == variable.dims().first(),
        Combination::Sum | Combination::Scale => {
            x.rank() >= 2 && variable.rank() == 1 && width == variable.dims().first()
        }
    }
}

/// `x` with `variable`, whose gradient is added to `gradient`.
pub(super) fn apply(
    combination: Combination,
    x: &Real,
    variable: &Real,
    gradient: Option<(Arc<Gradient>, usize)>,
) -> Result<Real> {
    x.contiguous()?.apply_op2(variable, Accumulating { combination, gradient })
}

impl CustomOp2 for Accumulating {
    fn name(&self) -> &'static str {
        "activation with variable"
    }

    fn cpu_fwd(&self, x: &CpuStorage, at: &Layout, v: &CpuStorage, of: &Layout) -> Result<(CpuStorage, Shape)> {
        let (x, v) = (elements(x, at)?, elements(v, of)?);
        let mut dims = at.shape().dims().to_vec();
        let k = *of.shape().dims().first().expect("checked by `fits`");
        let rows = x.len() / k.max(1);
        let made = match self.combination {
            Combination::Product => {
                let m = of.shape().dims()[1];
                *dims.last_mut().expect("checked by `fits`") = m;
                let mut y = vec![0f32; rows * m];
                product(&mut y, Accum::Replace, rows_of(x, rows, k), rows_of(v, k, m));
                y
            }
            Combination::Sum => by_row(x, v, |x, v| x + v),
            Combination::Scale => by_row(x, v, |x, v| x * v),
        };
        Ok((CpuStorage::F32(made), dims.into()))
    }

    fn bwd(&self, x: &Real, variable: &Real, _: &Real, g: &Real) -> Result<(Option<Real>, Option<Real>)> {
        let g = g.contiguous()?;
        let k = variable.dims()[0];
        let rows = x.elem_count() / k.max(1);
        with_elements(&[x, variable, &g], |[x_values, v, g_values]| {
            if let Some((gradient, at)) = &self.gradient {
                let mut sum = gradient.lock(*at);
                let accum = if std::mem::replace(&mut sum.begun, true) { Accum::Add } else { Accum::Replace };
                let values = &mut sum.values;
                if self.combination != Combination::Product && accum == Accum::Replace {
                    values.fill(0.0);
                }
                match self.combination {
                    Combination::Product => {
                        let m = variable.dims()[1];
                        product(values, accum, rows_of(x_values, rows, k).transpose(), rows_of(g_values, rows, m));
                    }
                    Combination::Sum => g_values
                        .chunks_exact(k)
                        .for_each(|row| values.iter_mut().zip(row).for_each(|(sum, g)| *sum += g)),
                    Combination::Scale => g_values.chunks_exact(k).zip(x_values.chunks_exact(k)).for_each(|(g, x)| {
                        values.iter_mut().zip(g.iter().zip(x)).for_each(|(sum, (g, x))| *sum += g * x);
                    }),
                }
            }
            if !x.track_op() {
                return Ok((None, None));
            }
            let dx = match self.combination {
                Combination::Product => {
                    let m = variable.dims()[1];
                    let mut dx = vec![0f32; rows * k];
                    product(&mut dx, Accum::Replace, rows_of(g_values, rows, m), rows_of(v, k, m).transpose());
                    dx
                }
                Combination::Sum => return Ok((Some(g.clone()), None)),
                Combination::Scale => by_row(g_values, v, |g, v| g * v),
            };
            Ok((Some(Real::from_vec(dx, x.dims(), x.device())?), None))
        })
    }
}

/// `dst (+)= a b`, `dst` row by row.
fn product(dst: &mut [f32], accum: Accum, a: MatRef<'_, f32>, b: MatRef<'_, f32>) {
    let dst = MatMut::from_row_major_slice_mut(dst, a.nrows(), b.ncols());
    faer::linalg::matmul::matmul(dst, accum, a, b, 1.0, Par::Seq);
}

fn rows_of(values: &[f32], rows: usize, columns: usize) -> MatRef<'_, f32> {
    MatRef::from_row_major_slice(values, rows, columns)
}

fn by_row(x: &[f32], v: &[f32], f: impl Fn(f32, f32) -> f32) -> Vec<f32> {
    let mut made = Vec::with_capacity(x.len());
    x.chunks_exact(v.len()).for_each(|row| made.extend(row.iter().zip(v).map(|(x, v)| f(*x, *v))));
    made
}

/// The elements of a contiguous tensor.
pub(super) fn elements<'s>(storage: &'s CpuStorage, layout: &Layout) -> Result<&'s [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::F32(values), Some((start, end))) => Ok(&values[start..end]),
        _ => candle_core::bail!("contiguous f32 was expected"),
    }
}

/// Runs `f` on the elements of contiguous tensors.
pub(super) fn with_elements<const N: usize, T>(
    tensors: &[&Real; N],
    f: impl FnOnce([&[f32]; N]) -> Result<T>,
) -> Result<T> {
    let held = tensors.map(|t| t.storage_and_layout());
    let mut slices: [&[f32]; N] = [&[]; N];
    for (slice, (storage, layout)) in slices.iter_mut().zip(&held) {
        *slice = match &**storage {
            Storage::Cpu(storage) => elements(storage, layout)?,
            _ => candle_core::bail!("a tensor on the CPU was expected"),
        };
    }
    f(slices)
}
