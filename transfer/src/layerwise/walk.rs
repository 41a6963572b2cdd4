//! Walks teacher and student through the encoder side by side.

use std::time::Instant;

use mabert_graph::{Model, Tensor};
use mabert_passes::lower::{ChannelRanges, MASK, NormRanges, norm_parameters};
use mabert_passes::pipeline::{Pass, Rewriting, Student};
use mabert_passes::sites::{Encoder, Layer, LayerSite, LinearSite, NormSite, SiteId};
use ndarray::Array2;
use rayon::prelude::*;

use super::regression::{Regression, Unknowns};
use super::seen;
use super::token_weights::{TokenWeights, real_rows};
use super::{BlockReport, FormChoice, LayerwiseOptions, SiteError};
use crate::blockwise::{self, Block, BlockwiseOptions};
use crate::compare::RelativeError;
use crate::data::Batch;
use crate::gradient::HingeSite;
use crate::part::{Part, Prefix};
use crate::stored::Stored;
use crate::{Error, Result};

/// Both models, how far they have come, and what was done on the way.
pub(super) struct Walk<'w> {
    pub(super) rewriting: &'w Rewriting,
    pub(super) teacher: &'w Model,
    /// The sites of the teacher, and of the student too: the approximating passes keep their values' names.
    pub(super) encoder: &'w Encoder,
    pub(super) student: &'w mut Student,
    pub(super) batches: &'w [Batch],
    /// `[batch, n]` each.
    pub(super) masks: Vec<Tensor>,
    pub(super) options: &'w LayerwiseOptions,
    /// What tokens count in the last layer, where first tokens alone are read of it.
    pub(super) first_token: Option<TokenWeights>,
    /// The value at which both models are.
    position: String,
    /// That value, `[batch, n, channels]`.
    pub(super) teacher_stream: Stored,
    pub(super) student_stream: Stored,
    pub(super) sites: Vec<SiteError>,
    pub(super) choices: Vec<FormChoice>,
    pub(super) blocks: Vec<BlockReport>,
    /// What the student's norms put out.
    pub(super) seen: NormRanges,
    pub(super) fit_seconds: f64,
    pub(super) block_seconds: f64,
}

/// A half of a layer: each ends in a linear map, a residual sum and a norm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Half {
    Attention,
    FeedForward,
}

impl Half {
    /// The map before the residual sum.
    pub(super) fn map(self, layer: &Layer) -> &LinearSite {
        match self {
            Self::Attention => &layer.attention_output,
            Self::FeedForward => &layer.output,
        }
    }

    pub(super) fn norm(self, layer: &Layer) -> &NormSite {
        match self {
            Self::Attention => &layer.attention_norm,
            Self::FeedForward => &layer.output_norm,
        }
    }

    /// What the norm is called.
    pub(super) fn norm_id(self, layer: &Layer) -> SiteId {
        layer.site(match self {
            Self::Attention => LayerSite::AttentionNorm,
            Self::FeedForward => LayerSite::OutputNorm,
        })
    }
}

/// What the teacher makes of its own stream in a layer, after attention and at the end.
struct Targets {
    norm_outputs: [Stored; 2],
    /// Where norms are kept, the maps before them aim at their inputs.
    norm_inputs: Option<[Stored; 2]>,
}

impl Targets {
    /// What a half's map aims at, with all that follows it in the half.
    fn goal(&self, half: Half) -> &Stored {
        &self.norm_inputs.as_ref().unwrap_or(&self.norm_outputs)[half as usize]
    }
}

