//! Walks teacher and student through the encoder side by side.

use std::time::Instant;

use mabert_graph::{Model, Tensor};
use mabert_passes::lower::{MASK, Sharing, norm_parameters};
use mabert_passes::pipeline::{Pass, Rewriting, Student};
use mabert_passes::sites::{Encoder, Layer, LayerSite, LinearSite, SiteId};
use ndarray::{Array2, ArrayD, Axis, Ix4};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use rayon::prelude::*;

use super::fit::{self, Rows};
use super::head;
use super::regression::{Regression, Solution, Unknowns};
use super::{LayerwiseOptions, SiteError};
use crate::blockwise::{self, Block, Fitted};
use crate::compare::RelativeError;
use crate::data::Batch;
use crate::part::{Part, Prefix};
use crate::stored::Stored;
use crate::{Error, Result};

/// Batches that are run before their statistics are added up: enough for every thread, few enough to hold.
const AT_ONCE: usize = 8;

/// An approximator that serves several heads is fitted to this many times the rows.
const POOLED: usize = 4;

/// Every sentence is represented by this many rows, or by all that it has; by fewer where these would be more than
/// twice the rows drawn evenly.
const ROWS_A_SENTENCE: f64 = 4.0;

/// Where the head reads first tokens alone, they have this share of the weight in the last layer. The others keep some:
/// they are more, and say how the weights answer in general.
const FIRST_TOKENS: f64 = 0.75;

pub(super) struct Work<'w> {
    teacher: &'w Model,
    /// The sites of the teacher, and of the student too: the approximating passes keep their values' names.
    encoder: &'w Encoder,
    student: &'w mut Student,
    batches: &'w [Batch],
    masks: Vec<Tensor>,
    options: &'w LayerwiseOptions,
    /// The value at which both models are.
    at: String,
    /// Whether the head reads the first token alone, so that it is favoured in the last layer.
    first_token_only: bool,
    /// That value, `[batch, n, channels]`.
    teacher_at: Stored,
    student_at: Stored,
    pub(super) sites: Vec<SiteError>,
    pub(super) blocks: Vec<Fitted>,
    pub(super) fit_seconds: f64,
    pub(super) block_seconds: f64,
}

impl<'w> Work<'w> {
    pub(super) fn new(
        rewriting: &'w Rewriting,
        student: &'w mut Student,
        batches: &'w [Batch],
        options: &'w LayerwiseOptions,
    ) -> Result<Self> {
        let sentences = batches.iter().map(texts).sum::<usize>();
        // Too few first tokens would be learnt by heart.
        let enough = sentences >= 2 * rewriting.encoder.channels;
        let first_token_only = match batches.iter().max_by_key(|b| b.length) {
            Some(longest) if enough => {
                head::depends_on_first_token_alone(&rewriting.teacher, &rewriting.encoder, longest)?
            }
            _ => false,
        };
        Ok(Self {
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
            at: String::new(),
            teacher_at: Stored::none(),
            student_at: Stored::none(),
            first_token_only,
            sites: Vec::new(),
            blocks: Vec::new(),
            fit_seconds: 0.0,
            block_seconds: 0.0,
        })
    }

    /// The embedding norm: both models see the same input.
    pub(super) fn embeddings(&mut self) -> Result<()> {
        let site = &self.encoder.embedding_norm;
        let name = SiteId::EmbeddingNorm;
        let channels = site.gamma.len();
        let prefix = Prefix::new(self.teacher, &[&site.input])?;
        let inputs = self.store(|i| prefix.run_first(&self.batches[i]))?;
        let norm = |model: &Model| Part::new(model, &[(&site.input, Some(channels))], &[&site.output]);
        let part = norm(self.teacher)?;
        let targets = self.store(|i| Ok(part.run(&[&inputs.get(i)?])?.remove(0)))?;
        if self.student.ran(Pass::Norm) {
            let mut sums = Regression::new(0, channels);
            for (i, batch) in self.batches.iter().enumerate() {
                let [x, y] = [real(batch, &inputs.get(i)?), real(batch, &targets.get(i)?)];
                sums.add(Array2::zeros((x.nrows(), 0)).view(), x.view(), y.view(), None);
            }
            let found = sums.solve(Unknowns::Affine).ok_or_else(|| not_finite(name))?;
            self.set_norm(name, &found);
        }
        let part = norm(&self.student.model)?;
        self.student_at = self.store(|i| Ok(part.run(&[&inputs.get(i)?])?.remove(0)))?;
        self.teacher_at = targets;
        self.at.clone_from(&site.output);
        let error = self.relative_error(&self.student_at, &self.teacher_at)?;
        self.note(name, error);
        Ok(())
    }

