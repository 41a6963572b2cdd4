//! How large the values of a model can get, whatever text it is given: what a student's bounds promise.
//!
//! Magnitudes go from value to value along the graph. A sum is at most as large as the magnitudes of its terms, whatever
//! the order in which an engine adds them, so what is found holds for every engine.

use std::collections::{HashMap, HashSet};

use mabert_graph::proto::NodeProto;
use mabert_graph::{Index, Model, NodeExt as _, Tensor};

use crate::Result;
use crate::contract::leading_to;
use crate::inputs::{EncoderInput, Role};
use crate::lower::MASK;
use crate::recording::Recording;

/// Operators that move elements, or make none larger.
const NO_LARGER: [&str; 14] = [
    "Relu",
    "Identity",
    "Cast",
    "Reshape",
    "Transpose",
    "Slice",
    "Split",
    "Expand",
    "Flatten",
    "Squeeze",
    "Unsqueeze",
    "Gather",
    "Gelu",
    "Dropout",
];
/// Operators whose results lie between -1 and 1.
const OF_ONE: [&str; 4] = ["Softmax", "Sigmoid", "Tanh", "Erf"];

/// The largest magnitude of any float on the way to the value `end`, itself included, for token ids inside their tables, a
/// mask of zeros and ones, and sequences of at most `longest` tokens. `None` where an operator on the way does not tell.
///
/// # Errors
/// The model cannot be run to find the shapes of its values.
pub fn largest_magnitude(model: &Model, longest: usize, end: &str) -> Result<Option<f64>> {
    let index = Index::new(model)?;
    let recording = Recording::new(model, 2, 5)?;
    let on_the_way = leading_to(&index, end);
    let (known, sums) = (HashMap::new(), HashMap::new());
    let mut magnitudes = Magnitudes { model, index: &index, recording: &recording, longest, known, sums };
    magnitudes.inputs();
    let mut largest = Some(0f64);
    for node in &index.graph().node {
        let Some(output) = node.output.first() else { continue };
        let found = if output == MASK { Some(1.0) } else { magnitudes.made_by(node) };
        if let Some(magnitude) = found {
            node.output.iter().for_each(|output| _ = magnitudes.known.insert(output, magnitude));
        }
        if let Some(sum) = magnitudes.mean_over_tokens(node) {
            magnitudes.sums.insert(output, sum);
        }
        if is_float(&recording, output) && on_the_way.contains(output.as_str()) {
            largest = largest.zip(found).map(|(a, b)| a.max(b));
        }
    }
    let reached: HashSet<&str> = magnitudes.known.keys().copied().collect();
    Ok(largest.filter(|_| reached.contains(end)))
}

fn is_float(recording: &Recording, value: &str) -> bool {
    use mabert_graph::ElementType::{F16, F32, F64};
    recording.value(value).is_none_or(|t| matches!(t.element_type(), F32 | F16 | F64))
}

struct Magnitudes<'g> {
    model: &'g Model,
    index: &'g Index<'g>,
    recording: &'g Recording,
    longest: usize,
    known: HashMap<&'g str, f64>,
    /// Of values that have one axis longer than 1 besides that of sentences, the tokens': what their magnitudes sum to.
    sums: HashMap<&'g str, f64>,
}

impl<'g> Magnitudes<'g> {
    fn inputs(&mut self) {
        let largest = |input: &EncoderInput| match (input.role, input.rows) {
            (Some(Role::Mask), _) => Some(1.0),
            (_, Some(rows)) => Some(rows as f64),
            _ => None,
        };
        let inputs = self.recording.inputs.iter();
        self.known.extend(inputs.filter_map(|input| Some((input.declared.name.as_str(), largest(input)?))));
    }

    /// The magnitude of a value: of a constant as it is.
    fn of(&self, value: &str) -> Option<f64> {
        self.known.get(value).copied().or_else(|| Some(largest_of(&self.constant(value)?)))
    }

    fn constant(&self, value: &str) -> Option<Tensor> {
        self.model.initializer(value).and_then(|proto| Tensor::from_proto(proto).ok())
    }

