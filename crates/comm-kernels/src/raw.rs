//! The few driver calls that backends make themselves, with typed errors.
//!
//! Owns guards for the current context; it never decides when to wait.

#![allow(clippy::missing_errors_doc, reason = "all of them fail with what the driver says")]

use std::ffi::c_uint;
use std::marker::PhantomData;
use std::sync::Arc;
use std::time::{Duration, Instant};

use comm_core::{CommError, DeviceAddr, Result, StreamHandle};
use cudarc::driver::{CudaContext, DriverError, sys};

use crate::driver::{device_count, error};

/// A driver call's outcome.
pub fn check(call: &'static str, code: sys::CUresult) -> Result<()> {
    if code == sys::CUresult::CUDA_SUCCESS { Ok(()) } else { Err(error(call, code)) }
}

/// The primary context of a device.
pub fn context(ordinal: usize) -> Result<Arc<CudaContext>> {
    // Probes for the driver first: cudarc panics where there is none.
    let count = device_count()?;
    if count <= ordinal {
        return Err(CommError::invalid(
            "memory",
            format!("CUDA device {ordinal} does not exist; the driver sees {count} device(s)"),
        ));
    }
    // cudarc makes the new context current; a caller's own choice is put back.
    let _current = Current::remember()?;
    CudaContext::new(ordinal).map_err(|DriverError(code)| error("cuDevicePrimaryCtxRetain", code))
}

/// Whether the first device can map the second one's memory. Makes no context on either.
pub fn can_access_peer(device: usize, peer: usize) -> Result<bool> {
    let count = device_count()?;
    let ordinal = |device: usize| {
        i32::try_from(device).ok().filter(|_| device < count).ok_or_else(|| {
            CommError::invalid(
                "memory",
                format!("CUDA device {device} does not exist; the driver sees {count} device(s)"),
            )
        })
    };
    let mut can = 0;
    // SAFETY: both devices exist, and the driver is initialised; the pointer is valid for the write.
    let code = unsafe { sys::cuDeviceCanAccessPeer(&raw mut can, ordinal(device)?, ordinal(peer)?) };
    check("cuDeviceCanAccessPeer", code).map(|()| can != 0)
}

/// Makes a context current on this thread and puts back what was current before when dropped.
pub struct Current {
    previous: Option<sys::CUcontext>,
}

impl Current {
    /// Changes nothing, and puts back what is current now when dropped.
    pub fn remember() -> Result<Self> {
        let mut previous = std::ptr::null_mut();
        // SAFETY: the pointer is valid for the write.
        check("cuCtxGetCurrent", unsafe { sys::cuCtxGetCurrent(&raw mut previous) })?;
        Ok(Self { previous: Some(previous) })
    }

    /// Makes `context` current.
    pub fn enter(context: &CudaContext) -> Result<Self> {
        let mut previous = std::ptr::null_mut();
        // SAFETY: the pointer is valid for the write.
        check("cuCtxGetCurrent", unsafe { sys::cuCtxGetCurrent(&raw mut previous) })?;
        if previous == context.cu_ctx() {
            return Ok(Self { previous: None });
        }
        // SAFETY: the context is live as long as its owner, which outlives this call.
        check("cuCtxSetCurrent", unsafe { sys::cuCtxSetCurrent(context.cu_ctx()) })?;
        Ok(Self { previous: Some(previous) })
    }
}

impl Drop for Current {
    fn drop(&mut self) {
        if let Some(previous) = self.previous {
            // SAFETY: it was current on this thread before; null means none. A failure leaves our context current,
            // which harms nobody that sets their own.
            let _ = unsafe { sys::cuCtxSetCurrent(previous) };
        }
    }
}

/// Lets this thread make calls that another thread's capture in global mode would forbid and be broken by.
pub fn relax_capture_rules() {
    exchange_capture_mode(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED);
}

/// Lifts what captures forbid this thread, for as long as it lives: what is done meanwhile touches no capturing stream.
pub struct RelaxedCapture {
    before: sys::CUstreamCaptureMode,
    /// The mode is the thread's, so this stays on it.
    _thread: PhantomData<*const ()>,
}

impl RelaxedCapture {
    /// Until this is dropped.
    #[must_use]
    #[allow(clippy::new_without_default, reason = "it acts on the thread, which nobody expects of a default")]
    pub fn new() -> Self {
        let before = exchange_capture_mode(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED);
        Self { before, _thread: PhantomData }
    }
}

impl Drop for RelaxedCapture {
    fn drop(&mut self) {
        exchange_capture_mode(self.before);
    }
}

fn exchange_capture_mode(mut mode: sys::CUstreamCaptureMode) -> sys::CUstreamCaptureMode {
    // SAFETY: the pointer is valid for both. Failure is only possible without a driver, which was probed, and leaves the
    // mode as it is.
    let _ = unsafe { sys::cuThreadExchangeStreamCaptureMode(&raw mut mode) };
    mode
}

