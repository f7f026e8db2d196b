//! The vocabulary and the contracts of the workspace: element types, reductions, errors, the [`DeviceComm`] and
//! [`HostComm`] traits, and the argument checks that every backend shares.
//!
//! This crate never touches CUDA. It compiles anywhere in seconds, and a backend outside this workspace needs nothing
//! but this crate to join in.

#![deny(missing_docs)]

mod addr;
pub mod check;
pub mod compose;
#[cfg(feature = "conformance")]
pub mod conformance;
mod device_comm;
mod dtype;
mod error;
mod facts;
mod fused;
#[cfg(feature = "host-backend")]
mod host_backend;
mod host_comm;
mod memory;
pub mod norm;
mod op;
pub mod quantize;
mod registry;
mod tiered;
pub mod topology;
pub mod tuning;
mod typed;
mod usage;

pub use addr::{DeviceAddr, StreamHandle};
pub use device_comm::{AlgorithmUsage, CommInfo, DeviceComm, P2pOp, Registration};
pub use dtype::{DType, Element, F8E4M3, F8E5M2, ReduceOp};
pub use error::{CallSite, CommError, Result};
pub use fused::{Block2d, NormQuantScale, NormQuantization, RmsNormArgs, TwoGroupNormArgs};
#[cfg(feature = "host-backend")]
pub use host_backend::{HostBackend, HostFactory};
pub use host_comm::{
    Deadline, HostComm, HostCommExt, HostNumber, HostReduceOp, Rendezvous, RendezvousAddress, SocketComm,
    ThreadComm, Token, local_rank_from_env, run_threads,
};
pub use memory::{DeviceMemory, HostMemory, MemoryKind};
pub use op::{OpKind, OpQuery, Support};
pub use registry::{BackendFactory, Capability, CreateContext, Registry, create_with};
pub use tiered::{SkippedTier, TieredComm};
pub use typed::{
    BlockShape, Fp8Bits, HostNormQuantization, HostQuantScale, HostSliceExt, HostTransfer, NormScale,
    TwoGroupRows,
};
#[cfg(feature = "cudarc")]
pub use typed::{CommSlice, CudaNormQuantization, CudaQuantScale, CudaSliceExt, CudaTransfer, allocate_cuda};
pub use usage::{CountedAlgorithm, UsageTable};
