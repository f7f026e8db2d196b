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

/// The numbers of an RMSNorm; see [`RmsNormArgs`](crate::RmsNormArgs).
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct NormScale {
    /// Added to the mean square. Finite and not negative.
    pub eps: f32,
    /// Added to every weight: 1 for zero-centred weights (Gemma's convention), otherwise 0.
    pub weight_offset: f32,
}
