//! A CUDA device as comm-core's [`DeviceMemory`].

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread;
use std::time::Duration;

use comm_core::{CommError, DeviceAddr, DeviceMemory, MemoryKind, Result, StreamHandle};
use cudarc::driver::{CudaContext, CudaStream, result, sys};

use crate::driver;
use crate::exit;
use crate::graph::CapturedGraph;
use crate::module::context_id;
use crate::raw;
use crate::reserve::Reserve;

/// How long [`DeviceMemory::synchronize`] and the copies wait unless told otherwise.
const TIMEOUT: Duration = Duration::from_secs(120);

/// The memory of one CUDA device, and a stream of its own (not the default stream).
///
/// Allocations are plain `cuMemAlloc` ones: aligned to 256 at least, and fit to be shared with other processes.
/// Dropping it returns at once and gives back what is still allocated if the stream is idle: on a thread of its own, because
/// the driver may wait for work on other streams. While work is running on the stream, the memory stays until the context
/// goes.
pub struct CudaMemory {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    timeout: Duration,
    allocations: Mutex<HashMap<u64, usize>>,
    reserve: Option<Mutex<Reserve>>,
}

impl fmt::Debug for CudaMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CudaMemory").field("ordinal", &self.context.ordinal()).finish_non_exhaustive()
    }
}

impl CudaMemory {
    /// Device `ordinal` of this process, in its primary context.
    ///
    /// # Errors
    /// [`CommError::Library`] without a driver, [`CommError::InvalidArgument`] when there is no such device,
    /// [`CommError::Cuda`] otherwise.
    pub fn new(ordinal: usize) -> Result<Self> {
        let devices = driver::device_count()?;
        if ordinal >= devices {
            return Err(CommError::invalid("ordinal", format!("{ordinal}, but there are {devices} devices")));
        }
        let context = CudaContext::new(ordinal).map_err(driver::failed("cuDevicePrimaryCtxRetain"))?;
        let stream = context.new_stream().map_err(driver::failed("cuStreamCreate"))?;
        Ok(Self { context, stream, timeout: TIMEOUT, allocations: Mutex::default(), reserve: None })
    }

    /// Allocations come out of `bytes` bytes that are taken now, as far as those have room, and nothing goes back to the
    /// driver before the context goes. For ranks that share a device: where the driver waits for the device to give memory
    /// back, it waits for the other ranks' kernels too, and they may be waiting for this rank.
    ///
    /// # Errors
    /// [`CommError::Cuda`].
    pub fn with_reserve(mut self, bytes: usize) -> Result<Self> {
        self.bind()?;
        self.reserve = Some(Mutex::new(Reserve::take(context_id(&self.context)?, bytes)?));
        Ok(self)
    }

    /// The longest that a copy or [`synchronize`](DeviceMemory::synchronize) waits; 120 seconds at first.
    #[must_use]
    pub const fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// The device's primary context.
    #[must_use]
    pub const fn context(&self) -> &Arc<CudaContext> {
        &self.context
    }

    /// The stream that [`stream`](DeviceMemory::stream) names.
    #[must_use]
    pub const fn cuda_stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// Captures what `launches` issues on this stream into a graph, instead of running it.
    ///
    /// Only this thread's calls are restricted while capturing: it must not allocate, synchronise or copy.
    ///
    /// # Errors
    /// What `launches` returned, or [`CommError::Cuda`] when it did what cannot be captured.
    pub fn capture(&self, launches: impl FnOnce() -> Result<()>) -> Result<CapturedGraph> {
        CapturedGraph::capture(&self.stream, launches)
    }

    fn bind(&self) -> Result<()> {
        self.context.bind_to_thread().map_err(driver::failed("cuCtxSetCurrent"))
    }

    /// Gives memory back on another thread, because `cuMemFree` may wait for other streams' work without a limit. The first
    /// failure arrives once all is given back.
    ///
    /// # Safety
    /// The addresses came from `malloc_sync` in this context, are freed once, and nothing uses them.
    unsafe fn free_elsewhere(&self, addresses: Vec<u64>) -> Result<mpsc::Receiver<Result<()>>> {
        let (done, outcome) = mpsc::channel();
        let context = self.context.clone();
        let live = exit::Live::new();
        let give_back = move || {
            raw::relax_capture_rules();
            let result = context.bind_to_thread().map_err(driver::failed("cuCtxSetCurrent")).and_then(|()| {
                // SAFETY: the caller vouches for the addresses.
                let free = |addr| unsafe { result::free_sync(addr) }.map_err(driver::failed("cuMemFree"));
                addresses.into_iter().map(free).fold(Ok(()), Result::and)
            });
            if let Err(error) = &result {
                tracing::warn!(%error, "giving device memory back");
            }
            // It may be what keeps the context alive, so this too is before the thread counts as ended.
            drop(context);
            // Nobody may be waiting any more.
            let _ = done.send(result);
            drop(live);
        };
        thread::Builder::new()
            .name("cuda-free".to_owned())
            .spawn(give_back)
            .map(|_| outcome)
            .map_err(|error| CommError::io("starting a thread that frees device memory", &error))
    }

