//! Operations in which every receiver gets the same bytes of a sender: all-gather in its forms, and broadcast.

use super::call::Call;
use super::core::{NOTHING, Op, Operand};
use super::layout::{Layout, copy};
use super::remote;
use super::usage::Algorithm;
use crate::error::Result;

/// Bytes that are read from another process between two looks for trouble.
const READ: usize = 1 << 20;
/// From here on one read through the kernel is cheaper than two copies through a staging window.
const CROSS: usize = 16 << 10;

/// One gathering operation.
pub(super) struct Gather<'a> {
    pub(super) call: Call,
    /// This rank's contribution, as published and as laid out.
    pub(super) send: Operand,
    pub(super) from: Layout,
    /// Bytes from one row of `send` to the next, which may differ between ranks; the width of a row is shared.
    pub(super) pitch: usize,
    pub(super) width: usize,
    /// Bytes that each rank contributes.
    pub(super) lens: &'a [usize],
    /// Where a rank's contribution goes.
    pub(super) to: &'a dyn Fn(usize) -> Layout,
}

impl Gather<'_> {
    /// # Safety
    /// The operands are valid as the operation's contract says.
    pub(super) unsafe fn run(&self, op: &mut Op<'_>) -> Result<()> {
        let longest = self.lens.iter().copied().max().unwrap_or_default();
        let mut entered = false;
        // Every piece is a system call of its own, which rows of a few bytes would not repay.
        let cross =
            op.core.cross && longest > op.core.small.min(CROSS) && (self.width == 0 || self.width >= 4096);
        if cross || (longest > op.core.tiny && op.may_be_direct()) {
            let needed = |rank: usize| (self.lens[rank] > 0, false);
            if let Some(peers) =
                op.enter_with(&self.call, self.send, NOTHING, self.pitch as u64, cross, needed)?
            {
                let far = peers.far.iter().any(|far| *far);
                let mut refused = false;
                let pitched =
                    |rank: usize| Layout::rows(peers.send[rank], self.width, peers.extra[rank] as usize);
                op.touch(|| {
                    for rank in rotation(op) {
                        let (to, from) = ((self.to)(rank), pitched(rank));
                        if peers.far[rank] && rank != op.rank() {
                            // SAFETY: `recv` is valid; the rest is the kernel's to check.
                            refused |= unsafe { !self.read(op, rank, to, from)? };
                            continue;
                        }
                        // SAFETY: all ranks have entered, so their operands are valid until they leave the barrier below;
                        // the contract keeps what is read and what is written apart.
                        op.pieces(self.lens[rank], |a, b| unsafe { copy(to, from, a, b) })?;
                    }
                    Ok(())
                })?;
                if !far {
                    op.count(Algorithm::Direct);
                    return op.barrier();
                }
                // What the kernel does not read for one rank goes through the windows for all.
                if op.unanimous(&self.call, !refused)? {
                    op.count(Algorithm::CrossRead);
                    return Ok(());
                }
            }
            entered = true;
        }
        let window = op.core.control().window();
        let windows = longest.div_ceil(window).max(1);
        op.count(if windows == 1 { Algorithm::OneShot } else { Algorithm::ShmPipeline });
        let me = op.rank();
        for index in 0..windows {
            let range = |rank: usize| {
                ((index * window).min(self.lens[rank]), ((index + 1) * window).min(self.lens[rank]))
            };
            let (a, b) = range(me);
            if op.size() > 1 {
                // SAFETY: the own operand is valid, and nobody reads this window of the step to come yet.
                unsafe { copy(Layout::window(op.stage(), a), self.from, a, b) };
            }
            if index == 0 && !entered {
                op.enter(&self.call)?;
            } else {
                op.barrier()?;
            }
            for rank in rotation(op) {
                let (a, b) = range(rank);
                let from = if rank == me { self.from } else { Layout::window(op.staged(rank), a) };
                // SAFETY: the peer wrote its window before it arrived and will not reuse it before this rank arrives at
                // the step after; `recv` is valid.
                unsafe { copy((self.to)(rank), from, a, b) };
            }
        }
        Ok(())
    }

    /// Whether the kernel let this rank read all that `rank` contributes.
    ///
    /// # Safety
    /// `to` is valid for writes of everything that `rank` contributes.
    unsafe fn read(&self, op: &Op<'_>, rank: usize, to: Layout, from: Layout) -> Result<bool> {
        let len = self.lens[rank];
        for start in (0..len).step_by(READ) {
            let range = (start, (start + READ).min(len));
            // SAFETY: as the caller vouches.
            let read = unsafe { remote::copy(op.core.control(), &op.waiting, rank, (to, from), range) };
            // A peer that gave up may have freed its operand already: why it did says more than the failed read.
            op.core.waiter.failure(&op.waiting)?;
            if !read? {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// All ranks, this one first, so that ranks read different peers at a time.
pub(super) fn rotation(op: &Op<'_>) -> impl Iterator<Item = usize> + use<> {
    let (rank, size) = (op.rank(), op.size());
    (0..size).map(move |step| (rank + step) % size)
}
