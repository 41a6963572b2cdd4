//! Matrix products on tract-linalg, from panels to panels.
//!
//! A kernel with a square tile reads both operands in one layout, and with the tile's rows along the vector registers it
//! can store what it computes in that layout too. So a result is at once ready to be either operand of the next product:
//! nothing is packed twice and nothing is transposed between two products.
#![allow(unsafe_code)]

use std::fmt;
use std::sync::OnceLock;

use tract_core::internal::*;
use tract_linalg::BinOp;
use tract_linalg::mmm::{AsInputValue, FusedSpec, MatMatMul, MmmDispatch};
use tract_linalg::pack::PackedFormat;

use super::panels::{Panels, PerLane};
use crate::memory::ALIGNMENT;

/// The matrix kernel of this machine.
pub(super) struct Kernel {
    mmm: Box<dyn MatMatMul>,
    format: PackedFormat,
    zero: Tensor,
}

impl Kernel {
    /// The best kernel with a square tile, or `None` where there is none for `f32`.
    pub(super) fn get() -> Option<&'static Self> {
        static KERNEL: OnceLock<Option<Kernel>> = OnceLock::new();
        KERNEL.get_or_init(Self::choose).as_ref()
    }

    fn choose() -> Option<Self> {
        #[cfg(target_arch = "x86_64")]
        if let Some(mmm) = super::avx512::kernel() {
            return Self::square(mmm);
        }
        let all = MmmDispatch::native().runnable().iter();
        // A student that overflows must not look as if it did not: some kernels' ReLU makes a number of NaN.
        let square =
            all.filter_map(|mmm| Self::square(mmm.clone())).filter(|k| k.keeps_not_a_number().unwrap_or(false));
        square.max_by_key(|k| (k.mmm.arch().is_some(), k.mmm.preference(), k.width()))
    }

    /// Takes a kernel if its tile is square and both its operands are plain panels of `f32`.
    pub(super) fn square(mmm: Box<dyn MatMatMul>) -> Option<Self> {
        let (a, b) = mmm.packings().first()?;
        let (a, b) = (a.downcast_ref::<PackedFormat>()?, b.downcast_ref::<PackedFormat>()?);
        let plain = |f: &PackedFormat| f.dt == DatumType::F32 && f.r == mmm.mr();
        let fits = mmm.internal_type() == DatumType::F32 && mmm.mr() == mmm.nr() && mmm.mr() > 1;
        let format = (fits && !mmm.emulated() && plain(a) && plain(b)).then(|| a.clone())?;
        Some(Self { mmm, format, zero: tensor0(0f32) })
    }

    /// Whether its ReLU and its limits give NaN for NaN.
    fn keeps_not_a_number(&self) -> TractResult<bool> {
        let filled = |rows: usize, value: f32| -> TractResult<Tensor> {
            // SAFETY: every value is written here.
            let mut panel = unsafe { self.room(1, rows) }?;
            panel.try_as_plain_ram_mut()?.as_slice_mut::<f32>()?.fill(value);
            Ok(panel)
        };
        let (ones, none, square) = (filled(1, 1.0)?, filled(1, f32::NAN)?, filled(self.width(), 0.0)?);
        let target = self.panels(&square)?;
        let limits = [Some(&self.zero), Some(&self.zero)];
        let epilogue = Epilogue { relu: true, limits, ..Epilogue::default() };
        // SAFETY: nothing else has the target.
        unsafe { self.product(self.panels(&none)?, self.panels(&ones)?, &epilogue, target) }?;
        Ok(target.panel(0)[0].is_nan())
    }

    /// Lanes of a panel.
    pub(super) fn width(&self) -> usize {
        self.format.r
    }

    /// A tensor as panels of this kernel.
    ///
    /// # Errors
    /// It is not in such panels.
    pub(super) fn panels<'t>(&self, tensor: &'t Tensor) -> TractResult<Panels<'t>> {
        Panels::new(self.width(), tensor)
    }

    /// Room for panels of so many rows, `[panels, rows + 1, width]`, in memory as it comes: clearing it would go over it once
    /// more for nothing.
    ///
    /// # Safety
    /// Every value is written before it is read, but for the last row of each panel, which kernels may load and never use.
    pub(super) unsafe fn room(&self, panels: usize, rows: usize) -> TractResult<Tensor> {
        // SAFETY: the caller's.
        unsafe { Tensor::uninitialized_aligned::<f32>(&[panels, rows + 1, self.width()], ALIGNMENT) }
    }

    /// The same for weights, which stay and are large.
    ///
    /// # Safety
    /// As [`room`](Self::room).
    pub(super) unsafe fn room_for_weights(&self, panels: usize, rows: usize) -> TractResult<Tensor> {
        // SAFETY: the caller's.
        unsafe { crate::memory::room(&[panels, rows + 1, self.width()]) }
    }
}

impl fmt::Debug for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.mmm.name())
    }
}

/// What is done to a product before it is stored, in this order.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Epilogue<'t> {
    /// Multiplied with.
    pub(super) scale: Option<PerLane<'t>>,
    /// Added.
    pub(super) bias: Option<PerLane<'t>>,
    /// Whether negative values become zero.
    pub(super) relu: bool,
    /// Multiplied with after that.
    pub(super) factor: Option<PerLane<'t>>,
    /// Added after that: panels like the target's.
    pub(super) residual: Option<Panels<'t>>,
    /// Scalars: what is less than the first becomes that, then what is more than the second.
    pub(super) limits: [Option<&'t Tensor>; 2],
}

