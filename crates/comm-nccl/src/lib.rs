//! NCCL, found and loaded at run time, as a backend for [`comm_core`].
//!
//! Three layers: [`sys`] holds the C interface, [`result`] puts [`Result`](comm_core::Result)s in place of statuses,
//! and [`NcclFactory`] makes communicators that are [`DeviceComm`](comm_core::DeviceComm)s. Nothing is linked at build
//! time; without a driver or without NCCL the crate compiles and says what is missing.
//!
//! The crate sets no environment variables. NCCL reads its own (`NCCL_*`) when it first makes a communicator, so whoever
//! starts the process decides them. NCCL's data sockets are unauthenticated, whatever the rendezvous did.

#![deny(missing_docs)]

use comm_kernels::raw as driver;
pub mod result;
mod safe;
pub mod sys;

pub use result::{NcclLibrary, Version};
pub use safe::{NcclComm, NcclFactory};

/// The backend's name.
pub const NAME: &str = "nccl";
