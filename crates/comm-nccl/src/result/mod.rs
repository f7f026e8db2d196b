//! Thin wrappers over [`sys`](crate::sys): the loaded library, and its statuses as [`Result`](comm_core::Result)s with
//! the library's own words.
//!
//! Owns the search for the library and the translation of statuses; it never waits and never tracks state.

mod calls;
mod library;
mod search;

pub use calls::Progress;
pub use library::{NcclLibrary, Version};
