//! Hinges as one operator of scores with its gradient: node by node, candle would go over what is `n x n` dozens of times,
//! and keep all of it until it goes back.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor as Real};
use mabert_passes::lower::{Approximator, HingeParameters, LengthFeatures};
use mabert_passes::pipeline::{Pass, Student};
use ndarray::{Array2, ArrayD, IxDyn};

use super::accumulating::{Gradient, elements, with_elements};
use crate::hinges::{Hinges, centre_rows, features_at};

/// Where hinges stand in a graph, by the names of its values.
#[derive(Clone, Debug)]
pub(crate) struct HingeSite {
    /// `[batch, heads, n, n]`.
    pub(crate) scores: String,
    /// What hinges make of them.
    pub(crate) probabilities: String,
    pub(crate) parameters: HingeParameters,
    pub(crate) lengths: LengthFeatures,
}

impl HingeSite {
    /// A layer's, where it has hinges.
    pub(crate) fn of_layer(student: &Student, index: usize) -> Option<Self> {
        let Approximator::Hinges(parameters) = student.approximators.get(index)? else { return None };
        let site = &student.encoder.layers[index].attention;
        student.ran(Pass::Softmax).then(|| Self {
            scores: site.products.clone(),
            probabilities: site.probabilities.clone(),
            parameters: parameters.clone(),
            lengths: student.options.approximator.length_features(),
        })
    }

    /// All layers'.
    pub(crate) fn all(student: &Student) -> Vec<Self> {
        (0..student.encoder.layers.len()).filter_map(|index| Self::of_layer(student, index)).collect()
    }
}

/// Hinges with values for their parameters.
pub(super) struct HingeProbabilities {
    heads: Vec<Hinges>,
    lengths: LengthFeatures,
    /// Where each sequence's real tokens are.
    tokens: Vec<Tokens>,
    /// Where gradients go, and which variable each parameter is, if it is one.
    gradient: Option<(Arc<Gradient>, Vec<Option<usize>>)>,
}

/// The probabilities of scores `[batch, heads, n, n]` under a mask `[batch, n]`. Queries that are padding get none.
/// `parameters` are in [`HingeParameters`]' order, as are the numbers of the variables that they are.
pub(super) fn apply(
    site: &HingeSite,
    scores: &Real,
    mask: &Real,
    parameters: &[Real],
    gradient: Option<(Arc<Gradient>, Vec<Option<usize>>)>,
) -> Result<Real> {
    let values = parameters.iter().map(array).collect::<Result<Vec<_>>>()?;
    let HingeParameters { sizes, heads, .. } = site.parameters;
    let tokens = mask.to_vec2::<f32>()?.iter().map(|mask| Tokens::real(mask)).collect();
    let heads = Hinges::split(&values, sizes, heads);
    let op = HingeProbabilities { heads, lengths: site.lengths.clone(), tokens, gradient };
    // Going back must come by here for the parameters too, whatever leads to the scores.
    scores.contiguous()?.apply_op2(&parameters[sizes.statistics], op)
}

fn array(value: &Real) -> Result<ArrayD<f32>> {
    let elements = value.flatten_all()?.to_vec1()?;
    Ok(ArrayD::from_shape_vec(IxDyn(value.dims()), elements).expect("as many elements"))
}

impl HingeProbabilities {
    /// Every head's `[n, n]` in a batch: the head, and what is real of it.
    fn blocks(&self) -> impl Iterator<Item = (usize, &Tokens)> {
        self.tokens.iter().flat_map(|tokens| (0..self.heads.len()).map(move |head| (head, tokens)))
    }
}