    /// One approximator for all layers is fitted to the teacher's own scores: the student has none yet.
    pub(super) fn shared_approximator(&mut self) -> Result<()> {
        if !self.student.ran(Pass::Softmax) || self.student.options.approximator.sharing != Sharing::Shared {
            return Ok(());
        }
        let mut rows = vec![Rows::default()];
        for layer in &self.encoder.layers {
            let prefix = Prefix::new(self.teacher, &[&layer.input])?;
            let part =
                self.attention_part(self.teacher, layer, &[&layer.attention.products, &layer.attention.probabilities])?;
            let budget = POOLED * self.options.fit_rows / self.encoder.layers.len();
            let found = self.sample(1, budget, layer, |i| {
                let mut values = part.run(&[&prefix.run_first(&self.batches[i])?, &self.masks[i]])?;
                Ok((values.remove(0), values.remove(0)))
            })?;
            rows[0].append(found.into_iter().next().unwrap_or_default());
        }
        let approximator = self.student.approximators[0].clone();
        self.fit(SiteId::SharedNetwork, &approximator, &rows, 0);
        Ok(())
    }

    /// One layer; afterwards both models are at its output.
    pub(super) fn layer(&mut self, index: usize) -> Result<()> {
        let encoder = self.encoder;
        let layer = &encoder.layers[index];
        self.advance(&layer.input)?;
        if self.student.ran(Pass::Softmax) && self.student.options.approximator.sharing != Sharing::Shared {
            self.layer_approximator(index)?;
        }
        let (attention, output) = (&layer.attention_norm, &layer.output_norm);
        // What the student's maps aim at: the teacher's normalised values, or the norms' inputs where norms are kept.
        let goals = [attention.output.as_str(), output.output.as_str()];
        let mut wanted = goals.to_vec();
        if !self.student.ran(Pass::Norm) {
            wanted.splice(0..0, [attention.input.as_str(), output.input.as_str()]);
        }
        let part = self.attention_part(self.teacher, layer, &wanted)?;
        let run = |i: usize| part.run(&[&self.teacher_at.get(i)?, &self.masks[i]]);
        let mut targets = Stored::each(self.batches.len(), wanted.len(), run)?;
        let of_goals = targets.len() - goals.len();
        let norm = layer.site(LayerSite::AttentionNorm);
        let mut contexts = self.contexts(layer)?;
        self.solve(layer, norm, &layer.attention_output, &contexts, &attention.input, &targets[0])?;
        if let Some(options) = self.options.blockwise {
            self.blockwise(index, &targets[of_goals], options)?;
            contexts = self.contexts(layer)?;
            self.solve(layer, norm, &layer.attention_output, &contexts, &attention.input, &targets[0])?;
        }
        let norm = layer.site(LayerSite::OutputNorm);
        self.solve(layer, norm, &layer.output, &contexts, &output.input, &targets[1])?;
        let part = self.residual_part(layer, &[&attention.output, &output.output])?;
        let run = |i: usize| part.run(&[&self.student_at.get(i)?, &contexts.get(i)?]);
        let mut reached = Stored::each(self.batches.len(), goals.len(), run)?;
        targets.drain(..of_goals);
        let norms = [LayerSite::AttentionNorm, LayerSite::OutputNorm];
        for ((norm, student), teacher) in norms.into_iter().zip(&reached).zip(&targets) {
            let error = self.relative_error(student, teacher)?;
            self.note(layer.site(norm), error);
        }
        (self.student_at, self.teacher_at) = (reached.remove(1), targets.remove(1));
        self.at.clone_from(&layer.output_norm.output);
        Ok(())
    }

    /// The student's contexts, `[batch, n, heads * d]`.
    fn contexts(&self, layer: &Layer) -> Result<Stored> {
        let part = self.attention_part(&self.student.model, layer, &[&layer.attention_output.input])?;
        self.store(|i| Ok(part.run(&[&self.student_at.get(i)?, &self.masks[i]])?.remove(0)))
    }

