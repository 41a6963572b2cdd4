//! What stands in the place of softmax: what a job asks for, and what became of each layer.

use mabert_passes::lower::{Approximator, Form, Sharing};
use mabert_passes::pipeline::{Order, Pass, Rewriting, Student};
use mabert_passes::sites::{Layer, LayerSite};

use super::Job;
use crate::layerwise::{AttentionSize, ByForm, FormChoice, LayerwiseReport, Reason, Weighing};
use crate::{Error, Result, Setting};

/// The form that a student starts with: what was asked for, or what options that one form alone has ask for; else hinges,
/// until errors say otherwise.
///
/// # Errors
/// One network for all layers is asked for, where each is to have the form that suits it.
pub(super) fn first_form(job: &Job) -> Result<Form> {
    match job.softmax {
        Some(form) => Ok(form),
        None if job.order == Order::Linear => Ok(Form::Network),
        None if job.sharing == Sharing::Shared => {
            let reason = "one network for all layers cannot be chosen layer by layer: ask for networks".to_owned();
            Err(Error::setting(reason, &[Setting::Network]))
        }
        None => Ok(Form::Hinges),
    }
}

/// How the forms of layers are weighed, or why they are not.
pub(super) fn weighing(job: &Job, rewriting: &Rewriting) -> std::result::Result<Weighing, Reason> {
    let encoder = &rewriting.encoder;
    match job.softmax {
        _ if job.start().is_some() => Err(Reason::AsBefore),
        Some(_) => Err(Reason::AskedFor),
        None if job.order == Order::Linear => Err(Reason::AskedFor),
        None if job.order == Order::Paper || encoder.has_position_bias() || encoder.shows_probabilities() => {
            Err(Reason::NoLinearOrder)
        }
        None if job.data.is_none() => Err(Reason::NoText),
        None => Ok(Weighing { target: job.target, bound: job.softmax_error }),
    }
}

/// What became of each layer's softmax; nothing where it is kept.
pub(super) fn choices(
    job: &Job,
    rewriting: &Rewriting,
    student: &Student,
    calibration: Option<&LayerwiseReport>,
) -> Vec<FormChoice> {
    let weighed = calibration.map_or(&[] as &[FormChoice], |report| &report.choices);
    if !weighed.is_empty() || !student.ran(Pass::Softmax) {
        return weighed.to_vec();
    }
    let options = &student.options.approximator;
    let choice = |(layer, approximator): (&Layer, &Approximator)| {
        let size = AttentionSize {
            tokens: options.max_seq,
            hidden: options.hidden,
            head: layer.attention.head_size,
            hinges: options.hinges,
        };
        FormChoice {
            site: layer.site(LayerSite::Attention),
            form: approximator.form(),
            cost: size.cost(job.target),
            squared_error: ByForm::default(),
            // Where forms would have been weighed, nothing was calibrated.
            reason: weighing(job, rewriting).err().unwrap_or(Reason::NoText),
        }
    };
    student.encoder.layers.iter().zip(&student.approximators).map(choice).collect()
}
