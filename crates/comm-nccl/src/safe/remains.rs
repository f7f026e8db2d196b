//! What is left of communicators that have ended, and when it is given back.
//!
//! Giving memory back can wait inside the driver for work that is running, also on other devices of the process, which
//! map it. And of the ranks in one process NCCL lets the last one that destroys its end give back everybody's memory. So
//! where the ranks of a communicator share a process, a rank can hang in `ncclCommDestroy` while another, whose own end
//! has returned at once, already runs the next collective of another communicator and waits for the first.
//!
//! There, a communicator that ends keeps its memory, flushed and idle, and what all of them keep is given back when no
//! communicator of the process is in use any more: with the close of a parent that outlives its groups, for example.
//! No rank returns from a close before, which a barrier after it sees to, for a second at most, and no communicator comes
//! into use while it lasts, for its timeout at most; so worlds made one after another do not pile up.
//! A process with one rank is alone with its device, and gives everything back at once.

use std::sync::{Arc, Condvar, Mutex, PoisonError};

use comm_core::Result;
use comm_kernels::order::CallOrder;
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
/// Notified when memory has been given back.
static GIVEN: Condvar = Condvar::new();

struct Yard<T> {
    in_use: usize,
    /// Threads that are giving back now.
    giving: usize,
    kept: Vec<T>,
}

impl<T> Yard<T> {
    const fn new() -> Self {
        Self { in_use: 0, giving: 0, kept: Vec::new() }
    }

    /// One is in use no more, and this is left of it. Returns what is to be given back now, oldest first; if that is
    /// anything, `given` follows.
    fn end(&mut self, left: Option<T>) -> Vec<T> {
        self.in_use = self.in_use.saturating_sub(1);
        self.kept.extend(left);
        let due = if self.in_use == 0 { std::mem::take(&mut self.kept) } else { Vec::new() };
        self.giving += usize::from(!due.is_empty());
        due
    }

    const fn given(&mut self) {
        self.giving = self.giving.saturating_sub(1);
    }
}

/// All that a communicator holds of its device. Its work is done, and nothing is enqueued on it any more.
pub(crate) struct Remains {
    name: String,
    library: Arc<NcclLibrary>,
    context: Arc<CudaContext>,
    comm: *mut sys::Comm,
    buffers: Buffers,
    tracker: Option<Tracker>,
    staged: Option<CallOrder>,
    scratch: Scratch,
}

// SAFETY: a communicator may be destroyed by any thread as long as no other is inside NCCL with it, and what is left has
// one owner.
unsafe impl Send for Remains {}

/// Counts a communicator as in use, until [`keep`] or [`release`]. Waits first, within its timeout, until no memory is
/// being given back: that could wait for the new communicator's work, which could wait for the rank that gives back.
pub(crate) fn enter(shared: &Shared) {
    if !shared.base.limits.shares_process() {
        return;
    }
    let (mut yard, waited) = GIVEN
        .wait_timeout_while(lock(&YARD), shared.base.timeout, |yard| yard.giving > 0)
        .unwrap_or_else(PoisonError::into_inner);
    yard.in_use += 1;
    drop(yard);
    if waited.timed_out() {
        tracing::warn!(comm = shared.info.name, "ended communicators are still being given back");
    }
}

/// Counts a communicator of which nothing is left as in use no more.
pub(crate) fn release(shared: &Shared) {
    if shared.base.limits.shares_process() {
        // As in `keep`.
        let due = lock(&YARD).end(None);
        let _ = give_back_all(due, false);
    }
}

/// Gives back what is left of a communicator that ended, now or once that cannot hold up the others.
pub(crate) fn keep(shared: &Shared, left: Remains) -> Result<()> {
    if !shared.base.limits.shares_process() {
        return left.give_back();
    }
    // In a statement of its own: the lock is not held while memory is given back.
    let due = lock(&YARD).end(Some(left));
    give_back_all(due, true)
}

/// Gives all of them back, whatever becomes of one. The error to report is the caller's own, which is the last one's if
/// `own`; the others' communicators have ended, and nobody waits for word of them.
fn give_back_all(due: Vec<Remains>, own: bool) -> Result<()> {
    let count = due.len();
    if count == 0 {
        return Ok(());
    }
    let mut outcome = Ok(());
    for (index, remains) in due.into_iter().enumerate() {
        let name = remains.name.clone();
        match remains.give_back() {
            Err(error) if own && index + 1 == count => outcome = Err(error),
            Err(error) => tracing::warn!(comm = name, %error, "giving back a communicator that had ended"),
            Ok(()) => {}
        }
    }
    lock(&YARD).given();
    GIVEN.notify_all();
    outcome
}

impl Remains {
    /// Takes it out of a communicator that has been flushed, or aborted and its native one with it.
    pub(crate) fn take(shared: &Shared, native: &mut Native) -> Self {
        Self {
            name: shared.info.name.clone(),
            library: shared.base.library.clone(),
            context: shared.base.context.clone(),
            comm: std::mem::replace(&mut native.comm, std::ptr::null_mut()),
            buffers: std::mem::take(&mut native.buffers),
            tracker: native.tracker.take(),
            staged: native.staged.take(),
            scratch: shared.scratch,
        }
    }

    fn give_back(mut self) -> Result<()> {
        let _current = Current::enter(&self.context)?;
        self.buffers.give_back(&self.library, self.comm);
        let destroyed = if self.comm.is_null() {
            Ok(())
        } else {
            // SAFETY: the communicator has been flushed, and was taken out under the lock, so this thread alone has it.
            unsafe { self.library.comm_destroy(self.comm) }.map(drop)
        };
        give_back_device(self.tracker.take(), self.staged.take(), self.scratch);
        destroyed
    }
}

/// Gives back what a communicator owns besides the native one. The context is current.
pub(crate) fn give_back_device(tracker: Option<Tracker>, staged: Option<CallOrder>, scratch: Scratch) {
    if let Some(tracker) = tracker {
        tracker.destroy();
    }
    if let Some(staged) = staged {
        staged.destroy();
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
        // Which lasts until it is said to be over.
        assert_eq!(yard.giving, 1);
        yard.given();
        // One that failed leaves nothing, but what others left is due.
        yard.in_use += 2;
        assert!(yard.end(Some("group")).is_empty());
        assert_eq!(yard.end(None), ["group"]);
        yard.given();
        // Nothing was left, so nothing is given back.
        yard.in_use += 1;
        assert!(yard.end(None).is_empty());
        assert_eq!((yard.in_use, yard.giving, yard.kept.len()), (0, 0, 0));
    }
}
