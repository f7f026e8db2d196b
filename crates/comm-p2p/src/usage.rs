//! How often each algorithm was used.

use std::sync::atomic::{AtomicU64, Ordering};

use comm_core::{AlgorithmUsage, OpKind};

/// How an operation is carried out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Algorithm {
    /// Everything to everyone by packets, summed everywhere.
    OneShot,
    /// Slices are summed on one rank each and passed on, by Lamport packs.
    TwoShot,
    /// The same for large buffers: chunks announced by flags, results stored straight into registered buffers.
    Cells,
    /// For the largest buffers, summed or gathered: all ranks store to one peer at a time, in step.
    Steps,
    /// Packets through scratch memory.
    Packets,
    /// Packets over relays.
    Relayed,
    /// Stores into the peers' registered buffers.
    Direct,
    /// The same, each piece read once and stored to all.
    Spread,
    /// Copies through staging memory, between barriers.
    Staged,
    /// Flags alone.
    Flags,
    /// Nothing to exchange: a communicator of one rank, or an operand of no elements.
    Local,
    /// Other operations of this communicator in a row.
    Composed,
    /// Captured, on results that are registered afterwards: then as cells or direct, or by scratch memory.
    Captured,
}

impl Algorithm {
    const ALL: [Self; 13] = [
        Self::OneShot,
        Self::TwoShot,
        Self::Cells,
        Self::Steps,
        Self::Packets,
        Self::Relayed,
        Self::Direct,
        Self::Spread,
        Self::Staged,
        Self::Flags,
        Self::Local,
        Self::Composed,
        Self::Captured,
    ];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::OneShot => "one_shot",
            Self::TwoShot => "two_shot",
            Self::Cells => "cells",
            Self::Steps => "steps",
            Self::Packets => "packets",
            Self::Relayed => "relayed",
            Self::Direct => "direct",
            Self::Spread => "spread",
            Self::Staged => "staged",
            Self::Flags => "flags",
            Self::Local => "local",
            Self::Composed => "composed",
            Self::Captured => "captured",
        }
    }

    pub(crate) fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|algorithm| algorithm.name() == name)
    }

    pub(crate) fn names() -> String {
        Self::ALL.map(Self::name).join(", ")
    }
}

/// Calls by operation and algorithm.
#[derive(Default)]
pub(crate) struct Usage {
    calls: [[AtomicU64; Algorithm::ALL.len()]; OpKind::COLLECTIVES.len()],
}

impl Usage {
    pub(crate) fn count(&self, op: OpKind, algorithm: Algorithm) {
        if let Some(row) = OpKind::COLLECTIVES.iter().position(|&kind| kind == op) {
            self.calls[row][algorithm as usize].fetch_add(1, Ordering::Relaxed);
        }
    }

    pub(crate) fn snapshot(&self) -> Vec<AlgorithmUsage> {
        let mut used = Vec::new();
        for (op, row) in OpKind::COLLECTIVES.into_iter().zip(&self.calls) {
            for (algorithm, calls) in Algorithm::ALL.into_iter().zip(row) {
                let calls = calls.load(Ordering::Relaxed);
                if calls > 0 {
                    used.push(AlgorithmUsage { op, algorithm: algorithm.name().into(), calls });
                }
            }
        }
        used
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_counted_by_algorithm() {
        let usage = Usage::default();
        for (index, algorithm) in Algorithm::ALL.into_iter().enumerate() {
            assert_eq!(algorithm as usize, index);
            assert_eq!(Algorithm::from_name(algorithm.name()), Some(algorithm));
            usage.count(OpKind::AllReduce, algorithm);
        }
        usage.count(OpKind::Split, Algorithm::Local);
        assert_eq!(usage.snapshot().len(), Algorithm::ALL.len());
    }
}
