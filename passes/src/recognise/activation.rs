//! GELU in all its spellings, and ReLU.

use mabert_graph::proto::NodeProto;
use mabert_graph::{NodeExt as _, Tensor, largest_difference};

use super::context::{Context, Verdict};
use super::probe::Probe;
use super::region::{Region, Users, chain};
use crate::sites::{Activation, ActivationSite};

/// The two GELUs differ by 5e-4 at most: what is told apart must be closer than that. Constants in half precision alone
/// make 4e-5.
const TOLERANCE: f32 = 1e-4;
/// A factor this near to one is rounding.
const ROUNDING: f32 = 1e-3;

/// Operators that work on each element alone (against constants, or two values of the region).
const ELEMENTWISE: [&str; 17] = [
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Pow",
    "Erf",
    "Tanh",
    "Gelu",
    "Relu",
    "Identity",
    "Cast",
    "Sigmoid",
    "Exp",
    "Neg",
    "Sqrt",
    "Reciprocal",
    "Dropout",
];

/// Whether a node can be the heart of an activation.
pub(super) fn is_anchor(node: &NodeProto) -> bool {
    ["Erf", "Tanh", "Gelu", "Relu", "Sigmoid"].iter().any(|op| node.is(op))
}

/// The activation around the node at `anchor`.
pub(super) fn recognise(cx: &Context<'_>, anchor: usize) -> Verdict<ActivationSite> {
    let graph = cx.index.graph();
    let node = &graph.node[anchor];
    let elementwise = |node: &NodeProto| ELEMENTWISE.contains(&node.op_type.as_str());
    let mut verdict = Verdict::NotASite("no single-entry element-wise region lies around it".to_owned(), None);
    let mut nearest = f32::INFINITY;
    for exit in chain(&cx.index, &node.output[0]).into_iter().take(10) {
        if !cx.index.producer(exit).is_some_and(elementwise) {
            break;
        }
        for region in Region::ending_in(&cx.index, exit, Users::InsideOnly) {
            let pure = region.nodes.iter().all(|&at| elementwise(&graph.node[at]));
            if !region.contains(anchor) || !pure {
                continue;
            }
            // What follows is a site of its own, even where it changes nothing more, as a second ReLU.
            if region.nodes.iter().filter(|&&at| is_anchor(&graph.node[at])).count() > 1 {
                break;
            }
            match nearest_function(cx, &region) {
                // A factor may belong to it, as the half of a GELU does, until it is one.
                Ok(Fit { factor, .. }) if factor != 1.0 && verdict.is_site() => {}
                Ok(Fit { function, factor }) => {
                    let site = ActivationSite {
                        input: region.entries[0].clone(),
                        output: region.exit.clone(),
                        node: node.label().to_owned(),
                        function,
                        factor,
                    };
                    verdict = Verdict::Site(site, region);
                    break;
                }
                // Of all that lies around it, the region most like an activation is told.
                Err((reason, distance)) if !verdict.is_site() && (distance < nearest || nearest.is_infinite()) => {
                    nearest = distance;
                    verdict = Verdict::NotASite(reason, Some(region));
                }
                Err(_) => {}
            }
        }
    }
    verdict
}

/// A region computes `factor` times a function. Optimisers move the half of a GELU into the product that follows.
struct Fit {
    function: Activation,
    factor: f32,
}

/// The function of a region; else why it is none, and how far the nearest one is.
fn nearest_function(cx: &Context<'_>, region: &Region) -> Result<Fit, (String, f32)> {
    let cannot = |reason: String| (reason, f32::INFINITY);
    let probe = Probe::new(cx.model, &cx.index, &cx.recording, region).map_err(cannot)?;
    let count: usize = probe.shape(0).iter().product();
    let points: Vec<f32> = (0..count).map(|i| -9.0 + 18.0 * i as f32 / count.max(2) as f32).collect();
    let output: Tensor = probe.run_f32(points.clone()).map_err(cannot)?;
    if output.shape() != probe.shape(0) {
        return Err(cannot("it changes the shape".to_owned()));
    }
    let output = output.to_f32();
    let fit = |function: Activation, f: fn(f64) -> f64| {
        let expected: Vec<f32> = points.iter().map(|&x| f(f64::from(x)) as f32).collect();
        let factor = if function == Activation::Relu { 1.0 } else { factor(&expected, &output) };
        (Fit { function, factor }, largest_difference(&expected, &output.mapv(|y| y / factor)))
    };
    let fits = [
        fit(Activation::GeluErf, gelu_erf),
        fit(Activation::GeluTanh, gelu_tanh),
        fit(Activation::GeluSigmoid, |x| x / (1.0 + (-1.702 * x).exp())),
        fit(Activation::Relu, |x| x.max(0.0)),
    ];
    match fits.into_iter().min_by(|a, b| a.1.total_cmp(&b.1)) {
        Some((fit, distance)) if distance < TOLERANCE => Ok(fit),
        Some((Fit { function, .. }, distance)) => {
            Err((format!("the nearest activation is {function:?}, which differs by {distance:.1e}"), distance))
        }
        None => unreachable!("there are candidates"),
    }
}

/// What `expected` is multiplied by to be nearest to `output`; 1 where no positive number is near.
fn factor<'v>(expected: &[f32], output: impl IntoIterator<Item = &'v f32>) -> f32 {
    let (dot, square) = expected.iter().zip(output).fold((0f64, 0f64), |(dot, square), (&e, &y)| {
        (dot + f64::from(e) * f64::from(y), square + f64::from(e).powi(2))
    });
    let factor = (dot / square) as f32;
    let plain = !factor.is_normal() || factor < 0.0 || (factor - 1.0).abs() < ROUNDING;
    if plain { 1.0 } else { factor }
}

fn gelu_tanh(x: f64) -> f64 {
    let c = (2.0 / std::f64::consts::PI).sqrt();
    0.5 * x * (1.0 + (c * (x + 0.044_715 * x.powi(3))).tanh())
}

fn gelu_erf(x: f64) -> f64 {
    0.5 * x * (1.0 + erf(x / std::f64::consts::SQRT_2))
}

/// The error function by its Taylor series near zero and the continued fraction of `erfc` beyond (Abramowitz & Stegun
/// 7.1.6 and 7.1.14); exact to about 1e-13.
fn erf(x: f64) -> f64 {
    let a = x.abs();
    let value = if a < 2.5 {
        let mut term = a;
        let mut sum = a;
        for n in 1..80 {
            term *= 2.0 * a * a / f64::from(2 * n + 1);
            sum += term;
        }
        2.0 / std::f64::consts::PI.sqrt() * (-a * a).exp() * sum
    } else {
        let fraction = (1..60).rev().fold(0.0, |f, n| f64::from(n) / 2.0 / (a + f));
        1.0 - (-a * a).exp() / std::f64::consts::PI.sqrt() / (a + fraction)
    };
    value.copysign(x)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_error_function_matches_its_table() {
        // Abramowitz & Stegun, table 7.1.
        for (x, expected) in
            [(0.5, 0.520_499_877_8), (1.0, 0.842_700_792_9), (2.0, 0.995_322_265_0), (3.0, 0.999_977_909_5)]
        {
            assert!((erf(x) - expected).abs() < 1e-9, "erf({x}) = {}", erf(x));
            assert!((erf(-x) + expected).abs() < 1e-9);
        }
    }
}
