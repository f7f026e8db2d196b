//! What the GPU tests share: ranks as threads, one device each, or, where `COMM_P2P_SHARE_DEVICES` lets the backend have
//! it so, several on each of the devices that there are; and the same as processes ([`as_processes`]).

#![allow(dead_code, unused_imports, reason = "each test uses its part")]

mod processes;

use std::sync::Arc;
use std::time::{Duration, Instant};

use comm_core::{
    CommError, CreateContext, DType, Deadline, DeviceAddr, DeviceComm, DeviceMemory, HostComm,
    HostCommExt as _, MemoryKind, ReduceOp, Result, StreamHandle, create_with, run_threads,
};
use comm_kernels::{CapturedGraph, CudaMemory};
use comm_p2p::P2pFactory;

pub(crate) use self::processes::{as_processes, is_process};

/// The bound on everything that goes well.
pub(crate) const PATIENT: Duration = Duration::from_secs(20);
/// The timeout of tests in which a rank is missing.
pub(crate) const SHORT: Duration = Duration::from_secs(2);

/// Memory of a rank that shares its device: more than all but the longest tests use.
const RESERVE: usize = 512 << 20;

/// Whether ranks share devices.
pub(crate) fn shared() -> bool {
    std::env::var("COMM_P2P_SHARE_DEVICES").is_ok_and(|value| value == "on")
}

/// Whether ranks share devices, after printing why a test cannot hold there.
pub(crate) fn skipped_where_shared(why: &str) -> bool {
    if shared() {
        println!("SKIP: ranks share devices: {why}");
    }
    shared()
}

/// The device of a rank: its own, or else the ranks are dealt out over those there are.
pub(crate) fn ordinal(rank: usize) -> usize {
    if shared() { rank % comm_kernels::driver::device_count().unwrap().max(1) } else { rank }
}

/// The memory of a rank. On a shared device none is taken or given back while ranks are at work, since the driver may wait
/// for the device then, and so for kernels that wait for this rank.
pub(crate) fn memory(rank: usize) -> Result<CudaMemory> {
    let memory = CudaMemory::new(ordinal(rank))?.with_timeout(PATIENT);
    if shared() { memory.with_reserve(RESERVE) } else { Ok(memory) }
}

/// Holds a device's context, and the kernels that are loaded there, from one world to the next: without it a world's end is
/// theirs, too, and each world takes so much longer.
pub(crate) fn hold_context(rank: usize) -> CudaMemory {
    CudaMemory::new(ordinal(rank)).unwrap()
}

/// Those of all devices, as long as the process lives.
pub(crate) fn hold_contexts() {
    let count = comm_kernels::driver::device_count().unwrap_or(0);
    // One that cannot be had is for the tests to complain of.
    (0..count).filter_map(|device| CudaMemory::new(device).ok()).for_each(std::mem::forget);
}

/// The largest world to test, or `None` after printing why the test is skipped. Where `COMM_REQUIRE_GPUS` asks for
/// GPUs, their absence is a failure. `COMM_TEST_WORLD` bounds the size; it is the size where ranks share devices, or 8.
/// In a process that is a rank, there is the world of those processes and no other.
pub(crate) fn world_size() -> Option<usize> {
    if let Some(part) = processes::part() {
        return Some(part.size);
    }
    let number = |name| std::env::var(name).ok().map(|text: String| text.parse::<usize>().unwrap());
    let required = number("COMM_REQUIRE_GPUS").unwrap_or(0);
    let found = comm_kernels::driver::device_count();
    assert!(
        required == 0 || found.as_ref().is_ok_and(|&count| count >= required),
        "COMM_REQUIRE_GPUS is {required}, but: {found:?}"
    );
    match found {
        Ok(count) if count >= 1 && shared() => Some(number("COMM_TEST_WORLD").unwrap_or(8).clamp(2, 8)),
        Ok(count) if count >= 2 => Some(count.min(number("COMM_TEST_WORLD").unwrap_or(8)).clamp(2, 8)),
        Ok(count) => {
            println!("SKIP: there are {count} GPUs, 2 are needed");
            None
        }
        Err(error) => {
            println!("SKIP: {error}");
            None
        }
    }
}

pub(crate) struct Rank {
    pub(crate) comm: Arc<dyn DeviceComm>,
    pub(crate) memory: CudaMemory,
    pub(crate) host: Arc<dyn HostComm>,
    pub(crate) rank: usize,
    pub(crate) size: usize,
}

/// What a communicator of the ranks of `host` is made from.
pub(crate) fn context(
    host: &Arc<dyn HostComm>,
    memory: MemoryKind,
    timeout: Duration,
    options: &[(&str, &str)],
) -> CreateContext {
    CreateContext {
        host: Arc::clone(host),
        memory,
        timeout,
        checked: false,
        options: options.iter().map(|&(name, value)| (name.to_owned(), value.to_owned())).collect(),
    }
}

