//! What a student's norms put out for the calibration text, which bounds lie beyond.

use mabert_passes::lower::{ChannelRanges, NormRanges};
use mabert_passes::pipeline::Student;
use mabert_passes::sites::SiteId;
use rayon::prelude::*;

use super::token_weights::real_rows;
use crate::Result;
use crate::data::Batch;
use crate::part::Prefix;

/// What the norms of the layers put out for the real tokens of all batches.
///
/// # Errors
/// The student cannot be run.
pub fn norm_ranges(student: &Student, batches: &[Batch]) -> Result<NormRanges> {
    let norms = student.encoder.norms();
    let (ids, outputs): (Vec<SiteId>, Vec<&str>) =
        norms.iter().skip(1).map(|(id, site)| (*id, site.output.as_str())).unzip();
    let prefix = Prefix::new(&student.model, &outputs)?;
    let of_batch = |batch: &Batch| -> Result<NormRanges> {
        let values = prefix.run(batch)?;
        let ranges = values.iter().map(|value| ChannelRanges::of(real_rows(batch, value).view()));
        Ok(ids.iter().copied().zip(ranges).collect())
    };
    let all = batches.par_iter().map(of_batch);
    all.try_reduce(NormRanges::new, |mut all, some| {
        some.iter().for_each(|(id, ranges)| add(&mut all, *id, ranges));
        Ok(all)
    })
}

/// Makes room for some more of what a norm put out.
pub(super) fn add(all: &mut NormRanges, id: SiteId, some: &ChannelRanges) {
    all.entry(id).and_modify(|known| known.join(some)).or_insert_with(|| some.clone());
}
