//! What is checked before an engine sees the inputs of a run.

use std::collections::HashMap;

use mabert_graph::{Dependence, Dim, Index, Model as Graph, NodeExt as _, Tensor, TensorType};

use crate::engine::{Engine, Named, borrowed};
use crate::plan::Sharing;
use crate::{Error, Result};

/// The `metadata_props` key under which a rewritten model records the longest sequence it takes.
pub const MAX_SEQ_KEY: &str = "onnx_mabert.max_seq";

/// Makes a part of a model ready to run.
pub(crate) type Prepare<'p> = dyn Fn(&Graph) -> Result<Box<dyn Engine>> + 'p;

/// The checks that one model needs.
pub(crate) struct Checks {
    max_seq: Option<usize>,
    lookups: Vec<Lookup>,
    /// The part of the model that computes indices from the inputs: positions, for most models.
    indices: Option<Box<dyn Engine>>,
}

/// A `Gather` from a constant table.
#[derive(Debug)]
struct Lookup {
    table: String,
    rows: usize,
    indices: String,
    /// Whether the indices are an input as it was given.
    direct: bool,
}

impl Checks {
    /// `prepare` makes the part ready to run that computes indices.
    pub(crate) fn new(graph: &Graph, prepare: &Prepare<'_>) -> Result<Self> {
        let index = Index::new(graph)?;
        let mut lookups = Vec::new();
        for node in graph.graph().node.iter().filter(|n| n.is("Gather") && n.int("axis", 0) == 0) {
            let [table, indices] = node.input.as_slice() else { continue };
            // Only tables of vectors: scalars picked out of shapes are the exporter's own business.
            let Some(rows) = graph.initializer(table).filter(|t| t.dims.len() >= 2).map(|t| t.dims[0]) else {
                continue;
            };
            let indices = index.behind_casts(indices);
            if index.dependence(indices) != Dependence::Constant {
                let (table, indices) = (table.clone(), indices.to_owned());
                let direct = index.is_input(&indices);
                lookups.push(Lookup { table, rows: rows.max(0) as usize, indices, direct });
            }
        }
        let max_seq = graph.metadata(MAX_SEQ_KEY).and_then(|v| v.parse().ok());
        let indices = computed_indices(graph, &lookups, prepare)?;
        Ok(Self { max_seq, lookups, indices })
    }

    /// The inputs in the order in which the model declares them.
    pub(crate) fn check<'t>(
        &self,
        declared: &[TensorType],
        given: &[(&str, &'t Tensor)],
        sharing: Sharing,
    ) -> Result<Vec<&'t Tensor>> {
        let expected = || declared.iter().map(TensorType::to_string).collect::<Vec<_>>().join(", ");
        if let Some((name, _)) = given.iter().find(|(name, _)| declared.iter().all(|d| d.name != *name)) {
            return Err(Error::UnknownInput { name: (*name).to_owned(), expected: expected() });
        }
        let mut ordered = Vec::with_capacity(declared.len());
        let mut bound: HashMap<String, (usize, &str)> = HashMap::new();
        for input in declared {
            let Some((_, tensor)) = given.iter().find(|(name, _)| *name == input.name) else {
                return Err(Error::MissingInput { name: input.name.clone(), expected: expected() });
            };
            check_type(input, tensor)?;
            bind_dims(input, tensor, sharing, &mut bound)?;
            ordered.push(*tensor);
        }
        let lengths: Vec<usize> = ordered.iter().filter(|t| t.shape().len() == 2).map(|t| t.shape()[1]).collect();
        if let Some(limit) = self.max_seq
            && let Some(&length) = lengths.iter().find(|&&length| length > limit)
        {
            let limited_by = "the longest sequence it was rewritten for".to_owned();
            return Err(Error::TooLong { length, limit, limited_by });
        }
        self.check_indices(given, &lengths)?;
        Ok(ordered)
    }

    fn check_indices(&self, given: &[(&str, &Tensor)], lengths: &[usize]) -> Result<()> {
        for lookup in self.lookups.iter().filter(|l| l.direct) {
            if let Some((name, tensor)) = given.iter().find(|(name, _)| *name == lookup.indices) {
                lookup.check(&format!("input `{name}`: index"), tensor)?;
            }
        }
        let Some(indices) = &self.indices else { return Ok(()) };
        let wanted = |name: &str| indices.inputs().iter().any(|i| i.name == name);
        let given: Vec<(&str, &Tensor)> = given.iter().copied().filter(|(n, _)| wanted(n)).collect();
        self.check_computed(indices.as_ref(), &given, lengths).map_err(|error| match (error, lengths.first()) {
            (error @ Error::TooLong { .. }, _) | (error, None) => error,
            (error, Some(&length)) => self.longest(indices.as_ref(), &given, length, &error).unwrap_or(error),
        })
    }

