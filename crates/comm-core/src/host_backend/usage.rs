//! How often each algorithm was used.

use crate::usage::{CountedAlgorithm, UsageTable};

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

/// Calls by operation and algorithm.
pub(super) type Usage = UsageTable<Algorithm>;

impl CountedAlgorithm for Algorithm {
    const ALGORITHMS: &'static [Self] = &[
        Self::OneShot,
        Self::Direct,
        Self::TwoShot,
        Self::ShmPipeline,
        Self::Composed,
        Self::Flags,
        Self::CrossRead,
    ];

    fn index(self) -> usize {
        self as usize
    }

    fn label(self) -> &'static str {
        match self {
            Self::OneShot => "one_shot",
            Self::Direct => "direct",
            Self::TwoShot => "two_shot",
            Self::ShmPipeline => "shm_pipeline",
            Self::Composed => "composed",
            Self::Flags => "flags",
            Self::CrossRead => "cross_read",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_algorithm_has_its_own_place() {
        for (index, algorithm) in Algorithm::ALGORITHMS.iter().enumerate() {
            assert_eq!(algorithm.index(), index);
        }
    }
}
