//! Host time of enqueueing an all-reduce through the backend, beside NCCL's own call on a communicator of the same kind
//! followed by the same wait for NCCL to have enqueued it.
//!
//! One rank on one GPU: what is measured is the path on the host, which does not depend on the other ranks.

#![allow(missing_docs, reason = "criterion's macros make undocumented items")]

use std::collections::BTreeMap;
use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use comm_core::{
    BackendFactory, CommError, CreateContext, DType, DeviceComm, DeviceMemory, ReduceOp, Result,
    StreamHandle, ThreadComm,
};
use comm_kernels::CudaMemory;
use comm_nccl::result::Progress;
use comm_nccl::{NcclFactory, NcclLibrary, sys};
use criterion::{Criterion, criterion_group, criterion_main};

/// Enqueued between two waits for the device, so that its queue never fills up and slows the host down.
const BATCH: u64 = 128;
const COUNT: usize = 1024;

struct Raw {
    library: Arc<NcclLibrary>,
    comm: *mut sys::Comm,
}

impl Raw {
    fn new(library: Arc<NcclLibrary>) -> Result<Self> {
        let mut config = sys::Config::new();
        config.blocking = 0;
        let mut comm = std::ptr::null_mut();
        let id = library.unique_id()?;
        // SAFETY: both pointers outlive the wait; the benchmark has made its device current.
        let _ = unsafe { library.comm_init_rank_config(&raw mut comm, 1, id, 0, &raw mut config) }?;
        let raw = Self { library, comm };
        raw.settle()?;
        Ok(raw)
    }

    fn settle(&self) -> Result<()> {
        let start = Instant::now();
        // SAFETY: the communicator is live and used by this thread alone.
        while unsafe { self.library.comm_state(self.comm) }? == Progress::Running {
            if start.elapsed() > Duration::from_secs(60) {
                return Err(CommError::invalid("library", "NCCL has been busy for a minute"));
            }
            std::hint::spin_loop();
        }
        Ok(())
    }

    fn all_reduce(&self, at: comm_core::DeviceAddr, stream: StreamHandle) -> Result<()> {
        // SAFETY: the buffer holds `COUNT` elements and outlives the benchmark.
        let progress =
            unsafe { self.library.all_reduce(at, at, COUNT, sys::FLOAT32, sys::SUM, self.comm, stream) }?;
        if progress == Progress::Running { self.settle() } else { Ok(()) }
    }
}

fn timed(iterations: u64, memory: &CudaMemory, mut enqueue: impl FnMut() -> Result<()>) -> Duration {
    let mut total = Duration::ZERO;
    let mut left = iterations;
    while left > 0 {
        let batch = left.min(BATCH);
        let start = Instant::now();
        for _ in 0..batch {
            if let Err(error) = black_box(enqueue()) {
                panic!("{error}");
            }
        }
        total += start.elapsed();
        if let Err(error) = memory.synchronize() {
            panic!("{error}");
        }
        left -= batch;
    }
    total
}

fn compare(c: &mut Criterion) -> Result<()> {
    let library = NcclLibrary::load()?;
    let memory = CudaMemory::new(0)?;
    let timeout = Duration::from_secs(60);
    let host = ThreadComm::create(1, timeout)?.remove(0);
    let context = CreateContext {
        host: Arc::new(host),
        memory: memory.kind(),
        timeout,
        checked: false,
        options: BTreeMap::new(),
    };
    let factory = NcclFactory::with_library(library.clone());
    let comm: Arc<dyn DeviceComm> = factory.create(&context, &[factory.probe(&context)?])?;
    let at = memory.allocate(COUNT * 4)?;
    let raw = Raw::new(library)?;
    let stream = memory.stream();
    let mut group = c.benchmark_group("enqueue all_reduce");
    group.bench_function("raw", |b| {
        b.iter_custom(|n| timed(n, &memory, || raw.all_reduce(at, stream)));
    });
    group.bench_function("comm-nccl", |b| {
        b.iter_custom(|n| {
            // SAFETY: the buffer holds `COUNT` elements and outlives the benchmark.
            timed(n, &memory, || unsafe { comm.all_reduce(at, at, COUNT, DType::F32, ReduceOp::Sum, stream) })
        });
    });
    group.finish();
    // SAFETY: the benchmark has waited for the communicator's work and does not use it again.
    let _ = unsafe { raw.library.comm_abort(raw.comm) }?;
    comm.close()
}

fn enqueue(c: &mut Criterion) {
    if let Err(error) = compare(c) {
        println!("SKIP: {error}");
    }
}

criterion_group!(benches, enqueue);
criterion_main!(benches);
