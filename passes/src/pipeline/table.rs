//! The table of passes: all that anyone but their own files knows of them. A new pass is a row here.

use mabert_graph::Model;
use serde::{Deserialize, Serialize};

use super::options::Order;
use super::outcome::Skipped;
use super::student::{Completeness, Student};
use crate::sites::Precision;
use crate::{Error, Result, lower};

/// Whether a pass changes what the model computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum PassKind {
    /// Outputs are equal within rounding.
    Exact,
    /// Outputs differ by the roundings that are left out.
    Dequantising,
    /// A function is replaced by one that matrix arithmetic and ReLU compute.
    Approximating,
    /// Outputs are equal where no value leaves the bounds.
    Bounding,
}

/// When a pass runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// Before sites are recognised.
    Simplify,
    /// On the teacher, once they are.
    Canonicalise,
    /// On the student, before it is calibrated.
    Approximate,
    /// Once it is, before it is measured.
    Bound,
    /// On the student as it was measured.
    Finish,
}

/// What a pass does; how many sites, nodes or constants it changed is what it gives back.
pub(super) enum Work {
    /// On the graph alone, of every model that it `applies` to: recognising needs it. What precision the model comes in, it
    /// may find out.
    Graph { applies: fn(&Model) -> bool, run: fn(&mut Model, &mut Precision) -> Result<usize> },
    /// On graph and sites, unless `decide` says otherwise.
    Sites { decide: fn(&Student) -> Decision, run: fn(&mut Student) -> Result<usize> },
}

/// Whether a pass runs.
pub(super) enum Decision {
    Run,
    Skip(Skipped),
    /// It has nothing to do with such a model, and nothing is said of it.
    Omit,
}

/// One pass.
pub(super) struct Row {
    /// Its name on the command line, in reports, and on the nodes that it makes.
    pub(super) name: &'static str,
    pub(super) kind: PassKind,
    pub(super) stage: Stage,
    pub(super) work: Work,
}

