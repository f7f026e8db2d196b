//! Operations in which every receiver gets bytes of its own from each sender: all-to-all, and reduce-scatter in its
//! forms.

use super::call::Call;
use super::core::{NOTHING, Op, Operand};
use super::gather::rotation;
use super::layout::{Layout, copy};
use super::reduce::reduce;
use super::usage::Algorithm;
use crate::dtype::{DType, ReduceOp};
use crate::error::Result;

/// One scattering operation.
pub(super) struct Scatter<'a> {
    pub(super) call: Call,
    pub(super) send: Operand,
    pub(super) recv: usize,
    /// Where each receiver's part begins in every rank's `send`, in bytes.
    pub(super) offsets: &'a [usize],
    /// Bytes of each receiver's part.
    pub(super) lens: &'a [usize],
    /// How parts from different senders are combined; `None` lays them end to end.
    pub(super) combine: Option<(DType, ReduceOp)>,
}

impl Scatter<'_> {
    /// # Safety
    /// The operands are valid as the operation's contract says.
    pub(super) unsafe fn run(&self, op: &mut Op<'_>) -> Result<()> {
        let (me, len) = (op.rank(), self.lens[op.rank()]);
        let total: usize = self.lens.iter().sum();
        let mut entered = false;
        if total > op.core.tiny && op.may_be_direct() {
            let needed = |_| (true, false);
            if let Some(peers) = op.enter_with(&self.call, self.send, NOTHING, 0, false, needed)? {
                op.count(Algorithm::Direct);
                let parts: Vec<usize> = peers.send.iter().map(|base| base + self.offsets[me]).collect();
                // SAFETY: all ranks have entered, so their operands are valid until they leave the barrier below; nobody
                // else reads the part that an in-place operation writes.
                op.touch(|| unsafe { self.consume(op, &parts, 0, len) })?;
                return op.barrier();
            }
            entered = true;
        }
        let row = op.core.control().row();
        let windows = self.lens.iter().max().map_or(1, |longest| longest.div_ceil(row).max(1));
        op.count(if windows == 1 { Algorithm::OneShot } else { Algorithm::ShmPipeline });
        let own = self.send.0.0 as usize;
        for index in 0..windows {
            for receiver in rotation(op).skip(1) {
                let (a, b) = self.range(receiver, index, row);
                let stage = Layout::window(op.stage() + receiver * row, a);
                // SAFETY: the own operand is valid, and nobody reads this window of the step to come yet.
                unsafe { copy(stage, Layout::dense(own + self.offsets[receiver]), a, b) };
            }
            if index == 0 && !entered {
                op.enter(&self.call)?;
            } else {
                op.barrier()?;
            }
            let (a, b) = self.range(me, index, row);
            let part = |rank: usize| match rank == me {
                true => own + self.offsets[me],
                false => (op.staged(rank) + me * row).wrapping_sub(a),
            };
            let parts: Vec<usize> = (0..op.size()).map(part).collect();
            // SAFETY: peers wrote their windows before they arrived and will not reuse them before this rank arrives at
            // the step after.
            unsafe { self.consume(op, &parts, a, b)? };
        }
        Ok(())
    }

    fn range(&self, receiver: usize, index: usize, row: usize) -> (usize, usize) {
        ((index * row).min(self.lens[receiver]), ((index + 1) * row).min(self.lens[receiver]))
    }

    /// Brings bytes `from..to` of this rank's part from each of `parts` to `recv`.
    ///
    /// # Safety
    /// Those bytes are valid for reads in each part, and their places in `recv` for writes.
    unsafe fn consume(&self, op: &Op<'_>, parts: &[usize], from: usize, to: usize) -> Result<()> {
        let len = self.lens[op.rank()];
        match self.combine {
            Some((dtype, how)) => op.pieces(to - from, |a, b| {
                let srcs: Vec<*const u8> =
                    parts.iter().map(|part| part.wrapping_add(from + a) as *const u8).collect();
                let dst = (self.recv + from + a) as *mut u8;
                // SAFETY: as the caller vouches; an in-place `recv` is exactly this rank's own part.
                unsafe { reduce(dst, &srcs, (b - a) / dtype.size(), dtype, how) };
            }),
            None => rotation(op).try_for_each(|rank| {
                let src = Layout::dense(parts[rank]);
                let dst = Layout::dense(self.recv + rank * len);
                // SAFETY: as the caller vouches.
                op.pieces(to - from, |a, b| unsafe { copy(dst, src, from + a, from + b) })
            }),
        }
    }
}
