//! Who is to blame when work does not end or NCCL reports an error.
//!
//! The rank that notices reports its failure on the control communicator. That wakes every other rank's watchdog, and
//! all of them exchange on the diagnosis communicator how far they are, in calls and in replayed graphs. A rank that does
//! not answer is stopped or gone; [`laggards`] tells which of those that answer have not arrived.

use std::time::{Duration, Instant};

use comm_core::{CommError, Deadline, OpKind, Result};

use super::laggards::{Report, laggards};
use super::state::{Shared, lock};
use super::track::{Arrival, Issued};
use crate::sys;

/// How long the ranks may take to answer: well above a watchdog's interval, and with what the host communicator adds for
/// a hub that is itself stopped, below half a second.
const ANSWER_TIME: Duration = Duration::from_millis(150);
/// How long a death may take to be known on the host side after NCCL has seen its effects.
const NAME_TIME: Duration = Duration::from_millis(600);

/// Whether a peer's end may be what NCCL reports.
pub(crate) fn may_come_from_a_peer(error: &CommError) -> bool {
    matches!(
        error,
        CommError::Backend { code, .. }
            if *code == i64::from(sys::REMOTE_ERROR) || *code == i64::from(sys::SYSTEM_ERROR)
    )
}

impl Shared {
    /// Declares failure because `issued` has not ended in time, and returns the cause.
    pub(crate) fn overdue(&self, issued: Issued, waited: Duration) -> CommError {
        if self.has_failed() {
            return self.fail(self.closed());
        }
        let at = self.at(issued.kind, issued.seq);
        let first = CommError::Timeout { at: at.clone(), missing: Vec::new(), waited };
        if let Ok(hosts) = self.hosts() {
            hosts.control.report_failure(&first);
        }
        let (died, missing) = self.missing(issued.arrival);
        let error = match died {
            Some(rank) => CommError::PeerDied { at, rank },
            None if missing.is_empty() => {
                // All have arrived, so the data itself does not flow: no rank can be singled out.
                let missing = (0..self.info.size).filter(|&rank| rank != self.info.rank).collect();
                CommError::Timeout { at, missing, waited }
            }
            None => CommError::Timeout { at, missing, waited },
        };
        self.fail(error)
    }

    /// Declares failure because another rank ran out of time, and returns the cause: this rank's own time-out if it was
    /// waiting too, otherwise the other's report.
    pub(crate) fn peer_overdue(&self, waiting: Option<(Issued, Duration)>, report: CommError) -> CommError {
        let (died, missing) = self.missing(waiting.and_then(|(issued, _)| issued.arrival));
        let error = match (died, waiting) {
            (Some(rank), _) => CommError::PeerDied { at: self.at_last(), rank },
            (None, Some((issued, waited))) if !missing.is_empty() && !missing.contains(&self.info.rank) => {
                CommError::Timeout { at: self.at(issued.kind, issued.seq), missing, waited }
            }
            _ => report,
        };
        self.fail(error)
    }

    /// A rank that is known dead, and the ranks that did not answer or are behind.
    fn missing(&self, stuck: Option<Arrival>) -> (Option<usize>, Vec<usize>) {
        let Ok(hosts) = self.hosts() else { return (None, Vec::new()) };
        let stuck = stuck.and_then(|arrival| match arrival {
            Arrival::Called(before) => Some(before),
            Arrival::Replayed => None,
        });
        let own = Report::new(self.collectives(), stuck, self.replayed());
        match hosts.diagnosis.all_gather_bytes(&own.encode(), Deadline::after(ANSWER_TIME)) {
            Ok(all) => {
                let reports: Vec<_> = all.iter().map(|bytes| Report::decode(bytes)).collect();
                (None, laggards(&reports))
            }
            Err(CommError::Timeout { missing, .. }) => (None, missing),
            Err(CommError::PeerDied { rank, .. }) => (Some(rank), vec![rank]),
            Err(_) => (None, Vec::new()),
        }
    }

    /// Declares failure because NCCL or the device reported an error, and returns the cause. NCCL may see a peer's
    /// sockets close before the host side knows of its death, so errors that may come from that wait for a name.
    pub(crate) fn blame(&self, error: CommError) -> CommError {
        let from_peer = may_come_from_a_peer(&error);
        let start = Instant::now();
        while from_peer && !self.has_failed() && start.elapsed() < NAME_TIME {
            if let Err(cause) = self.observe() {
                return self.fail(cause);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        self.fail(error)
    }

    /// Declares failure if another rank's abort may have completed work here, before this rank's watchdog has noticed.
    /// Never blocks.
    pub(crate) fn overtaken(&self) -> Result<()> {
        let farewell = lock(&self.farewell).clone();
        let Some(Err(word)) = farewell.map(|farewell| farewell.overtaken()) else { return Ok(()) };
        // Why it aborted was said elsewhere, before.
        let cause = self.observe().err().unwrap_or_else(|| self.relocate(word, None));
        Err(self.fail(cause))
    }

    /// The failure that the host side knows of, as one of this communicator. Never blocks.
    pub(crate) fn observe(&self) -> Result<()> {
        // Held while polling, so that the last reference cannot end up being dropped here when a thread that panics has
        // let go: a host communicator may tell a death from a departure by the thread that drops it.
        let hosts = lock(&self.hosts);
        let Some(hosts) = &*hosts else { return Ok(()) };
        let found = hosts.parent.iter().chain([&hosts.control]).filter_map(|host| host.poll().err());
        // A rank that reports its failure may end right after; what it reported says more than its death.
        let found = found.min_by_key(|error| matches!(error, CommError::PeerDied { .. }));
        found.map_or(Ok(()), |error| Err(self.relocate(error, None)))
    }

    /// A host communicator's error as one of this communicator.
    pub(crate) fn relocate(&self, error: CommError, op: Option<OpKind>) -> CommError {
        let site = || op.map_or_else(|| self.at_last(), |op| self.at(op, self.seq()));
        match error {
            CommError::PeerDied { rank, .. } => CommError::PeerDied { at: site(), rank },
            CommError::PeerFailed { rank, cause, .. } => CommError::PeerFailed { at: site(), rank, cause },
            CommError::Timeout { missing, waited, .. } => CommError::Timeout { at: site(), missing, waited },
            CommError::Aborted { .. } => CommError::Aborted { at: site() },
            other => other,
        }
    }
}
