//! The inputs and attributes of one node, typed as an operator asks for them.

use candle_core::Tensor as Real;
use mabert_graph::NodeExt as _;
use mabert_graph::proto::NodeProto;
use ndarray::ArrayD;

use super::super::value::Value;
use crate::{Error, Result};

/// Why a node is not run.
pub(in super::super) fn refused(node: &NodeProto, why: &str) -> Error {
    Error::Gradient(format!("{} `{}` cannot be differentiated: {why}", node.op_type, node.label()))
}

/// An axis counted from the front; negative ones count from the end.
pub(super) fn axis(value: i64, rank: usize) -> usize {
    if value < 0 { (value + rank as i64).max(0) as usize } else { value as usize }
}

/// A node and its inputs.
pub(super) struct Operands<'g> {
    pub(super) node: &'g NodeProto,
    /// `None` for inputs that are left out.
    pub(super) values: &'g [Option<&'g Value>],
}

impl Operands<'_> {
    pub(super) fn value(&self, at: usize) -> Result<&Value> {
        self.optional(at).ok_or_else(|| self.refused("an input is missing"))
    }

    pub(super) fn optional(&self, at: usize) -> Option<&Value> {
        self.values.get(at).copied().flatten()
    }

    pub(super) fn real(&self, at: usize) -> Result<Real> {
        match self.value(at)? {
            Value::Real(value) => Ok(value.clone()),
            Value::Whole(_) => Err(self.refused("floats were expected")),
        }
    }

    pub(super) fn whole(&self, at: usize) -> Result<&ArrayD<i64>> {
        match self.value(at)? {
            Value::Whole(value) => Ok(value),
            Value::Real(_) => Err(self.refused("integers were expected")),
        }
    }

    /// A list of integers: an input, or in earlier opsets an attribute.
    pub(super) fn list(&self, at: usize, name: &str) -> Result<Option<Vec<i64>>> {
        match self.optional(at) {
            Some(_) => Ok(Some(self.whole(at)?.iter().copied().collect())),
            None => Ok(self.node.ints(name).map(<[i64]>::to_vec)),
        }
    }

    /// The attribute `axis` of a node whose input has `rank` axes.
    pub(super) fn axis(&self, default: i64, rank: usize) -> usize {
        axis(self.node.int("axis", default), rank)
    }

    pub(super) fn refused(&self, why: &str) -> Error {
        refused(self.node, why)
    }

    pub(super) fn unary(&self, f: fn(&Real) -> candle_core::Result<Real>) -> Result<Real> {
        Ok(f(&self.real(0)?)?)
    }

    pub(super) fn binary(&self, f: fn(&Real, &Real) -> candle_core::Result<Real>) -> Result<Real> {
        Ok(f(&self.real(0)?, &self.real(1)?)?)
    }
}
