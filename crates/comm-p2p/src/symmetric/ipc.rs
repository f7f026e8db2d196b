//! Memory that the caller owns, made visible to the other ranks: by its address between threads of one process, by
//! legacy IPC between processes.
//!
//! Owns the mappings of other ranks' exports. Never communicates.

use std::collections::BTreeMap;
use std::ffi::{c_char, c_int, c_uint, c_void};
use std::sync::{Mutex, PoisonError};

use comm_core::{CommError, DeviceAddr, Result};
use comm_kernels::raw::{Current, check};
use cudarc::driver::sys;
use serde::{Deserialize, Serialize};

/// How one rank's buffer can be reached by the others.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Export {
    /// First byte, in the owner's addresses.
    pub(crate) addr: u64,
    /// First byte of the allocation that it lies in.
    pub(crate) base: u64,
    /// The driver's name for the allocation; empty between threads.
    pub(crate) handle: Vec<u8>,
    /// The owner's device.
    pub(crate) ordinal: usize,
}

/// What other ranks need to reach `bytes` bytes at `addr`, or why they cannot.
pub(crate) fn export(
    addr: DeviceAddr,
    bytes: usize,
    ordinal: usize,
    same_process: bool,
) -> Result<Export, String> {
    let (mut base, mut size) = (0, 0);
    // SAFETY: the pointers are valid for the writes; an address that is no device memory gives an error.
    let code = unsafe { sys::cuMemGetAddressRange_v2(&raw mut base, &raw mut size, addr.0) };
    check("cuMemGetAddressRange", code).map_err(|error| format!("it is not device memory: {error}"))?;
    if addr.0 - base + bytes as u64 > size as u64 {
        return Err(format!("it does not lie in one allocation: {size} bytes at {base:#x}"));
    }
    let mut capable: c_int = 0;
    let attribute = sys::CUpointer_attribute::CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE;
    // SAFETY: the attribute is an int.
    let code = unsafe { sys::cuPointerGetAttribute((&raw mut capable).cast::<c_void>(), attribute, base) };
    check("cuPointerGetAttribute", code).map_err(|error| error.to_string())?;
    if capable == 0 {
        return Err(
            "it was not allocated by cuMemAlloc: memory of pools and of virtual allocations cannot be \
                    exported; allocate it with the communicator"
                .into(),
        );
    }
    let mut handle = Vec::new();
    if !same_process {
        let mut raw = sys::CUipcMemHandle { reserved: [0; 64] };
        // SAFETY: the base is a live allocation, says the driver.
        let code = unsafe { sys::cuIpcGetMemHandle(&raw mut raw, base) };
        check("cuIpcGetMemHandle", code).map_err(|error| error.to_string())?;
        handle = raw.reserved.iter().map(|&byte| byte as u8).collect();
    }
    Ok(Export { addr: addr.0, base, handle, ordinal })
}

/// The driver's number for the allocation that an address lies in, never used twice in a process: by it memory that was
/// freed, and perhaps allocated anew at the same address, is told from what was there.
pub(crate) fn allocation_id(addr: DeviceAddr) -> Result<u64> {
    let mut id = 0_u64;
    let attribute = sys::CUpointer_attribute::CU_POINTER_ATTRIBUTE_BUFFER_ID;
    // SAFETY: the attribute is a 64-bit number; an address that is no memory gives an error.
    let code = unsafe { sys::cuPointerGetAttribute((&raw mut id).cast::<c_void>(), attribute, addr.0) };
    check("cuPointerGetAttribute", code).map(|()| id)
}

/// Allocations opened in this process, by device and handle: several buffers, of several
/// communicators, may lie in one, which is opened for all of them at once.
static OPEN: Mutex<BTreeMap<Key, Mapped>> = Mutex::new(BTreeMap::new());

type Key = (usize, Vec<u8>);

struct Mapped {
    base: sys::CUdeviceptr,
    users: usize,
}

/// Another rank's buffer as seen from here. Once nobody holds it, what was opened for it can be closed ([`close_unused`]).
pub(crate) struct Opened {
    pub(crate) addr: DeviceAddr,
    key: Option<Key>,
}

