//! Sends and receives: messages cross in the sender's staging slot for the receiver, a handshake a chunk.
//!
//! A group takes turns: in each, every transfer sends its next chunk, then every transfer receives its next. A sender
//! waits only for what it sent in the turn before, and its peer receives that without waiting for anything later, so
//! no order of the transfers can lock the ranks.
//!
//! In a mesh with gaps, a message between ranks that are no neighbours crosses in the memory of a rank that is one of
//! both's. That rank takes no part.

use comm_core::{CommError, DType, DeviceAddr, OpKind, P2pOp, Result, StreamHandle, check};
use comm_kernels::p2p::PairStep;

use super::staged::{copy, copy_unless_broken};
use crate::call::Call;
use crate::comm::P2pComm;
use crate::state::Channels;
use crate::usage::Algorithm;

/// A transfer of bytes with one peer.
#[derive(Clone, Copy)]
struct Transfer {
    addr: DeviceAddr,
    bytes: usize,
}

/// The chunks of one peer's transfers in one direction, in order.
fn chunks(transfers: &[Transfer], most: usize) -> impl Iterator<Item = Transfer> {
    transfers.iter().flat_map(move |transfer| {
        (0..transfer.bytes).step_by(most).map(move |begin| Transfer {
            addr: transfer.addr.offset(begin as u64),
            bytes: most.min(transfer.bytes - begin),
        })
    })
}

#[allow(clippy::missing_safety_doc, reason = "`DeviceComm`'s contract holds for every method")]
impl P2pComm {
    pub(crate) unsafe fn do_transfer(
        &self,
        kind: OpKind,
        addr: DeviceAddr,
        count: usize,
        dtype: DType,
        peer: usize,
        stream: StreamHandle,
    ) -> Result<()> {
        let info = &self.shared().info;
        let bytes = check::p2p(info, addr, count, dtype, peer)?;
        if peer == info.rank && bytes > 0 {
            return Err(CommError::unsupported(
                kind,
                crate::NAME,
                "a transfer from a rank to itself needs both ends in one group",
            ));
        }
        let call = self.begin(kind, stream)?;
        if let Some(channels) = self.channels(bytes) {
            for chunk in chunks(&[Transfer { addr, bytes }], channels.pair_bytes) {
                match kind {
                    OpKind::Send => self.push(&call, channels, peer, chunk, stream)?,
                    _ => self.pull(&call, channels, peer, chunk, stream)?,
                }
            }
        }
        call.finish(Algorithm::Staged, stream);
        Ok(())
    }

    pub(crate) unsafe fn do_group(&self, ops: &[P2pOp], stream: StreamHandle) -> Result<()> {
        const KIND: OpKind = OpKind::Group;
        let info = &self.shared().info;
        check::group(info, ops)?;
        let mut sends = vec![Vec::new(); info.size];
        let mut receives = vec![Vec::new(); info.size];
        for op in ops {
            let (P2pOp::Send { addr, count, dtype, peer } | P2pOp::Recv { addr, count, dtype, peer }) = *op;
            let transfer = Transfer { addr, bytes: check::bytes(count, dtype)? };
            let side = if matches!(op, P2pOp::Send { .. }) { &mut sends } else { &mut receives };
            side[peer].push(transfer);
        }
        let own = (std::mem::take(&mut sends[info.rank]), std::mem::take(&mut receives[info.rank]));
        let unmatched = |(send, receive): (&Transfer, &Transfer)| send.bytes != receive.bytes;
        if own.0.len() != own.1.len() || own.0.iter().zip(&own.1).any(unmatched) {
            return Err(CommError::invalid(
                "ops",
                "this rank's transfers with itself do not match: as many sends as receives, of equal sizes, in order",
            ));
        }
        let call = self.begin(KIND, stream)?;
        for (send, receive) in own.0.iter().zip(&own.1) {
            copy(&call, send.addr, receive.addr, send.bytes, stream)?;
        }
        if let Some(channels) = &self.shared().channels {
            let queue = |side: &[Vec<Transfer>]| -> Vec<Vec<Transfer>> {
                side.iter().map(|list| chunks(list, channels.pair_bytes).collect()).collect()
            };
            let (sends, receives) = (queue(&sends), queue(&receives));
            let turns = sends.iter().chain(&receives).map(Vec::len).max().unwrap_or(0);
            for turn in 0..turns {
                for (peer, queue) in sends.iter().enumerate() {
                    if let Some(&chunk) = queue.get(turn) {
                        self.push(&call, channels, peer, chunk, stream)?;
                    }
                }
                for (peer, queue) in receives.iter().enumerate() {
                    if let Some(&chunk) = queue.get(turn) {
                        self.pull(&call, channels, peer, chunk, stream)?;
                    }
                }
            }
        }
        call.finish(Algorithm::Staged, stream);
        Ok(())
    }

