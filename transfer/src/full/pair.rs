//! Teacher and student side by side: what both make of the sequences of a step, and how far they are apart.

use std::sync::{Arc, Mutex, PoisonError};

use mabert_graph::{Boundary, ElementType};
use mabert_passes::lower::MASK;
use mabert_passes::pipeline::Student;
use mabert_runtime::{Tensor, TensorType};
use rayon::prelude::*;

use super::criterion::{Compared, Criterion, Head, Source, TextVectors};
use super::labels::Target;
use super::losses::{Losses, Totals, Weights};
use super::text_vectors::{Given, Spread, text_vectors};
use super::variance::Variance;
use super::{Training, parameters};
use crate::Result;
use crate::data::{Batch, BatchShape, Sequence, batches};
use crate::gradient::{AdamW, Buffers, Gradient, Graph, HingeSite, Trained, Value, from_candle, to_candle, to_value};
use crate::heads::RowUnit;
use crate::part::Prefix;
use crate::pooling::Features;

/// Some sequences side by side, with their labels.
pub(super) struct Piece {
    batch: Batch,
    labels: Vec<Option<Target>>,
}

/// Positions of one piece of a step, about: more would only take memory.
pub(super) const PIECE: usize = 512;
/// Of what the teacher gives: before it come the student's inputs.
const FIRST_COMPARED: usize = 2;
/// Sequences that tell the shapes and variances of the teacher's values.
const TOLD_BY: usize = 256;
/// Gradients are scaled down to this norm.
const CLIP: f32 = 1.0;

/// Teacher and student, from tokens to all that is compared.
pub(super) struct Pair {
    shape: BatchShape,
    /// Where the student starts: the sum of the embeddings, which is the teacher's too and is not trained.
    entry: String,
    teacher: Prefix,
    pub(super) graph: Graph,
    /// Of the student, in the order of the graph.
    inputs: Vec<TensorType>,
    /// Layers whose attention is compared.
    attentions: usize,
    pub(super) criterion: Criterion,
}

/// What is compared, by the values' names.
struct Names<'n> {
    norms: &'n [&'n str],
    /// Those of norms that are outputs of the model.
    at_norms: &'n [&'n str],
    /// The model's other outputs.
    outputs: &'n [&'n str],
}

impl<'n> Names<'n> {
    /// The model's outputs, with what the teacher gives at norms and outputs.
    fn given(&self, at_norms: &'n [Tensor], at_outputs: &'n [Tensor]) -> Vec<Given<'n>> {
        let norms = self.norms.iter().zip(at_norms).enumerate().map(|(at, (n, v))| (Source::Norm(at), *n, v));
        let outputs = self.outputs.iter().zip(at_outputs).enumerate();
        let shown = norms.filter(|(_, name, _)| self.at_norms.contains(name));
        shown.chain(outputs.map(|(at, (n, v))| (Source::Output(at), *n, v))).collect()
    }
}

impl Pair {
    pub(super) fn new(training: &Training<'_>, student: &Student) -> Result<Self> {
        let Training { rewriting, data, options, features } = training;
        let encoder = &rewriting.encoder;
        let entry = encoder.embedding_norm.input.clone();
        let norms: Vec<&str> = encoder.norms().into_iter().map(|(_, site)| site.output.as_str()).collect();
        let attentions: Vec<&str> = match options.attention_weight > 0.0 {
            true => encoder.layers.iter().map(|l| l.attention.probabilities.as_str()).collect(),
            false => Vec::new(),
        };
        let outputs = student.model.outputs();
        let whole = |output: &TensorType| {
            matches!(output.element, Some(ElementType::I64 | ElementType::I32 | ElementType::Bool))
        };
        let outputs: Vec<&str> = outputs.iter().filter(|o| !whole(o)).map(|o| o.name.as_str()).collect();
        // An output that is a norm's value is compared there.
        let (at_norms, outputs): (Vec<&str>, Vec<&str>) = outputs.into_iter().partition(|o| norms.contains(o));
        let compared: Vec<&str> = norms.iter().chain(&attentions).chain(&outputs).copied().collect();
        // A model without a mask attends to padding too: its mask is what it makes of its inputs, whatever that is.
        let wanted: Vec<&str> = [entry.as_str(), MASK].into_iter().chain(compared.iter().copied()).collect();
        let teacher = Prefix::new(&rewriting.teacher, &wanted)?;

        let boundary = |name: &str, dims: &[&str]| Boundary::symbolic(name, ElementType::F32, dims);
        let channels = encoder.embedding_norm.gamma.len();
        let cuts = [boundary(&entry, &["batch", "n", &channels.to_string()]), boundary(MASK, &["batch", "n"])];
        let part = student.model.extract_from_inputs(&cuts, &compared)?;
        let inputs = part.inputs();
        let names: Vec<&str> = inputs.iter().map(|i| i.name.as_str()).collect();
        let mut there = parameters::parameters(&rewriting.teacher, student)?;
        there.retain(|name| part.initializer(name).is_some());
        let graph = Graph::new(&part, &names, &compared, &there, &HingeSite::all(student))?;

        let mut pair = Self {
            shape: data.shape.clone(),
            entry,
            teacher,
            graph,
            inputs,
            attentions: attentions.len(),
            criterion: Criterion::new(Weights::from(*options)),
        };
        let names = Names { norms: &norms, at_norms: &at_norms, outputs: &outputs };
        pair.look_at_teacher(data.sequences, &names, features)?;
        pair.criterion.choose_labelled(data.labels)?;
        Ok(pair)
    }

