//! CUDA kernels and, beside each, its typed launcher; how compiled kernels are found and loaded; and the CUDA side of
//! comm-core's [`DeviceMemory`](comm_core::DeviceMemory).
//!
//! - [`Kernels`]: the launchers. Every launch is asynchronous and can be captured in a CUDA graph: it allocates
//!   nothing and waits for nothing.
//! - [`p2p`]: the launchers of kernels that reach into other ranks' memory.
//! - [`layer`]: the small kernels of a decoder layer, for examples and benchmarks that need a model.
//! - [`pattern`]: the data that [`Kernels::fill`] and [`Kernels::verify`] make and check, on the host. No CUDA needed.
//! - [`mod@reference`]: what the kernels should compute, slowly, on the host; for tests.
//! - [`CudaMemory`], [`CapturedGraph`], [`EventTimer`]: memory, graphs and time for tests, benchmarks and examples.
//! - [`driver`]: whether there is a driver; call [`driver::probe`] before anything else that touches CUDA.
//! - [`capture`]: what a library needs to know of the graph that it is being captured into.
//! - [`order`]: how calls that share something on the device keep their order on several streams.
//! - `nvml` (feature `nvml`): the management library, started once a process.
//! - [`raw`] and [`exit`]: driver calls that backends share, and what the end of the process waits for.
//! - [`launched`]: which kernels were launched, for programs that are to try all.
//! - [`locate`] and [`manifest`]: where compiled kernels come from. They are built by `cargo xtask kernels`; without
//!   them this crate compiles, and using a kernel says what to do.
//!
//! This crate holds no policy: which kernel is used when, and on what grounds, is decided by its users.

#![deny(missing_docs)]

pub mod capture;
pub mod driver;
pub mod exit;
mod graph;
mod kernels;
pub mod launched;
pub mod layer;
pub mod locate;
pub mod manifest;
mod memory;
pub mod module;
#[cfg(feature = "nvml")]
pub mod nvml;
pub mod order;
pub mod p2p;
pub mod pattern;
pub mod raw;
pub mod reference;
mod reserve;

pub use graph::{CapturedGraph, EventTimer};
pub use kernels::{Kernels, MAX_REDUCE_INPUTS, Mark, MarkNode};
pub use memory::CudaMemory;
