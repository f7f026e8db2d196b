//! Enqueueing an all-reduce three ways, on two ranks that are threads: what the benchmark and the GPU test measure.
//!
//! Two ranks on two GPUs, because NCCL launches nothing for a single one.

use std::collections::BTreeMap;
use std::hint::black_box;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use comm_core::{
    BackendFactory, CommError, CreateContext, DType, DeviceAddr, DeviceComm, DeviceMemory, HostComm,
    HostCommExt, ReduceOp, Result, ThreadComm,
};
use comm_kernels::{CudaMemory, driver};
use comm_nccl::result::Progress;
use comm_nccl::{NcclFactory, NcclLibrary, sys};

/// Enqueued between two waits for the device, so that its queue never fills up and slows the host down.
const BATCH: u64 = 128;
const COUNT: usize = 1024;
const TIMEOUT: Duration = Duration::from_secs(60);
/// What is compared, in the order of the measurements.
pub(crate) const NAMES: [&str; 3] = ["raw, blocking", "raw, non-blocking", "comm-nccl"];

struct Raw {
    library: Arc<NcclLibrary>,
    comm: *mut sys::Comm,
}

impl Raw {
    fn new(library: Arc<NcclLibrary>, host: &dyn HostComm, blocking: i32) -> Result<Self> {
        let own = library.unique_id()?.internal.to_vec();
        let all: Vec<Vec<u8>> = host.all_gather(&own)?;
        let internal = all.into_iter().next().and_then(|id| id.try_into().ok());
        let id = sys::UniqueId {
            internal: internal.ok_or_else(|| CommError::invalid("id", "rank 0 sent another length"))?,
        };
        let mut config = sys::Config::new();
        config.blocking = blocking;
        let mut comm = std::ptr::null_mut();
        let (size, rank) = (host.size(), host.rank());
        // SAFETY: both pointers outlive the wait; the benchmark has made its device current.
        let _ = unsafe { library.comm_init_rank_config(&raw mut comm, size, id, rank, &raw mut config) }?;
        let raw = Self { library, comm };
        raw.settle()?;
        Ok(raw)
    }

    fn settle(&self) -> Result<()> {
        let start = Instant::now();
        // SAFETY: the communicator is live and used by this thread alone.
        while unsafe { self.library.comm_state(self.comm) }? == Progress::Running {
            if start.elapsed() > TIMEOUT {
                return Err(CommError::invalid("library", "NCCL has been busy for a minute"));
            }
            std::hint::spin_loop();
        }
        Ok(())
    }

    fn all_reduce(&self, rank: &Rank) -> Result<()> {
        let (at, stream) = (rank.at, rank.memory.stream());
        // SAFETY: the buffer holds `COUNT` elements and outlives the benchmark.
        let progress =
            unsafe { self.library.all_reduce(at, at, COUNT, sys::FLOAT32, sys::SUM, self.comm, stream) }?;
        if progress == Progress::Running { self.settle() } else { Ok(()) }
    }
}

/// One rank with what it measures.
struct Rank {
    memory: CudaMemory,
    at: DeviceAddr,
    raws: [Raw; 2],
    comm: Arc<dyn DeviceComm>,
}

impl Rank {
    fn new(host: Arc<dyn HostComm>) -> Result<Self> {
        let library = NcclLibrary::load()?;
        let memory = CudaMemory::new(host.rank())?;
        let context = CreateContext {
            host: host.clone(),
            memory: memory.kind(),
            timeout: TIMEOUT,
            checked: false,
            options: BTreeMap::new(),
        };
        let factory = NcclFactory::with_library(library.clone());
        let capabilities = host.all_gather(&factory.probe(&context)?)?;
        let comm = factory.create(&context, &capabilities)?;
        let at = memory.allocate(COUNT * 4)?;
        let raws = [Raw::new(library.clone(), &*host, 1)?, Raw::new(library, &*host, 0)?];
        Ok(Self { memory, at, raws, comm })
    }

    fn enqueue(&self, which: usize) -> Result<()> {
        if let Some(raw) = self.raws.get(which) {
            return raw.all_reduce(self);
        }
        let (at, stream) = (self.at, self.memory.stream());
        // SAFETY: the buffer holds `COUNT` elements and outlives the benchmark.
        unsafe { self.comm.all_reduce(at, at, COUNT, DType::F32, ReduceOp::Sum, stream) }
    }

    /// The time of `iterations` calls, without the waits between them.
    fn run(&self, which: usize, iterations: u64) -> Result<Duration> {
        let mut total = Duration::ZERO;
        let mut left = iterations;
        while left > 0 {
            let batch = left.min(BATCH);
            let start = Instant::now();
            for _ in 0..batch {
                black_box(self.enqueue(which))?;
            }
            total += start.elapsed();
            self.memory.synchronize()?;
            left -= batch;
        }
        Ok(total)
    }

    fn close(self) -> Result<()> {
        for raw in self.raws {
            // SAFETY: the benchmark has waited for the communicator's work and does not use it again.
            let _ = unsafe { raw.library.comm_abort(raw.comm) }?;
        }
        self.comm.close()
    }
}

/// Makes two ranks and hands rank 0's way of measuring to `measure`: which of [`NAMES`], how many calls, to the time that
/// they took on the host. Rank 1 makes the same calls.
pub(crate) fn with_ranks<T>(
    measure: impl FnOnce(&mut dyn FnMut(usize, u64) -> Result<Duration>) -> T,
) -> Result<T> {
    let gpus = driver::device_count()?;
    if gpus < 2 {
        return Err(CommError::invalid("device count", format!("two GPUs are needed, {gpus} are there")));
    }
    let mut hosts = ThreadComm::create(2, TIMEOUT)?;
    let (second, first) = (hosts.pop(), hosts.pop());
    let (Some(first), Some(second)) = (first, second) else {
        return Err(CommError::invalid("host", "fewer than two ranks"));
    };
    let (send, orders) = mpsc::channel::<(usize, u64)>();
    std::thread::scope(|scope| {
        let other = scope.spawn(move || {
            let rank = Rank::new(Arc::new(second))?;
            for (which, iterations) in orders {
                rank.run(which, iterations)?;
            }
            rank.close()
        });
        let rank = Rank::new(Arc::new(first))?;
        let result = measure(&mut |which, iterations| {
            // Without the other rank the work below fails by the communicator's own bounds.
            let _ = send.send((which, iterations));
            rank.run(which, iterations)
        });
        drop(send);
        rank.close()?;
        match other.join() {
            Ok(outcome) => outcome.map(|()| result),
            Err(_) => Err(CommError::invalid("rank 1", "it panicked")),
        }
    })
}
