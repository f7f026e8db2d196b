//! A backend that finds only at its creation that the ranks cannot use it: the tiered communicator does without it, on
//! all ranks alike, and nothing of the attempt is left.

#![allow(clippy::unwrap_used, reason = "these are tests, though not all of it is test functions")]

mod host_comm_util;
mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use comm_core::{
    AlgorithmUsage, BackendFactory, Capability, CommError, CommInfo, CreateContext, DType, Deadline,
    DeviceAddr, DeviceComm, HostComm, HostSliceExt, MemoryKind, OpKind, OpQuery, ReduceOp, Registry, Result,
    SkippedTier, StreamHandle, Support, TieredComm,
};
use host_comm_util::{Kind, run};
use support::{GatherBackend, GatherFactory};

const TIMEOUT: Duration = Duration::from_secs(3);

/// An end that can sum, and is counted as long as it exists.
struct Counted(GatherBackend, Arc<AtomicUsize>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.1.fetch_sub(1, Ordering::SeqCst);
    }
}

// SAFETY: the one operation is another right backend's.
unsafe impl DeviceComm for Counted {
    fn info(&self) -> &CommInfo {
        self.0.info()
    }

    fn supports(&self, query: &OpQuery) -> Support {
        if query.kind == OpKind::AllReduce { Support::Yes } else { Support::no("all-reduce only") }
    }

    fn usage(&self) -> Vec<AlgorithmUsage> {
        self.0.usage()
    }

    unsafe fn all_reduce(
        &self,
        send: DeviceAddr,
        recv: DeviceAddr,
        count: usize,
        dtype: DType,
        op: ReduceOp,
        stream: StreamHandle,
    ) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.0.all_reduce(send, recv, count, dtype, op, stream) }
    }

    fn poll(&self) -> Result<()> {
        self.0.poll()
    }

    fn abort(&self) {
        self.0.abort();
    }

    fn close(&self) -> Result<()> {
        self.0.close()
    }
}

/// Every rank's probe admits it; its creation may fail.
#[derive(Clone)]
struct Picky {
    create: fn(usize) -> Result<()>,
    /// The ranks meet while creating, as those of a backend that checks its devices do.
    meets: bool,
    /// Ends that exist, on all ranks.
    live: Arc<AtomicUsize>,
}

impl Picky {
    fn new(create: fn(usize) -> Result<()>, meets: bool) -> Self {
        Self { create, meets, live: Arc::default() }
    }
}

impl BackendFactory for Picky {
    fn name(&self) -> &str {
        "picky"
    }

    fn probe(&self, _: &CreateContext) -> Result<Capability> {
        Ok(Capability::default())
    }

    fn create(&self, context: &CreateContext, _: &[Capability]) -> Result<Arc<dyn DeviceComm>> {
        self.live.fetch_add(1, Ordering::SeqCst);
        let comm = GatherBackend::new("picky", context.host.clone(), context.timeout);
        let comm = Counted(comm, self.live.clone());
        (self.create)(context.host.rank())?;
        if self.meets {
            context.host.barrier(Deadline::after(context.timeout))?;
        }
        Ok(Arc::new(comm))
    }
}

fn refusal(rank: usize) -> CommError {
    CommError::unsupported(OpKind::Create, "picky", format!("rank {rank} is not reached"))
}

fn on_all(rank: usize) -> Result<()> {
    Err(refusal(rank))
}

fn on_one(rank: usize) -> Result<()> {
    if rank == 1 { Err(refusal(rank)) } else { Ok(()) }
}

fn create(picky: &Picky, names: &[&str], host: Arc<dyn HostComm>) -> Result<Arc<TieredComm>> {
    let mut registry = Registry::new();
    registry.register(Box::new(picky.clone()));
    registry.register(Box::new(GatherFactory::right()));
    let context = CreateContext { timeout: TIMEOUT, ..CreateContext::new(host, MemoryKind::Host) };
    registry.create_tiered(names, &context)
}

fn sums(comm: &dyn DeviceComm) {
    let mut data = [1_f32; 5];
    comm.all_reduce_slice_in_place(&mut data, ReduceOp::Sum).unwrap();
    assert_eq!(data, [comm.size() as f32; 5]);
}

