//! A value of every batch, kept in a file: how much text goes through the layers is not bounded by memory.

use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use mabert_graph::Tensor;
use rayon::prelude::*;
use tempfile::SpooledTempFile;

use crate::{Error, Result};

/// What stays in memory of one value, in bytes; beyond it all of it goes into a file without a name.
const IN_MEMORY: usize = 1 << 26;
const ELEMENT: usize = size_of::<f32>();

/// One value of the model for every batch, `f32`, with the batch on its first axis.
pub(crate) struct Stored {
    file: Mutex<SpooledTempFile>,
    /// Where each batch's elements begin, in bytes, and their shape.
    places: Vec<(u64, Vec<usize>)>,
}

impl Stored {
    /// Of no batches.
    pub(crate) fn none() -> Self {
        Self { file: Mutex::new(tempfile::spooled_tempfile(IN_MEMORY)), places: Vec::new() }
    }

    /// Runs `run` on every batch in parallel, and keeps the `N` values that it returns.
    pub(crate) fn each<const N: usize>(
        batches: usize,
        run: impl Fn(usize) -> Result<[Tensor; N]> + Sync,
    ) -> Result<[Self; N]> {
        let mut all: [Self; N] = std::array::from_fn(|_| Self::none());
        let places: Vec<[(u64, Vec<usize>); N]> = (0..batches)
            .into_par_iter()
            .map(|batch| {
                let values = run(batch)?;
                let mut places: [(u64, Vec<usize>); N] = std::array::from_fn(|_| (0, Vec::new()));
                for ((place, value), of) in places.iter_mut().zip(&values).zip(&all) {
                    let bytes: Vec<u8> = elements(value).iter().flat_map(|v| v.to_le_bytes()).collect();
                    let mut file = lock(&of.file);
                    let end = file.seek(SeekFrom::End(0)).map_err(Error::Temporary)?;
                    file.write_all(&bytes).map_err(Error::Temporary)?;
                    *place = (end, value.shape().to_vec());
                }
                Ok(places)
            })
            .collect::<Result<_>>()?;
        for of_batch in places {
            all.iter_mut().zip(of_batch).for_each(|(of, place)| of.places.push(place));
        }
        Ok(all)
    }

    /// The value of a batch.
    pub(crate) fn get(&self, batch: usize) -> Result<Tensor> {
        self.rows(batch, 0..self.places[batch].1[0])
    }

    /// Some rows of the value of a batch.
    pub(crate) fn rows(&self, batch: usize, rows: Range<usize>) -> Result<Tensor> {
        let (start, shape) = &self.places[batch];
        let mut shape = shape.clone();
        let width: usize = shape[1..].iter().product();
        shape[0] = rows.len();
        let mut bytes = vec![0u8; rows.len() * width * ELEMENT];
        {
            let mut file = lock(&self.file);
            let from = start + (rows.start * width * ELEMENT) as u64;
            file.seek(SeekFrom::Start(from)).map_err(Error::Temporary)?;
            file.read_exact(&mut bytes).map_err(Error::Temporary)?;
        }
        let of = |b: &[u8]| f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
        Ok(Tensor::new(&shape, bytes.chunks_exact(ELEMENT).map(of).collect()))
    }
}

fn elements(value: &Tensor) -> Vec<f32> {
    value.as_f32().expect("streams are f32").iter().copied().collect()
}

fn lock(file: &Mutex<SpooledTempFile>) -> MutexGuard<'_, SpooledTempFile> {
    file.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Beyond what stays in memory too, in any order.
    #[test]
    fn what_is_kept_comes_back() {
        let count = 40;
        let size = IN_MEMORY / ELEMENT / 32;
        let value = |batch: usize, of: usize| {
            let rows = 2 + batch % 3;
            let elements = (0..rows * size).map(|i| (i * 7 + batch * 13 + of) as f32).collect();
            Tensor::new(&[rows, size], elements)
        };
        let [first, second] = Stored::each(count, |i| Ok([value(i, 0), value(i, 1)])).unwrap();
        for batch in (0..count).rev().step_by(7) {
            assert_eq!(first.get(batch).unwrap(), value(batch, 0));
            assert_eq!(second.get(batch).unwrap(), value(batch, 1));
        }
        assert!(lock(&first.file).is_rolled());
        let row = second.rows(5, 1..2).unwrap();
        assert_eq!(row.shape(), [1, size]);
        assert_eq!(elements(&row), elements(&value(5, 1))[size..2 * size]);
    }
}
