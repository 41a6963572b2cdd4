//! AdamW (Loshchilov & Hutter 2019) over a graph's variables, with clipping, and steps that are not finite skipped.

use candle_core::{Tensor as Real, Var};
use rayon::prelude::*;

use crate::adam_step::Adam;
use crate::{Error, Result, Setting};

const ADAM: Adam = Adam { decay: (0.9, 0.999), epsilon: 1e-8 };
/// Elements of one parallel piece of an update.
const PIECE: usize = 1 << 14;
/// More steps than this share must not be lost.
const SKIPPED: f64 = 0.05;

/// What is trained, and how.
pub(crate) struct Trained {
    pub(crate) variable: Var,
    /// Learning rate.
    pub(crate) rate: f32,
    /// What it loses a step, times the rate.
    pub(crate) decay: f32,
}

/// One variable and the state of its moments.
struct Parameter {
    variable: Var,
    rate: f32,
    decay: f32,
    value: Vec<f32>,
    first: Vec<f32>,
    second: Vec<f32>,
}

/// What a step changes of one variable.
pub(crate) struct Moments<'m> {
    pub(crate) value: &'m [f32],
    pub(crate) first: &'m [f32],
    pub(crate) second: &'m [f32],
}

/// The optimizer.
pub(crate) struct AdamW {
    parameters: Vec<Parameter>,
    clip: f32,
    steps: i32,
    /// Steps whose gradient was not finite.
    pub(crate) skipped: usize,
}

impl AdamW {
    /// Gradients are scaled down to a norm of `clip`.
    pub(crate) fn new(trained: impl IntoIterator<Item = Trained>, clip: f32) -> Result<Self> {
        let parameter = |Trained { variable, rate, decay }: Trained| -> Result<Parameter> {
            let value = variable.flatten_all()?.to_vec1::<f32>()?;
            let zeros = vec![0f32; value.len()];
            Ok(Parameter { variable, rate, decay, first: zeros.clone(), second: zeros, value })
        };
        let parameters = trained.into_iter().map(parameter).collect::<Result<_>>()?;
        Ok(Self { parameters, clip, steps: 0, skipped: 0 })
    }

    /// One step along `gradients`, one for each variable in their order, with all rates times `rate`. Returns whether it was taken.
    pub(crate) fn step(&mut self, gradients: &[Vec<f32>], rate: f32) -> Result<bool> {
        let square = |g: &[f32]| g.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>();
        // Summed in a fixed order, whatever the number of threads.
        let squares: Vec<f64> = gradients.par_iter().map(|g| square(g)).collect();
        let norm = squares.iter().sum::<f64>().sqrt() as f32;
        if !norm.is_finite() {
            self.skipped += 1;
            return Ok(false);
        }
        self.steps += 1;
        let scale = if norm > self.clip { self.clip / norm } else { 1.0 };
        for (p, gradient) in self.parameters.iter_mut().zip(gradients) {
            let step = ADAM.step(self.steps - 1, rate * p.rate).decaying(p.decay);
            let pieces = p.value.par_chunks_mut(PIECE).zip(p.first.par_chunks_mut(PIECE));
            pieces.zip(p.second.par_chunks_mut(PIECE)).zip(gradient.par_chunks(PIECE)).for_each(
                |(((value, first), second), gradient)| {
                    for (((value, m), v), g) in value.iter_mut().zip(first).zip(second).zip(gradient) {
                        step.take(value, m, v, g * scale);
                    }
                },
            );
            p.variable.set(&Real::from_slice(&p.value, p.variable.dims(), p.variable.device())?)?;
        }
        Ok(true)
    }

    /// Refuses where more than a twentieth of `planned` steps was skipped; the advice is in words and in settings.
    pub(crate) fn refuse_skipping(
        &self,
        planned: usize,
        site: &str,
        (advice, settings): (&'static str, &'static [Setting]),
    ) -> Result<()> {
        if self.skipped as f64 <= SKIPPED * planned as f64 {
            return Ok(());
        }
        let steps = self.skipped + self.steps as usize;
        Err(Error::Diverged { site: site.to_owned(), skipped: self.skipped, steps, advice, settings })
    }

    /// The values of every variable.
    pub(crate) fn values(&self) -> impl Iterator<Item = &[f32]> {
        self.parameters.iter().map(|p| p.value.as_slice())
    }

    /// Runs `f` while the variables have other values, and puts their own back.
    pub(crate) fn with_values<T>(&self, values: &[Vec<f32>], f: impl FnOnce() -> Result<T>) -> Result<T> {
        let set = |p: &Parameter, value: &[f32]| -> Result<()> {
            Ok(p.variable.set(&Real::from_slice(value, p.variable.dims(), p.variable.device())?)?)
        };
        self.parameters.iter().zip(values).try_for_each(|(p, value)| set(p, value))?;
        let result = f();
        self.parameters.iter().try_for_each(|p| set(p, &p.value))?;
        result
    }

    /// The state of every variable, and how many steps were taken.
    pub(crate) fn state(&self) -> (Vec<Moments<'_>>, usize) {
        let state = self.parameters.iter().map(|p| Moments { value: &p.value, first: &p.first, second: &p.second });
        (state.collect(), self.steps as usize)
    }

    /// Takes up a state: value and moments of each variable, by its number. Returns whether it fits the variables; where
    /// it does not, nothing should be made of them.
    pub(crate) fn restore(
        &mut self,
        state: impl Fn(usize) -> Result<[Vec<f32>; 3]>,
        steps: usize,
        skipped: usize,
    ) -> Result<bool> {
        for (at, p) in self.parameters.iter_mut().enumerate() {
            let state = state(at)?;
            if state.iter().any(|values| values.len() != p.value.len()) {
                return Ok(false);
            }
            [p.value, p.first, p.second] = state;
            p.variable.set(&Real::from_slice(&p.value, p.variable.dims(), p.variable.device())?)?;
        }
        self.steps = steps as i32;
        self.skipped = skipped;
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    /// The first step of Adam moves every element by its rate, whatever the size of its gradient.
    #[test]
    fn the_first_step_is_the_rate_and_bad_gradients_are_skipped() {
        let variable = Var::from_slice(&[1f32, 2.0], 2, &Device::Cpu).unwrap();
        let mut adam = AdamW::new([Trained { variable: variable.clone(), rate: 0.1, decay: 0.0 }], 1.0).unwrap();
        assert!(!adam.step(&[vec![f32::NAN, 1.0]], 1.0).unwrap());
        assert_eq!((adam.skipped, variable.to_vec1::<f32>().unwrap()), (1, vec![1.0, 2.0]));
        assert!(adam.step(&[vec![30.0, -4.0]], 0.5).unwrap());
        let found = variable.to_vec1::<f32>().unwrap();
        approx::assert_abs_diff_eq!(found[0], 0.95, epsilon = 1e-4);
        approx::assert_abs_diff_eq!(found[1], 2.05, epsilon = 1e-4);
    }
}
