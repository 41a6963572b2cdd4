//! What hinges make of scores: some queries side by side along the lanes, keys as rows.
//!
//! The scores of one panel stay in the first-level cache, and are gone over three times: for their mean, for the statistics,
//! and for the hinges.
#![allow(unsafe_code)]

/// Statistics and hinges of a head are at most so many: their sums stay in registers.
pub(super) const MOST: usize = 4;

/// What is known of the keys of a sequence, `[n]` each.
#[derive(Clone, Copy)]
pub(super) struct Keys<'k> {
    /// `m / len`.
    pub(super) mean: &'k [f32],
    /// 1 at the first and at the last real token.
    pub(super) ends: [&'k [f32]; 2],
}

/// A head's parameters, as they apply to a sequence; see `HingeParameters` of the passes.
#[derive(Clone, Copy)]
pub(super) struct Head<'h> {
    /// Thresholds of the statistics, `[R]`.
    pub(super) statistics: &'h [f32],
    /// `[X, hidden]`, where `X` is `R + 2`.
    pub(super) w1: &'h [f32],
    /// `[hidden]`.
    pub(super) b1: &'h [f32],
    /// `[hidden + X, G + 2]`.
    pub(super) w2: &'h [f32],
    /// `[G + 2]`.
    pub(super) b2: &'h [f32],
    /// `[G]`.
    pub(super) weights: &'h [f32],
    pub(super) even: f32,
}

