//! Layer normalisation, however it is spelled.

use mabert_graph::proto::NodeProto;
use mabert_graph::{ElementType, NodeExt as _, largest_difference};

use super::context::{Context, Verdict};
use super::probe::Probe;
use super::region::{Region, Users, chain, is_layout_only};
use super::{activation, attention, linear};
use crate::sites::NormSite;

/// Probed and computed values may differ by this much, relative to the largest.
const TOLERANCE: f32 = 2e-4;

/// Values in a row that may follow a norm without being one, before the search for its end stops.
const MOST_BEYOND: usize = 2;

/// Operators that move elements, or take some of them.
const MOVES: [&str; 6] = ["Transpose", "Slice", "Split", "Concat", "Gather", "Expand"];

/// Whether a node can be the heart of a norm: the fused operator, or the root of the variance.
pub(super) fn is_anchor(node: &NodeProto) -> bool {
    node.is("LayerNormalization") || node.is("Sqrt") || node.is("Pow") || node.is("Reciprocal")
}

/// The norm around the node at `anchor`.
pub(super) fn recognise(cx: &Context<'_>, anchor: usize) -> Verdict<NormSite> {
    let node = &cx.index.graph().node[anchor];
    let mut verdict = Verdict::NotASite("no single-entry region of one shape lies around it".to_owned(), None);
    // What follows a norm may belong to it, as beta does, even where a transposition or the like lies between.
    let mut beyond = 0;
    for exit in chain(&cx.index, &node.output[0]).into_iter().take(8) {
        let was_site = verdict.is_site();
        let mut extended = false;
        // What only moves elements is no end of a norm: others may ask for the shape on either side of it.
        if was_site && cx.index.producer(exit).is_some_and(is_layout_only) {
            continue;
        }
        for region in Region::ending_in(&cx.index, exit, Users::InsideOnly) {
            let shape = cx.recording.shape(exit);
            let same_shape = shape.len() >= 2 && cx.recording.shape(&region.entries[0]) == shape;
            if !region.contains(anchor) || !same_shape {
                continue;
            }
            let begun = if let Verdict::Site(_, begun) = &verdict { begun.nodes.as_slice() } else { &[] };
            let mut more = region.nodes.iter().filter(|at| !begun.contains(at));
            let goes_on = begun.is_empty() || more.all(|&at| may_be_gamma_or_beta(cx, at));
            if !goes_on || !may_be_one_norm(cx, &region) {
                break;
            }
            match read_off(cx, &region, node) {
                Ok(site) => {
                    verdict = Verdict::Site(site, region);
                    extended = true;
                    break;
                }
                Err(reason) if !verdict.is_site() => verdict = Verdict::NotASite(reason, Some(region)),
                Err(_) => {}
            }
        }
        beyond = if was_site && !extended { beyond + 1 } else { 0 };
        if beyond > MOST_BEYOND {
            break;
        }
    }
    verdict
}

/// Whether a region holds one normalisation and no other function: no second root, no heart of another site, no matrix. What
/// follows a norm of two channels, of which it leaves the signs alone, or has weights of ones, which it takes away, would
/// seem to be gamma and beta.
fn may_be_one_norm(cx: &Context<'_>, region: &Region) -> bool {
    let graph = cx.index.graph();
    let others = |node: &NodeProto| activation::is_anchor(node) || attention::is_anchor(node);
    let mixes = |at: usize| {
        let node = &graph.node[at];
        attention::is_product(cx, node) || (linear::has_weight(cx, at) && !averages(cx, node))
    };
    let other = region.nodes.iter().any(|&at| others(&graph.node[at]) || mixes(at));
    !other && region.nodes.iter().filter(|&&at| is_root(cx, &graph.node[at])).count() <= 1
}

/// Whether a node scales or shifts channels, or moves elements: nothing else of a norm comes after its quotient.
fn may_be_gamma_or_beta(cx: &Context<'_>, at: usize) -> bool {
    let node = &cx.index.graph().node[at];
    let scales_or_shifts = ["Add", "Sub", "Mul", "Div"].iter().any(|op| node.is(op));
    let moves = is_layout_only(node) || MOVES.iter().any(|op| node.is(op));
    moves || (scales_or_shifts && cx.index.data_inputs(node).len() == 1)
}

/// Whether a node takes a root, as each normalisation does once.
fn is_root(cx: &Context<'_>, node: &NodeProto) -> bool {
    let fraction = || {
        let exponent = node.input.get(1).and_then(|name| cx.model.constant(name).ok());
        exponent.is_some_and(|exponent| exponent.to_f32().iter().any(|e| e.fract() != 0.0))
    };
    node.is("LayerNormalization") || node.is("Sqrt") || (node.is("Pow") && fraction())
}

/// Whether a product leaves one channel, as a mean spelled so does.
fn averages(cx: &Context<'_>, node: &NodeProto) -> bool {
    cx.recording.shape(&node.output[0]).last() == Some(&1)
}

