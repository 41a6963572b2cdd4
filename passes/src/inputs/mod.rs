//! What the inputs of a model hold, told by what its graph does with them: names only help.
//!
//! `lookups` finds which input indexes which table of embeddings, `effect` whether an input hides tokens as a mask does,
//! and `roles` puts that beside the names.

mod effect;
mod lookups;
mod roles;

use mabert_graph::{Dim, ElementType, Model, Tensor, TensorType};
use mabert_runtime::Named;
use ndarray::Array2;
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// What an input of a model holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Token ids.
    Ids,
    /// 1 for tokens, 0 for padding.
    Mask,
    /// Token types.
    Types,
    /// Positions, from 0.
    Positions,
    /// One number a sequence, which some exports hand through to tell them apart (`unique_ids`): its row.
    Rows,
}

impl Role {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Ids, Self::Mask, Self::Types, Self::Positions, Self::Rows];

    /// Its name where users choose it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ids => "ids",
            Self::Mask => "mask",
            Self::Types => "types",
            Self::Positions => "positions",
            Self::Rows => "rows",
        }
    }

    fn noun(self) -> &'static str {
        match self {
            Self::Ids => "token ids",
            Self::Mask => "the mask",
            Self::Types => "token types",
            Self::Positions => "positions",
            Self::Rows => "a number a sequence",
        }
    }
}

/// Roles that a user gave to inputs by name.
pub type GivenRoles = [(Role, String)];

/// An input of a model, and what it holds.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct EncoderInput {
    /// Name, element type and dimensions.
    pub declared: TensorType,
    /// What it holds; `None` where neither graph nor name tells.
    pub role: Option<Role>,
    /// Rows of the table that it indexes: its elements are below.
    pub rows: Option<usize>,
}

/// The inputs of a model, and what they hold.
#[derive(Clone, Debug)]
pub struct EncoderInputs {
    inputs: Vec<EncoderInput>,
    origin: String,
    disagreement: Option<String>,
}

impl EncoderInputs {
    /// Of `model`, prepared or not.
    ///
    /// # Errors
    /// The graph's wiring is broken, or roles were given to inputs that it does not have.
    pub fn new(model: &Model, given: &GivenRoles) -> Result<Self> {
        let lookups = lookups::lookups(model)?;
        let mut inputs: Vec<EncoderInput> = model
            .inputs()
            .into_iter()
            .map(|declared| EncoderInput { role: None, rows: lookups.rows(&declared.name), declared })
            .collect();
        let disagreement = roles::assign(&mut inputs, model, &lookups, given)?;
        Ok(Self { inputs, origin: model.origin().to_owned(), disagreement })
    }

    /// The model's file, for messages.
    pub fn origin(&self) -> &str {
        &self.origin
    }

    /// One by one, in the model's order.
    pub fn iter(&self) -> std::slice::Iter<'_, EncoderInput> {
        self.inputs.iter()
    }

    /// The input of that name.
    pub fn get(&self, name: &str) -> Option<&EncoderInput> {
        self.inputs.iter().find(|input| input.declared.name == name)
    }

    /// Where names say something else than the graph, which is believed: what is taken for what.
    pub fn disagreement(&self) -> Option<&str> {
        self.disagreement.as_deref()
    }

    /// As many token ids as the table that they index has rows; `None` where no such table was found.
    pub fn vocabulary(&self) -> Option<usize> {
        self.inputs.iter().find(|input| input.role == Some(Role::Ids))?.rows
    }

    /// The embeddings of words in `model`, whose inputs these are, `[vocabulary, channels]`: a row a token id. `None` where
    /// the graph holds no such table as a value.
    ///
    /// # Errors
    /// The graph's wiring is broken.
    pub fn word_table(&self, model: &Model) -> Result<Option<Array2<f32>>> {
        let ids = self.inputs.iter().find(|input| input.role == Some(Role::Ids));
        match ids.and_then(|ids| Some((ids, ids.rows?))) {
            Some((ids, rows)) => lookups::table(model, &ids.declared.name, rows),
            None => Ok(None),
        }
    }

    /// Sequences that the model accepts: token ids out of the tables that they index, masks of ones.
    ///
    /// # Errors
    /// An input is neither an integer matrix, as token ids and masks are, nor a vector.
    pub fn made_up(&self, batch: usize, length: usize, seed: u64) -> Result<Named> {
        let mut rng = StdRng::seed_from_u64(seed);
        self.inputs
            .iter()
            .map(|input| Ok((input.declared.name.clone(), self.values(input, batch, length, &mut rng)?)))
            .collect()
    }

    fn values(&self, input: &EncoderInput, batch: usize, length: usize, rng: &mut StdRng) -> Result<Tensor> {
        let fault = || {
            let reason = format!(
                "input {} is not a matrix of integers [batch, length], as token ids and masks are",
                input.declared
            );
            Error::NotBert { origin: self.origin.clone(), reason }
        };
        let shape = shape(&input.declared, batch, length).ok_or_else(fault)?;
        let count = shape.iter().product();
        let values: Vec<i64> = match (input.role, input.rows) {
            (Some(Role::Positions), _) => {
                (0..count).map(|at| (at % shape.last().copied().unwrap_or(1)) as i64).collect()
            }
            // The lower ids are padding and other special tokens, which some models treat apart.
            (_, Some(rows)) => (0..count).map(|_| rng.random_range(rows / 2..rows.max(1)) as i64).collect(),
            (_, None) => vec![1; count],
        };
        filled(&input.declared, &shape, values).ok_or_else(fault)
    }
}

