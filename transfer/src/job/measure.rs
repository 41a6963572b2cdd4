//! How far a student is from its teacher, or from itself, on sequences that it was not made from.

use mabert_graph::{ElementType, Model, Tensor};
use mabert_passes::inputs::EncoderInputs;
use mabert_runtime::{LoadOptions, Model as Runnable, Named, Taps, borrowed};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use rayon::prelude::*;

use super::quantised;
use super::report::{DevReport, DevScore};
use super::settings::Dev;
use crate::bounds::BoundedStudent;
use crate::compare::{self, Distances, OutputDistance, Tolerance};
use crate::data::{Batch, BatchShape, DataFile, TextEncoder};
use crate::evaluate::{Answered, Labelled, Metric, Spread, TaskRun};
use crate::pooling::{Features, Form, Pooling};
use crate::{Error, Result, Setting};

/// The teacher's outputs on sequences kept apart, by which students are measured.
pub(super) struct Reference {
    pub(super) batches: Vec<Batch>,
    teacher_outputs: Vec<Named>,
    /// What makes vectors of texts of the outputs.
    pub(super) features: Features,
    /// The labelled texts, where there are any.
    pub(super) dev: Option<DevSet>,
}

/// A student ready to run, and its outputs on the [`Reference`]'s sequences.
pub(super) struct Measured {
    pub(super) runnable: Runnable,
    pub(super) outputs: Vec<Named>,
}

impl Reference {
    /// Measures the teacher, which `origin` names in messages.
    ///
    /// # Errors
    /// The teacher's outputs are not finite.
    pub(super) fn new(origin: &str, teacher: &Runnable, batches: Vec<Batch>, features: Features) -> Result<Self> {
        let teacher_outputs = outputs(teacher, &batches)?;
        let reference = Self { batches, teacher_outputs, features, dev: None };
        match reference.overflows(&reference.teacher_outputs) {
            0 => Ok(reference),
            bad => Err(Error::Teacher {
                model: origin.to_owned(),
                reason: format!("its outputs are not finite on {bad} of {} sequences", reference.count()),
            }),
        }
    }

    /// How many sequences there are.
    pub(super) fn count(&self) -> usize {
        sequence_count(&self.batches)
    }

    /// Runs a model on all sequences.
    pub(super) fn run(&self, model: &Model) -> Result<Measured> {
        let runnable = LoadOptions::default().prepare(model)?;
        let outputs = outputs(&runnable, &self.batches)?;
        Ok(Measured { runnable, outputs })
    }

    /// As [`inner_overflows`], on these sequences.
    pub(super) fn inner_overflows(&self, model: &Model, encoder_end: Option<&str>) -> Result<usize> {
        inner_overflows(model, encoder_end, &self.batches)
    }

    /// How many sequences leave the bounds of a student.
    pub(super) fn leaving(&self, student: &BoundedStudent) -> Result<usize> {
        student.count(&self.batches)
    }

    /// The mean size of each of the teacher's outputs.
    pub(super) fn sizes(&self) -> Result<Vec<f64>> {
        let zeros: Vec<Named> = self.teacher_outputs.iter().map(quantised::zeros).collect();
        Ok(self.distances(&zeros)?.into_iter().map(|output| output.mean_abs).collect())
    }

    /// How far `outputs` are from the teacher's, and the vectors of texts that are made of them.
    pub(super) fn distances(&self, outputs: &[Named]) -> Result<Vec<OutputDistance>> {
        distances(&self.batches, &self.teacher_outputs, outputs, &self.features)
    }

    /// How many sequences have an output that is not finite.
    pub(super) fn overflows(&self, outputs: &[Named]) -> usize {
        compare::overflows(&self.batches, outputs)
    }

    /// How far a student's outputs are from its own before, the furthest of all, relative to outputs above 1.
    pub(super) fn change(&self, before: &[Named], after: &[Named]) -> Result<f64> {
        furthest(&self.batches, before, after)
    }

    /// How far another spelling of the teacher is from it, on the first few batches.
    pub(super) fn teacher_change(&self, teacher: &Model, most_batches: usize) -> Result<f64> {
        let count = self.batches.len().min(most_batches);
        let batches = &self.batches[..count];
        let respelled = outputs(&LoadOptions::default().prepare(teacher)?, batches)?;
        furthest(batches, &self.teacher_outputs[..count], &respelled)
    }