/// Runs the region and fits `gamma * normalised + beta` for each channel; the fit must explain other inputs as well.
fn read_off(cx: &Context<'_>, region: &Region, node: &NodeProto) -> Result<NormSite, String> {
    if cx.recording.value(&region.exit).map(|v| v.element_type()) != Some(ElementType::F32) {
        return Err("the region does not compute f32".to_owned());
    }
    let probe = Probe::new(cx.model, &cx.index, &cx.recording, region)?;
    let channels = *probe.shape(0).last().unwrap_or(&0);
    if channels < 2 {
        return Err("the last axis has fewer than two channels".to_owned());
    }
    let input = spread(probe.noise(0, 11), channels);
    let output = rows(&probe.run_f32(input.clone())?.to_f32().into_raw_vec_and_offset().0, channels);
    let normal: Vec<Vec<f64>> = rows(&input, channels).iter().map(|r| normalised(r, 0.0)).collect();
    let mut gamma = vec![0f32; channels];
    let mut beta = vec![0f32; channels];
    for c in 0..channels {
        let line = fit_line(normal.iter().map(|r| r[c]), output.iter().map(|r| f64::from(r[c])));
        (gamma[c], beta[c]) = (line.0 as f32, line.1 as f32);
    }
    // Other inputs, shifted and scaled: neither may matter to a norm.
    let other: Vec<f32> = spread(probe.noise(0, 12), channels).into_iter().map(|x| 3.0 * x + 0.7).collect();
    let output = rows(&probe.run_f32(other.clone())?.to_f32().into_raw_vec_and_offset().0, channels);
    let expected: Vec<f32> = rows(&other, channels)
        .iter()
        .flat_map(|x| normalised(x, 0.0).into_iter().enumerate().map(|(c, n)| gamma[c] * n as f32 + beta[c]))
        .collect();
    let worst = largest_difference(&expected, output.iter().flatten());
    let largest = output.iter().flatten().fold(1e-6f32, |m, y| m.max(y.abs()));
    if worst > TOLERANCE * largest {
        return Err(format!("it differs from layer normalisation by {:.1e} of its range", worst / largest));
    }
    if gamma.iter().all(|g| g.abs() < 1e-12) {
        return Err("its result does not depend on its input".to_owned());
    }
    Ok(NormSite {
        flattened: probe.shape(0).len() == 2,
        input: region.entries[0].clone(),
        output: region.exit.clone(),
        node: node.label().to_owned(),
        spelling: node.op_type.clone(),
        epsilon: epsilon(&probe, &gamma, &beta, channels)?,
        gamma,
        beta,
    })
}

/// The same rows, none of them so even that epsilon matters; of few channels, some are by chance.
fn spread(mut values: Vec<f32>, channels: usize) -> Vec<f32> {
    for row in values.chunks_exact_mut(channels).filter(|row| moments(row).1 < 0.25) {
        row.iter_mut().enumerate().for_each(|(c, x)| *x += if c % 2 == 0 { 1.5 } else { -1.5 });
    }
    values
}

/// Epsilon shows on inputs whose variance is of its size.
fn epsilon(probe: &Probe, gamma: &[f32], beta: &[f32], channels: usize) -> Result<f32, String> {
    const SMALL: f32 = 1e-4;
    let input: Vec<f32> = probe.noise(0, 13).into_iter().map(|x| SMALL * x).collect();
    let output = rows(&probe.run_f32(input.clone())?.to_f32().into_raw_vec_and_offset().0, channels);
    // The channel with the largest gamma is the least disturbed by rounding.
    let c = (0..channels).max_by(|&a, &b| gamma[a].abs().total_cmp(&gamma[b].abs())).unwrap_or(0);
    let mut estimates: Vec<f64> = Vec::new();
    for (x, y) in rows(&input, channels).iter().zip(&output) {
        let (mean, variance) = moments(x);
        let normal = f64::from(y[c] - beta[c]) / f64::from(gamma[c]);
        let deviation = (f64::from(x[c]) - mean) / normal;
        estimates.push(deviation * deviation - variance);
    }
    estimates.sort_by(f64::total_cmp);
    Ok(estimates[estimates.len() / 2].max(0.0) as f32)
}

fn rows(values: &[f32], width: usize) -> Vec<Vec<f32>> {
    values.chunks_exact(width).map(<[f32]>::to_vec).collect()
}

fn moments(row: &[f32]) -> (f64, f64) {
    let n = row.len() as f64;
    let mean = row.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
    (mean, row.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / n)
}

fn normalised(row: &[f32], epsilon: f64) -> Vec<f64> {
    let (mean, variance) = moments(row);
    row.iter().map(|&x| (f64::from(x) - mean) / (variance + epsilon).sqrt()).collect()
}

/// Least squares of `y` on `slope * x + offset`.
fn fit_line(x: impl Iterator<Item = f64> + Clone, y: impl Iterator<Item = f64> + Clone) -> (f64, f64) {
    let n = x.clone().count() as f64;
    let (mx, my) = (x.clone().sum::<f64>() / n, y.clone().sum::<f64>() / n);
    let (cov, var) = x.zip(y).fold((0.0, 0.0), |(c, v), (x, y)| (c + (x - mx) * (y - my), v + (x - mx).powi(2)));
    let slope = if var > 0.0 { cov / var } else { 0.0 };
    (slope, my - slope * mx)
}

#[cfg(test)]
mod tests {
    use mabert_graph::{Builder, Tensor};

    use super::super::recognise;
    use super::*;
    use crate::sites::SiteKind;

    /// A root that is NaN for half of what is tried is no norm, and `explain` says why.
    #[test]
    fn a_root_of_signed_values_is_no_norm() {
        let b = Builder::new(17, "test");
        let ids = b.input("input_ids", ElementType::I64, &["batch", "n"]);
        let words = b.constant("words", &Tensor::new(&[9, 4], (0..36).map(|i| (i % 5) as f32 - 2.0).collect()));
        let model = b.model(&[words.gather(ids).sqrt().named("y")]);
        let recognition = recognise(&model).unwrap();
        assert!(recognition.norms.is_empty(), "{:?}", recognition.norms);
        let root = recognition.explanations.iter().find(|e| e.operator == "Sqrt").unwrap();
        let reason = root.reason.as_deref().unwrap();
        assert!(root.kind == SiteKind::Norm && reason.contains("differs from layer normalisation"), "{root:?}");
    }
}
