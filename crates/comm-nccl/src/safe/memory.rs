//! Buffers that NCCL reaches without staging: memory of its own, and memory that callers register.

use std::collections::HashMap;
use std::ffi::c_void;
use std::hash::{BuildHasher, Hasher, RandomState};

use comm_core::{CommError, Deadline, DeviceAddr, HostCommExt, OpKind, Registration, Result};

use super::comm::NcclComm;
use super::state::{Hosts, Shared};
use super::watchdog;
use crate::driver::{Current, RelaxedCapture};
use crate::result::NcclLibrary;
use crate::sys;

struct Allocation {
    handle: *mut c_void,
}

struct Registered {
    registration: Registration,
    handle: *mut c_void,
}

/// The communicator's tables. Used only under its lock.
pub(crate) struct Buffers {
    allocations: HashMap<u64, Allocation>,
    registrations: HashMap<u64, Registered>,
    /// Numbers handed out so far. They are never used again.
    issued: u64,
    /// All registrations' generation: a number of this table's own, since other communicators give out the same ids, for
    /// the same ranges too.
    generation: u64,
}

impl Default for Buffers {
    fn default() -> Self {
        // The standard library's one source of numbers that differ from one another.
        let generation = RandomState::new().build_hasher().finish();
        Self { allocations: HashMap::new(), registrations: HashMap::new(), issued: 0, generation }
    }
}

impl Buffers {
    fn enter(&mut self, addr: DeviceAddr, bytes: usize, handle: *mut c_void) -> Registration {
        let registration = Registration { id: self.issued, addr, bytes, generation: self.generation };
        self.issued += 1;
        self.registrations.insert(registration.id, Registered { registration: registration.clone(), handle });
        registration
    }

    /// The handle of a registration that is this table's, all of it, and is so no longer.
    fn leave(&mut self, registration: &Registration) -> Option<*mut c_void> {
        let known = self.registrations.get(&registration.id)?.registration == *registration;
        known.then(|| self.registrations.remove(&registration.id)).flatten().map(|left| left.handle)
    }

    /// Gives everything back; handles only while there is still a communicator to give them to.
    pub(crate) fn give_back(&mut self, library: &NcclLibrary, comm: *mut sys::Comm) {
        let allocations: Vec<_> = self.allocations.drain().collect();
        let registered = self.registrations.drain().map(|(_, r)| r.handle);
        for handle in registered.chain(allocations.iter().map(|(_, a)| a.handle)) {
            if !comm.is_null() && !handle.is_null() {
                // SAFETY: the handle is from this communicator, has not been given back, and no work is left.
                if let Err(error) = unsafe { library.comm_deregister(comm, handle) } {
                    tracing::warn!(%error, "deregistering a buffer at a communicator's end");
                }
            }
        }
        for (addr, _) in allocations {
            // SAFETY: the address is from `mem_alloc`, has not been freed, and the communicator's work has ended.
            if let Err(error) = unsafe { library.mem_free(DeviceAddr(addr)) } {
                tracing::warn!(%error, "freeing a buffer at a communicator's end");
            }
        }
    }
}

impl Shared {
    /// Makes a rank's success known to all, so that a collective that fails on one rank fails on all.
    pub(crate) fn agree<T>(&self, hosts: &Hosts, op: OpKind, result: Result<T>) -> Result<T> {
        let own = result.as_ref().err().cloned();
        let deadline = Deadline::after(self.base.timeout);
        let all: Vec<Option<CommError>> = hosts
            .control
            .all_gather_by(&own, deadline)
            .map_err(|error| self.fail(self.relocate(error, Some(op))))?;
        let value = result?;
        match all.into_iter().enumerate().find_map(|(rank, error)| Some((rank, error?))) {
            None => Ok(value),
            Some((rank, cause)) => {
                let at = self.at(op, self.seq());
                Err(CommError::PeerFailed { at, rank, cause: Box::new(cause) })
            }
        }
    }

    /// Refuses a collective whose size differs between the ranks.
    fn same_bytes(&self, hosts: &Hosts, op: OpKind, bytes: usize) -> Result<()> {
        let deadline = Deadline::after(self.base.timeout);
        let all: Vec<u64> = hosts
            .control
            .all_gather_by(&(bytes as u64), deadline)
            .map_err(|error| self.fail(self.relocate(error, Some(op))))?;
        match all.iter().position(|&other| other != bytes as u64) {
            None => Ok(()),
            Some(rank) => Err(CommError::Mismatch {
                at: self.at(op, self.seq()),
                rank,
                expected: format!("{op} of {bytes} bytes"),
                found: format!("{op} of {} bytes", all[rank]),
            }),
        }
    }
}

