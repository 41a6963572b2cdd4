//! Finds attention of hinges in the ONNX graph, as the passes of this project write it once they are done.
//!
//! The file stays plain ONNX, and where the nodes are others, as after another program's optimiser, they run one by one.

use mabert_graph::proto::NodeProto;
use mabert_graph::{Index, Model, NodeExt as _, attribute};

use super::super::kernel::Kernel;
use super::rows;
use super::wiring::{DOMAIN, OPERATOR};
use crate::Result;

/// Puts one node in the place of the nodes of each attention that is found; what they computed on the way is left to those
/// who use it. Returns how many there are.
///
/// # Errors
/// The graph is not valid.
pub(crate) fn gather(model: &mut Model) -> Result<usize> {
    let Some(width) = Kernel::get().map(Kernel::width).filter(|width| rows::WIDTHS.contains(width)) else {
        return Ok(0);
    };
    let index = Index::new(model)?;
    let finder = Finder { model, index: &index, width };
    let nodes = model.graph().node.iter().enumerate();
    let gathered: Vec<(usize, NodeProto)> =
        nodes.filter_map(|(at, node)| Some((at, finder.attention(node)?))).collect();
    let count = gathered.len();
    drop(index);
    for (at, node) in gathered {
        model.graph_mut().node[at] = node;
    }
    Ok(count)
}

struct Finder<'g> {
    model: &'g Model,
    index: &'g Index<'g>,
    /// Of the kernel's panels.
    width: usize,
}

/// Heads cut out of `[batch, tokens, parts * heads * d]`.
struct OfHeads<'g> {
    source: &'g str,
    heads: usize,
    channels: usize,
    part: usize,
    parts: usize,
}

