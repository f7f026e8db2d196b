//! The memory a backend works on, as far as tests, benchmarks and examples need to know it.

use std::alloc::{Layout, alloc, dealloc};
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use crate::addr::{DeviceAddr, StreamHandle};
use crate::error::{CommError, Result};

/// Which memory a communicator's operands lie in.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub enum MemoryKind {
    /// The host's memory.
    Host,
    /// The memory of a CUDA device.
    Cuda {
        /// The device's ordinal in this process.
        ordinal: usize,
    },
}

/// The memory, stream and copies that go with one rank's device.
///
/// The conformance suite and the benchmarks reach a backend's memory through it and so stay free of CUDA. A collective
/// issued on [`stream`](Self::stream) is ordered with [`upload`](Self::upload) and [`download`](Self::download).
pub trait DeviceMemory: Send + Sync {
    /// Which memory this is.
    fn kind(&self) -> MemoryKind;

    /// The stream that collectives on this memory are issued on.
    fn stream(&self) -> StreamHandle;

    /// Allocates `bytes` bytes, aligned to at least 256.
    ///
    /// # Errors
    /// When the memory is not to be had.
    fn allocate(&self, bytes: usize) -> Result<DeviceAddr>;

    /// Gives an allocation back.
    ///
    /// # Errors
    /// When `addr` did not come from [`allocate`](Self::allocate).
    ///
    /// # Safety
    /// No operation that is still running may use the allocation.
    unsafe fn free(&self, addr: DeviceAddr) -> Result<()>;

    /// Copies `bytes` to the device, after everything issued on the stream; complete when it returns.
    ///
    /// # Errors
    /// When the copy, or work issued on the stream before it, failed.
    ///
    /// # Safety
    /// `dst .. dst + bytes.len()` is inside a live allocation of this memory (or of a communicator on it).
    unsafe fn upload(&self, dst: DeviceAddr, bytes: &[u8]) -> Result<()>;

    /// Copies from the device, after everything issued on the stream; complete when it returns.
    ///
    /// # Errors
    /// When the copy, or work issued on the stream before it, failed.
    ///
    /// # Safety
    /// `src .. src + bytes.len()` is inside a live allocation of this memory (or of a communicator on it).
    unsafe fn download(&self, bytes: &mut [u8], src: DeviceAddr) -> Result<()>;

    /// Waits until everything issued on the stream is complete.
    ///
    /// # Errors
    /// When work issued on the stream failed.
    fn synchronize(&self) -> Result<()>;
}

/// [`DeviceMemory`] over the host's own memory: there is no stream, and nothing to wait for.
#[derive(Debug, Default)]
pub struct HostMemory {
    allocations: Mutex<HashMap<u64, Layout>>,
}

const HOST_ALIGN: usize = 256;

impl HostMemory {
    /// An allocator with nothing allocated.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }
}

/// Asks for huge pages under the untouched range, before anything is written to it: collectives walk long ranges, whose
/// ordinary pages would crowd each other out of the caches, and which the kernel reads for other processes page by page.
fn prefer_huge_pages(ptr: *mut u8, bytes: usize) {
    const HUGE: usize = 2 << 20;
    let start = (ptr as usize).next_multiple_of(HUGE);
    let end = (ptr as usize + bytes) & !(HUGE - 1);
    if end > start {
        let first = ptr.wrapping_add(start - ptr as usize);
        // SAFETY: the pages lie inside a live allocation, and the advice changes nothing that a program can read. A
        // system that does not take it serves ordinary pages.
        let _ = unsafe { rustix::mm::madvise(first.cast(), end - start, rustix::mm::Advice::LinuxHugepage) };
    }
}

impl DeviceMemory for HostMemory {
    fn kind(&self) -> MemoryKind {
        MemoryKind::Host
    }

    fn stream(&self) -> StreamHandle {
        StreamHandle::NULL
    }

    fn allocate(&self, bytes: usize) -> Result<DeviceAddr> {
        let layout = Layout::from_size_align(bytes.max(1), HOST_ALIGN)
            .map_err(|error| CommError::invalid("bytes", format!("{bytes}: {error}")))?;
        // SAFETY: the layout's size is at least 1.
        let ptr = unsafe { alloc(layout) };
        if ptr.is_null() {
            return Err(CommError::Io {
                context: format!("allocating {bytes} bytes of host memory"),
                message: "out of memory".into(),
            });
        }
        prefer_huge_pages(ptr, layout.size());
        // SAFETY: the allocation is as long, and nobody else knows of it.
        unsafe { ptr.write_bytes(0, layout.size()) };
        self.allocations.lock().unwrap_or_else(PoisonError::into_inner).insert(ptr as u64, layout);
        Ok(DeviceAddr(ptr as u64))
    }

    unsafe fn free(&self, addr: DeviceAddr) -> Result<()> {
        let layout = self
            .allocations
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&addr.0)
            .ok_or_else(|| {
                CommError::invalid("addr", format!("{addr:?} was not allocated here or was freed already"))
            })?;
        // SAFETY: the address came from `alloc` with this layout and has just been removed from the table, so
        // it is freed once; the caller vouches that nothing uses it.
        unsafe { dealloc(addr.0 as *mut u8, layout) };
        Ok(())
    }

    unsafe fn upload(&self, dst: DeviceAddr, bytes: &[u8]) -> Result<()> {
        // SAFETY: the caller vouches for the destination range; a shared slice cannot overlap it.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), dst.0 as *mut u8, bytes.len()) };
        Ok(())
    }

    unsafe fn download(&self, bytes: &mut [u8], src: DeviceAddr) -> Result<()> {
        // SAFETY: the caller vouches for the source range; an exclusive slice cannot overlap it.
        unsafe { std::ptr::copy_nonoverlapping(src.0 as *const u8, bytes.as_mut_ptr(), bytes.len()) };
        Ok(())
    }

    fn synchronize(&self) -> Result<()> {
        Ok(())
    }
}

impl Drop for HostMemory {
    fn drop(&mut self) {
        let allocations = self.allocations.get_mut().unwrap_or_else(PoisonError::into_inner);
        for (addr, layout) in allocations.drain() {
            // SAFETY: every entry is a live allocation made with this layout; its owner is going away.
            unsafe { dealloc(addr as *mut u8, layout) };
        }
    }
}