    /// The kinds of the outputs, and the variances by which errors are measured.
    fn look_at_teacher(&mut self, sequences: &[Sequence], names: &Names<'_>, features: &Features) -> Result<()> {
        let Names { norms, outputs, .. } = names;
        let mut spread = Spread::default();
        let first = FIRST_COMPARED + norms.len() + self.attentions;
        let mut shapes: Vec<Vec<(usize, Vec<usize>)>> = vec![Vec::new(); outputs.len()];
        // Of texts and of tokens: which of them an output has is not known yet.
        let mut variances = vec![[Variance::default(), Variance::default()]; norms.len() + outputs.len()];
        // One piece after the other: all values of a few are much, those of many too much.
        for piece in self.pieces(&sequences[..sequences.len().min(TOLD_BY)], PIECE, usize::MAX)? {
            let values = self.teacher.run(&piece.batch)?;
            let (at_norms, at_outputs) = (&values[FIRST_COMPARED..][..norms.len()], &values[first..]);
            if self.criterion.vectors.is_none() {
                self.criterion.vectors = text_vectors(features, &names.given(at_norms, at_outputs), &piece.batch)?;
            }
            if let Some(TextVectors { source, pooling, .. }) = self.criterion.vectors {
                let value = match source {
                    Source::Norm(at) => &at_norms[at],
                    Source::Output(at) => &at_outputs[at],
                };
                spread.add(value, &piece.batch, pooling);
            }
            for (variance, value) in variances.iter_mut().zip(at_norms.iter().chain(at_outputs)) {
                variance[0].add(value, &piece.batch, RowUnit::Text);
                variance[1].add(value, &piece.batch, RowUnit::Token);
            }
            for (shapes, value) in shapes.iter_mut().zip(at_outputs) {
                shapes.push((piece.batch.length, value.shape().to_vec()));
            }
        }
        if let Some(vectors) = &mut self.criterion.vectors {
            vectors.spread = spread.value();
        }
        let output_variances = variances.split_off(norms.len());
        self.criterion.variances = variances.iter().map(|[_, tokens]| tokens.value()).collect();
        let head = |((name, shapes), [texts, tokens]): ((&&str, &Vec<_>), &[Variance; 2])| {
            let kind = features.kind(name, shapes);
            let variance = match kind.row_unit() {
                RowUnit::Token => tokens,
                RowUnit::Text => texts,
            };
            let dims = &shapes[0].1;
            let columns = match kind.row_unit() {
                RowUnit::Token => dims.last().copied().unwrap_or(1),
                RowUnit::Text => dims.iter().skip(1).product(),
            };
            Head { name: (*name).to_owned(), kind, columns, variance: variance.value() }
        };
        self.criterion.heads = outputs.iter().zip(&shapes).zip(&output_variances).map(head).collect();
        Ok(())
    }

    pub(super) fn optimizer(&self, student: &Student, rate: f32, weight_decay: f32) -> Result<AdamW> {
        let encoder = &student.encoder;
        let maps = encoder.layers.iter().flat_map(|l| {
            [&l.query, &l.key, &l.value, &l.attention_output, &l.intermediate, &l.output].map(|m| m.weight.as_str())
        });
        let decaying: Vec<&str> = maps.chain(encoder.embedding_projection.iter().map(|m| m.weight.as_str())).collect();
        let trained = self.graph.variables().map(|(name, variable)| Trained {
            variable: variable.clone(),
            rate,
            decay: if decaying.contains(&name) { weight_decay } else { 0.0 },
        });
        AdamW::new(trained, CLIP)
    }

