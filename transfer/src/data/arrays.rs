//! Examples out of `.npz` files of ready token ids.

use std::path::Path;

use mabert_runtime::npz;
use ndarray::Array2;

use super::columns::Columns;
use super::label::Label;
use super::reader::{Content, Example, Row};
use crate::{Error, Result};

/// Token ids `[rows, length]`, with what else the file has of them.
pub(super) struct Arrays {
    ids: Array2<i64>,
    types: Option<Array2<i64>>,
    mask: Option<Array2<i64>>,
    labels: Option<Vec<String>>,
    next: usize,
}

impl Arrays {
    pub(super) fn read(path: &Path, columns: &Columns) -> Result<Self> {
        // Only what is asked for is read: there may be arrays of other kinds beside it.
        let mut named = npz::Arrays::open(path)?;
        let Some(ids) = matrix(path, &mut named, "input_ids")? else {
            let names = named.names().join(", ");
            return Err(Error::data(path, format!("there is no array `input_ids` [rows, length]; it has {names}")));
        };
        let mut beside = |name: &str| match matrix(path, &mut named, name)? {
            Some(other) if other.dim() != ids.dim() => {
                Err(Error::data(path, format!("`{name}` is {:?}, `input_ids` {:?}", other.dim(), ids.dim())))
            }
            other => Ok(other),
        };
        let (types, mask) = (beside("token_type_ids")?, beside("attention_mask")?);
        let labels = columns.label.as_ref().map(|name| label_texts(path, &mut named, name, ids.nrows())).transpose()?;
        Ok(Self { ids, types, mask, labels, next: 0 })
    }

    pub(super) fn next(&mut self, path: &Path, columns: &Columns) -> Option<Result<Row>> {
        let row = self.next;
        self.next += 1;
        (row < self.ids.nrows()).then(|| self.example(path, row, columns))
    }

    fn example(&self, path: &Path, row: usize, columns: &Columns) -> Result<Row> {
        let is_real = |at: usize| self.mask.as_ref().is_none_or(|mask| mask[[row, at]] != 0);
        let cut =
            |m: &Array2<i64>| (0..m.ncols()).filter(|&at| is_real(at)).map(|at| m[[row, at]]).collect::<Vec<i64>>();
        let ids = cut(&self.ids);
        let types = self.types.as_ref().map_or_else(|| vec![0; ids.len()], cut);
        let label = self.labels.as_ref().map(|l| columns.label(path, row + 1, &l[row]).map(Label::One)).transpose()?;
        Ok(Row::Example(Example { content: Content::Ids { ids, types }, label, line: row + 1 }))
    }
}

fn matrix(path: &Path, named: &mut npz::Arrays, name: &str) -> Result<Option<Array2<i64>>> {
    let Some(tensor) = named.read(name)? else { return Ok(None) };
    let matrix = tensor.to_i64().and_then(|a| a.into_dimensionality().ok());
    matrix.map(Some).ok_or_else(|| Error::data(path, format!("`{name}` is not an integer matrix [rows, length]")))
}

/// The labels in the array `name`, one a row.
fn label_texts(path: &Path, named: &mut npz::Arrays, name: &str, rows: usize) -> Result<Vec<String>> {
    let tensor = named.read(name)?.ok_or_else(|| Error::data(path, format!("there is no array `{name}`")))?;
    if tensor.shape() != [rows] {
        return Err(Error::data(path, format!("`{name}` is {:?}, one label a row is needed", tensor.shape())));
    }
    Ok(match tensor.to_i64() {
        Some(integers) => integers.iter().map(i64::to_string).collect(),
        None => tensor.to_f32().iter().map(f32::to_string).collect(),
    })
}
