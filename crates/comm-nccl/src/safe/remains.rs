//! What is left of communicators that have ended, and when it is given back.
//!
//! Giving memory back can wait inside the driver for work that is running, also on other devices of the process, which
//! map it. And of the ranks in one process NCCL lets the last one that destroys its end give back everybody's memory. So
//! where the ranks of a communicator share a process, a rank can hang in `ncclCommDestroy` while another, whose own end
//! has returned at once, already runs the next collective of another communicator and waits for the first.
//!
//! There, a communicator that ends keeps its memory, flushed and idle, and what all of them keep is given back when no
//! communicator of the process is in use any more: with the close of a parent that outlives its groups, for example.
//! No rank returns from a close before, which a barrier after it sees to; so worlds made one after another do not pile up.
//! A process with one rank is alone with its device, and gives everything back at once.

use std::sync::{Arc, Mutex};

use comm_core::Result;
use cudarc::driver::CudaContext;

use super::memory::Buffers;
use super::state::{Native, Scratch, Shared, lock};
use super::track::Tracker;
use crate::driver::{self, Current};
use crate::result::NcclLibrary;
use crate::sys;

/// The communicators of this process whose ranks share processes. The driver's waits are the process's, whoever made the
/// communicators, so this is too.
static YARD: Mutex<Yard<Remains>> = Mutex::new(Yard::new());

struct Yard<T> {
    in_use: usize,
    kept: Vec<T>,
}

impl<T> Yard<T> {
    const fn new() -> Self {
        Self { in_use: 0, kept: Vec::new() }
    }

    /// One is in use no more, and this is left of it. Returns what is to be given back now, oldest first.
    fn end(&mut self, left: Option<T>) -> Vec<T> {
        self.in_use = self.in_use.saturating_sub(1);
        self.kept.extend(left);
        if self.in_use == 0 { std::mem::take(&mut self.kept) } else { Vec::new() }
    }
}

/// All that a communicator holds of its device. Its work is done, and nothing is enqueued on it any more.
pub(crate) struct Remains {
    library: Arc<NcclLibrary>,
    context: Arc<CudaContext>,
    comm: *mut sys::Comm,
    buffers: Buffers,
    tracker: Option<Tracker>,
    scratch: Scratch,
}

// SAFETY: a communicator may be destroyed by any thread as long as no other is inside NCCL with it, and what is left has
// one owner.
unsafe impl Send for Remains {}

/// Counts a communicator as in use, until [`keep`] or [`release`].
pub(crate) fn enter(shared: &Shared) {
    if shared.base.limits.shares_process() {
        lock(&YARD).in_use += 1;
    }
}

/// Counts a communicator of which nothing is left as in use no more.
pub(crate) fn release(shared: &Shared) {
    if shared.base.limits.shares_process() {
        // As in `keep`. An error is of another communicator, which has ended.
        let due = lock(&YARD).end(None);
        let _ = give_back_all(due);
    }
}

/// Gives back what is left of a communicator that ended, now or once that cannot hold up the others.
pub(crate) fn keep(shared: &Shared, left: Remains) -> Result<()> {
    if !shared.base.limits.shares_process() {
        return left.give_back();
    }
    // In a statement of its own: the lock is not held while memory is given back.
    let due = lock(&YARD).end(Some(left));
    give_back_all(due)
}

fn give_back_all(due: Vec<Remains>) -> Result<()> {
    // All of them, whatever becomes of one; the first error is the one to report.
    due.into_iter().map(Remains::give_back).fold(Ok(()), Result::and)
}

impl Remains {
    /// Takes it out of a communicator that has been flushed, or aborted and its native one with it.
    pub(crate) fn take(shared: &Shared, native: &mut Native) -> Self {
        Self {
            library: shared.base.library.clone(),
            context: shared.base.context.clone(),
            comm: std::mem::replace(&mut native.comm, std::ptr::null_mut()),
            buffers: std::mem::take(&mut native.buffers),
            tracker: native.tracker.take(),
            scratch: shared.scratch,
        }
    }

    fn give_back(mut self) -> Result<()> {
        let _current = Current::enter(&self.context)?;
        self.buffers.give_back(&self.library, self.comm);
        if !self.comm.is_null() {
            // SAFETY: the communicator has been flushed, and was taken out under the lock, so this thread alone has it.
            let _ = unsafe { self.library.comm_destroy(self.comm) }?;
        }
        give_back_device(self.tracker.take(), self.scratch);
        Ok(())
    }
}

/// Gives back what a communicator owns besides the native one. The context is current.
pub(crate) fn give_back_device(tracker: Option<Tracker>, scratch: Scratch) {
    if let Some(tracker) = tracker {
        tracker.destroy();
    }
    // SAFETY: the communicator is gone, so no operation will use them, and freeing waits for what is still running.
    unsafe {
        driver::free(scratch.barrier);
        if !scratch.staging.is_null() {
            driver::free(scratch.staging);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_given_back_while_a_communicator_is_in_use() {
        let mut yard = Yard::new();
        // A parent and two groups.
        yard.in_use += 3;
        assert!(yard.end(Some("odd")).is_empty());
        assert!(yard.end(Some("even")).is_empty());
        assert_eq!(yard.end(Some("parent")), ["odd", "even", "parent"]);
        // One that failed leaves nothing, but what others left is due.
        yard.in_use += 2;
        assert!(yard.end(Some("group")).is_empty());
        assert_eq!(yard.end(None), ["group"]);
        assert_eq!((yard.in_use, yard.kept.len()), (0, 0));
    }
}
