//! Scaled dot-product attention with a padding mask, however scale and mask are spelled.

use std::collections::{BTreeMap, VecDeque};

use mabert_graph::proto::NodeProto;
use mabert_graph::{Dependence, ElementType, NodeExt as _, Tensor, largest_difference};
use ndarray::{ArrayD, IxDyn};

use super::context::{Context, Verdict};
use super::linear;
use super::probe::Probe;
use super::region::{Region, chain};
use crate::sites::{AttentionSite, PositionBias};

/// Probabilities may differ by this much.
const TOLERANCE: f32 = 1e-4;

/// Values between a softmax and its product with the values, at most.
const MOST_BETWEEN: usize = 16;

/// Whether a node is the heart of attention: the operator, or the exponential of one that is spelt out.
pub(super) fn is_anchor(node: &NodeProto) -> bool {
    node.is("Softmax") || node.is("Exp")
}

const NO_VALUES: &str = "its result does not go into a product with values";
const NO_SCORES: &str = "no product of queries and keys leads to it";

/// Exponentials are in other functions too.
pub(super) fn explains_failure(node: &NodeProto, reason: &str) -> bool {
    node.is("Softmax") || ![NO_VALUES, NO_SCORES].contains(&reason)
}

/// The attention around the node at `anchor`.
pub(super) fn recognise(cx: &Context<'_>, anchor: usize) -> Verdict<AttentionSite> {
    let mut tried = None;
    match (read_off(cx, anchor, &mut tried), tried) {
        (Ok(site), Some(region)) => Verdict::Site(site, region),
        (Ok(_), None) => unreachable!("a site has a region"),
        (Err(reason), tried) => Verdict::NotASite(reason, tried),
    }
}

/// The site; `tried` is its region, from where one is found.
fn read_off(cx: &Context<'_>, anchor: usize, tried: &mut Option<Region>) -> Result<AttentionSite, String> {
    let graph = cx.index.graph();
    let softmax = &graph.node[anchor];
    let Some((probabilities, with_values)) = product_after(cx, softmax) else {
        return Err(NO_VALUES.to_owned());
    };
    let Some(with_keys) = product_before(cx, softmax) else {
        return Err(NO_SCORES.to_owned());
    };
    let products = with_keys.output[0].as_str();
    // Some exporters have the heads of a batch side by side.
    let (batch, heads, n, keys) = match *cx.recording.shape(products) {
        [batch, heads, n, keys] => (batch, heads, n, keys),
        [rows, n, keys] if rows % cx.recording.batch == 0 => (cx.recording.batch, rows / cx.recording.batch, n, keys),
        ref shape => return Err(format!("scores have shape {shape:?}; [batch, heads, n, n] is supported")),
    };
    let &[.., head_size] = cx.recording.shape(&with_keys.input[0]) else {
        return Err("queries are not [batch, heads, n, d]".to_owned());
    };
    let values = cx.recording.shape(&with_values.input[1]);
    if let Some(&size) = values.last().filter(|size| **size != head_size) {
        return Err(format!(
            "values have {size} channels a head, queries and keys {head_size}; equal ones are supported"
        ));
    }
    if n != keys || batch != cx.recording.batch || n != cx.recording.length {
        return Err(format!("scores [{batch}, {heads}, {n}, {keys}] are not those of self-attention"));
    }
    let (region, mask) = with_mask(cx, products, probabilities)?;
    let region = tried.insert(region);
    let probe = Probe::new(cx.model, &cx.index, &cx.recording, region)?;
    let candidate = position_bias(cx, region, [batch, heads, n]);
    let bias = candidate.map(|value| (value, to_array(cx.recording.value(value))));
    let values = bias.as_ref().and_then(|(_, values)| values.as_ref());
    let fit = check_softmax(&probe, [batch, heads, n, n], mask.as_deref(), values)?;
    let Fit { scale, factor } = fit;
    let read_elsewhere = |at: usize| !std::ptr::eq(&graph.node[at], with_values);
    let used_elsewhere = cx.index.is_output(probabilities) || cx.index.readers_at(probabilities).any(read_elsewhere);
    let bias = bias.filter(|_| factor != 0.0).map(|(value, _)| PositionBias { value: value.to_owned(), factor });
    Ok(AttentionSite {
        node: softmax.label().to_owned(),
        query: with_keys.input[0].clone(),
        key: with_keys.input[1].clone(),
        value: with_values.input[1].clone(),
        products: products.to_owned(),
        probabilities: probabilities.to_owned(),
        context: with_values.output[0].clone(),
        probabilities_shown: used_elsewhere.then(|| cx.recording.shape(probabilities).len()),
        scale,
        heads,
        head_size,
        mask,
        bias,
    })
}

