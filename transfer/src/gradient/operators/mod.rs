//! What each ONNX operator does to candle's tensors, or to integers: one function an operator, found by name in
//! [`operator`].

mod elementwise;
mod integers;
mod operands;
mod products;
mod reduce;
mod shape;

use candle_core::Tensor as Real;
use mabert_graph::NodeExt as _;
use mabert_graph::proto::NodeProto;

use self::operands::Operands;
use super::fused_operators::relu;
use super::value::Value;
use crate::Result;
pub(super) use operands::refused;

/// What one node makes of its inputs.
pub(super) fn run_node(node: &NodeProto, values: &[Option<&Value>]) -> Result<Vec<Value>> {
    let operands = Operands { node, values };
    if !node.is(&node.op_type) {
        return Err(operands.refused("it is of a domain of its own"));
    }
    let chooses_reals = node.op_type == "Where" && matches!(operands.optional(1), Some(Value::Real(_)));
    if let Some(Value::Whole(first)) = operands.optional(0)
        && !matches!(node.op_type.as_str(), "Cast" | "Shape" | "ConstantOfShape")
        && !chooses_reals
    {
        return Ok(vec![Value::Whole(integers::run(&operands, first)?)]);
    }
    match operator(&node.op_type) {
        Some(Operator::Real(run)) => Ok(vec![Value::Real(run(&operands)?)]),
        Some(Operator::Any(run)) => Ok(vec![run(&operands)?]),
        Some(Operator::Several(run)) => run(&operands),
        None => Err(operands.refused("it is none of the operators that a student is made of")),
    }
}

/// An operator's function, by what it gives.
enum Operator {
    /// One tensor of floats.
    Real(fn(&Operands<'_>) -> Result<Real>),
    /// One value.
    Any(fn(&Operands<'_>) -> Result<Value>),
    /// Several values.
    Several(fn(&Operands<'_>) -> Result<Vec<Value>>),
}

/// The operators of floats.
fn operator(name: &str) -> Option<Operator> {
    use Operator::{Any, Real as Float, Several};
    Some(match name {
        "Abs" => Float(|o| o.unary(Real::abs)),
        "Add" => Float(|o| o.binary(Real::broadcast_add)),
        "Cast" => Any(shape::cast),
        "Clip" => Float(elementwise::clip),
        "Concat" => Float(shape::concat),
        "ConstantOfShape" => Any(shape::constant_of_shape),
        "Div" => Float(|o| o.binary(Real::broadcast_div)),
        "Equal" => Any(|o| elementwise::compare(o, Real::broadcast_eq)),
        "Erf" => Float(|o| o.unary(Real::erf)),
        "Exp" => Float(|o| o.unary(Real::exp)),
        "Expand" => Float(shape::expand),
        "Flatten" => Float(shape::flatten),
        "Gather" => Float(shape::gather),
        "Gelu" => Float(elementwise::gelu),
        "Gemm" => Float(products::gemm),
        "Greater" => Any(|o| elementwise::compare(o, Real::broadcast_gt)),
        "GreaterOrEqual" => Any(|o| elementwise::compare(o, Real::broadcast_ge)),
        "Identity" | "Dropout" => Float(|o| o.real(0)),
        "LayerNormalization" => Float(reduce::layer_norm),
        "Less" => Any(|o| elementwise::compare(o, Real::broadcast_lt)),
        "LessOrEqual" => Any(|o| elementwise::compare(o, Real::broadcast_le)),
        "Log" => Float(|o| o.unary(Real::log)),
        "MatMul" => Float(products::matmul),
        "Max" => Float(|o| elementwise::fold(o, Real::broadcast_maximum)),
        "Min" => Float(|o| elementwise::fold(o, Real::broadcast_minimum)),
        "Mul" => Float(|o| o.binary(Real::broadcast_mul)),
        "Neg" => Float(|o| o.unary(Real::neg)),
        "Pow" => Float(elementwise::pow),
        "Reciprocal" => Float(|o| o.unary(Real::recip)),
        "ReduceL2" => Float(reduce::reduce_l2),
        "ReduceMean" => Float(reduce::reduce_mean),
        "ReduceSum" => Float(reduce::reduce_sum),
        "Relu" => Float(|o| o.unary(relu)),
        "Reshape" => Float(shape::reshape),
        "Shape" => Any(shape::shape),
        "Sigmoid" => Float(elementwise::sigmoid),
        "Slice" => Float(shape::slice),
        "Softmax" => Float(reduce::softmax),
        "Split" => Several(shape::split),
        "Sqrt" => Float(|o| o.unary(Real::sqrt)),
        "Squeeze" => Float(shape::squeeze),
        "Sub" => Float(|o| o.binary(Real::broadcast_sub)),
        "Tanh" => Float(|o| o.unary(Real::tanh)),
        "Transpose" => Float(shape::transpose),
        "Unsqueeze" => Float(shape::unsqueeze),
        "Where" => Float(elementwise::choose),
        _ => return None,
    })
}
