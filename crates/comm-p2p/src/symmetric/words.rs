//! The page of host memory by which host and kernels tell each other that something is wrong.

use std::ffi::{c_uint, c_void};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

use comm_core::{DeviceAddr, Result};
use comm_kernels::p2p::ErrorRecord;
use comm_kernels::raw::check;
use cudarc::driver::sys;

const BYTES: usize = 4096;
/// Apart from the abort word, so that kernels which read that do not share a line with one that writes this.
const ERROR_OFFSET: usize = 256;

/// An abort word and an error record in host memory that the device sees.
pub(crate) struct Words {
    host: *mut c_void,
    device: DeviceAddr,
    /// The number of the context that it was allocated in.
    context: u64,
}

/// Pages that nobody uses: of which context, and where on host and device. The driver waits for the whole device before it
/// frees one, and lets no thread of the process launch anything meanwhile: not even what the device is waiting for. So none
/// is freed. A page goes when its context goes, whose number never comes again; until then the next communicator takes it.
static IDLE: Mutex<Vec<(u64, usize, DeviceAddr)>> = Mutex::new(Vec::new());

fn take_idle(context: u64) -> Option<Words> {
    let mut idle = IDLE.lock().unwrap_or_else(PoisonError::into_inner);
    let at = idle.iter().position(|&(of, ..)| of == context)?;
    let (_, host, device) = idle.swap_remove(at);
    Some(Words { host: std::ptr::with_exposed_provenance_mut(host), device, context })
}

// SAFETY: the memory is plain, and all access goes through atomics and volatile reads.
unsafe impl Send for Words {}
// SAFETY: as above.
unsafe impl Sync for Words {}

impl Words {
    /// The context is current.
    pub(crate) fn new() -> Result<Self> {
        let mut context = 0;
        // SAFETY: a null context stands for the current one; the pointer is valid for the write.
        check("cuCtxGetId", unsafe { sys::cuCtxGetId(std::ptr::null_mut(), &raw mut context) })?;
        let words = match take_idle(context) {
            Some(words) => words,
            None => Self::allocate(context)?,
        };
        // SAFETY: the page is that large, and nobody else's.
        unsafe { words.host.cast::<u8>().write_bytes(0, BYTES) };
        Ok(words)
    }

    fn allocate(context: u64) -> Result<Self> {
        let flags = (sys::CU_MEMHOSTALLOC_PORTABLE | sys::CU_MEMHOSTALLOC_DEVICEMAP) as c_uint;
        let mut host = std::ptr::null_mut();
        // SAFETY: the pointer is valid for the write.
        check("cuMemHostAlloc", unsafe { sys::cuMemHostAlloc(&raw mut host, BYTES, flags) })?;
        let mut device = DeviceAddr::NULL;
        // SAFETY: the memory is mapped for the device.
        let code = unsafe { sys::cuMemHostGetDevicePointer_v2(&raw mut device.0, host, 0) };
        // Only what the device sees may come among the idle pages.
        check("cuMemHostGetDevicePointer", code).inspect_err(|_| {
            // SAFETY: it has just been allocated, and nobody has it.
            let _ = unsafe { sys::cuMemFreeHost(host) };
        })?;
        Ok(Self { host, device, context })
    }

    pub(crate) const fn abort_addr(&self) -> DeviceAddr {
        self.device
    }

    pub(crate) const fn error_addr(&self) -> DeviceAddr {
        self.device.offset(ERROR_OFFSET as u64)
    }

    /// Has every wait end, on this rank.
    pub(crate) fn abort(&self) {
        // SAFETY: the word lies at the start of the page, aligned, and lives as long as this object.
        unsafe { AtomicU32::from_ptr(self.host.cast()) }.store(1, Ordering::Release);
    }

    /// The wait that was given up, if one was.
    pub(crate) fn error(&self) -> Option<ErrorRecord> {
        // SAFETY: the page is large enough and lives as long as this object.
        let record = unsafe { self.host.cast::<u8>().add(ERROR_OFFSET) }.cast::<ErrorRecord>();
        // SAFETY: `cause` is the record's first word, aligned; kernels write it once, last.
        let cause = unsafe { AtomicU32::from_ptr(record.cast()) }.load(Ordering::Acquire);
        // SAFETY: the other fields were written before the cause and do not change any more.
        (cause != 0).then(|| unsafe { record.read_volatile() })
    }
}

impl Drop for Words {
    fn drop(&mut self) {
        // Its owner sees to it that no kernel runs any more that knows it.
        let page = (self.context, self.host.expose_provenance(), self.device);
        IDLE.lock().unwrap_or_else(PoisonError::into_inner).push(page);
    }
}
