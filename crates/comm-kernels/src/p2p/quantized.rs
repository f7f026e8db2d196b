//! Launcher of the quantised all-reduce.

use comm_core::{CommError, DType, DeviceAddr, Result, StreamHandle};

use super::functions::float_index;
use super::{Link, P2pKernels, Shape, check_shape};
use crate::kernels::parameters;

/// Elements of a row: what a warp moves per slice and round.
pub const QUANTIZED_ROW: usize = 512;
/// Packs of a row on the wire: 16 elements in each of 32, and the scales.
pub const QUANTIZED_PACKS: usize = 33;
const WARP: u32 = 32;

#[allow(clippy::missing_safety_doc, reason = "as for the other launchers")]
impl P2pKernels {
    /// The quantised sum all-reduce of bf16, f16 or f32; any count but zero. `link` is the Lamport channel's;
    /// `shape.block` is a multiple of 32, and each warp takes [`QUANTIZED_PACKS`] of its `slot_packs`.
    ///
    /// # Errors
    /// [`CommError::InvalidArgument`], [`CommError::Cuda`].
    pub unsafe fn all_reduce_quantized(
        &self,
        link: &Link,
        (send, recv): (DeviceAddr, DeviceAddr),
        count: usize,
        dtype: DType,
        shape: Shape,
        stream: StreamHandle,
    ) -> Result<()> {
        check_shape(shape, u64::MAX)?;
        let warps = shape.threads() / u64::from(WARP);
        let rows = count.div_ceil(QUANTIZED_ROW).div_ceil(self.world) as u64;
        if !shape.block.is_multiple_of(WARP)
            || warps * QUANTIZED_PACKS as u64 > link.slot_packs.into()
            || (warps < rows && warps < self.world as u64)
        {
            return Err(CommError::invalid(
                "shape",
                format!(
                    "{} blocks of {} threads for {rows} rows a slice; {QUANTIZED_PACKS} packs a warp, {} fit",
                    shape.grid, shape.block, link.slot_packs
                ),
            ));
        }
        let function = &self.functions.quantized[float_index(dtype)?];
        let count = count as u64;
        // SAFETY: these are the kernel's parameters; the caller vouches for what they name.
        unsafe { self.launch(function, shape, stream, &mut parameters![*link, send, recv, count]) }
    }
}
