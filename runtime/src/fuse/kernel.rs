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
use tract_linalg::mmm::{
    AsInputValue, FusedSpec, MMMInputFormat, MMMInputValue, MatMatMul, MmmDispatch, OutputStore, OutputStoreSpec,
};
use tract_linalg::pack::PackedFormat;

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
        let square = all.filter_map(|mmm| Self::square(mmm.clone()));
        square.max_by_key(|k| (k.mmm.arch().is_some(), k.mmm.preference(), k.width()))
    }

    /// Takes a kernel if its tile is square and both its operands are plain panels of `f32`.
    fn square(mmm: Box<dyn MatMatMul>) -> Option<Self> {
        let (a, b) = mmm.packings().first()?;
        let (a, b) = (a.downcast_ref::<PackedFormat>()?, b.downcast_ref::<PackedFormat>()?);
        let plain = |f: &PackedFormat| f.dt == DatumType::F32 && f.r == mmm.mr();
        let fits = mmm.internal_type() == DatumType::F32 && mmm.mr() == mmm.nr() && mmm.mr() > 1;
        let format = (fits && !mmm.emulated() && plain(a) && plain(b)).then(|| a.clone())?;
        Some(Self { mmm, format, zero: tensor0(0f32) })
    }

    /// Lanes of a panel.
    pub(super) fn width(&self) -> usize {
        self.format.r
    }

    /// Room for panels of so many rows, `[panels, rows + 1, width]`; what is in it is arbitrary.
    pub(super) fn room(&self, panels: usize, rows: usize) -> TractResult<Tensor> {
        // SAFETY: what is to be read is written first: products write whole tiles, and who fills in less writes zeros.
        unsafe { Tensor::uninitialized_aligned::<f32>(&[panels, rows + 1, self.width()], ALIGNMENT) }
    }

    /// The same for weights, which stay and are large.
    pub(super) fn room_for_weights(&self, panels: usize, rows: usize) -> TractResult<Tensor> {
        // SAFETY: as above.
        unsafe { crate::memory::room(&[panels, rows + 1, self.width()]) }
    }
}

impl fmt::Debug for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.mmm.name())
    }
}

/// A matrix `[rows, lanes]`, or some rows and panels of one, in a tensor `[panels, rows + 1, width]`: each panel has the
/// next `width` lanes of all rows. The last row of a panel holds nothing: kernels may read a row too many.
#[derive(Clone, Copy, Debug)]
pub(super) struct Panels<'t> {
    tensor: &'t Tensor,
    /// Values before the first.
    offset: usize,
    rows: usize,
    count: usize,
}

impl<'t> Panels<'t> {
    /// All of `tensor`.
    ///
    /// # Errors
    /// It is not in panels of this machine's kernel.
    pub(super) fn new(kernel: &Kernel, tensor: &'t Tensor) -> TractResult<Self> {
        let &[count, rows, width] = tensor.shape() else { bail!("panels have three axes, not {:?}", tensor.shape()) };
        ensure!(tensor.datum_type() == DatumType::F32 && width == kernel.width() && rows > 0, "not panels: {tensor:?}");
        // SAFETY: the address alone is looked at.
        let address = unsafe { tensor.as_ptr_unchecked::<f32>() }.addr();
        ensure!(address.is_multiple_of(ALIGNMENT), "panels must begin at {ALIGNMENT} bytes");
        Ok(Self { tensor, offset: 0, rows: rows - 1, count })
    }

    /// Some of the rows.
    pub(super) fn rows(self, first: usize, rows: usize) -> TractResult<Self> {
        ensure!(first + rows <= self.rows, "rows {first} to {} of {}", first + rows, self.rows);
        Ok(Self { offset: self.offset + first * self.width(), rows, ..self })
    }

    /// Some of the panels.
    pub(super) fn panels(self, first: usize, count: usize) -> TractResult<Self> {
        ensure!(first + count <= self.count, "panels {first} to {} of {}", first + count, self.count);
        Ok(Self { offset: self.offset + first * self.stride(), count, ..self })
    }

    fn width(&self) -> usize {
        self.tensor.shape()[2]
    }

    fn lanes(&self) -> usize {
        self.count * self.width()
    }

    /// Values from one panel to the next.
    fn stride(&self) -> usize {
        self.tensor.shape()[1] * self.width()
    }

    fn address(&self) -> *const f32 {
        // SAFETY: `rows` and `panels` keep the offset inside the tensor.
        unsafe { self.tensor.as_ptr_unchecked::<f32>().add(self.offset) }
    }

