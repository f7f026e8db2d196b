//! Waiting for other ranks: bounded by the deadline, ended by an abort, a failure or a death.
//!
//! Owns how a rank waits (spin, yield, sleep) and which error ends a wait. It never touches operands.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::thread::futex;

use super::control::{Control, Standing};
use crate::error::{CallSite, CommError, Result};
use crate::host_comm::{Deadline, HostComm};
use crate::op::OpKind;

/// Looks at the peers' progress before giving up the processor: some hundred microseconds, because whoever else gets it
/// may keep it for milliseconds. None at all where a peer was last seen on this very processor and so cannot get on
/// meanwhile.
const SPINS: u32 = 8000;
/// Times the processor is offered to others before sleeping.
const YIELDS: u32 = 1000;
/// Offers between two looks at the clock. On a machine with more to do than processors one offer can take ten milliseconds,
/// and a timeout is to be noticed within half a second.
const YIELDS_PER_LOOK: u32 = 8;
/// How long a sleep lasts if nobody ends it.
const SLEEP: Duration = Duration::from_millis(1);
/// How often, at most, a rank moves away from a processor that it shares with another rank.
const MOVE: Duration = Duration::from_millis(5);
/// How often the host communicator is asked for deaths.
const POLL: Duration = Duration::from_millis(3);
/// How long a rank's departure is no verdict yet: the death that made it leave may still be on its way here.
const GRACE: Duration = Duration::from_millis(50);

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
    made: Instant,
    /// When this rank last moved, in microseconds since `made`.
    moved: AtomicU64,
}

impl Waiter {
    pub(super) fn new(control: Control, host: Arc<dyn HostComm>) -> Self {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let may_spin = control.size() <= processors;
        Self { control, host, may_spin, made: Instant::now(), moved: AtomicU64::new(0) }
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
        if self.may_spin && (!self.shares_a_processor() || self.move_apart()) {
            for _ in 0..SPINS {
                std::hint::spin_loop();
                if ready() {
                    return Ok(());
                }
            }
        }
        let mut polled = Instant::now();
        let mut rounds = 0;
        let mut departed = None;
        loop {
            if ready() {
                return Ok(());
            }
            if self.control.alarmed()
                && let Some(rank) = self.trouble(waiting, &mut ready, &awaited)?
                && departed.get_or_insert_with(Instant::now).elapsed() >= GRACE
            {
                return Err(self.known_failure(waiting).unwrap_or_else(|| self.departure(waiting, rank)));
            }
            if rounds < YIELDS {
                rounds += 1;
                std::thread::yield_now();
                if rounds % YIELDS_PER_LOOK != 0 {
                    continue;
                }
            } else {
                self.sleep(waiting, &mut ready);
            }
            let now = Instant::now();
            if now.duration_since(polled) >= POLL {
                polled = now;
                if let Some(error) = self.told(waiting)
                    && !ready()
                {
                    return Err(error);
                }
            }
            if now >= waiting.deadline.instant() && !ready() {
                let (at, waited) = (waiting.site(), waiting.deadline.elapsed());
                return Err(CommError::Timeout { at, missing: awaited(), waited });
            }
        }
    }

    /// Whether a rank that could move elsewhere was last seen on this rank's processor.
    fn shares_a_processor(&self) -> bool {
        let own = self.control.own().processor.load(Ordering::Relaxed);
        own != 0
            && (0..self.control.size())
                .filter(|&rank| rank != self.control.rank())
                .any(|rank| self.control.peer(rank).processor.load(Ordering::Relaxed) == own)
    }

    /// Moves to a processor on which no rank was seen, and says whether it did. Ranks that wait for each other take turns
    /// on one processor so politely that the system sees no reason to part them. What processors this thread may use is
    /// afterwards as it was.
    fn move_apart(&self) -> bool {
        let own = self.control.own().processor.load(Ordering::Relaxed);
        let (now, moved) = (self.made.elapsed(), Duration::from_micros(self.moved.load(Ordering::Relaxed)));
        // The lowest rank on a processor stays.
        let stays = !(0..self.control.rank())
            .any(|rank| self.control.peer(rank).processor.load(Ordering::Relaxed) == own);
        if stays || now.saturating_sub(moved) < MOVE {
            return false;
        }
        self.moved.store(now.as_micros() as u64, Ordering::Relaxed);
        let Ok(allowed) = rustix::thread::sched_getaffinity(None) else { return false };
        let taken = |processor: usize| {
            (0..self.control.size())
                .any(|rank| self.control.peer(rank).processor.load(Ordering::Relaxed) == processor as u32 + 1)
        };
        let free = (0..rustix::thread::CpuSet::MAX_CPU)
            .find(|&processor| allowed.is_set(processor) && !taken(processor));
        let Some(free) = free else { return false };
        let mut only = rustix::thread::CpuSet::new();
        only.set(free);
        let went = rustix::thread::sched_setaffinity(None, &only).is_ok();
        let restored = rustix::thread::sched_setaffinity(None, &allowed).is_ok();
        self.note_processor();
        went && restored
    }

