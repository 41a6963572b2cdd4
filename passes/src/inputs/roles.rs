//! Roles of inputs: what the graph does with them, beside what their names say.

use mabert_graph::{Index, Model, TensorType};

use super::effect::Effects;
use super::lookups::Lookups;
use super::{EncoderInput, GivenRoles, Role};
use crate::{Error, Result};

/// Tables of token types have no more rows.
const MOST_TYPES: usize = 16;

/// Gives every input its role, and says where names say something else.
pub(super) fn assign(
    inputs: &mut [EncoderInput],
    model: &Model,
    lookups: &Lookups,
    given: &GivenRoles,
) -> Result<Option<String>> {
    for input in inputs.iter_mut() {
        input.role = named(&input.declared);
    }
    // One matrix of integers can hold nothing else.
    let nameless: Vec<usize> = (0..inputs.len()).filter(|&at| inputs[at].role.is_none()).collect();
    if let ([at], 1) = (nameless.as_slice(), inputs.len())
        && is_matrix(&inputs[*at].declared)
    {
        inputs[*at].role = Some(Role::Ids);
    }
    settle_alike(inputs, model, lookups);
    let disagreement = match fits_the_graph(inputs, model)? {
        true => None,
        false => by_the_graph(inputs, model),
    };
    take_given(inputs, model, given)?;
    Ok(disagreement.filter(|_| given.is_empty()))
}

/// What an input holds by its name (`input_ids`, `attention_mask`, `token_type_ids`, `segment_ids`, `position_ids`...).
fn named(input: &TensorType) -> Option<Role> {
    let name = input.name.to_lowercase();
    if input.dims.as_ref().is_some_and(|dims| dims.len() == 1) {
        return name.contains("unique").then_some(Role::Rows);
    }
    match name.as_str() {
        n if n.contains("mask") => Some(Role::Mask),
        n if n.contains("type") || n.contains("segment") => Some(Role::Types),
        n if n.contains("position") => Some(Role::Positions),
        n if n.contains("ids") || n.contains("token") => Some(Role::Ids),
        _ => None,
    }
}

fn is_matrix(input: &TensorType) -> bool {
    input.dims.as_ref().is_none_or(|dims| dims.len() == 2)
}

/// Of ids and a mask that go into one index alike, the mask indexes nothing. Where runs do not tell them apart, names do.
fn settle_alike(inputs: &mut [EncoderInput], model: &Model, lookups: &Lookups) {
    for group in &lookups.alike {
        let named_mask =
            |name: &&String| inputs.iter().any(|input| input.declared.name == **name && input.role == Some(Role::Mask));
        let hide: Vec<&String> = match Effects::new(model, inputs, group) {
            Ok(effects) => group.iter().filter(|name| effects.hide_tokens(&[name]) == Some(true)).collect(),
            Err(_) => Vec::new(),
        };
        let is_told = !hide.is_empty() && hide.len() < group.len();
        let masks = if is_told { hide } else { group.iter().filter(named_mask).collect() };
        if masks.len() < group.len() {
            let masks: Vec<String> = masks.into_iter().cloned().collect();
            inputs.iter_mut().filter(|i| masks.contains(&i.declared.name)).for_each(|i| i.rows = None);
        }
    }
}

/// Whether the graph does with every input what its name says.
fn fits_the_graph(inputs: &[EncoderInput], model: &Model) -> Result<bool> {
    let index = Index::new(model)?;
    let ids: Vec<&EncoderInput> = inputs.iter().filter(|i| i.role == Some(Role::Ids)).collect();
    let [ids] = ids.as_slice() else { return Ok(false) };
    let indexes_anything = inputs.iter().any(|i| i.rows.is_some());
    let fits = |input: &EncoderInput| match input.role {
        Some(Role::Ids) => input.rows.is_some() || !indexes_anything,
        Some(Role::Mask) => input.rows.is_none(),
        Some(Role::Types) => match input.rows {
            Some(rows) => ids.rows.is_some_and(|words| rows <= words),
            // What no table tells may be a mask, unless nothing reads it.
            None => index.consumers(&input.declared.name).next().is_none() || !indexes_anything,
        },
        Some(Role::Positions | Role::Rows) => true,
        None => false,
    };
    Ok(inputs.iter().all(fits))
}