/// Whether a node is a product of two values of the text, as those of queries with keys and of probabilities with values are.
pub(super) fn is_product(cx: &Context<'_>, node: &NodeProto) -> bool {
    node.is("MatMul") && cx.index.data_inputs(node).len() == 2
}

/// The product with values to which the softmax's result leads first, and what goes into it. Others may use that result too,
/// as models do that give out how much each token attends to each.
pub(super) fn product_after<'g>(cx: &Context<'g>, softmax: &'g NodeProto) -> Option<(&'g str, &'g NodeProto)> {
    let graph = cx.index.graph();
    let mut open: BTreeMap<usize, &'g str> = BTreeMap::new();
    let mut value = softmax.output[0].as_str();
    for _ in 0..MOST_BETWEEN {
        let product = |at: &usize| is_product(cx, &graph.node[*at]) && graph.node[*at].input[0] == value;
        if let Some(at) = cx.index.readers_at(value).find(product) {
            return Some((value, &graph.node[at]));
        }
        let goes_on = |at: &usize| !is_product(cx, &graph.node[*at]) && !linear::has_weight(cx, *at);
        open.extend(cx.index.readers_at(value).filter(goes_on).map(|at| (at, graph.node[at].output[0].as_str())));
        value = open.pop_first()?.1;
    }
    None
}

/// The nearest product of two data values that the softmax's input comes from.
fn product_before<'g>(cx: &Context<'g>, softmax: &'g NodeProto) -> Option<&'g NodeProto> {
    let mut open: VecDeque<&str> = [softmax.input[0].as_str()].into();
    for _ in 0..64 {
        let node = cx.index.producer(open.pop_front()?);
        let Some(node) = node else { continue };
        if is_product(cx, node) {
            return Some(node);
        }
        open.extend(cx.index.data_inputs(node));
    }
    None
}

/// Whether a softmax that is no attention looks like one of a sentence's tokens to each other all the same: its scores,
/// `[.., n, n]`, are a product of two values, and its result goes into another. A head's turns logits into probabilities, or
/// weighs tokens.
pub(super) fn looks_like_attention(cx: &Context<'_>, anchor: usize) -> bool {
    let softmax = &cx.index.graph().node[anchor];
    let scores = scores_before(cx, softmax).map(|product| cx.recording.shape(&product.output[0]));
    let of_all_tokens = scores.is_some_and(|shape| shape.ends_with(&[cx.recording.length; 2]));
    of_all_tokens && product_after(cx, softmax).is_some()
}

/// The product of two data values that the softmax's input is made of, with nothing but constants and masks.
fn scores_before<'g>(cx: &Context<'g>, softmax: &'g NodeProto) -> Option<&'g NodeProto> {
    let mut open: VecDeque<&str> = [softmax.input[0].as_str()].into();
    for _ in 0..64 {
        let at = cx.index.producer_at(open.pop_front()?);
        let Some(at) = at.filter(|&at| !linear::has_weight(cx, at)) else { continue };
        let node = &cx.index.graph().node[at];
        if is_product(cx, node) {
            return Some(node);
        }
        open.extend(cx.index.data_inputs(node));
    }
    None
}

