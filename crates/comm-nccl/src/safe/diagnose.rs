//! Who is to blame when work does not end or NCCL reports an error.
//!
//! The rank that notices reports its failure on the control communicator. That wakes every other rank's watchdog, and
//! all of them exchange on the diagnosis communicator how far they are. A rank that does not answer is stopped or gone; a
//! rank that answers but has begun fewer collectives has not arrived.

use std::time::{Duration, Instant};

use comm_core::{CommError, Deadline, OpKind};

use super::state::{Shared, lock};
use super::track::Issued;
use crate::sys;

/// How long the ranks may take to answer: well above a watchdog's interval, and with what the host communicator adds for
/// a hub that is itself stopped, below half a second.
const ANSWER_TIME: Duration = Duration::from_millis(150);
/// How long a death may take to be known on the host side after NCCL has seen its effects.
const NAME_TIME: Duration = Duration::from_millis(600);

/// How far one rank is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Report {
    /// Collectives begun.
    begun: u64,
    /// The collective it waits in, or `u64::MAX`.
    stuck: u64,
}

impl Report {
    fn encode(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.begun.to_le_bytes());
        bytes[8..].copy_from_slice(&self.stuck.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let (begun, stuck) = bytes.split_first_chunk::<8>()?;
        let stuck = stuck.first_chunk::<8>()?;
        Some(Self { begun: u64::from_le_bytes(*begun), stuck: u64::from_le_bytes(*stuck) })
    }
}

/// The ranks that have not arrived at the earliest collective that a rank waits in.
fn laggards(reports: &[Option<Report>]) -> Vec<usize> {
    let stuck = reports.iter().flatten().map(|report| report.stuck).min().unwrap_or(u64::MAX);
    let behind = |report: &Option<Report>| report.is_none_or(|r| stuck != u64::MAX && r.begun <= stuck);
    reports.iter().enumerate().filter(|(_, report)| behind(report)).map(|(rank, _)| rank).collect()
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
        let (died, missing) = self.missing(issued.collective);
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
        let (died, missing) = self.missing(waiting.and_then(|(issued, _)| issued.collective));
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
    fn missing(&self, stuck: Option<u64>) -> (Option<usize>, Vec<usize>) {
        let Ok(hosts) = self.hosts() else { return (None, Vec::new()) };
        let own = Report { begun: self.collectives(), stuck: stuck.unwrap_or(u64::MAX) };
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
        let from_peer = matches!(
            &error,
            CommError::Backend { code, .. }
                if *code == i64::from(sys::REMOTE_ERROR) || *code == i64::from(sys::SYSTEM_ERROR)
        );
        let start = Instant::now();
        while from_peer && !self.has_failed() && start.elapsed() < NAME_TIME {
            if let Err(cause) = self.observe() {
                return self.fail(cause);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        self.fail(error)
    }

    /// The failure that the host side knows of, as one of this communicator. Never blocks.
    pub(crate) fn observe(&self) -> Result<(), CommError> {
        // Held while polling, so that the last reference cannot end up being dropped by the watchdog: a host
        // communicator may tell a death from a departure by the thread that drops it.
        let hosts = lock(&self.hosts);
        let Some(hosts) = &*hosts else { return Ok(()) };
        let found = hosts.parent.iter().chain([&hosts.control]).find_map(|host| host.poll().err());
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

    const fn report(begun: u64, stuck: u64) -> Option<Report> {
        Some(Report { begun, stuck })
    }

    #[test]
    fn silent_and_late_ranks_are_missing() {
        let idle = u64::MAX;
        assert_eq!(laggards(&[report(5, 4), report(4, idle), report(5, 4)]), [1]);
        assert_eq!(laggards(&[report(5, 4), None, report(5, 4)]), [1]);
        assert_eq!(laggards(&[report(5, 4), report(6, idle), report(9, 8)]), Vec::<usize>::new());
        assert_eq!(laggards(&[report(5, idle), report(1, idle)]), Vec::<usize>::new());
    }

    #[test]
    fn reports_survive_the_wire() {
        let own = Report { begun: 7, stuck: u64::MAX };
        assert_eq!(Report::decode(&own.encode()), Some(own));
        assert_eq!(Report::decode(&[0; 15]), None);
    }
}