/// The passes in the order in which they run.
macro_rules! passes {
    ($($(#[doc = $doc:literal])* $pass:ident = $row:expr;)*) => {
        /// A pass. They are ordered as they run.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(into = "&'static str", try_from = "String")]
        #[non_exhaustive]
        pub enum Pass {
            $($(#[doc = $doc])* $pass,)*
        }

        const ROWS: &[Row] = &[$($row),*];

        impl Pass {
            /// All passes in the order in which they run.
            pub const ALL: [Self; ROWS.len()] = [$(Self::$pass),*];
        }
    };
}

use Decision::{Omit, Run, Skip};
use PassKind::{Approximating, Bounding, Dequantising, Exact};

passes! {
    /// What is quantised, in single precision, without the roundings on the way.
    Dequantise = Row {
        name: "dequantise",
        kind: Dequantising,
        stage: Stage::Simplify,
        work: Work::Graph { applies: mabert_graph::is_quantised, run: |model, _| lower::dequantise(model) },
    };

    /// The model's own functions, and fused operators, spelled out.
    DecomposeFused = Row {
        name: "decompose-fused",
        kind: Exact,
        stage: Stage::Simplify,
        work: Work::Graph { applies: |_| true, run: lower::spell_out },
    };

    /// What depends on no input is computed once, what does nothing is taken out, and sentences come before tokens.
    FoldConstants = Row {
        name: "fold-constants",
        kind: Exact,
        stage: Stage::Simplify,
        work: Work::Graph {
            applies: |_| true,
            run: |model, _| {
                let clean =
                    |model: &mut Model| Ok::<_, Error>(lower::fold_constants(model)? + lower::remove_idle(model)?);
                let gone = clean(model)?;
                match lower::put_sentences_first(model)? {
                    0 => Ok(gone),
                    turned => Ok(gone + turned + clean(model)?),
                }
            },
        },
    };

    /// Attention and linear maps in one spelling.
    Canonical = Row {
        name: "canonical",
        kind: Exact,
        stage: Stage::Canonicalise,
        work: Work::Sites {
            decide: |_| Run,
            run: |s| lower::canonicalise(&mut s.model, &mut s.encoder, s.options.approximator.longest()),
        },
    };

    /// Softmax to approximator.
    Softmax = Row {
        name: "softmax",
        kind: Approximating,
        stage: Stage::Approximate,
        work: Work::Sites {
            decide: |s| if s.options.keep.softmax { Skip(Skipped::SoftmaxKept) } else { Run },
            run: |s| {
                s.approximators = lower::approximate_softmax(&mut s.model, &s.encoder, &s.options)?;
                Ok(s.approximators.len())
            },
        },
    };

    /// GELU to ReLU.
    Activation = Row {
        name: "activation",
        kind: Approximating,
        stage: Stage::Approximate,
        work: Work::Sites {
            decide: |s| if s.options.keep.activation { Skip(Skipped::ActivationKept) } else { Run },
            run: |s| lower::approximate_activations(&mut s.model, &s.encoder),
        },
    };

    /// Layer normalisation to affine map.
    Norm = Row {
        name: "norm",
        kind: Approximating,
        stage: Stage::Approximate,
        work: Work::Sites {
            decide: |s| if s.options.keep.norm { Skip(Skipped::NormKept) } else { Run },
            run: |s| lower::approximate_norms(&mut s.model, &s.encoder),
        },
    };

    /// The stream saturates behind each norm, beyond what calibration saw.
    Bound = Row {
        name: "bound",
        kind: Bounding,
        stage: Stage::Bound,
        work: Work::Sites {
            decide: |s| match s.options.bounds {
                _ if s.options.keep.norm => Skip(Skipped::NormKept),
                false => Skip(Skipped::BoundsOff),
                true if s.seen.is_none() => Skip(Skipped::NotCalibrated),
                true => Run,
            },
            run: |s| {
                let seen = s.seen.take().unwrap_or_default();
                s.bounds = lower::bound_norms(&mut s.model, &s.encoder, &seen, s.precision)?;
                Ok(s.bounds.len())
            },
        },
    };

    /// Attention without its probabilities: networks in the linear order, hinges one by one.
    Reassociate = Row {
        name: "reassociate",
        kind: Exact,
        stage: Stage::Finish,
        work: Work::Sites {
            decide: |s| match s.options.order {
                _ if s.options.keep.softmax => Skip(Skipped::SoftmaxKept),
                Order::Paper if s.needs_scores() => Skip(Skipped::PositionBias),
                Order::Paper if s.encoder.shows_probabilities() => Skip(Skipped::ProbabilitiesShown),
                Order::Paper => Skip(Skipped::PaperOrder),
                Order::Auto | Order::Linear => Run,
            },
            run: |s| lower::reassociate_attention(&mut s.model, &s.encoder, &s.approximators, &s.options),
        },
    };

    /// Affine maps into their neighbours.
    Fold = Row {
        name: "fold",
        kind: Exact,
        stage: Stage::Finish,
        work: Work::Sites {
            decide: |s| match unless_unfolded(s) {
                _ if s.completeness == Completeness::Partial => Skip(Skipped::Partial),
                Run if s.options.keep.norm => Skip(Skipped::NormKept),
                decision => decision,
            },
            run: |s| {
                s.fold = lower::fold_norms(&mut s.model, &mut s.encoder, s.precision, &s.bounds)?;
                Ok(s.fold.norms)
            },
        },
    };

    /// The last layer for first tokens alone, where the head reads no others.
    FirstToken = Row {
        name: "first-token",
        kind: Exact,
        stage: Stage::Finish,
        work: Work::Sites {
            decide: unless_unfolded,
            run: |s| lower::keep_first_token(&mut s.model, &mut s.encoder),
        },
    };

    /// One product for queries, keys and values.
    MergeQkv = Row {
        name: "merge-qkv",
        kind: Exact,
        stage: Stage::Finish,
        work: Work::Sites {
            decide: unless_unfolded,
            run: |s| lower::merge_query_key_value(&mut s.model, &s.encoder),
        },
    };

    /// Equal constants once.
    ShareConstants = Row {
        name: "share-constants",
        kind: Exact,
        stage: Stage::Finish,
        work: Work::Sites {
            decide: unless_unfolded,
            run: |s| Ok(lower::share_equal_constants(&mut s.model)),
        },
    };

    /// A model of half precision, worked on in single precision, back in half precision.
    Narrow = Row {
        name: "narrow",
        kind: Exact,
        stage: Stage::Finish,
        work: Work::Sites {
            decide: |s| if s.precision == Precision::Half { Run } else { Omit },
            run: |s| {
                mabert_graph::narrow_to_half(&mut s.model)?;
                Ok(s.model.graph().initializer.len())
            },
        },
    };
}

/// A student that is not folded is one to be trained on: its parameters stay where they are found by name.
fn unless_unfolded(student: &Student) -> Decision {
    if student.options.fold { Run } else { Skip(Skipped::Unfolded) }
}

impl Pass {
    pub(super) fn row(self) -> &'static Row {
        &ROWS[self as usize]
    }

    /// The passes of a stage.
    pub(super) fn all_in(stage: Stage) -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().filter(move |pass| pass.row().stage == stage)
    }

    /// The name on the command line and on the nodes that the pass makes.
    pub fn name(self) -> &'static str {
        self.row().name
    }

    /// Whether it is exact.
    pub fn kind(self) -> PassKind {
        self.row().kind
    }
}

impl From<Pass> for &'static str {
    fn from(pass: Pass) -> Self {
        pass.name()
    }
}

/// A text that names no pass.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there is no pass `{0}`")]
pub struct UnknownPass(String);

impl TryFrom<String> for Pass {
    type Error = UnknownPass;

    fn try_from(name: String) -> std::result::Result<Self, UnknownPass> {
        Self::ALL.into_iter().find(|pass| pass.name() == name).ok_or(UnknownPass(name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passes_are_written_and_read_by_their_names_alone() {
        for pass in Pass::ALL {
            let written = serde_json::to_string(&pass).unwrap();
            assert_eq!(written, format!("\"{}\"", pass.name()));
            assert_eq!(serde_json::from_str::<Pass>(&written).unwrap(), pass);
        }
        assert!(serde_json::from_str::<Pass>("\"Fold\"").is_err());
        // A student is calibrated once, after all passes that need it.
        assert!(Pass::ALL.is_sorted_by_key(|pass| pass.row().stage as usize));
        for pass in Pass::ALL {
            assert_eq!(pass.kind() == PassKind::Approximating, pass.row().stage == Stage::Approximate, "{pass:?}");
            assert_eq!(pass.kind() == PassKind::Bounding, pass.row().stage == Stage::Bound, "{pass:?}");
        }
    }
}