    fn step(
        &self,
        call: &Call<'_>,
        channels: &Channels,
        (peer, step): (usize, PairStep),
        mailbox: Option<(usize, usize)>,
        stream: StreamHandle,
    ) -> Result<()> {
        let (link, kernels) = (call.link(&channels.pairs), &channels.kernels);
        let counters = channels.pair_counters;
        // SAFETY: the channel is live while the communicator is open; the peer takes the matching steps, or the wait
        // ends.
        call.fatal(unsafe {
            match mailbox {
                None => kernels.pair(&link, counters, peer, step, stream),
                Some(mailbox) => kernels.pair_mesh(&link, counters, (peer, step), mailbox, stream),
            }
        })
    }

    /// Where a message crosses: the slot, and its mailbox if the two are no neighbours.
    fn crossing(&self, channels: &Channels, from: usize, to: usize) -> (DeviceAddr, Option<(usize, usize)>) {
        let mailbox = channels.mesh.as_ref().and_then(|mesh| mesh.mailbox(from, to));
        // Mailboxes lie behind the slots.
        let (holder, place) =
            mailbox.map_or((from, to), |(holder, place)| (holder, self.shared().info.size + place));
        (channels.pair_slots[holder].offset((place * channels.pair_bytes) as u64), mailbox)
    }

    fn push(
        &self,
        call: &Call<'_>,
        channels: &Channels,
        peer: usize,
        chunk: Transfer,
        stream: StreamHandle,
    ) -> Result<()> {
        let (slot, mailbox) = self.crossing(channels, self.shared().info.rank, peer);
        self.step(call, channels, (peer, PairStep::AwaitFree), mailbox, stream)?;
        // Not after a wait that was given up: the peer may be reading the last message, which it has been told of.
        copy_unless_broken(call, channels, chunk.addr, slot, chunk.bytes, stream)?;
        self.step(call, channels, (peer, PairStep::Announce), mailbox, stream)
    }

    fn pull(
        &self,
        call: &Call<'_>,
        channels: &Channels,
        peer: usize,
        chunk: Transfer,
        stream: StreamHandle,
    ) -> Result<()> {
        let (slot, mailbox) = self.crossing(channels, peer, self.shared().info.rank);
        self.step(call, channels, (peer, PairStep::AwaitFull), mailbox, stream)?;
        copy_unless_broken(call, channels, slot, chunk.addr, chunk.bytes, stream)?;
        self.step(call, channels, (peer, PairStep::Release), mailbox, stream)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_cover_each_transfer_by_itself() {
        let transfer = |addr: u64, bytes| Transfer { addr: DeviceAddr(addr), bytes };
        let cut: Vec<_> = chunks(&[transfer(0, 10), transfer(100, 0), transfer(200, 4)], 4)
            .map(|chunk| (chunk.addr.0, chunk.bytes))
            .collect();
        assert_eq!(cut, [(0, 4), (4, 4), (8, 2), (200, 4)]);
    }
}
