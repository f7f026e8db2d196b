//! Waiting for other ranks: bounded by the deadline, ended by an abort, a failure or a death.
//!
//! Owns how a rank waits (spin, yield, sleep) and which error ends a wait. It never touches operands.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::thread::futex;

use super::control::{Control, Standing};
use crate::error::{CallSite, CommError, Result};
use crate::host_comm::{Deadline, HostComm};
use crate::op::OpKind;

/// Looks at the peers' progress before giving up the processor: tens of microseconds, and none at all where a peer was
/// last seen on this very processor and so cannot get on meanwhile.
const SPINS: u32 = 2000;
/// Times the processor is offered to others before sleeping.
const YIELDS: u32 = 1000;
/// How long a sleep lasts if nobody ends it.
const SLEEP: Duration = Duration::from_millis(1);
/// How often the host communicator is asked for deaths.
const POLL: Duration = Duration::from_millis(3);

/// Which call is waiting; names itself in errors.
#[derive(Clone, Copy)]
pub(super) struct Waiting<'a> {
    pub(super) comm: &'a str,
    pub(super) op: OpKind,
    pub(super) seq: u64,
    pub(super) deadline: Deadline,
}

impl Waiting<'_> {
    pub(super) fn site(&self) -> CallSite {
        CallSite::new(self.comm, self.op, self.seq)
    }
}

/// One rank's means of waiting.
pub(super) struct Waiter {
    pub(super) control: Control,
    pub(super) host: Arc<dyn HostComm>,
    /// Whether there is a processor for every rank.
    may_spin: bool,
}

impl Waiter {
    pub(super) fn new(control: Control, host: Arc<dyn HostComm>) -> Self {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let may_spin = control.size() <= processors;
        Self { control, host, may_spin }
    }

    /// Returns once `ready` does. `awaited` names the ranks that are still needed.
    pub(super) fn until(
        &self,
        waiting: &Waiting<'_>,
        mut ready: impl FnMut() -> bool,
        awaited: impl Fn() -> Vec<usize>,
    ) -> Result<()> {
        if ready() {
            return Ok(());
        }
        if self.may_spin && !self.shares_a_processor() {
            for _ in 0..SPINS {
                std::hint::spin_loop();
                if ready() {
                    return Ok(());
                }
            }
        }
        let mut polled = Instant::now();
        let mut rounds = 0;
        loop {
            if ready() {
                return Ok(());
            }
            if self.control.alarmed() {
                self.trouble(waiting, &mut ready, &awaited)?;
            }
            if rounds < YIELDS {
                rounds += 1;
                std::thread::yield_now();
                if rounds % 64 != 0 {
                    continue;
                }
            } else {
                self.sleep(waiting, &mut ready);
            }
            let now = Instant::now();
            if now.duration_since(polled) >= POLL {
                polled = now;
                if let Err(error) = self.host.poll()
                    && !ready()
                {
                    return Err(at_home(waiting, error));
                }
            }
            if now >= waiting.deadline.instant() && !ready() {
                let (at, waited) = (waiting.site(), waiting.deadline.elapsed());
                return Err(CommError::Timeout { at, missing: awaited(), waited });
            }
        }
    }

    fn shares_a_processor(&self) -> bool {
        let own = self.control.own().processor.load(Ordering::Relaxed);
        (0..self.control.size())
            .filter(|&rank| rank != self.control.rank())
            .any(|rank| self.control.peer(rank).processor.load(Ordering::Relaxed) == own)
    }

    /// Says which processor this rank runs on.
    pub(super) fn note_processor(&self) {
        if self.may_spin {
            let processor = rustix::thread::sched_getcpu();
            self.control.own().processor.store(processor as u32, Ordering::Relaxed);
        }
    }

    fn sleep(&self, waiting: &Waiting<'_>, ready: &mut impl FnMut() -> bool) {
        let header = self.control.header();
        header.sleepers.fetch_add(1, Ordering::SeqCst);
        let event = header.event.load(Ordering::SeqCst);
        if !ready() {
            let limit = SLEEP.min(waiting.deadline.remaining());
            let limit = futex::Timespec { tv_sec: 0, tv_nsec: i64::from(limit.subsec_nanos()) };
            // Woken, timed out or interrupted: the caller looks again in any case.
            let _ = futex::wait(&header.event, futex::Flags::empty(), event, Some(&limit));
        }
        header.sleepers.fetch_sub(1, Ordering::SeqCst);
    }

