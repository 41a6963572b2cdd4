//! Linear maps between the sites: `MatMul` and `Add` in either order of operands, or `Gemm`, with whatever scale,
//! reshapes and transposes the exporter put around them.

use mabert_graph::{Dependence, NodeExt as _, Tensor, largest_difference};
use ndarray::{Array2, ArrayD, ArrayView1, Axis, IxDyn};

use super::context::Context;
use super::probe::Probe;
use super::region::Region;
use crate::sites::LinearSite;

/// How the rows of a map are laid out in a value of rank 3 or 4.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Layout {
    /// `[batch, n, channels]`, or flattened `[batch * n, channels]`.
    Rows,
    /// `[batch, heads, n, d]`, or `[batch * heads, n, d]`, with so many heads.
    Heads(usize),
    /// `[batch, heads, d, n]`, or `[batch * heads, d, n]`, likewise.
    HeadsTransposed(usize),
}

/// Relative to the largest output.
const TOLERANCE: f32 = 2e-4;

/// A constant matrix that a node of the region multiplies by.
struct Weight {
    name: String,
    transposed: bool,
    values: Array2<f32>,
}

/// The region as a linear map, if it is one.
pub(super) fn read_off(cx: &Context<'_>, region: &Region, from: Layout, to: Layout) -> Result<LinearSite, String> {
    let mut weight = weight(cx, region)?;
    let probe = Probe::new(cx.model, &cx.index, &cx.recording, region)?;
    let width: usize = probe.shape(0).iter().product();
    let zero = to_rows(&probe.run_f32(vec![0.0; width])?, to)?;
    if zero.is_empty() {
        return Err(format!("`{}` is empty", region.exit));
    }
    let bias = zero.index_axis(Axis(0), 0).to_vec();
    let input = Tensor::new(probe.shape(0), probe.noise(0, 21));
    let output = to_rows(&probe.run(std::slice::from_ref(&input))?, to)?;
    let x = to_rows(&input, from)?;
    let centred = &output - &ArrayView1::from(&bias);
    let fits = x.ncols() == weight.values.nrows() && x.nrows() == output.nrows();
    let columns = match fits && output.ncols() < weight.values.ncols() {
        true => Some(narrow(&mut weight, &x, &centred).ok_or_else(|| {
            let (name, exit, by_position) = (&weight.name, &region.exit, by_position(&probe, to));
            format!("`{exit}` is not some of the columns of weight `{name}` times the input{by_position}")
        })?),
        false => None,
    };
    if !fits || output.ncols() != weight.values.ncols() {
        let (name, size) = (&weight.name, weight.values.dim());
        let (inputs, outputs) = (x.ncols(), output.ncols());
        return Err(format!("weight `{name}` {size:?} does not lead from {inputs} to {outputs} channels"));
    }
    let scale = scale(&x.dot(&weight.values), &centred).map_err(|worst| {
        let (Region { entries, exit, .. }, name, by_position) = (region, &weight.name, by_position(&probe, to));
        let entry = &entries[0];
        format!(
            "from `{entry}` to `{exit}` is not weight `{name}` times the input: they differ by {worst:.1e} of the \
             range{by_position}"
        )
    })?;
    Ok(LinearSite {
        input: region.entries[0].clone(),
        output: region.exit.clone(),
        weight: weight.name,
        transposed: weight.transposed,
        columns,
        scale,
        bias,
        bias_name: None,
        inputs: x.ncols(),
        outputs: output.ncols(),
    })
}

/// Keeps those columns of a weight that make `centred`, the output without its bias, of `x`; returns which.
fn narrow(weight: &mut Weight, x: &Array2<f32>, centred: &Array2<f32>) -> Option<Vec<usize>> {
    let columns = matching_columns(centred, &x.dot(&weight.values))?;
    weight.values = weight.values.select(Axis(1), &columns);
    Some(columns)
}

