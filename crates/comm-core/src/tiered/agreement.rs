//! What makes a memory call of a tiered communicator succeed on all ranks or on none.
//!
//! Owns a host communicator of its own, on which the ranks tell each other how a tier's part of the call went, and why one
//! of them has ended its tiers. It never calls a tier.

use std::sync::Arc;
use std::time::Duration;

use crate::error::{CallSite, CommError, Result};
use crate::host_comm::{Deadline, HostComm, decode, encode};
use crate::op::OpKind;

/// The longest that a rank may lag behind the others outside the waits of the tiers.
const SLACK: Duration = Duration::from_secs(1);

/// What the ranks made of one step, known alike on all of them.
pub(super) enum Verdict {
    /// It succeeded on every rank.
    Done,
    /// It failed without harm on this rank at least; the error says where and why, and is not fatal.
    Refused(CommError),
}

/// Whether an error says that a rank aborted, and no more.
pub(super) fn is_abort(error: &CommError) -> bool {
    match error {
        CommError::PeerFailed { cause, .. } => {
            matches!(**cause, CommError::Aborted { .. }) || is_abort(cause)
        }
        _ => false,
    }
}

/// A peer's failure as one of the rank that it blames, which is to blame here too, unless that is this rank.
fn root(own: usize, at: CallSite, rank: usize, cause: CommError) -> CommError {
    match cause {
        CommError::PeerDied { rank, .. } if rank != own => CommError::PeerDied { at, rank },
        CommError::PeerFailed { rank, cause, .. } if rank != own => root(own, at, rank, *cause),
        cause => CommError::PeerFailed { at, rank, cause: Box::new(cause) },
    }
}

pub(super) struct Agreement {
    host: Arc<dyn HostComm>,
    /// The longest wait that a tier's own part of a call may take.
    timeout: Duration,
}

impl Agreement {
    pub(super) fn new(host: Arc<dyn HostComm>, timeout: Duration) -> Self {
        Self { host, timeout }
    }

    /// A group's own, made by all ranks together.
    pub(super) fn split(&self, color: Option<u32>, key: i32) -> Result<Option<Self>> {
        let host = self.host.split(color, i64::from(key), self.deadline())?;
        Ok(host.map(|host| Self::new(host, self.timeout)))
    }

    /// Ends every wait for an agreement, on all ranks.
    pub(super) fn abort(&self) {
        self.host.abort();
    }

    /// Tells the other ranks why this one ends its tiers. Never blocks.
    pub(super) fn report(&self, cause: &CommError) {
        match cause {
            CommError::Aborted { .. } => self.host.abort(),
            cause => self.host.report_failure(cause),
        }
    }

    /// What is behind an error of a tier: a rank that ended its tiers has said why, before. Never blocks.
    pub(super) fn reason(&self, error: CommError) -> CommError {
        let CommError::PeerFailed { at, .. } = &error else { return error };
        if !is_abort(&error) {
            return error;
        }
        let at = at.clone();
        match self.host.poll() {
            Err(CommError::PeerDied { rank, .. }) => CommError::PeerDied { at, rank },
            Err(CommError::PeerFailed { rank, cause, .. }) => root(self.host.rank(), at, rank, *cause),
            _ => error,
        }
    }

    /// Twice the tiers' timeout: one rank may begin to wait here as another begins to wait in its tier.
    fn deadline(&self) -> Deadline {
        let longest = self.timeout.max(self.host.timeout());
        Deadline::after(longest.saturating_mul(2).saturating_add(SLACK))
    }

    /// Tells the other ranks of this rank's outcome and learns of theirs.
    ///
    /// # Errors
    /// The call failed for good: fatally on this rank or on another, or the ranks could not tell each other.
    pub(super) fn reach(&self, op: OpKind, backend: &str, own: Result<()>) -> Result<Verdict> {
        if let Err(error) = &own
            && error.is_fatal()
        {
            // Unlike an exchange this waits for nobody: a rank may be why.
            self.host.report_failure(error);
            return Err(error.clone());
        }
        let all = self.host.all_gather_bytes(&encode(&own)?, self.deadline())?;
        for (rank, bytes) in all.iter().enumerate() {
            let outcome: Result<()> = decode(bytes)?;
            if let Err(cause) = outcome {
                let there =
                    || CommError::unsupported(op, backend.to_owned(), format!("on rank {rank}: {cause}"));
                return Ok(Verdict::Refused(own.err().unwrap_or_else(there)));
            }
        }
        Ok(Verdict::Done)
    }

    /// That a step which must not fail did so on this rank, as an error that ends the call for good.
    pub(super) fn broken(&self, op: OpKind, cause: CommError) -> CommError {
        let at = CallSite::new(self.host.name(), op, 0);
        CommError::PeerFailed { at, rank: self.host.rank(), cause: Box::new(cause) }
    }
}
