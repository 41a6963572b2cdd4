//! Axes: within the rank, and none twice.

use super::known::Known;

/// Where an operator names axes.
pub(super) struct Row {
    pub(super) operator: &'static str,
    source: Source,
    bounds: Bounds,
}

#[derive(Clone, Copy)]
enum Source {
    /// One axis, and which it is where none is named.
    Attribute(&'static str, Option<i64>),
    Attributes(&'static str),
    Operand(usize),
}

/// Which axes there are, for a rank `r`.
#[derive(Clone, Copy)]
enum Bounds {
    /// `-r` to `r - 1`.
    Axes,
    /// `-r` to `r`: a place between axes.
    Places,
    /// Those of the result, which has so many more as are named.
    Added,
}

macro_rules! rows {
    ($($operator:literal $source:expr, $bounds:ident;)*) => {
        &[$(Row { operator: $operator, source: $source, bounds: Bounds::$bounds },)*]
    };
}

use Source::{Attribute, Attributes, Operand};

pub(super) const OPERATORS: &[Row] = rows! {
    "ArgMax" Attribute("axis", Some(0)), Axes;
    "ArgMin" Attribute("axis", Some(0)), Axes;
    "Compress" Attribute("axis", None), Axes;
    "Concat" Attribute("axis", None), Axes;
    "CumSum" Operand(1), Axes;
    "DFT" Attribute("axis", None), Axes;
    "Flatten" Attribute("axis", Some(1)), Places;
    "Gather" Attribute("axis", Some(0)), Axes;
    "GatherElements" Attribute("axis", Some(0)), Axes;
    // Before version 13 the axis is where the value is cut in two.
    "Hardmax" Attribute("axis", None), Places;
    "LayerNormalization" Attribute("axis", Some(-1)), Axes;
    "LogSoftmax" Attribute("axis", None), Places;
    "LpNormalization" Attribute("axis", Some(-1)), Axes;
    "MeanVarianceNormalization" Attributes("axes"), Axes;
    "OneHot" Attribute("axis", None), Added;
    "Pad" Operand(3), Axes;
    "RMSNormalization" Attribute("axis", Some(-1)), Axes;
    "ReduceL1" Attributes("axes"), Axes;
    "ReduceL1" Operand(1), Axes;
    "ReduceL2" Attributes("axes"), Axes;
    "ReduceL2" Operand(1), Axes;
    "ReduceLogSum" Attributes("axes"), Axes;
    "ReduceLogSum" Operand(1), Axes;
    "ReduceLogSumExp" Attributes("axes"), Axes;
    "ReduceLogSumExp" Operand(1), Axes;
    "ReduceMax" Attributes("axes"), Axes;
    "ReduceMax" Operand(1), Axes;
    "ReduceMean" Attributes("axes"), Axes;
    "ReduceMean" Operand(1), Axes;
    "ReduceMin" Attributes("axes"), Axes;
    "ReduceMin" Operand(1), Axes;
    "ReduceProd" Attributes("axes"), Axes;
    "ReduceProd" Operand(1), Axes;
    "ReduceSum" Attributes("axes"), Axes;
    "ReduceSum" Operand(1), Axes;
    "ReduceSumSquare" Attributes("axes"), Axes;
    "ReduceSumSquare" Operand(1), Axes;
    "Resize" Attributes("axes"), Axes;
    "Scatter" Attribute("axis", Some(0)), Axes;
    "ScatterElements" Attribute("axis", Some(0)), Axes;
    "Slice" Attributes("axes"), Axes;
    "Slice" Operand(3), Axes;
    "Softmax" Attribute("axis", None), Places;
    "Split" Attribute("axis", Some(0)), Axes;
    "Squeeze" Attributes("axes"), Axes;
    "Squeeze" Operand(1), Axes;
    "TopK" Attribute("axis", Some(-1)), Axes;
    "Transpose" Attributes("perm"), Axes;
    "Unsqueeze" Attributes("axes"), Added;
    "Unsqueeze" Operand(1), Added;
};

/// What is wrong with the axes that a node names.
pub(super) fn fault(known: &Known<'_>) -> Option<String> {
    let rows = OPERATORS.iter().filter(|row| row.operator == known.node.op_type);
    rows.filter_map(|row| row.fault(known)).next().or_else(|| permutation_fault(known))
}

impl Row {
    fn fault(&self, known: &Known<'_>) -> Option<String> {
        let axes = match self.source {
            Attribute(name, default) => vec![known.int(name).or(default)?],
            Attributes(name) => known.ints(name)?.to_vec(),
            Operand(at) => known.integers(at)?,
        };
        // Some of what tract does not yet know of an operand it knows of the result that is as large.
        let rank =
            known.rank(0).or_else(|| known.node.op_type.ends_with("Normalization").then(|| known.output_rank())?)?;
        let (least, most) = match self.bounds {
            Bounds::Axes => (-rank, rank - 1),
            Bounds::Places => (-rank, rank),
            Bounds::Added => (-rank - axes.len() as i64, rank + axes.len() as i64 - 1),
        };
        if let Some(axis) = axes.iter().find(|axis| !(least..=most).contains(axis)) {
            return Some(format!("has the axis {axis}, its operand has {rank}"));
        }
        let from_the_front = |axis: &i64| if *axis < 0 { *axis - least } else { *axis };
        let front: Vec<i64> = axes.iter().map(from_the_front).collect();
        let twice = (1..front.len()).find(|&at| front[..at].contains(&front[at]))?;
        Some(format!("has the axis {} twice", front[twice]))
    }
}

/// A permutation has every axis, whatever the rank turns out to be.
fn permutation_fault(known: &Known<'_>) -> Option<String> {
    if known.node.op_type != "Transpose" {
        return None;
    }
    let axes = known.ints("perm")?;
    let mut sorted = axes.to_vec();
    sorted.sort_unstable();
    let whole = sorted.iter().copied().eq(0..axes.len() as i64);
    let fits = known.rank(0).is_none_or(|rank| rank == axes.len() as i64);
    (!whole || !fits).then(|| match known.rank(0) {
        Some(rank) => format!("has the permutation {axes:?}, its operand has {rank} axes"),
        None => format!("has the permutation {axes:?}, which is none"),
    })
}
