//! The hand-over between rank 0's last drop and the hub, so that a process that exits right after it still says goodbye.

use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use crate::host_comm::Deadline;

/// Becomes true when what rank 0's process last said has been passed on to the other ranks.
#[derive(Default)]
pub(super) struct PassedOn {
    done: Mutex<bool>,
    changed: Condvar,
}

impl PassedOn {
    pub(super) fn set(&self) {
        *self.done.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.changed.notify_all();
    }

    /// Waits for it, at most `limit`.
    pub(super) fn wait(&self, limit: Duration) {
        let deadline = Deadline::after(limit);
        let mut done = self.done.lock().unwrap_or_else(PoisonError::into_inner);
        while !*done && !deadline.has_passed() {
            let waited = self.changed.wait_timeout(done, deadline.remaining());
            done = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}
