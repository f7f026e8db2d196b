//! Memory mappings that several ranks may share.
//!
//! Owns the mapping and nothing of what lies in it. Segments are anonymous files that live as long as somebody maps
//! them, so a killed process leaves nothing behind.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags};

use crate::error::{CommError, Result};

/// A mapped, readable and writable, zero-initialised range of memory.
pub(super) struct Segment {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: a mapping belongs to the process, not to a thread; what lies in it is governed by its users.
unsafe impl Send for Segment {}
// SAFETY: as above; a shared reference gives out only the address and the length.
unsafe impl Sync for Segment {}

fn io(context: String, errno: rustix::io::Errno) -> CommError {
    CommError::io(context, &std::io::Error::from(errno))
}

impl Segment {
    /// A descriptor for `len` bytes that other processes can map.
    pub(super) fn shareable(len: usize) -> Result<OwnedFd> {
        let context = || format!("creating a shared memory segment of {len} bytes");
        let fd = rustix::fs::memfd_create("host-backend", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
            .map_err(|e| io(context(), e))?;
        rustix::fs::ftruncate(&fd, len as u64).map_err(|e| io(context(), e))?;
        // A peer that truncated the file would turn our accesses into SIGBUS.
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
            .map_err(|e| io(context(), e))?;
        Ok(fd)
    }

    /// Maps a descriptor from [`shareable`](Self::shareable), here or in another process.
    pub(super) fn map(fd: BorrowedFd<'_>, len: usize) -> Result<Self> {
        let context = || format!("mapping a shared memory segment of {len} bytes");
        let found = rustix::fs::fstat(fd).map_err(|e| io(context(), e))?.st_size;
        if usize::try_from(found).ok() != Some(len) {
            return Err(CommError::Io { context: context(), message: format!("it has {found} bytes") });
        }
        // SAFETY: a fresh mapping at an address of the kernel's choice aliases no Rust object.
        let start = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                fd.as_fd(),
                0,
            )
        };
        Self::checked(start.map_err(|e| io(context(), e))?, len, context)
    }

    /// `len` bytes for this process alone.
    pub(super) fn private(len: usize) -> Result<Self> {
        let context = || format!("mapping {len} bytes");
        // SAFETY: a fresh mapping at an address of the kernel's choice aliases no Rust object.
        let start = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )
        };
        Self::checked(start.map_err(|e| io(context(), e))?, len, context)
    }

    fn checked(start: *mut std::ffi::c_void, len: usize, context: impl Fn() -> String) -> Result<Self> {
        let start = NonNull::new(start.cast())
            .ok_or_else(|| CommError::Io { context: context(), message: "mapped at address zero".into() })?;
        Ok(Self { start, len })
    }

    /// First byte; page-aligned.
    pub(super) fn start(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// Length in bytes.
    pub(super) fn len(&self) -> usize {
        self.len
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by the constructor, is unmapped once, and its users borrow this value. An error
        // leaves the mapping in place, which harms nobody.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.len) };
    }
}
