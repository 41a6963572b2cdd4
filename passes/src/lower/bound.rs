//! Exact within the bounds: behind every norm of a layer the stream saturates, so that no input makes it grow without end.
//!
//! A norm's output `y = a r + c` is held to `m - w .. m + w`, channel by channel. The middle `m` is that of what calibration
//! saw. The width `w` is one number times the basis `p` that folding leaves the stream in: with `y = p s + m`, `s` is held
//! to `-limit .. limit`, which a single `Clip` does for all channels. The limit is that of the channel that needs most
//! room, so that every channel has a margin of [`BOUND_MARGIN`] at least. What goes into the first layer needs no bound:
//! embeddings are as large as their tables.

use std::collections::BTreeMap;

use mabert_graph::{Builder, Model, NodeExt as _};
use ndarray::{Array1, ArrayView2};

use super::basis::Through;
use super::norm::norm_parameters;
use super::weights::{single, vector};
use crate::Result;
use crate::sites::{Encoder, Precision, SiteId};

/// How far bounds lie beyond what calibration saw of a channel, on both sides, relative to how wide that is.
pub const BOUND_MARGIN: f64 = 1.0;
/// Room for rounding, where calibration saw next to one value of all channels.
const LEAST_LIMIT: f64 = 1e-3;
/// How what holds the stream is called, after its site; folding calls it [`FOLDED`] instead.
const SCOPE: &str = "bound";
pub(super) const FOLDED: &str = "folded_bound";

/// The least and the largest value of each channel, `[channels]` each.
#[derive(Clone, Debug)]
pub struct ChannelRanges {
    least: Vec<f32>,
    largest: Vec<f32>,
}

/// What calibration saw of the output of each norm.
pub type NormRanges = BTreeMap<SiteId, ChannelRanges>;

impl ChannelRanges {
    /// Of values `[tokens, channels]`; those that are not finite do not count.
    pub fn of(rows: ArrayView2<'_, f32>) -> Self {
        let none = || vec![f32::NAN; rows.ncols()];
        let mut ranges = Self { least: none(), largest: none() };
        for row in rows.rows() {
            for (channel, &value) in row.iter().enumerate().filter(|(_, value)| value.is_finite()) {
                ranges.least[channel] = ranges.least[channel].min(value);
                ranges.largest[channel] = ranges.largest[channel].max(value);
            }
        }
        ranges
    }

    /// Makes room for what `other` has of as many channels.
    pub fn join(&mut self, other: &Self) {
        let join = |own: &mut Vec<f32>, others: &[f32], pick: fn(f32, f32) -> f32| {
            own.iter_mut().zip(others).for_each(|(own, &other)| *own = pick(*own, other));
        };
        join(&mut self.least, &other.least, f32::min);
        join(&mut self.largest, &other.largest, f32::max);
    }
}

/// How a norm's output is held: `y = p s + middle` with `s` in `-limit .. limit`.
#[derive(Clone, Debug)]
pub(crate) struct Bound {
    pub(super) middle: Array1<f64>,
    pub(super) limit: f32,
}

impl Bound {
    fn new(ranges: &ChannelRanges, p: &Array1<f64>) -> Self {
        let channels = || ranges.least.iter().zip(&ranges.largest).map(|(&a, &b)| [f64::from(a), f64::from(b)]);
        // Of a channel that was never finite nothing is known.
        let known = |value: f64| if value.is_nan() { 0.0 } else { value };
        let middle = channels().map(|[least, largest]| known(least.midpoint(largest))).collect();
        let needed = channels().zip(p).map(|([least, largest], p)| (0.5 + BOUND_MARGIN) * (largest - least) / p.abs());
        Self { middle, limit: needed.map(known).fold(LEAST_LIMIT, f64::max) as f32 }
    }
}

/// How the outputs of norms are held.
pub(crate) type Bounds = BTreeMap<SiteId, Bound>;

/// Bounds every norm of a layer of which something was seen; all norms must be affine. Weights will be rounded to
/// `precision`. What is made here is for folding to simplify.
///
/// # Errors
/// A parameter cannot be read, or the graph's wiring is broken.
pub(crate) fn bound_norms(
    model: &mut Model,
    encoder: &Encoder,
    seen: &NormRanges,
    precision: Precision,
) -> Result<Bounds> {
    let builder = Builder::new(model.opset(), "bound");
    let b = &builder;
    let mut p = Array1::ones(encoder.embedding_norm.gamma.len());
    let mut bounds = Bounds::new();
    let mut shunts = Vec::new();
    for (id, site) in encoder.norms() {
        let [scale, _] = norm_parameters(id);
        p = Through::norm(&p, &vector(model, &scale)?, precision).p;
        if id == SiteId::EmbeddingNorm {
            if let Some(projection) = &encoder.embedding_projection {
                p = Array1::ones(projection.outputs);
            }
            continue;
        }
        let Some(ranges) = seen.get(&id) else { continue };
        let bound = Bound::new(ranges, &p);
        b.scope(&format!("{id}/{SCOPE}"));
        let middle = b.parameter("middle", &single(&bound.middle));
        let inverse = b.parameter("inverse", &single(&p.mapv(f64::recip)));
        let basis = b.parameter("basis", &single(&p));
        let held = ((b.value(&site.output) - middle) * inverse).clip(-bound.limit, bound.limit);
        shunts.push((&site.output, held * basis + middle));
        bounds.insert(id, bound);
    }
    builder.patch_with(shunts).apply(model)?;
    Ok(bounds)
}

