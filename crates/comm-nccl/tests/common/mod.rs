//! What the GPU tests share: ranks as threads, one device each, and typed buffers.

#![allow(dead_code, reason = "each test uses its part")]

use std::ffi::c_void;
use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use comm_core::{
    BackendFactory, CommError, CreateContext, DType, DeviceAddr, DeviceComm, DeviceMemory, Element, HostComm,
    HostCommExt, Rendezvous, Result, StreamHandle, Token, run_threads,
};
use comm_kernels::CudaMemory;
use comm_nccl::NcclFactory;
use cudarc::driver::sys;

/// Long enough for a cold start on a busy machine, and the bound on everything that goes well.
pub(crate) const PATIENT: Duration = Duration::from_secs(60);
/// The timeout of tests in which a rank is missing.
pub(crate) const SHORT: Duration = Duration::from_secs(2);

/// The world size to test, or `None` after printing why the test is skipped. Where `COMM_REQUIRE_GPUS` asks for GPUs,
/// their absence is a failure. `COMM_TEST_WORLD` bounds the size.
pub(crate) fn world_size() -> Option<usize> {
    report_end();
    let number = |name| std::env::var(name).ok().map(|text: String| text.parse::<usize>().unwrap());
    let required = number("COMM_REQUIRE_GPUS").unwrap_or(0);
    let found = comm_kernels::driver::device_count();
    assert!(
        required == 0 || found.as_ref().is_ok_and(|&count| count >= required),
        "COMM_REQUIRE_GPUS is {required}, but: {found:?}"
    );
    match found {
        Ok(count) if count >= 2 => Some(count.min(number("COMM_TEST_WORLD").unwrap_or(count)).max(2)),
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

/// As many ranks as a test needs whose point is not their number: making a communicator of many takes longer.
pub(crate) fn few(size: usize) -> usize {
    size.min(3)
}

unsafe extern "C" {
    fn atexit(handler: extern "C" fn()) -> i32;
    fn write(fd: i32, bytes: *const u8, count: usize) -> isize;
}

/// When the handler for the end was set up, from which it counts.
static FIRST: OnceLock<Instant> = OnceLock::new();

/// Has the end of the process say when the last communicator was down, so that a log tells a slow test from a slow end.
/// Called before the first communicator is made, so that its own handler runs after theirs.
fn report_end() {
    FIRST.get_or_init(|| {
        // SAFETY: the handler takes nothing and never unwinds, and this program stays loaded until its end.
        let _ = unsafe { atexit(say_end) };
        Instant::now()
    });
}

extern "C" fn say_end() {
    let took = FIRST.get().map_or(Duration::ZERO, Instant::elapsed);
    let line =
        format!("    {:.2} s after the first test began all communicators are down\n", took.as_secs_f64());
    // Not through the standard library, whose state of this thread may be gone.
    // SAFETY: the pointer and the length are the line's.
    let _ = unsafe { write(2, line.as_ptr(), line.len()) };
}

/// How long the parts of one world take: the slowest rank's creation, and all of it.
struct Clock {
    size: usize,
    start: Instant,
    made: Mutex<Duration>,
}

impl Clock {
    fn new(size: usize) -> Self {
        Self { size, start: Instant::now(), made: Mutex::default() }
    }

    fn made(&self) {
        let mut made = self.made.lock().unwrap();
        *made = made.max(self.start.elapsed());
    }
}

impl Drop for Clock {
    fn drop(&mut self) {
        let made = self.made.lock().map_or(0.0, |made| made.as_secs_f64());
        let all = self.start.elapsed().as_secs_f64();
        println!("    {} ranks: made after {made:.2} s, through after {all:.2} s", self.size);
    }
}

pub(crate) struct Rank {
    pub(crate) comm: Arc<dyn DeviceComm>,
    pub(crate) memory: CudaMemory,
    pub(crate) host: Arc<dyn HostComm>,
    pub(crate) rank: usize,
    pub(crate) size: usize,
}

/// Makes a communicator the way a registry does: probe, exchange, create.
pub(crate) fn connect(host: Arc<dyn HostComm>, timeout: Duration, checked: bool) -> Result<Rank> {
    connect_with(host, timeout, checked, &[])
}

/// As [`connect`], with options of one's own.
pub(crate) fn connect_with(
    host: Arc<dyn HostComm>,
    timeout: Duration,
    checked: bool,
    options: &[(&str, &str)],
) -> Result<Rank> {
    let (rank, size) = (host.rank(), host.size());
    let memory = CudaMemory::new(rank)?.with_timeout(PATIENT);
    let context = CreateContext {
        host: host.clone(),
        memory: memory.kind(),
        timeout,
        checked,
        options: [("nccl.staging_bytes", "4096")]
            .iter()
            .chain(options)
            .map(|&(name, value)| (name.to_owned(), value.to_owned()))
            .collect(),
    };
    let factory = NcclFactory::new();
    let capabilities: Vec<Result<_>> = host.all_gather(&factory.probe(&context))?;
    let capabilities: Vec<_> = capabilities.into_iter().collect::<Result<_>>()?;
    let comm = factory.create(&context, &capabilities)?;
    Ok(Rank { comm, memory, host, rank, size })
}

/// Runs `body` on every rank of a world, with a communicator.
pub(crate) fn world<T: Send>(
    size: usize,
    timeout: Duration,
    checked: bool,
    body: impl Fn(Rank) -> T + Sync,
) -> Vec<T> {
    world_with(size, timeout, checked, &[], body)
}

/// As [`world`], with options of one's own.
pub(crate) fn world_with<T: Send>(
    size: usize,
    timeout: Duration,
    checked: bool,
    options: &[(&str, &str)],
    body: impl Fn(Rank) -> T + Sync,
) -> Vec<T> {
    let clock = Clock::new(size);
    let connected = |host| {
        let rank = connect_with(host, timeout, checked, options).unwrap();
        clock.made();
        rank
    };
    run_threads(size, PATIENT, |host| body(connected(host))).unwrap()
}

/// As [`world`], but the ranks meet over sockets, as processes do.
pub(crate) fn socket_world<T: Send>(
    size: usize,
    timeout: Duration,
    body: impl Fn(Rank) -> T + Sync,
) -> Vec<T> {
    let clock = Clock::new(size);
    static WORLDS: AtomicUsize = AtomicUsize::new(0);
    let number = WORLDS.fetch_add(1, Ordering::Relaxed);
    let meeting = std::env::temp_dir().join(format!("comm-nccl-{}-{number}", std::process::id()));
    DirBuilder::new().mode(0o700).create(&meeting).unwrap();
    let address = format!("unix:{}/rendezvous", meeting.display());
    let token = Token::random().unwrap();
    let results = std::thread::scope(|scope| {
        let ranks: Vec<_> = (0..size)
            .map(|rank| {
                let address = address.parse().unwrap();
                let rendezvous = Rendezvous {
                    address,
                    rank,
                    size,
                    job: "test".into(),
                    token: token.clone(),
                    timeout: PATIENT,
                };
                let (body, clock) = (&body, &clock);
                scope.spawn(move || {
                    let host = rendezvous.connect().unwrap();
                    let rank = connect(Arc::new(host), timeout, false).unwrap();
                    clock.made();
                    body(rank)
                })
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    });
    std::fs::remove_dir_all(&meeting).unwrap();
    results
}

pub(crate) fn bytes_of<T: Element>(values: &[T]) -> &[u8] {
    // SAFETY: elements have no padding, and the slice is as long as the values.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

pub(crate) struct Buffer<'a, T> {
    memory: &'a CudaMemory,
    pub(crate) addr: DeviceAddr,
    zero: Vec<T>,
}

impl Rank {
    pub(crate) fn stream(&self) -> StreamHandle {
        self.memory.stream()
    }

    pub(crate) fn buffer<T: Element>(&self, values: &[T]) -> Buffer<'_, T> {
        let addr = self.memory.allocate(size_of_val(values)).unwrap();
        // SAFETY: the allocation is that large.
        unsafe { self.memory.upload(addr, bytes_of(values)).unwrap() };
        Buffer { memory: &self.memory, addr, zero: values.to_vec() }
    }

    /// An all-reduce of one `f32` per rank, whose right answer is known.
    pub(crate) fn try_sum(&self) -> Result<()> {
        let buffer = self.buffer(&[(self.rank + 1) as f32; 33]);
        let (at, stream) = (buffer.addr, self.stream());
        // SAFETY: the buffer holds 33 elements and lives until the download has waited for the stream.
        unsafe { self.comm.all_reduce(at, at, 33, DType::F32, comm_core::ReduceOp::Sum, stream)? };
        assert_eq!(buffer.read(), [(self.size * (self.size + 1) / 2) as f32; 33]);
        Ok(())
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

impl<T: Element> Buffer<'_, T> {
    pub(crate) fn read(&self) -> Vec<T> {
        let mut values = self.zero.clone();
        let bytes: &mut [u8] =
            // SAFETY: elements have no padding and take all bit patterns; the slice is as long as the values.
            unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), size_of_val(&*self.zero)) };
        // SAFETY: the allocation is that large.
        unsafe { self.memory.download(bytes, self.addr).unwrap() };
        values
    }

    pub(crate) fn at(&self, index: usize) -> DeviceAddr {
        self.addr.offset((index * size_of::<T>()) as u64)
    }
}

/// A stream beside the rank's own, which can be forked off it and joined again.
pub(crate) struct Branch {
    stream: sys::CUstream,
    event: sys::CUevent,
}

impl Branch {
    pub(crate) fn new(rank: &Rank) -> Self {
        rank.memory.context().bind_to_thread().unwrap();
        let mut branch = Self { stream: std::ptr::null_mut(), event: std::ptr::null_mut() };
        let stream_flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        let event_flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
        // SAFETY: the pointers are valid for the writes.
        unsafe {
            sys::cuStreamCreate(&raw mut branch.stream, stream_flags).result().unwrap();
            sys::cuEventCreate(&raw mut branch.event, event_flags).result().unwrap();
        }
        branch
    }

    pub(crate) fn stream(&self) -> StreamHandle {
        StreamHandle(self.stream as u64)
    }

    /// Lets what is enqueued on `later` wait for what is on `earlier` now.
    pub(crate) fn order(&self, earlier: StreamHandle, later: StreamHandle) {
        // SAFETY: the event and the streams are live.
        unsafe {
            sys::cuEventRecord(self.event, earlier.0 as sys::CUstream).result().unwrap();
            sys::cuStreamWaitEvent(later.0 as sys::CUstream, self.event, 0).result().unwrap();
        }
    }
}

impl Drop for Branch {
    fn drop(&mut self) {
        // SAFETY: they are not used again; the driver lets their work finish.
        unsafe {
            let _ = sys::cuEventDestroy_v2(self.event);
            let _ = sys::cuStreamDestroy_v2(self.stream);
        }
    }
}

/// A place in a stream that is passed only while it is open: a host function that waits. What is behind a closed one is
/// late, without using the device.
pub(crate) struct Gate(&'static AtomicBool);

impl Gate {
    /// An open one.
    pub(crate) fn new() -> Self {
        // The driver may look at it after a failed test is over.
        Self(Box::leak(Box::new(AtomicBool::new(true))))
    }

    pub(crate) fn close(&self) {
        self.0.store(false, Ordering::Release);
    }

    pub(crate) fn open(&self) {
        self.0.store(true, Ordering::Release);
    }

    /// Puts it into the stream, here.
    pub(crate) fn put(&self, stream: StreamHandle) {
        let place = std::ptr::from_ref(self.0).cast_mut().cast::<c_void>();
        // SAFETY: the stream is live; the function gets the word that it takes, which lives for ever.
        let code = unsafe { sys::cuLaunchHostFunc(stream.0 as sys::CUstream, Some(pass_when_open), place) };
        assert_eq!(code, sys::CUresult::CUDA_SUCCESS);
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.open();
    }
}

unsafe extern "C" fn pass_when_open(place: *mut c_void) {
    // SAFETY: the pointer is the one that `put` gave.
    let open = unsafe { &*place.cast::<AtomicBool>() };
    let start = Instant::now();
    while !open.load(Ordering::Acquire) && start.elapsed() < Duration::from_secs(60) {
        std::thread::sleep(Duration::from_millis(1));
    }
}
