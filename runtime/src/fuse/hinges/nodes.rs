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

/// Values that an attention is made of.
struct Attention<'g> {
    query: &'g str,
    /// Transposed.
    key: &'g str,
    value: &'g str,
    mask: &'g str,
    mean_row: &'g str,
    end_rows: &'g str,
    weights: &'g str,
    even: &'g str,
    thresholds: Thresholds<'g>,
}

/// Thresholds and sinks, with what they are computed from.
struct Thresholds<'g> {
    value: &'g str,
    /// Sinks are the columns from here on.
    first_sink: usize,
    /// One after the other; last the scores at the ends.
    known: Vec<&'g str>,
    /// `b1`, `b2`, `w1`, `w2`.
    parameters: [&'g str; 4],
}

impl<'g> Finder<'g> {
    /// The node that stands for all that leads to `joined`, contexts of heads `[batch, q, heads * d]`.
    fn attention(&self, joined: &'g NodeProto) -> Option<NodeProto> {
        let turned = joined.is("Reshape").then(|| self.node(joined.input.first()?, "Transpose"))??;
        let contexts = turned.input.first().filter(|_| self.permutes(turned, [0, 2, 1, 3]))?;
        let attention = self.by_contexts(contexts).or_else(|| self.by_probabilities(contexts))?;
        let Attention { query, key, value, mask, mean_row, end_rows, weights, even, thresholds } = attention;
        let [b1, b2, w1, w2] = thresholds.parameters;
        let of_heads = [self.of_heads(query)?, self.of_keys(key)?, self.of_heads(value)?];
        let [of_query, of_key, of_value] = &of_heads;
        let statistics = thresholds.known.split_last()?.1.iter().map(|statistic| self.threshold(statistic));
        let statistics = statistics.collect::<Option<Vec<_>>>()?;
        let fits = of_heads.iter().all(|of| (of.heads, of.channels) == (of_query.heads, of_query.channels))
            && of_query.channels.is_multiple_of(self.width)
            && (1..=rows::MOST).contains(&statistics.len())
            && thresholds.first_sink <= rows::MOST;
        fits.then_some(())?;
        let sources = of_heads.each_ref().map(|of| of.source);
        let mut inputs = sources.to_vec();
        inputs.extend([mask, mean_row, end_rows, b1, b2, weights, even, w1, w2]);
        let first_parameter = inputs.len() - 2;
        inputs.extend(statistics);
        let constant = inputs[first_parameter..].iter().all(|name| self.index.is_initializer(name));
        constant.then(|| self.gathered(joined, &inputs, [of_query, of_key, of_value]))
    }

    /// Hinges that meet the values one by one, of keys from their mean.
    fn by_contexts(&self, contexts: &'g str) -> Option<Attention<'g>> {
        let [rest, shared] = self.pair(contexts, "Add")?;
        let [seen, at_ends] = self.pair(rest, "Add")?;
        let [of_mean, even] = self.pair(shared, "Mul")?;
        let [mean_row, value] = self.pair(of_mean, "MatMul")?;
        let [sinks, of_ends] = self.pair(at_ends, "MatMul")?;
        let [end_rows, same_value] = self.pair(of_ends, "MatMul")?;
        let thresholds = self.thresholds(sinks)?;
        let hinges = self.hinges(seen, "MatMul", &thresholds)?;
        let scores = hinges.first()?.scores;
        let [query, keys] = self.pair(scores, "MatMul")?;
        let [key, mean] = self.pair(keys, "Sub")?;
        let [same_key, mean_column] = self.pair(mean, "MatMul")?;
        let [same_query, keys_at_ends] = self.pair(thresholds.known.last()?, "MatMul")?;
        let [same_keys, end_columns] = self.pair(keys_at_ends, "MatMul")?;
        let masked = |hinge: &Hinge<'g>| {
            let [values, weight] = self.pair(hinge.by, "Mul")?;
            let [same_value, mask] = self.pair(values, "Mul")?;
            (same_value == value).then_some((mask, weight))
        };
        let (masks, weights): (Vec<_>, Vec<_>) =
            hinges.iter().map(masked).collect::<Option<Vec<_>>>()?.into_iter().unzip();
        let (mask, weights) = (masks[0], self.weights(&weights)?);
        let same = [(same_value, value), (same_key, key), (same_query, query), (same_keys, keys)];
        let is_one = same.iter().all(|(one, other)| one == other) && masks.iter().all(|other| *other == mask);
        let attention = Attention { query, key, value, mask, mean_row, end_rows, weights, even, thresholds };
        (is_one && self.sees_alike(&attention, &hinges, [mean_column, end_columns])).then_some(attention)
    }