    /// Writes the trained parameters into the student.
    pub(super) fn store(&self, student: &mut Student) -> Result<()> {
        for (name, variable) in self.graph.variables() {
            student.model.set_constant(name, &from_candle(variable)?);
        }
        Ok(())
    }

    /// Sequences cut into pieces of at most so many positions or rows.
    ///
    /// # Errors
    /// The head does not know a label.
    pub(super) fn pieces(&self, sequences: &[Sequence], positions: usize, rows: usize) -> Result<Vec<Piece>> {
        let label = |row: &usize| self.criterion.label(&sequences[*row]);
        let piece = |batch: Batch| Ok(Piece { labels: batch.rows.iter().map(label).collect::<Result<_>>()?, batch });
        batches(sequences, positions, rows, &self.shape).into_iter().map(piece).collect()
    }

    /// Sequences of like lengths cut into pieces of as many rows, about as many pieces a thread.
    pub(super) fn even_pieces(&self, sequences: &[Sequence], threads: usize) -> Result<Vec<Piece>> {
        let longest = sequences.iter().map(|s| s.ids.len()).max().unwrap_or(1);
        let longest = self.shape.length.unwrap_or(longest);
        let count = (sequences.len() * longest).div_ceil(PIECE).next_multiple_of(threads);
        self.pieces(sequences, usize::MAX, sequences.len().div_ceil(count))
    }

    pub(super) fn totals(&self, pieces: &[Piece]) -> Totals {
        let mut totals = Totals::default();
        for piece in pieces {
            totals.add(&piece.batch);
            totals.labels += piece.labels.iter().flatten().map(Target::count).sum::<usize>();
        }
        totals
    }

    /// The loss of one piece.
    fn loss(
        &self,
        piece: &Piece,
        totals: &Totals,
        gradient: Option<&Arc<Gradient>>,
    ) -> Result<(candle_core::Tensor, Losses)> {
        let batch = &piece.batch;
        let mut teacher_values = self.teacher.run(batch)?.into_iter();
        let [stream, mask] =
            [teacher_values.next(), teacher_values.next()].map(|value| value.expect("they come first"));
        let input = |input: &TensorType| match input.name.as_str() {
            MASK => Ok(Value::Real(to_candle(&mask)?)),
            name if name == self.entry => Ok(Value::Real(to_candle(&stream)?)),
            _ => to_value(&batch.inputs(std::slice::from_ref(input))?.remove(0).1),
        };
        let inputs: Vec<Value> = self.inputs.iter().map(input).collect::<Result<_>>()?;
        let student_values = self.graph.run(&inputs, gradient)?;
        let both = student_values.into_iter().zip(teacher_values).map(|(s, t)| Ok((s, to_candle(&t)?)));
        let mut hidden = both.collect::<Result<Vec<_>>>()?;
        let mut attention = hidden.split_off(self.criterion.variances.len());
        let outputs = attention.split_off(self.attentions);
        let compared = Compared { batch, labels: &piece.labels, hidden, attention, outputs };
        self.criterion.loss(&compared, totals)
    }

    pub(super) fn gradient(
        &self,
        buffers: &Buffers,
        pieces: &[Piece],
        totals: &Totals,
    ) -> Result<(Vec<Vec<f32>>, Losses)> {
        let losses = Mutex::new(vec![Losses::default(); pieces.len()]);
        let numbered: Vec<(usize, &Piece)> = pieces.iter().enumerate().collect();
        let gradient = buffers.gradients(&self.graph, &numbered, |(at, piece), gradient| {
            let (loss, parts) = self.loss(piece, totals, Some(gradient))?;
            losses.lock().unwrap_or_else(PoisonError::into_inner)[*at] = parts;
            Ok(loss)
        })?;
        let parts = losses.into_inner().unwrap_or_else(PoisonError::into_inner);
        Ok((gradient, Losses::sum(&parts)))
    }

    /// The losses over pieces, without a step.
    pub(super) fn losses(&self, pieces: &[Piece]) -> Result<Losses> {
        let totals = self.totals(pieces);
        let parts: Vec<Losses> =
            pieces.par_iter().map(|p| Ok(self.loss(p, &totals, None)?.1)).collect::<Result<_>>()?;
        Ok(Losses::sum(&parts))
    }
}
