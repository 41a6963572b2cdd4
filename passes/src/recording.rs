//! One small run of a model with every value kept: concrete shapes for the recogniser, symbolic ones for people.

use std::collections::HashMap;

use mabert_graph::text::Shapes;
use mabert_graph::{Dependence, Index, Model, Tensor};
use mabert_runtime::{LoadOptions, Named, Taps, borrowed};

use crate::inputs::EncoderInputs;
use crate::{Error, Result, fixed_sizes};

/// Every value of one run.
#[derive(Debug)]
pub struct Recording {
    values: HashMap<String, Tensor>,
    /// The model's inputs, and what they hold.
    pub inputs: EncoderInputs,
    /// Sentences in the run.
    pub batch: usize,
    /// Tokens in each sentence.
    pub length: usize,
}

impl Recording {
    /// Runs `model` on made-up sentences and keeps every value. Where the model takes no sentence of `length` tokens, they
    /// are as long as it takes.
    ///
    /// # Errors
    /// The model cannot be run, or its inputs are not those of an encoder.
    pub fn new(model: &Model, batch: usize, length: usize) -> Result<Self> {
        Ok(Self::with_runnable(model, batch, length)?.0)
    }

    /// As [`Self::new`], for a model that must take every batch size and length that its inputs declare.
    ///
    /// # Errors
    /// As those of [`Self::new`] and [`check_sizes`].
    pub fn at_any_size(model: &Model, batch: usize, length: usize) -> Result<Self> {
        let (recording, runnable) = Self::with_runnable(model, batch, length)?;
        check_sizes(model, &recording.inputs, &runnable, (recording.batch, recording.length))?;
        Ok(recording)
    }

    fn with_runnable(model: &Model, batch: usize, length: usize) -> Result<(Self, mabert_runtime::Model)> {
        let runnable = LoadOptions::default().taps(Taps::Everything).prepare(model)?;
        let encoder_inputs = EncoderInputs::new(model, &[])?;
        let run = |length: usize| -> Result<(Named, Named)> {
            let inputs = encoder_inputs.made_up(batch, length, 1)?;
            let values = runnable.run(&borrowed(&inputs))?;
            Ok((values, inputs))
        };
        let fails = |error: Error, length: usize| match error {
            Error::Runtime(source @ mabert_runtime::Error::Engine { .. }) => {
                fails(model, &encoder_inputs, &runnable, (batch, length), source)
            }
            Error::Runtime(source @ mabert_runtime::Error::Shape { .. }) => no_sentences(model.origin(), &source),
            other => other,
        };
        let (values, inputs) = match run(length) {
            Err(Error::Runtime(mabert_runtime::Error::TooLong { limit, .. })) => {
                run(limit).map_err(|e| fails(e, limit))?
            }
            other => other.map_err(|e| fails(e, length))?,
        };
        let mut values: HashMap<String, Tensor> = values.into_iter().collect();
        let (batch, length) = inputs
            .iter()
            .find(|(_, t)| t.shape().len() == 2)
            .map_or((batch, length), |(_, t)| (t.shape()[0], t.shape()[1]));
        values.extend(inputs);
        Ok((Self { values, inputs: encoder_inputs, batch, length }, runnable))
    }

    /// A value of the run.
    pub fn value(&self, name: &str) -> Option<&Tensor> {
        self.values.get(name)
    }

    /// The shape that a value had in the run; empty for values that it did not have.
    pub fn shape(&self, name: &str) -> &[usize] {
        self.values.get(name).map_or(&[], Tensor::shape)
    }
}

/// What to say of a model that fails on `batch` sentences of `length` tokens: whether a size was fixed inside it, other
/// sizes tell.
fn fails(
    model: &Model,
    inputs: &EncoderInputs,
    runnable: &mabert_runtime::Model,
    asked: (usize, usize),
    source: mabert_runtime::Error,
) -> Error {
    // Inputs of fixed sizes have no others.
    let tried = fixed_sizes::taken(inputs, asked).unwrap_or(asked);
    failure(inputs, tried, fixed_sizes::in_words(model, inputs, runnable, tried), source)
}

fn failure(
    inputs: &EncoderInputs,
    (batch, length): (usize, usize),
    but: String,
    source: mabert_runtime::Error,
) -> Error {
    Error::Fails { origin: inputs.origin().to_owned(), batch, length, but, source: Box::new(source.without_model()) }
}

/// What is said of inputs that no sentences fit, as those of a product of two matrices.
fn no_sentences(origin: &str, fault: &mabert_runtime::Error) -> Error {
    let reason = format!("its inputs are not all [batch, length], as those of sentences are ({fault})");
    Error::NotBert { origin: origin.to_owned(), reason }
}