    fn reserve(&self) -> Option<std::sync::MutexGuard<'_, Reserve>> {
        Some(self.reserve.as_ref()?.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn query(&self) -> Result<(), result::DriverError> {
        // SAFETY: the stream is alive, this object owns it.
        unsafe { sys::cuStreamQuery(self.stream.cu_stream()) }.result()
    }
}

impl DeviceMemory for CudaMemory {
    fn kind(&self) -> MemoryKind {
        MemoryKind::Cuda { ordinal: self.context.ordinal() }
    }

    fn stream(&self) -> StreamHandle {
        StreamHandle(self.stream.cu_stream() as u64)
    }

    fn allocate(&self, bytes: usize) -> Result<DeviceAddr> {
        if let Some(addr) = self.reserve().and_then(|mut reserve| reserve.allocate(bytes)) {
            return Ok(DeviceAddr(addr));
        }
        self.bind()?;
        // SAFETY: the memory is handed out as an address only, whose users must not read what they have not written.
        let addr = unsafe { result::malloc_sync(bytes.max(1)) }.map_err(driver::failed("cuMemAlloc"))?;
        self.allocations.lock().unwrap_or_else(PoisonError::into_inner).insert(addr, bytes);
        Ok(DeviceAddr(addr))
    }

    unsafe fn free(&self, addr: DeviceAddr) -> Result<()> {
        if self.reserve().is_some_and(|mut reserve| reserve.free(addr.0)) {
            return Ok(());
        }
        self.bind()?;
        let table = || self.allocations.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(bytes) = table().remove(&addr.0) else {
            return Err(CommError::invalid(
                "addr",
                format!("{addr:?} was not allocated here or was freed already"),
            ));
        };
        if self.reserve.is_some() {
            // What the reserve had no room for stays until the context goes, like the reserve.
            return Ok(());
        }
        // SAFETY: the address came from `malloc_sync` and has just left the table, so it is freed once; the caller
        // vouches that nothing uses it.
        let outcome = unsafe { self.free_elsewhere(vec![addr.0]) }.inspect_err(|_| {
            // Not freed, so it stays this object's, to be freed by a later call or at the end.
            table().insert(addr.0, bytes);
        })?;
        outcome.recv_timeout(self.timeout).unwrap_or_else(|error| {
            let (code, message) = match error {
                mpsc::RecvTimeoutError::Timeout => (
                    sys::CUresult::CUDA_ERROR_NOT_READY,
                    format!(
                        "it has waited for work on other streams for {:?}, and gives {addr:?} back when that is done",
                        self.timeout
                    ),
                ),
                mpsc::RecvTimeoutError::Disconnected => (
                    sys::CUresult::CUDA_ERROR_UNKNOWN,
                    format!("the thread that frees {addr:?} ended without saying how it went"),
                ),
            };
            Err(CommError::Cuda { call: "cuMemFree".into(), code: code as i32, message })
        })
    }

    unsafe fn upload(&self, dst: DeviceAddr, bytes: &[u8]) -> Result<()> {
        // Waiting first keeps the wait bounded: the copy itself would wait for the stream without limit.
        self.synchronize()?;
        if bytes.is_empty() {
            return Ok(());
        }
        // SAFETY: the caller vouches for the destination; the source is borrowed until the copy is complete, below.
        unsafe { result::memcpy_htod_async(dst.0, bytes, self.stream.cu_stream()) }
            .map_err(driver::failed("cuMemcpyHtoDAsync"))?;
        self.synchronize()
    }

    unsafe fn download(&self, bytes: &mut [u8], src: DeviceAddr) -> Result<()> {
        self.synchronize()?;
        if bytes.is_empty() {
            return Ok(());
        }
        // SAFETY: the caller vouches for the source; the destination is borrowed until the copy is complete. From
        // pageable memory the call itself returns only then (CUDA Driver API, "API synchronization behavior").
        unsafe { result::memcpy_dtoh_async(bytes, src.0, self.stream.cu_stream()) }
            .map_err(driver::failed("cuMemcpyDtoHAsync"))?;
        self.synchronize()
    }

    fn synchronize(&self) -> Result<()> {
        self.bind()?;
        driver::wait_until_ready("cuStreamQuery", self.timeout, || self.query())
    }
}

impl Drop for CudaMemory {
    fn drop(&mut self) {
        let allocations = std::mem::take(self.allocations.get_mut().unwrap_or_else(PoisonError::into_inner));
        if let Some(reserve) = self.reserve.take() {
            // While work is running on the stream nobody else may have it.
            if self.bind().is_ok()
                && self.query().is_ok()
                && let Ok(context) = context_id(&self.context)
            {
                reserve.into_inner().unwrap_or_else(PoisonError::into_inner).leave(context);
            }
            return;
        }
        if allocations.is_empty() {
            return;
        }
        if self.bind().is_err() || self.query().is_err() {
            tracing::warn!(
                allocations = allocations.len(),
                bytes = allocations.values().sum::<usize>(),
                "device memory was not freed: work is still running on its stream, or has failed"
            );
            return;
        }
        // SAFETY: live allocations of this object, freed once; its stream, on which they were used, is idle.
        let started = unsafe { self.free_elsewhere(allocations.into_keys().collect()) };
        if let Err(error) = started {
            tracing::warn!(%error, "device memory was not freed");
        }
    }
}
