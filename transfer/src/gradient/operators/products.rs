//! Matrix products.

use candle_core::Tensor as Real;
use mabert_graph::NodeExt as _;

use super::operands::Operands;
use crate::Result;

/// A product whose right side may lack the left side's leading axes: then they are rows like any other, and one large
/// product takes the place of many small ones, in the gradient too.
pub(super) fn matmul(o: &Operands<'_>) -> Result<Real> {
    let (a, b) = (o.real(0)?, o.real(1)?);
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
                return Ok(a.broadcast_matmul(&b)?);
            }
            let joined = a.permute((1, 0, 2, 3))?.contiguous()?.reshape((groups, batch * rows, inner))?;
            let y = joined.matmul(&b.contiguous()?)?.reshape((groups, batch, rows, right[2]))?;
            y.permute((1, 0, 2, 3))?.contiguous()?
        }
        _ => a.broadcast_matmul(&b.contiguous()?)?,
    };
    Ok(y)
}

pub(super) fn gemm(o: &Operands<'_>) -> Result<Real> {
    let node = o.node;
    let turned = |x: Real, flag: &str| if node.int(flag, 0) == 1 { x.t() } else { Ok(x) };
    let (a, b) = (turned(o.real(0)?, "transA")?, turned(o.real(1)?, "transB")?);
    let y = (a.contiguous()?.matmul(&b.contiguous()?)? * f64::from(node.float("alpha", 1.0)))?;
    match o.optional(2) {
        Some(_) => Ok(y.broadcast_add(&(o.real(2)? * f64::from(node.float("beta", 1.0)))?)?),
        None => Ok(y),
    }
}
