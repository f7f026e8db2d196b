//! NCCL's C interface: types, constants and function pointers, as its header declares them.
//!
//! Owns the layouts and the loading of symbols; it never calls anything and never interprets a status.

mod api;
mod types;

pub use api::Api;
pub use types::*;
