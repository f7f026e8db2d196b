//! Buffers that NCCL reaches without staging: memory of its own, and memory that callers register.

use std::collections::HashMap;
use std::ffi::c_void;
use std::hash::{BuildHasher, Hasher, RandomState};

use comm_core::{CallSite, CommError, Deadline, DeviceAddr, HostCommExt, OpKind, Registration, Result};

use super::comm::NcclComm;
use super::state::{Hosts, Native, Shared};
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

/// What a call asks of every rank, in the words of its refusal.
pub(crate) struct Asked<'a> {
    /// The argument that it was for.
    pub(crate) argument: &'static str,
    /// What a rank may be unable to do.
    pub(crate) what: &'a str,
}

/// Why one rank's part of a call did not work out, and whether its communicator is lost.
type Setback = (bool, CommError);

/// What a call has come to on all ranks, of which `all` say how their parts went. A rank whose communicator is lost ends the
/// call for good. Otherwise a part that did not work out is a refusal, which the ranks have in common whatever its cause.
fn verdict(own: usize, at: CallSite, asked: &Asked<'_>, all: &[Option<Setback>]) -> Result<()> {
    let setbacks = || all.iter().enumerate().filter_map(|(rank, setback)| Some((rank, setback.as_ref()?)));
    if let Some((_, (true, cause))) = setbacks().find(|(rank, _)| *rank == own) {
        return Err(cause.clone());
    }
    if let Some((rank, (_, cause))) = setbacks().find(|(_, (lost, _))| *lost) {
        return Err(CommError::PeerFailed { at, rank, cause: Box::new(cause.clone()) });
    }
    let Some((rank, (_, cause))) = setbacks().next() else { return Ok(()) };
    let Asked { argument, what } = asked;
    let reason =
        format!("rank {rank} cannot {what}: {cause}; so no rank did, and the communicator goes on without");
    Err(CommError::invalid(*argument, reason))
}

impl Shared {
    /// Makes a rank's success known to all, so that a collective that fails on one rank fails on all. Memory that is not to
    /// be had, say, leaves the communicator as it was: then all ranks get one and the same refusal.
    pub(crate) fn agree<T>(
        &self,
        hosts: &Hosts,
        op: OpKind,
        asked: &Asked<'_>,
        result: Result<T>,
    ) -> Result<T> {
        let own: Option<Setback> =
            result.as_ref().err().map(|error| (self.healthy().is_err(), error.clone()));
        let deadline = Deadline::after(self.base.timeout);
        let all = hosts.control.all_gather_by(&own, deadline);
        let all = all.map_err(|error| self.fail(self.relocate(error, Some(op))))?;
        verdict(self.info.rank, self.at(op, self.seq()), asked, &all)?;
        result
    }

    /// An error of a call that leaves the communicator as it was, unless it is the sign of one that does not: an error of
    /// the device's, which every call returns from then on, or one of NCCL's that the communicator keeps.
    fn sift(&self, native: &mut Native, error: CommError) -> CommError {
        // A capture on another stream neither forbids the look nor is spoilt by it.
        let _relaxed = RelaxedCapture::new();
        match watchdog::inspect(self, native) {
            Ok(_) => error,
            Err(found) => self.blame(found),
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
            let made = unsafe { library.mem_alloc(size) }.and_then(|addr| {
                // SAFETY: the communicator is live under the lock, and the range has just been allocated.
                let registered = unsafe { library.comm_register(comm, addr, size) };
                registered.map(|handle| (addr, handle)).inspect_err(|_| {
                    // SAFETY: nothing has used it. The first error is the one to report.
                    let _ = unsafe { library.mem_free(addr) };
                })
            });
            let (addr, handle) = made.map_err(|error| shared.sift(&mut call.native, error))?;
            call.native.buffers.allocations.insert(addr.0, Allocation { handle });
            Ok(addr)
        };
        let result = local();
        let mine = result.as_ref().ok().copied();
        let asked = Asked { argument: "bytes", what: &format!("allocate {bytes} bytes") };
        let agreed = shared.agree(&hosts, OpKind::Allocate, &asked, result);
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
            let handle = unsafe { shared.base.library.comm_register(call.native.comm, addr, bytes) }
                .map_err(|error| shared.sift(&mut call.native, error))?;
            Ok(call.native.buffers.enter(addr, bytes, handle))
        };
        let result = local();
        let mine = result.as_ref().ok().cloned();
        let asked = Asked { argument: "addr", what: &format!("register {bytes} bytes") };
        let agreed = shared.agree(&hosts, OpKind::Register, &asked, result);
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

    /// What every one of the ranks makes of the same setbacks.
    fn verdicts(all: &[Option<Setback>]) -> Vec<Result<()>> {
        let asked = Asked { argument: "bytes", what: "allocate 64 bytes" };
        let at = || CallSite::new("world", OpKind::Allocate, 3);
        (0..all.len()).map(|own| verdict(own, at(), &asked, all)).collect()
    }

    #[test]
    fn what_a_rank_lacks_is_a_refusal_and_the_same_on_all() {
        let lacks = CommError::Backend {
            backend: crate::NAME.into(),
            call: "ncclMemAlloc".into(),
            code: 1,
            message: "out of memory".into(),
        };
        assert!(lacks.is_fatal());
        let all = [None, Some((false, lacks.clone())), Some((false, CommError::invalid("addr", "null")))];
        for outcome in verdicts(&all) {
            let Err(CommError::InvalidArgument { argument, reason }) = outcome else { panic!("{outcome:?}") };
            assert_eq!(argument, "bytes");
            assert!(
                reason.starts_with("rank 1 cannot allocate 64 bytes: ") && reason.contains("out of memory")
            );
        }
        assert_eq!(verdicts(&[None, None]), [Ok(()), Ok(())]);
    }

    #[test]
    fn a_lost_communicator_is_no_refusal() {
        let closed = CommError::Closed { comm: "world".into() };
        let all = [None, Some((false, CommError::invalid("addr", "null"))), Some((true, closed.clone()))];
        let outcomes = verdicts(&all);
        assert_eq!(outcomes[2], Err(closed.clone()));
        for outcome in &outcomes[..2] {
            let Err(CommError::PeerFailed { rank: 2, cause, .. }) = outcome else { panic!("{outcome:?}") };
            assert_eq!(**cause, closed);
        }
    }

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
