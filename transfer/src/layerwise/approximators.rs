//! Fits the approximators: which rows of scores and probabilities they are fitted to, and where their parameters go.

use std::time::Instant;

use mabert_graph::Tensor;
use mabert_passes::lower::{Approximator, ApproximatorOptions, Form, Sharing};
use mabert_passes::pipeline::Pass;
use mabert_passes::sites::{Layer, LayerSite, SiteId};
use ndarray::{Array4, Ix4};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use rayon::prelude::*;

use super::network::Network;
use super::rows::Rows;
use super::token_weights::TokenWeights;
use super::walk::Walk;
use super::{fit, hinges};
use crate::Result;
use crate::data::Batch;
use crate::part::Prefix;

/// An approximator that serves several heads is fitted to this many times the rows.
const POOLED: usize = 4;

/// Every sentence is represented by this many rows, or by all that it has; by fewer where these would be more than
/// twice the rows drawn evenly.
const ROWS_A_SENTENCE: f64 = 4.0;

/// Scores, and the probabilities that they should give, `[batch, heads, n, n]` each.
struct Attention {
    scores: Tensor,
    probabilities: Tensor,
}

impl Walk<'_> {
    /// One approximator for all layers is fitted to the teacher's own scores: the student has none yet.
    pub(super) fn fit_shared_approximator(&mut self) -> Result<()> {
        if !self.shares_approximator() {
            return Ok(());
        }
        let mut all = Rows::default();
        for layer in &self.encoder.layers {
            let prefix = Prefix::new(self.teacher, &[&layer.input])?;
            let values = [layer.attention.products.as_str(), &layer.attention.probabilities];
            let part = self.attention_part(self.teacher, layer, &values)?;
            let budget = POOLED * self.options.fit_rows / self.encoder.layers.len();
            let groups = self.draw_rows(layer, &Draw::new(self, layer, 1, budget), |i| {
                let mut values = part.run(&[&prefix.run_first(&self.batches[i])?, &self.masks[i]])?;
                Ok(Attention { scores: values.remove(0), probabilities: values.remove(0) })
            })?;
            groups.into_iter().for_each(|rows| all.append(rows));
        }
        let (networks, errors) = self.fit_networks(&[all], 0, 1);
        self.keep(SiteId::SharedNetwork, 0, FittedLayer::Networks(networks, errors));
        Ok(())
    }

    /// Fits a layer's own approximator, where it has one: the student's scores in, the teacher's probabilities out.
    pub(super) fn fit_layer_approximator(&mut self, index: usize) -> Result<()> {
        if !self.has_own_approximator() {
            return Ok(());
        }
        if let Some(weighing) = self.options.weighing {
            return self.fit_cheapest(index, weighing);
        }
        let fitted = match self.student.approximators[index].form() {
            Form::Hinges => self.hinges_of(index).map(|(fitted, errors)| FittedLayer::Hinges(fitted, errors))?,
            Form::Network => {
                self.networks_of(index, 1).map(|(fitted, errors)| FittedLayer::Networks(fitted, errors))?
            }
        };
        self.keep(self.encoder.layers[index].site(LayerSite::Attention), index, fitted);
        Ok(())
    }

    /// Hinges of a layer's heads, fitted to what they should make of the student's values too; and the error of each.
    pub(super) fn hinges_of(&mut self, index: usize) -> Result<(Vec<hinges::FittedHinges>, Vec<f64>)> {
        let heads = self.samples(index, hinges::Scores::FromTheirMean)?;
        let start = Instant::now();
        let options = self.approximator_options(Form::Hinges);
        let lengths = options.length_features();
        let (steps, seed) = (self.options.hinge_steps, self.options.seed ^ ((index as u64) << 16));
        let fitted = heads
            .into_par_iter()
            .enumerate()
            .map(|(head, samples)| hinges::fit(samples, options.hinges, &lengths, steps, seed ^ head as u64))
            .unzip();
        self.fit_seconds += start.elapsed().as_secs_f64();
        Ok(fitted)
    }

    /// Rows of the student's scores in a layer with the teacher's probabilities and the student's values, head by head.
    fn samples(&self, index: usize, scores: hinges::Scores) -> Result<Vec<Vec<hinges::Sample>>> {
        let layer = &self.encoder.layers[index];
        let site = &layer.attention;
        let student = self.attention_part(&self.student.model, layer, &[&site.products, &site.value])?;
        let teacher = self.attention_part(self.teacher, layer, &[&site.probabilities])?;
        let queries: usize = self.batches.iter().map(Batch::tokens).sum();
        let draw = hinges::Draw {
            share: (self.options.hinge_rows as f64 / queries.max(1) as f64).min(1.0),
            first_token: self.first_token_weights(layer).map(TokenWeights::first),
            masked: self.encoder.mask.is_some(),
            scores,
        };
        let batch_samples = self.each(|i| {
            let values = student.run(&[&self.student_stream.get(i)?, &self.masks[i]])?;
            let probabilities = teacher.run(&[&self.teacher_stream.get(i)?, &self.masks[i]])?.remove(0);
            let seed = self.options.seed ^ ((index as u64) << 32) ^ i as u64;
            Ok(draw.samples(&self.batches[i], [&values[0], &probabilities, &values[1]], seed))
        })?;
        let mut heads = vec![Vec::new(); site.heads];
        for samples in batch_samples {
            heads.iter_mut().zip(samples).for_each(|(all, samples)| all.extend(samples));
        }
        Ok(heads)
    }

    /// How far the contexts of networks are from the teacher's, head by head, on the samples that hinges are fitted to.
    fn context_errors(&self, index: usize, networks: &[Network]) -> Result<Vec<f64>> {
        let options = self.approximator_options(Form::Network);
        let heads = self.samples(index, hinges::Scores::AsTheyAre)?;
        let error = |(head, samples): (usize, &Vec<hinges::Sample>)| {
            let network = &networks[head % networks.len()];
            hinges::context_error(samples, |scores| fit::probabilities(network, &options, scores))
        };
        Ok(heads.par_iter().enumerate().map(error).collect())
    }

    /// The networks of a layer, fitted with a `part`th of the rows and steps; and the error of each head.
    pub(super) fn networks_of(&mut self, index: usize, part: usize) -> Result<(Vec<Network>, Vec<f64>)> {
        let layer = &self.encoder.layers[index];
        let scores = self.attention_part(&self.student.model, layer, &[&layer.attention.products])?;
        let probabilities = self.attention_part(self.teacher, layer, &[&layer.attention.probabilities])?;
        let is_pooled = self.student.options.approximator.sharing != Sharing::PerHead;
        let groups = if is_pooled { 1 } else { layer.attention.heads };
        let budget = self.options.fit_rows / part * if groups == 1 { POOLED } else { 1 };
        let rows = self.draw_rows(layer, &Draw::new(self, layer, groups, budget), |i| {
            let scores = scores.run(&[&self.student_stream.get(i)?, &self.masks[i]])?.remove(0);
            let probabilities = probabilities.run(&[&self.teacher_stream.get(i)?, &self.masks[i]])?.remove(0);
            Ok(Attention { scores, probabilities })
        })?;
        let (networks, _) = self.fit_networks(&rows, layer.index, part);
        let errors = self.context_errors(index, &networks)?;
        Ok((networks, errors))
    }

    /// What approximators of a form look like in the student.
    fn approximator_options(&self, form: Form) -> ApproximatorOptions {
        ApproximatorOptions { form, ..self.student.options.approximator }
    }

    /// Whether each layer has an approximator that is not another's too.
    fn has_own_approximator(&self) -> bool {
        self.student.ran(Pass::Softmax) && !self.shares_approximator()
    }

    /// Whether one network serves all layers.
    fn shares_approximator(&self) -> bool {
        let options = &self.student.options.approximator;
        self.student.ran(Pass::Softmax) && options.form == Form::Network && options.sharing == Sharing::Shared
    }

    /// The initializers of a layer's approximator that may be trained with the layer: one that all layers share must not
    /// be bent to one of them.
    pub(super) fn approximator_parameters(&self, index: usize) -> Vec<String> {
        if !self.has_own_approximator() {
            return Vec::new();
        }
        let all = self.student.approximators[index].parameters();
        all.into_iter().filter(|name| self.student.model.initializer(name).is_some()).cloned().collect()
    }

    /// Draws rows of a layer's attention, a group of heads at a time.
    fn draw_rows(
        &self,
        layer: &Layer,
        draw: &Draw,
        attention: impl Fn(usize) -> Result<Attention> + Sync,
    ) -> Result<Vec<Rows>> {
        let masked = self.encoder.mask.is_some();
        let batch_rows = self.each(|i| {
            let seed = self.options.seed ^ ((layer.index as u64) << 32) ^ i as u64;
            Ok(draw.rows(&self.batches[i], masked, attention(i)?, seed))
        })?;
        let mut all = vec![Rows::default(); draw.groups];
        for groups in batch_rows {
            all.iter_mut().zip(groups).for_each(|(all, rows)| all.append(rows));
        }
        Ok(all)
    }

    /// Fits networks, group by group, with a `part`th of the steps; gives the error of each one's probabilities too.
    fn fit_networks(&mut self, groups: &[Rows], layer: usize, part: usize) -> (Vec<Network>, Vec<f64>) {
        let start = Instant::now();
        let options = self.approximator_options(Form::Network);
        let (steps, seed) = (self.options.fit_steps / part, self.options.seed ^ ((layer as u64) << 16));
        let fitted = groups
            .par_iter()
            .enumerate()
            .map(|(group, rows)| fit::fit(rows, &options, steps, seed ^ group as u64))
            .unzip();
        self.fit_seconds += start.elapsed().as_secs_f64();
        fitted
    }

    /// Puts what was fitted where the student has the approximator with that number, and notes how far it is off.
    pub(super) fn keep(&mut self, site: SiteId, number: usize, fitted: FittedLayer) {
        let options = self.approximator_options(Form::Network);
        let errors = match (fitted, self.student.approximators[number].clone()) {
            (FittedLayer::Hinges(fitted, errors), Approximator::Hinges(parameters)) => {
                hinges::store(&mut self.student.model, &parameters, fitted);
                errors
            }
            (FittedLayer::Networks(networks, errors), Approximator::Network(parameters)) => {
                fit::store(&mut self.student.model, &parameters, &options, &networks);
                errors
            }
            _ => unreachable!("the student has the form that was fitted"),
        };
        self.note(site, mean_square(&errors).sqrt());
    }
}