/// The region from the products (and the mask's graph input, if it depends on one) to the probabilities.
fn with_mask(cx: &Context<'_>, products: &str, probabilities: &str) -> Result<(Region, Option<String>), String> {
    if let Some(region) = Region::spanning(&cx.index, &[products], probabilities) {
        return Ok((region, None));
    }
    let inputs = cx.model.inputs();
    for input in &inputs {
        let region = Region::spanning(&cx.index, &[products, &input.name], probabilities);
        if let Some(region) = region {
            if cx.recording.inputs.get(&input.name).is_some_and(|input| input.rows.is_some()) {
                return Err(format!("its mask is computed from `{}`; a model with a mask input is needed", input.name));
            }
            if cx.recording.shape(&input.name).len() != 2 {
                return Err(format!("its mask `{}` is not [batch, n]", input.name));
            }
            return Ok((region, Some(input.name.clone())));
        }
    }
    // Relative positions, as DeBERTa and some BERTs have them, meet queries or keys before they are added.
    let shape = cx.recording.shape(products);
    let path = chain(&cx.index, products);
    let text_term = path.iter().filter_map(|value| cx.index.producer(value)).find_map(|node| {
        let others = node.input.iter().filter(|i| !path.contains(&i.as_str()));
        others.filter(|i| cx.index.dependence(i) == Dependence::Data).find(|i| cx.recording.shape(i) == shape)
    });
    Err(match text_term {
        Some(value) => {
            format!("`{value}`, which depends on the text, is added to its scores, as relative positions are")
        }
        None => "its mask does not come from one input of the model alone".to_owned(),
    })
}

/// The value of shape `[1 or batch, heads, n, n]` that depends on shapes alone and goes into the region.
fn position_bias<'g>(cx: &Context<'g>, region: &Region, [batch, heads, n]: [usize; 3]) -> Option<&'g str> {
    let graph = cx.index.graph();
    let inputs = region.nodes.iter().flat_map(|&at| &graph.node[at].input);
    let fits = |value: &&String| {
        let shape = cx.recording.shape(value);
        cx.index.dependence(value) == Dependence::Shape && (shape == [1, heads, n, n] || shape == [batch, heads, n, n])
    };
    inputs.filter(fits).map(String::as_str).next()
}

fn to_array(value: Option<&Tensor>) -> Option<ArrayD<f32>> {
    value.filter(|v| v.element_type() == ElementType::F32).map(Tensor::to_f32)
}

/// `softmax(scale * products + factor * bias)`.
struct Fit {
    scale: f32,
    factor: f32,
}

/// Compares the region with `softmax(scale * products + factor * bias)` over the kept keys; `shape` is that of the scores,
/// `[batch, heads, n, n]`.
fn check_softmax(
    probe: &Probe,
    shape: [usize; 4],
    mask: Option<&str>,
    bias: Option<&ArrayD<f32>>,
) -> Result<Fit, String> {
    let [batch, _, n, _] = shape;
    let products = probe.noise(0, 31);
    let run = |keep: &[bool]| -> Result<ArrayD<f32>, String> {
        let mut inputs = vec![Tensor::new(probe.shape(0), products.clone())];
        if mask.is_some() {
            inputs.push(mask_tensor(probe.element(1), probe.shape(1), keep)?);
        }
        let answer = probe.run(&inputs)?.to_f32();
        match answer.shape().ends_with(&[n, n]) && answer.len() == products.len() {
            true => answer.into_shape_with_order(IxDyn(&shape)).map_err(|e| e.to_string()),
            false => Err("probabilities do not have the shape of the scores".to_owned()),
        }
    };
    let everything = vec![true; batch * n];
    let full = run(&everything)?;
    let products = ArrayD::from_shape_vec(IxDyn(&shape), products.clone()).map_err(|e| e.to_string())?;
    let bias = match bias {
        Some(bias) => {
            bias.broadcast(IxDyn(&shape)).ok_or("what is added to the scores has not their shape")?.to_owned()
        }
        None => ArrayD::zeros(IxDyn(&shape)),
    };
    let fit = read_fit(&products, &bias, &full).ok_or_else(|| structure(&full))?;
    let scores = &products * fit.scale + &bias * fit.factor;
    let distance = largest_difference(&full, &reference(&scores, &everything));
    if distance > TOLERANCE {
        return Err(format!("{} (differs from softmax by {distance:.1e})", structure(&full)));
    }
    if mask.is_none() {
        return Ok(fit);
    }
    // Padding on the right, and holes anywhere: both must only remove keys.
    let right: Vec<bool> = (0..batch * n).map(|i| i % n < (i / n + 2).min(n)).collect();
    let holes: Vec<bool> = (0..batch * n).map(|i| i % 3 != 1 || i % n == 0).collect();
    for keep in [right, holes] {
        let distance = largest_difference(&run(&keep)?, &reference(&scores, &keep));
        if distance > TOLERANCE {
            return Err(format!(
                "its mask is not a padding mask (1 keeps, 0 removes, the same for every query): probabilities differ by {distance:.1e}"
            ));
        }
    }
    Ok(fit)
}