impl CustomOp2 for HingeProbabilities {
    fn name(&self) -> &'static str {
        "hinges"
    }

    fn cpu_fwd(&self, x: &CpuStorage, at: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        let scores = elements(x, at)?;
        let n = *at.shape().dims().last().expect("[batch, heads, n, n]");
        let mut probabilities = vec![0f32; scores.len()];
        let blocks = scores.chunks_exact(n * n).zip(probabilities.chunks_exact_mut(n * n));
        for ((head, tokens), (scores, into)) in self.blocks().zip(blocks) {
            match tokens.count() {
                0 => (),
                1 => tokens.write(&Array2::ones((1, 1)), into, n),
                length => {
                    let mut scores = tokens.read(scores, n);
                    centre_rows(&mut scores);
                    let pass = self.heads[head].pass(scores.view(), &features_at(&self.lengths, length));
                    tokens.write(&pass.probabilities, into, n);
                }
            }
        }
        Ok((CpuStorage::F32(probabilities), at.shape().clone()))
    }

    fn bwd(&self, x: &Real, _: &Real, _: &Real, g: &Real) -> Result<(Option<Real>, Option<Real>)> {
        let g = g.contiguous()?;
        let n = *x.dims().last().expect("[batch, heads, n, n]");
        let mut sums: Vec<Hinges> = self.heads.iter().map(Hinges::zeros).collect();
        let d_scores = with_elements(&[x, &g], |[scores, d_probabilities]| {
            let mut d_scores = vec![0f32; scores.len()];
            let blocks = scores.chunks_exact(n * n).zip(d_probabilities.chunks_exact(n * n));
            let blocks = blocks.zip(d_scores.chunks_exact_mut(n * n));
            for ((head, tokens), ((scores, d_probabilities), into)) in self.blocks().zip(blocks) {
                // One token alone attends to itself, whatever the parameters.
                if tokens.count() < 2 {
                    continue;
                }
                let hinges = &self.heads[head];
                let at = features_at(&self.lengths, tokens.count());
                let mut scores = tokens.read(scores, n);
                centre_rows(&mut scores);
                let (scores, error) = (scores.view(), tokens.read(d_probabilities, n));
                let pass = hinges.pass(scores, &at);
                let d_features = hinges.add_gradient(scores, &at, &pass, error.view(), &mut sums[head]);
                tokens.write(&hinges.scores_gradient(scores, &pass, error.view(), &d_features), into, n);
            }
            Ok(d_scores)
        })?;
        if let Some((gradient, variables)) = &self.gradient {
            for (value, variable) in Hinges::join(&sums).iter().zip(variables) {
                if let Some(variable) = variable {
                    gradient.add(*variable, value.as_slice().expect("joined in order"));
                }
            }
        }
        Ok((Some(Real::from_vec(d_scores, x.dims(), x.device())?), None))
    }
}

/// Where a sequence's real tokens are.
enum Tokens {
    /// Side by side, as almost always.
    Range(Range<usize>),
    Places(Vec<usize>),
}

impl Tokens {
    fn real(mask: &[f32]) -> Self {
        let places: Vec<usize> = (0..mask.len()).filter(|&at| mask[at] != 0.0).collect();
        let first = places.first().copied().unwrap_or(0);
        match places.last().is_none_or(|last| last - first + 1 == places.len()) {
            true => Self::Range(first..first + places.len()),
            false => Self::Places(places),
        }
    }

    fn count(&self) -> usize {
        match self {
            Self::Range(range) => range.len(),
            Self::Places(places) => places.len(),
        }
    }

    fn place(&self, at: usize) -> usize {
        match self {
            Self::Range(range) => range.start + at,
            Self::Places(places) => places[at],
        }
    }

    /// What is real of `block` `[n, n]`.
    fn read(&self, block: &[f32], n: usize) -> Array2<f32> {
        let mut values = Vec::with_capacity(self.count() * self.count());
        for at in 0..self.count() {
            let row = &block[self.place(at) * n..][..n];
            match self {
                Self::Range(range) => values.extend_from_slice(&row[range.clone()]),
                Self::Places(places) => values.extend(places.iter().map(|&place| row[place])),
            }
        }
        Array2::from_shape_vec((self.count(), self.count()), values).expect("as many elements")
    }

