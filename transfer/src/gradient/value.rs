//! What flows through a graph.

use candle_core::Tensor as Real;
use ndarray::ArrayD;

/// A value while a graph runs.
#[derive(Clone, Debug)]
pub(crate) enum Value {
    /// Floats.
    Real(Real),
    /// Integers and truth values.
    Whole(ArrayD<i64>),
}
