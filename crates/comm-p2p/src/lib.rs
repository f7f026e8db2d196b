//! Collectives over the memory of the GPUs of one host: kernels that store into and read from each other's memory, with
//! no library in between.
//!
//! [`P2pFactory`] makes [`P2pComm`], a [`DeviceComm`](comm_core::DeviceComm) for 2 to 8 ranks of one host, threads or
//! processes, each with a Hopper GPU (or later) of its own.
//!
//! - Small and middle sizes travel as packs that announce their own arrival, and as lines of 128 bytes that do: no barrier,
//!   no registered memory. So do large gathers and broadcasts whose results are not registered; large sums go by cells or
//!   in steps, which need no registration either.
//! - Other large ones are stored straight, where that is faster, into result buffers that lie in memory of
//!   [`allocate`](comm_core::DeviceComm::allocate), at the same offset of the same allocation on every rank, or on no
//!   rank in any; checked mode compares. If the caller promises the same of its own buffers, by the option
//!   `p2p.symmetric_operands` of [`P2pFactory`], also into those of [`register`](comm_core::DeviceComm::register).
//! - Everything else, any type, reduction and shape, goes through staging memory.
//! - Large results in other memory, captured into a graph, can be made known to the ranks after the capture, by the option
//!   `p2p.graph_registration`.
//!
//! Every operation is a fixed row of kernels on the caller's stream: it can be captured into a CUDA graph and replayed.
//! When a communicator is made, what its GPUs store into and load from each other is checked in both directions, once
//! for a driver and set of GPUs: the verdict is kept in the user's cache folder. `COMM_P2P_CHECK` is `skip` or `force`.
//! `COMM_P2P_TOPOLOGY` imposes a topology ([`P2pComm::topology`]). `COMM_P2P_SHARE_DEVICES` lets ranks share devices, for
//! tests ([`P2pFactory`]).
//!
//! Ranks that call different things, or the same with different arguments, are told so some tens of milliseconds later, by
//! an error that ends the communicator, wherever a comparison of the calls can tell; checked mode refuses such calls.
//!
//! In a hybrid cube mesh, and in other meshes with gaps of at most two links, no rank touches memory other than its own
//! and its neighbours', which is all it has mapped. Data for others is passed on, unchanged, so results have the same
//! bits. The cube has an all-reduce and an all-gather of its own; the rest is staged.
//!
//! Which algorithm carries out an operation of which size is a table for the kind of GPU and the number of ranks
//! ([`comm_core::tuning`]). Those for H200 are built in and serve other GPUs too; a user's own, from `cargo xtask tune`,
//! is named by `COMM_P2P_TABLE`. `COMM_P2P_ALGO` forces an algorithm wherever it can be used.
//!
//! Every wait in a kernel ends by the communicator's timeout, or as soon as a rank's death is known.

#![deny(missing_docs)]

mod blame;
mod call;
mod candidates;
mod captured;
mod comm;
mod control;
mod create;
mod factory;
mod fitness;
mod ledger;
mod memory;
mod mesh;
mod ops;
mod options;
mod order;
mod placement;
mod room;
mod select;
mod state;
mod stream;
mod symmetric;
mod tables;
mod topology;
mod usage;
mod watchdog;

pub use candidates::{TUNABLE, candidates};
pub use comm::P2pComm;
pub use factory::P2pFactory;

/// The backend's name.
pub const NAME: &str = "p2p";
