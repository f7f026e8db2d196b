//! The tiered communicator: who gets which call, and that it is a communicator like any other.

#![allow(clippy::unwrap_used, reason = "these are tests, though not all of it is test functions")]

mod support;

use std::sync::Arc;
use std::time::Duration;

use comm_core::{
    AlgorithmUsage, BackendFactory, Capability, CommError, CommInfo, CreateContext, DType, DeviceAddr,
    DeviceComm, HostComm, HostSliceExt, MemoryKind, OpKind, OpQuery, ReduceOp, Registry, Result,
    StreamHandle, Support, run_threads,
};
use support::{GatherBackend, GatherFactory};

const TIMEOUT: Duration = Duration::from_secs(3);

fn context(host: Arc<dyn HostComm>) -> CreateContext {
    CreateContext {
        host,
        memory: MemoryKind::Host,
        timeout: TIMEOUT,
        checked: false,
        options: Default::default(),
    }
}

/// Carries out small all-reduces only.
struct Small(GatherBackend);

// SAFETY: the one operation is another right backend's.
unsafe impl DeviceComm for Small {
    fn info(&self) -> &CommInfo {
        self.0.info()
    }

    fn split(&self, _: Option<u32>, _: i32) -> Result<Option<Arc<dyn DeviceComm>>> {
        Err(CommError::unsupported(OpKind::Split, "small", "these ranks do not reach each other"))
    }