    /// Writes so many lanes from `first` on as the first rows of `into`, whose lanes are these rows; each lane times its
    /// `factor`. Returns these rows.
    pub(super) fn transposed<'i>(
        &self,
        kernel: &Kernel,
        first: usize,
        lanes: usize,
        factor: Option<&[f32]>,
        into: &'i mut Tensor,
    ) -> TractResult<Panels<'i>> {
        let width = self.width();
        ensure!(first + lanes <= self.lanes() && self.rows.is_multiple_of(width), "lanes of {self:?}");
        ensure!(factor.is_none_or(|factor| factor.len() == lanes), "a factor for each lane");
        let &[count, rows, _] = into.shape() else { bail!("panels have three axes") };
        ensure!(count == self.rows / width && lanes < rows, "no room for {lanes} lanes of {self:?}");
        let mut view = into.try_as_plain_ram_mut()?;
        let panels = view.as_slice_mut::<f32>()?.chunks_exact_mut(rows * width);
        for (block, panel) in panels.enumerate() {
            // The row after the last may be read, and means nothing.
            panel[lanes * width..][..width].fill(0.0);
            for (lane, into) in panel[..lanes * width].chunks_exact_mut(width).enumerate() {
                let (from, at) = ((first + lane) / width, (first + lane) % width);
                let values = &self.panel(from)[block * width * width + at..];
                let factor = factor.map_or(1.0, |factor| factor[lane]);
                if factor == 0.0 {
                    // Whatever it was, which may be no number.
                    into.fill(0.0);
                    continue;
                }
                for (into, value) in into.iter_mut().zip(values.iter().step_by(width)) {
                    *into = value * factor;
                }
            }
        }
        Panels::new(kernel, into)?.rows(0, lanes)
    }

    /// The sum of all rows, each times its weight: a value for each lane.
    pub(super) fn weighted_sum(&self, weights: PerLane<'_>) -> TractResult<Tensor> {
        let width = self.width();
        let weights = weights.values(self.rows)?;
        let mut sums = Tensor::zero::<f32>(&[self.lanes()])?;
        let mut view = sums.try_as_plain_ram_mut()?;
        for (panel, sums) in view.as_slice_mut::<f32>()?.chunks_exact_mut(width).enumerate() {
            for (row, weight) in self.panel(panel).chunks_exact(width).zip(weights) {
                for (sum, value) in sums.iter_mut().zip(row) {
                    *sum += weight * value;
                }
            }
        }
        Ok(sums)
    }

    /// Multiplies each row with its factor; with zero it becomes zero, whatever it was.
    ///
    /// # Safety
    /// Nothing else reads or writes these panels meanwhile.
    pub(super) unsafe fn scale_rows(&self, factors: &[f32]) -> TractResult<()> {
        ensure!(factors.len() == self.rows, "{} factors for {self:?}", factors.len());
        let width = self.width();
        for panel in 0..self.count {
            // SAFETY: inside the panel; the caller's promise.
            let rows = unsafe {
                let start = self.address().cast_mut().add(panel * self.stride());
                std::slice::from_raw_parts_mut(start, self.rows * width)
            };
            for (row, &factor) in rows.chunks_exact_mut(width).zip(factors) {
                match factor {
                    1.0 => {}
                    0.0 => row.fill(0.0),
                    _ => row.iter_mut().for_each(|value| *value *= factor),
                }
            }
        }
        Ok(())
    }

    /// Overwrites so many lanes from `first` on with those of other panels.
    ///
    /// # Safety
    /// Nothing else reads or writes these lanes of these rows meanwhile.
    pub(super) unsafe fn copy_lanes(&self, from: Panels<'_>, first: usize, lanes: usize) -> TractResult<()> {
        let width = self.width();
        let same = from.rows == self.rows && from.count == self.count && from.width() == width;
        ensure!(same && first + lanes <= self.lanes(), "lanes of {from:?} into {self:?}");
        for panel in 0..self.count {
            let some = first.max(panel * width)..(first + lanes).min((panel + 1) * width);
            if some.is_empty() {
                continue;
            }
            for (row, values) in from.panel(panel).chunks_exact(width).enumerate() {
                let values = &values[some.start - panel * width..][..some.len()];
                // SAFETY: inside the panel; apart from what others touch, as the caller promises.
                unsafe {
                    let into = self.address().cast_mut().add(panel * self.stride() + row * width + some.start % width);
                    std::ptr::copy_nonoverlapping(values.as_ptr(), into, values.len());
                }
            }
        }
        Ok(())
    }

    /// The rows of one panel.
    fn panel(&self, panel: usize) -> &'t [f32] {
        assert!(panel < self.count);
        // SAFETY: `rows` and `panels` keep within the tensor; whoever writes to it promises that nobody reads meanwhile.
        unsafe { std::slice::from_raw_parts(self.address().add(panel * self.stride()), self.rows * self.width()) }
    }

    fn view(&self, kernel: &Kernel) -> View {
        let panel_bytes = 4 * self.stride();
        View {
            address: self.address().cast(),
            panel_bytes,
            rows: self.rows,
            lanes: self.lanes(),
            format: kernel.format.clone(),
        }
    }

    /// Where a tile of a product goes, or comes from: the product's rows are these panels' lanes, its columns their rows.
    fn store(&self) -> OutputStore {
        let width = self.width();
        // tract has no name for panels that lie apart; it goes from one tile to the next by the stride times the tile's
        // side, so telling it another side says the same.
        let spec = OutputStoreSpec::Strides {
            row_byte_stride: 4,
            col_byte_stride: 4 * width as isize,
            mr: self.stride(),
            nr: width,
        };
        // SAFETY: the offset is inside the tensor.
        unsafe { spec.wrap(&at(self.tensor, self.offset)) }
    }
}

