//! A differentiable executor of ONNX graphs: what a student is made of, and what task heads use, on candle's tensors.
//!
//! Values of floats are tensors with gradients. Integers (shapes, indices) never need one and are computed beside them.

use std::collections::HashMap;

use candle_core::{D, Device, Tensor as Real, Var};
use mabert_graph::proto::NodeProto;
use mabert_graph::{Model, NodeExt as _, Tensor, attribute};
use ndarray::{ArrayD, Axis, IxDyn, Slice};

use super::convert;
use crate::{Error, Result};

/// A value while a graph runs.
#[derive(Clone, Debug)]
pub(crate) enum Value {
    /// Floats.
    Real(Real),
    /// Integers and truth values.
    Whole(ArrayD<i64>),
}

/// A graph whose chosen initializers are variables.
pub(crate) struct Graph {
    nodes: Vec<Node>,
    constants: Vec<(usize, Value)>,
    variables: Vec<(String, usize, Var)>,
    inputs: Vec<usize>,
    outputs: Vec<usize>,
    slots: usize,
}

struct Node {
    proto: NodeProto,
    /// `None` for inputs that are left out.
    inputs: Vec<Option<usize>>,
    outputs: Vec<usize>,
}

impl Graph {
    /// Prepares `model`, whose inputs are given to [`Graph::run`] in `inputs`' order. Initializers named in `trained` are
    /// variables.
    pub(crate) fn new(model: &Model, inputs: &[&str], outputs: &[&str], trained: &[String]) -> Result<Self> {
        let mut slots: HashMap<String, usize> = HashMap::new();
        let mut slot = |name: &str| {
            let next = slots.len();
            *slots.entry(name.to_owned()).or_insert(next)
        };
        let mut constants = Vec::new();
        let mut variables = Vec::new();
        for initializer in &model.graph().initializer {
            let value = Tensor::from_proto(initializer)?;
            let at = slot(&initializer.name);
            if trained.contains(&initializer.name) {
                let var = Var::from_tensor(&convert::to_candle(&value)?)?;
                variables.push((initializer.name.clone(), at, var));
            } else {
                constants.push((at, convert::to_value(&value)?));
            }
        }
        if let Some(missing) = trained.iter().find(|name| variables.iter().all(|(n, ..)| n != *name)) {
            return Err(Error::Gradient(format!("there is no initializer `{missing}` to train")));
        }
        let inputs = inputs.iter().map(|name| slot(name)).collect();
        let mut nodes = Vec::new();
        for proto in &model.graph().node {
            if proto.is("Constant") {
                let value = attribute::constant(proto)?
                    .ok_or_else(|| refused(proto, "its value is neither floats nor integers"))?;
                constants.push((slot(&proto.output[0]), convert::to_value(&value)?));
                continue;
            }
            let used = proto.input.iter().map(|name| (!name.is_empty()).then(|| slot(name))).collect();
            let made = proto.output.iter().map(|name| slot(name)).collect();
            nodes.push(Node { proto: proto.clone(), inputs: used, outputs: made });
        }
        let outputs = outputs.iter().map(|name| slot(name)).collect();
        let slots = slots.len();
        Ok(Self { nodes, constants, variables, inputs, outputs, slots })
    }

    /// The variables, by the names of their initializers.
    pub(crate) fn variables(&self) -> impl Iterator<Item = (&str, &Var)> {
        self.variables.iter().map(|(name, _, var)| (name.as_str(), var))
    }