impl Kernel {
    /// `target[j, i] = sum over rows k of a[k, i] * b[k, j]`, then the epilogue; on the threads of tract's current
    /// executor.
    ///
    /// # Safety
    /// Nothing reads or writes the target's rows and panels meanwhile.
    ///
    /// # Errors
    /// Shapes do not fit.
    pub(super) unsafe fn product(
        &self,
        a: Panels<'_>,
        b: Panels<'_>,
        epilogue: &Epilogue<'_>,
        target: Panels<'_>,
    ) -> TractResult<()> {
        let like = |p: &Panels<'_>| p.count == a.count && p.rows == b.lanes();
        let fits = a.rows == b.rows && like(&target) && epilogue.residual.as_ref().is_none_or(like);
        ensure!(fits, "a product of {a:?} and {b:?} into {target:?}");
        let (a, b) = (a.view(&self.format), b.view(&self.format));
        let mut steps: TVec<FusedSpec<'_>> =
            tvec![FusedSpec::AddMatMul { a: AsInputValue::Borrowed(&a), b: AsInputValue::Borrowed(&b), packing: 0 }];
        if let Some(scale) = &epilogue.scale {
            steps.push(FusedSpec::BinPerCol(scale.view(b.lanes)?, BinOp::Mul));
        }
        if let Some(bias) = &epilogue.bias {
            steps.push(FusedSpec::BinPerCol(bias.view(b.lanes)?, BinOp::Add));
        }
        if epilogue.relu {
            steps.push(FusedSpec::BinScalar(&self.zero, BinOp::Max));
        }
        if let Some(factor) = &epilogue.factor {
            steps.push(FusedSpec::BinPerCol(factor.view(b.lanes)?, BinOp::Mul));
        }
        if let Some(residual) = &epilogue.residual {
            steps.push(FusedSpec::AddUnicast(residual.store()));
        }
        for (limit, pick) in epilogue.limits.into_iter().zip([BinOp::Max, BinOp::Min]) {
            steps.extend(limit.map(|limit| FusedSpec::BinScalar(limit, pick)));
        }
        steps.push(FusedSpec::Store(target.store()));
        // SAFETY: whole tiles only, each inside its panels as checked above and by `Panels` and `PerLane`; the target is
        // the caller's promise.
        unsafe { self.mmm.run(a.lanes, b.lanes, &steps) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::panels::values;
    use super::super::testing::{kernels, panels, random};
    use super::*;

    #[test]
    fn every_square_kernel_computes_products_from_panels_to_panels() {
        let kernels = kernels();
        assert!(!kernels.is_empty());
        for kernel in &kernels {
            let mut seed = 7;
            let (k, first, m, n) = (37, 5, 3, 2);
            let (a, a_values) = panels(kernel, k + 2 * first, m + 1, &mut seed);
            let (b, b_values) = panels(kernel, k, n, &mut seed);
            let lanes = n * kernel.width();
            let (residual, residual_values) = panels(kernel, lanes, m, &mut seed);
            let (target, _) = panels(kernel, lanes + 3, m, &mut seed);
            let per_lane = |seed: &mut u32| tensor1(&(0..lanes + 4).map(|_| random(seed)).collect::<Vec<f32>>());
            let (scale, bias) = (per_lane(&mut seed), per_lane(&mut seed));
            let (low, high) = (tensor0(-1.5f32), tensor0(0.75f32));
            let all = |tensor| kernel.panels(tensor).unwrap();
            let left = all(&a).rows(first, k).unwrap().panels(1, m).unwrap();
            let into = all(&target).rows(3, lanes).unwrap();
            for relu in [false, true] {
                let epilogue = Epilogue {
                    scale: Some(PerLane { tensor: &scale, offset: 1 }),
                    bias: Some(PerLane { tensor: &bias, offset: 4 }),
                    relu,
                    factor: relu.then_some(PerLane { tensor: &scale, offset: 3 }),
                    residual: Some(all(&residual)),
                    limits: if relu { [None; 2] } else { [Some(&low), Some(&high)] },
                };
                // SAFETY: nothing else has the target.
                unsafe { kernel.product(left, all(&b), &epilogue, into).unwrap() };
                for j in 0..lanes {
                    for i in 0..m * kernel.width() {
                        let sum: f32 = (0..k).map(|t| a_values[first + t][kernel.width() + i] * b_values[t][j]).sum();
                        let sum = sum * values(&scale).unwrap()[1 + j] + values(&bias).unwrap()[4 + j];
                        let sum = if relu { sum.max(0.0) * values(&scale).unwrap()[3 + j] } else { sum };
                        let sum = sum + residual_values[j][i];
                        let wanted = if relu { sum } else { sum.clamp(-1.5, 0.75) };
                        let found = into.panel(i / kernel.width())[j * kernel.width() + i % kernel.width()];
                        assert!((found - wanted).abs() < 1e-4, "{kernel:?}: {found} for {wanted} at {j}, {i}");
                    }
                }
            }
        }
    }

    #[test]
    fn relu_keeps_what_is_not_a_number() {
        assert!(Kernel::get().unwrap().keeps_not_a_number().unwrap());
        #[cfg(target_arch = "x86_64")]
        if let Some(ours) = super::super::avx512::kernel() {
            assert!(Kernel::square(ours).unwrap().keeps_not_a_number().unwrap());
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let kernel = Kernel::get().unwrap();
        let mut seed = 1;
        let (a, _) = panels(kernel, 8, 2, &mut seed);
        let (b, _) = panels(kernel, 9, 1, &mut seed);
        let (a, b) = (kernel.panels(&a).unwrap(), kernel.panels(&b).unwrap());
        assert!(a.rows(1, 8).is_err() && a.panels(1, 2).is_err());
        // SAFETY: nothing is written.
        assert!(unsafe { kernel.product(a, b, &Epilogue::default(), a) }.is_err());
        assert!(kernel.panels(&tensor1(&[1f32, 2.0])).is_err());
    }
}
