//! How the ranks leave a failed communicator: none makes kernels leave their waits before the others know of the failure.
//!
//! Why that matters: a kernel that `ncclCommAbort` sends home does not stop in the middle. It skips its waits and its
//! data, and posts all of its steps to its peers. A peer's kernel of the same call takes them for data, ends, and its
//! event completes, with garbage in the receive buffer. A rank that looked at that event before it knew of the failure
//! would report a wrong result as a right one.
//!
//! The argument why no rank does. A rank believes a result once the work is complete and
//! [`poll`](comm_core::DeviceComm::poll), asked *after* that, finds nothing wrong.
//!
//! 1. A rank that aborts has first told the others that the communicator failed, then marked its own as failed (from
//!    then on its `poll` fails), and then waits here, in [`Farewell::leave`], for the others to have got that far.
//! 2. When all meet here, every rank's `poll` fails before any kernel is sent home, so nobody believes what those
//!    leave behind.
//! 3. A rank that is dead, or stopped, never comes, so the wait ends after [`GRACE`] for those that know of the failure
//!    but are slow. A watchdog looks every 25 ms and a diagnosis takes 150 ms on all ranks, begun within one look of one
//!    another, so the grace is several times what a rank that runs needs. What comes after it is announced
//!    first: `poll` asks for that announcement ([`Farewell::overtaken`]) after the completion, which the abort came
//!    after. Between threads the announcement is there at once, so the conclusion holds however slow a rank is. Between
//!    processes it has [`ANNOUNCE`] to travel.
//!
//! What remains: a process that was itself stopped for so long that others gave it up, and whose first act when it goes
//! on is to look at an event and to poll, before its thread that reads the socket has run at all; and ranks that began
//! the call more than the grace apart while the process of rank 0, through which all words between processes pass, is
//! stopped.
//!
//! Graph replays are no different: their completion is believed after a `poll` as well.

use std::sync::Arc;
use std::time::Duration;

use comm_core::{Deadline, HostComm, Result};

/// How long a rank waits for the others to know of a failure before it makes its kernels leave.
const GRACE: Duration = Duration::from_millis(150);
/// How long the announcement of an abort that not all agreed to has before the abort itself.
const ANNOUNCE: Duration = Duration::from_millis(25);

/// A host communicator of the same ranks that is used for nothing but the end of a failed communicator.
#[derive(Clone)]
pub(crate) struct Farewell {
    host: Arc<dyn HostComm>,
}

impl Farewell {
    pub(crate) fn new(host: Arc<dyn HostComm>) -> Self {
        Self { host }
    }

    /// Returns once kernels may be made to leave. The caller has marked its communicator as failed, and does this once.
    pub(crate) fn leave(&self) {
        let deadline = Deadline::after(GRACE);
        if self.host.barrier(deadline).is_ok() {
            return;
        }
        // A death ends the barrier at once, while the other survivors may not have seen it yet.
        std::thread::sleep(deadline.remaining());
        self.host.abort();
        std::thread::sleep(ANNOUNCE);
    }

    /// Fails when a rank has made its kernels leave, or died, so that work which completed may hold garbage. Asked by a
    /// rank that has not failed. Never blocks.
    pub(crate) fn overtaken(&self) -> Result<()> {
        self.host.poll()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
    use std::time::Instant;

    use comm_core::{CommError, run_threads};

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);

    /// Ranks that mark their failure after `delays`, then leave. Returns how many had marked when each was let go, and
    /// how long that took from the start.
    fn part(delays: &[Option<Duration>]) -> Vec<Option<(usize, Duration)>> {
        let marked = AtomicUsize::new(0);
        let start = Instant::now();
        run_threads(delays.len(), PATIENCE, |host| {
            let farewell = Farewell::new(host.split(Some(0), 0, Deadline::after(PATIENCE)).unwrap().unwrap());
            let delay = delays[host.rank()]?;
            std::thread::sleep(delay);
            marked.fetch_add(1, Ordering::SeqCst);
            farewell.leave();
            let result = Some((marked.load(Ordering::SeqCst), start.elapsed()));
            // The handles live until all are through.
            let _ = host.barrier(Deadline::after(PATIENCE));
            result
        })
        .unwrap()
    }

    #[test]
    fn nobody_leaves_before_all_have_marked() {
        let late = Duration::from_millis(60);
        for left in part(&[Some(Duration::ZERO), Some(late), Some(Duration::ZERO)]) {
            let (marked, took) = left.unwrap();
            assert_eq!(marked, 3);
            assert!(took >= late, "{took:?}");
        }
    }

    /// A rank that has left its handle, or ended, does not shorten the wait of the others.
    #[test]
    fn without_a_rank_the_others_still_get_the_grace() {
        for left in part(&[Some(Duration::ZERO), None, Some(GRACE / 2)]).into_iter().flatten() {
            assert_eq!(left.0, 2);
            assert!(left.1 >= GRACE, "{:?}", left.1);
        }
    }

    /// The window itself: rank 0 gives up and its kernels leave, which completes rank 1's work, while rank 1 has not
    /// heard of anything. What rank 1 then asks must not say that all is well.
    #[test]
    fn work_that_an_abort_completed_is_never_believed() {
        let completed = AtomicBool::new(false);
        let believed = run_threads(2, PATIENCE, |host| {
            let farewell = Farewell::new(host.split(Some(0), 0, Deadline::after(PATIENCE)).unwrap().unwrap());
            assert_eq!(farewell.overtaken(), Ok(()));
            let mut outcome = Ok(());
            if host.rank() == 0 {
                farewell.leave();
                completed.store(true, Ordering::SeqCst);
            } else {
                let start = Instant::now();
                while !completed.load(Ordering::SeqCst) {
                    assert!(start.elapsed() < PATIENCE);
                    std::thread::yield_now();
                }
                outcome = farewell.overtaken();
            }
            host.barrier(Deadline::after(PATIENCE)).unwrap();
            outcome
        })
        .unwrap();
        assert!(matches!(believed[1], Err(CommError::PeerFailed { rank: 0, .. })), "{:?}", believed[1]);
    }
}