    /// Runs the graph; every output must be of floats.
    pub(crate) fn run(&self, inputs: &[Value]) -> Result<Vec<Real>> {
        let mut values: Vec<Option<Value>> = vec![None; self.slots];
        for (at, value) in &self.constants {
            values[*at] = Some(value.clone());
        }
        for (_, at, var) in &self.variables {
            values[*at] = Some(Value::Real(var.as_tensor().clone()));
        }
        for (at, value) in self.inputs.iter().zip(inputs) {
            values[*at] = Some(value.clone());
        }
        for node in &self.nodes {
            let given: Vec<Option<&Value>> =
                node.inputs.iter().map(|at| at.and_then(|at| values[at].as_ref())).collect();
            let made = run_node(&node.proto, &given)?;
            for (at, value) in node.outputs.iter().zip(made) {
                values[*at] = Some(value);
            }
        }
        let real = |at: &usize| match &values[*at] {
            Some(Value::Real(value)) => Ok(value.clone()),
            _ => Err(Error::Gradient("an output is not of floats".to_owned())),
        };
        self.outputs.iter().map(real).collect()
    }
}

fn refused(node: &NodeProto, why: &str) -> Error {
    Error::Gradient(format!("{} `{}` cannot be differentiated: {why}", node.op_type, node.label()))
}

/// The inputs of one node.
struct Given<'g> {
    node: &'g NodeProto,
    values: &'g [Option<&'g Value>],
}

impl Given<'_> {
    fn value(&self, at: usize) -> Result<&Value> {
        self.optional(at).ok_or_else(|| refused(self.node, "an input is missing"))
    }

    fn optional(&self, at: usize) -> Option<&Value> {
        self.values.get(at).copied().flatten()
    }

    fn real(&self, at: usize) -> Result<Real> {
        match self.value(at)? {
            Value::Real(value) => Ok(value.clone()),
            Value::Whole(_) => Err(refused(self.node, "floats were expected")),
        }
    }

    fn whole(&self, at: usize) -> Result<&ArrayD<i64>> {
        match self.value(at)? {
            Value::Whole(value) => Ok(value),
            Value::Real(_) => Err(refused(self.node, "integers were expected")),
        }
    }

    /// A list of integers: an input, or in earlier opsets an attribute.
    fn list(&self, at: usize, name: &str) -> Result<Option<Vec<i64>>> {
        match self.optional(at) {
            Some(_) => Ok(Some(self.whole(at)?.iter().copied().collect())),
            None => Ok(self.node.ints(name).map(<[i64]>::to_vec)),
        }
    }
}