/// Runs a model on `batch` sentences of `length` tokens, on one more, and on longer ones, as far as its inputs declare
/// that it takes them.
///
/// # Errors
/// It takes one batch size or length only: that was fixed inside it.
pub fn check_sizes(
    model: &Model,
    inputs: &EncoderInputs,
    runnable: &mabert_runtime::Model,
    (batch, length): (usize, usize),
) -> Result<()> {
    let run = |batch: usize, length: usize, but: Option<String>| -> Result<()> {
        match (runnable.run(&borrowed(&inputs.made_up(batch, length, 1)?)), but) {
            (Err(source @ mabert_runtime::Error::Engine { .. }), Some(but)) => {
                Err(failure(inputs, (batch, length), but, source))
            }
            (Err(source @ mabert_runtime::Error::Engine { .. }), None) => {
                Err(fails(model, inputs, runnable, (batch, length), source))
            }
            (Err(source @ mabert_runtime::Error::Shape { .. }), _) => Err(no_sentences(inputs.origin(), &source)),
            // Too long, say: that is no matter of sizes alone.
            _ => Ok(()),
        }
    };
    run(batch, length, None)?;
    for (axis, more, longer) in [("batch size", 1, 0), ("length", 0, 1)] {
        let but = format!(
            ", though it runs on {batch} of {length}, and its inputs declare any {axis}: that size was fixed inside it when \
             it was exported; export it with that axis dynamic, or declare its inputs at the size that it takes"
        );
        run(batch + more, length + longer, Some(but))?;
    }
    Ok(())
}

/// The longest sequence that a model takes, at most `most` (or what its inputs fix), and what sets the limit where one
/// is met. The model is run once, or until the limit is found.
///
/// # Errors
/// The inputs are not those of an encoder, or it takes no sequence at all.
pub fn longest_sequence(
    inputs: &EncoderInputs,
    runnable: &mabert_runtime::Model,
    most: usize,
) -> Result<(usize, Option<String>)> {
    let takes = |length: usize| -> Result<std::result::Result<usize, mabert_runtime::Error>> {
        let inputs = inputs.made_up(1, length, 1)?;
        let length = inputs.iter().find(|(_, t)| t.shape().len() == 2).map_or(length, |(_, t)| t.shape()[1]);
        Ok(runnable.run(&borrowed(&inputs)).map(|_| length))
    };
    use mabert_runtime::Error as Run;
    let may_be_long = |error: &Run| matches!(error, Run::Engine { .. } | Run::Index { .. });
    match takes(most)? {
        Ok(length) => Ok((length, None)),
        Err(Run::TooLong { limit, limited_by, .. }) => Ok((limit, Some(limited_by))),
        // A table of positions may be cut to the length of the text by any operator, which fails beyond its end; or
        // positions are an input.
        Err(error) if may_be_long(&error) => {
            let (mut good, mut bad) = (0, most);
            while bad - good > 1 {
                let middle = good.midpoint(bad);
                *(if takes(middle)?.is_ok() { &mut good } else { &mut bad }) = middle;
            }
            if good == 0 {
                return Err(error.into());
            }
            Ok((good, Some(format!("beyond it, {error}"))))
        }
        Err(other) => Err(other.into()),
    }
}

/// The dimensions of every value as numbers and symbols (`B` sentences, `N` tokens), found by running the model at two
/// sizes.
///
/// # Errors
/// The model cannot be run.
pub fn symbolic_shapes(model: &Model) -> Result<Shapes> {
    let first = Recording::new(model, 2, 5)?;
    let second = Recording::new(model, 3, 7)?;
    let index = Index::new(model)?;
    let dim = |a: usize, b: usize| match (a, b) {
        _ if a == b => a.to_string(),
        _ if (a, b) == (first.batch, second.batch) => "B".to_owned(),
        _ if (a, b) == (first.length, second.length) => "N".to_owned(),
        _ if (a, b) == (first.batch * first.length, second.batch * second.length) => "BN".to_owned(),
        _ => "?".to_owned(),
    };
    let computed = first.values.iter().filter(|(name, _)| index.dependence(name) != Dependence::Constant);
    let shapes = computed.filter_map(|(name, value)| {
        let other = second.values.get(name)?;
        let dims = value.shape().iter().zip(other.shape()).map(|(&a, &b)| dim(a, b)).collect();
        Some((name.clone(), dims))
    });
    Ok(shapes.collect())
}