/// A layer's approximator with the error of each head's contexts, as in [`SiteError`](super::SiteError); one for all layers
/// has that of its probabilities.
pub(super) enum FittedLayer {
    Hinges(Vec<hinges::FittedHinges>, Vec<f64>),
    Networks(Vec<Network>, Vec<f64>),
}

pub(super) fn mean_square(errors: &[f64]) -> f64 {
    errors.iter().map(|error| error * error).sum::<f64>() / errors.len() as f64
}

/// How likely a row is drawn: the scores of one head and query.
struct Draw {
    heads: usize,
    /// Groups of heads, each of which has an approximator of its own.
    groups: usize,
    /// Of any row.
    share: f64,
    /// Of a text's first token, where the head reads it alone.
    first_share: Option<f64>,
    /// Rows of a sentence in a group, on average at least.
    rows_a_sentence: f64,
}

impl Draw {
    /// Draws about `budget` rows a group.
    fn new(walk: &Walk<'_>, layer: &Layer, groups: usize, budget: usize) -> Self {
        let heads = layer.attention.heads;
        let queries: usize = walk.batches.iter().map(Batch::tokens).sum();
        let sentences: usize = walk.batches.iter().map(|b| b.lengths.iter().filter(|l| **l > 0).count()).sum();
        let share = |count: usize| budget as f64 / rows_in_group(count, heads, groups);
        Self {
            heads,
            groups,
            share: share(queries),
            first_share: walk.first_token_weights(layer).map(|_| share(sentences)),
            rows_a_sentence: ROWS_A_SENTENCE.min(2.0 * budget as f64 / sentences.max(1) as f64),
        }
    }

