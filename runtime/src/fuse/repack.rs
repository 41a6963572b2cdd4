//! Into panels and out of them: `[.., channels]` and `[panels, channels + 1, width]`, tokens along the lanes.
#![allow(unsafe_code)]

use tract_core::internal::*;

use super::kernel::Kernel;
use super::panels::values as all_values;

/// The panels that so many tokens take.
fn panels<D: DimLike>(tokens: D, width: usize) -> D {
    tokens.divceil(width)
}

/// Puts the values of tokens, `[.., channels]`, into panels; channels may be several axes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ToPanels {
    pub(super) channels: usize,
}

impl Op for ToPanels {
    fn name(&self) -> StaticName {
        "ToPanels".into()
    }

    op_as_typed_op!();
}

impl EvalOp for ToPanels {
    op_out_of_plan!();

    fn eval(&self, _: &EvalContext<'_>, inputs: TVec<TValue>) -> TractResult<TVec<TValue>> {
        let input = args_1!(inputs);
        Ok(tvec![pack(super::kernel()?, all_values(&input)?, self.channels)?.into_tvalue()])
    }
}

impl TypedOp for ToPanels {
    fn output_facts(&self, inputs: &[&TypedFact]) -> TractResult<TVec<TypedFact>> {
        let width = super::kernel()?.width();
        let count = panels(tokens(&inputs[0].shape, self.channels)?, width);
        Ok(tvec![f32::fact([count, (self.channels + 1).to_dim(), width.to_dim()])])
    }

    as_op!();
}

/// How many tokens values `[.., channels]` are of.
fn tokens(shape: &[TDim], channels: usize) -> TractResult<TDim> {
    let first_channel = (0..shape.len()).rev().find(|&at| shape[at..].iter().product::<TDim>() == channels.to_dim());
    let at = first_channel.with_context(|| format!("no {channels} channels in {shape:?}"))?;
    Ok(shape[..at].iter().product())
}

/// Values of tokens, `[tokens, channels]`, in panels; lanes that are missing to whole panels are zero.
fn pack(kernel: &Kernel, values: &[f32], channels: usize) -> TractResult<Tensor> {
    let tokens = values.len() / channels;
    // SAFETY: `fill` writes every value.
    let room = unsafe { kernel.room(panels(tokens, kernel.width()), channels) }?;
    fill(room, tokens, |channel, token| values[token * channels + channel])
}

/// A weight `[rows, lanes]` in panels, given by its values at row and lane.
pub(super) fn weights(
    kernel: &Kernel,
    rows: usize,
    lanes: usize,
    at: impl Fn(usize, usize) -> f32,
) -> TractResult<Arc<Tensor>> {
    // SAFETY: `fill` writes every value.
    let room = unsafe { kernel.room_for_weights(panels(lanes, kernel.width()), rows) }?;
    Ok(fill(room, lanes, at)?.into_arc_tensor())
}

fn fill(mut room: Tensor, lanes: usize, at: impl Fn(usize, usize) -> f32) -> TractResult<Tensor> {
    let [_, rows, width] = *room.shape() else { bail!("panels have three axes") };
    let mut view = room.try_as_plain_ram_mut()?;
    let panels = view.as_slice_mut::<f32>()?.chunks_exact_mut(rows * width);
    for (panel, first) in panels.zip((0..lanes).step_by(width)) {
        let (panel, spare) = panel.split_at_mut((rows - 1) * width);
        spare.fill(0.0);
        let real = width.min(lanes - first);
        for (row, into) in panel.chunks_exact_mut(width).enumerate() {
            for (lane, into) in into[..real].iter_mut().enumerate() {
                *into = at(row, first + lane);
            }
            into[real..].fill(0.0);
        }
    }
    Ok(room)
}

/// Takes the values of tokens out of panels again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct FromPanels {
    /// Of the values, tokens first.
    pub(super) shape: ShapeFact,
    pub(super) channels: usize,
}

impl Op for FromPanels {
    fn name(&self) -> StaticName {
        "FromPanels".into()
    }

    op_as_typed_op!();
}

impl EvalOp for FromPanels {
    op_out_of_plan!();

    fn eval(&self, context: &EvalContext<'_>, inputs: TVec<TValue>) -> TractResult<TVec<TValue>> {
        let width = super::kernel()?.width();
        let input = args_1!(inputs);
        let panels = all_values(&input)?.chunks_exact((self.channels + 1) * width);
        let shape = self.shape.eval_to_usize(context.symbols)?;
        let mut values = Tensor::zero::<f32>(&shape)?;
        let mut view = values.try_as_plain_ram_mut()?;
        let tokens = view.as_slice_mut::<f32>()?.chunks_mut(width * self.channels);
        ensure!(tokens.len() == panels.len(), "{} panels for values of {shape:?}", panels.len());
        for (panel, values) in panels.zip(tokens) {
            for (lane, token) in values.chunks_exact_mut(self.channels).enumerate() {
                for (row, into) in token.iter_mut().enumerate() {
                    *into = panel[row * width + lane];
                }
            }
        }
        Ok(tvec![values.into_tvalue()])
    }
}

impl TypedOp for FromPanels {
    fn output_facts(&self, _: &[&TypedFact]) -> TractResult<TVec<TypedFact>> {
        Ok(tvec![f32::fact(self.shape.clone())])
    }

    as_op!();
}