/// What `product` is multiplied by to give `centred`; else by how much they differ at best, relative to the largest value.
fn scale(product: &Array2<f32>, centred: &Array2<f32>) -> Result<f32, f32> {
    let (dot, square) = product
        .iter()
        .zip(centred)
        .fold((0f64, 0f64), |(d, s), (&p, &c)| (d + f64::from(p) * f64::from(c), s + f64::from(p).powi(2)));
    let mut scale = if square > 0.0 { (dot / square) as f32 } else { 1.0 };
    if (scale - 1.0).abs() < 1e-5 {
        scale = 1.0;
    }
    let largest = centred.iter().fold(1e-6f32, |m, v| m.max(v.abs()));
    let worst = largest_difference(&(scale * product), centred);
    if worst > TOLERANCE * largest { Err(worst / largest) } else { Ok(scale) }
}

/// What to say of a region that makes different rows of equal ones.
fn by_position(probe: &Probe, to: Layout) -> &'static str {
    let shape = probe.shape(0);
    let (width, count) = (shape.last().copied().unwrap_or(1), shape.iter().product::<usize>());
    let equal = probe.noise(0, 22)[..width].iter().copied().cycle().take(count).collect();
    let rows = probe.run_f32(equal).and_then(|output| to_rows(&output, to));
    let differ = rows.is_ok_and(|rows| {
        let largest = rows.iter().fold(1e-6f32, |m, v| m.max(v.abs()));
        rows.rows().into_iter().any(|row| row.iter().zip(rows.row(0)).any(|(a, b)| (a - b).abs() > 1e-2 * largest))
    });
    if differ { "; it depends on where a token stands, as rotary positions do" } else { "" }
}

/// The column of `product` that each column of `part` is, up to one positive factor of all.
fn matching_columns(part: &Array2<f32>, product: &Array2<f32>) -> Option<Vec<usize>> {
    let norm = |column: ArrayView1<'_, f32>| column.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>().sqrt();
    let norms = |values: &Array2<f32>| values.columns().into_iter().map(norm).collect::<Vec<f64>>();
    let (sizes, all) = (norms(part), norms(product));
    let likeness = part.t().mapv(f64::from).dot(&product.mapv(f64::from));
    let cosine = |row: usize, at: usize| likeness[(row, at)] / (sizes[row] * all[at]).max(f64::MIN_POSITIVE);
    // The strongest column tells the factor, by which columns of one direction are told apart.
    let strongest = (0..sizes.len()).max_by(|&a, &b| sizes[a].total_cmp(&sizes[b]))?;
    let most_like = (0..all.len()).max_by(|&a, &b| cosine(strongest, a).total_cmp(&cosine(strongest, b)))?;
    let factor = sizes[strongest] / all[most_like];
    let distance = |row: usize, at: usize| {
        let differences = part.column(row).into_iter().zip(product.column(at));
        differences.map(|(&p, &q)| (f64::from(p) - factor * f64::from(q)).powi(2)).sum::<f64>().sqrt()
    };
    let nearest = |row: usize| {
        // Where there is next to nothing, direction is noise.
        let faint = sizes[row] <= f64::from(TOLERANCE) * sizes[strongest];
        let candidates = (0..all.len()).filter(|&at| faint || cosine(row, at) > 0.999);
        let (at, distance) = candidates.map(|at| (at, distance(row, at))).min_by(|a, b| a.1.total_cmp(&b.1))?;
        (distance <= 1e-2 * sizes[strongest]).then_some(at)
    };
    (0..sizes.len()).map(nearest).collect()
}

/// Whether a node multiplies data by a constant matrix.
pub(super) fn has_weight(cx: &Context<'_>, at: usize) -> bool {
    let node = &cx.index.graph().node[at];
    (node.is("MatMul") || node.is("Gemm"))
        && node.input[..2].iter().any(|i| cx.index.dependence(i) == Dependence::Constant)
}

