//! `Einsum` of two operands, spelled as the matrix product that it is.

use super::{Fused, Outputs};
use crate::{Dependence, Expr, NodeExt as _};

/// Products of matrices side by side (`bqhd,bkhd->bhqk`), and products with a constant that splits or joins axes
/// (`bnc,chd->bnhd`, `bnhd,hdc->bnc`). Sums over axes of one operand, diagonals and outer products are left alone.
pub(super) fn einsum<'b>(fused: &Fused<'b, '_>) -> Option<Outputs<'b>> {
    let equation = String::from_utf8(fused.node.attribute("equation")?.s.clone()).ok()?.replace(' ', "");
    let (operands, result) = equation.split_once("->")?;
    let (first, second) = operands.split_once(',')?;
    let distinct = |term: &str| {
        let mut letters: Vec<char> = term.chars().collect();
        letters.sort_unstable();
        letters.windows(2).all(|pair| pair[0] != pair[1]) && letters.iter().all(char::is_ascii_alphabetic)
    };
    if ![first, second, result].into_iter().all(distinct) {
        return None;
    }
    let constant = |at: usize| fused.name(at).is_some_and(|name| fused.index.dependence(name) == Dependence::Constant);
    // A weight stands on the right.
    let (x, w, terms) = match constant(0) && !constant(1) {
        true => (1, 0, (second, first)),
        false => (0, 1, (first, second)),
    };
    let (x_term, w_term) = terms;
    let letters = |from: &str, like: &dyn Fn(char) -> bool| from.chars().filter(|&c| like(c)).collect::<String>();
    let side_by_side = letters(x_term, &|c| w_term.contains(c) && result.contains(c));
    let summed = letters(x_term, &|c| w_term.contains(c) && !result.contains(c));
    let rows = letters(x_term, &|c| !w_term.contains(c));
    let columns = letters(w_term, &|c| !x_term.contains(c));
    let whole = rows.len() + columns.len() + side_by_side.len() == result.len()
        && rows.chars().chain(columns.chars()).all(|c| result.contains(c));
    if !whole || [&summed, &rows, &columns].into_iter().any(String::is_empty) {
        return None;
    }
    let (left, right) = (fused.operand(x)?, fused.operand(w)?);
    let left = ordered(left, x_term, &format!("{side_by_side}{rows}{summed}"));
    let right = ordered(right, w_term, &format!("{side_by_side}{summed}{columns}"));
    let order = format!("{side_by_side}{rows}{columns}");
    if [&summed, &columns].into_iter().all(|letters| letters.len() == 1) && (side_by_side.is_empty() || rows.len() == 1)
    {
        return Some(vec![(0, ordered(left.matmul(right), &order, result))]);
    }
    if !side_by_side.is_empty() {
        return None;
    }
    // Joined axes are those of a constant, whose sizes are known.
    let size = |letter: char| fused.size(fused.name(w)?, w_term.find(letter)?);
    let sizes = |letters: &str| letters.chars().map(size).collect::<Option<Vec<i64>>>();
    let (depth, width) = (sizes(&summed)?, sizes(&columns)?);
    let kept = |more: &[i64]| [&vec![0; rows.len()][..], more].concat();
    let left = if summed.len() > 1 { left.reshape(&kept(&[depth.iter().product()])) } else { left };
    let product = left.matmul(right.reshape(&[depth.iter().product(), width.iter().product()]));
    let product = if columns.len() > 1 { product.reshape(&kept(&width)) } else { product };
    Some(vec![(0, ordered(product, &order, result))])
}

/// The value with its axes, called `from`, in the order of `to`.
fn ordered<'b>(value: Expr<'b>, from: &str, to: &str) -> Expr<'b> {
    if from == to {
        return value;
    }
    let order: Vec<i64> = to.chars().filter_map(|c| from.find(c)).map(|at| at as i64).collect();
    value.transpose(&order)
}
