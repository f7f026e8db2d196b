//! The lengths that slices must have, as functions of the communicator.

use super::TwoGroupRows;
use crate::check::total;
use crate::device_comm::CommInfo;
use crate::error::{CommError, Result};

/// `length` must be `expected`.
pub(super) fn exact(argument: &'static str, length: usize, expected: usize) -> Result<()> {
    if length == expected {
        return Ok(());
    }
    Err(CommError::invalid(argument, format!("has {length} elements, but {expected} are needed")))
}

/// `whole` must hold one part per rank, each of `part` elements.
pub(super) fn parts(info: &CommInfo, argument: &'static str, whole: usize, part: usize) -> Result<()> {
    let expected = part
        .checked_mul(info.size)
        .ok_or_else(|| CommError::invalid(argument, format!("{part} elements a rank overflow")))?;
    exact(argument, whole, expected)
}

/// The elements per rank of a slice that holds one part per rank.
pub(super) fn part(info: &CommInfo, argument: &'static str, whole: usize) -> Result<usize> {
    if whole.is_multiple_of(info.size) {
        return Ok(whole / info.size);
    }
    let reason = format!("its {whole} elements cannot be divided evenly among {} ranks", info.size);
    Err(CommError::invalid(argument, reason))
}

/// `counts` must have one count per rank, `whole` must hold them all, `own` this rank's.
pub(super) fn uneven(
    info: &CommInfo,
    counts: &[usize],
    (own_argument, own): (&'static str, usize),
    (whole_argument, whole): (&'static str, usize),
) -> Result<()> {
    let total = total(info, counts)?;
    exact(own_argument, own, counts[info.rank])?;
    exact(whole_argument, whole, total)
}

/// `counts` must have one count per rank and `whole` hold them all; the element at which this rank's part begins.
pub(super) fn uneven_in_place(
    info: &CommInfo,
    counts: &[usize],
    argument: &'static str,
    whole: usize,
) -> Result<usize> {
    let total = total(info, counts)?;
    exact(argument, whole, total)?;
    Ok(counts[..info.rank].iter().sum())
}

/// The tokens of a matrix of `hidden` columns, with the residual and the bias that go with it.
pub(super) fn norm_tokens(
    (input, residual, output): (usize, usize, usize),
    bias: Option<usize>,
    hidden: usize,
) -> Result<usize> {
    exact("residual", residual, input)?;
    exact("output", output, input)?;
    bias.map_or(Ok(()), |bias| exact("bias", bias, hidden))?;
    if hidden == 0 {
        return Err(CommError::invalid("weight", "it is empty; it has one element per column"));
    }
    if !input.is_multiple_of(hidden) {
        let reason = format!("its {input} elements are not rows of the {hidden} that weight has");
        return Err(CommError::invalid("input", reason));
    }
    Ok(input / hidden)
}

/// `hidden_states` must hold both groups' rows, and `residual` this rank's.
pub(super) fn two_group(
    (reduce, gather): (&CommInfo, &CommInfo),
    rows: &TwoGroupRows<'_>,
    (hidden_states, residual): (usize, usize),
    bias: Option<usize>,
    hidden: usize,
) -> Result<()> {
    let overflow = || CommError::invalid("tokens", "the rows' elements exceed the address space");
    let groups = [
        (reduce, rows.reduce_first_row, rows.reduce_tokens),
        (gather, rows.gather_first_row, rows.gather_tokens),
    ];
    for (info, first, tokens) in groups {
        let end = first.checked_add(total(info, tokens)?).and_then(|end| end.checked_mul(hidden));
        let end = end.ok_or_else(overflow)?;
        if end > hidden_states {
            let reason = format!("has {hidden_states} elements, but the group's rows end at {end}");
            return Err(CommError::invalid("hidden_states", reason));
        }
    }
    let own = rows.reduce_tokens[reduce.rank].checked_mul(hidden).ok_or_else(overflow)?;
    exact("residual", residual, own)?;
    bias.map_or(Ok(()), |bias| exact("bias", bias, hidden))
}
