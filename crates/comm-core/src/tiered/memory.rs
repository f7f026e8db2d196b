//! Which tier knows which memory.
//!
//! Owns the bookkeeping only: every address stays valid or not as the tier that gave it says.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::addr::DeviceAddr;
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

#[derive(Default)]
pub(super) struct TierMemory {
    tables: Mutex<Tables>,
}

fn admits(tier: &dyn DeviceComm, kind: OpKind, bytes: usize) -> bool {
    tier.supports(&OpQuery::new(kind, DType::U8, bytes)).is_supported()
}

impl TierMemory {
    fn lock(&self) -> MutexGuard<'_, Tables> {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Allocates from the first tier that can and registers the memory with the others that can.
    pub(super) fn allocate(&self, tiers: &[Arc<dyn DeviceComm>], bytes: usize) -> Result<Option<DeviceAddr>> {
        let Some(owner) = tiers.iter().position(|tier| admits(&**tier, OpKind::Allocate, bytes)) else {
            return Ok(None);
        };
        let addr = tiers[owner].allocate(bytes)?;
        let mut parts = Parts::new();
        for (index, tier) in tiers.iter().enumerate() {
            if index == owner || bytes == 0 || !admits(&**tier, OpKind::Register, bytes) {
                continue;
            }
            // SAFETY: the range is the allocation just made; `free` deregisters it before it is given back.
            match unsafe { tier.register(addr, bytes) } {
                Ok(registration) => parts.push((index, registration)),
                Err(error) if error.is_fatal() => return Err(error),
                // Registration only saves a copy, and some libraries do not take each other's memory.
                Err(error) => tracing::debug!(backend = %tier.info().backend, %error, "not registered"),
            }
        }
        self.lock().allocations.insert(addr.0, (owner, parts));
        Ok(Some(addr))
    }

    /// # Safety
    /// As [`DeviceComm::free`].
    pub(super) unsafe fn free(&self, tiers: &[Arc<dyn DeviceComm>], addr: DeviceAddr) -> Result<()> {
        let (owner, parts) = self.lock().allocations.remove(&addr.0).ok_or_else(|| {
            CommError::invalid("addr", format!("{addr:?} was not allocated here or was freed already"))
        })?;
        let mut result = Ok(());
        for (index, registration) in &parts {
            // SAFETY: the caller vouches that nothing uses the range, which this registration covers.
            result = result.and(unsafe { tiers[*index].deregister(registration) });
        }
        // SAFETY: the address came from this tier; the caller vouches that nothing uses it.
        result.and(unsafe { tiers[owner].free(addr) })
    }

    /// Registers with every tier that can.
    ///
    /// # Safety
    /// As [`DeviceComm::register`].
    pub(super) unsafe fn register(
        &self,
        tiers: &[Arc<dyn DeviceComm>],
        addr: DeviceAddr,
        bytes: usize,
    ) -> Result<Option<Registration>> {
        let mut parts = Parts::new();
        for (index, tier) in tiers.iter().enumerate() {
            if !admits(&**tier, OpKind::Register, bytes) {
                continue;
            }
            // SAFETY: the caller vouches that the range outlives the registration.
            match unsafe { tier.register(addr, bytes) } {
                Ok(registration) => parts.push((index, registration)),
                Err(error) => {
                    for (done, registration) in &parts {
                        // SAFETY: the registration was made a moment ago and no work has used it.
                        drop(unsafe { tiers[*done].deregister(registration) });
                    }
                    return Err(error);
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
        let parts = {
            let mut tables = self.lock();
            match tables.registrations.get(&registration.id) {
                Some((known, _)) if known == registration => tables.registrations.remove(&registration.id),
                _ => None,
            }
        };
        let (_, parts) = parts.ok_or_else(|| CommError::StaleHandle {
            handle: format!("registration {}", registration.id),
            reason: "it is not registered here, or not any more".into(),
        })?;
        let mut result = Ok(());
        for (index, part) in &parts {
            // SAFETY: the caller vouches that nothing uses the range.
            result = result.and(unsafe { tiers[*index].deregister(part) });
        }
        result
    }
}