    /// Probabilities that meet the values, of scores from their mean: a student that is not finished yet, or whose
    /// probabilities are shown.
    fn by_probabilities(&self, contexts: &'g str) -> Option<Attention<'g>> {
        let [probabilities, value] = self.pair(contexts, "MatMul")?;
        let [rest, shared] = self.pair(probabilities, "Add")?;
        let [seen, at_ends] = self.pair(rest, "Add")?;
        let [even, mean_row] = self.pair(shared, "Mul")?;
        let [sinks, end_rows] = self.pair(at_ends, "MatMul")?;
        let [sum, mask] = self.pair(seen, "Mul")?;
        let thresholds = self.thresholds(sinks)?;
        let hinges = self.hinges(sum, "Mul", &thresholds)?;
        let centred = hinges.first()?.scores;
        let [scores, mean] = self.pair(centred, "Sub")?;
        let [same_scores, mean_column] = self.pair(mean, "MatMul")?;
        let [same_centred, end_columns] = self.pair(thresholds.known.last()?, "MatMul")?;
        let [query, key] = self.pair(scores, "MatMul")?;
        let weights = self.weights(&hinges.iter().map(|hinge| hinge.by).collect::<Vec<_>>())?;
        let attention = Attention { query, key, value, mask, mean_row, end_rows, weights, even, thresholds };
        let is_one = same_scores == scores && same_centred == centred;
        (is_one && self.sees_alike(&attention, &hinges, [mean_column, end_columns])).then_some(attention)
    }

    /// Whether hinges and statistics look at the same scores in the same way.
    fn sees_alike(&self, attention: &Attention<'g>, hinges: &[Hinge<'g>], columns: [&str; 2]) -> bool {
        let [mean_column, end_columns] = columns;
        let Attention { mean_row, end_rows, thresholds, .. } = attention;
        let scores = hinges[0].scores;
        let (_, statistics) = thresholds.known.split_last().expect("looked at before");
        let is_of_scores = |statistic: &&'g str| self.statistic(statistic) == Some((scores, mean_column));
        hinges.iter().all(|hinge| hinge.scores == scores)
            && statistics.iter().all(is_of_scores)
            && self.same_values(mean_row, mean_column)
            && self.same_ends(end_rows, end_columns)
    }

    fn thresholds(&self, sinks: &'g str) -> Option<Thresholds<'g>> {
        let (value, first_sink) = self.column(self.only(sinks, "Relu")?)?;
        let [computed, b2] = self.pair(value, "Add")?;
        let [inner, w2] = self.pair(computed, "MatMul")?;
        let [hidden, features] = self.all(inner, "Concat")?.try_into().ok()?;
        let [weighted, b1] = self.pair(self.only(hidden, "Relu")?, "Add")?;
        let [same_features, w1] = self.pair(weighted, "MatMul")?;
        let known = self.all(features, "Concat")?;
        (same_features == features).then_some(Thresholds { value, first_sink, known, parameters: [b1, b2, w1, w2] })
    }

    fn gathered(&self, joined: &NodeProto, inputs: &[&str], of_heads: [&OfHeads<'_>; 3]) -> NodeProto {
        let [query, key, value] = of_heads;
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
                size("value_parts", value.parts),
                size("query_part", query.part),
                size("key_part", key.part),
                size("value_part", value.part),
            ],
            ..NodeProto::default()
        }
    }

    /// `sum_g relu(scores - thresholds_g) by_g`, in the order of `g`; `by` is multiplied with by an operator.
    fn hinges(&self, sum: &'g str, operator: &str, thresholds: &Thresholds<'g>) -> Option<Vec<Hinge<'g>>> {
        let mut terms = Vec::new();
        let mut rest = sum;
        while terms.len() + 1 < thresholds.first_sink {
            let [sum, last] = self.pair(rest, "Add")?;
            terms.push(last);
            rest = sum;
        }
        terms.push(rest);
        let hinge = |(g, term): (usize, &'g str)| {
            let [hinge, by] = self.pair(term, operator)?;
            let [scores, threshold] = self.pair(self.only(hinge, "Relu")?, "Sub")?;
            (self.column(threshold)? == (thresholds.value, g)).then_some(Hinge { scores, by })
        };
        terms.into_iter().rev().enumerate().map(hinge).collect()
    }

    /// What a statistic `relu(scores - threshold) mean` looks at: the scores, and the mean's column.
    fn statistic(&self, statistic: &str) -> Option<(&'g str, &'g str)> {
        let [above, mean] = self.pair(statistic, "MatMul")?;
        let [from, _] = self.pair(self.only(above, "Relu")?, "Sub")?;
        Some((from, mean))
    }

    /// The threshold of a statistic.
    fn threshold(&self, statistic: &str) -> Option<&'g str> {
        let [above, _] = self.pair(statistic, "MatMul")?;
        let [_, threshold] = self.pair(self.only(above, "Relu")?, "Sub")?;
        Some(threshold)
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

    /// `[batch, heads, d, tokens]` as it is cut out of `[batch, tokens, parts * heads * d]`.
    fn of_keys(&self, value: &'g str) -> Option<OfHeads<'g>> {
        let turned = self.node(value, "Transpose")?;
        match self.permutes(turned, [0, 2, 3, 1]) {
            true => self.split(&turned.input[0], None),
            false => self.permutes(turned, [0, 1, 3, 2]).then(|| self.of_heads(&turned.input[0]))?,
        }
    }

    /// `[batch, heads, tokens, d]`, likewise.
    fn of_heads(&self, value: &'g str) -> Option<OfHeads<'g>> {
        let cut = self.slice(value, 1);
        let turned = self.node(cut.map_or(value, |(source, ..)| source), "Transpose")?;
        let heads = cut.map(|(_, start, end)| (start, end));
        self.permutes(turned, [0, 2, 1, 3]).then(|| self.split(&turned.input[0], heads))?
    }

    /// `[batch, tokens, parts * heads, d]`, of which `heads` are wanted, or all.
    fn split(&self, value: &'g str, heads: Option<(usize, usize)>) -> Option<OfHeads<'g>> {
        let split = self.node(value, "Reshape")?;
        let dims: Vec<i64> = self.model.constant(split.input.get(1)?).ok()?.to_i64()?.iter().copied().collect();
        let [0, 0, all, channels] = dims[..] else { return None };
        let (all, channels) = (usize::try_from(all).ok()?, usize::try_from(channels).ok()?);
        let (start, end) = heads.unwrap_or((0, all));
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
    /// What it is multiplied by: its weight, or `m V weight`.
    by: &'g str,
}
