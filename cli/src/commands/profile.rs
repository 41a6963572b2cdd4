//! `bench --profile`: the time of each operator and of each part of the layers, on tract.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Result;
use mabert_runtime::{Model, Named, borrowed};
use serde::Serialize;

use crate::print::{self, Page};

/// Where one model's time goes; milliseconds are means of a run.
#[derive(Serialize)]
pub(super) struct Profile {
    model: String,
    batch: usize,
    seq: usize,
    threads: usize,
    ms: f64,
    operators: Vec<Share>,
    sites: Vec<Share>,
}

#[derive(Serialize)]
struct Share {
    name: String,
    /// How many of them run.
    count: usize,
    ms: f64,
    /// Of the run.
    share: f64,
}

impl Profile {
    /// The mean of `runs` runs after one that does not count.
    pub(super) fn measure(path: &Path, model: &Model, inputs: &Named, runs: usize, threads: usize) -> Result<Self> {
        let inputs = borrowed(inputs);
        let shape = inputs.first().map_or(&[][..], |(_, t)| t.shape());
        model.profile(&inputs)?;
        let (mut operators, mut sites) = (BTreeMap::new(), BTreeMap::new());
        let mut seconds = 0.0;
        for _ in 0..runs {
            for timed in model.profile(&inputs)? {
                seconds += timed.seconds;
                for (into, name) in [(&mut operators, timed.operator.as_str()), (&mut sites, site(&timed.node))] {
                    let (count, sum): &mut (usize, f64) = into.entry(name.to_owned()).or_default();
                    *count += 1;
                    *sum += timed.seconds;
                }
            }
        }
        let ms = |seconds: f64| seconds * 1e3 / runs as f64;
        let shares = |sums: BTreeMap<String, (usize, f64)>| {
            let share = |(name, (count, s))| Share { name, count: count / runs, ms: ms(s), share: s / seconds };
            let mut shares: Vec<Share> = sums.into_iter().map(share).collect();
            shares.sort_by(|a, b| b.ms.total_cmp(&a.ms));
            shares
        };
        Ok(Self {
            model: path.display().to_string(),
            batch: shape.first().copied().unwrap_or(1),
            seq: shape.get(1).copied().unwrap_or(1),
            threads,
            ms: ms(seconds),
            operators: shares(operators),
            sites: shares(sites),
        })
    }

    pub(super) fn add_to(&self, page: &mut Page) {
        let Self { model, batch, seq, threads, ms, .. } = self;
        page.line("");
        page.line(format!(
            "{model} on tract, batch {batch}, length {seq}, {threads} threads: {ms:.2} ms a run in operators"
        ));
        for (column, shares) in [("Operator", &self.operators), ("Site, all layers", &self.sites)] {
            let row = |s: &Share| {
                vec![s.name.clone(), s.count.to_string(), format!("{:.3}", s.ms), format!("{:.1} %", 100.0 * s.share)]
            };
            page.lines(print::table(&[column, "Count", "ms", "Share"], 1, shares.iter().map(row)));
        }
    }
}

/// The part of a layer that a node belongs to, as nodes of rewritten models are named: `layer.3/attention/...`.
fn site(node: &str) -> &str {
    let part = node.strip_prefix("layer.").and_then(|rest| rest.split('/').nth(1));
    part.unwrap_or("outside the layers")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_of_layers_are_told_by_their_part() {
        assert_eq!(site("layer.11/attention/qkv/Add.linear"), "attention");
        assert_eq!(site("layer.0/output/folded/Add_2"), "output");
        assert_eq!(site("/bert/pooler/Gather"), "outside the layers");
    }
}