/// A view that begins `offset` values into a tensor; its shape means nothing.
///
/// # Safety
/// The offset is inside the tensor.
unsafe fn at(tensor: &Tensor, offset: usize) -> TensorView<'_> {
    // SAFETY: the caller's promise.
    unsafe { TensorView::from_bytes(tensor, 4 * offset as isize, tensor.shape(), tensor.strides()) }
}

/// All values of a tensor.
pub(super) fn values(tensor: &Tensor) -> TractResult<&[f32]> {
    tensor.try_as_plain_ram()?.as_slice::<f32>()
}

/// A value for each lane of a product's second operand: some values of a tensor, from `offset` on.
#[derive(Clone, Copy, Debug)]
pub(super) struct PerLane<'t> {
    pub(super) tensor: &'t Tensor,
    pub(super) offset: usize,
}

impl<'t> PerLane<'t> {
    fn values(&self, count: usize) -> TractResult<&'t [f32]> {
        let values = values(self.tensor)?;
        values.get(self.offset..self.offset + count).with_context(|| format!("{count} values from {}", self.offset))
    }

    fn view(&self, lanes: usize) -> TractResult<TensorView<'t>> {
        let enough = self.tensor.datum_type() == DatumType::F32 && self.offset + lanes <= self.tensor.len();
        ensure!(enough, "{lanes} values from {} on in {:?}", self.offset, self.tensor);
        // SAFETY: as just checked.
        Ok(unsafe { at(self.tensor, self.offset) })
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
    /// Added last: panels like the target's.
    pub(super) residual: Option<Panels<'t>>,
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
        let (a, b) = (a.view(self), b.view(self));
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
        steps.push(FusedSpec::Store(target.store()));
        // SAFETY: whole tiles only, each inside its panels as checked above and by `Panels` and `PerLane`; the target is
        // the caller's promise.
        unsafe { self.mmm.run(a.lanes, b.lanes, &steps) }
    }
}

/// [`Panels`] as tract-linalg takes them.
#[derive(Clone, Debug, Hash, PartialEq, Eq)]
struct View {
    address: *const u8,
    panel_bytes: usize,
    rows: usize,
    lanes: usize,
    format: PackedFormat,
}

// SAFETY: it is read from only.
unsafe impl Send for View {}
// SAFETY: as above.
unsafe impl Sync for View {}

impl fmt::Display for View {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "panels of {} rows and {} lanes", self.rows, self.lanes)
    }
}

impl MMMInputValue for View {
    fn format(&self) -> &dyn MMMInputFormat {
        &self.format
    }

    fn scratch_panel_buffer_layout(&self) -> Option<std::alloc::Layout> {
        None
    }

    fn panel_bytes(&self, panel: usize, _buffer: Option<*mut u8>) -> TractResult<*const u8> {
        Ok(self.address.wrapping_add(panel * self.panel_bytes))
    }

    fn mn(&self) -> usize {
        self.lanes
    }

    fn k(&self) -> usize {
        self.rows
    }

    fn exotic_fact(&self) -> &dyn ExoticFact {
        unreachable!("a view lives for one product; no fact of a model describes it")
    }

    fn extract_at_mn_f16(&self, _lane: usize, _into: &mut [f16]) -> TractResult<()> {
        bail!("a view lives for one product; its lanes are read as panels")
    }