fn run_node(node: &NodeProto, values: &[Option<&Value>]) -> Result<Vec<Value>> {
    let given = Given { node, values };
    if !node.is(&node.op_type) {
        return Err(refused(node, "it is of a domain of its own"));
    }
    if let Some(Value::Whole(first)) = given.optional(0)
        && !matches!(node.op_type.as_str(), "Cast" | "Shape" | "ConstantOfShape")
    {
        return Ok(vec![Value::Whole(whole_node(&given, first)?)]);
    }
    let real = |value: Real| Ok(vec![Value::Real(value)]);
    let unary = |f: fn(&Real) -> candle_core::Result<Real>| real(f(&given.real(0)?)?);
    let binary = |f: fn(&Real, &Real) -> candle_core::Result<Real>| real(f(&given.real(0)?, &given.real(1)?)?);
    match node.op_type.as_str() {
        "Add" => binary(Real::broadcast_add),
        "Sub" => binary(Real::broadcast_sub),
        "Mul" => binary(Real::broadcast_mul),
        "Div" => binary(Real::broadcast_div),
        "Relu" => unary(Real::relu),
        "Tanh" => unary(Real::tanh),
        "Erf" => unary(Real::erf),
        "Sqrt" => unary(Real::sqrt),
        "Exp" => unary(Real::exp),
        "Neg" => unary(Real::neg),
        "Reciprocal" => unary(Real::recip),
        "Identity" | "Dropout" => real(given.real(0)?),
        "Gelu" if node.text("approximate").as_deref() == Some("tanh") => unary(Real::gelu),
        "Gelu" => unary(Real::gelu_erf),
        "Pow" => {
            let exponent = given.real(1)?.flatten_all()?.to_vec1::<f32>()?;
            match exponent.as_slice() {
                [2.0] => unary(Real::sqr),
                [exponent] => real(given.real(0)?.powf(f64::from(*exponent))?),
                _ => Err(refused(node, "its exponent is not one number")),
            }
        }
        "Softmax" => {
            let x = given.real(0)?;
            if axis(node.int("axis", -1), x.rank()) + 1 != x.rank() {
                return Err(refused(node, "its axis is not the last"));
            }
            // The largest element is a constant here: the gradient does not depend on it.
            let exp = x.broadcast_sub(&x.max_keepdim(D::Minus1)?.detach())?.exp()?;
            real(exp.broadcast_div(&exp.sum_keepdim(D::Minus1)?)?)
        }
        "ReduceMean" => {
            let mut x = given.real(0)?;
            let axes = given.list(1, "axes")?.unwrap_or_else(|| (0..x.rank() as i64).collect());
            let mut axes: Vec<usize> = axes.into_iter().map(|a| axis(a, x.rank())).collect();
            axes.sort_unstable();
            for &at in &axes {
                x = x.mean_keepdim(at)?;
            }
            if node.int("keepdims", 1) == 0 {
                for &at in axes.iter().rev() {
                    x = x.squeeze(at)?;
                }
            }
            real(x)
        }
        "LayerNormalization" => {
            let x = given.real(0)?;
            if axis(node.int("axis", -1), x.rank()) + 1 != x.rank() {
                return Err(refused(node, "it normalises more than the last axis"));
            }
            let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
            let variance = (centred.sqr()?.mean_keepdim(D::Minus1)? + f64::from(node.float("epsilon", 1e-5)))?;
            let mut y = centred.broadcast_div(&variance.sqrt()?)?.broadcast_mul(&given.real(1)?)?;
            if given.optional(2).is_some() {
                y = y.broadcast_add(&given.real(2)?)?;
            }
            real(y)
        }
        "MatMul" => real(matmul(&given.real(0)?, &given.real(1)?)?),
        "Gemm" => {
            let turned = |x: Real, flag: &str| if node.int(flag, 0) == 1 { x.t() } else { Ok(x) };
            let (a, b) = (turned(given.real(0)?, "transA")?, turned(given.real(1)?, "transB")?);
            let mut y = (a.contiguous()?.matmul(&b.contiguous()?)? * f64::from(node.float("alpha", 1.0)))?;
            if given.optional(2).is_some() {
                y = y.broadcast_add(&(given.real(2)? * f64::from(node.float("beta", 1.0)))?)?;
            }
            real(y)
        }
        "Transpose" => {
            let x = given.real(0)?;
            let order: Vec<usize> = match node.ints("perm") {
                Some(order) => order.iter().map(|&a| a as usize).collect(),
                None => (0..x.rank()).rev().collect(),
            };
            real(x.permute(order)?.contiguous()?)
        }
        "Reshape" => {
            let x = given.real(0)?;
            let wanted: Vec<i64> = given.whole(1)?.iter().copied().collect();
            real(x.reshape(reshaped(node, x.dims(), &wanted)?)?)
        }
        "Flatten" => {
            let x = given.real(0)?;
            let at = axis(node.int("axis", 1), x.rank() + 1);
            let rows: usize = x.dims()[..at].iter().product();
            real(x.reshape((rows, x.elem_count() / rows.max(1)))?)
        }
        "Unsqueeze" | "Squeeze" => {
            let mut x = given.real(0)?;
            let shape = resized(&given, x.dims())?;
            x = x.reshape(shape)?;
            real(x)
        }
        "Expand" => {
            let wanted: Vec<usize> = given.whole(1)?.iter().map(|&d| d as usize).collect();
            let x = given.real(0)?;
            let shape = x.shape().broadcast_shape_binary_op(&wanted.into(), "expand")?;
            real(x.broadcast_as(shape)?.contiguous()?)
        }
        "Slice" => {
            let mut x = given.real(0)?;
            for (at, start, len) in sliced(&given, x.dims())? {
                x = x.narrow(at, start, len)?;
            }
            real(x.contiguous()?)
        }
        "Split" => {
            let x = given.real(0)?;
            let at = axis(node.int("axis", 0), x.rank());
            let parts = node.output.len();
            let sizes = match given.list(1, "split")? {
                Some(sizes) => sizes.into_iter().map(|s| s as usize).collect(),
                None => vec![x.dims()[at] / parts; parts],
            };
            let mut start = 0;
            let part = |size: usize| {
                start += size;
                Ok(Value::Real(x.narrow(at, start - size, size)?.contiguous()?))
            };
            sizes.into_iter().map(part).collect()
        }
        "Concat" => {
            let parts: Vec<Real> = (0..values.len()).map(|at| given.real(at)).collect::<Result<_>>()?;
            real(Real::cat(&parts, axis(node.int("axis", 0), parts[0].rank()))?)
        }
        "Gather" => {
            let x = given.real(0)?;
            let at = axis(node.int("axis", 0), x.rank());
            let indices = given.whole(1)?;
            let size = x.dims()[at] as i64;
            let flat: Vec<u32> = indices.iter().map(|&i| if i < 0 { i + size } else { i } as u32).collect();
            let count = flat.len();
            let mut shape = x.dims().to_vec();
            shape.splice(at..=at, indices.shape().iter().copied());
            real(x.index_select(&Real::from_vec(flat, count, &Device::Cpu)?, at)?.reshape(shape)?)
        }
        "Shape" => {
            let dims: Vec<i64> = match given.value(0)? {
                Value::Real(x) => x.dims().iter().map(|&d| d as i64).collect(),
                Value::Whole(x) => x.shape().iter().map(|&d| d as i64).collect(),
            };
            let rank = dims.len() as i64;
            let bound = |value: i64| (if value < 0 { value + rank } else { value }).clamp(0, rank) as usize;
            let (start, end) = (bound(node.int("start", 0)), bound(node.int("end", rank)));
            Ok(vec![Value::Whole(ndarray::Array1::from(dims[start..end.max(start)].to_vec()).into_dyn())])
        }
        "Cast" => {
            let to_real = matches!(node.int("to", 1), 1 | 10 | 11 | 16);
            Ok(vec![match (given.value(0)?, to_real) {
                (Value::Real(x), true) => Value::Real(x.clone()),
                (Value::Whole(x), false) => Value::Whole(x.clone()),
                (Value::Real(x), false) => {
                    let whole = x.flatten_all()?.to_vec1::<f32>()?.into_iter().map(|v| v as i64).collect();
                    Value::Whole(ArrayD::from_shape_vec(IxDyn(x.dims()), whole).expect("as many elements"))
                }
                (Value::Whole(x), true) => {
                    let floats: Vec<f32> = x.iter().map(|&v| v as f32).collect();
                    Value::Real(Real::from_vec(floats, x.shape(), &Device::Cpu)?)
                }
            }])
        }
        _ => Err(refused(node, "it is none of the operators that a student is made of")),
    }
}

