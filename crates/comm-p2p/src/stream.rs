//! Streams for the few things that a communicator does by itself.

use std::time::{Duration, Instant};

use comm_core::{Result, StreamHandle};
use comm_kernels::raw::check;
use cudarc::driver::sys;

/// A stream of its own, so that nothing else on the device is waited for.
pub(crate) struct Stream(sys::CUstream);

// SAFETY: streams may be used from any thread; the driver locks.
unsafe impl Send for Stream {}

impl Stream {
    pub(crate) fn new() -> Result<Self> {
        let mut stream = std::ptr::null_mut();
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: the pointer is valid for the write; the caller has made the context current.
        check("cuStreamCreate", unsafe { sys::cuStreamCreate(&raw mut stream, flags) })?;
        Ok(Self(stream))
    }

    pub(crate) const fn raw(&self) -> sys::CUstream {
        self.0
    }

    pub(crate) fn handle(&self) -> StreamHandle {
        StreamHandle(self.0 as u64)
    }

    pub(crate) fn wait(&self) -> Result<()> {
        // SAFETY: the stream is live; what is on it waits for nobody.
        check("cuStreamSynchronize", unsafe { sys::cuStreamSynchronize(self.0) })
    }

    /// Waits no longer than that; whether everything on it is done.
    pub(crate) fn is_done_within(&self, limit: Duration) -> Result<bool> {
        let start = Instant::now();
        loop {
            // SAFETY: the stream is live.
            match unsafe { sys::cuStreamQuery(self.0) } {
                sys::CUresult::CUDA_ERROR_NOT_READY if start.elapsed() < limit => std::thread::yield_now(),
                sys::CUresult::CUDA_ERROR_NOT_READY => return Ok(false),
                code => return check("cuStreamQuery", code).map(|()| true),
            }
        }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: this object owns the stream.
        let _ = unsafe { sys::cuStreamDestroy_v2(self.0) };
    }
}
