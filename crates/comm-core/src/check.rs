//! The argument checks that every backend makes before it does anything: counts that overflow, null and misaligned
//! addresses, partial overlaps, roots and peers out of range, shapes that make no sense.
//!
//! Backends call these first, so that the same mistake gives the same [`CommError::InvalidArgument`] everywhere and a
//! kernel or library never sees it. Each function returns the sizes it computed.

use std::ops::Range;

use crate::addr::DeviceAddr;
use crate::device_comm::{CommInfo, P2pOp};
use crate::dtype::DType;
use crate::error::{CommError, Result};
use crate::fused::{Block2d, RmsNormArgs, TwoGroupNormArgs};

/// Bytes of `count` elements.
///
/// # Errors
/// [`CommError::InvalidArgument`] when they exceed `isize::MAX`.
pub fn bytes(count: usize, dtype: DType) -> Result<usize> {
    count.checked_mul(dtype.size()).filter(|&bytes| isize::try_from(bytes).is_ok()).ok_or_else(|| {
        CommError::invalid("count", format!("{count} elements of {dtype} exceed the address space"))
    })
}

/// The sum of a V operation's counts, of which there must be one per rank.
///
/// # Errors
/// [`CommError::InvalidArgument`] when there are too few, too many, or their sum overflows.
pub fn total(info: &CommInfo, counts: &[usize]) -> Result<usize> {
    if counts.len() != info.size {
        return Err(CommError::invalid(
            "counts",
            format!("{} counts given, but the communicator has {} ranks", counts.len(), info.size),
        ));
    }
    counts
        .iter()
        .try_fold(0_usize, |sum, &count| sum.checked_add(count))
        .ok_or_else(|| CommError::invalid("counts", "their sum overflows"))
}

/// A root or peer that must be a rank of the communicator.
///
/// # Errors
/// [`CommError::InvalidArgument`] when it is not.
pub fn rank(info: &CommInfo, argument: &'static str, rank: usize) -> Result<()> {
    if rank < info.size {
        return Ok(());
    }
    Err(CommError::invalid(
        argument,
        format!("{rank} is not a rank of communicator {:?}, which has {} ranks", info.name, info.size),
    ))
}

/// The byte range of `count` elements at `addr`; empty for zero elements, whatever the address.
///
/// # Errors
/// [`CommError::InvalidArgument`] for a null or misaligned address, or a range that wraps.
pub fn span(argument: &'static str, addr: DeviceAddr, count: usize, dtype: DType) -> Result<Range<u64>> {
    let length = bytes(count, dtype)?;
    if length == 0 {
        return Ok(addr.0..addr.0);
    }
    if addr.is_null() {
        return Err(CommError::invalid(argument, format!("null address for {count} elements")));
    }
    if !addr.is_aligned_to(dtype.size() as u64) {
        return Err(CommError::invalid(
            argument,
            format!("address {addr:?} is not aligned to the {} bytes of {dtype}", dtype.size()),
        ));
    }
    let end = addr.0.checked_add(length as u64).ok_or_else(|| {
        CommError::invalid(argument, format!("{length} bytes at {addr:?} exceed the address space"))
    })?;
    Ok(addr.0..end)
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    !a.is_empty() && !b.is_empty() && a.start < b.end && b.start < a.end
}

/// `recv` must not touch `send` unless `recv` is exactly at `in_place_at`.
fn apart_or_in_place(send: &Range<u64>, recv: &Range<u64>, in_place: bool) -> Result<()> {
    if in_place || !overlap(send, recv) {
        return Ok(());
    }
    Err(CommError::invalid(
        "recv",
        format!(
            "{:#x}..{:#x} overlaps send {:#x}..{:#x} without being in place",
            recv.start, recv.end, send.start, send.end
        ),
    ))
}

/// Checks an all-reduce, a reduce on its root, or a broadcast on its root. Returns the bytes of each operand.
///
/// # Errors
/// [`CommError::InvalidArgument`].
pub fn same_size(send: DeviceAddr, recv: DeviceAddr, count: usize, dtype: DType) -> Result<usize> {
    let from = span("send", send, count, dtype)?;
    let to = span("recv", recv, count, dtype)?;
    apart_or_in_place(&from, &to, from.start == to.start)?;
    bytes(count, dtype)
}

