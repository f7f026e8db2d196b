//! What a run found.

use std::fmt;

use crate::op::OpKind;

/// A case that failed on some rank.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Failure {
    /// The case, for example `all_reduce/bf16/sum`.
    pub case: String,
    /// The operation under test.
    pub op: OpKind,
    /// The rank that saw it.
    pub rank: usize,
    /// What was called, what was expected and what came.
    pub message: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} on rank {}: {}", self.case, self.rank, self.message)
    }
}

/// A case that did not run.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Skipped {
    /// The case.
    pub case: String,
    /// The operation it would have tested.
    pub op: OpKind,
    /// Why it did not run.
    pub reason: String,
}

/// What the reason of a case begins with that did not run because the communicator was lost before.
pub(super) const NOT_RUN: &str = "not run: ";

impl Skipped {
    /// Whether the case did not run because the communicator was lost in an earlier one: a failure's consequence, not a
    /// property of the backend.
    #[must_use]
    pub fn is_consequence(&self) -> bool {
        self.reason.starts_with(NOT_RUN)
    }
}

/// The outcome of a run over all ranks; equal on every rank.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Report {
    passed: Vec<(String, OpKind)>,
    failures: Vec<Failure>,
    skipped: Vec<Skipped>,
    calls: u64,
}

impl Report {
    /// Whether something ran and nothing failed.
    #[must_use]
    pub fn is_success(&self) -> bool {
        self.failures.is_empty() && !self.passed.is_empty()
    }

    /// The failures, in the order of the cases and then of the ranks.
    #[must_use]
    pub fn failures(&self) -> &[Failure] {
        &self.failures
    }

    /// What did not run, and why.
    #[must_use]
    pub fn skipped(&self) -> &[Skipped] {
        &self.skipped
    }

    /// The names of the cases that passed.
    pub fn passed(&self) -> impl Iterator<Item = &str> {
        self.passed.iter().map(|(case, _)| case.as_str())
    }

    /// Calls of the communicator that were checked, on one rank.
    #[must_use]
    pub fn calls(&self) -> u64 {
        self.calls
    }

    pub(super) fn add_calls(&mut self, calls: u64) {
        self.calls += calls;
    }

    pub(super) fn pass(&mut self, case: &str, op: OpKind) {
        self.passed.push((case.to_owned(), op));
    }

    pub(super) fn fail(&mut self, case: &str, op: OpKind, rank: usize, message: impl Into<String>) {
        self.failures.push(Failure { case: case.to_owned(), op, rank, message: message.into() });
    }

    pub(super) fn skip(&mut self, case: &str, op: OpKind, reason: impl Into<String>) {
        self.skipped.push(Skipped { case: case.to_owned(), op, reason: reason.into() });
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut ops: Vec<OpKind> = Vec::new();
        let named = self.passed.iter().map(|(_, op)| *op);
        let named = named.chain(self.failures.iter().map(|x| x.op)).chain(self.skipped.iter().map(|x| x.op));
        for op in named {
            if !ops.contains(&op) {
                ops.push(op);
            }
        }
        writeln!(f, "{:<30} {:>7} {:>7} {:>7}", "operation", "passed", "failed", "skipped")?;
        for op in ops {
            let passed = self.passed.iter().filter(|(_, other)| *other == op).count();
            let mut failed: Vec<&str> =
                self.failures.iter().filter(|x| x.op == op).map(|x| x.case.as_str()).collect();
            failed.dedup();
            let skipped = self.skipped.iter().filter(|x| x.op == op).count();
            writeln!(f, "{:<30} {passed:>7} {:>7} {skipped:>7}", op.name(), failed.len())?;
        }
        for failure in &self.failures {
            writeln!(f, "FAILED {failure}")?;
        }
        let mut reasons: Vec<(&str, OpKind, usize)> = Vec::new();
        for skipped in &self.skipped {
            match reasons.iter_mut().find(|(why, op, _)| *why == skipped.reason && *op == skipped.op) {
                Some((_, _, count)) => *count += 1,
                None => reasons.push((&skipped.reason, skipped.op, 1)),
            }
        }
        for (reason, op, count) in reasons {
            writeln!(f, "skipped {op} ({count}): {reason}")?;
        }
        write!(
            f,
            "{} passed, {} failed, {} skipped",
            self.passed.len(),
            self.failures.len(),
            self.skipped.len()
        )
    }
}
