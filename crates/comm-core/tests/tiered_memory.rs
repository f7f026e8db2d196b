//! The tiered communicator's memory calls: what a tier refuses on one rank, no rank keeps.

#![allow(clippy::unwrap_used, reason = "these are tests, though not all of it is test functions")]

mod support;

use std::collections::HashSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use comm_core::{
    AlgorithmUsage, BackendFactory, Capability, CommError, CommInfo, CreateContext, DType, Deadline,
    DeviceAddr, DeviceComm, HostComm, HostSliceExt, MemoryKind, OpKind, OpQuery, ReduceOp, Registration,
    Registry, Result, Support, run_threads,
};
use support::GatherFactory;

const TIMEOUT: Duration = Duration::from_secs(2);

/// A tier that registers memory and does nothing else. On a rank that `refuses` it registers nothing, and on one that
/// `keeps` it never lets go.
struct Registers {
    info: CommInfo,
    host: Arc<dyn HostComm>,
    refuses: bool,
    keeps: bool,
    live: Mutex<HashSet<u64>>,
    aborted: Mutex<bool>,
}

// SAFETY: it touches no memory.
unsafe impl DeviceComm for Registers {
    fn info(&self) -> &CommInfo {
        &self.info
    }

    unsafe fn register(&self, addr: DeviceAddr, bytes: usize) -> Result<Registration> {
        if self.refuses {
            return Err(CommError::invalid("addr", "not this backend's kind of memory"));
        }
        self.live.lock().unwrap().insert(addr.0);
        Ok(Registration { id: addr.0, addr, bytes, generation: 1 })
    }

    unsafe fn deregister(&self, registration: &Registration) -> Result<()> {
        if self.keeps {
            return Err(CommError::StaleHandle {
                handle: "it".into(),
                reason: "cannot be taken back".into(),
            });
        }
        assert!(self.live.lock().unwrap().remove(&registration.id), "not registered");
        Ok(())
    }

    fn supports(&self, query: &OpQuery) -> Support {
        match query.kind {
            OpKind::Register | OpKind::Deregister => Support::Yes,
            _ => Support::no("registers memory only"),
        }
    }

    fn usage(&self) -> Vec<AlgorithmUsage> {
        Vec::new()
    }

    fn poll(&self) -> Result<()> {
        Ok(())
    }

    fn abort(&self) {
        *self.aborted.lock().unwrap() = true;
    }

    fn close(&self) -> Result<()> {
        self.host.barrier(Deadline::after(TIMEOUT))
    }
}

/// Makes [`Registers`] that this test keeps a handle on.
#[derive(Default)]
struct RegistersFactory {
    name: &'static str,
    refuses_on: Option<usize>,
    keeps_on: Option<usize>,
    made: Arc<Mutex<Vec<Arc<Registers>>>>,
}

impl BackendFactory for RegistersFactory {
    fn name(&self) -> &str {
        self.name
    }

    fn probe(&self, _: &CreateContext) -> Result<Capability> {
        Ok(Capability::default())
    }

    fn create(&self, context: &CreateContext, _: &[Capability]) -> Result<Arc<dyn DeviceComm>> {
        let host = context.host.clone();
        let info = CommInfo {
            name: host.name().into(),
            backend: self.name.to_owned().into(),
            rank: host.rank(),
            size: host.size(),
            memory: MemoryKind::Host,
        };
        let comm = Arc::new(Registers {
            refuses: self.refuses_on == Some(info.rank),
            keeps: self.keeps_on == Some(info.rank),
            info,
            host,
            live: Mutex::default(),
            aborted: Mutex::default(),
        });
        self.made.lock().unwrap().push(comm.clone());
        Ok(comm)
    }
}

/// A tiered communicator of a tier `first` that registers, the complete test backend, and a tier `last` that refuses to
/// register on one rank; with this rank's ends of the first and the last.
fn tiers(
    host: Arc<dyn HostComm>,
    refuses_on: Option<usize>,
    keeps_on: Option<usize>,
) -> (Arc<dyn DeviceComm>, Vec<Arc<Registers>>) {
    let made = Arc::new(Mutex::new(Vec::new()));
    let mut registry = Registry::new();
    let factory =
        |name, refuses_on, keeps_on| RegistersFactory { name, refuses_on, keeps_on, made: made.clone() };
    registry.register(Box::new(factory("first", None, keeps_on)));
    registry.register(Box::new(GatherFactory::right()));
    registry.register(Box::new(factory("last", refuses_on, None)));
    let context = CreateContext::new(host, MemoryKind::Host);
    let comm = registry.create_tiered(&["first", "gather", "last"], &context).unwrap();
    let made = std::mem::take(&mut *made.lock().unwrap());
    (comm, made)
}

fn works(comm: &dyn DeviceComm) {
    let mut data = [1_f32; 3];
    comm.all_reduce_slice_in_place(&mut data, ReduceOp::Sum).unwrap();
    assert_eq!(data, [3.0; 3]);
}

#[test]
fn a_registration_that_one_rank_refuses_is_kept_by_none() {
    run_threads(3, TIMEOUT, |host| {
        let (comm, ends) = tiers(host, Some(1), None);
        let live = || ends.iter().map(|end| end.live.lock().unwrap().len()).collect::<Vec<_>>();
        let data = [0_u8; 64];
        for _ in 0..2 {
            // SAFETY: the array outlives the communicator's use of it, of which there is none.
            let error = unsafe { comm.register(DeviceAddr::of_slice(&data), 64) }.unwrap_err();
            assert!(!error.is_fatal() && error.to_string().contains("kind of memory"), "{error:?}");
            assert_eq!(error.to_string().contains("rank 1"), comm.rank() != 1, "{error}");
            assert_eq!(live(), [0, 0]);
            works(&*comm);
        }
        // An allocation is good without that tier, and is given back to those that know it.
        let addr = comm.allocate(256).unwrap();
        assert_eq!(live(), [1, 0]);
        // SAFETY: nothing uses it.
        unsafe { comm.free(addr) }.unwrap();
        assert_eq!(live(), [0, 0]);
        works(&*comm);
        comm.close().unwrap();
    })
    .unwrap();
}