/// Checks a broadcast. Returns the bytes of the buffer.
///
/// # Errors
/// [`CommError::InvalidArgument`].
pub fn broadcast(
    info: &CommInfo,
    send: DeviceAddr,
    recv: DeviceAddr,
    count: usize,
    dtype: DType,
    root: usize,
) -> Result<usize> {
    rank(info, "root", root)?;
    if info.rank == root {
        return same_size(send, recv, count, dtype);
    }
    span("recv", recv, count, dtype)?;
    bytes(count, dtype)
}

/// Checks a reduce. Returns the bytes of the buffer.
///
/// # Errors
/// [`CommError::InvalidArgument`].
pub fn reduce(
    info: &CommInfo,
    send: DeviceAddr,
    recv: DeviceAddr,
    count: usize,
    dtype: DType,
    root: usize,
) -> Result<usize> {
    rank(info, "root", root)?;
    if info.rank == root {
        return same_size(send, recv, count, dtype);
    }
    span("send", send, count, dtype)?;
    bytes(count, dtype)
}

/// Checks an all-gather of `count` elements a rank. Returns the bytes that each rank sends.
///
/// # Errors
/// [`CommError::InvalidArgument`].
pub fn all_gather(
    info: &CommInfo,
    send: DeviceAddr,
    recv: DeviceAddr,
    count: usize,
    dtype: DType,
) -> Result<usize> {
    let part = bytes(count, dtype)?;
    let all = count
        .checked_mul(info.size)
        .ok_or_else(|| CommError::invalid("count", format!("{count} elements a rank overflow")))?;
    let from = span("send", send, count, dtype)?;
    let to = span("recv", recv, all, dtype)?;
    let own = recv.offset((part * info.rank) as u64);
    apart_or_in_place(&from, &to, send == own)?;
    Ok(part)
}

/// Checks an all-gather V. Returns the bytes of the whole result.
///
/// # Errors
/// [`CommError::InvalidArgument`].
pub fn all_gather_v(
    info: &CommInfo,
    send: DeviceAddr,
    recv: DeviceAddr,
    counts: &[usize],
    dtype: DType,
) -> Result<usize> {
    let all = total(info, counts)?;
    let whole = bytes(all, dtype)?;
    let from = span("send", send, counts[info.rank], dtype)?;
    let to = span("recv", recv, all, dtype)?;
    let before: usize = counts[..info.rank].iter().sum();
    let own = recv.offset((before * dtype.size()) as u64);
    apart_or_in_place(&from, &to, send == own)?;
    Ok(whole)
}

/// Checks a reduce-scatter of `count` elements a rank. Returns the bytes that each rank receives.
///
/// # Errors
/// [`CommError::InvalidArgument`].
pub fn reduce_scatter(
    info: &CommInfo,
    send: DeviceAddr,
    recv: DeviceAddr,
    count: usize,
    dtype: DType,
) -> Result<usize> {
    // The mirror image of an all-gather: the roles of the two operands are exchanged.
    let part = bytes(count, dtype)?;
    let all = count
        .checked_mul(info.size)
        .ok_or_else(|| CommError::invalid("count", format!("{count} elements a rank overflow")))?;
    let from = span("send", send, all, dtype)?;
    let to = span("recv", recv, count, dtype)?;
    let own = send.offset((part * info.rank) as u64);
    apart_or_in_place(&from, &to, recv == own)?;
    Ok(part)
}

/// Checks a reduce-scatter V. Returns the bytes of the whole input.
///
/// # Errors
/// [`CommError::InvalidArgument`].
pub fn reduce_scatter_v(
    info: &CommInfo,
    send: DeviceAddr,
    recv: DeviceAddr,
    counts: &[usize],
    dtype: DType,
) -> Result<usize> {
    let all = total(info, counts)?;
    let whole = bytes(all, dtype)?;
    let from = span("send", send, all, dtype)?;
    let to = span("recv", recv, counts[info.rank], dtype)?;
    let before: usize = counts[..info.rank].iter().sum();
    let own = send.offset((before * dtype.size()) as u64);
    apart_or_in_place(&from, &to, recv == own)?;
    Ok(whole)
}

