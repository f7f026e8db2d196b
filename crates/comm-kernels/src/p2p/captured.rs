//! Launchers of the large operations whose result buffers are registered after they have been captured.

use std::ffi::c_void;
use std::fmt;
use std::sync::Arc;

use comm_core::{DType, DeviceAddr, Result, StreamHandle};
use cudarc::driver::CudaContext;

use super::functions::{PerFloat, by_world, float_index, per_float};
use super::{Link, Overlap, Peers, Shape, Units, check_direct, check_flags, check_shape};
use crate::kernels::parameters;
use crate::module::{Function, Module};

/// Bytes of an entry.
pub const CAPTURED_ENTRY_BYTES: usize = 128;

/// `CapturedEntry` of `captured.cuh`: how a replay reaches the ranks' result buffers. Zero bytes are an unset one.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct CapturedEntry {
    recv: Peers,
    way: u32,
    reserved: [u32; 15],
}

impl CapturedEntry {
    /// Every rank's result buffer, as mapped here.
    #[must_use]
    pub const fn mapped(recv: Peers) -> Self {
        Self { recv, way: 1, reserved: [0; 15] }
    }

    /// The results cannot be mapped everywhere: they travel by scratch memory.
    #[must_use]
    pub const fn scratch() -> Self {
        Self { recv: [DeviceAddr::NULL; super::MAX_RANKS], way: 2, reserved: [0; 15] }
    }

    /// The bytes that the kernels read.
    #[must_use]
    pub fn bytes(&self) -> [u8; CAPTURED_ENTRY_BYTES] {
        let mut bytes = [0; CAPTURED_ENTRY_BYTES];
        for (to, peer) in bytes.chunks_exact_mut(8).zip(self.recv) {
            to.copy_from_slice(&peer.0.to_ne_bytes());
        }
        bytes[64..68].copy_from_slice(&self.way.to_ne_bytes());
        bytes
    }
}

/// The kernels of one world size, loaded into one context.
pub struct CapturedKernels {
    context: Arc<CudaContext>,
    overlap: Overlap,
    all_reduce: [PerFloat; 2],
    all_gather: Function,
}

impl fmt::Debug for CapturedKernels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CapturedKernels").finish_non_exhaustive()
    }
}

/// # Safety contract shared by all launchers
/// As for [`P2pKernels`](super::P2pKernels). `entry` names [`CAPTURED_ENTRY_BYTES`] of this rank's device memory, 128-byte
/// aligned, that are zero or hold a [`CapturedEntry`], and change only while no launch that was given them runs; what the
/// entry names is valid for writes whenever one does. Every rank passes the entry of the same call.
#[allow(clippy::missing_safety_doc, reason = "the block's comment holds for every method")]
impl CapturedKernels {
    /// Loads the kernels for `world` ranks (2 to 8) into `context`, code included; `overlap` as for the others.
    ///
    /// # Errors
    /// As [`P2pKernels::load`](super::P2pKernels::load).
    pub fn load(context: &Arc<CudaContext>, world: usize, overlap: Overlap) -> Result<Self> {
        let module = Module::load(context, "p2p_captured")?;
        Ok(Self {
            context: Arc::clone(context),
            overlap,
            all_reduce: [per_float!(module, world, "p2p_arg2"), per_float!(module, world, "p2p_arg4")],
            all_gather: module.function(by_world!(world, "p2p_agg"))?,
        })
    }

    unsafe fn launch(
        &self,
        function: &Function,
        shape: Shape,
        stream: StreamHandle,
        parameters: &mut [*mut c_void],
    ) -> Result<()> {
        let threads = (shape.grid, shape.block);
        // SAFETY: the callers vouch for the parameters and for the kernel's waiting.
        unsafe { function.launch_after(&self.context, threads, 1, self.overlap, stream, parameters) }
    }

    /// Sum all-reduce by cells, or in two shots where the entry says so. `cells` and `lamport` are those channels.
    ///
    /// # Errors
    /// [`InvalidArgument`](comm_core::CommError::InvalidArgument), [`Cuda`](comm_core::CommError::Cuda).
    pub unsafe fn all_reduce(
        &self,
        (cells, lamport): (&Link, &Link),
        units: Units,
        (send, recv): (DeviceAddr, DeviceAddr),
        count: usize,
        dtype: DType,
        shape: Shape,
        entry: DeviceAddr,
        stream: StreamHandle,
    ) -> Result<()> {
        check_flags(shape, lamport.slot_packs.into())?;
        let function = &self.all_reduce[units as usize][float_index(dtype)?];
        let count = count as u64;
        let mut parameters = parameters![*cells, *lamport, send, recv, count, entry];
        // SAFETY: these are the kernel's parameters; the caller vouches for what they name. The kernel waits for its
        // predecessor before it touches memory, but for the entry, which no kernel writes.
        unsafe { self.launch(function, shape, stream, &mut parameters) }
    }

    /// All-gather of `bytes` bytes a rank by stores into the peers' results, or by packets where the entry says so.
    /// `link` is the packet channel's.
    ///
    /// # Errors
    /// [`InvalidArgument`](comm_core::CommError::InvalidArgument), [`Cuda`](comm_core::CommError::Cuda).
    pub unsafe fn all_gather(
        &self,
        link: &Link,
        (send, recv): (DeviceAddr, DeviceAddr),
        (bytes, chunk): (usize, u32),
        shape: Shape,
        entry: DeviceAddr,
        stream: StreamHandle,
    ) -> Result<()> {
        check_direct(shape, chunk)?;
        check_shape(shape, link.slot_packs.into())?;
        let (bytes, function) = (bytes as u64, &self.all_gather);
        let mut parameters = parameters![*link, send, recv, bytes, chunk, entry];
        // SAFETY: as above.
        unsafe { self.launch(function, shape, stream, &mut parameters) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_laid_out_as_the_kernels_read_them() {
        assert_eq!(size_of::<CapturedEntry>(), CAPTURED_ENTRY_BYTES);
        let mut peers = Peers::default();
        (peers[0], peers[7]) = (DeviceAddr(0x1122), DeviceAddr(7));
        let bytes = CapturedEntry::mapped(peers).bytes();
        assert_eq!((bytes[0], bytes[1], bytes[56], bytes[64]), (0x22, 0x11, 7, 1));
        assert_eq!(CapturedEntry::scratch().bytes()[64], 2);
        assert!(CapturedEntry::scratch().bytes()[..64].iter().all(|&byte| byte == 0));
    }
}
