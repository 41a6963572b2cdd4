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
    places: Vec<Place>,
}

/// Where the elements of one batch lie.
struct Place {
    /// In bytes.
    start: u64,
    shape: Vec<usize>,
}

impl Stored {
    /// A value of no batches.
    pub(crate) fn empty() -> Self {
        Self::spilling_beyond(IN_MEMORY)
    }

    /// A value of no batches, of which more than so many bytes go into a file.
    fn spilling_beyond(in_memory: usize) -> Self {
        Self { file: Mutex::new(tempfile::spooled_tempfile(in_memory)), places: Vec::new() }
    }

    /// Runs `run` on every batch in parallel, and keeps the values that it returns, as many each time.
    pub(crate) fn each(
        batches: usize,
        values: usize,
        run: impl Fn(usize) -> Result<Vec<Tensor>> + Sync,
    ) -> Result<Vec<Self>> {
        Self::each_beyond(IN_MEMORY, batches, values, run)
    }

    fn each_beyond(
        in_memory: usize,
        batches: usize,
        values: usize,
        run: impl Fn(usize) -> Result<Vec<Tensor>> + Sync,
    ) -> Result<Vec<Self>> {
        let mut all: Vec<Self> = (0..values).map(|_| Self::spilling_beyond(in_memory)).collect();
        let places: Vec<Vec<Place>> = (0..batches)
            .into_par_iter()
            .map(|batch| {
                let kept = all.iter().zip(run(batch)?).map(|(stored, value)| stored.append(&value));
                kept.collect::<std::io::Result<_>>().map_err(Error::Temporary)
            })
            .collect::<Result<_>>()?;
        for batch_places in places {
            all.iter_mut().zip(batch_places).for_each(|(stored, place)| stored.places.push(place));
        }
        Ok(all)
    }

    /// Writes a batch's value behind the others; returns its place.
    fn append(&self, value: &Tensor) -> std::io::Result<Place> {
        let bytes = to_bytes(value.as_f32().expect("streams are f32"));
        let mut file = lock(&self.file);
        let end = file.seek(SeekFrom::End(0))?;
        file.write_all(&bytes)?;
        Ok(Place { start: end, shape: value.shape().to_vec() })
    }

    /// The value of a batch.
    pub(crate) fn get(&self, batch: usize) -> Result<Tensor> {
        self.rows(batch, 0..self.places[batch].shape[0])
    }

    /// Some rows of the value of a batch.
    pub(crate) fn rows(&self, batch: usize, rows: Range<usize>) -> Result<Tensor> {
        let Place { start, shape } = &self.places[batch];
        let mut shape = shape.clone();
        let width: usize = shape[1..].iter().product();
        shape[0] = rows.len();
        let mut bytes = vec![0u8; rows.len() * width * ELEMENT];
        let read = |bytes: &mut [u8]| {
            let mut file = lock(&self.file);
            file.seek(SeekFrom::Start(start + (rows.start * width * ELEMENT) as u64))?;
            file.read_exact(bytes)
        };
        read(&mut bytes).map_err(Error::Temporary)?;
        Ok(Tensor::new(&shape, from_bytes(&bytes)))
    }
}

/// Floats as files have them, the lowest byte first.
pub(crate) fn to_bytes<'v>(values: impl IntoIterator<Item = &'v f32>) -> Vec<u8> {
    values.into_iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// And back.
pub(crate) fn from_bytes(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(ELEMENT).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
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
        let value = |batch: usize, number: usize| {
            let rows = 2 + batch % 3;
            Tensor::new(&[rows, 5], (0..rows * 5).map(|i| (i * 7 + batch * 13 + number) as f32).collect())
        };
        for (limit, rolled) in [(64, true), (IN_MEMORY, false)] {
            let all = Stored::each_beyond(limit, 40, 2, |i| Ok(vec![value(i, 0), value(i, 1)])).unwrap();
            assert_eq!(all.len(), 2);
            for batch in (0..40).rev().step_by(7) {
                (0..2).for_each(|number| assert_eq!(all[number].get(batch).unwrap(), value(batch, number)));
            }
            assert_eq!(lock(&all[0].file).is_rolled(), rolled);
            let row = all[1].rows(5, 1..2).unwrap();
            assert_eq!(row.shape(), [1, 5]);
            assert_eq!(
                row.as_f32().unwrap().iter().collect::<Vec<_>>(),
                value(5, 1).as_f32().unwrap().iter().skip(5).take(5).collect::<Vec<_>>()
            );
        }
        assert!(Stored::each(0, 1, |_| panic!("no batch")).unwrap()[0].places.is_empty());
        let failed = Stored::each(3, 1, |i| if i == 1 { Err(Error::option("no")) } else { Ok(vec![value(i, 0)]) });
        assert!(failed.is_err());
    }
}
