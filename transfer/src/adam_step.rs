//! One step of Adam on one number: what every optimizer of this crate does, whatever its parameters are kept in.

/// How fast the running means of gradients and of their squares forget, and what keeps a division from zero.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Adam {
    pub(crate) decay: (f32, f32),
    pub(crate) epsilon: f32,
}

impl Adam {
    /// The step numbered `step`, from 0, at a rate; see [`Step`].
    pub(crate) fn step(self, step: i32, rate: f32) -> Step {
        let correction = |decay: f32| 1.0 - decay.powi(step + 1);
        Step { adam: self, correction: (correction(self.decay.0), correction(self.decay.1)), rate, kept: 1.0 }
    }
}

/// `m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2; x = kept x - rate m' / (sqrt(v') + epsilon)`, where `m'` and `v'` are
/// corrected for their start at zero (Kingma & Ba 2015), and `kept` is what weight decay leaves (Loshchilov & Hutter 2019).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Step {
    adam: Adam,
    correction: (f32, f32),
    rate: f32,
    kept: f32,
}

impl Step {
    /// The step with weight decay, which takes `decay` times the rate.
    pub(crate) fn decaying(self, decay: f32) -> Self {
        Self { kept: 1.0 - self.rate * decay, ..self }
    }

    /// Takes the step.
    #[inline]
    pub(crate) fn take(&self, value: &mut f32, first: &mut f32, second: &mut f32, gradient: f32) {
        let (b1, b2) = self.adam.decay;
        *first = b1 * *first + (1.0 - b1) * gradient;
        *second = b2 * *second + (1.0 - b2) * gradient * gradient;
        let (m, v) = (*first / self.correction.0, *second / self.correction.1);
        *value = self.kept * *value - self.rate * m / (v.sqrt() + self.adam.epsilon);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_step_is_the_rate_whatever_the_gradient() {
        let adam = Adam { decay: (0.9, 0.999), epsilon: 1e-8 };
        for gradient in [1e-3f32, -1.0, 300.0] {
            let (mut value, mut first, mut second) = (2f32, 0f32, 0f32);
            adam.step(0, 0.1).decaying(0.5).take(&mut value, &mut first, &mut second, gradient);
            approx::assert_relative_eq!(value, 2.0 * 0.95 - 0.1 * gradient.signum(), max_relative = 1e-4);
        }
    }
}