fn mask_tensor(element: ElementType, shape: &[usize], keep: &[bool]) -> Result<Tensor, String> {
    Ok(match element {
        ElementType::I64 => Tensor::new(shape, keep.iter().map(|&k| i64::from(k)).collect()),
        ElementType::I32 => Tensor::new(shape, keep.iter().map(|&k| i32::from(k)).collect()),
        ElementType::Bool => Tensor::new(shape, keep.to_vec()),
        ElementType::F32 => Tensor::new(shape, keep.iter().map(|&k| f32::from(u8::from(k))).collect()),
        other => return Err(format!("a mask of {other} is not supported")),
    })
}

/// `log p_j - log p_k = scale (s_j - s_k) + factor (b_j - b_k)`: least squares over neighbouring keys.
fn read_fit(products: &ArrayD<f32>, bias: &ArrayD<f32>, probabilities: &ArrayD<f32>) -> Option<Fit> {
    // Sums of products of the two differences and the logarithm's.
    let (mut ss, mut sb, mut bb, mut sy, mut by) = (0f64, 0f64, 0f64, 0f64, 0f64);
    for ((s, b), p) in products.rows().into_iter().zip(bias.rows()).zip(probabilities.rows()) {
        for k in 1..s.len() {
            if p[k] <= 0.0 || p[k - 1] <= 0.0 {
                return None;
            }
            let step = |row: &ndarray::ArrayView1<'_, f32>| f64::from(row[k]) - f64::from(row[k - 1]);
            let (ds, db) = (step(&s), step(&b));
            let y = f64::from(p[k]).ln() - f64::from(p[k - 1]).ln();
            ss += ds * ds;
            sb += ds * db;
            bb += db * db;
            sy += ds * y;
            by += db * y;
        }
    }
    let determinant = ss * bb - sb * sb;
    let (scale, factor) = match determinant > 1e-9 * ss * bb {
        true => ((sy * bb - by * sb) / determinant, (by * ss - sy * sb) / determinant),
        false => (sy / ss, 0.0),
    };
    let snapped = |x: f64, to: f64| if (x - to).abs() < 1e-4 { to as f32 } else { x as f32 };
    let fit = Fit { scale: scale as f32, factor: snapped(snapped(factor, 1.0).into(), 0.0) };
    (fit.scale.is_finite() && fit.scale > 0.0 && fit.factor.is_finite()).then_some(fit)
}

/// What else the probabilities of an unmasked sentence may be.
fn structure(probabilities: &ArrayD<f32>) -> String {
    let n = *probabilities.shape().last().unwrap_or(&1);
    let later = |q: usize, p: &ndarray::ArrayView1<'_, f32>| p.iter().skip(q + 1).all(|&x| x == 0.0);
    let causal = probabilities.rows().into_iter().enumerate().all(|(i, p)| later(i % n, &p));
    if causal {
        "its mask is causal: later keys are hidden from earlier queries".to_owned()
    } else if probabilities.iter().any(|p| *p == 0.0) {
        "its mask hides keys of a sentence without padding".to_owned()
    } else {
        "it is not a softmax of scaled scores alone: something is added to them".to_owned()
    }
}

fn reference(scores: &ArrayD<f32>, keep: &[bool]) -> ArrayD<f32> {
    let n = scores.shape()[2];
    let rows_a_batch = scores.shape()[1] * n;
    let mut result = scores.clone();
    for (row, mut p) in result.rows_mut().into_iter().enumerate() {
        let keep = &keep[row / rows_a_batch * n..][..n];
        let weights: Vec<f64> = p.iter().zip(keep).map(|(&s, &k)| if k { f64::from(s).exp() } else { 0.0 }).collect();
        let sum: f64 = weights.iter().sum();
        p.iter_mut().zip(&weights).for_each(|(p, w)| *p = (w / sum) as f32);
    }
    result
}