fn weight(cx: &Context<'_>, region: &Region) -> Result<Weight, String> {
    let node = |&at: &usize| &cx.index.graph().node[at];
    if let Some(anchor) = region.nodes.iter().map(node).find(|node| super::is_anchor(node)) {
        let (operator, label, Region { entries, exit, .. }) = (&anchor.op_type, anchor.label(), region);
        return Err(format!("{operator} `{label}` lies between `{}` and `{exit}`: that is no linear map", entries[0]));
    }
    let products: Vec<usize> = region.nodes.iter().copied().filter(|&at| has_weight(cx, at)).collect();
    let [at] = products.as_slice() else {
        return Err(format!(
            "{} products with constant weights lie between `{}` and `{}`, one is needed",
            products.len(),
            region.entries[0],
            region.exit
        ));
    };
    let node = &cx.index.graph().node[*at];
    let name = &node.input[1];
    let tensor = cx.model.constant(name).map_err(|e| e.to_string())?;
    let [_, _] = tensor.shape() else { return Err(format!("weight `{name}` is not a matrix")) };
    let matrix = tensor.to_f32().into_dimensionality::<ndarray::Ix2>().map_err(|e| e.to_string())?;
    let transposed = node.is("Gemm") && node.int("transB", 0) != 0;
    let values = if transposed { matrix.reversed_axes() } else { matrix };
    Ok(Weight { name: name.clone(), transposed, values })
}

/// A value as one row a token, `[batch * n, channels]`.
pub(super) fn to_rows(tensor: &Tensor, layout: Layout) -> Result<Array2<f32>, String> {
    let mut array: ArrayD<f32> = tensor.to_f32();
    if let (Layout::Heads(heads) | Layout::HeadsTransposed(heads), &[rows, n, d]) = (layout, array.shape())
        && rows % heads == 0
    {
        array = array.into_shape_with_order(IxDyn(&[rows / heads, heads, n, d])).map_err(|e| e.to_string())?;
    }
    let rank = array.ndim();
    let array = match (layout, rank) {
        (Layout::Rows, 2 | 3) => array,
        (Layout::Heads(_), 4) => array.permuted_axes(IxDyn(&[0, 2, 1, 3])),
        (Layout::HeadsTransposed(_), 4) => array.permuted_axes(IxDyn(&[0, 3, 1, 2])),
        _ => return Err(format!("a value of rank {rank} where {layout:?} were expected")),
    };
    let rows: usize = array.shape()[..if rank == 4 { 2 } else { rank - 1 }].iter().product();
    let columns = array.len() / rows.max(1);
    let array = array.as_standard_layout().into_owned();
    array.into_shape_with_order((rows, columns)).map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Seeded noise; every column has a size of its own.
    fn product() -> Array2<f32> {
        let noise =
            |(row, column): (usize, usize)| ((row * 37 + column * 101 + row * column * 13) % 97) as f32 / 48.0 - 1.0;
        Array2::from_shape_fn((14, 12), noise)
    }

    #[test]
    fn columns_are_found_in_any_order_and_up_to_a_factor() {
        let product = product();
        let wanted = vec![7, 2, 11, 3];
        assert_eq!(matching_columns(&(product.select(Axis(1), &wanted) * 0.3), &product), Some(wanted));
        let other = product.mapv(|v| v * v);
        assert_eq!(matching_columns(&other.select(Axis(1), &[1, 2]), &product), None);
    }

    #[test]
    fn faint_and_proportional_columns_are_told_apart() {
        let mut product = product();
        let twice = product.column(4).mapv(|v| 2.0 * v);
        product.column_mut(5).assign(&twice);
        product.column_mut(8).fill(0.0);
        product.column_mut(9).mapv_inplace(|v| v * 1e-25);
        let mut part = product.select(Axis(1), &[0, 4, 5, 8, 9]);
        // As a bias that is taken away again leaves it.
        part.column_mut(4).fill(3e-8);
        let columns = matching_columns(&part, &product).unwrap();
        assert_eq!(columns[..3], [0, 4, 5]);
        assert!(columns[3..].iter().all(|at| [8, 9].contains(at)), "{columns:?}");
    }
}