/// Integers in, integers out.
fn whole_node(given: &Given<'_>, x: &ArrayD<i64>) -> Result<ArrayD<i64>> {
    let node = given.node;
    let shaped = |shape: &[usize]| {
        let elements: Vec<i64> = x.iter().copied().collect();
        ArrayD::from_shape_vec(IxDyn(shape), elements).map_err(|e| refused(node, &e.to_string()))
    };
    let binary = |f: fn(i64, i64) -> i64| {
        let y = given.whole(1)?;
        let shape = if x.ndim() >= y.ndim() { x.raw_dim() } else { y.raw_dim() };
        match (x.broadcast(shape.clone()), y.broadcast(shape)) {
            (Some(x), Some(y)) => Ok(ndarray::Zip::from(x).and(y).map_collect(|&a, &b| f(a, b))),
            _ => Err(refused(node, "its shapes do not fit")),
        }
    };
    match node.op_type.as_str() {
        "Identity" => Ok(x.clone()),
        "Add" => binary(|a, b| a + b),
        "Sub" => binary(|a, b| a - b),
        "Mul" => binary(|a, b| a * b),
        "Div" => binary(|a, b| if b == 0 { 0 } else { a / b }),
        "Reshape" => {
            let wanted: Vec<i64> = given.whole(1)?.iter().copied().collect();
            shaped(&reshaped(node, x.shape(), &wanted)?)
        }
        "Unsqueeze" | "Squeeze" => shaped(&resized(given, x.shape())?),
        "Slice" => {
            let mut view = x.view();
            for (at, start, len) in sliced(given, x.shape())? {
                view.slice_axis_inplace(Axis(at), Slice::from(start..start + len));
            }
            Ok(view.to_owned())
        }
        "Gather" => {
            let at = axis(node.int("axis", 0), x.ndim());
            let size = x.shape()[at] as i64;
            let indices = given.whole(1)?;
            let flat: Vec<usize> = indices.iter().map(|&i| if i < 0 { i + size } else { i } as usize).collect();
            let mut shape = x.shape().to_vec();
            shape.splice(at..=at, indices.shape().iter().copied());
            let picked: Vec<i64> = x.select(Axis(at), &flat).iter().copied().collect();
            ArrayD::from_shape_vec(IxDyn(&shape), picked).map_err(|e| refused(node, &e.to_string()))
        }
        "Concat" => {
            let parts: Vec<_> = (0..given.values.len()).map(|i| Ok(given.whole(i)?.view())).collect::<Result<_>>()?;
            ndarray::concatenate(Axis(axis(node.int("axis", 0), x.ndim())), &parts)
                .map_err(|e| refused(node, &e.to_string()))
        }
        _ => Err(refused(node, "of integers it is none of the operators that a student is made of")),
    }
}

