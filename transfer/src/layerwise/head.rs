//! Which tokens of the last layer the task's head looks at.

use mabert_graph::{Boundary, ElementType, Model, Tensor};
use mabert_passes::sites::Encoder;
use mabert_runtime::{LoadOptions, Named, borrowed};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};

use crate::Result;
use crate::compare::{Distances, Tolerance};
use crate::data::Batch;
use crate::pooling::Pooling;

/// Whether every output depends on the first token of the last layer alone, as a pooler's does. Found by trying: the
/// head is run on hidden states that differ in all tokens but the first. The pass `first-token` asks for more, that nodes
/// take the first token and nothing else: it drops the others. Hidden states beside the vectors of texts that a feature model
/// pools itself do not count.
pub(super) fn depends_on_first_token_alone(
    model: &Model,
    encoder: &Encoder,
    batch: &Batch,
    pooling: Option<Pooling>,
) -> Result<bool> {
    let Some(last) = encoder.layers.last() else { return Ok(false) };
    let hidden = last.output_norm.output.as_str();
    let outputs = model.graph().output.iter().map(|o| o.name.as_str());
    let outputs: Vec<&str> = outputs.filter(|name| *name != hidden || pooling != Some(Pooling::Output)).collect();
    if outputs.contains(&hidden) || outputs.is_empty() || batch.length < 2 {
        return Ok(false);
    }
    let channels = last.output.outputs;
    let shape = [batch.size(), batch.length, channels];
    let head = model.extract_from_inputs(&[Boundary::fixed(hidden, ElementType::F32, &shape)], &outputs)?;
    let (states, inputs): (Vec<_>, Vec<_>) = head.inputs().into_iter().partition(|i| i.name == hidden);
    if states.is_empty() {
        return Ok(false);
    }
    let inputs = batch.inputs(&inputs)?;
    let head = LoadOptions::default().prepare(&head)?;
    let run = |states: Vec<f32>| -> Result<Named> {
        let states = Tensor::new(&shape, states);
        let mut values = borrowed(&inputs);
        values.push((hidden, &states));
        Ok(head.run(&values)?)
    };
    let mut rng = StdRng::seed_from_u64(17);
    let states: Vec<f32> = (0..shape.iter().product()).map(|_| rng.random_range(-1f32..1.0)).collect();
    let first = |at: usize| (at / channels).is_multiple_of(batch.length);
    let others = states.iter().enumerate().map(|(at, &v)| if first(at) { v } else { rng.random_range(-1f32..1.0) });
    let mut distances = Distances::new(Tolerance { elements: Some((1e-6, 1e-6)), cosine: None });
    distances.add(&run(states.clone())?, &run(others.collect())?, None)?;
    Ok(distances.outputs().iter().all(|o| o.exceeds <= 1.0))
}

#[cfg(test)]
mod tests {
    use mabert_graph::proto::ValueInfoProto;
    use mabert_passes::inputs::EncoderInputs;
    use mabert_passes::lower::ApproximatorOptions;
    use mabert_passes::pipeline::{PassOptions, Rewriting};

    use super::*;
    use crate::data::{BatchShape, Vocabulary, batches, made_up_sequences};

    #[test]
    fn a_pooler_reads_the_first_token_and_hidden_states_are_read_whole() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../fixtures/bert-mini-sst2/model.onnx");
        let options = PassOptions::new(ApproximatorOptions::network(8, 8));
        let rewriting = Rewriting::new(Model::load(path).unwrap(), options).unwrap();
        let vocabulary = Vocabulary { size: 100, ..Vocabulary::default() };
        let inputs = EncoderInputs::new(&rewriting.teacher, &[]).unwrap();
        let shape = BatchShape::new(&inputs);
        let batch = batches(&made_up_sequences(&vocabulary, 8, 30, 1), 64, 4, &shape).pop().unwrap();
        let reads_first =
            |model: &Model| depends_on_first_token_alone(model, &rewriting.encoder, &batch, None).unwrap();
        assert!(reads_first(&rewriting.teacher));
        // A mean over tokens, as sentence embeddings have it, reads them all.
        let hidden = rewriting.encoder.layers.last().unwrap().output_norm.output.clone();
        let mut averaging = rewriting.teacher.clone();
        let b = mabert_graph::Builder::new(averaging.opset(), "test");
        let mean = b.value(&hidden).transpose(&[0, 2, 1]).mean_last().named("mean");
        let output = |name: String| ValueInfoProto { name, ..ValueInfoProto::default() };
        averaging.graph_mut().output = vec![output(mean.name())];
        b.patch().apply(&mut averaging).unwrap();
        assert!(!reads_first(&averaging));
        let mut features = rewriting.teacher.clone();
        features.graph_mut().output.push(output(hidden));
        assert!(!reads_first(&features));
        // Beside the vectors that users read, hidden states do not count.
        let of_vectors = |model: &Model| {
            depends_on_first_token_alone(model, &rewriting.encoder, &batch, Some(Pooling::Output)).unwrap()
        };
        assert!(of_vectors(&features) && !of_vectors(&averaging));
    }
}