/// The shape of an input in a run of so many sequences; `None` for what is neither matrix nor vector.
fn shape(input: &TensorType, batch: usize, length: usize) -> Option<Vec<usize>> {
    let Some(dims) = &input.dims else { return Some(vec![batch, length]) };
    // A vector of one number a sequence is what some exports hand through, to tell sequences apart.
    let is_known = matches!(dims.len(), 1 | 2);
    let size = |(dim, wanted): (&Dim, usize)| if let Dim::Fixed(n) = dim { *n } else { wanted };
    is_known.then(|| dims.iter().zip([batch, length]).map(size).collect())
}

/// A tensor of an input's element type; `None` for types that no integers fill.
fn filled(input: &TensorType, shape: &[usize], values: Vec<i64>) -> Option<Tensor> {
    Some(match input.element? {
        ElementType::I64 => Tensor::new(shape, values),
        ElementType::I32 => Tensor::new(shape, values.into_iter().map(|v| v as i32).collect()),
        ElementType::Bool => Tensor::new(shape, values.into_iter().map(|v| v != 0).collect()),
        ElementType::F32 => Tensor::new(shape, values.into_iter().map(|v| v as f32).collect()),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use mabert_graph::{Builder, Expr};

    use super::*;

    const WORDS: usize = 40;

    /// How a test changes what goes into the encoder below.
    #[derive(Clone, Copy)]
    struct Names {
        ids: &'static str,
        mask: &'static str,
        types: &'static str,
    }

    const USUAL: Names = Names { ids: "input_ids", mask: "attention_mask", types: "token_type_ids" };

    /// Embeddings of words and types, and one head of attention: `[batch, n, 4]`.
    fn encoder(names: Names, index: impl for<'b> Fn(Expr<'b>, Expr<'b>) -> Expr<'b>) -> Model {
        let b = Builder::new(17, "test");
        let [ids, mask, types] =
            [names.ids, names.mask, names.types].map(|name| b.input(name, ElementType::I64, &["batch", "n"]));
        let table = |name: &str, rows: usize| {
            let values = (0..rows * 4).map(|i| ((i * 7 + rows) % 11) as f32 / 5.0 - 1.0).collect();
            b.constant(name, &Tensor::new(&[rows, 4], values))
        };
        let x = table("words", WORDS).gather(index(ids, mask)) + table("types", 2).gather(types);
        let hidden = (1.0 - mask.reshape(&[0, 1, -1]).cast(ElementType::F32)) * -1e9;
        let y = (x.matmul(x.transpose(&[0, 2, 1])) + hidden).softmax().matmul(x);
        b.model(&[y.named("y")])
    }

    fn roles(model: &Model, given: &GivenRoles) -> (Vec<Option<Role>>, EncoderInputs) {
        let inputs = EncoderInputs::new(model, given).unwrap();
        (inputs.iter().map(|i| i.role).collect(), inputs)
    }

    #[test]
    fn roles_are_what_the_graph_does_whatever_names_say() {
        let expected = vec![Some(Role::Ids), Some(Role::Mask), Some(Role::Types)];
        let named = |ids, mask, types| Names { ids, mask, types };
        let all = [
            (USUAL, false),
            (named("input_ids", "token_type_ids", "attention_mask"), true),
            (named("token_type_ids", "input_mask", "input_ids"), true),
            (named("attention_mask", "input_ids", "segment_ids"), true),
            (named("x", "input.1", "input.2"), false),
            (named("input_ids", "x", "z"), false),
        ];
        for (names, disagrees) in all {
            for spelling in [|ids, _| ids, |ids, mask| ids * mask] as [for<'b> fn(Expr<'b>, Expr<'b>) -> Expr<'b>; 2] {
                let (roles, inputs) = roles(&encoder(names, spelling), &[]);
                assert_eq!(roles, expected, "{} {} {}", names.ids, names.mask, names.types);
                assert_eq!(inputs.disagreement().is_some(), disagrees, "{:?}", inputs.disagreement());
                assert_eq!(inputs.vocabulary(), Some(WORDS));
            }
        }
    }

    #[test]
    fn the_table_of_token_types_is_never_taken_for_that_of_words() {
        // Ids that go to their table by a way that is no lookup by themselves.
        let hashed = encoder(USUAL, |ids, _| (ids.cast(ElementType::F32) * 0.5).cast(ElementType::I64));
        let (roles, inputs) = roles(&hashed, &[]);
        assert_eq!(roles[0], Some(Role::Ids));
        assert_eq!(inputs.get("token_type_ids").unwrap().rows, Some(2));
        assert_ne!(inputs.vocabulary(), Some(2));
    }

    #[test]
    fn what_a_user_says_stands() {
        let model = encoder(Names { ids: "a", mask: "b", types: "c" }, |ids, _| ids);
        let given = [(Role::Ids, "c".to_owned())];
        let (roles, inputs) = roles(&model, &given);
        assert_eq!((roles[2], inputs.vocabulary()), (Some(Role::Ids), Some(2)));
        assert_ne!(roles[0], Some(Role::Ids));
        let fault = EncoderInputs::new(&model, &[(Role::Mask, "d".to_owned())]).unwrap_err().to_string();
        assert!(fault.contains("no input `d`") && fault.contains("`a`, `b`, `c`"), "{fault}");
    }
}