/// A product whose right side may lack the left side's leading axes: then they are rows like any other, and one large
/// product takes the place of many small ones, in the gradient too.
fn matmul(a: &Real, b: &Real) -> Result<Real> {
    let (left, right) = (a.dims().to_vec(), b.dims().to_vec());
    let y = match (left.len(), right.len()) {
        (rank, 2) if rank > 2 => {
            let rows: usize = left[..rank - 1].iter().product();
            let mut shape = left.clone();
            shape[rank - 1] = right[1];
            a.reshape((rows, left[rank - 1]))?.matmul(&b.contiguous()?)?.reshape(shape)?
        }
        (4, 3) => {
            let [batch, groups, rows, inner] = left[..] else { unreachable!("four axes") };
            if right[0] != groups {
                return Ok(a.broadcast_matmul(b)?);
            }
            let joined = a.permute((1, 0, 2, 3))?.contiguous()?.reshape((groups, batch * rows, inner))?;
            let y = joined.matmul(&b.contiguous()?)?.reshape((groups, batch, rows, right[2]))?;
            y.permute((1, 0, 2, 3))?.contiguous()?
        }
        _ => a.broadcast_matmul(&b.contiguous()?)?,
    };
    Ok(y)
}

fn axis(value: i64, rank: usize) -> usize {
    if value < 0 { (value + rank as i64).max(0) as usize } else { value as usize }
}

fn reshaped(node: &NodeProto, dims: &[usize], wanted: &[i64]) -> Result<Vec<usize>> {
    let keep = node.int("allowzero", 0) == 0;
    let mut shape: Vec<usize> = Vec::new();
    for (at, &d) in wanted.iter().enumerate() {
        shape.push(match d {
            -1 => 1,
            0 if keep => *dims.get(at).ok_or_else(|| refused(node, "it keeps an axis that is not there"))?,
            d => d as usize,
        });
    }
    if let Some(free) = wanted.iter().position(|&d| d == -1) {
        let total: usize = dims.iter().product();
        shape[free] = total / shape.iter().product::<usize>().max(1);
    }
    Ok(shape)
}