impl<'w> Walk<'w> {
    pub(super) fn new(
        rewriting: &'w Rewriting,
        student: &'w mut Student,
        batches: &'w [Batch],
        options: &'w LayerwiseOptions,
    ) -> Result<Self> {
        Ok(Self {
            rewriting,
            teacher: &rewriting.teacher,
            encoder: &rewriting.encoder,
            student,
            batches,
            // A model that takes no mask takes padding for text, where a fixed length forces some upon it.
            masks: match rewriting.encoder.mask {
                Some(_) => batches.iter().map(Batch::mask).collect(),
                None => batches.iter().map(|b| ones(&[b.size(), b.length])).collect(),
            },
            options,
            first_token: TokenWeights::favouring_first(rewriting, batches, options.pooling)?,
            position: String::new(),
            teacher_stream: Stored::empty(),
            student_stream: Stored::empty(),
            sites: Vec::new(),
            choices: Vec::new(),
            blocks: Vec::new(),
            seen: NormRanges::new(),
            fit_seconds: 0.0,
            block_seconds: 0.0,
        })
    }

    /// The embedding norm: both models see the same input.
    pub(super) fn embeddings(&mut self) -> Result<()> {
        let site = &self.encoder.embedding_norm;
        let id = SiteId::EmbeddingNorm;
        let channels = site.gamma.len();
        let prefix = Prefix::new(self.teacher, &[&site.input])?;
        let inputs = self.store(|i| prefix.run_first(&self.batches[i]))?;
        let norm = |model: &Model| Part::new(model, &[(&site.input, Some(channels))], &[&site.output]);
        let part = norm(self.teacher)?;
        let targets = self.store(|i| Ok(part.run(&[&inputs.get(i)?])?.remove(0)))?;
        if self.student.ran(Pass::Norm) {
            let mut sums = Regression::new(0, channels);
            for (i, batch) in self.batches.iter().enumerate() {
                let [x, y] = [real_rows(batch, &inputs.get(i)?), real_rows(batch, &targets.get(i)?)];
                sums.add(Array2::zeros((x.nrows(), 0)).view(), x.view(), y.view(), None);
            }
            let solution = sums.solve(Unknowns::Affine).ok_or_else(|| not_finite(id))?;
            self.set_norm(id, &solution);
        }
        let part = norm(&self.student.model)?;
        self.student_stream = self.store(|i| Ok(part.run(&[&inputs.get(i)?])?.remove(0)))?;
        self.teacher_stream = targets;
        self.position.clone_from(&site.output);
        let error = self.relative_error(&self.student_stream, &self.teacher_stream)?;
        self.note(id, error);
        Ok(())
    }

    /// One layer; afterwards both models are at its output.
    pub(super) fn layer(&mut self, index: usize) -> Result<()> {
        let encoder = self.encoder;
        let layer = &encoder.layers[index];
        self.advance(&layer.input)?;
        self.fit_layer_approximator(index)?;
        let targets = self.targets(layer)?;
        let mut contexts = self.contexts(layer)?;
        self.solve(layer, Half::Attention, &contexts, targets.goal(Half::Attention))?;
        if let Some(options) = self.options.blockwise {
            self.train(index, Half::Attention, None, &targets, options)?;
            contexts = self.contexts(layer)?;
            self.solve(layer, Half::Attention, &contexts, targets.goal(Half::Attention))?;
        }
        self.solve(layer, Half::FeedForward, &contexts, targets.goal(Half::FeedForward))?;
        if let Some(options) = self.options.blockwise {
            let streams = self.middle(layer, &contexts)?;
            self.train(index, Half::FeedForward, Some(&streams), &targets, options)?;
            self.solve(layer, Half::FeedForward, &contexts, targets.goal(Half::FeedForward))?;
        }
        self.arrive(layer, &contexts, targets.norm_outputs)
    }

    /// What the teacher makes of its stream in a layer.
    fn targets(&self, layer: &Layer) -> Result<Targets> {
        let halves = [Half::Attention, Half::FeedForward].map(|half| half.norm(layer));
        let mut values = halves.map(|norm| norm.output.as_str()).to_vec();
        if !self.student.ran(Pass::Norm) {
            values.extend(halves.map(|norm| norm.input.as_str()));
        }
        let part = self.attention_part(self.teacher, layer, &values)?;
        let run = |i: usize| part.run(&[&self.teacher_stream.get(i)?, &self.masks[i]]);
        let mut stored = Stored::each(self.batches.len(), values.len(), run)?.into_iter();
        let mut pair = || Some([stored.next()?, stored.next()?]);
        let norm_outputs = pair().expect("as many values as were asked for");
        Ok(Targets { norm_outputs, norm_inputs: pair() })
    }

