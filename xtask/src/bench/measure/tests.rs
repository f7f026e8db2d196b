use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use comm_core::{
    AlgorithmUsage, CommInfo, CreateContext, HostFactory, MemoryKind, StreamHandle, create_with,
};

use super::*;
use crate::bench::plan::Effort;
use crate::device::HostDevice;

/// The host backend, with registrations that are counted and have no effect.
struct Counting {
    inner: Arc<dyn DeviceComm>,
    registered: AtomicUsize,
}

// SAFETY: operands are passed on to a backend that keeps the contract; registering does nothing.
unsafe impl DeviceComm for Counting {
    fn info(&self) -> &CommInfo {
        self.inner.info()
    }

    fn supports(&self, query: &OpQuery) -> Support {
        if query.kind == OpKind::Register { Support::Yes } else { self.inner.supports(query) }
    }

    fn usage(&self) -> Vec<AlgorithmUsage> {
        Vec::new()
    }

    unsafe fn register(&self, addr: DeviceAddr, bytes: usize) -> comm_core::Result<Registration> {
        self.registered.fetch_add(1, Ordering::Relaxed);
        Ok(Registration { id: 1, addr, bytes, generation: 1 })
    }

    unsafe fn deregister(&self, _registration: &Registration) -> comm_core::Result<()> {
        Ok(())
    }

    unsafe fn all_reduce(
        &self,
        send: DeviceAddr,
        recv: DeviceAddr,
        count: usize,
        dtype: DType,
        op: ReduceOp,
        stream: StreamHandle,
    ) -> comm_core::Result<()> {
        // SAFETY: the caller vouches for the operands.
        unsafe { self.inner.all_reduce(send, recv, count, dtype, op, stream) }
    }

    fn poll(&self) -> comm_core::Result<()> {
        self.inner.poll()
    }

    fn abort(&self) {
        self.inner.abort();
    }

    fn close(&self) -> comm_core::Result<()> {
        self.inner.close()
    }
}

/// What the two ranks of a job measured, and how many buffers each registered.
fn measured(registered: bool) -> Vec<(Vec<Row>, usize)> {
    let job = BenchJob {
        backend: "host".into(),
        ops: vec![OpKind::AllReduce],
        sizes: vec![1024, 4096, 1024, 0],
        tokens: Vec::new(),
        hidden: 1,
        dtype: DType::BF16,
        redop: ReduceOp::Sum,
        registered,
        effort: Effort { iters: Some(2), warmup: 1, reps: 2, graph: true, budget_us: 1.0 },
    };
    comm_core::run_threads(2, Duration::from_secs(20), |host| {
        let context = RankContext::of_test(Arc::clone(&host)).unwrap();
        let inner = create_with(&HostFactory, &CreateContext::new(host, MemoryKind::Host)).unwrap();
        let counting = Arc::new(Counting { inner, registered: AtomicUsize::new(0) });
        let comm: Arc<dyn DeviceComm> = Arc::clone(&counting) as _;
        let bench = Bench { job: &job, context: &context, device: &HostDevice::default(), comm: &comm };
        let mut copies = Copies::default();
        let rows = (0_u64..).zip(job.cases(2)).map(|(n, case)| bench.row(n, case, &mut copies).unwrap());
        let rows: Vec<Row> = rows.collect();
        comm.close().unwrap();
        (rows, counting.registered.load(Ordering::Relaxed))
    })
    .unwrap()
}

#[test]
fn unregistered_operands_are_never_made_known_and_come_with_a_copy_s_time() {
    for (rows, registered) in measured(false) {
        assert_eq!(registered, 0);
        assert!(rows.iter().all(|row| !row.registered && row.out_of_place.unwrap().wrong == 0));
        let copies: Vec<_> = rows.iter().map(|row| row.copy).collect();
        assert!(copies[..2].iter().all(|copy| copy.is_some_and(|us| us > 0.0)), "{copies:?}");
        // One figure for a size; nothing has no copy.
        assert_eq!((copies[2], copies[3]), (copies[0], None));
    }
    for (rows, registered) in measured(true) {
        // Two buffers out of place and one in place, at each size that has bytes.
        assert_eq!(registered, 9);
        assert!(rows.iter().all(|row| row.registered && row.copy.is_none()));
    }
}

#[test]
fn where_nothing_is_registered_nothing_is_promised() {
    let promised = |registered: bool| {
        comm_core::run_threads(1, Duration::from_secs(20), |host| {
            let context = RankContext::of_test(host).unwrap();
            context.create_context(HostDevice::default().memory(), registered).options
        })
        .unwrap()
        .remove(0)
    };
    assert_eq!(promised(true).get("p2p.symmetric_operands").map(String::as_str), Some("on"));
    assert!(promised(false).is_empty());
}