    /// Trains the attention block towards the teacher's normalised values.
    fn blockwise(&mut self, index: usize, targets: &Stored, options: blockwise::BlockwiseOptions) -> Result<()> {
        let start = Instant::now();
        let layer = &self.encoder.layers[index];
        let name = layer.site(LayerSite::Attention).to_string();
        let linear = [&layer.query, &layer.key, &layer.value, &layer.attention_output];
        let mut others: Vec<String> =
            linear.into_iter().flat_map(|l| [Some(l.weight.clone()), l.bias_name.clone()]).flatten().collect();
        if self.student.ran(Pass::Norm) {
            others.extend(norm_parameters(layer.site(LayerSite::AttentionNorm)));
        }
        let approximators = self.student.options.approximator;
        let mut approximator = Vec::new();
        // One that all layers share must not be bent to one of them.
        if self.student.ran(Pass::Softmax) && approximators.sharing != Sharing::Shared {
            let of = &self.student.approximators[index];
            approximator.extend([&of.w1, &of.w2, &of.b1, &of.b2].map(String::clone));
            if approximators.length_tables {
                approximator.push(of.scale.clone());
            }
        }
        // With length tables one token alone is exact, and stays so.
        let shortest = if approximators.length_tables { 2 } else { 1 };
        let first = if self.first_token_only && self.is_last(layer) { self.first_token_weight() } else { 1.0 };
        let weights: Vec<Tensor> = self.batches.iter().map(|b| token_weights(b, first as f32, shortest)).collect();
        let block = Block {
            name: &name,
            input: (&layer.input, layer.query.inputs),
            output: &layer.attention_norm.output,
            approximator,
            others,
            batches: self.batches,
            streams: &self.student_at,
            masks: &self.masks,
            weights: &weights,
            targets,
        };
        let options = blockwise::BlockwiseOptions { seed: self.options.seed ^ ((index as u64) << 24), ..options };
        let fitted = blockwise::fit(&mut self.student.model, &block, &options)?;
        self.blocks.push(fitted);
        self.block_seconds += start.elapsed().as_secs_f64();
        Ok(())
    }

    /// Brings both models to `value`: nothing to do where the layers follow each other.
    fn advance(&mut self, value: &str) -> Result<()> {
        if self.at != value {
            let [teacher, student] = [self.teacher, &self.student.model].map(|model| Prefix::new(model, &[value]));
            let (teacher, student) = (teacher?, student?);
            self.teacher_at = self.store(|i| teacher.run_first(&self.batches[i]))?;
            self.student_at = self.store(|i| student.run_first(&self.batches[i]))?;
            value.clone_into(&mut self.at);
        }
        Ok(())
    }

    /// Fits a layer's approximator: the student's scores in, the teacher's probabilities out.
    fn layer_approximator(&mut self, index: usize) -> Result<()> {
        let layer = &self.encoder.layers[index];
        let scores = self.attention_part(&self.student.model, layer, &[&layer.attention.products])?;
        let probabilities = self.attention_part(self.teacher, layer, &[&layer.attention.probabilities])?;
        let approximator = self.student.approximators[index].clone();
        let groups = approximator.groups;
        let budget = self.options.fit_rows * if groups == 1 { POOLED } else { 1 };
        let rows = self.sample(groups, budget, layer, |i| {
            let scores = scores.run(&[&self.student_at.get(i)?, &self.masks[i]])?.remove(0);
            Ok((scores, probabilities.run(&[&self.teacher_at.get(i)?, &self.masks[i]])?.remove(0)))
        })?;
        self.fit(layer.site(LayerSite::Attention), &approximator, &rows, layer.index);
        Ok(())
    }