/// Opens another rank's export for device `ordinal`, whose context is current.
pub(crate) fn open(export: &Export, ordinal: usize) -> Result<Opened> {
    if export.handle.is_empty() {
        // Ranks on one device share its context; a context is no peer of itself.
        if export.ordinal != ordinal {
            enable_peer(export.ordinal)?;
        }
        return Ok(Opened { addr: DeviceAddr(export.addr), key: None });
    }
    let key = (ordinal, export.handle.clone());
    let mut table = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
    let base = match table.get_mut(&key) {
        Some(mapped) => {
            mapped.users += 1;
            mapped.base
        }
        None => {
            let base = map(&export.handle)?;
            table.insert(key.clone(), Mapped { base, users: 1 });
            base
        }
    };
    Ok(Opened { addr: DeviceAddr(base + (export.addr - export.base)), key: Some(key) })
}

fn map(handle: &[u8]) -> Result<sys::CUdeviceptr> {
    let mut raw = sys::CUipcMemHandle { reserved: [0; 64] };
    if handle.len() != raw.reserved.len() {
        return Err(CommError::invalid("handle", format!("{} bytes, not 64", handle.len())));
    }
    for (to, &from) in raw.reserved.iter_mut().zip(handle) {
        *to = from as c_char;
    }
    let mut base = 0;
    let flags = sys::CUipcMem_flags::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as c_uint;
    // SAFETY: the handle is another rank's, exported for a range that it keeps until it is deregistered.
    check("cuIpcOpenMemHandle", unsafe { sys::cuIpcOpenMemHandle_v2(&raw mut base, raw, flags) })?;
    Ok(base)
}

impl Drop for Opened {
    fn drop(&mut self) {
        let Some(key) = self.key.take() else { return };
        let mut table = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(mapped) = table.get_mut(&key) else { return };
        mapped.users -= 1;
        if mapped.users == 0 {
            let base = mapped.base;
            DUE.lock().unwrap_or_else(PoisonError::into_inner).push((key.0, base));
            table.remove(&key);
        }
    }
}

/// Mappings without users, by device. Closing one waits for everything on the device, and meanwhile no thread of the
/// process can launch anything there: not even what is being waited for. So that is left to calls of which callers know
/// that they may wait, and to the end of the last communicator on the device.
static DUE: Mutex<Vec<(usize, sys::CUdeviceptr)>> = Mutex::new(Vec::new());

/// Communicators by device.
static USERS: Mutex<BTreeMap<usize, usize>> = Mutex::new(BTreeMap::new());

/// Closes the mappings of a device that have no users any more. Its context is current.
pub(crate) fn close_unused(ordinal: usize) {
    let due: Vec<_> = {
        let mut due = DUE.lock().unwrap_or_else(PoisonError::into_inner);
        due.extract_if(.., |&mut (of, _)| of == ordinal).collect()
    };
    for (_, base) in due {
        // Should somebody have opened the allocation again meanwhile, the driver has counted both and keeps it mapped.
        // SAFETY: it was opened here and its last user is gone, who saw to it that nothing runs that uses it.
        let _ = unsafe { sys::cuIpcCloseMemHandle(base) };
    }
}

/// A communicator on a device, which may open others' memory there. The last to be dropped closes what is unused; the
/// context is current then.
pub(crate) struct User(usize);

impl User {
    pub(crate) fn new(ordinal: usize) -> Self {
        *USERS.lock().unwrap_or_else(PoisonError::into_inner).entry(ordinal).or_default() += 1;
        Self(ordinal)
    }
}

impl Drop for User {
    fn drop(&mut self) {
        let mut users = USERS.lock().unwrap_or_else(PoisonError::into_inner);
        let left = users.get_mut(&self.0).map_or(0, |users| {
            *users -= 1;
            *users
        });
        drop(users);
        if left == 0 {
            close_unused(self.0);
        }
    }
}

/// Lets kernels of the current context use addresses of device `ordinal`'s primary context. It stays so: others in the
/// process may rely on it as well.
fn enable_peer(ordinal: usize) -> Result<()> {
    // Dropping a context makes it current. Declared first, so that this puts the caller's back after that: the next
    // peer would otherwise be opened to this peer instead of to the caller.
    let _current = Current::remember()?;
    let peer = comm_kernels::raw::context(ordinal)?;
    // SAFETY: the context is live: it is held until after the call, and primary contexts are shared.
    match unsafe { sys::cuCtxEnablePeerAccess(peer.cu_ctx(), 0) } {
        sys::CUresult::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED => Ok(()),
        code => check("cuCtxEnablePeerAccess", code),
    }
}
