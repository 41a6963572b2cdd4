//! Which constants of a student are its parameters, and how they are taken over from its file.

use mabert_graph::{Boundary, ElementType, Model, Tensor};
use mabert_passes::lower::{Approximator, norm_parameters};
use mabert_passes::pipeline::Student;
use mabert_passes::sites::NormSite;

use crate::{Error, Result};

/// The parameters of a student: the encoder's approximators, affine maps and linear maps, and the head's weights.
pub(super) fn parameters(teacher: &Model, student: &Student) -> Result<Vec<String>> {
    let encoder = &student.encoder;
    let mut names: Vec<String> = Vec::new();
    names.extend(student.approximators.iter().flat_map(Approximator::parameters).cloned());
    for (norm, _) in encoder.norms() {
        names.extend(norm_parameters(norm));
    }
    let maps = encoder
        .layers
        .iter()
        .flat_map(|l| [&l.query, &l.key, &l.value, &l.attention_output, &l.intermediate, &l.output])
        .chain(&encoder.embedding_projection);
    names.extend(maps.flat_map(|m| [Some(m.weight.clone()), m.bias_name.clone()]).flatten());
    // What lies behind the norms. Outputs before the last, as all hidden states are, must not draw in the encoder.
    let norms = encoder.norms();
    let cut = |site: &NormSite| {
        Boundary::symbolic(&site.output, ElementType::F32, &["batch", "n", &site.gamma.len().to_string()])
    };
    let cuts: Vec<Boundary> = norms.iter().map(|(_, site)| cut(site)).collect();
    let outputs = student.model.outputs();
    let outputs: Vec<&str> = outputs.iter().map(|o| o.name.as_str()).collect();
    let outputs: Vec<&str> = outputs.into_iter().filter(|o| cuts.iter().all(|cut| cut.name != *o)).collect();
    if !outputs.is_empty() {
        for weight in &student.model.extract_from_inputs(&cuts, &outputs)?.graph().initializer {
            let elements: i64 = weight.dims.iter().product();
            // Single numbers are scales and epsilons; what the teacher does not have are tables of the passes.
            let own = elements > 1 && teacher.initializer(&weight.name).is_some();
            if own && Tensor::from_proto(weight)?.element_type() == ElementType::F32 {
                names.push(weight.name.clone());
            }
        }
    }
    // Not all are there: no scales without length tables, no affine maps where norms are kept.
    names.retain(|name| student.model.initializer(name).is_some());
    names.sort_unstable();
    names.dedup();
    Ok(names)
}

/// Takes up the parameters of a student that was made from the same teacher with the same options, and not folded.
///
/// # Errors
/// `from` lacks a parameter or has another shape of it, or differs in what is no parameter: it has another teacher.
pub fn adopt(teacher: &Model, student: &mut Student, from: &Model) -> Result<()> {
    let parameters = parameters(teacher, student)?;
    let fault = |reason: String| Error::Student { model: from.origin().to_owned(), reason, settings: &[] };
    let mut found = Vec::new();
    for own in &student.model.graph().initializer {
        let other = from.initializer(&own.name);
        match (parameters.contains(&own.name), other) {
            (true, None) => return Err(fault(format!("it lacks `{}`: is it a student of this teacher?", own.name))),
            (true, Some(other)) => {
                if own.dims != other.dims {
                    let reason = format!("`{}` is {:?}, where {:?} was expected", own.name, other.dims, own.dims);
                    return Err(fault(reason));
                }
                found.push((own.name.clone(), Tensor::from_proto(other)?));
            }
            (false, Some(other)) if Tensor::from_proto(other)? != Tensor::from_proto(own)? => {
                return Err(fault(format!("its `{}` is not the teacher's: is it a student of this one?", own.name)));
            }
            _ => {}
        }
    }
    found.iter().for_each(|(name, value)| student.model.set_constant(name, value));
    Ok(())
}
