//! The exact passes that end a job, and the checks of what they did.

use mabert_graph::Model;
use mabert_passes::contract::{NonLinear, non_linear_nodes};
use mabert_passes::pipeline::{Rewriting, Student};
use mabert_passes::recognise::Miss;
use mabert_passes::sites::{Encoder, Precision};
use mabert_runtime::Named;

use super::EXACT;
use super::beyond::BeyondReport;
use super::bounded::BoundsReport;
use super::measure::{Measured, inner_overflows, sequence_count};
use super::prepare::Context;
use super::report::{OddInputs, SiteReport, describe, site_reports};
use super::softmax::choices;
use super::stages::{Record, Transferring};
use crate::layerwise::FormChoice;
use crate::{Error, Result, Setting};

/// What the exact passes may change where weights are rounded to half precision at the end.
const EXACT_IN_HALF: f64 = 5e-2;
/// How many times what rounding alone does to an uncalibrated student the exact passes may do to it.
const ROUNDING_MARGIN: f64 = 4.0;

/// A job whose student is finished.
pub(super) struct Finished<'j> {
    pub(super) context: Context<'j>,
    pub(super) record: Record,
    pub(super) student: Student,
    pub(super) measured: Measured,
    pub(super) sites: Vec<SiteReport>,
    pub(super) softmax: Vec<FormChoice>,
    pub(super) misses: Vec<Miss>,
    pub(super) beyond: Option<BeyondReport>,
    pub(super) odd_inputs: OddInputs,
    pub(super) bounds: Option<BoundsReport>,
    pub(super) non_linear_before: usize,
    /// The teacher's.
    pub(super) encoder: Encoder,
    before: Before,
}

/// The student before the exact passes.
struct Before {
    outputs: Vec<Named>,
    /// The student itself, where it is not calibrated.
    uncalibrated: Option<Model>,
    /// What the model came in, to which it is brought back.
    precision: Precision,
}

impl<'j> Transferring<'j> {
    /// Runs the exact passes, which make the student fast, and measures it before and after.
    pub(super) fn finish(mut self) -> Result<Finished<'j>> {
        self.context.progress.begin("finish", 3);
        self.bound()?;
        let Self { context, record, rewriting, mut student, .. } = self;
        let softmax = choices(context.job, &rewriting, &student, record.layerwise.as_ref());
        let Rewriting { teacher, encoder, misses, precision, .. } = rewriting;
        let non_linear_before = non_linear(&teacher, &encoder, &encoder)?.len();
        drop(teacher);
        let outputs_before = context.reference.run(&student.model)?.outputs;
        context.progress.step("student measured");
        let uncalibrated = (!record.calibrates).then(|| student.model.clone());
        student.finish()?;
        let sites = site_reports(&encoder, &student, record.layerwise.as_ref());
        let end = encoder_end(&student.encoder);
        describe(&mut student.model, context.job, &student.options, &sites, end);
        let bounds = BoundsReport::new(&mut student.model, &student.options, precision, end, &context)?;
        context.progress.step("folded");
        let measured = context.reference.run(&student.model)?;
        // A network binds the student to what it is fitted to.
        let takes_longer = student.options.approximator.longest() > student.options.approximator.max_seq;
        let beyond = context.beyond.as_ref().filter(|_| takes_longer);
        let beyond = beyond.map(|reference| BeyondReport::new(reference, &measured.runnable)).transpose()?;
        let odd = &context.texts.odd;
        let overflow = inner_overflows(&student.model, end, odd)?;
        let odd_inputs = OddInputs { sequences: sequence_count(odd), overflow };
        context.progress.end();
        let before = Before { outputs: outputs_before, uncalibrated, precision };
        Ok(Finished {
            context,
            record,
            softmax,
            student,
            measured,
            sites,
            misses,
            beyond,
            odd_inputs,
            bounds,
            non_linear_before,
            encoder,
            before,
        })
    }
}

impl Transferring<'_> {
    /// Bounds the student, which must not need it on ordinary text: a saturated answer would mean nothing.
    fn bound(&mut self) -> Result<()> {
        let reference = &self.context.reference;
        let bad = match self.record.calibrates {
            true => reference.inner_overflows(&self.student.model, encoder_end(&self.student.encoder))?,
            false => 0,
        };
        if bad > 0 {
            let reason = format!(
                "the student's outputs overflow on {bad} of {} sequences that were kept apart: give it more text, or \
                 keep the norms, which hold it",
                reference.count()
            );
            let settings = &[Setting::Data, Setting::CalibrationTokens, Setting::KeepNorm];
            return Err(Error::check(reason).helped_by(settings));
        }
        let seen = self.seen()?;
        Ok(self.student.bound(seen)?)
    }
}

impl Finished<'_> {
    /// Refuses a student that the exact passes changed, or whose values half precision does not hold.
    pub(super) fn check(&mut self) -> Result<()> {
        let change = self.context.reference.change(&self.before.outputs, &self.measured.outputs)?;
        let calibrates = self.record.calibrates;
        if change > self.change_allowed(change)? {
            let reason = format!("the exact passes changed the outputs by {change:.1e} of their size");
            return Err(match calibrates {
                true => Error::check(reason),
                false => Error::check(format!("{reason}: nothing holds its values before it is calibrated"))
                    .helped_by(&[Setting::ClosedForm]),
            });
        }
        if self.before.precision == Precision::Half && calibrates {
            self.context.reference.refuse_beyond_half(&self.student.model)?;
        }
        self.record.exact_change = change.max(self.context.canonical_change);
        self.record.note(&self.context, self.context.job.transfer.kind().name(), &self.measured)
    }

    /// What the exact passes may change, told that they changed so much. Where nothing holds the values of a student
    /// that is not calibrated, rounding alone may change as much; where it overflows, nothing can be told.
    fn change_allowed(&mut self, change: f64) -> Result<f64> {
        let Before { outputs, uncalibrated, precision } = &mut self.before;
        let (exact, rounding) = match precision {
            Precision::Half => (EXACT_IN_HALF, 2f32.powi(-11)),
            Precision::Single => (EXACT, 2f32.powi(-23)),
        };
        let reference = &self.context.reference;
        let Some(uncalibrated) = uncalibrated.take() else { return Ok(exact) };
        let bad = reference.overflows(outputs);
        if bad > 0 {
            self.context.progress.summary(&format!(
                "the exact passes were not checked: before it is calibrated, the student overflows on {bad} of {} sequences",
                reference.count()
            ));
            return Ok(f64::INFINITY);
        }
        if change <= exact {
            return Ok(exact);
        }
        let moved = reference.sensitivity(&uncalibrated, rounding, outputs)?;
        Ok(if moved.is_finite() { exact.max(ROUNDING_MARGIN * moved) } else { exact })
    }
}

/// The nodes of a model that are not matrix arithmetic. Its mask is the teacher's; its head starts where `encoder` ends.
pub(super) fn non_linear(model: &Model, teacher: &Encoder, encoder: &Encoder) -> Result<Vec<NonLinear>> {
    let mask = teacher.mask.as_ref().map(|m| m.input.as_str());
    Ok(non_linear_nodes(model, mask, encoder_end(encoder))?)
}

/// The value that the head starts from.
fn encoder_end(encoder: &Encoder) -> Option<&str> {
    encoder.layers.last().map(|layer| layer.output_norm.output.as_str())
}
