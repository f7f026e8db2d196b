//! One rank's part of the conformance suite.

use anyhow::{Result, bail};
use comm_core::conformance::{Config, run_rank};
use serde::{Deserialize, Serialize};

use crate::backends;
use crate::events::{CaseResult, Event};
use crate::rank::RankContext;

/// A run of the conformance suite.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ConformanceJob {
    /// The backend's name.
    pub backend: String,
    /// Only cases whose name contains this.
    pub filter: Option<String>,
    /// Fewer types and counts.
    pub quick: bool,
}

/// Runs the suite; rank 0 reports the cases.
///
/// # Errors
/// When the device or the communicator cannot be had, or a case failed.
pub fn run(job: &ConformanceJob, context: &RankContext) -> Result<()> {
    let promises = backends::find(&job.backend)?;
    let device = context.open_device(&job.backend)?;
    let comm = context.create(&job.backend, device.memory(), true)?;
    context.events.phase("conformance suite");
    let config = Config {
        filter: job.filter.clone(),
        ordered_sums: promises.ordered_sums,
        nan_propagates: promises.nan_propagates,
        timeout: context.host.timeout(),
        ..if job.quick { Config::quick() } else { Config::full() }
    };
    let report = run_rank(&comm, device.memory(), &*context.host, &config);
    if context.host.rank() == 0 {
        let emit = |name: &str, result| context.events.emit(Event::Case { name: name.to_owned(), result });
        report.passed().for_each(|name| emit(name, CaseResult::Passed));
        for failure in report.failures() {
            emit(&failure.case, CaseResult::Failed(failure.to_string()));
        }
        for skipped in report.skipped() {
            let reason = skipped.reason.clone();
            let result = if skipped.is_consequence() { CaseResult::NotRun } else { CaseResult::Skipped };
            emit(&skipped.case, result(reason));
        }
    }
    if report.failures().is_empty() { Ok(()) } else { bail!("the conformance suite failed") }
}