/// A place at which a student's stream saturates.
#[derive(Clone, Debug, PartialEq)]
pub struct Saturation {
    /// The norm behind which it does.
    pub site: SiteId,
    /// The value that is held, `[batch, n, channels]`; of the first tokens alone, where a head reads no others.
    pub value: String,
    /// It stays between `-limit` and `limit`.
    pub limit: f32,
}

/// Where the stream of a student saturates, as its graph tells, in the order in which values pass.
pub fn saturations(model: &Model) -> Vec<Saturation> {
    let limit = |name: Option<&String>| model.constant(name?).ok()?.to_f32().iter().copied().next();
    let saturation = |node: &mabert_graph::proto::NodeProto| {
        let (scope, _) = node.name.rsplit_once('/')?;
        let (site, held) = scope.rsplit_once('/')?;
        let site = [SCOPE, FOLDED].contains(&held).then(|| site.parse().ok())??;
        let by_attribute = node.attribute("max").map(|a| a.f);
        let limit = by_attribute.or_else(|| limit(node.input.get(2)))?;
        node.is("Clip").then(|| Saturation { site, value: node.output[0].clone(), limit })
    };
    model.graph().node.iter().filter_map(saturation).collect()
}

#[cfg(test)]
mod tests {
    use ndarray::{Axis, arr2};

    use super::*;
    use crate::pipeline::{Pass, Skipped, Student};
    use crate::sites::LayerSite;
    use crate::testing::{
        CHANNELS, bounded_student, largest_output_difference, layer_text, norm_ranges, options, student, unbounded,
        values,
    };

    #[test]
    fn ranges_are_those_of_all_finite_values() {
        let mut ranges = ChannelRanges::of(arr2(&[[1f32, f32::NAN], [-3.0, f32::INFINITY]]).view());
        ranges.join(&ChannelRanges::of(arr2(&[[2f32, 7.0]]).view()));
        assert_eq!((ranges.least, ranges.largest), (vec![-3.0, 7.0], vec![2.0, 7.0]));
        let never = ChannelRanges::of(arr2(&[[f32::NAN]]).view());
        let bound = Bound::new(&never, &Array1::ones(1));
        assert_eq!((bound.middle[0], f64::from(bound.limit)), (0.0, f64::from(LEAST_LIMIT as f32)));
    }

    /// Every channel has the margin on both sides at least, and one has no more.
    #[test]
    fn limits_lie_beyond_what_was_seen() {
        let before = student(Pass::Norm);
        let seen = norm_ranges(&before.model, &before.encoder, &[6, 3, 1]);
        let after = bounded_student(Pass::Bound);
        assert_eq!(after.outcomes.iter().find(|o| o.pass == Pass::Bound).unwrap().changed, 2);
        assert_eq!(saturations(&after.model).len(), 2);
        for (id, bound) in &after.bounds {
            let basis = after.model.constant(&format!("{id}/bound/basis")).unwrap().to_f32();
            let ranges = &seen[id];
            let margins = (0..CHANNELS).map(|at| {
                let room = bound.limit * basis[[at]].abs() - (ranges.largest[at] - ranges.least[at]) / 2.0;
                room / (ranges.largest[at] - ranges.least[at])
            });
            let margins: Vec<f32> = margins.collect();
            let least = margins.iter().copied().fold(f32::INFINITY, f32::min);
            assert!((f64::from(least) - BOUND_MARGIN).abs() < 1e-4, "{id}: {margins:?}");
        }
    }

