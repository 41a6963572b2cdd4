//! Constants of integers, and what they mean: `(q - zero point) scale`, for all elements, along an axis, or in blocks.

use std::collections::HashMap;

use ndarray::{ArrayD, Axis, IxDyn};
use onnx_protobuf::{GraphProto, TensorProto};

use crate::stored::to_single;
use crate::{ElementType, NodeExt as _, Result};

/// Constants by name: initializers, what `Constant` nodes hold, and what was computed of them.
pub(super) struct Constants<'g> {
    given: HashMap<&'g str, &'g TensorProto>,
    computed: HashMap<String, ArrayD<f32>>,
}

impl<'g> Constants<'g> {
    pub(super) fn new(graph: &'g GraphProto) -> Self {
        let initializers = graph.initializer.iter().map(|t| (t.name.as_str(), t));
        let nodes = graph.node.iter().filter(|n| n.is("Constant"));
        let held = nodes.filter_map(|n| Some((n.output.first()?.as_str(), n.attribute("value")?.t.as_ref()?)));
        Self { given: initializers.chain(held).collect(), computed: HashMap::new() }
    }

    pub(super) fn is_constant(&self, name: &str) -> bool {
        self.given.contains_key(name) || self.computed.contains_key(name)
    }

    /// The type of a constant as it was given.
    pub(super) fn data_type(&self, name: &str) -> Option<i32> {
        self.given.get(name).map(|t| t.data_type)
    }

    pub(super) fn is_float(&self, name: &str) -> bool {
        self.computed.contains_key(name) || self.data_type(name) == Some(ElementType::F32.onnx())
    }

    pub(super) fn rank(&self, name: &str) -> Option<usize> {
        let given = self.given.get(name).map(|t| t.dims.len());
        given.or_else(|| self.computed.get(name).map(ArrayD::ndim))
    }

    pub(super) fn values(&self, name: &str) -> Result<Option<ArrayD<f32>>> {
        match self.computed.get(name) {
            Some(values) => Ok(Some(values.clone())),
            None => self.given.get(name).map(|t| to_single(t)).transpose(),
        }
    }

    /// A constant of one element.
    pub(super) fn single(&self, name: &str) -> Option<f32> {
        let small = self.given.get(name).is_none_or(|t| t.dims.iter().all(|&d| d == 1));
        let values = self.values(name).ok().flatten().filter(|_| small)?;
        (values.len() == 1).then(|| values.iter().next().copied())?
    }

    pub(super) fn add(&mut self, name: &str, values: ArrayD<f32>) {
        self.computed.insert(name.to_owned(), values);
    }
}

/// Along what a scale and a zero point of more than one element go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Grid {
    /// Counted from the end where it is negative.
    pub(super) axis: i64,
    /// Elements of the axis that share one; all that a slice has where it is 0.
    pub(super) block: i64,
}

impl Grid {
    /// One for each column of a matrix.
    pub(super) const COLUMNS: Self = Self { axis: -1, block: 0 };
}

/// `(q - zero) scale`; `None` where the shapes do not fit each other.
pub(super) fn dequantised(
    q: &ArrayD<f32>,
    scale: Option<&ArrayD<f32>>,
    zero: Option<&ArrayD<f32>>,
    grid: Grid,
) -> Option<ArrayD<f32>> {
    let mut real = q.clone();
    if let Some(zero) = zero {
        real -= &spread(zero, q.shape(), grid)?;
    }
    if let Some(scale) = scale {
        real *= &spread(scale, q.shape(), grid)?;
    }
    Some(real)
}

