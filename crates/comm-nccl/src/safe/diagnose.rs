//! Who is to blame when work does not end or NCCL reports an error.
//!
//! The rank that notices reports its failure on the control communicator. That wakes every other rank's watchdog, and
//! all of them exchange on the diagnosis communicator how far they are, in calls and in replayed graphs. A rank that does
//! not answer is stopped or gone; a rank that answers but has begun fewer collectives has not arrived.

use std::time::{Duration, Instant};

use comm_core::{CommError, Deadline, OpKind, Result};

use super::state::{Shared, lock};
use super::track::{Arrival, Issued};
use crate::sys;

/// How long the ranks may take to answer: well above a watchdog's interval, and with what the host communicator adds for
/// a hub that is itself stopped, below half a second.
const ANSWER_TIME: Duration = Duration::from_millis(150);
/// How long a death may take to be known on the host side after NCCL has seen its effects.
const NAME_TIME: Duration = Duration::from_millis(600);

/// How far one rank is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Report {
    /// Collectives begun: called, and in replays.
    begun: [u64; 2],
    /// How many of those must have begun on a rank that has arrived where this one waits; zero where it does not wait.
    wanted: [u64; 2],
}

impl Report {
    const WORDS: usize = 4;

    const fn new(begun: [u64; 2], stuck: Option<Arrival>) -> Self {
        let wanted = match stuck {
            Some(Arrival::Called(before)) => [before + 1, 0],
            Some(Arrival::Replayed(count)) => [0, count],
            None => [0, 0],
        };
        Self { begun, wanted }
    }

    fn encode(self) -> [u8; 8 * Self::WORDS] {
        let mut bytes = [0; 8 * Self::WORDS];
        let words = self.begun.into_iter().chain(self.wanted);
        for (place, word) in bytes.chunks_exact_mut(8).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let (words, []) = bytes.as_chunks::<8>() else { return None };
        let &[called, replayed, wanted_called, wanted_replayed] = words else { return None };
        let number = u64::from_le_bytes;
        Some(Self {
            begun: [number(called), number(replayed)],
            wanted: [number(wanted_called), number(wanted_replayed)],
        })
    }
}

/// The ranks that have not arrived at the earliest collective that a rank waits in.
fn laggards(reports: &[Option<Report>]) -> Vec<usize> {
    let earliest = [0, 1].map(|way| {
        let wanted = reports.iter().flatten().map(|report| report.wanted[way]).filter(|&count| count > 0);
        wanted.min().unwrap_or(0)
    });
    let behind = |report: &Option<Report>| {
        report.is_none_or(|report| (0..2).any(|way| report.begun[way] < earliest[way]))
    };
    reports.iter().enumerate().filter(|(_, report)| behind(report)).map(|(rank, _)| rank).collect()
}

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
        let own = Report::new([self.collectives(), self.replayed()], stuck);
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
        // Held while polling, so that the last reference cannot end up being dropped by the watchdog: a host
        // communicator may tell a death from a departure by the thread that drops it.
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

#[cfg(test)]
mod tests {
    use super::*;

    fn at(begun: [u64; 2], stuck: Option<Arrival>) -> Option<Report> {
        Some(Report::new(begun, stuck))
    }

    #[test]
    fn silent_and_late_ranks_are_missing() {
        let called = |before| Some(Arrival::Called(before));
        let waiting = at([5, 0], called(4));
        assert_eq!(laggards(&[waiting, at([4, 0], None), waiting]), [1]);
        assert_eq!(laggards(&[waiting, None, waiting]), [1]);
        assert_eq!(laggards(&[waiting, at([6, 0], None), at([9, 0], called(8))]), Vec::<usize>::new());
        assert_eq!(laggards(&[at([5, 0], None), at([1, 0], None)]), Vec::<usize>::new());
    }

    #[test]
    fn ranks_late_in_a_replay_are_missing() {
        let replayed = |count| Some(Arrival::Replayed(count));
        let waiting = at([20, 41], replayed(41));
        assert_eq!(laggards(&[waiting, at([20, 40], None), waiting]), [1]);
        // The rank in the later call has passed the earlier one, and is not to blame.
        assert_eq!(laggards(&[waiting, at([20, 42], replayed(42)), at([20, 20], None)]), [2]);
        // Never replayed at all, but further in calls.
        assert_eq!(laggards(&[waiting, at([21, 0], None)]), [1]);
    }

    #[test]
    fn reports_survive_the_wire() {
        let own = Report::new([7, 1 << 40], Some(Arrival::Replayed(9)));
        assert_eq!(Report::decode(&own.encode()), Some(own));
        assert_eq!(Report::decode(&[0; 31]), None);
        assert_eq!(Report::decode(&[0; 40]), None);
    }
}