    /// The other way round.
    fn write(&self, values: &Array2<f32>, block: &mut [f32], n: usize) {
        for (at, values) in values.rows().into_iter().enumerate() {
            let row = &mut block[self.place(at) * n..][..n];
            values.iter().enumerate().for_each(|(key, value)| row[self.place(key)] = *value);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use mabert_graph::{Boundary, ElementType, Model, Tensor};
    use mabert_passes::lower::{ApproximatorOptions, MASK};
    use mabert_passes::pipeline::{PassOptions, Rewriting};
    use ndarray::Axis;
    use rand::{Rng as _, SeedableRng as _, rngs::StdRng};

    use super::*;
    use crate::gradient::{Buffers, Graph, Value, squared_distance, to_candle};

    const N: usize = 7;
    /// Padding on either side, in a hole, everywhere, nowhere; one token alone.
    const MASKS: [[f32; N]; 6] = [
        [1., 1., 1., 1., 1., 0., 0.],
        [0., 0., 1., 1., 1., 1., 1.],
        [0., 1., 1., 0., 0., 1., 1.],
        [0., 0., 0., 0., 0., 0., 0.],
        [1., 1., 1., 1., 1., 1., 1.],
        [0., 0., 1., 0., 0., 0., 0.],
    ];

    fn random(rng: &mut StdRng, shape: &[usize]) -> Tensor {
        Tensor::new(shape, (0..shape.iter().product()).map(|_| rng.random_range(-1f32..1.0)).collect())
    }

    /// A student whose hinges are anything but what they start as.
    fn student(rng: &mut StdRng) -> Student {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/exports/bert-sdpa-torchscript-17");
        let options = PassOptions::new(ApproximatorOptions::hinges(6, 8));
        let model = Model::load(folder.join("model.onnx")).unwrap();
        let mut student = Rewriting::new(model, options).unwrap().approximate().unwrap();
        let names: Vec<String> = student.approximators.iter().flat_map(|a| a.parameters()).cloned().collect();
        for name in names {
            let declared = student.model.constant(&name).unwrap().to_f32();
            let mut value = random(rng, declared.shape()).to_f32();
            // The first knot of these is that of one token alone, which attends to itself exactly.
            if ["approximator/even", "approximator/weight"].iter().any(|table| name.ends_with(table)) {
                value.index_axis_mut(Axis(0), 0).assign(&declared.index_axis(Axis(0), 0));
            }
            student.model.set_constant(&name, &Tensor::from(value));
        }
        student
    }

    /// Node by node and at once, both layers give the same real rows, and all parameters the same gradients.
    #[test]
    fn it_does_what_its_nodes_do() {
        let mut rng = StdRng::seed_from_u64(11);
        let student = student(&mut rng);
        let layers = &student.encoder.layers;
        let (input, channels) = (layers[0].input.as_str(), layers[0].query.inputs);
        let output = layers.last().unwrap().output_norm.output.as_str();
        let boundary = |name: &str, dims: &[&str]| Boundary::symbolic(name, ElementType::F32, dims);
        let boundaries = [boundary(input, &["b", "n", &channels.to_string()]), boundary(MASK, &["b", "n"])];
        let cut = student.model.extract(&boundaries, &[output]).unwrap();
        let mut trained: Vec<String> = student.approximators.iter().flat_map(|a| a.parameters()).cloned().collect();
        trained.extend(layers.iter().flat_map(|l| [&l.query, &l.key, &l.value]).map(|map| map.weight.clone()));
        let sites = HingeSite::all(&student);
        assert_eq!(sites.len(), layers.len());
        let mask = Tensor::new(&[MASKS.len(), N], MASKS.concat());
        let weights = Tensor::new(&[MASKS.len() * N], MASKS.concat());
        let stream = random(&mut rng, &[MASKS.len(), N, channels]);
        let target = random(&mut rng, &[MASKS.len(), N, channels]);
        let run = |sites: &[HingeSite]| {
            let graph = Graph::new(&cut, &[input, MASK], &[output], &trained, sites).unwrap();
            let values = [&stream, &mask].map(|value| Value::Real(to_candle(value).unwrap()));
            let loss = |gradient: Option<&Arc<Gradient>>| {
                let output = graph.run(&values, gradient).unwrap().remove(0);
                let (target, weights) = (to_candle(&target).unwrap(), to_candle(&weights).unwrap());
                squared_distance(&output, &target, &weights, f64::INFINITY).unwrap()
            };
            let gradients =
                Buffers::default().gradients(&graph, &[()], |(), gradient| Ok(loss(Some(gradient)))).unwrap();
            let names: Vec<String> = graph.variables().map(|(name, _)| name.to_owned()).collect();
            (loss(None).to_scalar::<f32>().unwrap(), names, gradients)
        };
        let (expected, names, gradients) = run(&[]);
        let (loss, same_names, found) = run(&sites);
        assert_eq!(names, same_names);
        approx::assert_relative_eq!(loss, expected, max_relative = 1e-4);
        for ((name, expected), found) in names.iter().zip(&gradients).zip(&found) {
            let size = expected.iter().fold(0f32, |m, v| m.max(v.abs()));
            assert!(size > 0.0, "{name} has a gradient");
            // The first knot is that of one token alone, which no parameter changes.
            let tables = ["even", "weight", "b1", "b2"].map(|table| format!("approximator/{table}"));
            let is_table = tables.iter().any(|table| name.ends_with(table));
            let width =
                if is_table { expected.len() / student.options.approximator.length_features().knots.len() } else { 0 };
            assert!(found[..width].iter().all(|g| *g == 0.0), "{name}");
            let far = expected[width..].iter().zip(&found[width..]).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
            assert!(far < 1e-3 * size, "{name}: {far} of {size}");
        }
    }
}
