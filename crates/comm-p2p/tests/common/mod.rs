//! What the GPU tests share: ranks as threads, one device each, or, where `COMM_P2P_SHARE_DEVICES` lets the backend have
//! it so, several on each of the devices that there are.

#![allow(dead_code, reason = "each test uses its part")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use comm_core::{
    CommError, CreateContext, DType, DeviceAddr, DeviceComm, DeviceMemory, HostComm, ReduceOp, Result,
    StreamHandle, create_with, run_threads,
};
use comm_kernels::CudaMemory;
use comm_p2p::P2pFactory;

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

/// The largest world to test, or `None` after printing why the test is skipped. Where `COMM_REQUIRE_GPUS` asks for
/// GPUs, their absence is a failure. `COMM_TEST_WORLD` bounds the size; it is the size where ranks share devices, or 8.
pub(crate) fn world_size() -> Option<usize> {
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

pub(crate) fn connect(host: Arc<dyn HostComm>, timeout: Duration, options: &[(&str, &str)]) -> Result<Rank> {
    let (rank, size) = (host.rank(), host.size());
    let memory = memory(rank)?;
    let context = CreateContext {
        host: Arc::clone(&host),
        memory: memory.kind(),
        timeout,
        checked: false,
        options: options.iter().map(|&(name, value)| (name.to_owned(), value.to_owned())).collect(),
    };
    let comm = create_with(&P2pFactory, &context)?;
    Ok(Rank { comm, memory, host, rank, size })
}

/// Runs `body` on every rank of a world, with a communicator.
pub(crate) fn world<T: Send>(
    size: usize,
    timeout: Duration,
    options: &[(&str, &str)],
    body: impl Fn(Rank) -> T + Sync,
) -> Vec<T> {
    run_threads(size, PATIENT, |host| body(connect(host, timeout, options).unwrap())).unwrap()
}

impl Rank {
    pub(crate) fn stream(&self) -> StreamHandle {
        self.memory.stream()
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
