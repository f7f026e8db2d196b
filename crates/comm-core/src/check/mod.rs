//! The argument checks that every backend makes before it does anything: counts that overflow, null and misaligned
//! addresses, partial overlaps, roots and peers out of range, shapes that make no sense.
//!
//! Backends call these first, so that the same mistake gives the same [`CommError::InvalidArgument`] everywhere and a
//! kernel or library never sees it. Each function returns the sizes it computed.

mod norm;
mod quantized;
#[cfg(test)]
mod tests;

use std::ops::Range;

use crate::addr::DeviceAddr;
use crate::device_comm::{CommInfo, P2pOp};
use crate::dtype::DType;
use crate::error::{CommError, Result};
use crate::fused::Block2d;

pub use norm::{rmsnorm, two_group_norm};
pub use quantized::{rmsnorm_quantized, two_group_norm_quantized};

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

/// Checks a quantised all-reduce. Returns the bytes of each operand.
///
/// # Errors
/// [`CommError::InvalidArgument`].
pub fn all_reduce_quantized(send: DeviceAddr, recv: DeviceAddr, count: usize, dtype: DType) -> Result<usize> {
    if !matches!(dtype, DType::F32 | DType::F16 | DType::BF16) {
        return Err(CommError::invalid(
            "dtype",
            format!("a quantised all-reduce takes f32, f16 and bf16, not {dtype}"),
        ));
    }
    same_size(send, recv, count, dtype)
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
