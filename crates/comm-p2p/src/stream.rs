//! Streams for the few things that a communicator does by itself.

use comm_core::{Result, StreamHandle};
use comm_kernels::raw::check;
use cudarc::driver::sys;

/// A stream of its own, so that nothing else on the device is waited for.
pub(crate) struct Stream(sys::CUstream);

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
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: this object owns the stream.
        let _ = unsafe { sys::cuStreamDestroy_v2(self.0) };
    }
}