/// The driver's name of a stream.
#[must_use]
pub const fn stream(handle: StreamHandle) -> sys::CUstream {
    handle.0 as sys::CUstream
}

/// Whether work on the stream goes into a graph instead of being run. A stream that may not be asked, because another
/// stream is being captured, counts as capturing.
#[must_use]
pub fn is_capturing(handle: StreamHandle) -> bool {
    let mut status = sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
    // SAFETY: the caller of the operation vouches for the stream; the pointer is valid for the write.
    let code = unsafe { sys::cuStreamIsCapturing(stream(handle), &raw mut status) };
    code != sys::CUresult::CUDA_SUCCESS || status != sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE
}

/// The driver's number for a stream, never used twice in a process: a handle may be a new stream's when the one before that
/// had it is gone, and some handles are another stream on each thread.
pub fn stream_id(handle: StreamHandle) -> Result<u64> {
    let mut id = 0;
    // SAFETY: the caller of the operation vouches for the stream; the pointer is valid for the write.
    check("cuStreamGetId", unsafe { sys::cuStreamGetId(stream(handle), &raw mut id) }).map(|()| id)
}

/// An event without timing. Destroyed explicitly, because that needs the context to be current.
pub struct Event(sys::CUevent);

// SAFETY: events may be used from any thread; the driver locks.
unsafe impl Send for Event {}

impl Event {
    /// An event of the current context.
    pub fn new() -> Result<Self> {
        let mut event = std::ptr::null_mut();
        let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as c_uint;
        // SAFETY: the pointer is valid for the write; the caller has made the context current.
        check("cuEventCreate", unsafe { sys::cuEventCreate(&raw mut event, flags) })?;
        Ok(Self(event))
    }

    /// Marks where the stream is now.
    pub fn record(&self, handle: StreamHandle) -> Result<()> {
        // SAFETY: the event is live; the caller of the operation vouches for the stream.
        check("cuEventRecord", unsafe { sys::cuEventRecord(self.0, stream(handle)) })
    }

    /// Whether the work before the last record is done (true if there was none).
    pub fn is_done(&self) -> Result<bool> {
        // SAFETY: the event is live.
        match unsafe { sys::cuEventQuery(self.0) } {
            sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            code => check("cuEventQuery", code).map(|()| true),
        }
    }

    /// Lets what is enqueued on the stream from here on wait for the work before the last record, if there was one. What is
    /// captured can wait for a record in the same capture only, and what is not for none in a capture.
    pub fn hold(&self, handle: StreamHandle) -> Result<()> {
        // SAFETY: the event is live; the caller of the operation vouches for the stream.
        check("cuStreamWaitEvent", unsafe { sys::cuStreamWaitEvent(stream(handle), self.0, 0) })
    }

    /// Gives it back; its context is current.
    pub fn destroy(self) {
        // SAFETY: the event is live and not used again. A failure means that the context is lost, and the event with it.
        let _ = unsafe { sys::cuEventDestroy_v2(self.0) };
    }
}

/// Allocates device memory on the current device.
pub fn allocate(bytes: usize) -> Result<DeviceAddr> {
    let mut address = 0;
    // SAFETY: the pointer is valid for the write.
    check("cuMemAlloc", unsafe { sys::cuMemAlloc_v2(&raw mut address, bytes) })?;
    Ok(DeviceAddr(address))
}

/// Sets device memory to zero, on a stream of its own: no other work is waited for.
///
/// # Safety
/// The range is valid and nothing else uses it.
pub unsafe fn zero(addr: DeviceAddr, bytes: usize) -> Result<()> {
    let mut stream = std::ptr::null_mut();
    let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as c_uint;
    // SAFETY: the pointer is valid for the write.
    check("cuStreamCreate", unsafe { sys::cuStreamCreate(&raw mut stream, flags) })?;
    // SAFETY: the caller vouches for the range; the stream is live.
    let code = unsafe { sys::cuMemsetD8Async(addr.0, 0, bytes, stream) };
    let start = Instant::now();
    let done = check("cuMemsetD8Async", code).and_then(|()| {
        loop {
            // SAFETY: the stream is live.
            match unsafe { sys::cuStreamQuery(stream) } {
                sys::CUresult::CUDA_ERROR_NOT_READY if start.elapsed() < ZERO_TIME => {
                    std::thread::yield_now()
                }
                code => return check("cuStreamQuery", code),
            }
        }
    });
    // SAFETY: the stream is not used again; the driver lets its work finish.
    let _ = unsafe { sys::cuStreamDestroy_v2(stream) };
    done
}

