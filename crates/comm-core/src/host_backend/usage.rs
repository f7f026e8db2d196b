//! How often each algorithm was used.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::device_comm::AlgorithmUsage;
use crate::op::OpKind;

/// The algorithms of the host backend.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Algorithm {
    /// All operands through the staging windows at once, with a single synchronisation.
    OneShot,
    /// Reading the peers' operands where they lie.
    Direct,
    /// Each rank reduces a slice, reading and writing the peers' operands where they lie.
    TwoShot,
    /// Operands through the staging windows piece by piece.
    ShmPipeline,
    /// Made of other operations, which do not count.
    Composed,
    /// Synchronisation alone.
    Flags,
    /// Reading the peers' operands through the kernel.
    CrossRead,
}

const ALGORITHMS: [(Algorithm, &str); 7] = [
    (Algorithm::OneShot, "one_shot"),
    (Algorithm::Direct, "direct"),
    (Algorithm::TwoShot, "two_shot"),
    (Algorithm::ShmPipeline, "shm_pipeline"),
    (Algorithm::Composed, "composed"),
    (Algorithm::Flags, "flags"),
    (Algorithm::CrossRead, "cross_read"),
];

#[derive(Default)]
pub(super) struct Usage {
    calls: [[AtomicU64; ALGORITHMS.len()]; OpKind::COLLECTIVES.len()],
}

impl Usage {
    pub(super) fn count(&self, op: OpKind, algorithm: Algorithm) {
        if let Some(row) = OpKind::COLLECTIVES.iter().position(|&kind| kind == op) {
            self.calls[row][algorithm as usize].fetch_add(1, Ordering::Relaxed);
        }
    }

    pub(super) fn list(&self) -> Vec<AlgorithmUsage> {
        let mut list = Vec::new();
        for (op, row) in OpKind::COLLECTIVES.into_iter().zip(&self.calls) {
            for (algorithm, name) in ALGORITHMS {
                let calls = row[algorithm as usize].load(Ordering::Relaxed);
                if calls > 0 {
                    list.push(AlgorithmUsage { op, algorithm: name.into(), calls });
                }
            }
        }
        list
    }
}