    /// What a node makes is at most so large.
    fn made_by(&self, node: &NodeProto) -> Option<f64> {
        let operand = |at: usize| self.of(node.input.get(at)?);
        let all = || node.input.iter().map(|value| self.of(value)).collect::<Option<Vec<f64>>>();
        if !node.is(&node.op_type) {
            return None;
        }
        match node.op_type.as_str() {
            "Add" | "Sub" | "Sum" => Some(all()?.iter().sum()),
            "Mul" => Some(all()?.iter().product()),
            "Concat" => all()?.into_iter().reduce(f64::max),
            "Div" => Some(operand(0)? / smallest_of(&self.constant(node.input.get(1)?)?)),
            "MatMul" => self.product(node),
            "Gemm" => {
                let bias = if node.input.len() > 2 { operand(2)? } else { 0.0 };
                // Whether they are turned or not, no more terms are added than the longer of the two has.
                let terms = self.terms(&node.input[1], 0).max(self.terms(&node.input[1], 1));
                let scale = f64::from(node.float("alpha", 1.0).abs());
                Some(scale * terms * operand(0)? * operand(1)? + f64::from(node.float("beta", 1.0).abs()) * bias)
            }
            "Clip" => {
                let attributes =
                    [node.attribute("min"), node.attribute("max")].map(|a| a.map(|a| f64::from(a.f.abs())));
                let limit = |at: usize| attributes[at - 1].or_else(|| operand(at));
                let held = limit(1).zip(limit(2)).map(|(low, high)| low.max(high));
                held.into_iter().chain(operand(0)).reduce(f64::min)
            }
            op if OF_ONE.contains(&op) => Some(1.0),
            op if NO_LARGER.contains(&op) => operand(0),
            _ => None,
        }
    }

    /// `x W` by the columns of a constant `W`, or by how many terms are added.
    fn product(&self, node: &NodeProto) -> Option<f64> {
        let [left, right] = [node.input.first()?, node.input.get(1)?];
        // Summed over tokens, or over an axis of size 1.
        for (weights, values) in [(left, right), (right, left)] {
            if let Some(sum) = self.sums.get(weights.as_str()) {
                return Some(sum * self.of(values)?);
            }
        }
        let x = self.of(left)?;
        match self.constant(right).filter(|weight| weight.shape().len() >= 2) {
            Some(weight) => Some(x * largest_column(&weight)),
            None => Some(self.terms(left, self.recording.shape(left).len().checked_sub(1)?) * x * self.of(right)?),
        }
    }

    /// Of the mask times a number for each length, as a mean over tokens has it, brought to four axes: what its magnitudes
    /// sum to.
    fn mean_over_tokens(&self, node: &NodeProto) -> Option<f64> {
        let shape = self.recording.shape(node.output.first()?);
        (node.is("Reshape") && shape.len() == 4 && shape[1] == 1).then_some(())?;
        let mean = self.index.producer(&node.input[0]).filter(|mean| mean.is("Mul"))?;
        let [a, b] = mean.input.as_slice() else { return None };
        let table = if a == MASK { b } else { Some(a).filter(|_| b == MASK)? };
        let look_up = self.index.producer(table).filter(|n| n.is("Gather") && n.int("axis", 0) == 0)?;
        let counted = self.counts_tokens(&look_up.input[1])?;
        let values = self.constant(&look_up.input[0]).filter(|values| values.shape() == [values.len(), 1])?.to_f32();
        let sums = values.iter().enumerate().map(|(length, v)| length as f64 * f64::from(v.abs()));
        counted.then(|| sums.fold(0.0, f64::max))
    }

    /// Whether a value is how many tokens the mask keeps: its product with ones.
    fn counts_tokens(&self, value: &str) -> Option<bool> {
        let mut node = self.index.producer(value)?;
        while ["Reshape", "Cast"].iter().any(|op| node.is(op)) {
            node = self.index.producer(&node.input[0])?;
        }
        let ones = self.index.producer(node.input.get(1)?).filter(|n| n.is("Slice")).map(|n| n.input[0].as_str());
        let ones = self.constant(ones.unwrap_or(&node.input[1]))?.to_f32();
        Some(node.is("MatMul") && node.input[0] == MASK && ones.iter().all(|v| *v == 1.0))
    }

    /// The size of an axis; what may be the length is taken for the longest.
    fn terms(&self, value: &str, axis: usize) -> f64 {
        let constant = self.constant(value);
        let shape = constant.as_ref().map_or_else(|| self.recording.shape(value), Tensor::shape);
        let size = shape.get(axis).copied().unwrap_or(1);
        let may_be_length = constant.is_none() && size == self.recording.length;
        (if may_be_length { size.max(self.longest) } else { size }) as f64
    }
}

fn largest_of(tensor: &Tensor) -> f64 {
    tensor.to_f32().iter().fold(0f64, |largest, v| largest.max(f64::from(v.abs())))
}