/// Roles by what the graph does alone. Where it does not tell, names stand.
fn by_the_graph(inputs: &mut [EncoderInput], model: &Model) -> Option<String> {
    let before: Vec<Option<Role>> = inputs.iter().map(|i| i.role).collect();
    let indexing = indexing_roles(inputs)?;
    for (at, role) in &indexing {
        inputs[*at].role = Some(*role);
    }
    let open: Vec<usize> =
        (0..inputs.len()).filter(|&at| inputs[at].rows.is_none() && is_matrix(&inputs[at].declared)).collect();
    let masks = masks(inputs, model, &open);
    // Where one was to be a mask and none hides tokens, nothing is sure.
    let is_sure = !masks.is_empty() || !before.contains(&Some(Role::Mask));
    for at in open {
        inputs[at].role = match masks.contains(&at) {
            true => Some(Role::Mask),
            false => before[at].filter(|role| is_sure && *role != Role::Ids),
        };
    }
    let differs = |(input, before): (&EncoderInput, &Option<Role>)| {
        (before.is_some() && *before != input.role)
            .then(|| format!("`{}` holds {}", input.declared.name, input.role.map_or("something else", Role::noun)))
    };
    let told: Vec<String> = inputs.iter().zip(&before).filter_map(differs).collect();
    (!told.is_empty())
        .then(|| format!("{}, by what the model does with its inputs; their names say otherwise", told.join(", ")))
}

/// Roles of the inputs that index tables: words have the largest, token types a small one. `None` where it is not clear:
/// ids may go to their table by a way that was not followed, and then the largest that was found is not that of words.
fn indexing_roles(inputs: &[EncoderInput]) -> Option<Vec<(usize, Role)>> {
    let mut tables: Vec<(usize, usize)> =
        inputs.iter().enumerate().filter_map(|(at, input)| Some((input.rows?, at))).collect();
    tables.sort_unstable();
    let (most, ids) = tables.pop()?;
    let may_be_ids = most > MOST_TYPES || !matches!(inputs[ids].role, Some(Role::Types | Role::Mask));
    if !may_be_ids || tables.last().is_some_and(|(rows, _)| *rows == most) {
        return None;
    }
    let role = |(at, (rows, input)): (usize, (usize, usize))| match at == 0 && rows <= MOST_TYPES {
        true => (input, Role::Types),
        false => (input, Role::Positions),
    };
    let mut roles: Vec<(usize, Role)> = tables.into_iter().enumerate().map(role).collect();
    roles.push((ids, Role::Ids));
    Some(roles)
}

/// Which of the `open` inputs hide tokens: one alone, or all together.
fn masks(inputs: &[EncoderInput], model: &Model, open: &[usize]) -> Vec<usize> {
    let Ok(effects) = Effects::new(model, inputs, &[]) else { return vec![] };
    let name = |at: usize| inputs[at].declared.name.as_str();
    let alone: Vec<usize> = open.iter().copied().filter(|&at| effects.hide_tokens(&[name(at)]) == Some(true)).collect();
    if !alone.is_empty() {
        return alone;
    }
    let all: Vec<&str> = open.iter().map(|&at| name(at)).collect();
    let together = !all.is_empty() && effects.hide_tokens(&all) == Some(true);
    if together { open.to_vec() } else { vec![] }
}

/// Puts what the user says in the place of what was found.
fn take_given(inputs: &mut [EncoderInput], model: &Model, given: &GivenRoles) -> Result<()> {
    for (role, name) in given {
        let names: Vec<String> = inputs.iter().map(|i| format!("`{}`", i.declared.name)).collect();
        let Some(input) = inputs.iter_mut().find(|i| i.declared.name == *name) else {
            let origin = model.origin().to_owned();
            return Err(Error::NoInput { origin, name: name.clone(), inputs: names.join(", ") });
        };
        input.role = Some(*role);
        if *role == Role::Mask {
            input.rows = None;
        }
    }
    let is_given = |input: &EncoderInput| given.iter().any(|(_, name)| *name == input.declared.name);
    if given.iter().any(|(role, _)| *role == Role::Ids) {
        // Only one input holds ids.
        inputs.iter_mut().filter(|i| i.role == Some(Role::Ids) && !is_given(i)).for_each(|i| i.role = None);
    }
    Ok(())
}
