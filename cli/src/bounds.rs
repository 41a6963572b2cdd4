//! What is told with `-v` of texts that leave a student's bounds.

use anyhow::Result;
use mabert_graph::Model;
use mabert_passes::inputs::{EncoderInputs, GivenRoles, Role};
use mabert_passes::pipeline::VERSION_KEY;
use mabert_passes::sites::SiteId;
use mabert_runtime::Named;
use mabert_transfer::bounds::BoundedStudent;
use mabert_transfer::data::{BatchShape, Sequence};

use crate::arguments::Global;

/// What is said of texts; nothing where no more is to be told, or of a model that is no student. Whatever the engine, it
/// is found out on tract, which gives inner values.
pub(crate) fn of_texts(
    model: &Model,
    shape: &BatchShape,
    sequences: &[Sequence],
    global: &Global,
) -> Result<Option<String>> {
    told(model, global, |student| Ok(student.leaves(shape, sequences)?))
}

/// The same of ready arrays, whose mask tells tokens from padding.
pub(crate) fn of_arrays(model: &Model, arrays: &Named, given: &GivenRoles, global: &Global) -> Result<Option<String>> {
    let inputs = EncoderInputs::new(model, given)?;
    let is_mask = |name: &String| inputs.get(name).is_some_and(|input| input.role == Some(Role::Mask));
    let mask = arrays.iter().find(|(name, _)| is_mask(name)).map(|(_, mask)| mask.to_f32());
    let is_real = |row: usize, token: usize| mask.as_ref().is_none_or(|m| m.get([row, token].as_slice()) != Some(&0.0));
    told(model, global, |student| Ok(student.of_inputs(arrays, is_real)?))
}

fn told(
    model: &Model,
    global: &Global,
    leaves: impl FnOnce(&BoundedStudent) -> Result<Vec<Option<SiteId>>>,
) -> Result<Option<String>> {
    if global.verbose == 0 || model.metadata(VERSION_KEY).is_none() {
        return Ok(None);
    }
    let said = match BoundedStudent::new(model, global.threads())? {
        Some(student) => in_words(&leaves(&student)?),
        None => "nothing holds this student's values".to_owned(),
    };
    Ok(Some(format!("{}: {said}", model.origin())))
}

fn in_words(leaves: &[Option<SiteId>]) -> String {
    let count = leaves.len();
    match leaves.iter().enumerate().find_map(|(at, site)| Some((at, (*site)?))) {
        None if count == 1 => "the text stays within the bounds".to_owned(),
        None => format!("all {count} texts stay within the bounds"),
        Some((_, site)) if count == 1 => format!("the text leaves the bounds, first behind `{site}`"),
        Some((at, site)) => {
            let leaving = leaves.iter().flatten().count();
            format!(
                "{leaving} of {count} texts leave the bounds, the first of them (number {}) behind `{site}`",
                at + 1
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_that_leave_the_bounds_are_counted_and_the_first_is_named() {
        let site = || Some("layer.2/output/norm".parse().unwrap());
        let said =
            [vec![None], vec![site()], vec![None; 3], vec![None, site(), site()]].map(|leaves| in_words(&leaves));
        assert_eq!(
            said,
            [
                "the text stays within the bounds",
                "the text leaves the bounds, first behind `layer.2/output/norm`",
                "all 3 texts stay within the bounds",
                "2 of 3 texts leave the bounds, the first of them (number 2) behind `layer.2/output/norm`",
            ]
        );
    }
}
