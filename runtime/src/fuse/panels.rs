//! Matrices in panels, the layout that kernels read and write.
#![allow(unsafe_code)]

use std::fmt;

use tract_core::internal::*;
use tract_linalg::mmm::{MMMInputFormat, MMMInputValue, OutputStore, OutputStoreSpec};
use tract_linalg::pack::PackedFormat;

use crate::memory::ALIGNMENT;

/// A matrix `[rows, lanes]`, or some rows and panels of one, in a tensor `[panels, rows + 1, width]`: each panel has the
/// next `width` lanes of all rows. The last row of a panel holds nothing: kernels may read a row too many.
#[derive(Clone, Copy, Debug)]
pub(super) struct Panels<'t> {
    tensor: &'t Tensor,
    /// Values before the first.
    offset: usize,
    pub(super) rows: usize,
    pub(super) count: usize,
}

impl<'t> Panels<'t> {
    /// All of `tensor`.
    ///
    /// # Errors
    /// It is not in panels of `width` lanes.
    pub(super) fn new(width: usize, tensor: &'t Tensor) -> TractResult<Self> {
        let &[count, rows, lanes] = tensor.shape() else { bail!("panels have three axes, not {:?}", tensor.shape()) };
        ensure!(tensor.datum_type() == DatumType::F32 && lanes == width && rows > 0, "not panels: {tensor:?}");
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

    pub(super) fn lanes(&self) -> usize {
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
        Panels::new(width, into)?.rows(0, lanes)
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
            // SAFETY: the caller's promise.
            let rows = unsafe { self.panel_mut(panel) };
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
    pub(super) fn panel(&self, panel: usize) -> &'t [f32] {
        assert!(panel < self.count);
        // SAFETY: `rows` and `panels` keep within the tensor; whoever writes to it promises that nobody reads meanwhile.
        unsafe { std::slice::from_raw_parts(self.address().add(panel * self.stride()), self.rows * self.width()) }
    }

    /// The rows of one panel, to be overwritten.
    ///
    /// # Safety
    /// Nothing else reads or writes them meanwhile.
    pub(super) unsafe fn panel_mut(&self, panel: usize) -> &'t mut [f32] {
        assert!(panel < self.count);
        // SAFETY: inside the panel; the caller's promise.
        unsafe {
            let start = self.address().cast_mut().add(panel * self.stride());
            std::slice::from_raw_parts_mut(start, self.rows * self.width())
        }
    }

    pub(super) fn view(&self, format: &PackedFormat) -> View {
        let panel_bytes = 4 * self.stride();
        View {
            address: self.address().cast(),
            panel_bytes,
            rows: self.rows,
            lanes: self.lanes(),
            format: format.clone(),
        }
    }

    /// Where a tile of a product goes, or comes from: the product's rows are these panels' lanes, its columns their rows.
    pub(super) fn store(&self) -> OutputStore {
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

    pub(super) fn view(&self, lanes: usize) -> TractResult<TensorView<'t>> {
        let enough = self.tensor.datum_type() == DatumType::F32 && self.offset + lanes <= self.tensor.len();
        ensure!(enough, "{lanes} values from {} on in {:?}", self.offset, self.tensor);
        // SAFETY: as just checked.
        Ok(unsafe { at(self.tensor, self.offset) })
    }
}

/// [`Panels`] as tract-linalg takes them.
#[derive(Clone, Debug, Hash, PartialEq, Eq)]
pub(super) struct View {
    address: *const u8,
    panel_bytes: usize,
    rows: usize,
    pub(super) lanes: usize,
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
    use super::super::testing::{kernels, panels, random};
    use super::*;

    #[test]
    fn lanes_are_turned_into_rows_added_up_and_copied() {
        for kernel in &kernels() {
            let mut seed = 5;
            let width = kernel.width();
            let (tensor, of_panels) = panels(kernel, 2 * width, 3, &mut seed);
            let all = kernel.panels(&tensor).unwrap();
            let (first, lanes) = (width - 1, width + 2);
            let factor: Vec<f32> = (0..lanes).map(|_| random(&mut seed)).collect();
            // SAFETY: `transposed` writes what is looked at.
            let mut room = unsafe { kernel.room(2, lanes + 2) }.unwrap();
            let turned = all.transposed(first, lanes, Some(&factor), &mut room).unwrap();
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
            let into = kernel.panels(&into).unwrap();
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