impl NcclComm {
    pub(super) fn allocate_buffer(&self, bytes: usize) -> Result<DeviceAddr> {
        let shared = self.shared();
        shared.healthy()?;
        let hosts = shared.hosts()?;
        shared.same_bytes(&hosts, OpKind::Allocate, bytes)?;
        let local = || -> Result<DeviceAddr> {
            let mut call = shared.begin(OpKind::Allocate)?;
            let (library, comm) = (&shared.base.library, call.native.comm);
            let size = bytes.max(1);
            // SAFETY: the device is current; the address is kept until it is freed.
            let addr = unsafe { library.mem_alloc(size) }?;
            // SAFETY: the communicator is live under the lock, and the range has just been allocated.
            let handle = match unsafe { library.comm_register(comm, addr, size) } {
                Ok(handle) => handle,
                Err(error) => {
                    // SAFETY: nothing has used it. The first error is the one to report.
                    let _ = unsafe { library.mem_free(addr) };
                    return Err(error);
                }
            };
            call.native.buffers.allocations.insert(addr.0, Allocation { handle });
            Ok(addr)
        };
        let result = local();
        let mine = result.as_ref().ok().copied();
        let agreed = shared.agree(&hosts, OpKind::Allocate, result);
        if agreed.is_err()
            && let Some(addr) = mine
        {
            // SAFETY: no rank has been given it. The first error is the one to report.
            let _ = unsafe { self.free_buffer(addr) };
        }
        agreed
    }

    /// # Safety
    /// No work uses the allocation.
    pub(super) unsafe fn free_buffer(&self, addr: DeviceAddr) -> Result<()> {
        let shared = self.shared();
        shared.healthy()?;
        // Somebody's capture elsewhere neither forbids what follows nor is spoilt by it.
        let _relaxed = RelaxedCapture::new();
        // Freeing waits inside the driver for the device's work. That wait is watched here, where it can be.
        let _current = Current::enter(&shared.base.context).map_err(|error| shared.fail(error))?;
        watchdog::quiesce(shared, OpKind::Free)?;
        let mut call = shared.begin(OpKind::Free)?;
        let allocation = call.native.buffers.allocations.remove(&addr.0).ok_or_else(|| {
            CommError::invalid(
                "addr",
                format!(
                    "{addr:?} was not allocated by communicator {:?}, or was freed already",
                    shared.info.name
                ),
            )
        })?;
        let (library, comm) = (&shared.base.library, call.native.comm);
        if !allocation.handle.is_null() {
            // SAFETY: the handle is from this communicator and has just left the table; the caller vouches that no
            // work uses it.
            call.fatal(unsafe { library.comm_deregister(comm, allocation.handle) })?;
        }
        // So that the watchdog can look while the driver frees.
        drop(call);
        // SAFETY: the address is from `mem_alloc` and has just left the table.
        unsafe { library.mem_free(addr) }.map_err(|error| shared.fail(error))
    }

    /// # Safety
    /// The range stays allocated until it is deregistered.
    pub(super) unsafe fn register_buffer(&self, addr: DeviceAddr, bytes: usize) -> Result<Registration> {
        let shared = self.shared();
        shared.healthy()?;
        let hosts = shared.hosts()?;
        shared.same_bytes(&hosts, OpKind::Register, bytes)?;
        let local = || -> Result<Registration> {
            if addr.is_null() || bytes == 0 {
                return Err(CommError::invalid(
                    "addr",
                    "a registration needs an address and at least one byte",
                ));
            }
            let mut call = shared.begin(OpKind::Register)?;
            // SAFETY: the communicator is live under the lock; the caller vouches for the range.
            let handle = unsafe { shared.base.library.comm_register(call.native.comm, addr, bytes) }?;
            Ok(call.native.buffers.enter(addr, bytes, handle))
        };
        let result = local();
        let mine = result.as_ref().ok().cloned();
        let agreed = shared.agree(&hosts, OpKind::Register, result);
        if agreed.is_err()
            && let Some(registration) = mine
        {
            // SAFETY: no operation has used it. The first error is the one to report.
            let _ = unsafe { self.deregister_buffer(&registration) };
        }
        agreed
    }

    /// # Safety
    /// No work uses the range.
    pub(super) unsafe fn deregister_buffer(&self, registration: &Registration) -> Result<()> {
        let shared = self.shared();
        let mut call = shared.begin(OpKind::Deregister)?;
        let Some(handle) = call.native.buffers.leave(registration) else {
            return Err(CommError::StaleHandle {
                handle: format!("registration {} of {:?}", registration.id, registration.addr),
                reason: format!("communicator {:?} has deregistered it, or never made it", shared.info.name),
            });
        };
        if handle.is_null() {
            return Ok(());
        }
        let (library, comm) = (&shared.base.library, call.native.comm);
        // SAFETY: the handle is from this communicator and has just left the table; the caller vouches that no work
        // uses it.
        call.fatal(unsafe { library.comm_deregister(comm, handle) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_registration_is_one_communicator_s_and_one_range_s() {
        let handle = std::ptr::dangling_mut();
        let (mut own, mut other) = (Buffers::default(), Buffers::default());
        let [first, second] = [256, 512].map(|addr| own.enter(DeviceAddr(addr), 64, handle));
        // The same range, registered with another communicator under the same number.
        let elsewhere = other.enter(DeviceAddr(256), 64, handle);
        assert_eq!((elsewhere.id, elsewhere.addr), (first.id, first.addr));
        let forged = [
            elsewhere,
            Registration { addr: DeviceAddr(512), ..first.clone() },
            Registration { bytes: 128, ..first.clone() },
            Registration { id: 7, ..first.clone() },
        ];
        for wrong in &forged {
            assert_eq!(own.leave(wrong), None, "{wrong:?}");
        }
        for right in [&first, &second] {
            assert_eq!(own.leave(right), Some(handle));
            assert_eq!(own.leave(right), None);
        }
    }
}
