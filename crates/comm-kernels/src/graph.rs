//! CUDA graphs captured from a stream, and time by events.

use std::fmt;
use std::ptr;
use std::sync::Arc;
use std::time::Duration;

use comm_core::{CommError, Result, StreamHandle};
use cudarc::driver::{CudaContext, CudaStream, DriverError, result, sys};

use crate::driver;

/// Work captured from a stream, ready to be replayed.
///
/// The memory that the captured work uses must outlive the replays. Dropping does not wait: the driver keeps what a
/// running replay needs.
pub struct CapturedGraph {
    graph: sys::CUgraph,
    exec: sys::CUgraphExec,
    context: Arc<CudaContext>,
}

// SAFETY: graph handles may move between threads; only concurrent access is forbidden (CUDA Driver API, "Graph object
// thread safety"), and all of it goes through `&mut self` or the owner's drop.
unsafe impl Send for CapturedGraph {}

impl fmt::Debug for CapturedGraph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CapturedGraph").field("ordinal", &self.context.ordinal()).finish_non_exhaustive()
    }
}

/// Ends a capture that was begun, also when the launches fail or panic.
struct Capturing<'a> {
    stream: &'a Arc<CudaStream>,
    open: bool,
}

impl Capturing<'_> {
    fn end(&mut self) -> Result<sys::CUgraph, DriverError> {
        self.open = false;
        // SAFETY: the stream is alive and capturing.
        unsafe { result::stream::end_capture(self.stream.cu_stream()) }
    }
}

impl Drop for Capturing<'_> {
    fn drop(&mut self) {
        if self.open
            && let Ok(graph) = self.end()
            && !graph.is_null()
        {
            // SAFETY: the graph was just made and nobody else has it.
            let _ = unsafe { result::graph::destroy(graph) };
        }
    }
}

impl CapturedGraph {
    pub(crate) fn capture(stream: &Arc<CudaStream>, launches: impl FnOnce() -> Result<()>) -> Result<Self> {
        let context = stream.context();
        // Thread-local: other ranks of this process, in their threads, go on undisturbed.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        stream.begin_capture(mode).map_err(driver::failed("cuStreamBeginCapture"))?;
        let mut capturing = Capturing { stream, open: true };
        launches()?;
        context.bind_to_thread().map_err(driver::failed("cuCtxSetCurrent"))?;
        let graph = capturing.end().map_err(driver::failed("cuStreamEndCapture"))?;
        let mut captured = Self { graph, exec: ptr::null_mut(), context: Arc::clone(context) };
        // SAFETY: the graph was just captured.
        captured.exec = unsafe { result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0)) }
            .map_err(driver::failed("cuGraphInstantiate"))?;
        Ok(captured)
    }

    /// The number of nodes, for example kernels.
    ///
    /// # Errors
    /// [`CommError::Cuda`].
    pub fn nodes(&mut self) -> Result<usize> {
        let mut number = 0;
        // SAFETY: the graph is alive; with no array to fill, only the number is written.
        unsafe { sys::cuGraphGetNodes(self.graph, ptr::null_mut(), &raw mut number) }
            .result()
            .map_err(driver::failed("cuGraphGetNodes"))?;
        Ok(number)
    }

    /// Moves what a first replay needs to the device, so that it takes no longer than the others.
    ///
    /// # Errors
    /// [`CommError::Cuda`].
    ///
    /// # Safety
    /// `stream` is a live stream of the device that the graph was captured on.
    pub unsafe fn upload(&mut self, stream: StreamHandle) -> Result<()> {
        self.context.bind_to_thread().map_err(driver::failed("cuCtxSetCurrent"))?;
        // SAFETY: the executable graph is alive; the caller vouches for the stream.
        unsafe { result::graph::upload(self.exec, stream.0 as sys::CUstream) }
            .map_err(driver::failed("cuGraphUpload"))
    }

    /// Replays the captured work on `stream`.
    ///
    /// # Errors
    /// [`CommError::Cuda`].
    ///
    /// # Safety
    /// `stream` is a live stream of the device that the graph was captured on, and what held for the captured calls
    /// (their operands' lifetimes, no conflicting access) holds until the replay is complete.
    pub unsafe fn launch(&mut self, stream: StreamHandle) -> Result<()> {
        self.context.bind_to_thread().map_err(driver::failed("cuCtxSetCurrent"))?;
        // SAFETY: the executable graph is alive; the caller vouches for the stream and the operands.
        unsafe { result::graph::launch(self.exec, stream.0 as sys::CUstream) }
            .map_err(driver::failed("cuGraphLaunch"))
    }
}

