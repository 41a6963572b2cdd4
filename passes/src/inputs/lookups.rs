//! Which input indexes which table of embeddings.

use std::borrow::Cow;
use std::collections::BTreeMap;

use mabert_graph::proto::NodeProto;
use mabert_graph::{Dependence, Index, Model, NodeExt as _, Tensor, decompose_fused, inline_functions};
use mabert_runtime::{LoadOptions, borrowed};
use ndarray::{Array2, Ix2, s};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};

use super::{filled, shape};
use crate::Result;

/// Sequences and tokens on which an index is compared with inputs.
const COMPARED: (usize, usize) = (2, 9);
/// Values that tell an input from another, at most.
const MOST_VALUES: usize = 1000;

/// What inputs index.
#[derive(Debug, Default)]
pub(super) struct Lookups {
    rows: BTreeMap<String, usize>,
    /// Several inputs that go into one index alike, as ids and a mask that are multiplied do.
    pub(super) alike: Vec<Vec<String>>,
}

impl Lookups {
    /// Rows of the table that an input indexes, the smallest of several tables.
    pub(super) fn rows(&self, input: &str) -> Option<usize> {
        self.rows.get(input).copied()
    }
}

/// Finds every lookup in a constant table whose index is an input, but for casts, shapes, an offset or a mask; tables
/// may be computed from constants.
pub(super) fn lookups(model: &Model) -> Result<Lookups> {
    let model = spelled_out(model)?;
    let index = Index::new(&model)?;
    let mut lookups = Lookups::default();
    for node in &index.graph().node {
        let Some(lookup) = Lookup::at(node, &index) else { continue };
        let Some(rows) = lookup.rows(&model) else { continue };
        let inputs = indexing_inputs(&model, lookup.index, rows);
        for (input, offset) in &inputs {
            let Ok(below) = usize::try_from(rows as i64 - offset) else { continue };
            lookups.rows.entry(input.clone()).and_modify(|rows| *rows = below.min(*rows)).or_insert(below);
        }
        if inputs.len() > 1 {
            lookups.alike.push(inputs.into_iter().map(|(input, _)| input).collect());
        }
    }
    Ok(lookups)
}

/// The values of the table of so many `rows` that `input` indexes, `[rows, width]`; `None` where a table is no value by
/// itself, or none was found.
pub(super) fn table(model: &Model, input: &str, rows: usize) -> Result<Option<Array2<f32>>> {
    let model = spelled_out(model)?;
    let index = Index::new(&model)?;
    for node in &index.graph().node {
        let Some(lookup) = Lookup::at(node, &index).filter(|_| node.is("Gather")) else { continue };
        let Some(all) = lookup.rows(&model) else { continue };
        let inputs = indexing_inputs(&model, lookup.index, all);
        let Some((_, offset)) = inputs.into_iter().find(|(name, _)| name == input) else { continue };
        let Ok(first) = usize::try_from(offset) else { continue };
        if all.checked_sub(first) == Some(rows)
            && let Some(values) = lookup.values(&model)
        {
            return Ok(Some(values.slice(s![first.., ..]).to_owned()));
        }
    }
    Ok(None)
}

/// The model, its functions and fused embeddings spelled out where it has some.
fn spelled_out(model: &Model) -> Result<Cow<'_, Model>> {
    let is_fused = |node: &NodeProto| node.domain == "com.microsoft" && node.op_type.contains("Embed");
    if model.proto().functions.is_empty() && !model.graph().node.iter().any(is_fused) {
        return Ok(Cow::Borrowed(model));
    }
    let mut model = model.clone();
    inline_functions(&mut model)?;
    decompose_fused(&mut model)?;
    Ok(Cow::Owned(model))
}

/// A node that looks rows of a table up by an index that depends on inputs.
struct Lookup<'g> {
    index: &'g str,
    table: Table<'g>,
}

