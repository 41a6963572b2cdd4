//! Sequences of similar length, padded on the right and named as a model's inputs.

use std::collections::BTreeMap;
use std::sync::Arc;

use mabert_graph::Dim;
use mabert_passes::inputs::{EncoderInput, EncoderInputs, Role};
use mabert_runtime::{ElementType, Named, Tensor, TensorType};

use super::tokens::Sequence;
use crate::{Error, Result};

/// What a model's inputs ask of batches.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BatchShape {
    /// Sentences in a batch, where the model takes no other number.
    pub batch: Option<usize>,
    /// Tokens in a sentence, likewise.
    pub length: Option<usize>,
    /// Whether the model takes no mask: it would take padding for text, so only equally long sentences go together.
    pub unmasked: bool,
    /// What each input holds, by its name.
    pub roles: Roles,
    /// The token id of padding.
    pub pad: i64,
}

/// What inputs hold, by their names.
pub type Roles = Arc<BTreeMap<String, Role>>;

impl BatchShape {
    /// Of a model with these inputs.
    pub fn new(inputs: &EncoderInputs) -> Self {
        let fixed = |axis: usize| {
            inputs.iter().find_map(|input| match input.declared.dims.as_ref()?.get(axis)? {
                Dim::Fixed(n) => Some(*n),
                _ => None,
            })
        };
        let role = |input: &EncoderInput| Some((input.declared.name.clone(), input.role?));
        let roles: BTreeMap<String, Role> = inputs.iter().filter_map(role).collect();
        let unmasked = !roles.values().any(|role| *role == Role::Mask);
        Self { batch: fixed(0), length: fixed(1), unmasked, roles: Arc::new(roles), pad: 0 }
    }
}

/// Sequences side by side.
#[derive(Clone, Debug)]
pub struct Batch {
    /// Where each sequence stood before batching.
    pub rows: Vec<usize>,
    /// Tokens of each sequence; 0 for rows that only fill up a fixed batch size.
    pub lengths: Vec<usize>,
    /// Which sequences are no text, but random tokens.
    pub made_up: Vec<bool>,
    /// Columns of the batch.
    pub length: usize,
    ids: Vec<i64>,
    types: Vec<i64>,
    roles: Roles,
}

impl Batch {
    fn new(sequences: &[Sequence], rows: &[usize], shape: &BatchShape) -> Self {
        let count = shape.batch.unwrap_or(rows.len());
        let longest = rows.iter().map(|&r| sequences[r].ids.len()).max().unwrap_or(1);
        let length = shape.length.unwrap_or(longest);
        let mut batch = Self {
            rows: rows.to_vec(),
            lengths: vec![0; count],
            made_up: vec![false; count],
            length,
            ids: vec![shape.pad; count * length],
            types: vec![0; count * length],
            roles: Arc::clone(&shape.roles),
        };
        for (at, &row) in rows.iter().enumerate() {
            let sequence = &sequences[row];
            let tokens = sequence.ids.len();
            batch.lengths[at] = tokens;
            batch.made_up[at] = sequence.made_up;
            batch.ids[at * length..][..tokens].copy_from_slice(&sequence.ids);
            batch.types[at * length..][..tokens].copy_from_slice(&sequence.types);
        }
        batch
    }

    /// Rows of the batch, filling included.
    pub fn size(&self) -> usize {
        self.lengths.len()
    }

    /// Real tokens.
    pub fn tokens(&self) -> usize {
        self.lengths.iter().sum()
    }

    /// 1 for tokens, 0 for padding, `[batch, length]`.
    pub fn mask(&self) -> Tensor {
        let keep = |at: usize| if at % self.length < self.lengths[at / self.length] { 1f32 } else { 0.0 };
        Tensor::new(&[self.size(), self.length], (0..self.ids.len()).map(keep).collect())
    }

    /// The batch as the inputs of the model that it was made for, or of a part of it.
    ///
    /// # Errors
    /// An input's role or element type is not one that text fills.
    pub fn inputs(&self, inputs: &[TensorType]) -> Result<Named> {
        self.inputs_as(&self.roles, inputs)
    }