impl Drop for CapturedGraph {
    fn drop(&mut self) {
        // A context that cannot be bound is gone, and its graphs with it.
        if self.context.bind_to_thread().is_err() {
            return;
        }
        if !self.exec.is_null() {
            // SAFETY: this object owns the executable graph; the driver defers its end while a replay runs.
            let _ = unsafe { result::graph::exec_destroy(self.exec) };
        }
        if !self.graph.is_null() {
            // SAFETY: this object owns the graph.
            let _ = unsafe { result::graph::destroy(self.graph) };
        }
    }
}

/// The time between two points of a stream, by the device's clock.
pub struct EventTimer {
    context: Arc<CudaContext>,
    events: [sys::CUevent; 2],
    timeout: Duration,
}

// SAFETY: events are handles into the driver and may be used from any thread.
unsafe impl Send for EventTimer {}

impl fmt::Debug for EventTimer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EventTimer").field("timeout", &self.timeout).finish_non_exhaustive()
    }
}

impl EventTimer {
    /// A timer for streams of `context`'s device; [`elapsed`](Self::elapsed) waits for `timeout` at most.
    ///
    /// # Errors
    /// [`CommError::Cuda`], [`CommError::Library`].
    pub fn new(context: &Arc<CudaContext>, timeout: Duration) -> Result<Self> {
        driver::probe()?;
        context.bind_to_thread().map_err(driver::failed("cuCtxSetCurrent"))?;
        let mut timer = Self { context: Arc::clone(context), events: [ptr::null_mut(); 2], timeout };
        for event in &mut timer.events {
            *event = result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT)
                .map_err(driver::failed("cuEventCreate"))?;
        }
        Ok(timer)
    }

    fn record(&mut self, which: usize, stream: StreamHandle) -> Result<()> {
        self.context.bind_to_thread().map_err(driver::failed("cuCtxSetCurrent"))?;
        // SAFETY: this object owns the event; the callers' callers vouch for the stream.
        unsafe { result::event::record(self.events[which], stream.0 as sys::CUstream) }
            .map_err(driver::failed("cuEventRecord"))
    }

    /// Time runs once the stream gets here.
    ///
    /// # Errors
    /// [`CommError::Cuda`].
    ///
    /// # Safety
    /// `stream` is a live stream of the timer's device.
    pub unsafe fn start(&mut self, stream: StreamHandle) -> Result<()> {
        self.record(0, stream)
    }

    /// Time stops once the stream gets here.
    ///
    /// # Errors
    /// [`CommError::Cuda`].
    ///
    /// # Safety
    /// `stream` is a live stream of the timer's device.
    pub unsafe fn stop(&mut self, stream: StreamHandle) -> Result<()> {
        self.record(1, stream)
    }

    /// Waits until the stream got to [`stop`](Self::stop), and returns the time since [`start`](Self::start).
    ///
    /// # Errors
    /// [`CommError::Cuda`]: with `CUDA_ERROR_NOT_READY` when the timeout passed first, with the error of the work in
    /// between when that failed.
    pub fn elapsed(&mut self) -> Result<Duration> {
        self.context.bind_to_thread().map_err(driver::failed("cuCtxSetCurrent"))?;
        let [start, stop] = self.events;
        driver::wait_until_ready("cuEventQuery", self.timeout, || {
            // SAFETY: this object owns the event.
            unsafe { result::event::query(stop) }
        })?;
        // SAFETY: this object owns both events.
        let milliseconds =
            unsafe { result::event::elapsed(start, stop) }.map_err(driver::failed("cuEventElapsedTime"))?;
        Duration::try_from_secs_f64(f64::from(milliseconds) / 1e3).map_err(|_| {
            CommError::invalid("timer", format!("stopped {milliseconds} ms after it was started"))
        })
    }
}

impl Drop for EventTimer {
    fn drop(&mut self) {
        if self.context.bind_to_thread().is_err() {
            return;
        }
        for event in self.events.into_iter().filter(|event| !event.is_null()) {
            // SAFETY: this object owns the event. One that is still pending is released when it completes (CUDA Driver
            // API, cuEventDestroy); the call does not wait.
            let _ = unsafe { result::event::destroy(event) };
        }
    }
}
