//! The basis of the stream once norms are folded: the value that the teacher knows is `p s + q`, channel by channel.

use std::ops::RangeInclusive;

use ndarray::Array1;

use crate::sites::Precision;

/// Channels whose running product leaves this range keep an explicit scale: dividing by them would blow rounding up.
const SAFE: RangeInclusive<f64> = 1.0 / 1024.0..=1024.0;
/// The same in half precision, which holds 6e-5 to 65,504 at full precision: weights and streams of ordinary size stay inside.
const SAFE_IN_HALF: RangeInclusive<f64> = 1.0 / 32.0..=32.0;

/// What becomes of `p` at a norm.
pub(super) struct Through {
    /// Behind the norm.
    pub(super) p: Array1<f64>,
    /// What the stream is multiplied by there; 1 where nothing needs to be done.
    pub(super) explicit: Array1<f64>,
    /// Channels that are multiplied.
    pub(super) explicit_channels: usize,
}

impl Through {
    /// Through a norm that has become `a r + c`, of weights that will be rounded to `precision`: nothing happens to the
    /// stream unless a channel's product would leave the safe range.
    pub(super) fn norm(p: &Array1<f64>, a: &Array1<f64>, precision: Precision) -> Self {
        let safe = match precision {
            Precision::Single => SAFE,
            Precision::Half => SAFE_IN_HALF,
        };
        let product = p * a;
        let is_safe = product.mapv(|v| safe.contains(&v.abs()));
        let choose = |safe_value: &dyn Fn(f64) -> f64, other: &dyn Fn(f64) -> f64| {
            let each =
                product.iter().zip(&is_safe).map(|(&v, &is_safe)| if is_safe { safe_value(v) } else { other(v) });
            each.collect::<Array1<f64>>()
        };
        Self {
            p: choose(&|v| v, &|_| 1.0),
            explicit: choose(&|_| 1.0, &|v| v),
            explicit_channels: is_safe.iter().filter(|is_safe| !**is_safe).count(),
        }
    }
}
