//! Typed, safe calls on top of [`DeviceComm`](crate::DeviceComm): slices instead of addresses.
//!
//! Owns the checks that a type system and a length can make (element type, lengths, aliasing, whose memory it is), once,
//! so that safe code cannot get them wrong. It never chooses, copies or waits. A method whose operand is read and written at
//! one place says `in_place` in its name, on host slices and on CUDA's alike.

#[cfg(feature = "cudarc")]
mod cuda;
#[cfg(feature = "cudarc")]
mod cuda_fused;
mod host;
mod host_fused;
mod lengths;

#[cfg(feature = "cudarc")]
pub use cuda::CudaSliceExt;
#[cfg(feature = "cudarc")]
pub use cuda_fused::CudaTransfer;
pub use host::HostSliceExt;
pub use host_fused::HostTransfer;

use crate::addr::DeviceAddr;
use crate::dtype::DType;
use crate::fused::TwoGroupNormArgs;

/// The numbers of an RMSNorm; see [`RmsNormArgs`](crate::RmsNormArgs).
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct NormScale {
    /// Added to the mean square. Finite and not negative.
    pub eps: f32,
    /// Added to every weight: 1 for zero-centred weights (Gemma's convention), otherwise 0.
    pub weight_offset: f32,
}

/// Which rows of the matrix belong to whom in a two-group norm; see [`TwoGroupNormArgs`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TwoGroupRows<'a> {
    /// Row at which the reduce group's rows begin.
    pub reduce_first_row: usize,
    /// Rows owned by each rank of the reduce group, in its rank order.
    pub reduce_tokens: &'a [usize],
    /// Row at which the gather group's rows begin.
    pub gather_first_row: usize,
    /// Rows owned by each rank of the gather group, in its rank order.
    pub gather_tokens: &'a [usize],
}

impl<'a> TwoGroupRows<'a> {
    /// The operation's arguments, but for the addresses.
    const fn args(&self, dtype: DType, hidden: usize, scale: NormScale) -> TwoGroupNormArgs<'a> {
        TwoGroupNormArgs {
            hidden_states: DeviceAddr::NULL,
            residual: DeviceAddr::NULL,
            bias: None,
            weight: DeviceAddr::NULL,
            reduce_first_row: self.reduce_first_row,
            reduce_tokens: self.reduce_tokens,
            gather_first_row: self.gather_first_row,
            gather_tokens: self.gather_tokens,
            hidden,
            dtype,
            eps: scale.eps,
            weight_offset: scale.weight_offset,
        }
    }
}
