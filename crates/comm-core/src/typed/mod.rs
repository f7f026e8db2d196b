//! Typed, safe calls on top of [`DeviceComm`](crate::DeviceComm): slices instead of addresses.
//!
//! Owns the checks that a type system and a length can make (element type, lengths, aliasing, whose memory it is), once,
//! so that safe code cannot get them wrong. It never chooses, copies or waits, but where memory is given back. A method
//! whose operand is read and written at one place says `in_place` in its name, on host slices and on CUDA's alike.

#[cfg(feature = "cudarc")]
mod cuda;
#[cfg(feature = "cudarc")]
mod cuda_call;
#[cfg(feature = "cudarc")]
mod cuda_fused;
#[cfg(feature = "cudarc")]
mod cuda_memory;
mod host;
mod host_fused;
mod lengths;
mod shapes;

#[cfg(feature = "cudarc")]
pub use cuda::CudaSliceExt;
#[cfg(feature = "cudarc")]
pub use cuda_fused::{CudaNormQuantization, CudaQuantScale, CudaTransfer};
#[cfg(feature = "cudarc")]
pub use cuda_memory::{CommSlice, allocate_cuda};
pub use host::HostSliceExt;
pub use host_fused::{HostNormQuantization, HostQuantScale, HostTransfer};
pub use shapes::{BlockShape, Fp8Bits, NormScale, TwoGroupRows};
