//! Which tier knows which memory: the same tiers on every rank.
//!
//! Owns the bookkeeping only: every address stays valid or not as the tier that gave it says.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::agreement::{Agreement, Verdict};
use crate::addr::DeviceAddr;
use crate::check;
use crate::device_comm::{DeviceComm, Registration};
use crate::dtype::DType;
use crate::error::{CommError, Result};
use crate::op::{OpKind, OpQuery};

/// A registration by tier index.
type Parts = Vec<(usize, Registration)>;

#[derive(Default)]
struct Tables {
    next: u64,
    /// Allocations: the tier that gave the memory, and the tiers that it is registered with.
    allocations: HashMap<u64, (usize, Parts)>,
    registrations: HashMap<u64, (Registration, Parts)>,
}

pub(super) struct TierMemory {
    tables: Mutex<Tables>,
    agreement: Agreement,
    /// Held for the length of a call, so that calls of several threads reach all tiers in one order.
    turn: Mutex<()>,
}

fn admits(tier: &dyn DeviceComm, kind: OpKind, bytes: usize) -> bool {
    tier.supports(&OpQuery::new(kind, DType::U8, bytes)).is_supported()
}

impl TierMemory {
    pub(super) fn new(agreement: Agreement) -> Self {
        Self { tables: Mutex::default(), agreement, turn: Mutex::default() }
    }

    pub(super) const fn agreement(&self) -> &Agreement {
        &self.agreement
    }

    fn lock(&self) -> MutexGuard<'_, Tables> {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Allocates from the first tier that can and registers the memory with the others that can.
    pub(super) fn allocate(&self, tiers: &[Arc<dyn DeviceComm>], bytes: usize) -> Result<Option<DeviceAddr>> {
        let _turn = self.turn();
        let Some(owner) = tiers.iter().position(|tier| admits(&**tier, OpKind::Allocate, bytes)) else {
            return Ok(None);
        };
        let made = tiers[owner].allocate(bytes);
        // SAFETY: the allocation was made a moment ago and no work has used it.
        let undo = |addr: &DeviceAddr| unsafe { tiers[owner].free(*addr) };
        let addr = self.agreed(tiers, owner, OpKind::Allocate, made, undo)??;
        let mut parts = Parts::new();
        for (index, tier) in tiers.iter().enumerate() {
            if index == owner || bytes == 0 || !admits(&**tier, OpKind::Register, bytes) {
                continue;
            }
            // SAFETY: the range is the allocation just made; `free` deregisters it before it is given back.
            match unsafe { self.register_with(tiers, index, addr, bytes) }? {
                Ok(registration) => parts.push((index, registration)),
                // Registration only saves a copy, and some libraries do not take each other's memory.
                Err(error) => tracing::debug!(backend = %tier.info().backend, %error, "not registered"),
            }
        }
        self.lock().allocations.insert(addr.0, (owner, parts));
        Ok(Some(addr))
    }

    /// Registers with one tier, on all ranks or (the inner error, which is not fatal) on none.
    ///
    /// # Errors
    /// As [`agreed`](Self::agreed).
    ///
    /// # Safety
    /// As [`DeviceComm::register`].
    unsafe fn register_with(
        &self,
        tiers: &[Arc<dyn DeviceComm>],
        index: usize,
        addr: DeviceAddr,
        bytes: usize,
    ) -> Result<Result<Registration>> {
        // SAFETY: the caller vouches that the range outlives the registration.
        let made = unsafe { tiers[index].register(addr, bytes) };
        // SAFETY: the registration was made a moment ago and no work has used it.
        let undo = |registration: &Registration| unsafe { tiers[index].deregister(registration) };
        self.agreed(tiers, index, OpKind::Register, made, undo)
    }

    /// `made` where all ranks made theirs. Where one was refused, those that made theirs `undo` it, and the inner error,
    /// which is not fatal, says on every rank why there is nothing.
    ///
    /// # Errors
    /// The memory call failed for good, on this rank or another. What the tiers still know of the memory cannot be taken
    /// back from them in agreement, so they are aborted: none of them touches it any more.
    fn agreed<T>(
        &self,
        tiers: &[Arc<dyn DeviceComm>],
        index: usize,
        op: OpKind,
        made: Result<T>,
        undo: impl Fn(&T) -> Result<()>,
    ) -> Result<Result<T>> {
        let backend = &*tiers[index].info().backend;
        let own = made.as_ref().map(drop).map_err(Clone::clone);
        match (self.reach(tiers, op, backend, own)?, made) {
            (Verdict::Done, made) => Ok(made),
            (Verdict::Refused(refusal), made) => {
                self.all_undone(tiers, op, made.map_or(Ok(()), |made| undo(&made)))?;
                Ok(Err(refusal))
            }
        }
    }