    /// Whether what `indices` computes lies in the tables that it indexes.
    fn check_computed(&self, indices: &dyn Engine, given: &[(&str, &Tensor)], lengths: &[usize]) -> Result<()> {
        for (name, value) in indices.run(given)? {
            for lookup in self.lookups.iter().filter(|l| l.indices == name) {
                // Exporters cut positions out of a constant buffer; a text beyond its end gets too few of them. Ids may be
                // transposed, which leaves them as many.
                if let (Some(&length), Some(&found)) = (lengths.iter().max(), value.shape().last())
                    && !value.shape().iter().any(|size| lengths.contains(size))
                    && found != 1
                    && value.shape().len() >= 2
                {
                    let limited_by = format!("positions into `{}`", lookup.table);
                    return Err(Error::TooLong { length, limit: found, limited_by });
                }
                lookup.check("position", &value)?;
            }
        }
        Ok(())
    }

    /// What `error` says of `length` tokens is said of their number, where a shorter text has no such error: the longest one
    /// without it is found. Not every row of a table is a position: some families number from 2.
    fn longest(&self, indices: &dyn Engine, given: &[(&str, &Tensor)], length: usize, error: &Error) -> Option<Error> {
        let works = |length: usize| {
            let cut: Option<Named> =
                given.iter().map(|(n, t)| Some(((*n).to_owned(), truncated(t, length)?))).collect();
            cut.is_some_and(|cut| self.check_computed(indices, &borrowed(&cut), &[length]).is_ok())
        };
        let (mut good, mut bad) = (1, length);
        if !works(good) {
            return None;
        }
        while bad - good > 1 {
            let middle = good.midpoint(bad);
            *(if works(middle) { &mut good } else { &mut bad }) = middle;
        }
        let limited_by = match error {
            Error::Index { table, .. } => format!("the table `{table}`"),
            _ => "its positions".to_owned(),
        };
        Some(Error::TooLong { length, limit: good, limited_by })
    }
}

/// The first `length` columns of a matrix of integers; what is no matrix as it is.
fn truncated(tensor: &Tensor, length: usize) -> Option<Tensor> {
    if tensor.shape().len() != 2 {
        return Some(tensor.clone());
    }
    if tensor.shape()[1] < length {
        return None;
    }
    let columns = ndarray::s![.., ..length];
    Some(match tensor {
        Tensor::I64(ids) => ids.slice(columns).to_owned().into_dyn().into(),
        Tensor::I32(ids) => ids.slice(columns).to_owned().into_dyn().into(),
        _ => return None,
    })
}

impl Lookup {
    fn check(&self, what: &str, indices: &Tensor) -> Result<()> {
        let rows = self.rows as i64;
        let outside = indices.to_i64().and_then(|a| a.iter().copied().find(|i| !(-rows..rows).contains(i)));
        outside.map_or(Ok(()), |index| {
            Err(Error::Index { what: what.to_owned(), index, table: self.table.clone(), rows: self.rows })
        })
    }
}

fn computed_indices(graph: &Graph, lookups: &[Lookup], prepare: &Prepare<'_>) -> Result<Option<Box<dyn Engine>>> {
    let mut values: Vec<&str> = lookups.iter().filter(|l| !l.direct).map(|l| l.indices.as_str()).collect();
    values.sort_unstable();
    values.dedup();
    if values.is_empty() {
        return Ok(None);
    }
    let part = graph.extract_from_inputs(&[], &values)?;
    prepare(&part).map(Some)
}

fn check_type(input: &TensorType, tensor: &Tensor) -> Result<()> {
    match input.element {
        Some(expected) if expected != tensor.element_type() => {
            Err(Error::ElementType { name: input.name.clone(), found: tensor.element_type(), expected })
        }
        _ => Ok(()),
    }
}

fn bind_dims<'d>(
    input: &'d TensorType,
    tensor: &Tensor,
    sharing: Sharing,
    bound: &mut HashMap<String, (usize, &'d str)>,
) -> Result<()> {
    let found = tensor.shape();
    let fault = |reason: String| Error::Shape { name: input.name.clone(), found: found.to_vec(), reason };
    if let Some(axis) = found.iter().position(|&size| size == 0) {
        return Err(fault(format!("axis {axis} is empty")));
    }
    let Some(dims) = &input.dims else { return Ok(()) };
    if dims.len() != found.len() {
        return Err(fault(format!("the model takes rank {}: {input}", dims.len())));
    }
    for (axis, (dim, &size)) in dims.iter().zip(found).enumerate() {
        if let Dim::Fixed(fixed) = dim
            && *fixed != size
        {
            return Err(fault(format!("axis {axis} must be {fixed}")));
        }
        let Some(name) = sharing.name(input, axis) else { continue };
        let (first, owner) = *bound.entry(name.clone()).or_insert((size, &input.name));
        if first != size {
            return Err(fault(format!("its {name} is {size}, but that of `{owner}` is {first}")));
        }
    }
    Ok(())
}
