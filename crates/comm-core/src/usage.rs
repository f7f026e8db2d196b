//! Counters of how often a backend used each of its algorithms.
//!
//! Owns the table; which algorithms there are, and what they are called, is the backend's.

use std::marker::PhantomData;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::device_comm::AlgorithmUsage;
use crate::op::OpKind;

/// A backend's algorithms, usually an enumeration without fields.
pub trait CountedAlgorithm: Copy + 'static {
    /// All of them, each at its own [`index`](Self::index).
    const ALGORITHMS: &'static [Self];

    /// Its place in [`ALGORITHMS`](Self::ALGORITHMS).
    fn index(self) -> usize;

    /// What it is called in [`AlgorithmUsage::algorithm`].
    fn label(self) -> &'static str;
}

/// Calls by collective and algorithm, as [`DeviceComm::usage`](crate::DeviceComm::usage) reports them. Counting takes one
/// atomic addition and no lock.
#[derive(Debug)]
pub struct UsageTable<A> {
    /// A row of algorithms for each of [`OpKind::COLLECTIVES`].
    calls: Box<[AtomicU64]>,
    algorithms: PhantomData<fn(A)>,
}

impl<A: CountedAlgorithm> Default for UsageTable<A> {
    fn default() -> Self {
        let cells = OpKind::COLLECTIVES.len() * A::ALGORITHMS.len();
        Self { calls: (0..cells).map(|_| AtomicU64::new(0)).collect(), algorithms: PhantomData }
    }
}

impl<A: CountedAlgorithm> UsageTable<A> {
    /// Counts a call. What is no collective is not counted.
    pub fn count(&self, op: OpKind, algorithm: A) {
        let row = OpKind::COLLECTIVES.iter().position(|&kind| kind == op);
        let cell = row.map(|row| row * A::ALGORITHMS.len() + algorithm.index());
        if let Some(calls) = cell.and_then(|cell| self.calls.get(cell)) {
            calls.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// What has been used so far, by operation and then by algorithm.
    #[must_use]
    pub fn snapshot(&self) -> Vec<AlgorithmUsage> {
        let rows = self.calls.chunks(A::ALGORITHMS.len().max(1));
        let mut used = Vec::new();
        for (op, row) in OpKind::COLLECTIVES.into_iter().zip(rows) {
            for (algorithm, calls) in A::ALGORITHMS.iter().zip(row) {
                let calls = calls.load(Ordering::Relaxed);
                if calls > 0 {
                    used.push(AlgorithmUsage { op, algorithm: algorithm.label().into(), calls });
                }
            }
        }
        used
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Copy)]
    enum Way {
        Here,
        There,
    }

    impl CountedAlgorithm for Way {
        const ALGORITHMS: &'static [Self] = &[Self::Here, Self::There];

        fn index(self) -> usize {
            self as usize
        }

        fn label(self) -> &'static str {
            ["here", "there"][self as usize]
        }
    }

    #[test]
    fn calls_are_counted_by_operation_and_algorithm() {
        let usage = UsageTable::default();
        usage.count(OpKind::AllReduce, Way::There);
        usage.count(OpKind::AllGatherV, Way::Here);
        usage.count(OpKind::AllGatherV, Way::There);
        usage.count(OpKind::AllGatherV, Way::There);
        // Not a collective.
        usage.count(OpKind::Split, Way::Here);
        let seen: Vec<_> = usage
            .snapshot()
            .into_iter()
            .map(|used| (used.op, used.algorithm.into_owned(), used.calls))
            .collect();
        let expected = [
            (OpKind::AllReduce, "there".to_owned(), 1),
            (OpKind::AllGatherV, "here".to_owned(), 1),
            (OpKind::AllGatherV, "there".to_owned(), 2),
        ];
        assert_eq!(seen, expected);
    }
}