    /// Says which processor this rank runs on.
    pub(super) fn note_processor(&self) {
        if self.may_spin {
            let processor = rustix::thread::sched_getcpu() + 1;
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

    /// The error that ends a wait, if some rank's standing ends it. Otherwise a rank that was needed and has departed.
    fn trouble(
        &self,
        waiting: &Waiting<'_>,
        ready: &mut impl FnMut() -> bool,
        awaited: &impl Fn() -> Vec<usize>,
    ) -> Result<Option<usize>> {
        self.aborted(waiting)?;
        let mut departed = None;
        for rank in awaited() {
            let (standing, cause) = self.control.standing(rank);
            // A rank arrives before it departs, so a second look after its standing is decisive.
            if standing == Standing::Alive || ready() || !awaited().contains(&rank) {
                continue;
            }
            if standing != Standing::Departed {
                return Err(self.blame(waiting, rank, standing, cause));
            }
            departed = departed.or(Some(rank));
        }
        Ok(departed)
    }

    /// The failure that another rank or the host communicator knows of.
    fn known_failure(&self, waiting: &Waiting<'_>) -> Option<CommError> {
        self.failure(waiting).err().or_else(|| self.told(waiting))
    }

    /// The failure that the host communicator tells of.
    fn told(&self, waiting: &Waiting<'_>) -> Option<CommError> {
        let error = at_home(waiting, self.host.poll().err()?);
        let CommError::PeerDied { rank, .. } = error else { return Some(error) };
        // A rank that let go of this communicator lets go of the host communicator too, which is no death: what it said
        // here counts. One that ran out of patience with another rank is not to blame for that.
        match self.control.standing(rank) {
            (Standing::Alive, _) => Some(error),
            (Standing::Departed, _) | (Standing::GaveUp, Some(CommError::Timeout { .. })) => None,
            (standing, cause) => Some(self.blame(waiting, rank, standing, cause)),
        }
    }

    fn departure(&self, waiting: &Waiting<'_>, rank: usize) -> CommError {
        CommError::PeerDied { at: waiting.site(), rank }
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
            (Standing::Departed, _) => self.departure(waiting, rank),
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

    /// The failure that any rank knows of, needed or not.
    pub(super) fn failure(&self, waiting: &Waiting<'_>) -> Result<()> {
        if !self.control.alarmed() {
            return Ok(());
        }
        self.aborted(waiting)?;
        for rank in (0..self.control.size()).filter(|&rank| rank != self.control.rank()) {
            if let (Standing::GaveUp, cause) = self.control.standing(rank) {
                return Err(self.blame(waiting, rank, Standing::GaveUp, cause));
            }
        }
        Ok(())
    }

    /// What is wrong with the communicator, if anything is, a rank's departure included. Never waits.
    pub(super) fn check(&self, waiting: &Waiting<'_>) -> Result<()> {
        if let Some(error) = self.known_failure(waiting) {
            return Err(error);
        }
        let departed = |rank: &usize| self.control.standing(*rank).0 == Standing::Departed;
        let mut peers = (0..self.control.size()).filter(|&rank| rank != self.control.rank());
        if self.control.alarmed()
            && let Some(rank) = peers.find(departed)
        {
            return Err(self.departure(waiting, rank));
        }
        Ok(())
    }

    /// Waits, after a failure was declared, until no peer touches this rank's operands any more: the caller may free
    /// them as soon as the failed call has returned, and safe callers do.
    ///
    /// Only for ranks of one process. What bounds the wait is the peers' work and not a clock, because returning early
    /// would be unsound: a peer that touches operands waits for nobody, sees the declared failure after the piece
    /// (`core::PIECE`) that it is in, and then stops; if it panics, unwinding ends its touching. None of these threads
    /// can die or be stopped without this one. So it takes microseconds of every such peer's processor time.
    pub(super) fn untouched(&self) {
        for rank in (0..self.control.size()).filter(|&rank| rank != self.control.rank()) {
            let mut rounds = 0;
            while self.control.peer(rank).touching.load(Ordering::SeqCst) != 0 {
                rounds += 1;
                match rounds {
                    ..YIELDS => std::thread::yield_now(),
                    // Leaves the processor to the peer, whatever this thread's priority.
                    _ => std::thread::sleep(Duration::from_micros(50)),
                }
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
