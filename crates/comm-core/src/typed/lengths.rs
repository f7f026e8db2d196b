//! The lengths that slices must have, as functions of the communicator.

use super::{BlockShape, TwoGroupRows};
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

/// The fp8 result of `rows` rows of `hidden` elements, and its scales: one for all, or `per_token` of them.
pub(super) fn quantized(
    (rows, hidden): (usize, usize),
    output: usize,
    (scales, per_token): (usize, bool),
) -> Result<()> {
    let too_many = || CommError::invalid("quantized.output", format!("{rows} rows of {hidden} overflow"));
    exact("quantized.output", output, rows.checked_mul(hidden).ok_or_else(too_many)?)?;
    exact("quantized.scale", scales, if per_token { rows } else { 1 })
}

/// `send` must hold a block of this shape, and `recv` all ranks' blocks. What else a shape must satisfy, the operation
/// checks.
pub(super) fn blocks(info: &CommInfo, shape: &BlockShape, send: usize, recv: usize) -> Result<()> {
    at_least("send", send, extent(shape, shape.send_pitch))?;
    whole_blocks(info, shape, "recv", recv)
}

/// `data` must hold all ranks' blocks, as they are sent from where they lie; the element at which this rank's begins.
pub(super) fn blocks_in_place(info: &CommInfo, shape: &BlockShape, data: usize) -> Result<usize> {
    if shape.send_pitch != shape.row_pitch {
        let (sent, result) = (shape.send_pitch, shape.row_pitch);
        let reason = format!("in place, send_pitch is row_pitch; they are {sent} and {result}");
        return Err(CommError::invalid("shape", reason));
    }
    whole_blocks(info, shape, "data", data)?;
    // The last rank's block has been found to lie in the slice; empty ones may lie anywhere.
    let empty = extent(shape, shape.row_pitch) == Some(0);
    Ok(if empty { 0 } else { info.rank * shape.rank_stride })
}

fn whole_blocks(info: &CommInfo, shape: &BlockShape, argument: &'static str, found: usize) -> Result<()> {
    let needed = match extent(shape, shape.row_pitch) {
        Some(0) => Some(0),
        extent => extent.and_then(|own| (info.size - 1).checked_mul(shape.rank_stride)?.checked_add(own)),
    };
    at_least(argument, found, needed)
}

/// From the first element of a block to behind its last.
fn extent(shape: &BlockShape, pitch: usize) -> Option<usize> {
    if shape.height == 0 || shape.width == 0 {
        return Some(0);
    }
    (shape.height - 1).checked_mul(pitch)?.checked_add(shape.width)
}

fn at_least(argument: &'static str, found: usize, needed: Option<usize>) -> Result<()> {
    match needed {
        Some(needed) if found >= needed => Ok(()),
        Some(needed) => {
            Err(CommError::invalid(argument, format!("has {found} elements, but the blocks take {needed}")))
        }
        None => Err(CommError::invalid("shape", "the blocks' elements exceed the address space")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::MemoryKind;

    fn info(rank: usize, size: usize) -> CommInfo {
        CommInfo { name: "world".into(), backend: "test".into(), rank, size, memory: MemoryKind::Host }
    }

    #[test]
    fn blocks_need_room_to_behind_the_last_ranks_last_row() {
        let columns = BlockShape::columns(3, 4, 5);
        assert!(blocks(&info(1, 3), &columns, 20, 60).is_ok());
        assert!(blocks(&info(1, 3), &columns, 19, 60).is_err());
        assert!(blocks(&info(1, 3), &columns, 20, 59).is_err());
        // The gap behind a last row is no part of it.
        let gaps = BlockShape { row_pitch: 7, rank_stride: 30, send_pitch: 6, ..columns };
        assert!(blocks(&info(0, 3), &gaps, 23, 86).is_ok());
        assert!(blocks(&info(0, 3), &gaps, 22, 86).is_err());
        assert!(blocks(&info(0, 3), &gaps, 23, 85).is_err());
        let empty = BlockShape { height: 0, rank_stride: usize::MAX, ..columns };
        assert!(blocks(&info(0, 3), &empty, 0, 0).is_ok());
        for huge in [
            BlockShape { rank_stride: usize::MAX, ..columns },
            BlockShape { row_pitch: usize::MAX, ..columns },
            BlockShape { send_pitch: usize::MAX, ..columns },
            BlockShape::columns(3, usize::MAX, usize::MAX),
        ] {
            assert!(blocks(&info(0, 3), &huge, usize::MAX, usize::MAX).is_err(), "{huge:?}");
        }
    }

    #[test]
    fn blocks_in_place_are_sent_from_where_they_come_to_lie() {
        let columns = BlockShape::columns(3, 4, 5);
        assert!(blocks_in_place(&info(2, 3), &columns, 60).is_err());
        let columns = BlockShape { send_pitch: columns.row_pitch, ..columns };
        assert_eq!(blocks_in_place(&info(2, 3), &columns, 60), Ok(10));
        let empty = BlockShape { width: 0, rank_stride: usize::MAX, ..columns };
        assert_eq!(blocks_in_place(&info(2, 3), &empty, 0), Ok(0));
        assert!(blocks_in_place(&info(2, 3), &columns, 59).is_err());
    }

    #[test]
    fn fp8_results_have_a_scale_for_all_or_for_each_row() {
        assert!(quantized((3, 8), 24, (1, false)).is_ok() && quantized((3, 8), 24, (3, true)).is_ok());
        for (output, scales) in [(23, (1, false)), (24, (3, false)), (24, (2, true)), (25, (3, true))] {
            assert!(quantized((3, 8), output, scales).is_err(), "{output} {scales:?}");
        }
        assert!(quantized((usize::MAX, 2), 0, (1, false)).is_err());
        assert!(quantized((0, 8), 0, (0, true)).is_ok());
    }
}