impl<'g> Finder<'g> {
    /// The node that stands for all that leads to `joined`, contexts of heads `[batch, q, heads * d]`.
    fn attention(&self, joined: &'g NodeProto) -> Option<NodeProto> {
        let turned = joined.is("Reshape").then(|| self.node(joined.input.first()?, "Transpose"))??;
        let contexts = turned.input.first().filter(|_| self.permutes(turned, [0, 2, 1, 3]))?;
        let [rest, shared] = self.pair(contexts, "Add")?;
        let [seen, at_ends] = self.pair(rest, "Add")?;
        // What all keys share, and what the ends get.
        let [of_mean, even] = self.pair(shared, "Mul")?;
        let [mean_row, value] = self.pair(of_mean, "MatMul")?;
        let [sinks, of_ends] = self.pair(at_ends, "MatMul")?;
        let [end_rows, same_value] = self.pair(of_ends, "MatMul")?;
        (same_value == value).then_some(())?;
        let (thresholds, first_sink) = self.column(self.only(sinks, "Relu")?)?;
        let [computed, b2] = self.pair(thresholds, "Add")?;
        let [inner, w2] = self.pair(computed, "MatMul")?;
        let [hidden, features] = self.all(inner, "Concat")?.try_into().ok()?;
        let [weighted, b1] = self.pair(self.only(hidden, "Relu")?, "Add")?;
        let [same_features, w1] = self.pair(weighted, "MatMul")?;
        (same_features == features).then_some(())?;
        let known = self.all(features, "Concat")?;
        let (at_ends, statistics) = known.split_last()?;
        let hinges = self.hinges(seen, first_sink)?;
        let centred = hinges.first()?.scores;
        // [batch, H, d, n]: keys from their mean.
        let [query, keys] = self.pair(centred, "MatMul")?;
        let [key, mean] = self.pair(keys, "Sub")?;
        let [same_key, mean_column] = self.pair(mean, "MatMul")?;
        let [same_query, keys_at_ends] = self.pair(at_ends, "MatMul")?;
        let [same_keys, end_columns] = self.pair(keys_at_ends, "MatMul")?;
        let same = same_key == key && same_query == query && same_keys == keys;
        let alike = self.same_values(mean_row, mean_column) && self.same_ends(end_rows, end_columns);
        (same && alike).then_some(())?;
        let thresholds_of = |statistic: &&'g str| self.statistic(statistic, centred, mean_column);
        let statistics: Vec<&str> = statistics.iter().map(thresholds_of).collect::<Option<_>>()?;
        let masked = |hinge: &Hinge<'g>| {
            let [values, weight] = self.pair(hinge.values, "Mul")?;
            let [same_value, mask] = self.pair(values, "Mul")?;
            (same_value == value && hinge.scores == centred && hinge.thresholds == thresholds).then_some((mask, weight))
        };
        let (masks, weights): (Vec<_>, Vec<_>) =
            hinges.iter().map(masked).collect::<Option<Vec<_>>>()?.into_iter().unzip();
        masks.iter().all(|mask| mask == &masks[0]).then_some(())?;
        let weights = self.weights(&weights)?;
        let [of_query, of_key, of_value] =
            [self.of_heads(query)?, self.of_heads(self.untransposed(key)?)?, self.of_heads(value)?];
        let beside = of_key.source == of_value.source && of_value.part == of_key.part + 1;
        let fits = of_query.part == 0
            && beside
            && of_key.channels.is_multiple_of(self.width)
            && (1..=rows::MOST).contains(&statistics.len())
            && hinges.len() <= rows::MOST;
        fits.then_some(())?;
        let mut inputs =
            vec![of_query.source, of_key.source, masks[0], mean_row, end_rows, b1, b2, weights, even, w1, w2];
        inputs.extend(statistics);
        let parameters = inputs.iter().skip(9).all(|name| self.index.is_initializer(name));
        parameters.then(|| self.gathered(joined, &inputs, [&of_query, &of_key]))
    }

    fn gathered(&self, joined: &NodeProto, inputs: &[&str], [query, key]: [&OfHeads<'_>; 2]) -> NodeProto {
        let size = |name: &str, value: usize| attribute::int(name, value as i64);
        NodeProto {
            op_type: OPERATOR.to_owned(),
            domain: DOMAIN.to_owned(),
            name: joined.name.clone(),
            input: inputs.iter().map(|name| (*name).to_owned()).collect(),
            output: joined.output.clone(),
            attribute: vec![
                size("heads", query.heads),
                size("channels", query.channels),
                size("query_parts", query.parts),
                size("key_parts", key.parts),
                size("key_part", key.part),
            ],
            ..NodeProto::default()
        }
    }

    /// `sum_g relu(scores - thresholds_g) (m V weight_g)`, in the order of `g`.
    fn hinges(&self, seen: &'g str, count: usize) -> Option<Vec<Hinge<'g>>> {
        let mut terms = Vec::new();
        let mut rest = seen;
        while terms.len() + 1 < count {
            let [sum, last] = self.pair(rest, "Add")?;
            terms.push(last);
            rest = sum;
        }
        terms.push(rest);
        let hinge = |(g, term): (usize, &'g str)| {
            let [hinge, values] = self.pair(term, "MatMul")?;
            let [scores, threshold] = self.pair(self.only(hinge, "Relu")?, "Sub")?;
            let (thresholds, at) = self.column(threshold)?;
            (at == g).then_some(Hinge { scores, thresholds, values })
        };
        terms.into_iter().rev().enumerate().map(hinge).collect()
    }

    /// The threshold of a statistic, `relu(scores - threshold) mean`.
    fn statistic(&self, statistic: &'g str, scores: &str, mean_column: &str) -> Option<&'g str> {
        let [above, mean] = self.pair(statistic, "MatMul")?;
        let [from, threshold] = self.pair(self.only(above, "Relu")?, "Sub")?;
        (from == scores && mean == mean_column).then_some(threshold)
    }

    /// The value that holds all hinges' weights.
    fn weights(&self, each: &[&'g str]) -> Option<&'g str> {
        let [one] = each else {
            let columns: Vec<(&str, usize)> = each.iter().map(|weight| self.column(weight)).collect::<Option<_>>()?;
            let in_order = columns.iter().enumerate().all(|(g, (all, at))| *all == columns[0].0 && *at == g);
            return in_order.then_some(columns[0].0);
        };
        Some(one)
    }

    fn node(&self, value: &str, operator: &str) -> Option<&'g NodeProto> {
        self.index.producer(value).filter(|node| node.is(operator))
    }

    fn all(&self, value: &str, operator: &str) -> Option<Vec<&'g str>> {
        Some(self.node(value, operator)?.input.iter().map(String::as_str).collect())
    }

    fn pair(&self, value: &str, operator: &str) -> Option<[&'g str; 2]> {
        self.all(value, operator)?.try_into().ok()
    }

    fn only(&self, value: &str, operator: &str) -> Option<&'g str> {
        let [input] = self.all(value, operator)?.try_into().ok()?;
        Some(input)
    }

    /// What a value is cut out of along its last axis, and from where on.
    fn column(&self, value: &str) -> Option<(&'g str, usize)> {
        let (source, start, _) = self.slice(value, 3)?;
        Some((source, start))
    }

    fn slice(&self, value: &str, axis: i64) -> Option<(&'g str, usize, usize)> {
        let node = self.node(value, "Slice").filter(|node| node.input.len() == 4)?;
        let number = |at: usize| -> Option<i64> {
            let values = self.model.constant(&node.input[at]).ok()?.to_i64()?;
            (values.len() == 1).then(|| values.iter().next().copied())?
        };
        let (start, end) = (usize::try_from(number(1)?).ok()?, usize::try_from(number(2)?).ok()?);
        (number(3)? == axis && start < end).then_some((node.input[0].as_str(), start, end))
    }

    fn permutes(&self, node: &NodeProto, order: [i64; 4]) -> bool {
        node.ints("perm").is_some_and(|perm| perm == order)
    }

    /// What `[batch, heads, d, n]` is turned from.
    fn untransposed(&self, key: &str) -> Option<&'g str> {
        let node = self.node(key, "Transpose").filter(|node| self.permutes(node, [0, 1, 3, 2]))?;
        node.input.first().map(String::as_str)
    }

    /// `[batch, heads, tokens, d]` as it is cut out of `[batch, tokens, parts * heads * d]`.
    fn of_heads(&self, value: &'g str) -> Option<OfHeads<'g>> {
        let cut = self.slice(value, 1);
        let turned = self.node(cut.map_or(value, |(source, ..)| source), "Transpose")?;
        let split = self.permutes(turned, [0, 2, 1, 3]).then(|| self.node(&turned.input[0], "Reshape"))??;
        let dims: Vec<i64> = self.model.constant(split.input.get(1)?).ok()?.to_i64()?.iter().copied().collect();
        let [0, 0, all, channels] = dims[..] else { return None };
        let (all, channels) = (usize::try_from(all).ok()?, usize::try_from(channels).ok()?);
        let (start, end) = cut.map_or((0, all), |(_, start, end)| (start, end));
        let heads = end - start;
        let whole = end <= all && all.is_multiple_of(heads) && start.is_multiple_of(heads);
        let source = split.input[0].as_str();
        whole.then(|| OfHeads { source, heads, channels, part: start / heads, parts: all / heads })
    }

    /// Whether two values are one, seen in other shapes.
    fn same_values(&self, one: &str, other: &str) -> bool {
        let source = |value: &str| Some(self.node(value, "Reshape")?.input[0].as_str());
        source(one).is_some() && source(one) == source(other)
    }

    fn same_ends(&self, rows: &str, columns: &str) -> bool {
        let [Some(rows), Some(columns)] = [rows, columns].map(|ends| self.all(ends, "Concat")) else { return false };
        rows.len() == columns.len() && rows.iter().zip(columns).all(|(row, column)| self.same_values(row, column))
    }
}

/// One hinge of all scores.
struct Hinge<'g> {
    scores: &'g str,
    thresholds: &'g str,
    /// `m V weight`.
    values: &'g str,
}