enum Table<'g> {
    /// The axis of a value along which rows lie.
    Axis(&'g str, i64),
    /// TensorFlow's BERT looks up small tables, and on accelerators all, by a product with ones and zeros: a value that
    /// says how many rows there are.
    Depth(&'g str),
}

impl<'g> Lookup<'g> {
    fn at(node: &'g NodeProto, index: &Index<'g>) -> Option<Self> {
        let operand = |at: usize| node.input.get(at).map(String::as_str);
        let (index_of_rows, table) = if node.is("Gather") {
            (operand(1)?, Table::Axis(operand(0)?, node.int("axis", 0)))
        } else if node.op_type == "GatherBlockQuantized" {
            (operand(1)?, Table::Axis(operand(0)?, node.int("gather_axis", 0)))
        } else if node.is("OneHot") {
            (operand(0)?, Table::Depth(operand(1)?))
        } else {
            return None;
        };
        let (Table::Axis(source, _) | Table::Depth(source)) = table;
        let is_lookup =
            index.dependence(index_of_rows) == Dependence::Data && index.dependence(source) == Dependence::Constant;
        is_lookup.then_some(Self { index: index_of_rows, table })
    }

    /// The table, a row after the other.
    fn values(&self, model: &Model) -> Option<Array2<f32>> {
        let Table::Axis(name, axis) = self.table else { return None };
        let table = model.constant(name).ok().or_else(|| computed(model, name))?.to_f32();
        let table = table.into_dimensionality::<Ix2>().ok()?;
        Some(if matches!(axis, 1 | -1) { table.reversed_axes() } else { table })
    }

    /// How many rows there are; `None` for what is no table of vectors.
    fn rows(&self, model: &Model) -> Option<usize> {
        match self.table {
            Table::Axis(table, axis) => {
                let shape = match model.initializer(table) {
                    Some(table) => table.dims.iter().map(|&n| usize::try_from(n).ok()).collect::<Option<Vec<_>>>()?,
                    None => computed(model, table)?.shape().to_vec(),
                };
                let axis = usize::try_from(if axis < 0 { axis + 2 } else { axis }).ok()?;
                (shape.len() == 2).then(|| shape.get(axis).copied())?
            }
            Table::Depth(depth) => {
                let depth = model.constant(depth).ok().or_else(|| computed(model, depth))?;
                usize::try_from(depth.to_i64()?.first().copied()?).ok()
            }
        }
    }
}

/// A value that depends on constants alone.
fn computed(model: &Model, value: &str) -> Option<Tensor> {
    let part = model.extract(&[], &[value]).ok()?;
    Some(LoadOptions::default().prepare(&part).ok()?.run(&[]).ok()?.remove(0).1)
}

/// The inputs that an index holds number by number, plus a constant, where the other inputs are all ones.
fn indexing_inputs(model: &Model, index: &str, rows: usize) -> Vec<(String, i64)> {
    if model.inputs().iter().any(|input| input.name == index) {
        return vec![(index.to_owned(), 0)];
    }
    let Ok(part) = model.extract_from_inputs(&[], &[index]) else { return vec![] };
    let Ok(runnable) = LoadOptions::default().prepare(&part) else { return vec![] };
    let inputs = part.inputs();
    let compared = |candidate: usize| {
        let mut rng = StdRng::seed_from_u64(candidate as u64 + 1);
        let mut drawn = Vec::new();
        let mut named = Vec::new();
        for (at, input) in inputs.iter().enumerate() {
            let shape = shape(input, COMPARED.0, COMPARED.1)?;
            let count = shape.iter().product();
            let values: Vec<i64> = match at == candidate {
                true => (0..count).map(|_| rng.random_range(0..rows.clamp(2, MOST_VALUES)) as i64).collect(),
                false => vec![1; count],
            };
            if at == candidate {
                drawn.clone_from(&values);
            }
            named.push((input.name.clone(), filled(input, &shape, values)?));
        }
        let found = runnable.run(&borrowed(&named)).ok()?.remove(0).1.to_i64()?;
        let offsets: Vec<i64> = found.iter().zip(&drawn).map(|(found, drawn)| found - drawn).collect();
        let offset = *offsets.first()?;
        let is_same = found.len() == drawn.len() && offsets.iter().all(|other| *other == offset);
        is_same.then(|| (inputs[candidate].name.clone(), offset))
    };
    (0..inputs.len()).filter_map(compared).collect()
}

#[cfg(test)]
mod tests {
    use mabert_graph::{Builder, ElementType, Expr, attribute};

    use super::*;

    const ROWS: usize = 30;

    /// A model that looks `ids` up in a table, each made as a test likes.
    fn model(
        table: impl for<'b> Fn(&'b Builder) -> Expr<'b>,
        ids: impl for<'b> Fn(&'b Builder, Expr<'b>, Expr<'b>) -> Expr<'b>,
    ) -> Model {
        let b = Builder::new(17, "test");
        let words = b.input("words", ElementType::I64, &["batch", "n"]);
        let mask = b.input("mask", ElementType::I64, &["batch", "n"]);
        let index = ids(&b, words, mask);
        b.model(&[(table(&b).gather(index) * mask.reshape(&[0, 0, 1]).cast(ElementType::F32)).named("y")])
    }

    fn plain(b: &Builder) -> Expr<'_> {
        b.constant("table", &Tensor::new(&[ROWS, 4], vec![0.5f32; ROWS * 4]))
    }

    fn found(model: &Model) -> Vec<(String, usize)> {
        lookups(model).unwrap().rows.into_iter().collect()
    }

    #[test]
    fn tables_may_be_computed_from_constants() {
        type Spelling = for<'b> fn(&'b Builder) -> Expr<'b>;
        let spellings: [Spelling; 5] = [
            |b| plain(b),
            |b| b.op("Identity", &[plain(b)], vec![]),
            |b| b.constant("half", &Tensor::new(&[ROWS, 4], vec![1i8; ROWS * 4])).cast(ElementType::F32) * 0.1,
            |b| b.constant("wide", &Tensor::new(&[4, ROWS], vec![1f32; ROWS * 4])).transpose(&[1, 0]),
            |b| {
                let value = Tensor::new(&[ROWS, 4], vec![1f32; ROWS * 4]);
                b.op("Constant", &[], vec![attribute::tensor("value", &value)])
            },
        ];
        for (at, table) in spellings.into_iter().enumerate() {
            let model = model(table, |_, words, _| words);
            assert_eq!(found(&model), [("words".to_owned(), ROWS)], "{at}");
        }
    }

    #[test]
    fn the_values_of_a_table_are_those_that_ids_look_up() {
        let values = || (0..ROWS * 4).map(|at| at as f32).collect::<Vec<_>>();
        let expected = Array2::from_shape_vec((ROWS, 4), values()).unwrap();
        let turned = expected.t().iter().copied().collect::<Vec<_>>();
        let plain = model(|b| b.constant("t", &Tensor::new(&[ROWS, 4], values())), |_, words, _| words);
        assert_eq!(table(&plain, "words", ROWS).unwrap(), Some(expected.clone()));
        let computed = model(
            |b| b.constant("t", &Tensor::new(&[4, ROWS], turned.clone())).transpose(&[1, 0]),
            |b, words, _| words + b.parameter("one", &Tensor::scalar(2i64)),
        );
        // Two rows are before those that ids index.
        let behind = expected.slice(s![2.., ..]).to_owned();
        assert_eq!(table(&computed, "words", ROWS - 2).unwrap(), Some(behind));
        assert_eq!(table(&plain, "mask", ROWS).unwrap(), None);
    }

    #[test]
    fn ids_may_be_changed_on_the_way_to_their_table() {
        type Spelling = for<'b> fn(&'b Builder, Expr<'b>, Expr<'b>) -> Expr<'b>;
        let where_kept: Spelling = |b, words, mask| {
            b.op("Where", &[mask.cast(ElementType::Bool), words, b.parameter("pad", &Tensor::scalar(3i64))], vec![])
        };
        let spellings: [(Spelling, usize); 5] = [
            (|_, words, _| words.cast(ElementType::I32), ROWS),
            (|_, words, _| words.reshape(&[-1]), ROWS),
            (where_kept, ROWS),
            (|_, words, mask| words * mask, ROWS),
            (|b, words, _| words + b.parameter("one", &Tensor::scalar(2i64)), ROWS - 2),
        ];
        for (at, (ids, rows)) in spellings.into_iter().enumerate() {
            let model = model(plain, ids);
            let found = found(&model);
            assert!(found.contains(&("words".to_owned(), rows)), "{at}: {found:?}");
        }
        // What is computed from ids is no index that they are.
        let positions = model(plain, |b, words, _| {
            let kept = b.op("Equal", &[words, b.parameter("pad", &Tensor::scalar(1i64))], vec![]);
            b.op("CumSum", &[kept.cast(ElementType::I64), b.parameter("axis", &Tensor::scalar(1i64))], vec![])
        });
        assert_eq!(found(&positions), []);
    }
}
