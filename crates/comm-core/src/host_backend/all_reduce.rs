//! All-reduce, and reduce to a root.

use super::call::Call;
use super::core::{Op, Operand};
use super::layout::{Layout, copy};
use super::reduce::reduce;
use super::usage::Algorithm;
use crate::dtype::{DType, ReduceOp};
use crate::error::Result;

/// A reduction whose result goes to all ranks, or to a root.
pub(super) struct Reduction {
    pub(super) call: Call,
    pub(super) send: Operand,
    pub(super) recv: Operand,
    pub(super) bytes: usize,
    pub(super) dtype: DType,
    pub(super) how: ReduceOp,
    pub(super) root: Option<usize>,
}

impl Reduction {
    fn receives(&self, rank: usize) -> bool {
        self.root.is_none_or(|root| root == rank)
    }

    /// # Safety
    /// The operands are valid as the operation's contract says.
    pub(super) unsafe fn run(&self, op: &mut Op<'_>) -> Result<()> {
        let mut entered = false;
        if self.bytes > op.core.tiny && op.may_be_direct() {
            let needed = |rank: usize| (true, self.receives(rank));
            if let Some(peers) = op.enter_with(&self.call, self.send, self.recv, 0, false, needed)? {
                op.count(Algorithm::TwoShot);
                let mut targets: Vec<usize> =
                    (0..op.size()).filter(|&rank| self.receives(rank)).map(|rank| peers.recv[rank]).collect();
                // The own operand first: it is reduced into, and copied from while it is in the cache.
                let own = targets.iter().position(|&target| target == self.recv.0.0 as usize);
                targets.swap(0, own.unwrap_or(0));
                // SAFETY: all ranks have entered, so their operands are valid until they leave the barrier below; no
                // other rank uses this rank's slice of any of them.
                op.touch(|| unsafe { self.slice(op, &peers.send, &targets) })?;
                return op.barrier();
            }
            entered = true;
        }
        if self.root.is_some() || self.bytes <= op.core.small {
            // SAFETY: as the caller vouches.
            unsafe { self.whole(op, entered) }
        } else {
            // SAFETY: as the caller vouches.
            unsafe { self.pipeline(op, entered) }
        }
    }

    /// # Safety
    /// The sources are valid for reads and the destination for writes of `len` bytes.
    unsafe fn combine(&self, dst: usize, srcs: &[*const u8], len: usize) {
        // SAFETY: as the caller vouches; a destination that is a source is so exactly.
        unsafe { reduce(dst as *mut u8, srcs, len / self.dtype.size(), self.dtype, self.how) };
    }

    /// Reduces this rank's slice of all `sends` into all `targets`.
    ///
    /// # Safety
    /// All are valid, and nobody else uses this rank's slice of them.
    unsafe fn slice(&self, op: &Op<'_>, sends: &[usize], targets: &[usize]) -> Result<()> {
        let share = self.bytes.div_ceil(op.size()).next_multiple_of(64);
        let start = (op.rank() * share).min(self.bytes);
        let end = (start + share).min(self.bytes);
        op.pieces(end - start, |a, b| {
            let srcs: Vec<*const u8> = sends.iter().map(|base| (base + start + a) as *const u8).collect();
            let (&first, others) = match targets.split_first() {
                Some(split) => split,
                None => return,
            };
            // SAFETY: the piece is inside this rank's slice; a target that is a source is so exactly, and all sources
            // are read before any target but the first is written.
            unsafe {
                self.combine(first + start + a, &srcs, b - a);
                for target in others {
                    copy(Layout::dense(*target), Layout::dense(first), start + a, start + b);
                }
            }
        })
    }

    /// Every receiver reduces everything, window by window.
    ///
    /// # Safety
    /// As [`run`](Self::run).
    unsafe fn whole(&self, op: &mut Op<'_>, entered: bool) -> Result<()> {
        let window = op.core.control().window();
        let windows = self.bytes.div_ceil(window).max(1);
        op.count(if windows == 1 { Algorithm::OneShot } else { Algorithm::ShmPipeline });
        for index in 0..windows {
            let (a, b) = (index * window, ((index + 1) * window).min(self.bytes));
            // SAFETY: the own operand is valid, and nobody reads this window of the step to come yet.
            unsafe { copy(Layout::window(op.stage(), a), Layout::dense(self.send.0.0 as usize), a, b) };
            if index == 0 && !entered {
                op.enter(&self.call)?;
            } else {
                op.barrier()?;
            }
            if self.receives(op.rank()) {
                let srcs: Vec<*const u8> = (0..op.size()).map(|rank| op.staged(rank) as *const u8).collect();
                // SAFETY: peers wrote their windows before they arrived and will not reuse them before this rank arrives
                // at the step after.
                unsafe { self.combine(self.recv.0.0 as usize + a, &srcs, b - a) };
            }
        }
        Ok(())
    }

    /// Each rank reduces its row of every window; three windows are under way at a time, so that each costs one step.
    ///
    /// # Safety
    /// As [`run`](Self::run).
    unsafe fn pipeline(&self, op: &mut Op<'_>, entered: bool) -> Result<()> {
        op.count(Algorithm::ShmPipeline);
        let (me, size) = (op.rank(), op.size());
        let (send, recv) = (self.send.0.0 as usize, self.recv.0.0 as usize);
        let window = op.core.control().window();
        let windows = self.bytes.div_ceil(window);
        // The range of a rank's row in a window, as byte numbers of the operands.
        let row = |index: usize, rank: usize| {
            let start = index * window;
            let len = window.min(self.bytes - start);
            let share = len.div_ceil(size).next_multiple_of(64);
            (start + (rank * share).min(len), start + ((rank + 1) * share).min(len))
        };
        let fill = |op: &Op<'_>, index: usize| {
            for rank in (0..size).filter(|&rank| rank != me) {
                let (a, b) = row(index, rank);
                // SAFETY: the own operand is valid, and nobody reads this window of the step to come yet.
                unsafe { copy(Layout::window(op.stage(), index * window), Layout::dense(send), a, b) };
            }
        };
        let fetch = |op: &Op<'_>, index: usize| {
            for rank in (1..size).map(|step| (me + step) % size) {
                let (a, b) = row(index, rank);
                let reduced = op.core.control().reduced(rank, op.state.step) as usize;
                // SAFETY: the peer wrote its row before it arrived and will not reuse the area before this rank arrives
                // at the step after.
                unsafe { copy(Layout::dense(recv), Layout::window(reduced, a), a, b) };
            }
        };
        fill(op, 0);
        if entered {
            op.barrier()?
        } else {
            op.enter(&self.call)?
        }
        for index in 0..windows {
            // In place, this window's rows of the peers were staged before the last step, and the next one's are staged
            // before anything of them is overwritten.
            if index + 1 < windows {
                fill(op, index + 1);
            }
            let (a, b) = row(index, me);
            let srcs: Vec<*const u8> = (0..size)
                .map(|rank| match rank == me {
                    true => (send + a) as *const u8,
                    false => (op.staged(rank) + a - index * window) as *const u8,
                })
                .collect();
            let reduced = op.core.control().reduced(me, op.state.step + 1) as usize;
            // SAFETY: as in `fill` and `fetch`.
            unsafe {
                self.combine(recv + a, &srcs, b - a);
                copy(Layout::window(reduced, a), Layout::dense(recv), a, b);
            }
            if index > 0 {
                fetch(op, index - 1);
            }
            op.barrier()?;
        }
        fetch(op, windows - 1);
        Ok(())
    }
}
