//! What a tiered communicator makes of a tier that fails: its own end, on all ranks, and its cause.

#![allow(clippy::unwrap_used, reason = "these are tests, though not all of it is test functions")]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use comm_core::{
    AlgorithmUsage, BackendFactory, Capability, CommError, CommInfo, CreateContext, DType, Deadline,
    DeviceAddr, DeviceComm, HostComm, HostSliceExt, MemoryKind, OpKind, OpQuery, ReduceOp, Registry, Result,
    StreamHandle, Support, ThreadComm, TieredComm, TwoGroupNormArgs, run_threads,
};
use support::{GatherBackend, GatherFactory};

const TIMEOUT: Duration = Duration::from_secs(10);
/// The rank whose device fails.
const DOOMED: usize = 1;

fn broken() -> CommError {
    CommError::Cuda { call: "cuEventQuery".into(), code: 700, message: "illegal address".into() }
}

/// A tier of barriers, the first of which is the end of it on one rank. It tells nobody.
struct Barriers {
    inner: GatherBackend,
    failed: AtomicBool,
}

// SAFETY: it touches no memory.
unsafe impl DeviceComm for Barriers {
    fn info(&self) -> &CommInfo {
        self.inner.info()
    }

    fn supports(&self, query: &OpQuery) -> Support {
        match query.kind {
            OpKind::Barrier | OpKind::AllReduceRmsNormTwoGroup => Support::Yes,
            _ => Support::no("barriers only"),
        }
    }

    fn usage(&self) -> Vec<AlgorithmUsage> {
        Vec::new()
    }

    unsafe fn barrier(&self, _: StreamHandle) -> Result<()> {
        self.failed.store(self.rank() == DOOMED, Ordering::SeqCst);
        self.poll()
    }

    /// Fails as the gather group does.
    unsafe fn all_reduce_rmsnorm_two_group(
        &self,
        gather: &dyn DeviceComm,
        _: &TwoGroupNormArgs<'_>,
        _: StreamHandle,
    ) -> Result<()> {
        gather.poll()
    }

    fn poll(&self) -> Result<()> {
        if self.failed.load(Ordering::SeqCst) { Err(broken()) } else { self.inner.poll() }
    }

    fn abort(&self) {
        self.inner.abort();
    }

    fn close(&self) -> Result<()> {
        self.inner.close()
    }
}

struct BarriersFactory;

impl BackendFactory for BarriersFactory {
    fn name(&self) -> &str {
        "barriers"
    }

    fn probe(&self, _: &CreateContext) -> Result<Capability> {
        Ok(Capability::default())
    }

    fn create(&self, context: &CreateContext, _: &[Capability]) -> Result<Arc<dyn DeviceComm>> {
        let inner = GatherBackend::new("barriers", context.host.clone(), context.timeout);
        Ok(Arc::new(Barriers { inner, failed: AtomicBool::new(false) }))
    }
}

/// Runs `body` on the ranks of a communicator of barriers and, for all else, the test backend, with another one on which the
/// ranks meet.
fn on_ranks(size: usize, body: impl Fn(Arc<TieredComm>, &dyn HostComm) + Sync) {
    run_threads(size, TIMEOUT, |host| {
        let mut registry = Registry::new();
        registry.register(Box::new(BarriersFactory));
        registry.register(Box::new(GatherFactory::right()));
        let context = CreateContext::new(host.clone(), MemoryKind::Host);
        body(registry.create_tiered(&["barriers", "gather"], &context).unwrap(), &*host);
    })
    .unwrap();
}

fn sum(comm: &TieredComm) -> Result<()> {
    comm.all_reduce_slice_in_place(&mut [1_f32; 3], ReduceOp::Sum)
}

fn meet(host: &dyn HostComm) {
    host.barrier(Deadline::after(TIMEOUT)).unwrap();
}