    /// The batch as the inputs of another model.
    ///
    /// # Errors
    /// As those of [`Self::inputs`].
    pub fn inputs_as(&self, roles: &Roles, inputs: &[TensorType]) -> Result<Named> {
        let all = inputs.iter().map(|input| {
            let role = *roles.get(&input.name).ok_or_else(|| Error::Role(input.name.clone()))?;
            let value = |at: usize| match role {
                Role::Ids => self.ids[at],
                Role::Types => self.types[at],
                Role::Mask => i64::from(at % self.length < self.lengths[at / self.length]),
                Role::Positions => (at % self.length) as i64,
                Role::Rows => at as i64,
            };
            let shape = [self.size(), self.length];
            let shape = if role == Role::Rows { &shape[..1] } else { &shape[..] };
            let values = (0..shape.iter().product()).map(value);
            let tensor = match input.element {
                Some(ElementType::I64) => Tensor::new(shape, values.collect()),
                Some(ElementType::I32) => Tensor::new(shape, values.map(|v| v as i32).collect()),
                Some(ElementType::F32) => Tensor::new(shape, values.map(|v| v as f32).collect()),
                Some(ElementType::Bool) => Tensor::new(shape, values.map(|v| v != 0).collect()),
                _ => return Err(Error::Role(input.name.clone())),
            };
            Ok((input.name.clone(), tensor))
        });
        all.collect()
    }
}

/// Puts sequences of similar length together, at most `tokens` positions (padding counted) and `largest` rows a batch.
pub fn batches(sequences: &[Sequence], tokens: usize, largest: usize, shape: &BatchShape) -> Vec<Batch> {
    let mut order: Vec<usize> = (0..sequences.len()).collect();
    // The sort is stable: the order within a length is the caller's.
    order.sort_by_key(|&row| sequences[row].ids.len());
    let mut batches = Vec::new();
    let mut rows: Vec<usize> = Vec::new();
    for row in order {
        let length = shape.length.unwrap_or(sequences[row].ids.len());
        let full = match shape.batch {
            Some(size) => rows.len() == size,
            None => rows.len() == largest || (rows.len() + 1) * length > tokens,
        };
        let differs =
            shape.unmasked && shape.length.is_none() && rows.last().is_some_and(|&r| sequences[r].ids.len() < length);
        if (full || differs) && !rows.is_empty() {
            batches.push(Batch::new(sequences, &rows, shape));
            rows.clear();
        }
        rows.push(row);
    }
    if !rows.is_empty() {
        batches.push(Batch::new(sequences, &rows, shape));
    }
    batches
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn similar_lengths_go_together_and_every_row_once() {
        let sequences: Vec<Sequence> = [9, 2, 30, 3, 8, 29].map(Sequence::with_length).to_vec();
        let made = batches(&sequences, 64, 2, &BatchShape::default());
        assert_eq!(made.iter().map(|b| b.rows.clone()).collect::<Vec<_>>(), [vec![1, 3], vec![4, 0], vec![5, 2]]);
        assert_eq!(made[0].lengths, [2, 3]);
        let mask = made[0].mask();
        assert_eq!(mask.to_f32().iter().copied().collect::<Vec<_>>(), [1.0, 1.0, 0.0, 1.0, 1.0, 1.0]);
    }

    #[test]
    fn without_a_mask_nothing_is_padded() {
        let sequences: Vec<Sequence> = [3, 2, 3, 4, 3].map(Sequence::with_length).to_vec();
        let made = batches(&sequences, 64, 8, &BatchShape { unmasked: true, ..BatchShape::default() });
        assert_eq!(made.iter().map(|b| b.lengths.clone()).collect::<Vec<_>>(), [vec![2], vec![3; 3], vec![4]]);
    }

    #[test]
    fn fixed_sizes_are_filled_up() {
        let sequences: Vec<Sequence> = [3, 2, 4].map(Sequence::with_length).to_vec();
        let shape = BatchShape { batch: Some(2), length: Some(6), ..BatchShape::default() };
        let made = batches(&sequences, 64, 8, &shape);
        assert_eq!(made.iter().map(|b| (b.size(), b.length)).collect::<Vec<_>>(), [(2, 6), (2, 6)]);
        assert_eq!(made[1].lengths, [4, 0]);
        assert_eq!(made[1].tokens(), 4);
    }

    #[test]
    fn padding_has_the_id_that_is_given() {
        let sequences: Vec<Sequence> = [3, 2].map(Sequence::with_length).to_vec();
        let made = batches(&sequences, 64, 8, &BatchShape { pad: 9, batch: Some(3), ..BatchShape::default() });
        assert_eq!(made[0].ids, [1, 1, 9, 1, 1, 1, 9, 9, 9]);
        assert_eq!(made[0].types, [0; 9]);
    }
}
