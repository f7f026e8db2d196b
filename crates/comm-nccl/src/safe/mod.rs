//! The backend: communicators over NCCL that notice failures and never wait without a bound.
//!
//! Owns the policy: which NCCL call serves which operation, when a failure is declared and how a communicator ends. It
//! calls NCCL only under the communicator's lock, so that an abort never finds another thread inside.

mod comm;
mod create;
mod diagnose;
mod factory;
mod farewell;
mod gather2d;
mod laggards;
mod limits;
mod marks;
mod memory;
mod norm;
mod ops;
mod options;
mod remains;
mod runs;
mod split;
mod state;
mod track;
mod transfers;
mod usage;
mod vector;
mod watchdog;

pub use comm::NcclComm;
pub use factory::NcclFactory;