/// Scales or zero points under the shape of what they belong to.
fn spread(values: &ArrayD<f32>, shape: &[usize], grid: Grid) -> Option<ArrayD<f32>> {
    if values.len() == 1 {
        return Some(ArrayD::from_elem(IxDyn(&vec![1; shape.len()]), *values.iter().next()?));
    }
    let rank = i64::try_from(shape.len()).ok()?;
    let axis = usize::try_from(if grid.axis < 0 { grid.axis + rank } else { grid.axis }).ok()?;
    let size = *shape.get(axis)?;
    if values.ndim() == 1 && grid.block == 0 {
        let mut aligned = vec![1; shape.len()];
        aligned[axis] = size;
        return values.clone().into_shape_with_order(IxDyn(&aligned)).ok();
    }
    // A slice of the axis for each block.
    let block = usize::try_from(grid.block).ok().filter(|&b| b > 0)?;
    let blocks: Vec<usize> = (0..size).map(|at| at / block).collect();
    let fits = values.ndim() == shape.len() && values.shape()[axis] == size.div_ceil(block);
    fits.then(|| values.select(Axis(axis), &blocks)).filter(|spread| spread.shape() == shape)
}

/// Numbers of `bits` packed into bytes, the first in the lowest bits; each row of bytes begins anew and holds `columns`.
pub(super) fn unpacked(bytes: &ArrayD<f32>, bits: usize, columns: usize) -> Option<ArrayD<f32>> {
    let each = 8usize.checked_div(bits).filter(|each| each * bits == 8)?;
    let (&width, outer) = bytes.shape().split_last()?;
    if width != columns.div_ceil(each) {
        return None;
    }
    let mask = ((1u16 << bits) - 1) as u8;
    let mut values = Vec::with_capacity(bytes.len() / width.max(1) * columns);
    for row in bytes.rows() {
        values.extend((0..columns).map(|at| f32::from(((row[at / each] as u8) >> (bits * (at % each))) & mask)));
    }
    ArrayD::from_shape_vec(IxDyn(&[outer, &[columns]].concat()), values).ok()
}

#[cfg(test)]
mod tests {
    use ndarray::array;

    use super::*;

    #[test]
    fn scales_go_with_all_elements_an_axis_or_blocks() {
        let q = array![[1.0f32, 2.0, 3.0], [4.0, 5.0, 6.0]].into_dyn();
        let [whole, zero] = [array![2.0f32].into_dyn(), array![1.0f32].into_dyn()];
        let grid = |axis, block| Grid { axis, block };
        let real = |scale: &ArrayD<f32>, zero, grid| dequantised(&q, Some(scale), zero, grid);
        assert_eq!(
            real(&whole, Some(&zero), grid(1, 0)).unwrap(),
            array![[0.0, 2.0, 4.0], [6.0, 8.0, 10.0]].into_dyn()
        );
        let rows = array![1.0f32, 10.0].into_dyn();
        assert_eq!(real(&rows, None, grid(0, 0)).unwrap(), array![[1.0, 2.0, 3.0], [40.0, 50.0, 60.0]].into_dyn());
        assert_eq!(real(&rows, None, grid(-2, 0)), real(&rows, None, grid(0, 0)));
        // Blocks of two columns, of which the last is cut.
        let blocks = array![[1.0f32, 10.0], [2.0, 20.0]].into_dyn();
        assert_eq!(real(&blocks, None, grid(1, 2)).unwrap(), array![[1.0, 2.0, 30.0], [8.0, 10.0, 120.0]].into_dyn());
        for misfit in [grid(1, 0), grid(5, 0), grid(-3, 0)] {
            assert_eq!(real(&rows, None, misfit), None);
        }
        assert_eq!(real(&blocks, None, grid(1, 3)), None);
    }

    #[test]
    fn packed_numbers_are_taken_apart() {
        let bytes = array![[0xf7 as f32, 0x08 as f32]].into_dyn();
        assert_eq!(unpacked(&bytes, 4, 3).unwrap(), array![[7.0, 15.0, 8.0]].into_dyn());
        assert_eq!(unpacked(&bytes, 2, 5).unwrap(), array![[3.0, 1.0, 3.0, 3.0, 0.0]].into_dyn());
        assert_eq!(unpacked(&bytes, 8, 2).unwrap(), bytes);
        assert_eq!(unpacked(&bytes, 3, 2), None);
        assert_eq!(unpacked(&bytes, 4, 5), None);
    }
}