    fn supports(&self, query: &OpQuery) -> Support {
        match query.kind {
            OpKind::Split => Support::Yes,
            OpKind::AllReduce if query.count <= 16 => Support::Yes,
            OpKind::AllReduce => Support::no("more than 16 elements"),
            _ => Support::no("all-reduce only"),
        }
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
        assert!(count <= 16);
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

struct SmallFactory {
    broken_on: Option<usize>,
}

impl BackendFactory for SmallFactory {
    fn name(&self) -> &str {
        "small"
    }

    fn probe(&self, context: &CreateContext) -> Result<Capability> {
        if self.broken_on == Some(context.host.rank()) {
            return Err(CommError::invalid("device", "not peer to peer"));
        }
        Ok(Capability::default())
    }

    fn create(&self, context: &CreateContext, _: &[Capability]) -> Result<Arc<dyn DeviceComm>> {
        Ok(Arc::new(Small(GatherBackend::new("small", context.host.clone(), context.timeout))))
    }
}

fn registry(broken_on: Option<usize>) -> Registry {
    let mut registry = Registry::new();
    registry.register(Box::new(SmallFactory { broken_on }));
    registry.register(Box::new(GatherFactory::right()));
    registry
}

fn calls(comm: &dyn DeviceComm, algorithm: &str) -> u64 {
    comm.usage().iter().filter(|usage| usage.algorithm == algorithm).map(|usage| usage.calls).sum()
}

#[test]
fn a_group_that_a_backend_refuses_is_left_to_the_others() {
    run_threads(4, TIMEOUT, |host| {
        let comm = registry(None).create_tiered(&["small", "gather"], &context(host)).unwrap();
        let group = comm.split(Some((comm.rank() % 2) as u32), 0).unwrap().unwrap();
        let mut data = vec![comm.rank() as f32; 3];
        group.all_reduce_slice_in_place(&mut data, ReduceOp::Sum).unwrap();
        assert_eq!(data, vec![(2 + 2 * (comm.rank() % 2)) as f32; 3]);
        assert_eq!((group.tiers().len(), &*group.tiers()[0].info().backend), (1, "gather"));
    })
    .unwrap();
    run_threads(2, TIMEOUT, |host| {
        let comm = registry(None).create_tiered(&["small"], &context(host)).unwrap();
        assert!(matches!(comm.split(Some(0), 0), Err(CommError::Unsupported { .. })));
    })
    .unwrap();
}

#[test]
fn each_call_goes_to_the_first_backend_that_supports_it() {
    run_threads(3, TIMEOUT, |host| {
        let comm = registry(None).create_tiered(&["small", "gather"], &context(host)).unwrap();
        assert_eq!((&*comm.info().backend, comm.tiers().len(), comm.skipped().len()), ("tiered", 2, 0));
        for len in [1, 16, 17, 100] {
            let mut data = vec![comm.rank() as f32; len];
            comm.all_reduce_slice_in_place(&mut data, ReduceOp::Sum).unwrap();
            assert!(data.iter().all(|&x| x == 3.0));
        }
        let mut all = [0_u8; 3];
        comm.all_gather_slice(&[comm.rank() as u8], &mut all).unwrap();
        assert_eq!(all, [0, 1, 2]);
        assert_eq!((calls(&*comm, "small:gather"), calls(&*comm, "gather:gather")), (2, 3));
        let query = |count| OpQuery::new(OpKind::AllReduce, DType::F32, count).with_reduce(ReduceOp::Sum);
        assert_eq!(comm.backend_for(&query(16)), Some("small"));
        assert_eq!(comm.backend_for(&query(17)), Some("gather"));
        comm.close().unwrap();
        let closed = comm.all_reduce_slice_in_place(&mut [1_f32], ReduceOp::Sum);
        assert!(matches!(closed, Err(CommError::Closed { .. })));
    })
    .unwrap();
}

#[test]
fn a_tier_whose_probe_fails_anywhere_is_left_out_everywhere() {
    run_threads(3, TIMEOUT, |host| {
        let comm = registry(Some(1)).create_tiered(&["small", "unheard_of", "gather"], &context(host)).unwrap();
        let skipped: Vec<_> = comm.skipped().iter().map(|tier| tier.backend.as_str()).collect();
        assert_eq!(skipped, ["small", "unheard_of"]);
        assert!(
            matches!(&comm.skipped()[0].reason, CommError::CreationFailed { rank: 1, cause, .. } if cause.to_string().contains("peer"))
        );
        assert_eq!(comm.tiers().len(), 1);
    })
    .unwrap();
}

#[test]
fn without_any_tier_creation_fails_alike() {
    let errors = run_threads(2, TIMEOUT, |host| {
        registry(Some(0)).create_tiered(&["small"], &context(host)).map(drop).unwrap_err()
    })
    .unwrap();
    assert_eq!(errors[0], errors[1]);
    assert!(matches!(&errors[0], CommError::CreationFailed { rank: 0, .. }), "{}", errors[0]);
}

#[test]
fn what_no_tier_supports_is_refused_with_all_reasons() {
    run_threads(2, TIMEOUT, |host| {
        let comm = registry(None).create_tiered(&["small"], &context(host)).unwrap();
        let error = comm.all_reduce_slice_in_place(&mut [0_f32; 17], ReduceOp::Sum).unwrap_err();
        assert!(matches!(error, CommError::Unsupported { op: OpKind::AllReduce, .. }), "{error}");
        assert!(error.to_string().contains("more than 16 elements"), "{error}");
    })
    .unwrap();
}

#[cfg(feature = "conformance")]
mod conformance {
    use super::*;
    use comm_core::HostMemory;
    use comm_core::conformance::{Config, run_threads};

    /// Both backends as one, made without the registry's help.
    struct TieredFactory;

    impl BackendFactory for TieredFactory {
        fn name(&self) -> &str {
            "tiered"
        }

        fn probe(&self, _: &CreateContext) -> Result<Capability> {
            Ok(Capability::default())
        }

        fn create(&self, context: &CreateContext, _: &[Capability]) -> Result<Arc<dyn DeviceComm>> {
            let comm = registry(None).create_tiered(&["small", "gather"], context)?;
            Ok(comm)
        }
    }

    #[test]
    fn a_tiered_communicator_passes_the_suite() {
        let report =
            run_threads(Arc::new(TieredFactory), 4, |_| Box::new(HostMemory::new()), &Config::quick());
        assert!(report.is_success(), "{report}");
    }
}