    /// Draws about `budget` rows a group from scores and probabilities, each `[batch, heads, n, n]`.
    fn sample(
        &self,
        groups: usize,
        budget: usize,
        layer: &Layer,
        values: impl Fn(usize) -> Result<(Tensor, Tensor)> + Sync,
    ) -> Result<Vec<Rows>> {
        let heads = layer.attention.heads;
        let first_token_only = self.first_token_only && self.is_last(layer);
        let queries: usize = self.batches.iter().map(Batch::tokens).sum();
        let sentences: usize = self.batches.iter().map(|b| b.lengths.iter().filter(|l| **l > 0).count()).sum();
        let of_group = |count: usize| (count * heads / groups).max(1) as f64;
        let share = budget as f64 / of_group(queries);
        let first_share = budget as f64 / of_group(sentences);
        let least = ROWS_A_SENTENCE.min(2.0 * budget as f64 / sentences.max(1) as f64);
        let of_batches = self.each(|i| {
            let (scores, probabilities) = values(i)?;
            let [scores, probabilities] = [scores, probabilities].map(array4);
            let mut rng = StdRng::seed_from_u64(self.options.seed ^ ((layer.index as u64) << 32) ^ i as u64);
            let mut rows = vec![Rows::default(); groups];
            for (sentence, &length) in self.batches[i].lengths.iter().enumerate() {
                // Without a mask all keys count, padding that a fixed length forces upon the model too.
                let keys = if self.encoder.mask.is_some() { length } else { self.batches[i].length };
                // However few its tokens, a sentence has a say: its length may be a rare one.
                let share = share.max(least / of_group(length));
                for head in 0..heads {
                    for query in 0..length {
                        let first = first_token_only && query == 0 && !self.batches[i].made_up[sentence];
                        let share = if first { first_share } else { share };
                        if rng.random_bool(share.min(1.0)) {
                            let row = |of: &ndarray::Array4<f32>| {
                                of.slice(ndarray::s![sentence, head, query, ..keys]).to_vec()
                            };
                            rows[head % groups].push(&row(&scores), &row(&probabilities));
                        }
                    }
                }
            }
            Ok(rows)
        })?;
        let mut all = vec![Rows::default(); groups];
        for rows in of_batches {
            all.iter_mut().zip(rows).for_each(|(all, rows)| all.append(rows));
        }
        Ok(all)
    }

    fn fit(&mut self, site: SiteId, approximator: &mabert_passes::lower::Approximator, rows: &[Rows], layer: usize) {
        let start = Instant::now();
        let options = self.student.options.approximator;
        let seed = self.options.seed ^ ((layer as u64) << 16);
        let fitted: Vec<_> = rows
            .par_iter()
            .enumerate()
            .map(|(group, rows)| fit::fit(rows, &options, self.options.fit_steps, seed ^ group as u64))
            .collect();
        let square = fitted.iter().map(|(_, error)| error * error).sum::<f64>() / fitted.len() as f64;
        let nets: Vec<_> = fitted.into_iter().map(|(net, _)| net).collect();
        fit::store(&mut self.student.model, approximator, &options, &nets);
        self.fit_seconds += start.elapsed().as_secs_f64();
        self.note(site, square.sqrt());
    }

    /// Solves for what lies between `linear`'s input and the norm: least squares of the teacher's values on the
    /// student's. `sum` is the norm's input.
    fn solve(
        &mut self,
        layer: &Layer,
        norm: SiteId,
        linear: &LinearSite,
        contexts: &Stored,
        sum: &str,
        target: &Stored,
    ) -> Result<()> {
        let affine = self.student.ran(Pass::Norm);
        let first_token_only = self.first_token_only && self.is_last(layer);
        // The context is given; the feed-forward part's own features are computed.
        let given = linear.input == layer.attention_output.input;
        let wanted: &[&str] = if given { &[sum] } else { &[sum, &linear.input] };
        let part = self.residual_part(layer, wanted)?;
        let mut sums = Regression::new(linear.inputs, linear.outputs);
        let all: Vec<usize> = (0..self.batches.len()).collect();
        for block in all.chunks(AT_ONCE) {
            let results: Vec<[Array2<f32>; 3]> = block
                .par_iter()
                .map(|&i| {
                    let batch = &self.batches[i];
                    let context = contexts.get(i)?;
                    let values = part.run(&[&self.student_at.get(i)?, &context])?;
                    let features = values.get(1).unwrap_or(&context);
                    Ok([features, &values[0], &target.get(i)?].map(|value| real(batch, value)))
                })
                .collect::<Result<_>>()?;
            let [z, r, y] = [0, 1, 2].map(|of| {
                let views: Vec<_> = results.iter().map(|values| values[of].view()).collect();
                ndarray::concatenate(Axis(0), &views).expect("as many columns")
            });
            let weights: Option<Vec<f64>> = first_token_only.then(|| {
                let first = self.first_token_weight() as f32;
                let of = |&i: &usize| real(&self.batches[i], &token_weights(&self.batches[i], first, 1)).into_iter();
                block.iter().flat_map(of).map(f64::from).collect()
            });
            sums.add(z.view(), r.view(), y.view(), weights.as_deref());
        }
        let unknowns = if affine { Unknowns::WeightAndAffine } else { Unknowns::WeightAndOffset };
        let found = sums.solve(unknowns).ok_or_else(|| not_finite(norm))?;
        self.add_to(&linear.weight, &found.weight.mapv(|v| v as f32).into_dyn())?;
        if affine {
            self.set_norm(norm, &found);
        } else {
            let bias = linear.bias_name.as_deref().expect("canonical maps have a bias");
            self.add_to(bias, &found.offset.mapv(|v| v as f32).into_dyn())?;
        }
        Ok(())
    }