/// Host memory that the current device can write: zeroed, readable here while the device writes.
pub struct HostPage {
    words: *mut u64,
    count: usize,
    device: DeviceAddr,
}

// SAFETY: the page is owned, and page-locked memory belongs to no thread.
unsafe impl Send for HostPage {}

impl HostPage {
    /// `count` words.
    pub fn new(count: usize) -> Result<Self> {
        let mut words = std::ptr::null_mut();
        let flags = sys::CU_MEMHOSTALLOC_DEVICEMAP | sys::CU_MEMHOSTALLOC_PORTABLE;
        // SAFETY: the pointer is valid for the write.
        check("cuMemHostAlloc", unsafe { sys::cuMemHostAlloc(&raw mut words, count * 8, flags) })?;
        let words = words.cast::<u64>();
        let mut device = 0;
        // SAFETY: the memory has just been allocated, for `count` words; the pointer is valid for the write.
        let code = unsafe {
            words.write_bytes(0, count);
            sys::cuMemHostGetDevicePointer_v2(&raw mut device, words.cast(), 0)
        };
        let page = Self { words, count, device: DeviceAddr(device) };
        match check("cuMemHostGetDevicePointer", code) {
            Ok(()) => Ok(page),
            Err(error) => {
                page.free();
                Err(error)
            }
        }
    }

    /// The word at `index` as the device last wrote it; zero outside the page.
    #[must_use]
    pub fn read(&self, index: usize) -> u64 {
        // SAFETY: the index is inside the page, which is live; the device writes whole words.
        if index < self.count { unsafe { self.words.add(index).read_volatile() } } else { 0 }
    }

    /// Where the device sees the word at `index`.
    #[must_use]
    pub const fn device(&self, index: usize) -> DeviceAddr {
        self.device.offset(index as u64 * 8)
    }

    /// Gives it back; its context is current and the device no longer writes.
    pub fn free(self) {
        // SAFETY: it was allocated here and is not used again. A failure means that the context is lost.
        let _ = unsafe { sys::cuMemFreeHost(self.words.cast()) };
    }
}

/// How long zeroing a few bytes may take on a busy device.
const ZERO_TIME: Duration = Duration::from_secs(5);

/// Gives memory of [`allocate`] back.
///
/// # Safety
/// Nothing uses it any more.
pub unsafe fn free(addr: DeviceAddr) {
    // SAFETY: the caller vouches for it. A failure means that the context is lost, and the memory with it.
    let _ = unsafe { sys::cuMemFree_v2(addr.0) };
}

/// The largest distance from row to row that the driver's two-dimensional copies take on every device.
const MAX_PITCH: usize = i32::MAX as usize;

/// Enqueues a copy of `height` rows of `width` bytes between device addresses with the given bytes from row to row.
///
/// # Safety
/// Both ranges are valid until the copy is done, and the stream is live.
pub unsafe fn copy_2d(
    (src, src_pitch): (DeviceAddr, usize),
    (dst, dst_pitch): (DeviceAddr, usize),
    width: usize,
    height: usize,
    handle: StreamHandle,
) -> Result<()> {
    let dense = src_pitch == width && dst_pitch == width;
    if dense || height == 1 {
        // SAFETY: the caller vouches for the ranges, which are contiguous here.
        let code = unsafe { sys::cuMemcpyDtoDAsync_v2(dst.0, src.0, width * height, stream(handle)) };
        return check("cuMemcpyDtoDAsync", code);
    }
    if src_pitch.max(dst_pitch) > MAX_PITCH {
        for row in 0..height {
            let (from, to) = (src.offset((row * src_pitch) as u64), dst.offset((row * dst_pitch) as u64));
            // SAFETY: the caller vouches for the ranges, of which these are rows.
            let code = unsafe { sys::cuMemcpyDtoDAsync_v2(to.0, from.0, width, stream(handle)) };
            check("cuMemcpyDtoDAsync", code)?;
        }
        return Ok(());
    }
    let device = sys::CUmemorytype::CU_MEMORYTYPE_DEVICE;
    let copy = sys::CUDA_MEMCPY2D {
        srcXInBytes: 0,
        srcY: 0,
        srcMemoryType: device,
        srcHost: std::ptr::null(),
        srcDevice: src.0,
        srcArray: std::ptr::null_mut(),
        srcPitch: src_pitch,
        dstXInBytes: 0,
        dstY: 0,
        dstMemoryType: device,
        dstHost: std::ptr::null_mut(),
        dstDevice: dst.0,
        dstArray: std::ptr::null_mut(),
        dstPitch: dst_pitch,
        WidthInBytes: width,
        Height: height,
    };
    // SAFETY: the structure is valid for the read; the caller vouches for the ranges.
    check("cuMemcpy2DAsync", unsafe { sys::cuMemcpy2DAsync_v2(&raw const copy, stream(handle)) })
}