fn barrier(comm: &TieredComm) -> Result<()> {
    // SAFETY: there are no streams, and no operands.
    unsafe { comm.barrier(StreamHandle::NULL) }
}

#[test]
fn a_tier_s_failure_is_the_end_of_all_tiers_on_all_ranks() {
    on_ranks(3, |comm, host| {
        sum(&comm).unwrap();
        // All have that result before the failure, which ends every wait.
        meet(host);
        let start = Instant::now();
        let error = match comm.rank() {
            DOOMED => barrier(&comm).unwrap_err(),
            // In the other tier, which does not fail by itself.
            0 => sum(&comm).unwrap_err(),
            // In no call.
            _ => loop {
                if let Err(error) = comm.poll() {
                    break error;
                }
                assert!(start.elapsed() < TIMEOUT);
                std::thread::sleep(Duration::from_millis(1));
            },
        };
        assert!(start.elapsed() < TIMEOUT / 2, "{:?}", start.elapsed());
        match &error {
            CommError::PeerFailed { rank: DOOMED, cause, .. } if comm.rank() != DOOMED => {
                assert_eq!(**cause, broken());
            }
            error => assert!(comm.rank() == DOOMED && *error == broken(), "{error:?}"),
        }
        // The same from then on, whichever tier a call would have gone to.
        assert_eq!(sum(&comm).unwrap_err(), error);
        assert_eq!(barrier(&comm).unwrap_err(), error);
        assert_eq!(comm.allocate(64).unwrap_err(), error);
        assert_eq!(comm.split(Some(0), 0).map(drop).unwrap_err(), error);
        assert_eq!(comm.poll().unwrap_err(), error);
        assert_eq!(comm.close().unwrap_err(), error);
        assert_eq!(comm.close().unwrap_err(), error);
        meet(host);
    });
}

#[test]
fn an_abort_is_one_and_a_close_too() {
    on_ranks(2, |comm, host| {
        let error = if comm.rank() == 0 {
            comm.abort();
            sum(&comm).unwrap_err()
        } else {
            sum(&comm).unwrap_err()
        };
        match comm.rank() {
            0 => assert!(matches!(error, CommError::Aborted { .. }), "{error:?}"),
            _ => assert!(matches!(error, CommError::PeerFailed { rank: 0, .. }), "{error:?}"),
        }
        assert_eq!(barrier(&comm).unwrap_err(), error);
        meet(host);
    });
    on_ranks(2, |comm, _| {
        comm.close().unwrap();
        for outcome in [sum(&comm), barrier(&comm), comm.poll(), comm.close(), comm.allocate(1).map(drop)] {
            assert!(matches!(outcome, Err(CommError::Closed { .. })), "{outcome:?}");
        }
    });
}

/// What fails in the other group of a two-group call is no failure of this one.
#[test]
fn another_communicator_s_failure_is_not_this_one_s() {
    on_ranks(2, |comm, _| {
        let other =
            GatherBackend::new("barriers", ThreadComm::create(1, TIMEOUT).map(single).unwrap(), TIMEOUT);
        other.abort();
        let args = TwoGroupNormArgs {
            hidden_states: DeviceAddr::NULL,
            residual: DeviceAddr::NULL,
            bias: None,
            weight: DeviceAddr::NULL,
            reduce_first_row: 0,
            reduce_tokens: &[],
            gather_first_row: 0,
            gather_tokens: &[],
            hidden: 4,
            dtype: DType::F32,
            eps: 1e-5,
            weight_offset: 0.0,
        };
        // SAFETY: nothing is read or written.
        let outcome = unsafe { comm.all_reduce_rmsnorm_two_group(&other, &args, StreamHandle::NULL) };
        assert!(outcome.unwrap_err().is_fatal());
        comm.poll().unwrap();
        sum(&comm).unwrap();
    });
}

fn single(mut ranks: Vec<ThreadComm>) -> Arc<dyn HostComm> {
    Arc::new(ranks.remove(0))
}
