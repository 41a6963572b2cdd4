//! Windows of convolutions and pools: positive, as many as there are axes in space.

use super::known::Known;

pub(super) const OPERATORS: [&str; 9] = [
    "AveragePool",
    "Conv",
    "ConvInteger",
    "ConvTranspose",
    "DepthToSpace",
    "LRN",
    "MaxPool",
    "QLinearConv",
    "SpaceToDepth",
];
/// Padding and steps that go on beyond any picture.
const MOST: i64 = 1 << 24;

/// What is wrong with a node's windows.
pub(super) fn fault(known: &Known<'_>) -> Option<String> {
    if !OPERATORS.contains(&known.node.op_type.as_str()) {
        return None;
    }
    let least =
        |name: &str| if name.ends_with("pad") || name.ends_with("pads") || name == "output_padding" { 0 } else { 1 };
    let numbers =
        known.node.attribute.iter().filter(|a| !["axis", "ceil_mode", "storage_order"].contains(&a.name.as_str()));
    for attribute in numbers {
        let name = attribute.name.as_str();
        let values = if name == "group" || name == "blocksize" || name == "size" {
            std::slice::from_ref(&attribute.i)
        } else {
            attribute.ints.as_slice()
        };
        if let Some(value) = values.iter().find(|value| !(least(name)..=MOST).contains(value)) {
            return Some(format!("has {value} in `{name}`"));
        }
    }
    let kernel = known.ints("kernel_shape").map(<[i64]>::len);
    let places = known.ints("kernel_shape").map(|kernel| kernel.iter().map(|&size| size as f64).product::<f64>());
    if places.is_some_and(|places| places > MOST as f64) {
        return Some(format!("has the window {:?}", known.ints("kernel_shape").unwrap_or_default()));
    }
    // The kernel of a quantised convolution is its fourth operand.
    let weights = if known.node.op_type == "QLinearConv" { 3 } else { 1 };
    let space = known.rank(0).or_else(|| known.rank(weights)).map(|rank| (rank - 2).max(0) as usize).or(kernel)?;
    let lengths = [("kernel_shape", 1), ("strides", 1), ("dilations", 1), ("pads", 2), ("output_shape", 1)];
    lengths.into_iter().find_map(|(name, times)| {
        let length = known.ints(name)?.len();
        (length != times * space).then(|| format!("has {length} numbers in `{name}` for {space} axes in space"))
    })
}
