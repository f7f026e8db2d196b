//! The host backend: [`DeviceComm`](crate::DeviceComm) over host memory, between threads of one process or processes of
//! one host.
//!
//! Every collective begins with a step at which all ranks publish what they call and where their operands lie. Small
//! operands travel in shared staging windows with that very step. Large ones are read where they lie if every rank can
//! reach them (threads, or memory from `allocate`; gathers also read other processes' memory through the kernel), and otherwise flow through the windows piece by piece. Which it is
//! depends on what all ranks share.
//!
//! The module never keeps a pointer to an operand after the call, and never waits without a deadline.

mod all_reduce;
mod backend;
mod call;
mod cause;
mod control;
mod core;
mod create;
mod gather;
mod layout;
mod memory;
mod norm;
mod p2p;
mod quantized;
mod reduce;
mod remote;
mod scatter;
mod segment;
mod usage;
mod wait;

pub use backend::HostBackend;
pub use create::HostFactory;

/// The backend's name.
const NAME: &str = "host";