    /// Runs the student's layer and notes how far it is from the teacher's.
    fn arrive(&mut self, layer: &Layer, contexts: &Stored, teacher_outputs: [Stored; 2]) -> Result<()> {
        let halves = [Half::Attention, Half::FeedForward];
        let part = self.residual_part(layer, &halves.map(|half| half.norm(layer).output.as_str()))?;
        let run = |i: usize| part.run(&[&self.student_stream.get(i)?, &contexts.get(i)?]);
        let student_outputs = Stored::each(self.batches.len(), halves.len(), run)?;
        for ((half, student), teacher) in halves.into_iter().zip(&student_outputs).zip(&teacher_outputs) {
            let error = self.relative_error(student, teacher)?;
            self.note(half.norm_id(layer), error);
            self.see(half.norm_id(layer), student)?;
        }
        let [_, teacher_stream] = teacher_outputs;
        self.teacher_stream = teacher_stream;
        self.student_stream = student_outputs.into_iter().last().expect("a value a half");
        self.position.clone_from(&layer.output_norm.output);
        Ok(())
    }

    /// The student's contexts, `[batch, n, heads * d]`.
    fn contexts(&self, layer: &Layer) -> Result<Stored> {
        let part = self.attention_part(&self.student.model, layer, &[&layer.attention_output.input])?;
        self.store(|i| Ok(part.run(&[&self.student_stream.get(i)?, &self.masks[i]])?.remove(0)))
    }

    /// The student's values between the halves of a layer, `[batch, n, channels]`.
    fn middle(&self, layer: &Layer, contexts: &Stored) -> Result<Stored> {
        let part = self.residual_part(layer, &[&layer.attention_norm.output])?;
        self.store(|i| Ok(part.run(&[&self.student_stream.get(i)?, &contexts.get(i)?])?.remove(0)))
    }

    /// Trains a half of a layer, from `streams` (or from where the student is), towards the teacher's normalised values.
    fn train(
        &mut self,
        index: usize,
        half: Half,
        streams: Option<&Stored>,
        targets: &Targets,
        options: BlockwiseOptions,
    ) -> Result<()> {
        let start = Instant::now();
        let layer = &self.encoder.layers[index];
        let norm = half.norm_id(layer);
        let (input, maps) = match half {
            Half::Attention => (
                (layer.input.as_str(), layer.query.inputs),
                &[&layer.query, &layer.key, &layer.value, &layer.attention_output][..],
            ),
            Half::FeedForward => (
                (layer.attention_norm.output.as_str(), layer.intermediate.inputs),
                &[&layer.intermediate, &layer.output][..],
            ),
        };
        let mut others: Vec<String> =
            maps.iter().flat_map(|map| [Some(map.weight.clone()), map.bias_name.clone()]).flatten().collect();
        if self.student.ran(Pass::Norm) {
            others.extend(norm_parameters(norm));
        }
        // With length tables one token alone is exact in attention, and stays so.
        let exact = half == Half::Attention && self.student.options.approximator_of(index).one_token_is_exact();
        let shortest = if exact { 2 } else { 1 };
        let weights = self.token_weights(layer);
        let weights: Vec<Tensor> = self.batches.iter().map(|b| weights.of_tokens(b, shortest)).collect();
        let name = norm.to_string();
        let block = Block {
            name: &name,
            input,
            output: &half.norm(layer).output,
            approximator: if half == Half::Attention { self.approximator_parameters(index) } else { Vec::new() },
            hinges: if half == Half::Attention { HingeSite::of_layer(self.student, index) } else { None },
            others,
            batches: self.batches,
            streams: streams.unwrap_or(&self.student_stream),
            masks: &self.masks,
            weights: &weights,
            targets: &targets.norm_outputs[half as usize],
        };
        let seed = self.options.seed ^ ((index as u64) << 24) ^ ((half as u64) << 16);
        let steps = if half == Half::Attention { options.steps } else { options.feed_forward_steps };
        let options = BlockwiseOptions { steps, seed, ..options };
        let fitted = blockwise::fit(&mut self.student.model, &block, &options)?;
        self.blocks.push(BlockReport { site: norm, fitted });
        self.block_seconds += start.elapsed().as_secs_f64();
        Ok(())
    }