    fn is_last(&self, layer: &Layer) -> bool {
        self.encoder.layers.last().is_some_and(|last| last.index == layer.index)
    }

    /// What the first token of a text counts where the others count 1, so that all of them together make up
    /// [`FIRST_TOKENS`] of the weight.
    fn first_token_weight(&self) -> f64 {
        let tokens: usize = self.batches.iter().map(Batch::tokens).sum();
        let sentences: usize = self.batches.iter().map(texts).sum();
        let others = (tokens - sentences).max(1) as f64;
        (FIRST_TOKENS / (1.0 - FIRST_TOKENS) * others / sentences.max(1) as f64).max(1.0)
    }

    fn add_to(&mut self, constant: &str, change: &ArrayD<f32>) -> Result<()> {
        let value = self.student.model.constant(constant)?.to_f32() + change;
        self.student.model.set_constant(constant, &Tensor::from(value));
        Ok(())
    }

    fn set_norm(&mut self, norm: SiteId, found: &Solution) {
        let [scale, offset] = norm_parameters(norm);
        for (name, values) in [(scale, &found.scale), (offset, &found.offset)] {
            let narrow = values.iter().map(|&v| v as f32).collect();
            self.student.model.set_constant(&name, &Tensor::new(&[values.len()], narrow));
        }
    }

    /// The layer from its input and the mask.
    fn attention_part(&self, model: &Model, layer: &Layer, outputs: &[&str]) -> Result<Part> {
        Part::new(model, &[(&layer.input, Some(layer.query.inputs)), (MASK, None)], outputs)
    }

    /// The student's layer from its input and the context.
    fn residual_part(&self, layer: &Layer, outputs: &[&str]) -> Result<Part> {
        let context = &layer.attention_output;
        let inputs = [(layer.input.as_str(), Some(layer.query.inputs)), (&context.input, Some(context.inputs))];
        Part::new(&self.student.model, &inputs, outputs)
    }

    /// `run` on every batch, in parallel.
    fn each<T: Send>(&self, run: impl Fn(usize) -> Result<T> + Sync + Send) -> Result<Vec<T>> {
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
            error.add(real(batch, &student.get(i)?).view(), real(batch, &teacher.get(i)?).view());
        }
        Ok(error.value())
    }

    fn note(&mut self, site: SiteId, relative_error: f64) {
        self.sites.push(SiteError { site, relative_error });
    }
}

fn not_finite(site: SiteId) -> Error {
    let reason = "its statistics are not finite; the model's activations overflow on this data".to_owned();
    Error::Calibration { site: site.to_string(), reason }
}

fn ones(shape: &[usize]) -> Tensor {
    Tensor::new(shape, vec![1f32; shape.iter().product()])
}

/// Sequences of a batch that are text.
fn texts(batch: &Batch) -> usize {
    batch.lengths.iter().zip(&batch.made_up).filter(|(length, made_up)| **length > 0 && !**made_up).count()
}

/// What each token counts, `[batch, n, 1]`: nothing in padding and in sequences shorter than `shortest`, `first` at the
/// start of a text.
fn token_weights(batch: &Batch, first: f32, shortest: usize) -> Tensor {
    let weight = |at: usize| {
        let (row, token) = (at / batch.length, at % batch.length);
        let length = batch.lengths[row];
        match token {
            _ if token >= length || length < shortest => 0.0,
            0 if !batch.made_up[row] => first,
            _ => 1.0,
        }
    };
    let weights = (0..batch.size() * batch.length).map(weight).collect();
    Tensor::new(&[batch.size(), batch.length, 1], weights)
}

/// The rows of real tokens of a value `[batch, n, channels]`, `[tokens, channels]`.
fn real(batch: &Batch, value: &Tensor) -> Array2<f32> {
    let value = value.as_f32().expect("the stream is f32");
    let channels = *value.shape().last().expect("the stream has three axes");
    let rows = value.to_shape((batch.size() * batch.length, channels)).expect("[batch, n, channels]");
    let kept: Vec<usize> =
        (0..batch.size() * batch.length).filter(|at| at % batch.length < batch.lengths[at / batch.length]).collect();
    rows.select(Axis(0), &kept)
}

fn array4(value: Tensor) -> ndarray::Array4<f32> {
    value.to_f32().into_dimensionality::<Ix4>().expect("[batch, heads, n, n]")
}