/// Checks an all-to-all of `count` elements a pair of ranks. Returns the bytes that each pair exchanges.
///
/// # Errors
/// [`CommError::InvalidArgument`].
pub fn all_to_all(
    info: &CommInfo,
    send: DeviceAddr,
    recv: DeviceAddr,
    count: usize,
    dtype: DType,
) -> Result<usize> {
    let all = count
        .checked_mul(info.size)
        .ok_or_else(|| CommError::invalid("count", format!("{count} elements a pair overflow")))?;
    let from = span("send", send, all, dtype)?;
    let to = span("recv", recv, all, dtype)?;
    apart_or_in_place(&from, &to, false)?;
    bytes(count, dtype)
}

/// Checks one send or receive. Returns its bytes.
///
/// # Errors
/// [`CommError::InvalidArgument`].
pub fn p2p(info: &CommInfo, addr: DeviceAddr, count: usize, dtype: DType, peer: usize) -> Result<usize> {
    rank(info, "peer", peer)?;
    span("addr", addr, count, dtype)?;
    bytes(count, dtype)
}

/// Checks a group of transfers: each in itself, and that no receive touches another transfer's range.
///
/// # Errors
/// [`CommError::InvalidArgument`].
pub fn group(info: &CommInfo, ops: &[P2pOp]) -> Result<()> {
    let mut spans = Vec::with_capacity(ops.len());
    for op in ops {
        let (writes, P2pOp::Send { addr, count, dtype, peer } | P2pOp::Recv { addr, count, dtype, peer }) =
            (matches!(op, P2pOp::Recv { .. }), *op);
        p2p(info, addr, count, dtype, peer)?;
        spans.push((span("addr", addr, count, dtype)?, writes));
    }
    spans.retain(|(range, _)| !range.is_empty());
    spans.sort_by_key(|(range, _)| range.start);
    // Sorted by start, a range can only touch those that began before the furthest end seen; it is enough to remember
    // the furthest end of all ranges and of the written ones.
    let (mut end, mut written_end) = (0, 0);
    for (range, writes) in spans {
        if range.start < written_end || (writes && range.start < end) {
            return Err(CommError::invalid(
                "ops",
                format!("a receive overlaps another transfer at {:#x}", range.start),
            ));
        }
        end = end.max(range.end);
        if writes {
            written_end = written_end.max(range.end);
        }
    }
    Ok(())
}

/// Checks a two-dimensional all-gather. Blocks of different ranks must not overlap in `recv`.
///
/// # Errors
/// [`CommError::InvalidArgument`].
pub fn all_gather_2d(info: &CommInfo, send: DeviceAddr, recv: DeviceAddr, block: &Block2d) -> Result<()> {
    let Block2d { height, width, row_pitch, rank_stride, send_pitch, dtype, .. } = *block;
    if height == 0 || width == 0 {
        return Ok(());
    }
    if row_pitch < width || send_pitch < width {
        return Err(CommError::invalid(
            "block",
            format!("pitches {row_pitch} and {send_pitch} must be at least the width {width}"),
        ));
    }
    let too_large = || CommError::invalid("block", format!("{block:?} overflows"));
    let extent = |pitch: usize| (height - 1).checked_mul(pitch)?.checked_add(width);
    let from = span("send", send, extent(send_pitch).ok_or_else(too_large)?, dtype)?;
    let own_extent = extent(row_pitch).ok_or_else(too_large)?;
    let all = (info.size - 1)
        .checked_mul(rank_stride)
        .and_then(|start| start.checked_add(own_extent))
        .ok_or_else(too_large)?;
    let to = span("recv", recv, all, dtype)?;
    let side_by_side = rank_stride >= width
        && (info.size - 1)
            .checked_mul(rank_stride)
            .and_then(|o| o.checked_add(width))
            .is_some_and(|o| o <= row_pitch);
    let one_after_another = rank_stride >= own_extent;
    if info.size > 1 && !side_by_side && !one_after_another {
        return Err(CommError::invalid(
            "block",
            format!("with {} ranks, blocks of {block:?} overlap in recv", info.size),
        ));
    }
    let own = recv.offset((info.rank * rank_stride * dtype.size()) as u64);
    apart_or_in_place(&from, &to, send == own && send_pitch == row_pitch)
}

