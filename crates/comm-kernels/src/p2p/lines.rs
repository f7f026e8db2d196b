//! Launchers of all-gather, broadcast and reduce-scatter by lines: `cuda/p2p/lines.cu`.

use std::sync::Arc;

use comm_core::{CommError, DType, DeviceAddr, Result, StreamHandle};
use cudarc::driver::CudaContext;

use super::functions::{PerFloat, by_world, float_index, per_float};
use super::{Link, P2pKernels, Shape, check_flags};
use crate::kernels::parameters;
use crate::module::{Function, Module};

/// Packs that a warp has in one slot of a channel of lines: a burst.
pub const BURST_PACKS: usize = 128;
/// Payload of a burst, in bytes: 31 of 32.
pub const BURST_BYTES: usize = 1984;

/// Most threads of a block: with twice as many, a warp's bursts would not fit into its registers.
pub const MAX_LINE_BLOCK: u32 = 256;

/// The entry points of one world size.
pub(super) struct LineFunctions {
    all_gather: Function,
    broadcast: Function,
    reduce_scatter: PerFloat,
}

impl LineFunctions {
    pub(super) fn load(context: &Arc<CudaContext>, world: usize) -> Result<Self> {
        let lines = Module::load(context, "p2p_lines")?;
        Ok(Self {
            all_gather: lines.function(by_world!(world, "p2p_ag_lines"))?,
            broadcast: lines.function(by_world!(world, "p2p_bc_lines"))?,
            reduce_scatter: per_float!(lines, world, "p2p_rs_lines"),
        })
    }
}

fn check(link: &Link, shape: Shape) -> Result<()> {
    check_flags(shape, u64::from(link.slot_packs) / 4)?;
    if shape.block > MAX_LINE_BLOCK {
        let found = format!("blocks of {} threads; at most {MAX_LINE_BLOCK}", shape.block);
        return Err(CommError::invalid("shape", found));
    }
    Ok(())
}

/// The safety contract is that of [`P2pKernels`]' other launchers; `link` is the lines' channel's, its `slot_packs` a
/// multiple of [`BURST_PACKS`].
#[allow(clippy::missing_safety_doc, reason = "the block's comment holds for every method")]
impl P2pKernels {
    /// All-gather by lines, `bytes` bytes a rank. Blocks of whole warps; a quarter of `slot_packs` threads at most.
    ///
    /// # Errors
    /// [`CommError::InvalidArgument`], [`CommError::Cuda`].
    pub unsafe fn all_gather_lines(
        &self,
        link: &Link,
        (send, recv): (DeviceAddr, DeviceAddr),
        bytes: usize,
        shape: Shape,
        stream: StreamHandle,
    ) -> Result<()> {
        check(link, shape)?;
        let bytes = bytes as u64;
        let function = &self.functions.lines.all_gather;
        // SAFETY: these are the kernel's parameters; the caller vouches for what they name.
        unsafe { self.launch(function, shape, stream, &mut parameters![*link, send, recv, bytes]) }
    }

    /// Sum reduce-scatter of bf16, f16 or f32 by lines, `count` elements a rank. Blocks and threads as for the all-gather.
    ///
    /// # Errors
    /// [`CommError::InvalidArgument`], [`CommError::Cuda`].
    pub unsafe fn reduce_scatter_lines(
        &self,
        link: &Link,
        (send, recv): (DeviceAddr, DeviceAddr),
        count: usize,
        dtype: DType,
        shape: Shape,
        stream: StreamHandle,
    ) -> Result<()> {
        check(link, shape)?;
        let function = &self.functions.lines.reduce_scatter[float_index(dtype)?];
        let count = count as u64;
        // SAFETY: as above.
        unsafe { self.launch(function, shape, stream, &mut parameters![*link, send, recv, count]) }
    }

    /// Broadcast by lines, over the other ranks as relays. Blocks and threads as for the all-gather.
    ///
    /// # Errors
    /// [`CommError::InvalidArgument`], [`CommError::Cuda`].
    pub unsafe fn broadcast_lines(
        &self,
        link: &Link,
        (send, recv): (DeviceAddr, DeviceAddr),
        bytes: usize,
        root: usize,
        shape: Shape,
        stream: StreamHandle,
    ) -> Result<()> {
        check(link, shape)?;
        let (bytes, root) = (bytes as u64, root as u32);
        let function = &self.functions.lines.broadcast;
        // SAFETY: as above.
        unsafe { self.launch(function, shape, stream, &mut parameters![*link, send, recv, bytes, root]) }
    }
}