    fn extract_at_mn_f32(&self, _lane: usize, _into: &mut [f32]) -> TractResult<()> {
        bail!("a view lives for one product; its lanes are read as panels")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(seed: &mut u32) -> f32 {
        *seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (*seed >> 8) as f32 / (1 << 23) as f32 - 1.0
    }

    /// Every kernel of this machine that has a square tile, ours among them.
    fn kernels() -> Vec<Kernel> {
        let all = MmmDispatch::native().runnable().iter().cloned();
        #[cfg(target_arch = "x86_64")]
        let all = all.chain(super::super::avx512::kernel());
        all.filter_map(Kernel::square).collect()
    }

    /// Panels of random values, and the values by row and lane.
    fn panels(kernel: &Kernel, rows: usize, count: usize, seed: &mut u32) -> (Tensor, Vec<Vec<f32>>) {
        let width = kernel.width();
        let mut tensor = kernel.room(count, rows).unwrap();
        let mut values = vec![vec![0.0; count * width]; rows];
        let mut view = tensor.try_as_plain_ram_mut().unwrap();
        for (panel, into) in view.as_slice_mut::<f32>().unwrap().chunks_exact_mut((rows + 1) * width).enumerate() {
            for (at, into) in into.iter_mut().enumerate() {
                *into = random(seed);
                if let Some(row) = values.get_mut(at / width) {
                    row[panel * width + at % width] = *into;
                }
            }
        }
        (tensor, values)
    }

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
            let all = |tensor| Panels::new(kernel, tensor).unwrap();
            let left = all(&a).rows(first, k).unwrap().panels(1, m).unwrap();
            let into = all(&target).rows(3, lanes).unwrap();
            for relu in [false, true] {
                let epilogue = Epilogue {
                    scale: Some(PerLane { tensor: &scale, offset: 1 }),
                    bias: Some(PerLane { tensor: &bias, offset: 4 }),
                    relu,
                    factor: relu.then_some(PerLane { tensor: &scale, offset: 3 }),
                    residual: Some(all(&residual)),
                };
                // SAFETY: nothing else has the target.
                unsafe { kernel.product(left, all(&b), &epilogue, into).unwrap() };
                for j in 0..lanes {
                    for i in 0..m * kernel.width() {
                        let sum: f32 = (0..k).map(|t| a_values[first + t][kernel.width() + i] * b_values[t][j]).sum();
                        let sum = sum * values(&scale).unwrap()[1 + j] + values(&bias).unwrap()[4 + j];
                        let sum = if relu { sum.max(0.0) * values(&scale).unwrap()[3 + j] } else { sum };
                        let wanted = sum + residual_values[j][i];
                        let found = into.panel(i / kernel.width())[j * kernel.width() + i % kernel.width()];
                        assert!((found - wanted).abs() < 1e-4, "{kernel:?}: {found} for {wanted} at {j}, {i}");
                    }
                }
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let kernel = Kernel::get().unwrap();
        let mut seed = 1;
        let (a, _) = panels(kernel, 8, 2, &mut seed);
        let (b, _) = panels(kernel, 9, 1, &mut seed);
        let (a, b) = (Panels::new(kernel, &a).unwrap(), Panels::new(kernel, &b).unwrap());
        assert!(a.rows(1, 8).is_err() && a.panels(1, 2).is_err());
        // SAFETY: nothing is written.
        assert!(unsafe { kernel.product(a, b, &Epilogue::default(), a) }.is_err());
        assert!(Panels::new(kernel, &tensor1(&[1f32, 2.0])).is_err());
    }

    #[test]
    fn lanes_are_turned_into_rows_added_up_and_copied() {
        for kernel in &kernels() {
            let mut seed = 5;
            let width = kernel.width();
            let (tensor, of_panels) = panels(kernel, 2 * width, 3, &mut seed);
            let all = Panels::new(kernel, &tensor).unwrap();
            let (first, lanes) = (width - 1, width + 2);
            let factor: Vec<f32> = (0..lanes).map(|_| random(&mut seed)).collect();
            let mut room = kernel.room(2, lanes + 2).unwrap();
            let turned = all.transposed(kernel, first, lanes, Some(&factor), &mut room).unwrap();
            for row in 0..2 * width {
                for lane in 0..lanes {
                    let found = turned.panel(row / width)[lane * width + row % width];
                    assert_eq!(found, of_panels[row][first + lane] * factor[lane]);
                }
            }
            let weights = tensor1(&(0..2 * width + 1).map(|_| random(&mut seed)).collect::<Vec<f32>>());
            let sums = all.weighted_sum(PerLane { tensor: &weights, offset: 1 }).unwrap();
            for (lane, sum) in values(&sums).unwrap().iter().enumerate() {
                let weights = &values(&weights).unwrap()[1..];
                let wanted: f32 = of_panels.iter().zip(weights).map(|(row, weight)| row[lane] * weight).sum();
                assert!((sum - wanted).abs() < 1e-4);
            }
            let (into, before) = panels(kernel, 2 * width, 3, &mut seed);
            let into = Panels::new(kernel, &into).unwrap();
            // SAFETY: nothing else has these panels.
            unsafe { into.copy_lanes(all, first, lanes).unwrap() };
            for row in 0..2 * width {
                for lane in 0..3 * width {
                    let from = if (first..first + lanes).contains(&lane) { &of_panels } else { &before };
                    assert_eq!(into.panel(lane / width)[row * width + lane % width], from[row][lane]);
                }
            }
        }
    }
}
