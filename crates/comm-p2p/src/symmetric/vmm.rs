//! Device memory that other ranks can map: created by one rank, passed on as a file descriptor.
//!
//! Owns mappings, each of which keeps its memory alive whoever made it: a rank that unmaps, or dies, takes nothing from
//! under the others. Never communicates.

use std::ffi::{c_int, c_uint, c_void};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};

use comm_core::{CommError, DeviceAddr, Result};
use comm_kernels::raw::check;
use cudarc::driver::sys;

/// `CUmemLocation` for a device. The driver's structures are spelled out here because the bindings' shape depends on
/// the toolkit they were made from, while the binary layout is the same in all.
#[repr(C)]
struct Location {
    kind: c_int,
    id: c_int,
}

const LOCATION_DEVICE: c_int = 1;

/// `CUmemAllocationProp`.
#[repr(C)]
struct AllocationProp {
    kind: c_int,
    handle_types: c_int,
    location: Location,
    win32: *mut c_void,
    flags: [u8; 8],
}

const PINNED: c_int = 1;
const POSIX_FD: c_int = 1;

/// `CUmemAccessDesc`.
#[repr(C)]
struct AccessDesc {
    location: Location,
    flags: c_int,
}

const READ_WRITE: c_int = 3;

fn posix_fd() -> sys::CUmemAllocationHandleType {
    sys::CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
}

fn device(ordinal: usize) -> Result<c_int> {
    c_int::try_from(ordinal).map_err(|_| CommError::invalid("ordinal", ordinal.to_string()))
}

/// Physical memory, not yet mapped.
pub(crate) struct Physical {
    handle: sys::CUmemGenericAllocationHandle,
    bytes: usize,
}

impl Physical {
    /// At least `bytes` bytes on device `ordinal`, rounded up to what the device allocates in.
    pub(crate) fn create(ordinal: usize, bytes: usize) -> Result<Self> {
        let properties = AllocationProp {
            kind: PINNED,
            handle_types: POSIX_FD,
            location: Location { kind: LOCATION_DEVICE, id: device(ordinal)? },
            win32: std::ptr::null_mut(),
            flags: [0; 8],
        };
        let properties = (&raw const properties).cast::<sys::CUmemAllocationProp>();
        let mut granularity = 0;
        let option = sys::CUmemAllocationGranularity_flags::CU_MEM_ALLOC_GRANULARITY_RECOMMENDED;
        // SAFETY: the properties have the driver's layout and outlive the calls; the other pointer is valid for writes.
        unsafe {
            check(
                "cuMemGetAllocationGranularity",
                sys::cuMemGetAllocationGranularity(&raw mut granularity, properties, option),
            )?;
        }
        let bytes = bytes
            .max(1)
            .checked_next_multiple_of(granularity.max(1))
            .ok_or_else(|| CommError::invalid("bytes", format!("{bytes} is too much")))?;
        let mut handle = 0;
        // SAFETY: as above.
        check("cuMemCreate", unsafe { sys::cuMemCreate(&raw mut handle, bytes, properties, 0) })?;
        Ok(Self { handle, bytes })
    }

    /// Another rank's memory of `bytes` bytes, by the descriptor that its [`export`](Self::export) gave.
    pub(crate) fn import(fd: &OwnedFd, bytes: usize) -> Result<Self> {
        let mut handle = 0;
        let descriptor = fd.as_raw_fd() as usize as *mut c_void;
        // SAFETY: the descriptor is open during the call, which keeps no hold of it.
        check("cuMemImportFromShareableHandle", unsafe {
            sys::cuMemImportFromShareableHandle(&raw mut handle, descriptor, posix_fd())
        })?;
        Ok(Self { handle, bytes })
    }

    /// A descriptor by which another process can import the memory.
    pub(crate) fn export(&self) -> Result<OwnedFd> {
        let mut fd: c_int = -1;
        // SAFETY: the handle is live; a descriptor is written to an int.
        check("cuMemExportToShareableHandle", unsafe {
            sys::cuMemExportToShareableHandle((&raw mut fd).cast(), self.handle, posix_fd(), 0)
        })?;
        // SAFETY: the driver has just opened it for this caller.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    pub(crate) const fn bytes(&self) -> usize {
        self.bytes
    }

    /// Maps all of it for device `ordinal`. The mapping keeps the memory; this handle is no longer needed then.
    pub(crate) fn map(&self, ordinal: usize) -> Result<Mapping> {
        let mut base = 0;
        // SAFETY: the pointer is valid for the write.
        check("cuMemAddressReserve", unsafe {
            sys::cuMemAddressReserve(&raw mut base, self.bytes, 0, 0, 0)
        })?;
        let mut mapping = Mapping { base, bytes: self.bytes, mapped: false };
        // SAFETY: the range has just been reserved and is as long as the memory.
        check("cuMemMap", unsafe { sys::cuMemMap(base, self.bytes, 0, self.handle, 0) })?;
        mapping.mapped = true;
        let access = AccessDesc {
            location: Location { kind: LOCATION_DEVICE, id: device(ordinal)? },
            flags: READ_WRITE,
        };
        // SAFETY: the range is mapped; the descriptor has the driver's layout and outlives the call.
        check("cuMemSetAccess", unsafe {
            sys::cuMemSetAccess(base, self.bytes, (&raw const access).cast(), 1)
        })?;
        Ok(mapping)
    }
}

impl Drop for Physical {
    fn drop(&mut self) {
        // SAFETY: this object owns the handle.
        let _ = unsafe { sys::cuMemRelease(self.handle) };
    }
}

/// A range of this rank's addresses with memory behind it. Dropping it unmaps, so nothing may be running that uses it.
pub(crate) struct Mapping {
    base: sys::CUdeviceptr,
    bytes: usize,
    mapped: bool,
}

impl Mapping {
    pub(crate) const fn addr(&self) -> DeviceAddr {
        DeviceAddr(self.base)
    }

    /// Sets 32-bit words, `bytes` bytes of them, from `offset` on. The context is current; done when it returns.
    pub(crate) fn fill(&self, offset: usize, word: u32, bytes: usize) -> Result<()> {
        if offset.checked_add(bytes).is_none_or(|end| end > self.bytes) {
            return Err(CommError::invalid("range", format!("{bytes} bytes at {offset} of {}", self.bytes)));
        }
        let at = self.base + offset as u64;
        let stream = crate::stream::Stream::new()?;
        // SAFETY: the range is inside the mapping, and the stream outlives the call.
        check("cuMemsetD32Async", unsafe {
            sys::cuMemsetD32Async(at, word as c_uint, bytes / 4, stream.raw())
        })?;
        stream.wait()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: this object owns the range and what is mapped there. A failure leaves the range to the process's end.
        unsafe {
            if self.mapped {
                let _ = sys::cuMemUnmap(self.base, self.bytes);
            }
            let _ = sys::cuMemAddressFree(self.base, self.bytes);
        }
    }
}