/// The shape after `Squeeze` or `Unsqueeze`.
fn resized(given: &Given<'_>, dims: &[usize]) -> Result<Vec<usize>> {
    let node = given.node;
    let axes = given.list(1, "axes")?;
    if node.op_type == "Squeeze" {
        let drop: Vec<usize> = match axes {
            Some(axes) => axes.into_iter().map(|a| axis(a, dims.len())).collect(),
            None => (0..dims.len()).filter(|&at| dims[at] == 1).collect(),
        };
        return Ok((0..dims.len()).filter(|at| !drop.contains(at)).map(|at| dims[at]).collect());
    }
    let axes = axes.ok_or_else(|| refused(node, "it has no axes"))?;
    let rank = dims.len() + axes.len();
    let new: Vec<usize> = axes.into_iter().map(|a| axis(a, rank)).collect();
    let mut old = dims.iter();
    Ok((0..rank).map(|at| if new.contains(&at) { 1 } else { *old.next().unwrap_or(&1) }).collect())
}

/// What `Slice` keeps of each axis: its start and length.
fn sliced(given: &Given<'_>, dims: &[usize]) -> Result<Vec<(usize, usize, usize)>> {
    let node = given.node;
    let missing = || refused(node, "its bounds are missing");
    let starts = given.list(1, "starts")?.ok_or_else(missing)?;
    let ends = given.list(2, "ends")?.ok_or_else(missing)?;
    let axes = given.list(3, "axes")?.unwrap_or_else(|| (0..starts.len() as i64).collect());
    if given.list(4, "steps")?.is_some_and(|steps| steps.iter().any(|s| *s != 1)) {
        return Err(refused(node, "it takes steps other than 1"));
    }
    let bounds = starts.into_iter().zip(ends).zip(axes);
    Ok(bounds
        .map(|((start, end), a)| {
            let at = axis(a, dims.len());
            let size = dims[at] as i64;
            let bound = |value: i64| (if value < 0 { value + size } else { value }).clamp(0, size) as usize;
            let (start, end) = (bound(start), bound(end));
            (at, start, end.saturating_sub(start))
        })
        .collect())
}