    /// The error that ends a wait, if some rank's standing ends it.
    fn trouble(
        &self,
        waiting: &Waiting<'_>,
        ready: &mut impl FnMut() -> bool,
        awaited: &impl Fn() -> Vec<usize>,
    ) -> Result<()> {
        self.aborted(waiting)?;
        for rank in awaited() {
            let (standing, cause) = self.control.standing(rank);
            // A rank arrives before it departs, so a second look after its standing is decisive.
            if standing != Standing::Alive && !ready() && awaited().contains(&rank) {
                return Err(self.blame(waiting, rank, standing, cause));
            }
        }
        Ok(())
    }

    fn aborted(&self, waiting: &Waiting<'_>) -> Result<()> {
        let own = self.control.rank();
        if self.control.standing(own).0 == Standing::Aborted {
            return Err(CommError::Aborted { at: waiting.site() });
        }
        for rank in 0..self.control.size() {
            if let (Standing::Aborted, cause) = self.control.standing(rank) {
                return Err(self.blame(waiting, rank, Standing::Aborted, cause));
            }
        }
        Ok(())
    }

    fn blame(
        &self,
        waiting: &Waiting<'_>,
        rank: usize,
        standing: Standing,
        cause: Option<CommError>,
    ) -> CommError {
        let at = waiting.site();
        match (standing, cause) {
            (Standing::Departed, _) => CommError::PeerDied { at, rank },
            // Whom the rank that gave up blames is to blame here too.
            (Standing::GaveUp, Some(CommError::PeerDied { rank, .. })) if rank != self.control.rank() => {
                CommError::PeerDied { at, rank }
            }
            (Standing::GaveUp, Some(CommError::PeerFailed { rank, cause, .. }))
                if rank != self.control.rank() =>
            {
                CommError::PeerFailed { at, rank, cause }
            }
            (_, cause) => {
                let cause = cause.unwrap_or_else(|| CommError::Aborted { at: at.clone() });
                CommError::PeerFailed { at, rank, cause: Box::new(cause) }
            }
        }
    }

    /// Refuses to begin a call after a peer aborted or gave up, even if everything that peer owed is there.
    pub(super) fn may_begin(&self, waiting: &Waiting<'_>) -> Result<()> {
        if !self.control.alarmed() {
            return Ok(());
        }
        self.aborted(waiting)?;
        for rank in 0..self.control.size() {
            if let (Standing::GaveUp, cause) = self.control.standing(rank) {
                return Err(self.blame(waiting, rank, Standing::GaveUp, cause));
            }
        }
        Ok(())
    }

    /// The failure that any rank's standing amounts to, needed or not.
    pub(super) fn failure(&self, waiting: &Waiting<'_>) -> Result<()> {
        if !self.control.alarmed() {
            return Ok(());
        }
        self.aborted(waiting)?;
        for rank in (0..self.control.size()).filter(|&rank| rank != self.control.rank()) {
            let (standing, cause) = self.control.standing(rank);
            if standing != Standing::Alive {
                return Err(self.blame(waiting, rank, standing, cause));
            }
        }
        Ok(())
    }

    /// Waits, after a failure was declared, until no peer touches this rank's operands any more: the caller may free
    /// them as soon as the failed call has returned. Peers look for trouble between pieces of a few hundred kilobytes,
    /// so this is short; only a machine that gives a thread no time for many seconds could exceed the limit.
    pub(super) fn untouched(&self) {
        let limit = Instant::now() + Duration::from_secs(30);
        for rank in (0..self.control.size()).filter(|&rank| rank != self.control.rank()) {
            while self.control.peer(rank).touching.load(Ordering::SeqCst) != 0 && Instant::now() < limit {
                std::thread::yield_now();
            }
        }
    }
}

/// An error of the host communicator as one of this communicator's call: the ranks are the same.
pub(super) fn at_home(waiting: &Waiting<'_>, error: CommError) -> CommError {
    let at = waiting.site();
    match error {
        CommError::PeerDied { rank, .. } => CommError::PeerDied { at, rank },
        CommError::PeerFailed { rank, cause, .. } => CommError::PeerFailed { at, rank, cause },
        CommError::Aborted { .. } => CommError::Aborted { at },
        CommError::Timeout { missing, waited, .. } => CommError::Timeout { at, missing, waited },
        other => other,
    }
}
