//! `x W + b`, then perhaps ReLU, then perhaps what is added to it, then perhaps limits, in one pass over the result.
#![allow(unsafe_code)]

use tract_core::internal::*;

use super::kernel::Epilogue;
use super::panels::PerLane;

/// A linear layer on panels: `[panels, k + 1, width]` to `[panels, n + 1, width]`; a second input of that shape is added.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Linear {
    /// `[k, n]`, in panels over `n`.
    pub(super) weights: Arc<Tensor>,
    /// `[n]`.
    pub(super) bias: Option<Arc<Tensor>>,
    pub(super) relu: bool,
    /// A number that the result is not below, and one that it is not above.
    pub(super) limits: [Option<Arc<Tensor>>; 2],
    pub(super) n: usize,
}

impl Op for Linear {
    fn name(&self) -> StaticName {
        "Linear".into()
    }

    fn info(&self) -> TractResult<Vec<String>> {
        let limited = self.limits.iter().any(Option::is_some);
        let then = [(self.bias.is_some(), "bias"), (self.relu, "ReLU"), (limited, "limits")];
        let then: Vec<&str> = then.iter().filter(|t| t.0).map(|t| t.1).collect();
        Ok(vec![format!("{} x {}, {}", self.weights.shape()[1] - 1, self.n, then.join(", "))])
    }

    op_as_typed_op!();
}

impl EvalOp for Linear {
    op_out_of_plan!();

    fn eval(&self, _: &EvalContext<'_>, inputs: TVec<TValue>) -> TractResult<TVec<TValue>> {
        let kernel = super::kernel()?;
        let x = kernel.panels(&inputs[0])?;
        // SAFETY: the product writes whole tiles.
        let output = unsafe { kernel.room(inputs[0].shape()[0], self.n) }?;
        let epilogue = Epilogue {
            bias: self.bias.as_ref().map(|bias| PerLane { tensor: bias, offset: 0 }),
            relu: self.relu,
            residual: inputs.get(1).map(|residual| kernel.panels(residual)).transpose()?,
            limits: self.limits.each_ref().map(Option::as_deref),
            ..Epilogue::default()
        };
        let weights = kernel.panels(&self.weights)?;
        // SAFETY: the output is this function's own.
        unsafe { kernel.product(x, weights, &epilogue, kernel.panels(&output)?)? };
        Ok(tvec![output.into_tvalue()])
    }
}

impl TypedOp for Linear {
    fn output_facts(&self, inputs: &[&TypedFact]) -> TractResult<TVec<TypedFact>> {
        let mut shape = inputs[0].shape.clone();
        shape.set(1, (self.n + 1).to_dim());
        Ok(tvec![f32::fact(shape)])
    }

    fn cost(&self, inputs: &[&TypedFact]) -> TractResult<TVec<(Cost, TDim)>> {
        let tokens = inputs[0].shape[0].clone() * inputs[0].shape[2].clone();
        Ok(tvec![(Cost::FMA(f32::datum_type()), tokens * (self.weights.shape()[1] - 1) * self.n)])
    }

    as_op!();
}