fn smallest_of(tensor: &Tensor) -> f64 {
    tensor.to_f32().iter().fold(f64::INFINITY, |smallest, v| smallest.min(f64::from(v.abs())))
}

/// The largest sum of magnitudes down a column of `[.., rows, columns]`.
fn largest_column(weight: &Tensor) -> f64 {
    let values = weight.to_f32();
    let rows = values.ndim() - 2;
    let sums = values.mapv(|v| f64::from(v.abs())).sum_axis(ndarray::Axis(rows));
    sums.iter().copied().fold(0.0, f64::max)
}

#[cfg(test)]
mod tests {
    use mabert_graph::{Builder, ElementType, Tensor};

    use super::*;
    use crate::pipeline::Pass;
    use crate::testing::{MAX_SEQ, bounded_student, student, values};

    fn found(build: impl for<'b> Fn(&'b Builder, mabert_graph::Expr<'b>) -> mabert_graph::Expr<'b>) -> Option<f64> {
        let b = Builder::new(17, "test");
        let ids = b.input("input_ids", ElementType::I64, &["B", "N"]);
        let table = b.constant("table", &Tensor::new(&[3, 2], vec![0.5f32, -2.0, 1.0, 1.5, 0.0, 0.25]));
        b.input("attention_mask", ElementType::I64, &["B", "N"]).cast(ElementType::F32).named(MASK);
        let model = b.model(&[build(&b, table.gather(ids)).named("end")]);
        largest_magnitude(&model, 10, "end").unwrap()
    }

    #[test]
    fn magnitudes_are_those_of_the_worst_case() {
        assert_eq!(found(|_, x| x + 1.0), Some(3.0));
        // Columns of 3 and of 5, times 2.
        let weight = |b: &Builder| b.constant("w", &Tensor::new(&[2, 2], vec![1f32, -4.0, 2.0, 1.0])).name();
        assert_eq!(found(|b, x| x.matmul(b.value(&weight(b)))), Some(10.0));
        // 2 channels; as many tokens as the longest.
        assert_eq!(found(|_, x| x.matmul(x.transpose(&[0, 2, 1]))), Some(8.0));
        assert_eq!(found(|_, x| x.transpose(&[0, 2, 1]).matmul(x)), Some(40.0));
        // What was larger on the way counts.
        assert_eq!(found(|_, x| (x * 100.0).clip(-0.5, 0.25)), Some(200.0));
        assert_eq!(found(|_, x| x.clip(-0.5, 0.25) * x), Some(2.0));
        assert_eq!(found(|_, x| (x / 0.5).relu().softmax()), Some(4.0));
        assert_eq!(found(|_, x| x.reciprocal()), None);
    }

    /// A mean over tokens is no larger than what it is of, however many there are.
    #[test]
    fn means_over_tokens_are_no_larger() {
        let mean = |number: f32| {
            found(|b, x| {
                let mask = b.value("mask/float");
                let ones = b.parameter("ones", &Tensor::new(&[5, 1], vec![number; 5]));
                let real = mask.matmul(ones).cast(ElementType::I64).reshape(&[-1]);
                let one_over = (0..11).map(|n: usize| 1.0 / n.max(1) as f32).collect();
                let mean = mask * b.parameter("one_over_length", &Tensor::new(&[11, 1], one_over)).gather(real);
                // [B, 1, 1, N] times [B, 1, N, 2].
                mean.reshape(&[0, 1, 1, -1]).matmul(x.reshape(&[0, 1, -1, 2]))
            })
        };
        // The largest on the way is how many tokens there are.
        assert_eq!(mean(1.0), Some(5.0));
        // That is no length.
        assert_eq!(mean(2.0), Some(20.0));
    }

    /// By construction, and not one value of a run is larger.
    #[test]
    fn bounded_students_have_a_largest_magnitude() {
        for pass in [Pass::Bound, Pass::MergeQkv] {
            let mut bounded = bounded_student(pass);
            let end = bounded.encoder.layers[0].output_norm.output.clone();
            let largest = largest_magnitude(&bounded.model, MAX_SEQ, &end).unwrap().unwrap();
            // The embeddings' own size no longer matters behind the first bound.
            let words = bounded.model.constant("words").unwrap().to_f32();
            bounded.model.set_constant("words", &(words * 1e3).into());
            let value = values(&bounded.model, &[&end], &[6, 3]).remove(0);
            assert!(value.iter().all(|v| f64::from(v.abs()) <= largest), "{largest}");
            let free = student(pass);
            assert!(largest_magnitude(&free.model, MAX_SEQ, &end).unwrap().unwrap() > largest);
        }
    }
}