    /// Brings both models to `value`: nothing to do where the layers follow each other.
    fn advance(&mut self, value: &str) -> Result<()> {
        if self.position != value {
            let [teacher, student] = [self.teacher, &self.student.model].map(|model| Prefix::new(model, &[value]));
            let (teacher, student) = (teacher?, student?);
            self.teacher_stream = self.store(|i| teacher.run_first(&self.batches[i]))?;
            self.student_stream = self.store(|i| student.run_first(&self.batches[i]))?;
            value.clone_into(&mut self.position);
        }
        Ok(())
    }

    pub(super) fn is_last(&self, layer: &Layer) -> bool {
        self.encoder.layers.last().is_some_and(|last| last.index == layer.index)
    }

    /// What the head makes first tokens count in a layer, where it does.
    pub(super) fn first_token_weights(&self, layer: &Layer) -> Option<TokenWeights> {
        self.first_token.filter(|_| self.is_last(layer))
    }

    /// What tokens count in a layer.
    fn token_weights(&self, layer: &Layer) -> TokenWeights {
        self.first_token_weights(layer).unwrap_or_default()
    }

    /// The layer from its input and the mask.
    pub(super) fn attention_part(&self, model: &Model, layer: &Layer, outputs: &[&str]) -> Result<Part> {
        Part::new(model, &[(&layer.input, Some(layer.query.inputs)), (MASK, None)], outputs)
    }

    /// The student's layer from its input and the context.
    pub(super) fn residual_part(&self, layer: &Layer, outputs: &[&str]) -> Result<Part> {
        let context = &layer.attention_output;
        let inputs = [(layer.input.as_str(), Some(layer.query.inputs)), (&context.input, Some(context.inputs))];
        Part::new(&self.student.model, &inputs, outputs)
    }

    /// `run` on every batch, in parallel.
    pub(super) fn each<T: Send>(&self, run: impl Fn(usize) -> Result<T> + Sync + Send) -> Result<Vec<T>> {
        (0..self.batches.len()).into_par_iter().map(run).collect()
    }

    /// `run` on every batch, in parallel, with the values that it returns kept.
    fn store(&self, run: impl Fn(usize) -> Result<Tensor> + Sync) -> Result<Stored> {
        Ok(Stored::each(self.batches.len(), 1, |i| Ok(vec![run(i)?]))?.remove(0))
    }

    /// How far the student's values are from the teacher's, as in [`SiteError`].
    fn relative_error(&self, student: &Stored, teacher: &Stored) -> Result<f64> {
        let mut error = RelativeError::default();
        for (i, batch) in self.batches.iter().enumerate() {
            error.add(real_rows(batch, &student.get(i)?).view(), real_rows(batch, &teacher.get(i)?).view());
        }
        Ok(error.value())
    }

    /// Takes down what a norm of the student put out.
    fn see(&mut self, norm: SiteId, output: &Stored) -> Result<()> {
        let ranges = self.each(|i| Ok(ChannelRanges::of(real_rows(&self.batches[i], &output.get(i)?).view())))?;
        ranges.iter().for_each(|ranges| seen::add(&mut self.seen, norm, ranges));
        Ok(())
    }

    pub(super) fn note(&mut self, site: SiteId, relative_error: f64) {
        self.sites.push(SiteError { site, relative_error });
    }
}

pub(super) fn not_finite(site: SiteId) -> Error {
    let reason = "its statistics are not finite; the model's activations overflow on this data".to_owned();
    Error::Calibration { site: site.to_string(), reason }
}

fn ones(shape: &[usize]) -> Tensor {
    Tensor::new(shape, vec![1f32; shape.iter().product()])
}
