//! One small run of a model with every value kept: concrete shapes for the recogniser, symbolic ones for people.

use std::collections::HashMap;

use mabert_graph::text::Shapes;
use mabert_graph::{Dependence, Dim, ElementType, Index, Model, NodeExt as _, Tensor};
use mabert_runtime::{LoadOptions, Named, Taps, borrowed};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};

use crate::{Error, Result, fixed_sizes};

/// Every value of one run.
#[derive(Debug)]
pub struct Recording {
    values: HashMap<String, Tensor>,
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
        check_sizes(model, &runnable, (recording.batch, recording.length))?;
        Ok(recording)
    }

    fn with_runnable(model: &Model, batch: usize, length: usize) -> Result<(Self, mabert_runtime::Model)> {
        let runnable = LoadOptions::default().taps(Taps::Everything).prepare(model)?;
        let run = |length: usize| -> Result<(Named, Named)> {
            let inputs = made_up_inputs(model, batch, length, 1)?;
            let values = runnable.run(&borrowed(&inputs))?;
            Ok((values, inputs))
        };
        let fails = |error: Error, length: usize| match error {
            Error::Runtime(source @ mabert_runtime::Error::Engine { .. }) => Error::Fails {
                origin: model.origin().to_owned(),
                batch,
                length,
                but: fixed_sizes::in_words(model, &runnable),
                source: Box::new(source),
            },
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
        Ok((Self { values, batch, length }, runnable))
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

/// Inputs that the model accepts: token ids out of the tables that they index, masks of ones.
///
/// # Errors
/// An input is neither an integer matrix, as token ids and masks are, nor a vector.
pub fn made_up_inputs(model: &Model, batch: usize, length: usize, seed: u64) -> Result<Named> {
    let index = Index::new(model)?;
    let mut rng = StdRng::seed_from_u64(seed);
    let mut inputs = Vec::new();
    for input in model.inputs() {
        let fault = || {
            let reason =
                format!("input {input} is not a matrix of integers [batch, length], as token ids and masks are");
            Error::NotBert { origin: model.origin().to_owned(), reason }
        };
        // A vector of one number a sequence is what some exports hand through, to tell sequences apart.
        let dims = input.dims.as_ref().filter(|d| matches!(d.len(), 1 | 2)).ok_or_else(fault)?;
        let shape: Vec<usize> = dims
            .iter()
            .zip([batch, length])
            .map(|(dim, wanted)| if let Dim::Fixed(n) = dim { *n } else { wanted })
            .collect();
        let count = shape.iter().product();
        let positions = input.name.to_lowercase().contains("position");
        let values: Vec<i64> = match token_rows(&index, model, &input.name) {
            // The lower ids are padding and other special tokens, which some models treat apart.
            Some(_) if positions => (0..count).map(|at| (at % shape.last().copied().unwrap_or(1)) as i64).collect(),
            Some(rows) => (0..count).map(|_| rng.random_range(rows / 2..rows.max(1)) as i64).collect(),
            None => vec![1; count],
        };
        let tensor = match input.element {
            Some(ElementType::I64) => Tensor::new(&shape, values),
            Some(ElementType::I32) => Tensor::new(&shape, values.into_iter().map(|v| v as i32).collect()),
            Some(ElementType::Bool) => Tensor::new(&shape, vec![true; count]),
            Some(ElementType::F32) => Tensor::new(&shape, vec![1f32; count]),
            _ => return Err(fault()),
        };
        inputs.push((input.name.clone(), tensor));
    }
    Ok(inputs)
}

/// Runs a model on `batch` sentences of `length` tokens, on one more, and on longer ones, as far as its inputs declare
/// that it takes them.
///
/// # Errors
/// It takes one batch size or length only: that was fixed inside it.
pub fn check_sizes(model: &Model, runnable: &mabert_runtime::Model, (batch, length): (usize, usize)) -> Result<()> {
    let run = |batch: usize, length: usize, but: &dyn Fn() -> String| -> Result<()> {
        let inputs = made_up_inputs(model, batch, length, 1)?;
        match runnable.run(&borrowed(&inputs)) {
            Err(source @ mabert_runtime::Error::Engine { .. }) => {
                let (origin, but) = (model.origin().to_owned(), but());
                Err(Error::Fails { origin, batch, length, but, source: Box::new(source) })
            }
            // Too long, say: that is no matter of sizes alone.
            _ => Ok(()),
        }
    };
    run(batch, length, &|| fixed_sizes::in_words(model, runnable))?;
    for (axis, more, longer) in [("batch size", 1, 0), ("length", 0, 1)] {
        let but = || {
            format!(
                ", though it runs on {batch} of {length}, and its inputs declare any {axis}: that size was fixed inside it when \
             it was exported; export it with that axis dynamic, or declare its inputs at the size that it takes"
            )
        };
        run(batch + more, length + longer, &but)?;
    }
    Ok(())
}

/// The longest sequence that a model takes, at most `most` (or what its inputs fix), and what sets the limit where one
/// is met. The model is run once, or until the limit is found.
///
/// # Errors
/// The inputs are not those of an encoder, or it takes no sequence at all.
pub fn longest_sequence(
    model: &Model,
    runnable: &mabert_runtime::Model,
    most: usize,
) -> Result<(usize, Option<String>)> {
    let takes = |length: usize| -> Result<std::result::Result<usize, mabert_runtime::Error>> {
        let inputs = made_up_inputs(model, 1, length, 1)?;
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

/// Operators whose output holds the numbers of their first operand, as exporters have them between ids and their table.
const SAME_NUMBERS: [&str; 7] = ["Cast", "Identity", "Unsqueeze", "Squeeze", "Reshape", "Flatten", "Slice"];

/// The rows of the table that an input indexes, if it is an index.
pub fn token_rows(index: &Index<'_>, model: &Model, input: &str) -> Option<usize> {
    let mut values = vec![input.to_owned()];
    while let Some(value) = values.pop() {
        for node in index.consumers(&value) {
            // Where the embeddings are still one operator: ids, token types and positions, each with its table.
            let embedded = [(0, 2), (1, 4), (8, 3)].into_iter();
            let embedding_table = embedded
                .filter(|_| node.op_type == "EmbedLayerNormalization")
                .find(|(ids, _)| node.input.get(*ids) == Some(&value));
            // TensorFlow's BERT looks up small tables, and on accelerators all, by a product with ones and zeros.
            if node.is("OneHot") && node.input.first() == Some(&value) {
                let depth = node.input.get(1).and_then(|name| model.constant(name).ok()?.to_i64()?.first().copied());
                if let Some(rows) = depth.and_then(|depth| usize::try_from(depth).ok()) {
                    return Some(rows);
                }
            }
            let looked_up = (node.is("Gather") && node.input.get(1) == Some(&value)).then_some(0);
            if let Some(table) = looked_up.or(embedding_table.map(|(_, table)| table)) {
                let table =
                    node.input.get(table).and_then(|name| model.initializer(name)).filter(|t| t.dims.len() == 2);
                if let Some(rows) = table.and_then(|t| usize::try_from(t.dims[0]).ok()) {
                    return Some(rows);
                }
            } else if SAME_NUMBERS.iter().any(|o| node.is(o)) && node.input.first() == Some(&value) {
                values.extend(node.output.iter().cloned());
            }
        }
    }
    None
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
