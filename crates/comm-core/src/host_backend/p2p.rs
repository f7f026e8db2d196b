//! Send and receive: transfers between a pair of ranks, matched in order.
//!
//! A message travels as packets through the pair's channel, at most two of which are in flight; a large one whose
//! operand the receiver can reach travels as a single packet that says where it lies. All transfers of a group advance
//! in turn, so no order among them can deadlock.

use std::sync::atomic::Ordering;

use super::call::Place;
use super::core::{Op, Operand};
use super::layout::{Layout, copy};
use super::usage::Algorithm;
use crate::device_comm::P2pOp;
use crate::dtype::DType;
use crate::error::{CommError, Result};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    Moving,
    /// Sent; waiting until the receiver has taken everything up to this packet.
    Acknowledged(u64),
    Done,
}

struct Transfer {
    sends: bool,
    addr: usize,
    bytes: usize,
    /// Type and count, as the peer must have them too.
    elements: u64,
    peer: usize,
    /// Where the receiver can reach the operand.
    place: Option<Place>,
    moved: usize,
    /// Number of the message's first packet, once it has begun.
    first: Option<u64>,
    /// What the sender has, if it is not what this rank expects.
    refused: Option<u64>,
    phase: Phase,
}

fn elements(dtype: DType, count: usize) -> u64 {
    let index = DType::ALL.iter().position(|&d| d == dtype).unwrap_or_default() as u64;
    index << 56 | count as u64
}

fn describe(elements: u64) -> String {
    let dtype = DType::ALL.get((elements >> 56) as usize).map_or("unknown", |dtype| dtype.name());
    format!("{} {dtype}", elements & (u64::MAX >> 8))
}

/// Carries out checked transfers.
///
/// # Safety
/// The operands are valid as the operation's contract says.
pub(super) unsafe fn run(op: &mut Op<'_>, ops: &[P2pOp]) -> Result<()> {
    let mut transfers: Vec<Transfer> = ops.iter().map(|p2p| transfer(op, p2p)).collect();
    let direct = transfers.iter().any(|transfer| transfer.place.is_some_and(|place| place.space != 0));
    op.count(if direct { Algorithm::Direct } else { Algorithm::ShmPipeline });
    let mut refusal = None;
    loop {
        let mut moved = false;
        for index in 0..transfers.len() {
            let (before, rest) = transfers.split_at_mut(index);
            let Some(transfer) = rest.first_mut() else { break };
            if turn(before, transfer) && can_move(op, transfer) {
                // SAFETY: as the caller vouches.
                unsafe { advance(op, transfer, &mut refusal)? };
                moved = true;
            }
        }
        if transfers.iter().all(|transfer| transfer.phase == Phase::Done) {
            break;
        }
        if !moved {
            wait(op, &transfers)?;
        }
    }
    refusal.map_or(Ok(()), Err)
}

fn transfer(op: &Op<'_>, p2p: &P2pOp) -> Transfer {
    let (sends, P2pOp::Send { addr, count, dtype, peer } | P2pOp::Recv { addr, count, dtype, peer }) =
        (matches!(p2p, P2pOp::Send { .. }), *p2p);
    let bytes = count * dtype.size();
    let operand: Operand = (addr, bytes);
    let place = (sends && bytes > op.core.control().packet_bytes()).then(|| op.place(operand));
    Transfer {
        sends,
        addr: addr.0 as usize,
        bytes,
        elements: elements(dtype, count),
        peer,
        place: place.filter(|place| place.space != 0),
        moved: 0,
        first: None,
        refused: None,
        phase: Phase::Moving,
    }
}

/// Whether no earlier transfer on the same path is still moving.
fn turn(before: &[Transfer], transfer: &Transfer) -> bool {
    let same_path = |other: &&Transfer| other.sends == transfer.sends && other.peer == transfer.peer;
    transfer.phase != Phase::Moving
        || !before.iter().filter(same_path).any(|other| other.phase == Phase::Moving)
}

fn can_move(op: &Op<'_>, transfer: &Transfer) -> bool {
    let (me, peer) = (op.rank(), transfer.peer);
    let control = op.core.control();
    let outgoing = || control.channel(me, peer).consumed.load(Ordering::Acquire);
    match transfer.phase {
        Phase::Done => false,
        Phase::Acknowledged(last) => outgoing() > last,
        Phase::Moving if transfer.sends => op.state.sent[peer] < outgoing() + 2,
        Phase::Moving => control.channel(peer, me).posted.load(Ordering::Acquire) > op.state.received[peer],
    }
}

fn wait(op: &Op<'_>, transfers: &[Transfer]) -> Result<()> {
    let pending = |index: usize| {
        transfers.get(index).is_some_and(|transfer| {
            transfers.get(..index).is_some_and(|before| turn(before, transfer))
                && transfer.phase != Phase::Done
        })
    };
    let ready = || (0..transfers.len()).any(|index| pending(index) && can_move(op, &transfers[index]));
    let awaited = || {
        let mut ranks: Vec<usize> =
            (0..transfers.len()).filter(|&index| pending(index)).map(|index| transfers[index].peer).collect();
        ranks.sort_unstable();
        ranks.dedup();
        ranks
    };
    op.core.waiter.until(&op.waiting, ready, awaited)
}

