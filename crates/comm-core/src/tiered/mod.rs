//! One communicator over several backends: each call goes to the first backend, in order of preference, that supports
//! it.
//!
//! Owns the choice and nothing else. The choice depends only on what `supports` depends on, which all ranks share, so
//! all ranks make the same one; it never depends on what a rank observes.

mod agreement;
mod memory;
mod ops;

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use crate::device_comm::{CommInfo, DeviceComm};
use crate::dtype::DType;
use crate::error::{CommError, Result};
use crate::host_comm::HostComm;
use crate::op::{OpKind, OpQuery, Support};

use agreement::Agreement;
use memory::TierMemory;

/// What it calls itself where backends are named.
const NAME: &str = "tiered";

/// A backend that a tiered communicator does without, and why.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SkippedTier {
    /// The backend's name.
    pub backend: String,
    /// The failure of its probe, or of its split: the same on all ranks.
    pub reason: CommError,
}

/// A communicator that distributes its calls over an ordered list of communicators of the same ranks. Made by
/// [`Registry::create_tiered`](crate::Registry::create_tiered).
///
/// Sends, receives and groups all go to one tier, the first that carries out all three, since a send may be matched by
/// a receive in a group. Usage counters read `backend:algorithm`.
///
/// A reduction has the bits of the tier that carries it out: all ranks the same, but where `nccl` is a tier not always those
/// that [`ReduceOp`](crate::ReduceOp) promises, nor the same for every count.
///
/// Memory calls end alike on all ranks: what a tier refuses on one of them it forgets on all. A fatal failure, of whichever
/// call and tier, ends the whole communicator, on all ranks and with its cause.
pub struct TieredComm {
    info: CommInfo,
    tiers: Vec<Arc<dyn DeviceComm>>,
    skipped: Vec<SkippedTier>,
    /// The tier of point-to-point transfers.
    p2p: Option<usize>,
    memory: TierMemory,
    /// What every call returns since the first fatal error, or since the close.
    ended: OnceLock<CommError>,
}

impl std::fmt::Debug for TieredComm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names: Vec<_> = self.tiers.iter().map(|tier| &tier.info().backend).collect();
        f.debug_struct("TieredComm").field("info", &self.info).field("tiers", &names).finish()
    }
}

impl TieredComm {
    /// A communicator over `tiers`, the preferred first. Local: the tiers of all ranks must have been made together.
    ///
    /// `host` is a host communicator of the same ranks that nothing else calls, for example a split of another: on it the
    /// ranks agree on what became of memory calls. `timeout` is the longest wait of the tiers.
    ///
    /// # Errors
    /// [`CommError::InvalidArgument`] when there is no tier, or they differ in rank, size or memory.
    pub fn new(
        host: Arc<dyn HostComm>,
        timeout: Duration,
        tiers: Vec<Arc<dyn DeviceComm>>,
        skipped: Vec<SkippedTier>,
    ) -> Result<Self> {
        if let Some(first) = tiers.first().map(|tier| tier.info())
            && (host.rank(), host.size()) != (first.rank, first.size)
        {
            let found = format!("is rank {} of {}", host.rank(), host.size());
            return Err(CommError::invalid("host", format!("{found}, and not of the ranks of {first:?}")));
        }
        Self::over(Agreement::new(host, timeout), tiers, skipped)
    }

    fn over(
        agreement: Agreement,
        tiers: Vec<Arc<dyn DeviceComm>>,
        skipped: Vec<SkippedTier>,
    ) -> Result<Self> {
        let Some(first) = tiers.first() else {
            return Err(CommError::invalid("tiers", "a tiered communicator needs at least one backend"));
        };
        let info = CommInfo { backend: NAME.into(), ..first.info().clone() };
        for tier in &tiers {
            let other = tier.info();
            if (other.rank, other.size, other.memory) != (info.rank, info.size, info.memory) {
                return Err(CommError::invalid(
                    "tiers",
                    format!("{other:?} is not of the rank, size and memory of {:?}", first.info()),
                ));
            }
        }
        let admits = |kinds: &[OpKind]| {
            tiers.iter().position(|tier| {
                kinds.iter().all(|&kind| tier.supports(&OpQuery::new(kind, DType::U8, 1)).is_supported())
            })
        };
        let p2p = admits(&[OpKind::Send, OpKind::Recv, OpKind::Group])
            .or_else(|| admits(&[OpKind::Send, OpKind::Recv]));
        Ok(Self { info, tiers, skipped, p2p, memory: TierMemory::new(agreement), ended: OnceLock::new() })
    }

    /// The backends that were asked for and left out, with the reason.
    #[must_use]
    pub fn skipped(&self) -> &[SkippedTier] {
        &self.skipped
    }

    /// The backend that a call would go to, if any supports it.
    #[must_use]
    pub fn backend_for(&self, query: &OpQuery) -> Option<&str> {
        self.tier(query).ok().map(|tier| &*tier.info().backend)
    }

    /// The tiers that a query is put to, in order.
    fn candidates(&self, kind: OpKind) -> &[Arc<dyn DeviceComm>] {
        match (kind, self.p2p) {
            (OpKind::Send | OpKind::Recv | OpKind::Group, Some(tier)) => &self.tiers[tier..=tier],
            _ => &self.tiers,
        }
    }

    fn tier(&self, query: &OpQuery) -> Result<&Arc<dyn DeviceComm>> {
        let mut reasons = Vec::new();
        for tier in self.candidates(query.kind) {
            match tier.supports(query) {
                Support::Yes => return Ok(tier),
                Support::No { reason } => reasons.push(format!("{}: {reason}", tier.info().backend)),
            }
        }
        Err(CommError::unsupported(query.kind, self.info.backend.clone(), reasons.join("; ")))
    }

    fn usable(&self) -> Result<()> {
        self.ended.get().map_or(Ok(()), |cause| Err(cause.clone()))
    }

    /// Has the tier for a query carry a call out.
    fn carry<T>(&self, query: &OpQuery, call: impl FnOnce(&dyn DeviceComm) -> Result<T>) -> Result<T> {
        self.usable()?;
        self.ending(call(&**self.tier(query)?))
    }

    /// A call's outcome. If it is a tier's end it is that of all: callers that go on with another tier would not find their
    /// peers there, and none of them could say why.
    fn ending<T>(&self, outcome: Result<T>) -> Result<T> {
        match outcome {
            // Which has nothing left to end; while one thread closes the tiers, another may find that one of them is.
            Err(error @ CommError::Closed { .. }) => Err(error),
            Err(error) if error.is_fatal() => Err(self.end(error)),
            outcome => outcome,
        }
    }

    /// The outcome of a call on `tier` and on another communicator: of which one it is the end, the tier knows.
    fn perhaps_ending<T>(&self, tier: &dyn DeviceComm, outcome: Result<T>) -> Result<T> {
        match outcome {
            Err(error) if tier.poll().is_ok() => Err(error),
            outcome => self.ending(outcome),
        }
    }

    fn end(&self, error: CommError) -> CommError {
        let agreement = self.memory.agreement();
        let error = agreement.reason(error);
        if self.ended.set(error.clone()).is_ok() {
            // The other ranks are told why before they find that this one has aborted.
            agreement.report(&error);
            self.tiers.iter().for_each(|tier| tier.abort());
        }
        self.ended.get().cloned().unwrap_or(error)
    }
}