/// A scalar's value.
pub(crate) fn number(value: &Real) -> Result<f32> {
    Ok(value.to_scalar::<f32>()?)
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use mabert_graph::{Boundary, ElementType};
    use mabert_passes::pipeline::{Keep, Options, Order, Rewriting, Student};
    use mabert_passes::rewrite::{ApproximatorOptions, MASK, Sharing};
    use rand::{Rng as _, SeedableRng as _, rngs::StdRng};

    use super::*;
    use crate::gradient::to_candle;
    use crate::part::Part;

    fn student(folder: &Path, keep: Keep) -> Student {
        let approximator =
            ApproximatorOptions { max_seq: 16, hidden: 5, sharing: Sharing::PerHead, length_tables: true };
        let options = Options { approximator, order: Order::Linear, keep, fold: true, until: None, partial: false };
        let model = Model::load(folder.join("model.onnx")).unwrap();
        Rewriting::new(model, options).unwrap().approximate().unwrap()
    }

    fn exports() -> Vec<PathBuf> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/exports");
        let entries = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path());
        entries.filter(|p| p.join("model.onnx").exists()).collect()
    }

    /// The stream after the embeddings' sum, and the mask, of three sentences.
    fn inputs(student: &Student) -> [Tensor; 2] {
        let mut rng = StdRng::seed_from_u64(3);
        let channels = student.encoder.channels;
        let stream = (0..3 * 7 * channels).map(|_| rng.random_range(-1f32..1.0)).collect();
        let mask = [7, 4, 1].iter().flat_map(|&len| (0..7).map(move |at| if at < len { 1f32 } else { 0.0 })).collect();
        [Tensor::new(&[3, 7, channels], stream), Tensor::new(&[3, 7], mask)]
    }

    fn difference(a: &Tensor, b: &Tensor) -> f32 {
        let (a, b) = (a.to_f32(), b.to_f32());
        assert_eq!(a.shape(), b.shape());
        let far =
            a.iter().zip(&b).map(|(x, y)| (x - y).abs()).fold(0f32, |m, d| if d > m || d.is_nan() { d } else { m });
        far / b.iter().fold(1f32, |m, v| m.max(v.abs()))
    }

    /// From the embeddings to the outputs, student and teacher: what candle computes is what tract computes.
    #[test]
    fn every_export_gives_what_tract_gives() {
        let all = Keep { softmax: true, activation: true, norm: true };
        let found = exports();
        assert!(found.len() >= 15);
        for folder in found {
            for keep in [Keep::default(), all] {
                let student = student(&folder, keep);
                let input = student.encoder.embedding_norm.input.as_str();
                let channels = student.encoder.embedding_norm.gamma.len();
                let outputs = student.model.outputs();
                let outputs: Vec<&str> = outputs.iter().map(|o| o.name.as_str()).collect();
                let part = Part::new(&student.model, &[(input, Some(channels)), (MASK, None)], &outputs).unwrap();
                let given = inputs(&student);
                let expected = part.run(&[&given[0], &given[1]]).unwrap();
                let boundary = |name: &str, dims: &[&str]| Boundary::symbolic(name, ElementType::F32, dims);
                let boundaries = [boundary(input, &["b", "n", &channels.to_string()]), boundary(MASK, &["b", "n"])];
                let cut = student.model.extract(&boundaries, &outputs).unwrap();
                let graph = Graph::new(&cut, &[input, MASK], &outputs, &[]).unwrap();
                let values = given.each_ref().map(|t| Value::Real(to_candle(t).unwrap()));
                for (x, y) in graph.run(&values).unwrap().iter().zip(&expected) {
                    let far = difference(&crate::gradient::from_candle(x).unwrap(), y);
                    assert!(far < 1e-4, "{}, {keep:?}: {far}", folder.display());
                }
            }
        }
    }

    /// Gradients against differences of the loss, for one element of every trained initializer of a layer.
    #[test]
    fn gradients_are_those_of_small_changes() {
        let folder = exports().into_iter().find(|f| f.ends_with("bert-sdpa-torchscript-17")).unwrap();
        let student = student(&folder, Keep::default());
        let layer = &student.encoder.layers[0];
        let input = layer.input.as_str();
        let channels = layer.query.inputs.to_string();
        let boundary = |name: &str, dims: &[&str]| Boundary::symbolic(name, ElementType::F32, dims);
        let boundaries = [boundary(input, &["b", "n", &channels]), boundary(MASK, &["b", "n"])];
        let output = layer.output_norm.output.as_str();
        let cut = student.model.extract(&boundaries, &[output]).unwrap();
        let of = &student.approximators[0];
        let mut trained = [&of.w1, &of.w2, &of.b1, &of.b2, &of.scale].map(String::clone).to_vec();
        for linear in [&layer.query, &layer.key, &layer.value, &layer.attention_output, &layer.output] {
            trained.extend([Some(linear.weight.clone()), linear.bias_name.clone()].into_iter().flatten());
        }
        let graph = Graph::new(&cut, &[input, MASK], &[output], &trained).unwrap();
        let given = inputs(&student).map(|t| Value::Real(to_candle(&t).unwrap()));
        let loss = || graph.run(&given).unwrap().remove(0).sqr().unwrap().mean_all().unwrap();
        let store = loss().backward().unwrap();
        assert_eq!(graph.variables().count(), trained.len());
        for (name, variable) in graph.variables() {
            let gradient = store.get(variable).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let at = (0..gradient.len()).max_by(|a, b| gradient[*a].abs().total_cmp(&gradient[*b].abs())).unwrap();
            let value = variable.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let moved = |by: f32| {
                let mut value = value.clone();
                value[at] += by;
                variable.set(&Real::from_vec(value, variable.dims(), &Device::Cpu).unwrap()).unwrap();
                f64::from(number(&loss()).unwrap())
            };
            let step = 4e-3;
            let slope = (moved(step) - moved(-step)) / (2.0 * f64::from(step));
            moved(0.0);
            let expected = f64::from(gradient[at]);
            let far = (slope - expected).abs() / expected.abs().max(1e-2);
            assert!(far < 0.05, "{name}: {slope} against {expected}");
        }
    }
}