/// # Safety
/// The transfer's operand is valid, and [`can_move`] has just said yes.
unsafe fn advance(op: &mut Op<'_>, transfer: &mut Transfer, refusal: &mut Option<CommError>) -> Result<()> {
    if let Phase::Acknowledged(_) = transfer.phase {
        let channel = op.core.control().channel(op.rank(), transfer.peer);
        if transfer.first.is_some_and(|first| channel.refused.load(Ordering::Acquire) == first + 1) {
            let found = channel.refused_for.load(Ordering::Relaxed);
            refusal.get_or_insert(mismatch(op, transfer, found));
        }
        transfer.phase = Phase::Done;
        return Ok(());
    }
    if transfer.sends {
        // SAFETY: as the caller vouches.
        unsafe { send_packet(op, transfer) };
        return Ok(());
    }
    // SAFETY: as the caller vouches.
    unsafe { receive_packet(op, transfer)? };
    if transfer.phase == Phase::Done
        && let Some(found) = transfer.refused
    {
        refusal.get_or_insert(mismatch(op, transfer, found));
    }
    Ok(())
}

fn mismatch(op: &Op<'_>, transfer: &Transfer, found: u64) -> CommError {
    let (mine, theirs) = if transfer.sends { ("send", "recv") } else { ("recv", "send") };
    CommError::Mismatch {
        at: op.waiting.site(),
        rank: transfer.peer,
        expected: format!("{mine} of {}", describe(transfer.elements)),
        found: format!("{theirs} of {}", describe(found)),
    }
}

/// # Safety
/// As [`advance`].
unsafe fn send_packet(op: &mut Op<'_>, transfer: &mut Transfer) {
    let (me, peer) = (op.rank(), transfer.peer);
    let control = op.core.control();
    let channel = control.channel(me, peer);
    let number = op.state.sent[peer];
    let first = *transfer.first.get_or_insert(number);
    let packet = &channel.packets[(number % 2) as usize];
    packet.total.store(transfer.bytes as u64, Ordering::Relaxed);
    packet.elements.store(transfer.elements, Ordering::Relaxed);
    let place = transfer.place.unwrap_or_default();
    packet.place[0].store(place.space, Ordering::Relaxed);
    packet.place[1].store(place.offset, Ordering::Relaxed);
    if place.space == 0 {
        let end = (transfer.moved + control.packet_bytes()).min(transfer.bytes);
        let payload = control.payload(me, peer, number) as usize;
        // SAFETY: the operand is valid; the receiver has consumed the packet that used this payload before.
        unsafe {
            copy(Layout::window(payload, transfer.moved), Layout::dense(transfer.addr), transfer.moved, end);
        }
        transfer.moved = end;
    } else {
        transfer.moved = transfer.bytes;
    }
    op.state.sent[peer] = number + 1;
    channel.posted.store(number + 1, Ordering::Release);
    control.notify();
    if transfer.moved == transfer.bytes {
        debug_assert!(number >= first);
        // A buffered message needs no answer; in checked mode the sender wants to know all the same.
        let answered = place.space != 0 || op.core.checked;
        transfer.phase = if answered { Phase::Acknowledged(number) } else { Phase::Done };
    }
}

/// # Safety
/// As [`advance`].
unsafe fn receive_packet(op: &mut Op<'_>, transfer: &mut Transfer) -> Result<()> {
    let (me, peer) = (op.rank(), transfer.peer);
    let control = op.core.control();
    let channel = control.channel(peer, me);
    let number = op.state.received[peer];
    let packet = &channel.packets[(number % 2) as usize];
    let found = packet.elements.load(Ordering::Relaxed);
    let total = packet.total.load(Ordering::Relaxed) as usize;
    let first = *transfer.first.get_or_insert(number);
    if found != transfer.elements {
        transfer.refused = Some(found);
        channel.refused_for.store(transfer.elements, Ordering::Relaxed);
        channel.refused.store(first + 1, Ordering::Release);
    }
    let place = Place {
        space: packet.place[0].load(Ordering::Relaxed),
        offset: packet.place[1].load(Ordering::Relaxed),
    };
    if place.space == 0 {
        let end = (transfer.moved + control.packet_bytes()).min(total);
        if transfer.refused.is_none() {
            let payload = control.payload(peer, me, number) as usize;
            // SAFETY: the message has exactly the operand's size; the sender reuses the payload only after `consumed`.
            unsafe {
                copy(
                    Layout::dense(transfer.addr),
                    Layout::window(payload, transfer.moved),
                    transfer.moved,
                    end,
                );
            }
        }
        transfer.moved = end;
    } else {
        if transfer.refused.is_none() {
            let source = op.resolve(peer, place).ok_or_else(|| {
                CommError::invalid("peer", format!("rank {peer} sends from memory that is not shared"))
            })?;
            let (dst, src) = (Layout::dense(transfer.addr), Layout::dense(source));
            op.touch(|| {
                // SAFETY: the sender waits for `consumed`, or for this rank to stop touching its operand.
                op.pieces(total, |a, b| unsafe { copy(dst, src, a, b) })
            })?;
        }
        transfer.moved = total;
    }
    op.state.received[peer] = number + 1;
    channel.consumed.store(number + 1, Ordering::Release);
    control.notify();
    if transfer.moved >= total {
        transfer.phase = Phase::Done;
    }
    Ok(())
}