    /// Rows of one batch, group by group. Without a mask all keys count, padding that a fixed length forces upon the
    /// model too.
    fn rows(&self, batch: &Batch, masked: bool, attention: Attention, seed: u64) -> Vec<Rows> {
        let [scores, probabilities] = [attention.scores, attention.probabilities].map(array4);
        let mut rng = StdRng::seed_from_u64(seed);
        let mut rows = vec![Rows::default(); self.groups];
        for (sentence, &length) in batch.lengths.iter().enumerate() {
            let keys = if masked { length } else { batch.length };
            // However few its tokens, a sentence has a say: its length may be a rare one.
            let share = self.share.max(self.rows_a_sentence / rows_in_group(length, self.heads, self.groups));
            for head in 0..self.heads {
                for query in 0..length {
                    let is_first = query == 0 && !batch.made_up[sentence];
                    let share = self.first_share.filter(|_| is_first).unwrap_or(share);
                    if rng.random_bool(share.min(1.0)) {
                        let row =
                            |values: &Array4<f32>| values.slice(ndarray::s![sentence, head, query, ..keys]).to_vec();
                        rows[head % self.groups].push(&row(&scores), &row(&probabilities));
                    }
                }
            }
        }
        rows
    }
}

/// Rows of so many queries, in each group.
fn rows_in_group(queries: usize, heads: usize, groups: usize) -> f64 {
    (queries * heads / groups).max(1) as f64
}

fn array4(value: Tensor) -> Array4<f32> {
    value.to_f32().into_dimensionality::<Ix4>().expect("[batch, heads, n, n]")
}