    /// How far rounding alone moves the outputs of a student that is not calibrated, relative to outputs above 1, when
    /// every weight moves by `by` of its own, up or down: nothing holds such a student's values, and what the exact
    /// passes change must be told from what any other order of the same sums would.
    pub(super) fn sensitivity(&self, student: &Model, by: f32, outputs_before: &[Named]) -> Result<f64> {
        let mut moved = student.clone();
        let mut rng = StdRng::seed_from_u64(71);
        let weights = moved.graph().initializer.iter().filter(|t| t.data_type == ElementType::F32.onnx());
        let names: Vec<String> = weights.map(|t| t.name.clone()).collect();
        for name in names {
            let mut values = moved.constant(&name)?.to_f32();
            values.mapv_inplace(|v| if rng.random() { v * (1.0 + by) } else { v * (1.0 - by) });
            moved.set_constant(&name, &Tensor::F32(values));
        }
        let outputs_after = outputs(&LoadOptions::default().prepare(&moved)?, &self.batches)?;
        self.change(outputs_before, &outputs_after)
    }

    /// Refuses a student of which a value on these sequences does not fit half precision, in which it will be run.
    pub(super) fn refuse_beyond_half(&self, student: &Model) -> Result<()> {
        const LARGEST: f32 = 65_504.0;
        let everything = LoadOptions::default().taps(Taps::Everything).prepare(student)?;
        for batch in &self.batches {
            let inputs = batch.inputs(everything.inputs())?;
            for (name, value) in everything.run(&borrowed(&inputs))? {
                let largest = value.as_f32().map_or(0.0, |v| v.iter().fold(0f32, |m, x| m.max(x.abs())));
                if largest > LARGEST {
                    let reason = format!(
                        "`{name}` of the student reaches {largest:.1e}, beyond half precision's {LARGEST}: keep the \
                         norms, which hold it, or rewrite the model in single precision"
                    );
                    return Err(Error::check(reason).helped_by(&[Setting::KeepNorm]));
                }
            }
        }
        Ok(())
    }

    /// The student on the labelled texts, where there are any.
    pub(super) fn dev_report(&self, student: &Runnable) -> Result<Option<DevReport>> {
        self.dev.as_ref().map(|dev| dev.measure(student)).transpose()
    }
}

/// How users of a feature model make vectors of texts, told by runs on made-up tokens of at most `longest`; `None` of other
/// models.
///
/// # Errors
/// No output is such as is asked for.
pub(super) fn pooling(
    teacher: &Runnable,
    inputs: &EncoderInputs,
    features: &Features,
    longest: usize,
) -> Result<Option<Pooling>> {
    let shape = BatchShape::new(inputs);
    let run = |length: usize| -> Result<(usize, Named)> {
        let made_up = inputs.made_up(2, length.min(longest), 1)?;
        Ok((shape.length.unwrap_or(length.min(longest)), teacher.run(&borrowed(&made_up))?))
    };
    // Of two lengths: what is as wide as the text is long differs then.
    let runs = [run(7)?, run(5)?];
    let form = |(at, (name, value)): (usize, &(String, Tensor))| {
        let shapes = runs.each_ref().map(|(length, outputs)| (*length, outputs[at].1.shape().to_vec()));
        Form::new(features, name, value, &shapes)
    };
    let forms: Vec<Form> = runs[0].1.iter().enumerate().map(form).collect();
    let vectors = features.vectors(&forms)?;
    Ok(vectors.main.and_then(|at| vectors.poolings[at]))
}

/// Labelled texts, and what the teacher makes of them.
pub(super) struct DevSet {
    labelled: Labelled,
    shape: BatchShape,
    features: Features,
    teacher: Answered,
    /// What makes it doubtful that they mean anything.
    pub(super) notes: Vec<String>,
}