fn norm_type(dtype: DType, hidden: usize, eps: f32) -> Result<()> {
    if !matches!(dtype, DType::F32 | DType::F16 | DType::BF16) {
        return Err(CommError::invalid("dtype", format!("RMSNorm takes f32, f16 and bf16, not {dtype}")));
    }
    if hidden == 0 {
        return Err(CommError::invalid("hidden", "must be at least 1"));
    }
    if !(eps.is_finite() && eps >= 0.0) {
        return Err(CommError::invalid("eps", format!("{eps} is not finite and non-negative")));
    }
    Ok(())
}

fn elements(argument: &'static str, rows: usize, columns: usize) -> Result<usize> {
    rows.checked_mul(columns)
        .ok_or_else(|| CommError::invalid(argument, format!("{rows} rows of {columns} elements overflow")))
}

/// Checks a fused norm. Returns the elements of each matrix.
///
/// # Errors
/// [`CommError::InvalidArgument`].
pub fn rmsnorm(args: &RmsNormArgs) -> Result<usize> {
    let RmsNormArgs { tokens, hidden, dtype, .. } = *args;
    norm_type(dtype, hidden, args.eps)?;
    let count = elements("tokens", tokens, hidden)?;
    if count == 0 {
        return Ok(0);
    }
    let input = span("input", args.input, count, dtype)?;
    let residual = span("residual", args.residual, count, dtype)?;
    let residual_out = span("residual_out", args.residual_out, count, dtype)?;
    let output = span("output", args.output, count, dtype)?;
    let weight = span("weight", args.weight, hidden, dtype)?;
    let bias = args.bias.map(|bias| span("bias", bias, hidden, dtype)).transpose()?;
    let clash =
        |a: &Range<u64>, b: &Range<u64>, may_equal: bool| overlap(a, b) && !(may_equal && a.start == b.start);
    let vectors = [Some(&weight), bias.as_ref()];
    if clash(&residual_out, &residual, true)
        || clash(&output, &input, true)
        || overlap(&residual_out, &input)
        || overlap(&residual_out, &output)
        || overlap(&output, &residual)
        || vectors.into_iter().flatten().any(|v| overlap(v, &output) || overlap(v, &residual_out))
    {
        return Err(CommError::invalid(
            "args",
            "output may share the input's range and residual_out the residual's; no others may overlap",
        ));
    }
    Ok(count)
}

