//! Sums over axes, and what is made of them.

use candle_core::{D, Tensor as Real};
use mabert_graph::NodeExt as _;

use super::operands::{Operands, axis};
use crate::Result;

pub(super) fn softmax(o: &Operands<'_>) -> Result<Real> {
    let x = o.real(0)?;
    if o.axis(-1, x.rank()) + 1 != x.rank() {
        return Err(o.refused("its axis is not the last"));
    }
    // The largest element is a constant here: the gradient does not depend on it.
    let exp = x.broadcast_sub(&x.max_keepdim(D::Minus1)?.detach())?.exp()?;
    Ok(exp.broadcast_div(&exp.sum_keepdim(D::Minus1)?)?)
}

pub(super) fn reduce_mean(o: &Operands<'_>) -> Result<Real> {
    reduce(o, o.real(0)?, Real::mean_keepdim::<usize>)
}

pub(super) fn reduce_sum(o: &Operands<'_>) -> Result<Real> {
    reduce(o, o.real(0)?, Real::sum_keepdim::<usize>)
}

pub(super) fn reduce_l2(o: &Operands<'_>) -> Result<Real> {
    Ok(reduce(o, o.real(0)?.sqr()?, Real::sum_keepdim::<usize>)?.sqrt()?)
}

/// `x` with `f` over each of the node's axes.
fn reduce(o: &Operands<'_>, x: Real, f: fn(&Real, usize) -> candle_core::Result<Real>) -> Result<Real> {
    let axes = o.list(1, "axes")?.unwrap_or_else(|| (0..x.rank() as i64).collect());
    let mut axes: Vec<usize> = axes.into_iter().map(|a| axis(a, x.rank())).collect();
    axes.sort_unstable();
    let mut x = x;
    for &at in &axes {
        x = f(&x, at)?;
    }
    if o.node.int("keepdims", 1) == 0 {
        for &at in axes.iter().rev() {
            x = x.squeeze(at)?;
        }
    }
    Ok(x)
}

pub(super) fn layer_norm(o: &Operands<'_>) -> Result<Real> {
    let x = o.real(0)?;
    if o.axis(-1, x.rank()) + 1 != x.rank() {
        return Err(o.refused("it normalises more than the last axis"));
    }
    let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
    let variance = (centred.sqr()?.mean_keepdim(D::Minus1)? + f64::from(o.node.float("epsilon", 1e-5)))?;
    let y = centred.broadcast_div(&variance.sqrt()?)?.broadcast_mul(&o.real(1)?)?;
    match o.optional(2) {
        Some(_) => Ok(y.broadcast_add(&o.real(2)?)?),
        None => Ok(y),
    }
}
