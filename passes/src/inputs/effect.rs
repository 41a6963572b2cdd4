//! Whether an input hides tokens, as a mask does.

use mabert_graph::{Model, Tensor};
use mabert_runtime::{LoadOptions, Model as Runnable, Named, borrowed};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};

use super::{EncoderInput, Role, filled, shape};
use crate::Result;

/// Sequences and tokens of a run.
const SIZE: (usize, usize) = (2, 6);
/// What counts as no change, relative to values above 1.
const UNCHANGED: f32 = 1e-4;

/// A model whose inputs are tried out.
pub(super) struct Effects<'i> {
    runnable: Runnable,
    inputs: &'i [EncoderInput],
    /// Inputs that may be masks or ids: they get what both may hold.
    alike: &'i [String],
}

impl<'i> Effects<'i> {
    pub(super) fn new(model: &Model, inputs: &'i [EncoderInput], alike: &'i [String]) -> Result<Self> {
        Ok(Self { runnable: LoadOptions::default().prepare(model)?, inputs, alike })
    }

    /// Whether what the other inputs say of the last token matters to no other token once `masks` are 0 there, and does
    /// where they are 1. `None` where the model cannot be run so, or where one token never matters to another.
    pub(super) fn hide_tokens(&self, masks: &[&str]) -> Option<bool> {
        let changes = |shown: bool| -> Option<f32> {
            let [a, b] = [Last::First, Last::Other].map(|last| self.run(masks, shown, last));
            let (a, b) = (a?, b?);
            let others = |value: &Tensor| other_tokens(value);
            let differences = a.iter().zip(&b).map(|((_, a), (_, b))| largest_change(&others(a), &others(b)));
            Some(differences.fold(0.0, f32::max))
        };
        match (changes(true)? > UNCHANGED, changes(false)? > UNCHANGED) {
            (true, hidden_matters) => Some(!hidden_matters),
            (false, _) => None,
        }
    }

    /// A run with `last` in the place of the last token, where the masks are 1 if it is shown.
    fn run(&self, masks: &[&str], shown: bool, last: Last) -> Option<Named> {
        let mut rng = StdRng::seed_from_u64(7);
        let mut named = Named::new();
        for input in self.inputs {
            let shape = shape(&input.declared, SIZE.0, SIZE.1)?;
            let length = *shape.last()?;
            let name = &input.declared.name;
            let is_mask = masks.contains(&name.as_str());
            let rows = if self.alike.contains(name) { Some(2) } else { input.rows };
            let value = |at: usize| {
                let is_last = at % length == length - 1;
                match (is_mask, rows) {
                    (true, _) => i64::from(shown || !is_last),
                    (false, None) => 1,
                    (false, Some(_)) if input.role == Some(Role::Positions) => (at % length) as i64,
                    (false, Some(rows)) if is_last => last.value(rows),
                    (false, Some(rows)) => rng.random_range(0..rows.max(1)) as i64,
                }
            };
            let values = (0..shape.iter().product()).map(value).collect();
            named.push((input.declared.name.clone(), filled(&input.declared, &shape, values)?));
        }
        self.runnable.run(&borrowed(&named)).ok()
    }
}

/// What stands in the place of the last token.
#[derive(Clone, Copy)]
enum Last {
    /// The first row of each table.
    First,
    /// Another.
    Other,
}

impl Last {
    fn value(self, rows: usize) -> i64 {
        match self {
            Self::First => 0,
            Self::Other => rows.saturating_sub(1) as i64,
        }
    }
}

/// The elements that belong to no token, or to another than the last.
fn other_tokens(value: &Tensor) -> Vec<f32> {
    let length = value.shape().get(1).copied().unwrap_or(0);
    let each: usize = value.shape().iter().skip(2).product();
    let is_other = |at: usize| length != SIZE.1 || at / each.max(1) % length != length - 1;
    value.to_f32().iter().enumerate().filter(|(at, _)| is_other(*at)).map(|(_, v)| *v).collect()
}

fn largest_change(a: &[f32], b: &[f32]) -> f32 {
    // NaN is a change.
    let change = |(a, b): (&f32, &f32)| if a == b { 0.0 } else { (a - b).abs() / a.abs().max(1.0) };
    a.iter().zip(b).map(change).fold(0.0, |most, c| if c > most || c.is_nan() { c } else { most })
}