    #[test]
    fn values_within_the_bounds_stay_as_they_are_and_others_are_held() {
        let (before, after) = (student(Pass::Norm), bounded_student(Pass::Bound));
        assert!(largest_output_difference(&before.model, &after.model) < 1e-4);
        // The same student, whose embeddings are a thousand times as large.
        let grown = |student: &Student| {
            let mut model = student.model.clone();
            let words = model.constant("words").unwrap().to_f32() * 1e3;
            model.set_constant("words", &words.into());
            model
        };
        let (id, site) = after.encoder.norms()[1];
        let [free, held] = [&before, &after].map(|student| values(&grown(student), &[&site.output], &[5, 2]).remove(0));
        let basis = after.model.constant(&format!("{id}/bound/basis")).unwrap().to_f32();
        let bound = &after.bounds[&id];
        let mut saturated = 0;
        for (channel, (free, held)) in free.axis_iter(Axis(2)).zip(held.axis_iter(Axis(2))).enumerate() {
            let (middle, width) = (bound.middle[channel] as f32, bound.limit * basis[[channel]].abs());
            for (free, held) in free.iter().zip(held) {
                let expected = free.clamp(middle - width, middle + width);
                saturated += usize::from(expected != *free);
                assert!((held - expected).abs() < 1e-3 * width, "{held} for {expected}");
            }
        }
        assert!(saturated > 20, "{saturated}");
    }

    /// Folded, the bounds hold the same values to the same limits, be they reached or not.
    #[test]
    fn folding_keeps_the_bounds() {
        let (before, after) = (bounded_student(Pass::Reassociate), bounded_student(Pass::Fold));
        let difference = largest_output_difference(&before.model, &after.model);
        assert!(difference < 1e-4, "{difference}");
        for times in [5.0, 1e4] {
            let [before, after] = [&before, &after].map(|student| {
                let mut model = student.model.clone();
                let words = model.constant("words").unwrap().to_f32() * times;
                model.set_constant("words", &words.into());
                model
            });
            let difference = largest_output_difference(&before, &after);
            assert!(difference < 1e-4 * times.min(20.0), "{times}: {difference}");
        }
        let clips = after.model.operators()["Clip"];
        assert_eq!((clips, saturations(&after.model).len()), (2, 2));
        insta::assert_snapshot!(layer_text(&after.model));
    }

    #[test]
    fn a_channel_with_an_explicit_scale_is_held_too() {
        let before = student(Pass::Reassociate);
        let mut model = before.model.clone();
        let [scale, _] = norm_parameters(SiteId::Layer(0, LayerSite::AttentionNorm));
        let mut factors = vec![0.9f32; CHANNELS];
        (factors[1], factors[4], factors[6]) = (1e-5, 1e5, 0.0);
        model.set_constant(&scale, &mabert_graph::Tensor::new(&[CHANNELS], factors));
        let mut encoder = before.encoder.clone();
        let changed = model.clone();
        let seen = norm_ranges(&changed, &encoder, &[6, 3, 1]);
        let bounds = bound_norms(&mut model, &encoder, &seen, Precision::Single).unwrap();
        let unfolded = model.clone();
        let report = crate::lower::fold_norms(&mut model, &mut encoder, Precision::Single, &bounds).unwrap();
        assert_eq!(report.explicit_channels, 3);
        let difference = largest_output_difference(&unfolded, &model);
        assert!(difference < 1e-4 * 1e5, "{difference}");
        let difference = largest_output_difference(&changed, &unfolded);
        assert!(difference < 1e-4 * 1e5, "{difference}");
    }

    #[test]
    fn what_is_not_bounded_says_why() {
        let reason = |student: &Student| student.outcomes.iter().find(|o| o.pass == Pass::Bound).unwrap().skipped;
        let off = crate::pipeline::PassOptions { bounds: false, ..options(None) };
        let mut student = unbounded(off);
        student.bound(Some(NormRanges::new())).unwrap();
        assert_eq!(reason(&student), Some(Skipped::BoundsOff));
        let mut student = unbounded(options(None));
        student.bound(None).unwrap();
        assert_eq!(reason(&student), Some(Skipped::NotCalibrated));
        let keep = crate::pipeline::Keep { norm: true, ..Default::default() };
        let mut student = unbounded(crate::pipeline::PassOptions { keep, ..options(None) });
        student.bound(None).unwrap();
        assert_eq!(reason(&student), Some(Skipped::NormKept));
        assert!(saturations(&student.model).is_empty());
    }

    /// Before operator set 11 limits are attributes.
    #[test]
    fn limits_are_read_off_the_graph() {
        for opset in [10, 17] {
            let b = Builder::new(opset, "test");
            let x = b.input("x", mabert_graph::ElementType::F32, &["n", "2"]);
            b.scope("layer.3/output/norm/bound");
            let held = x.clip(-2.5, 2.5);
            let value = held.name();
            b.scope("somewhere/else");
            let model = b.model(&[held.clip(-9.0, 9.0).named("y")]);
            let site = SiteId::Layer(3, LayerSite::OutputNorm);
            assert_eq!(saturations(&model), [Saturation { site, value, limit: 2.5 }]);
        }
    }
}