/// Checks a two-group fused norm. Returns the row of `hidden_states` at which this rank's own rows begin.
///
/// # Errors
/// [`CommError::InvalidArgument`].
pub fn two_group_norm(reduce: &CommInfo, gather: &CommInfo, args: &TwoGroupNormArgs<'_>) -> Result<usize> {
    let TwoGroupNormArgs { hidden, dtype, reduce_tokens, gather_tokens, .. } = *args;
    norm_type(dtype, hidden, args.eps)?;
    let reduce_rows = total(reduce, reduce_tokens)?;
    let gather_rows = total(gather, gather_tokens)?;
    let own = reduce_tokens[reduce.rank];
    let own_row = args.reduce_first_row + reduce_tokens[..reduce.rank].iter().sum::<usize>();
    let own_row_gather = args.gather_first_row + gather_tokens[..gather.rank].iter().sum::<usize>();
    if own != gather_tokens[gather.rank] || (own > 0 && own_row != own_row_gather) {
        return Err(CommError::invalid(
            "tokens",
            format!(
                "this rank owns {own} rows from row {own_row} of the reduce group, but {} rows from row \
                 {own_row_gather} of the gather group; they must be the same rows",
                gather_tokens[gather.rank]
            ),
        ));
    }
    let rows = (args.reduce_first_row + reduce_rows).max(args.gather_first_row + gather_rows);
    let states = span("hidden_states", args.hidden_states, elements("tokens", rows, hidden)?, dtype)?;
    let residual = span("residual", args.residual, elements("tokens", own, hidden)?, dtype)?;
    let weight = span("weight", args.weight, hidden, dtype)?;
    let bias = args.bias.map(|bias| span("bias", bias, hidden, dtype)).transpose()?;
    let read_only = [Some(&weight), bias.as_ref()];
    if overlap(&states, &residual)
        || read_only.into_iter().flatten().any(|v| overlap(v, &states) || overlap(v, &residual))
    {
        return Err(CommError::invalid("args", "no two operands of a two-group norm may overlap"));
    }
    Ok(own_row)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::MemoryKind;

    fn info(rank: usize, size: usize) -> CommInfo {
        CommInfo { name: "world".into(), backend: "test".into(), rank, size, memory: MemoryKind::Host }
    }

    #[test]
    fn overlaps_are_refused_unless_in_place() {
        let at = DeviceAddr;
        assert!(same_size(at(256), at(256), 8, DType::F32).is_ok());
        assert!(same_size(at(256), at(288), 8, DType::F32).is_ok());
        assert!(same_size(at(256), at(260), 8, DType::F32).is_err());
        assert!(all_gather(&info(1, 2), at(288), at(256), 8, DType::F32).is_ok());
        assert!(all_gather(&info(0, 2), at(288), at(256), 8, DType::F32).is_err());
        assert!(reduce_scatter(&info(1, 2), at(256), at(288), 8, DType::F32).is_ok());
        assert!(reduce_scatter(&info(0, 2), at(256), at(288), 8, DType::F32).is_err());
        assert!(all_to_all(&info(0, 2), at(256), at(256), 8, DType::F32).is_err());
    }

    #[test]
    fn null_misaligned_and_oversized_are_refused_but_empty_is_not() {
        let at = DeviceAddr;
        assert!(same_size(DeviceAddr::NULL, DeviceAddr::NULL, 0, DType::F32).is_ok());
        assert!(same_size(DeviceAddr::NULL, at(256), 1, DType::F32).is_err());
        assert!(same_size(at(257), at(512), 1, DType::BF16).is_err());
        assert!(same_size(at(256), at(512), usize::MAX / 2, DType::F64).is_err());
        assert!(same_size(at(u64::MAX - 7), at(256), 8, DType::U8).is_err());
        assert!(all_gather_v(&info(0, 3), at(256), at(512), &[1, 2], DType::U8).is_err());
        assert!(broadcast(&info(0, 3), at(256), at(512), 1, DType::U8, 3).is_err());
    }

    #[test]
    fn a_group_may_read_twice_but_not_write_what_is_used() {
        let send = |addr| P2pOp::Send { addr: DeviceAddr(addr), count: 16, dtype: DType::U8, peer: 0 };
        let recv = |addr| P2pOp::Recv { addr: DeviceAddr(addr), count: 16, dtype: DType::U8, peer: 0 };
        assert!(group(&info(0, 2), &[send(256), send(256), recv(512)]).is_ok());
        assert!(group(&info(0, 2), &[send(256), recv(264)]).is_err());
        assert!(group(&info(0, 2), &[recv(256), recv(264)]).is_err());
    }

    #[test]
    fn blocks_lie_side_by_side_or_one_after_another() {
        let block = |row_pitch, rank_stride| Block2d {
            height: 3,
            width: 4,
            row_pitch,
            rank_stride,
            send_pitch: 4,
            dtype: DType::F32,
            first: true,
            last: true,
        };
        let check = |b: &Block2d| all_gather_2d(&info(0, 2), DeviceAddr(4096), DeviceAddr(8192), b);
        assert!(check(&block(8, 4)).is_ok());
        assert!(check(&block(4, 12)).is_ok());
        assert!(check(&block(8, 3)).is_err());
        assert!(check(&block(4, 8)).is_err());
        assert!(check(&block(3, 12)).is_err());
    }
}
