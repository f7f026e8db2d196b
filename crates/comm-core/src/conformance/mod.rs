//! A suite that a backend can run on itself.
//!
//! [`run_rank`] is called by every rank of a world; [`run_threads`] does everything with one call, ranks as threads:
//!
//! ```no_run
//! use std::sync::Arc;
//! use comm_core::conformance::{Config, run_threads};
//! use comm_core::{BackendFactory, HostMemory};
//!
//! fn check(factory: Arc<dyn BackendFactory>) {
//!     let report = run_threads(factory, 4, |_rank| Box::new(HostMemory::new()), &Config::full());
//!     println!("{report}");
//!     assert!(report.is_success());
//! }
//! ```
//!
//! The suite knows a backend only by [`DeviceComm`] and its memory only by
//! [`DeviceMemory`]. What [`supports`](DeviceComm::supports) refuses is checked to be
//! refused by the call as well, and reported as skipped with the backend's reason.
//!
//! Tolerances: none, except for sums and averages of arbitrary values and averages over a number of ranks that is no
//! power of two where [`Config::ordered_sums`] is off, and for the fused norms' outputs (one unit in the last place for
//! 16-bit types, four for `f32`, whose reciprocal square root may be off by two on a device).

#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    reason = "bit patterns are cut to their element's size on purpose"
)]

mod buffers;
mod case;
mod cases;
mod config;
mod data;
mod launch;
mod reference;
mod report;
mod runner;

use std::sync::Arc;

pub use config::Config;
pub use launch::run_threads;
pub use report::{Failure, Report, Skipped};

use crate::device_comm::DeviceComm;
use crate::host_comm::HostComm;
use crate::memory::DeviceMemory;

/// Runs the suite on one rank. Collective: every rank of `comm` calls it with equal `config`; `host` is a communicator
/// between the same ranks, in the same order, that nobody else uses meanwhile. The report is equal on all ranks.
///
/// Never hangs as long as the communicator keeps its promise that no wait is unbounded. With
/// [`Config::close`] the communicator is closed afterwards.
#[must_use]
pub fn run_rank(
    comm: &Arc<dyn DeviceComm>,
    memory: &dyn DeviceMemory,
    host: &dyn HostComm,
    config: &Config,
) -> Report {
    let mut runner = runner::Runner::new(comm, memory, host, config);
    cases::run_all(&mut runner);
    runner.finish()
}
