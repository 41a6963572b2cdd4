//! Fits a layer's softmax in the cheaper form, and in the other where that is too far from the teacher.

use std::collections::HashSet;

use mabert_graph::proto::TensorProto;
use mabert_passes::lower::{Form, norm_parameters};
use mabert_passes::sites::LayerSite;

use super::approximators::{FittedLayer, mean_square};
use super::choice::{AttentionSize, ByForm, FormChoice, Reason, Weighing, neither_or_other};
use super::walk::Walk;
use crate::Result;

/// Networks are tried with this part of their rows and steps first.
const TRIAL: usize = 4;
/// And fitted in full where the trial is within so many times the bound.
const PROMISING: f64 = 2.0;

/// What was fitted, and with which part of the rows and steps.
#[derive(Default)]
struct Tried {
    hinges: Option<FittedLayer>,
    network: Option<(FittedLayer, usize)>,
    errors: ByForm<Option<f64>>,
}

impl Walk<'_> {
    /// Takes the cheaper form if its error is within the bound, else the other where that is closer.
    pub(super) fn fit_cheapest(&mut self, index: usize, weighing: Weighing) -> Result<()> {
        let layer = &self.encoder.layers[index];
        let options = &self.student.options.approximator;
        let size = AttentionSize {
            tokens: options.max_seq,
            hidden: options.hidden,
            head: layer.attention.head_size,
            hinges: options.hinges,
        };
        let cost = size.cost(weighing.target);
        let (first, second) = match cost.network < cost.hinges {
            true => (Form::Network, Form::Hinges),
            false => (Form::Hinges, Form::Network),
        };
        let mut tried = Tried::default();
        let (form, reason) = if self.try_form(index, first, weighing.bound, &mut tried)? <= weighing.bound {
            (first, Reason::CheaperWithinBound)
        } else {
            self.try_form(index, second, weighing.bound, &mut tried)?;
            neither_or_other(first, &tried.errors, weighing.bound)
        };
        self.take(index, form, &mut tried)?;
        let site = layer.site(LayerSite::Attention);
        self.choices.push(FormChoice { site, form, cost, squared_error: tried.errors, reason });
        Ok(())
    }

    /// The squared error of a form.
    fn try_form(&mut self, index: usize, form: Form, bound: f64, tried: &mut Tried) -> Result<f64> {
        let error = match form {
            Form::Hinges => {
                let (fitted, errors) = self.hinges_of(index)?;
                tried.hinges = Some(FittedLayer::Hinges(fitted, errors.clone()));
                mean_square(&errors)
            }
            Form::Network => {
                let error = self.try_network(index, TRIAL, tried)?;
                if error <= PROMISING * bound { self.try_network(index, 1, tried)? } else { error }
            }
        };
        tried.errors.set(form, Some(error));
        Ok(error)
    }

    fn try_network(&mut self, index: usize, part: usize, tried: &mut Tried) -> Result<f64> {
        let (networks, errors) = self.networks_of(index, part)?;
        let error = mean_square(&errors);
        tried.network = Some((FittedLayer::Networks(networks, errors), part));
        tried.errors.network = Some(error);
        Ok(error)
    }

    /// Puts what was fitted into the student.
    fn take(&mut self, index: usize, form: Form, tried: &mut Tried) -> Result<()> {
        if form == Form::Network && tried.network.as_ref().is_none_or(|(_, part)| *part > 1) {
            self.try_network(index, 1, tried)?;
        }
        let fitted = match form {
            Form::Hinges => tried.hinges.take(),
            Form::Network => tried.network.take().map(|(fitted, _)| fitted),
        };
        self.put_form(index, form)?;
        let site = self.encoder.layers[index].site(LayerSite::Attention);
        fitted.into_iter().for_each(|fitted| self.keep(site, index, fitted));
        Ok(())
    }

    /// Makes the student anew with that form in a layer, and all that was found so far.
    fn put_form(&mut self, index: usize, form: Form) -> Result<()> {
        let mut forms: Vec<Form> = self.student.approximators.iter().map(|approximator| approximator.form()).collect();
        if std::mem::replace(&mut forms[index], form) == form {
            return Ok(());
        }
        let own: Vec<String> = self.student.approximators[index].parameters().into_iter().cloned().collect();
        let mut fresh = self.rewriting.approximate_as(&forms)?;
        let others = fresh.approximators.iter().flat_map(|approximator| approximator.parameters()).cloned();
        let norms = self.encoder.norms().into_iter().flat_map(|(norm, _)| norm_parameters(norm));
        let mut parameters: HashSet<String> = others.chain(norms).filter(|name| !own.contains(name)).collect();
        parameters.extend(self.teacher.graph().initializer.iter().map(|weight| weight.name.clone()));
        let is_parameter = |constant: &&mut TensorProto| parameters.contains(&constant.name);
        for constant in fresh.model.graph_mut().initializer.iter_mut().filter(is_parameter) {
            if let Some(before) = self.student.model.initializer(&constant.name) {
                constant.clone_from(before);
            }
        }
        *self.student = fresh;
        Ok(())
    }
}