/// Turns scores of one panel, `[n, width]`, into probabilities of keys whose values are masked.
///
/// # Panics
/// The width is none of a kernel's, or sizes do not fit.
pub(super) fn probabilities(width: usize, scores: &mut [f32], keys: Keys<'_>, head: &Head<'_>) {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the machine has it.
            return unsafe { with_avx512(width, scores, keys, head) };
        }
        if is_x86_feature_detected!("fma") && is_x86_feature_detected!("avx2") {
            // SAFETY: the machine has them.
            return unsafe { with_fma(width, scores, keys, head) };
        }
    }
    any_width(width, scores, keys, head);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn with_avx512(width: usize, scores: &mut [f32], keys: Keys<'_>, head: &Head<'_>) {
    any_width(width, scores, keys, head);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn with_fma(width: usize, scores: &mut [f32], keys: Keys<'_>, head: &Head<'_>) {
    any_width(width, scores, keys, head);
}

/// Widths that a kernel may have.
pub(super) const WIDTHS: [usize; 4] = [4, 8, 16, 32];

#[inline(always)]
fn any_width(width: usize, scores: &mut [f32], keys: Keys<'_>, head: &Head<'_>) {
    match width {
        4 => panel::<4>(scores.as_chunks_mut().0, keys, head),
        8 => panel::<8>(scores.as_chunks_mut().0, keys, head),
        16 => panel::<16>(scores.as_chunks_mut().0, keys, head),
        32 => panel::<32>(scores.as_chunks_mut().0, keys, head),
        _ => unreachable!("attention of hinges is only made for the widths above"),
    }
}

/// A number for each query.
type Lanes<const W: usize> = [f32; W];

#[inline(always)]
fn panel<const W: usize>(scores: &mut [Lanes<W>], keys: Keys<'_>, head: &Head<'_>) {
    let n = scores.len();
    assert!(keys.mean.len() == n && keys.ends.iter().all(|end| end.len() == n));
    let mean = mean(scores, keys.mean);
    let mut known = [[0f32; W]; MOST + 2];
    match head.statistics.len() {
        1 => statistics::<W, 1>(scores, keys, mean, head.statistics, &mut known),
        2 => statistics::<W, 2>(scores, keys, mean, head.statistics, &mut known),
        3 => statistics::<W, 3>(scores, keys, mean, head.statistics, &mut known),
        4 => statistics::<W, 4>(scores, keys, mean, head.statistics, &mut known),
        _ => {}
    }
    let r = head.statistics.len();
    for (end, at) in keys.ends.into_iter().zip(r..) {
        for (row, _) in scores.iter().zip(end).filter(|(_, share)| **share != 0.0) {
            for lane in 0..W {
                known[at][lane] = row[lane] - mean[lane];
            }
        }
    }
    let mut thresholds = thresholds(&known[..r + 2], head);
    let (of_hinges, sinks) = thresholds[..head.b2.len()].split_at_mut(head.weights.len());
    // Scores are not taken from their mean: thresholds are put there instead.
    for threshold in of_hinges.iter_mut() {
        for lane in 0..W {
            threshold[lane] += mean[lane];
        }
    }
    for sink in sinks.iter_mut() {
        *sink = positive(sink);
    }
    match of_hinges.len() {
        1 => hinges::<W, 1>(scores, keys, of_hinges, sinks, head),
        2 => hinges::<W, 2>(scores, keys, of_hinges, sinks, head),
        3 => hinges::<W, 3>(scores, keys, of_hinges, sinks, head),
        _ => hinges::<W, 4>(scores, keys, of_hinges, sinks, head),
    }
}

/// Keeps NaN.
#[inline(always)]
fn relu(value: f32) -> f32 {
    if value < 0.0 { 0.0 } else { value }
}

/// The mean of each query's scores. Padding may be anything, and counts nothing.
#[inline(always)]
fn mean<const W: usize>(scores: &[Lanes<W>], shares: &[f32]) -> Lanes<W> {
    let mut mean = [0f32; W];
    for (row, &share) in scores.iter().zip(shares) {
        if share != 0.0 {
            for lane in 0..W {
                mean[lane] += share * row[lane];
            }
        }
    }
    mean
}

#[inline(always)]
fn statistics<const W: usize, const R: usize>(
    scores: &[Lanes<W>],
    keys: Keys<'_>,
    mean: Lanes<W>,
    thresholds: &[f32],
    known: &mut [Lanes<W>],
) {
    let mut levels = [mean; R];
    for r in 0..R {
        for lane in 0..W {
            levels[r][lane] += thresholds[r];
        }
    }
    let mut sums = [[0f32; W]; R];
    for (row, &share) in scores.iter().zip(keys.mean) {
        if share != 0.0 {
            for r in 0..R {
                for lane in 0..W {
                    sums[r][lane] += share * relu(row[lane] - levels[r][lane]);
                }
            }
        }
    }
    known[..R].copy_from_slice(&sums);
}

/// Thresholds and sinks of what is known of each query.
#[inline(always)]
fn thresholds<const W: usize>(known: &[Lanes<W>], head: &Head<'_>) -> [Lanes<W>; MOST + 2] {
    let count = head.b2.len();
    let mut thresholds = [[0f32; W]; MOST + 2];
    for (threshold, bias) in thresholds.iter_mut().zip(head.b2) {
        *threshold = [*bias; W];
    }
    let (of_hidden, of_known) = head.w2.split_at(head.b1.len() * count);
    for (unit, weights) in of_hidden.chunks_exact(count).enumerate() {
        let mut value = [head.b1[unit]; W];
        for (known, weights) in known.iter().zip(head.w1.chunks_exact(head.b1.len())) {
            add(&mut value, known, weights[unit]);
        }
        let value = positive(&value);
        for (threshold, weight) in thresholds.iter_mut().zip(weights) {
            add(threshold, &value, *weight);
        }
    }
    for (known, weights) in known.iter().zip(of_known.chunks_exact(count)) {
        for (threshold, weight) in thresholds.iter_mut().zip(weights) {
            add(threshold, known, *weight);
        }
    }
    thresholds
}

#[inline(always)]
fn add<const W: usize>(sum: &mut Lanes<W>, value: &Lanes<W>, weight: f32) {
    for lane in 0..W {
        sum[lane] += weight * value[lane];
    }
}

#[inline(always)]
fn positive<const W: usize>(values: &Lanes<W>) -> Lanes<W> {
    let mut positive = *values;
    for value in &mut positive {
        *value = relu(*value);
    }
    positive
}

#[inline(always)]
fn hinges<const W: usize, const G: usize>(
    scores: &mut [Lanes<W>],
    keys: Keys<'_>,
    thresholds: &[Lanes<W>],
    sinks: &[Lanes<W>],
    head: &Head<'_>,
) {
    let mut levels = [[0f32; W]; G];
    let mut weights = [0f32; G];
    levels.copy_from_slice(&thresholds[..G]);
    weights.copy_from_slice(&head.weights[..G]);
    for (row, &share) in scores.iter_mut().zip(keys.mean) {
        let mut sum = [head.even * share; W];
        if share != 0.0 {
            for g in 0..G {
                for lane in 0..W {
                    sum[lane] += weights[g] * relu(row[lane] - levels[g][lane]);
                }
            }
        }
        *row = sum;
    }
    for (sink, end) in sinks.iter().zip(keys.ends) {
        for (row, _) in scores.iter_mut().zip(end).filter(|(_, share)| **share != 0.0) {
            add(row, sink, 1.0);
        }
    }
}