pub(crate) fn connect(host: Arc<dyn HostComm>, timeout: Duration, options: &[(&str, &str)]) -> Result<Rank> {
    let (rank, size) = (host.rank(), host.size());
    let memory = memory(rank)?;
    let comm = create_with(&P2pFactory, &context(&host, memory.kind(), timeout, options))?;
    Ok(Rank { comm, memory, host, rank, size })
}

/// Runs `body` on every rank of a world and returns what each says: as threads, or, in a process that is a rank, as that
/// rank alone.
pub(crate) fn ranks<T: Send>(size: usize, body: impl Fn(Arc<dyn HostComm>) -> T + Sync) -> Vec<T> {
    let Some(part) = processes::part() else { return run_threads(size, PATIENT, body).unwrap() };
    let host = part.meet(size);
    let result = body(Arc::clone(&host));
    // Rank 0's process passes on what the others say to each other, so nobody leaves before all are through.
    host.barrier(Deadline::after(PATIENT)).unwrap();
    vec![result]
}

/// The same, with a communicator.
pub(crate) fn world<T: Send>(
    size: usize,
    timeout: Duration,
    options: &[(&str, &str)],
    body: impl Fn(Rank) -> T + Sync,
) -> Vec<T> {
    ranks(size, |host| body(connect(host, timeout, options).unwrap()))
}

impl Rank {
    pub(crate) fn stream(&self) -> StreamHandle {
        self.memory.stream()
    }

    /// Nobody goes on before all are here.
    pub(crate) fn meet(&self) {
        self.host.barrier(Deadline::after(PATIENT)).unwrap();
    }

    /// Captures calls that all ranks capture. Where ranks share devices, the graph is ready to run on all of them before any
    /// goes on: making one, and moving it to the device, may wait for the device, and so for a kernel that waits for this rank.
    pub(crate) fn capture(&self, calls: impl FnOnce() -> comm_core::Result<()>) -> CapturedGraph {
        let mut graph = self.memory.capture(calls).unwrap();
        if shared() {
            // SAFETY: the stream is the memory's own.
            unsafe { graph.upload(self.stream()).unwrap() };
            self.memory.synchronize().unwrap();
            // Groups may come here at their own pace.
            self.host.barrier(Deadline::after(3 * PATIENT)).unwrap();
        }
        graph
    }

    /// Another communicator in place of the last one, which has been closed. With the memory stay the device's context and
    /// the kernels that are loaded there, so this takes much less time than a world of its own.
    pub(crate) fn reconnect(&mut self, timeout: Duration, options: &[(&str, &str)]) {
        let context = context(&self.host, self.memory.kind(), timeout, options);
        self.comm = create_with(&P2pFactory, &context).unwrap();
    }

    /// A short timeout, the same on all ranks, for tests that wait for it often: at least `least`, and three times what it
    /// takes to make a communicator, which has to be done within it.
    pub(crate) fn short_timeout(&mut self, least: Duration, options: &[(&str, &str)]) -> Duration {
        self.meet();
        let start = Instant::now();
        self.reconnect(PATIENT, options);
        let took = start.elapsed();
        self.comm.close().unwrap();
        let slowest = self.host.all_gather(&took).unwrap().into_iter().max().unwrap();
        least.max(slowest * 3)
    }

    pub(crate) fn put(&self, to: DeviceAddr, values: &[f32]) {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        // SAFETY: the tests' buffers are large enough.
        unsafe { self.memory.upload(to, &bytes).unwrap() };
    }

    pub(crate) fn get(&self, from: DeviceAddr, count: usize) -> Vec<f32> {
        let mut bytes = vec![0; count * 4];
        // SAFETY: the tests' buffers are large enough.
        unsafe { self.memory.download(&mut bytes, from).unwrap() };
        bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
    }

    /// A buffer that holds `count` times `value`.
    pub(crate) fn buffer(&self, count: usize, value: f32) -> DeviceAddr {
        let addr = self.memory.allocate(count * 4).unwrap();
        self.put(addr, &vec![value; count]);
        addr
    }

    pub(crate) fn sum(&self, send: DeviceAddr, recv: DeviceAddr, count: usize) -> Result<()> {
        // SAFETY: the tests' buffers are large enough and live until the memory goes, which is last.
        unsafe { self.comm.all_reduce(send, recv, count, DType::F32, ReduceOp::Sum, self.stream()) }
    }

    /// The sum over the ranks of `rank + 1`.
    pub(crate) fn triangle(&self) -> f32 {
        (self.size * (self.size + 1) / 2) as f32
    }

    /// Polls until the communicator reports a failure.
    pub(crate) fn await_failure(&self, within: Duration) -> CommError {
        let start = Instant::now();
        loop {
            if let Err(error) = self.comm.poll() {
                return error;
            }
            assert!(start.elapsed() < within, "no failure was noticed within {within:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}