/// Creates over each kind of host communicator and returns what the ranks skipped.
fn skips(picky: &Picky, names: &[&str]) -> Vec<SkippedTier> {
    let mut all = Vec::new();
    for kind in Kind::ALL {
        let start = Instant::now();
        all.extend(run(kind, 3, TIMEOUT, |host| {
            let comm = create(picky, names, host.clone()).unwrap();
            assert_eq!((comm.tiers().len(), &*comm.tiers()[0].info().backend), (1, "gather"));
            sums(&*comm);
            // The ranks' host side is in step and none the worse: they can try all of it again.
            host.barrier(Deadline::after(TIMEOUT)).unwrap();
            assert_eq!(create(picky, names, host.clone()).unwrap().skipped(), comm.skipped());
            comm.close().unwrap();
            let [skipped] = comm.skipped() else { panic!("{:?}", comm.skipped()) };
            skipped.clone()
        }));
        assert!(start.elapsed() < TIMEOUT, "{kind:?}: some rank waited for its timeout");
        assert_eq!(picky.live.load(Ordering::SeqCst), 0, "{kind:?}: ends of the attempt are left");
    }
    all
}

/// The same refusal on every rank, of the rank that it should be of.
fn of_rank(skipped: &[SkippedTier], rank: usize) {
    let reason = CommError::CreationFailed { backend: "picky".into(), rank, cause: Box::new(refusal(rank)) };
    assert!(skipped.iter().all(|tier| tier.backend == "picky" && tier.reason == reason), "{skipped:?}");
}

#[test]
fn what_all_ranks_refuse_is_skipped_with_the_reason() {
    of_rank(&skips(&Picky::new(on_all, false), &["picky", "gather"]), 0);
    of_rank(&skips(&Picky::new(on_all, true), &["gather", "picky"]), 0);
}

#[test]
fn what_one_rank_refuses_is_skipped_by_all() {
    // The others are waiting for it while they create, or have created by then.
    of_rank(&skips(&Picky::new(on_one, true), &["picky", "gather"]), 1);
    of_rank(&skips(&Picky::new(on_one, false), &["picky", "gather"]), 1);
}

/// Creates with `picky` behind and before another tier; the ranks' one error.
fn fails(create_step: fn(usize) -> Result<()>) -> CommError {
    let mut all = Vec::new();
    for (names, meets) in [(["picky", "gather"], true), (["gather", "picky"], false)] {
        let picky = Picky::new(create_step, meets);
        all.extend(run(Kind::Thread, 3, TIMEOUT, |host| create(&picky, &names, host).map(drop).unwrap_err()));
        assert_eq!(picky.live.load(Ordering::SeqCst), 0);
    }
    assert!(all.iter().all(|error| *error == all[0]), "{all:#?}");
    all.swap_remove(0)
}

fn cause(error: CommError, rank: usize) -> CommError {
    match error {
        CommError::CreationFailed { rank: found, cause, .. } if found == rank => *cause,
        other => panic!("{other:?}"),
    }
}

#[test]
fn every_other_error_fails_the_creation() {
    fn device(rank: usize) -> Result<()> {
        let error = CommError::Cuda { call: "cuMemCreate".into(), code: 2, message: "out of memory".into() };
        if rank == 2 { Err(error) } else { Ok(()) }
    }
    fn argument(rank: usize) -> Result<()> {
        if rank == 2 { Err(CommError::invalid("options", "no such table")) } else { Ok(()) }
    }
    fn another_operation(rank: usize) -> Result<()> {
        if rank == 2 { Err(CommError::unsupported(OpKind::Split, "picky", "no groups")) } else { Ok(()) }
    }
    fn panics(rank: usize) -> Result<()> {
        assert_ne!(rank, 2, "no such luck");
        Ok(())
    }
    for step in [device, argument, another_operation] {
        assert_eq!(cause(fails(step), 2), step(2).unwrap_err());
    }
    let panic = cause(fails(panics), 2);
    assert!(matches!(panic, CommError::Backend { .. }), "{panic:?}");
}

/// A refusal is no excuse for what went wrong besides, whichever rank it went wrong on.
#[test]
fn a_refusal_does_not_hide_another_ranks_failure() {
    fn both(rank: usize) -> Result<()> {
        match rank {
            2 => Err(CommError::invalid("options", "no such table")),
            _ => Err(refusal(rank)),
        }
    }
    assert_eq!(cause(fails(both), 2), both(2).unwrap_err());
}

#[test]
fn without_another_tier_the_refusal_is_the_error() {
    let picky = Picky::new(on_one, true);
    for tiered in [true, false] {
        let errors = run(Kind::Thread, 3, TIMEOUT, |host| {
            if tiered {
                return create(&picky, &["picky"], host).map(drop).unwrap_err();
            }
            let context = CreateContext::new(host, MemoryKind::Host);
            comm_core::create_with(&picky, &context).map(drop).unwrap_err()
        });
        for error in errors {
            assert_eq!(cause(error, 1), refusal(1));
        }
    }
}