#[test]
fn what_all_tiers_take_is_registered_with_all() {
    run_threads(3, TIMEOUT, |host| {
        let (comm, ends) = tiers(host, None, None);
        let live = || ends.iter().map(|end| end.live.lock().unwrap().len()).collect::<Vec<_>>();
        let data = [0_u8; 64];
        // SAFETY: the array outlives the registration.
        let registration = unsafe { comm.register(DeviceAddr::of_slice(&data), 64) }.unwrap();
        assert_eq!(live(), [1, 1]);
        // SAFETY: nothing uses it.
        unsafe { comm.deregister(&registration) }.unwrap();
        assert_eq!(live(), [0, 0]);
        let addr = comm.allocate(64).unwrap();
        assert_eq!(live(), [1, 1]);
        // SAFETY: nothing uses it.
        unsafe { comm.free(addr) }.unwrap();
        assert_eq!(live(), [0, 0]);
        comm.close().unwrap();
    })
    .unwrap();
}

/// Whose memory or registration one rank does not know, all ranks keep.
#[test]
fn what_one_rank_does_not_know_no_rank_gives_back() {
    run_threads(3, TIMEOUT, |host| {
        let (comm, ends) = tiers(host, None, None);
        let live = || ends.iter().map(|end| end.live.lock().unwrap().len()).collect::<Vec<_>>();
        let wrong = comm.rank() == 1;
        let addr = comm.allocate(64).unwrap();
        // SAFETY: nothing uses it.
        let error = unsafe { comm.free(if wrong { addr.offset(8) } else { addr }) }.unwrap_err();
        assert!(!error.is_fatal() && error.to_string().contains("not allocated here"), "{error:?}");
        assert_eq!(live(), [1, 1]);
        // SAFETY: as above.
        unsafe { comm.free(addr) }.unwrap();
        assert_eq!(live(), [0, 0]);

        let data = [0_u8; 64];
        // SAFETY: the array outlives the registration.
        let right = unsafe { comm.register(DeviceAddr::of_slice(&data), 64) }.unwrap();
        let other = Registration { bytes: 32, ..right.clone() };
        // SAFETY: nothing uses it.
        let error = unsafe { comm.deregister(if wrong { &other } else { &right }) }.unwrap_err();
        assert!(!error.is_fatal() && error.to_string().contains("not registered here"), "{error:?}");
        assert_eq!(live(), [1, 1]);
        // SAFETY: as above.
        unsafe { comm.deregister(&right) }.unwrap();
        assert_eq!(live(), [0, 0]);
        works(&*comm);
        comm.close().unwrap();
    })
    .unwrap();
}

#[test]
fn an_argument_that_is_wrong_on_one_rank_is_refused_on_all() {
    run_threads(3, TIMEOUT, |host| {
        let (comm, ends) = tiers(host, None, None);
        let data = [0_u8; 64];
        let addr = if comm.rank() == 2 { DeviceAddr::NULL } else { DeviceAddr::of_slice(&data) };
        // SAFETY: the array outlives the communicator's use of it, of which there is none.
        let error = unsafe { comm.register(addr, 64) }.unwrap_err();
        assert!(!error.is_fatal(), "{error:?}");
        assert!(ends.iter().all(|end| end.live.lock().unwrap().is_empty()));
        works(&*comm);
    })
    .unwrap();
}

/// Half a registration cannot stay: where one rank's tier does not let go of it, the tiers end on all ranks.
#[test]
fn a_registration_that_cannot_be_taken_back_ends_the_communicator_on_all_ranks() {
    let start = std::time::Instant::now();
    run_threads(3, TIMEOUT, |host| {
        let (comm, ends) = tiers(host, Some(1), Some(0));
        let data = [0_u8; 64];
        // SAFETY: the array outlives the communicator's use of it, of which there is none.
        let error = unsafe { comm.register(DeviceAddr::of_slice(&data), 64) }.unwrap_err();
        let CommError::PeerFailed { rank: 0, .. } = &error else { panic!("{error:?}") };
        assert!(error.to_string().contains("taken back"), "{error}");
        assert!(ends.iter().all(|end| *end.aborted.lock().unwrap()));
        assert!(comm.all_reduce_slice_in_place(&mut [1_f32], ReduceOp::Sum).unwrap_err().is_fatal());
        assert!(comm.allocate(64).unwrap_err().is_fatal());
    })
    .unwrap();
    assert!(start.elapsed() < TIMEOUT);
}

#[test]
fn groups_agree_among_themselves() {
    run_threads(3, TIMEOUT, |host| {
        let mut registry = Registry::new();
        registry.register(Box::new(GatherFactory::right()));
        let comm = registry.create_tiered(&["gather"], &CreateContext::new(host, MemoryKind::Host)).unwrap();
        let group = comm.split(Some(u32::from(comm.rank() == 2)), 0).unwrap().unwrap();
        // The groups make different numbers of calls.
        for _ in 0..=comm.rank() / 2 {
            let query = OpQuery::new(OpKind::Allocate, DType::U8, 64);
            assert!(group.supports(&query).is_supported());
            let addr = group.allocate(64).unwrap();
            // SAFETY: nothing uses it.
            unsafe { group.free(addr) }.unwrap();
        }
        assert!(comm.split(None, 0).unwrap().is_none());
    })
    .unwrap();
}
