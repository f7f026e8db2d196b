//! The lengths that slices must have, as functions of the communicator.

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
    let total = crate::check::total(info, counts)?;
    exact(own_argument, own, counts[info.rank])?;
    exact(whole_argument, whole, total)
}
