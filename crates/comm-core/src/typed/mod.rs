//! Typed, safe calls on top of [`DeviceComm`](crate::DeviceComm): slices instead of addresses.
//!
//! Owns the checks that a type system and a length can make (element type, lengths, aliasing, whose memory it is), once,
//! so that safe code cannot get them wrong. It never chooses, copies or waits.

#[cfg(feature = "cudarc")]
mod cuda;
mod host;
mod lengths;

#[cfg(feature = "cudarc")]
pub use cuda::CudaSliceExt;
pub use host::HostSliceExt;