    /// Tells the other ranks of this rank's outcome and learns of theirs.
    ///
    /// # Errors
    /// As [`agreed`](Self::agreed).
    fn reach(
        &self,
        tiers: &[Arc<dyn DeviceComm>],
        op: OpKind,
        backend: &str,
        own: Result<()>,
    ) -> Result<Verdict> {
        self.agreement.reach(op, backend, own).inspect_err(|error| {
            // A closed communicator has nothing left to end, and goes on saying that it is closed.
            if !matches!(error, CommError::Closed { .. }) {
                tiers.iter().for_each(|tier| tier.abort());
            }
        })
    }

    /// Makes sure that all ranks have taken back what they had to; where one could not, the call has failed for good.
    ///
    /// # Errors
    /// As [`agreed`](Self::agreed).
    fn all_undone(&self, tiers: &[Arc<dyn DeviceComm>], op: OpKind, undone: Result<()>) -> Result<()> {
        let undone = undone.map_err(|cause| self.agreement.broken(op, cause));
        self.reach(tiers, op, super::NAME, undone).map(drop)
    }

    /// Makes sure that no rank refuses a call by itself, as `own` says of this one: it would leave the others waiting for it
    /// in their tiers.
    ///
    /// # Errors
    /// The refusal, on all ranks; or as [`agreed`](Self::agreed).
    fn all_know(&self, tiers: &[Arc<dyn DeviceComm>], op: OpKind, own: Result<()>) -> Result<()> {
        match self.reach(tiers, op, super::NAME, own)? {
            Verdict::Done => Ok(()),
            Verdict::Refused(refusal) => Err(refusal),
        }
    }

    /// # Safety
    /// As [`DeviceComm::free`].
    pub(super) unsafe fn free(&self, tiers: &[Arc<dyn DeviceComm>], addr: DeviceAddr) -> Result<()> {
        let unknown =
            || CommError::invalid("addr", format!("{addr:?} was not allocated here or was freed already"));
        let _turn = self.turn();
        let known = self.lock().allocations.contains_key(&addr.0);
        self.all_know(tiers, OpKind::Free, if known { Ok(()) } else { Err(unknown()) })?;
        let (owner, parts) = self.lock().allocations.remove(&addr.0).ok_or_else(unknown)?;
        let mut result = Ok(());
        for (index, registration) in &parts {
            // SAFETY: the caller vouches that nothing uses the range, which this registration covers.
            result = result.and(unsafe { tiers[*index].deregister(registration) });
        }
        // SAFETY: the address came from this tier; the caller vouches that nothing uses it.
        result.and(unsafe { tiers[owner].free(addr) })
    }

    /// Registers with every tier that can, on all ranks or on none.
    ///
    /// # Safety
    /// As [`DeviceComm::register`].
    pub(super) unsafe fn register(
        &self,
        tiers: &[Arc<dyn DeviceComm>],
        addr: DeviceAddr,
        bytes: usize,
    ) -> Result<Option<Registration>> {
        let _turn = self.turn();
        self.all_know(tiers, OpKind::Register, check::span("addr", addr, bytes, DType::U8).map(drop))?;
        let mut parts = Parts::new();
        for (index, tier) in tiers.iter().enumerate() {
            if !admits(&**tier, OpKind::Register, bytes) {
                continue;
            }
            // SAFETY: the caller vouches that the range outlives the registration.
            match unsafe { self.register_with(tiers, index, addr, bytes) }? {
                Ok(registration) => parts.push((index, registration)),
                Err(refusal) => {
                    let mut undone = Ok(());
                    for (done, registration) in &parts {
                        // SAFETY: the registration was made a moment ago and no work has used it. All ranks take it
                        // back, since all made it.
                        undone = undone.and(unsafe { tiers[*done].deregister(registration) });
                    }
                    self.all_undone(tiers, OpKind::Register, undone)?;
                    return Err(refusal);
                }
            }
        }
        if parts.is_empty() {
            return Ok(None);
        }
        let mut tables = self.lock();
        tables.next += 1;
        let registration = Registration { id: tables.next, addr, bytes, generation: tables.next };
        tables.registrations.insert(registration.id, (registration.clone(), parts));
        Ok(Some(registration))
    }

    /// # Safety
    /// As [`DeviceComm::deregister`].
    pub(super) unsafe fn deregister(
        &self,
        tiers: &[Arc<dyn DeviceComm>],
        registration: &Registration,
    ) -> Result<()> {
        let stale = || CommError::StaleHandle {
            handle: format!("registration {}", registration.id),
            reason: "it is not registered here, or not any more".into(),
        };
        let _turn = self.turn();
        let known =
            self.lock().registrations.get(&registration.id).is_some_and(|(own, _)| own == registration);
        self.all_know(tiers, OpKind::Deregister, if known { Ok(()) } else { Err(stale()) })?;
        let (_, parts) = self.lock().registrations.remove(&registration.id).ok_or_else(stale)?;
        let mut result = Ok(());
        for (index, part) in &parts {
            // SAFETY: the caller vouches that nothing uses the range.
            result = result.and(unsafe { tiers[*index].deregister(part) });
        }
        result
    }
}