impl DevSet {
    /// `rows` are those of the teacher's table of words.
    pub(super) fn new(
        dev: &Dev,
        encoder: &TextEncoder,
        rows: usize,
        teacher: &Runnable,
        shape: &BatchShape,
        features: &Features,
    ) -> Result<Self> {
        let read = if dev.metric == Some(Metric::Sts) { Labelled::read_pairs } else { Labelled::read };
        let labelled = read(DataFile::open(&dev.data)?, encoder, Some(rows))?;
        let teacher = labelled.answers(&run(teacher, shape, features), dev.metric)?;
        if teacher.unusable > 0 {
            let file = labelled.file().display();
            let reason = format!("the teacher overflows on {} examples of {file}", teacher.unusable);
            return Err(Error::Compare(reason));
        }
        // What cannot be scored is said before the long work.
        labelled.score(teacher.metric, &teacher)?;
        let of_teacher = |note: &String| format!("the teacher on {}: {note}", labelled.file().display());
        let notes = labelled.notes().iter().cloned().chain(teacher.notes.iter().map(of_teacher)).collect();
        Ok(Self { labelled, shape: shape.clone(), features: features.clone(), teacher, notes })
    }

    fn measure(&self, student: &Runnable) -> Result<DevReport> {
        let Self { labelled, shape, features, teacher, .. } = self;
        let metric = teacher.metric;
        // A text without an answer is answered wrongly; it does not stop the work.
        let student = labelled.answers(&run(student, shape, features), Some(metric))?;
        let scores = labelled.metrics(teacher).into_iter().map(|metric| {
            let [teacher, student] = [teacher, &student].map(|answered| labelled.score(metric, answered));
            Ok(DevScore { metric, teacher: teacher?, student: student? })
        });
        let scores = scores.collect::<Result<Vec<DevScore>>>()?;
        let own = |scores: &[DevScore]| scores.first().map_or((f64::NAN, f64::NAN), |s| (s.teacher, s.student));
        Ok(DevReport {
            overflow: student.unusable,
            file: labelled.file().to_owned(),
            examples: labelled.examples(),
            metric,
            teacher: own(&scores).0,
            student: own(&scores).1,
            agreement: student.agreement(teacher),
            scores,
        })
    }
}

fn run<'e>(engine: &'e Runnable, shape: &'e BatchShape, features: &'e Features) -> TaskRun<'e> {
    TaskRun { engine, shape, channels: None, features: Some(features), spread: Spread::Batches }
}

/// The outputs for every batch.
pub(super) fn outputs(model: &Runnable, batches: &[Batch]) -> Result<Vec<Named>> {
    let run = |batch: &Batch| -> Result<Named> {
        let inputs = batch.inputs(model.inputs())?;
        Ok(model.run(&borrowed(&inputs))?)
    };
    batches.par_iter().map(run).collect()
}

/// How far the outputs of `second` are from those of `first`, in units of `1 + |first|` where `exceeds` is concerned.
fn distances(batches: &[Batch], first: &[Named], second: &[Named], features: &Features) -> Result<Vec<OutputDistance>> {
    let tolerance = Tolerance { elements: Some((1.0, 1.0)), cosine: None };
    let mut distances = Distances::new(tolerance).features(features.clone());
    for (batch, (a, b)) in batches.iter().zip(first.iter().zip(second)) {
        distances.add(a, b, Some(batch))?;
    }
    Ok(distances.outputs())
}

/// The furthest of all outputs, relative to outputs above 1.
fn furthest(batches: &[Batch], first: &[Named], second: &[Named]) -> Result<f64> {
    let features = Features::new(Some(Pooling::None));
    Ok(distances(batches, first, second, &features)?.iter().map(|o| o.exceeds).fold(0.0, f64::max))
}

/// Sequences in batches.
pub(super) fn sequence_count(batches: &[Batch]) -> usize {
    batches.iter().map(|b| b.rows.len()).sum()
}

/// How many sequences have an output, or a value where the encoder ends, that is not finite: a head may bound what has
/// overflowed, and then answers all the same. A stream without bounds only ever has something added to it, so that what
/// overflowed in any layer still shows at the end; with bounds nothing overflows.
pub(super) fn inner_overflows(model: &Model, encoder_end: Option<&str>, batches: &[Batch]) -> Result<usize> {
    let known = model.value_names();
    let taps = encoder_end.filter(|value| known.contains(*value)).map(str::to_owned);
    let runnable = LoadOptions::default().taps(Taps::Values(taps.into_iter().collect())).prepare(model)?;
    Ok(compare::overflows(batches, &outputs(&runnable, batches)?))
}
