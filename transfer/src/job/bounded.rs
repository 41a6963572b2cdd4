//! What is told of the bounds of a student.

use mabert_graph::Model;
use mabert_passes::lower::{BOUND_MARGIN, saturations};
use mabert_passes::magnitude::largest_magnitude;
use mabert_passes::pipeline::PassOptions;
use mabert_passes::sites::Precision;
use serde::Serialize;

use super::measure::sequence_count;
use super::prepare::Context;
use crate::Result;
use crate::bounds::BoundedStudent;

/// The `metadata_props` key under which a bounded student says how large its values can get.
pub const LARGEST_VALUE_KEY: &str = "onnx_mabert.largest_value";
/// Room for engines that multiply in another order, so that what is within one order of products and sums is within all.
const ROOM: f64 = 1e6;
/// The largest number of half precision.
const LARGEST_HALF: f64 = 65_504.0;

/// How a student's stream is held behind each norm, so that no input can make it overflow.
#[derive(Clone, Copy, Debug, Serialize)]
#[non_exhaustive]
pub struct BoundsReport {
    /// Norms behind which it is.
    pub norms: usize,
    /// How far the limits lie beyond what calibration saw of a channel, at least, on both sides, relative to how wide that
    /// is.
    pub margin: f64,
    /// No value of the encoder is larger, whatever token ids a text holds; `None` where the graph does not tell.
    pub largest: Option<f64>,
    /// Whether that is far inside the floats, so that no input of legal ids gives a value that is not finite.
    pub promised: bool,
    /// Of the sequences that were kept apart, those that get to a limit, and all.
    pub held_out: (usize, usize),
    /// The same of sequences unlike text.
    pub odd: (usize, usize),
}

impl BoundsReport {
    /// Of a finished student, which then says how large its values can get; `None` where it has no bounds.
    pub(super) fn new(
        student: &mut Model,
        options: &PassOptions,
        precision: Precision,
        end: Option<&str>,
        context: &Context<'_>,
    ) -> Result<Option<Self>> {
        let norms = saturations(student).len();
        let Some(runnable) = BoundedStudent::new(student, 1)? else { return Ok(None) };
        let largest = match end {
            Some(end) => largest_magnitude(student, options.approximator.longest(), end)?.filter(|v| v.is_finite()),
            None => None,
        };
        let most = match precision {
            Precision::Single => f64::from(f32::MAX) / ROOM,
            Precision::Half => LARGEST_HALF,
        };
        let promised = largest.is_some_and(|largest| largest <= most);
        if let Some(largest) = largest.filter(|_| promised) {
            student.set_metadata(LARGEST_VALUE_KEY, &format!("{largest:e}"));
        }
        let held_out = (context.reference.leaving(&runnable)?, context.reference.count());
        let odd = (runnable.count(&context.texts.odd)?, sequence_count(&context.texts.odd));
        Ok(Some(Self { norms, margin: BOUND_MARGIN, largest, promised, held_out, odd }))
    }
}
