//! Sizes: what a node makes of a few numbers may be more than a machine holds.

use super::known::Known;
use crate::limits::MOST_ELEMENTS;

pub(super) const OPERATORS: [&str; 21] = [
    "BlackmanWindow",
    "ConstantLike",
    "ConstantOfShape",
    "DFT",
    "EyeLike",
    "Expand",
    "HammingWindow",
    "HannWindow",
    "MelWeightMatrix",
    "Multinomial",
    "OneHot",
    "Pad",
    "RandomNormal",
    "RandomUniform",
    "Range",
    "Resize",
    "STFT",
    "Tile",
    "TopK",
    "Conv",
    "ConvTranspose",
];

/// What is wrong with the sizes that a node asks for.
pub(super) fn fault(known: &Known<'_>) -> Option<String> {
    let asked = asked(known)?;
    if asked.is_nan() || asked > MOST_ELEMENTS {
        return Some(match asked.is_nan() {
            true => "asks for steps of 0, or of more than any model has".to_owned(),
            false => format!("asks for {asked:.1e} elements"),
        });
    }
    None
}

/// The elements that a node makes, as far as they are known; NaN where that is no number.
fn asked(known: &Known<'_>) -> Option<f64> {
    let product = |at: usize| Some(known.numbers(at)?.iter().map(|v| v.abs()).product::<f64>());
    let attribute = |name: &str| known.ints(name).map(|sizes| sizes.iter().map(|&v| (v as f64).abs()).product::<f64>());
    match known.node.op_type.as_str() {
        "BlackmanWindow" | "HammingWindow" | "HannWindow" => product(0),
        "ConstantLike" | "RandomNormal" | "RandomUniform" => attribute("shape"),
        "ConstantOfShape" => product(0),
        "Conv" | "ConvTranspose" => convolved(known),
        "DFT" => Some(product(1)?.max(1.0) * known.count(0)),
        "Expand" => Some(broadcast(&known.sizes(0).unwrap_or_default(), &known.numbers(1)?)),
        "MelWeightMatrix" => Some(product(0)? * product(1)?),
        "Multinomial" => Some(known.int("sample_size")? as f64 * known.count(0)),
        "OneHot" => Some(product(1)? * known.count(0)),
        "Pad" => Some(padded(known)),
        "Range" => range(known),
        "Resize" => Some(resized(known)),
        // A step of none never ends.
        "STFT" => product(1).filter(|step| *step < 1.0).map(|_| f64::NAN),
        "Tile" => Some(product(1)? * known.count(0)),
        "TopK" => product(1),
        _ => None,
    }
}

fn broadcast(sizes: &[f64], wanted: &[f64]) -> f64 {
    let at = |sizes: &[f64], from_the_end: usize| sizes.iter().rev().nth(from_the_end).copied().unwrap_or(1.0);
    (0..sizes.len().max(wanted.len())).map(|axis| at(sizes, axis).max(at(wanted, axis).abs())).product()
}

/// `pads` are an attribute in old versions, an operand in new ones; the newest say which axes they are of.
fn padded(known: &Known<'_>) -> f64 {
    let attribute = known.ints("pads").or_else(|| known.ints("paddings"));
    let pads = attribute.map(|pads| pads.iter().map(|&v| v as f64).collect()).or_else(|| known.numbers(1));
    let pads: Vec<f64> = pads.unwrap_or_default();
    let mut sizes = known.sizes(0).unwrap_or_else(|| vec![1.0; pads.len() / 2]);
    let axes = known.integers(3).unwrap_or_else(|| (0..sizes.len() as i64).collect());
    let rank = sizes.len() as i64;
    for (at, axis) in axes.iter().enumerate() {
        let both = [at, at + axes.len()].map(|at| pads.get(at).copied().unwrap_or(0.0));
        if let Some(size) = sizes.get_mut(axis.rem_euclid(rank.max(1)) as usize) {
            *size += both[0] + both[1];
        }
    }
    sizes.iter().map(|size| size.max(0.0)).product()
}

fn range(known: &Known<'_>) -> Option<f64> {
    let number = |at: usize| known.numbers(at).filter(|v| v.len() == 1).map(|v| v[0]);
    // Exporters step by one; what else is written as a step is small.
    let step = number(2);
    if step.is_some_and(|step| step == 0.0 || step.abs() > MOST_ELEMENTS) {
        return Some(f64::NAN);
    }
    Some(((number(1)? - number(0)?) / step?).max(0.0))
}

fn resized(known: &Known<'_>) -> f64 {
    let sizes = known.numbers(3).filter(|v| !v.is_empty()).map(|v| v.iter().map(|v| v.abs()).product());
    // Version 10 has the scales where others have the region.
    let scales = known.numbers(if known.node.input.len() == 2 { 1 } else { 2 });
    let scaled = || scales.map_or(1.0, |v| v.iter().map(|v| v.abs()).product::<f64>()) * known.count(0);
    sizes.unwrap_or_else(scaled)
}

fn convolved(known: &Known<'_>) -> Option<f64> {
    let sizes = known.sizes(0)?;
    let (outside, space) = sizes.split_at_checked(2)?;
    let numbers =
        |name: &str, at: usize, default: f64| known.ints(name).and_then(|v| v.get(at)).map_or(default, |&v| v as f64);
    let transposed = known.node.op_type == "ConvTranspose";
    let grown = space.iter().enumerate().map(|(at, size)| {
        let padding = numbers("pads", at, 0.0) + numbers("pads", at + space.len(), 0.0);
        let stride = if transposed { numbers("strides", at, 1.0) } else { 1.0 };
        size * stride + padding.abs() + if transposed { numbers("output_padding", at, 0.0) } else { 0.0 }
    });
    Some(outside[0] * grown.product::<f64>())
}
