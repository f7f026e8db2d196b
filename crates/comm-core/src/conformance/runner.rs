//! Runs cases in step on all ranks and merges their verdicts.
//!
//! Owns the agreement: after each case the ranks exchange what they saw over the host communicator, so that a rank that
//! failed never leaves the others waiting in the next case, and all ranks end with one report.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::buffers::Arena;
use super::case::Case;
use super::report::NOT_RUN;
use super::{Config, Report};
use crate::device_comm::DeviceComm;
use crate::error::Result;
use crate::host_comm::{Deadline, HostComm};
use crate::memory::DeviceMemory;
use crate::op::OpKind;
use crate::registry::panic_message;

/// What a rank tells the others about a case.
#[derive(Serialize, Deserialize)]
struct Verdict {
    failure: Option<String>,
    /// The communicator is lost: no further case can run.
    fatal: bool,
    skipped: Option<String>,
    facts: Vec<u64>,
}

/// What must hold between the facts that the ranks noted.
pub(super) type Judge = fn(&[Vec<u64>]) -> Option<String>;

/// All ranks must have noted the same.
pub(super) fn equal_facts(facts: &[Vec<u64>]) -> Option<String> {
    let other = facts.iter().position(|other| *other != facts[0])?;
    Some(format!("ranks 0 and {other} received different bits for the same result"))
}

pub(super) struct Runner<'a> {
    pub(super) comm: &'a Arc<dyn DeviceComm>,
    pub(super) config: &'a Config,
    host: &'a dyn HostComm,
    arena: Arena<'a>,
    report: Report,
    seed: u64,
    /// Why nothing more can run.
    stopped: Option<String>,
}

impl<'a> Runner<'a> {
    pub(super) fn new(
        comm: &'a Arc<dyn DeviceComm>,
        memory: &'a dyn DeviceMemory,
        host: &'a dyn HostComm,
        config: &'a Config,
    ) -> Self {
        let arena = Arena::new(memory);
        let report = Report::default();
        Self { comm, config, host, arena, report, seed: config.seed, stopped: None }
    }

    /// Whether the filter admits a case of this name.
    pub(super) fn admits(&self, name: &str) -> bool {
        self.config.filter.as_ref().is_none_or(|filter| name.contains(filter.as_str()))
    }

    /// Runs one case on all ranks.
    pub(super) fn case(
        &mut self,
        op: OpKind,
        name: &str,
        body: impl FnOnce(&mut Case<'_, 'a>) -> Result<()>,
    ) {
        self.judged(op, name, equal_facts, body);
    }

    /// Runs one case on all ranks, then judges the facts they noted.
    pub(super) fn judged(
        &mut self,
        op: OpKind,
        name: &str,
        judge: Judge,
        body: impl FnOnce(&mut Case<'_, 'a>) -> Result<()>,
    ) {
        if !self.admits(name) {
            return;
        }
        if let Some((_, reason)) = self.config.skip.iter().find(|(skipped, _)| *skipped == op) {
            return self.report.skip(name, op, reason.clone());
        }
        if let Some(reason) = &self.stopped {
            return self.report.skip(name, op, format!("{NOT_RUN}{reason}"));
        }
        self.seed = self.seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut case = Case::new(&**self.comm, self.config, &mut self.arena, self.seed);
        // A backend that panics has failed; its state is not used again, since the verdict is fatal.
        let outcome = catch_unwind(AssertUnwindSafe(|| body(&mut case)));
        let (calls, skipped, facts, at) =
            (case.calls, case.skipped.take(), std::mem::take(&mut case.facts), case.at.clone());
        let mut failure = case.failure.take();
        let fatal = match outcome {
            Ok(Ok(())) => false,
            Ok(Err(error)) => {
                failure.get_or_insert_with(|| format!("{at}: returned an error: {error}"));
                error.is_fatal()
            }
            Err(panic) => {
                failure = Some(format!("{at}: panicked: {}", panic_message(&*panic)));
                true
            }
        };
        if fatal {
            // The others may be waiting for this rank inside the operation.
            self.comm.abort();
        }
        self.report.add_calls(calls);
        self.agree(op, name, judge, &Verdict { failure, fatal, skipped, facts });
    }

    fn agree(&mut self, op: OpKind, name: &str, judge: Judge, own: &Verdict) {
        let verdicts = match self.exchange(own) {
            Ok(verdicts) => verdicts,
            Err(reason) => {
                self.report.fail(name, op, self.host.rank(), reason.clone());
                self.comm.abort();
                self.stopped = Some(reason);
                return;
            }
        };
        let mut failed = false;
        for (rank, verdict) in verdicts.iter().enumerate() {
            if let Some(message) = &verdict.failure {
                failed = true;
                self.report.fail(name, op, rank, message.clone());
            }
            if verdict.fatal {
                self.stopped.get_or_insert_with(|| format!("the communicator was lost in {name}"));
            }
        }
        if failed {
            return;
        }
        let facts: Vec<_> = verdicts.iter().map(|verdict| verdict.facts.clone()).collect();
        if let Some(message) = judge(&facts) {
            self.report.fail(name, op, 0, message);
        } else if let Some(reason) = verdicts.iter().find_map(|verdict| verdict.skipped.clone()) {
            self.report.skip(name, op, reason);
        } else {
            self.report.pass(name, op);
        }
    }

    fn exchange(&self, own: &Verdict) -> Result<Vec<Verdict>, String> {
        let bytes = postcard::to_stdvec(own).map_err(|error| error.to_string())?;
        let all = self.host.all_gather_bytes(&bytes, Deadline::after(self.config.patience()));
        let all = all.map_err(|error| format!("the ranks could not agree on the outcome: {error}"))?;
        let decode = |bytes: &Vec<u8>| postcard::from_bytes(bytes).map_err(|error| error.to_string());
        all.iter().map(decode).collect()
    }

    /// The merged report.
    pub(super) fn finish(mut self) -> Report {
        if self.stopped.is_none()
            && let Err(error) = self.arena.clear()
        {
            self.report.fail("memory/free", OpKind::Free, self.host.rank(), error.to_string());
        }
        self.report
    }
}
