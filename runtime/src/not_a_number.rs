//! The larger and the smaller of two values, of which NaN is both.
//!
//! tract's `max` and `min`, of which its ReLU and Clip are made, give the other value: a model that overflows then looks
//! as if it did not. ONNX's own, and onnxruntime, give NaN.

use tract_core::internal::*;
use tract_core::ops::binary::TypedBinOp;
use tract_core::ops::math::{Max, Min};

bin_to_super_type!(larger, Larger, [f32, f64] => |c, a, b| *c = if a.is_nan() || *a > *b { *a } else { *b });
bin_to_super_type!(smaller, Smaller, [f32, f64] => |c, a, b| *c = if a.is_nan() || *a < *b { *a } else { *b });

/// Puts these in the place of tract's, where values may be NaN.
pub(crate) fn keep_not_a_number(model: &mut TypedModel) -> TractResult<()> {
    for at in 0..model.nodes.len() {
        let floating =
            model.nodes[at].outputs.iter().all(|o| [f32::datum_type(), f64::datum_type()].contains(&o.fact.datum_type));
        let Some(TypedBinOp(op, datum_type)) = model.nodes[at].op_as::<TypedBinOp>().filter(|_| floating) else {
            continue;
        };
        let kept: Box<dyn tract_core::ops::binary::BinMiniOp> = if op.is::<Max>() {
            Box::new(Larger)
        } else if op.is::<Min>() {
            Box::new(Smaller)
        } else {
            continue;
        };
        model.nodes[at].op = Box::new(TypedBinOp(kept, *datum_type));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use mabert_graph::{Builder, ElementType, Expr, Tensor, attribute};

    use crate::LoadOptions;

    /// What these are made of in tract would give a number.
    #[test]
    fn what_is_not_a_number_stays_so() {
        type Function = for<'b> fn(&'b Builder, Expr<'b>) -> Expr<'b>;
        let functions: [(&str, Function); 8] = [
            ("Relu", |_, x| x.relu()),
            ("Relu after Add", |_, x| (x + 1.0).relu()),
            ("Clip", |b, x| {
                let [low, high] = [-1.0, 2.0].map(|v| b.parameter("bound", &Tensor::scalar(v)));
                b.op("Clip", &[x, low, high], vec![])
            }),
            ("Max", |b, x| b.op("Max", &[x, b.parameter("zero", &Tensor::scalar(0f32))], vec![])),
            ("Max, the other way", |b, x| b.op("Max", &[b.parameter("zero", &Tensor::scalar(0f32)), x], vec![])),
            ("Min", |b, x| b.op("Min", &[x, b.parameter("zero", &Tensor::scalar(0f32))], vec![])),
            ("HardSigmoid", |b, x| b.op("HardSigmoid", &[x], vec![attribute::float("alpha", 0.5)])),
            ("Celu", |b, x| b.op("Celu", &[x], vec![])),
        ];
        let x = Tensor::new(&[2, 3], vec![f32::NAN, 1.5, -0.5, 0.25, f32::NAN, f32::INFINITY]);
        for (name, function) in functions {
            let b = Builder::new(17, "test");
            let input = b.input("x", ElementType::F32, &["rows", "3"]);
            let model = b.model(&[function(&b, input).named("y")]);
            let runnable = LoadOptions::default().prepare(&model).unwrap();
            let found = runnable.run(&[("x", &x)]).unwrap().remove(0).1.to_f32();
            let is_nan: Vec<bool> = found.iter().map(|v| v.is_nan()).collect();
            assert_eq!(is_nan, [true, false, false, false, true, false], "{name}");
        }
    }
}
