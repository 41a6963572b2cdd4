//! The sizes that an exporter fixed inside a model whose inputs declare any.

use std::collections::HashMap;

use mabert_graph::{ElementType, Model, NodeExt as _, Tensor, attribute};
use mabert_runtime::borrowed;

use crate::inputs::EncoderInputs;

/// Numbers that are tried as a size, at most; the most frequent first.
const MOST_TRIED: usize = 16;
const LARGEST: i64 = 512;

/// What to say of a model that fails at sizes that its inputs declare: at which it runs, where that can be found out.
pub(crate) fn in_words(
    model: &Model,
    inputs: &EncoderInputs,
    runnable: &mabert_runtime::Model,
    tried: (usize, usize),
) -> String {
    fixed_sizes(model, inputs, runnable, tried).map_or_else(String::new, |(batch, length)| {
        format!(
            ", though it runs on {batch} of {length}, and its inputs declare any size: one was fixed inside it when it was \
             exported; export it with dynamic axes, or declare its inputs at the size that it takes"
        )
    })
}

/// The batch size and length that inputs have where others are asked for: some are fixed.
pub(crate) fn taken(inputs: &EncoderInputs, (batch, length): (usize, usize)) -> Option<(usize, usize)> {
    let values = inputs.made_up(batch, length, 1).ok()?;
    let shape = values.iter().find(|(_, t)| t.shape().len() == 2)?.1.shape();
    Some((shape[0], shape[1]))
}

/// A number of sentences and of tokens at which the model runs: one or both are among the numbers that it holds for shapes.
fn fixed_sizes(
    model: &Model,
    inputs: &EncoderInputs,
    runnable: &mabert_runtime::Model,
    tried: (usize, usize),
) -> Option<(usize, usize)> {
    let numbers = numbers(model);
    let batches = || std::iter::once(1).chain(numbers.iter().copied().filter(|&n| n != 1));
    let pairs = batches().flat_map(|batch| numbers.iter().map(move |&length| (batch, length)));
    let one = batches().map(|batch| (batch, tried.1)).chain(numbers.iter().map(|&length| (tried.0, length)));
    one.chain(pairs).find(|&size| {
        let is_other = size != tried && taken(inputs, size) == Some(size);
        let values = inputs.made_up(size.0, size.1, 1);
        is_other && values.is_ok_and(|values| runnable.run(&borrowed(&values)).is_ok())
    })
}

/// The integers of the model, alone or in small vectors.
fn numbers(model: &Model) -> Vec<usize> {
    let graph = model.graph();
    let held = graph.node.iter().filter(|node| node.is("Constant")).filter_map(|n| attribute::constant(n).ok()?);
    let stored = graph.initializer.iter().filter(|t| t.data_type == ElementType::I64.onnx() && t.dims.len() <= 1);
    let stored = stored.filter(|t| t.dims.first().is_none_or(|&n| n <= 8)).filter_map(|t| Tensor::from_proto(t).ok());
    let mut counts: HashMap<i64, usize> = HashMap::new();
    for vector in held.chain(stored).filter(|t| t.len() <= 8).filter_map(|t| t.to_i64()) {
        vector.iter().filter(|n| (1..=LARGEST).contains(*n)).for_each(|n| *counts.entry(*n).or_default() += 1);
    }
    let mut numbers: Vec<(i64, usize)> = counts.into_iter().collect();
    numbers.sort_by_key(|&(number, count)| (std::cmp::Reverse(count), number));
    numbers.into_iter().take(MOST_TRIED).map(|(number, _)| number as usize).collect()
}

#[cfg(test)]
mod tests {
    use mabert_graph::Builder;

    use super::*;
    use crate::recording::check_sizes;

    /// PyTorch's own encoder by TorchScript: attention is written for the batch and the length of the example.
    #[test]
    fn sizes_that_were_fixed_inside_are_told() {
        let b = Builder::new(17, "test");
        let ids = b.input("input_ids", ElementType::I64, &["batch", "n"]);
        let words = b.constant("words", &Tensor::new(&[9, 4], (0..36).map(|i| i as f32).collect()));
        let x = words.gather(ids);
        // TorchScript may also put a shape together from numbers.
        let one = |n: i64| b.op("Unsqueeze", &[b.parameter("n", &Tensor::scalar(n)), b.ints(&[0])], vec![]);
        let turned = x.reshape(&[-1, 6, 2]).reshape_to(b.concat(&[3, 12, 4].map(one), 0));
        let model = b.model(&[(x + turned).named("y")]);
        let runnable = mabert_runtime::LoadOptions::default().prepare(&model).unwrap();
        let inputs = EncoderInputs::new(&model, &[]).unwrap();
        let message = check_sizes(&model, &inputs, &runnable, (2, 7)).unwrap_err().to_string();
        // As many tokens as the example had, whatever the sentences.
        let told = ["runs on 3 of 12", "runs on 12 of 3"].iter().any(|sizes| message.contains(sizes));
        assert!(told && message.contains("fails on 2 sentences of 7 tokens"), "{message}");
    }
}
