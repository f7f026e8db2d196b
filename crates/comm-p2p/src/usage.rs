//! How often each algorithm was used.

use comm_core::{CountedAlgorithm, UsageTable};

/// How an operation is carried out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Algorithm {
    /// Everything to everyone by packets, summed everywhere.
    OneShot,
    /// The same by Lamport packs.
    Lamport,
    /// Slices are summed on one rank each and passed on, by Lamport packs.
    TwoShot,
    /// The same for large buffers: chunks announced by flags, results stored straight into registered buffers.
    Cells,
    /// For the largest buffers, summed or gathered: all ranks store to one peer at a time, in step.
    Steps,
    /// In a hybrid cube mesh: packets, passed on by neighbours.
    CubeMesh,
    /// Everyone reads everyone's copy and sums everything: a reference for the others.
    Pull,
    /// Packets through scratch memory.
    Packets,
    /// Packets over relays.
    Relayed,
    /// Lines through scratch memory, over relays where it is a broadcast, summed where it is a reduce-scatter.
    Lines,
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
    const ALL: [Self; 17] = [
        Self::OneShot,
        Self::Lamport,
        Self::TwoShot,
        Self::Cells,
        Self::Steps,
        Self::CubeMesh,
        Self::Pull,
        Self::Packets,
        Self::Relayed,
        Self::Lines,
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
            Self::Lamport => "lamport",
            Self::TwoShot => "two_shot",
            Self::Cells => "cells",
            Self::Steps => "steps",
            Self::CubeMesh => "cube_mesh",
            Self::Pull => "pull",
            Self::Packets => "packets",
            Self::Relayed => "relayed",
            Self::Lines => "lines",
            Self::Direct => "direct",
            Self::Spread => "spread",
            Self::Staged => "staged",
            Self::Flags => "flags",
            Self::Local => "local",
            Self::Composed => "composed",
            Self::Captured => "captured",
        }
    }

    /// The algorithm of that place in the declaration.
    pub(crate) fn by_number(number: usize) -> Option<Self> {
        Self::ALL.get(number).copied()
    }

    pub(crate) fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|algorithm| algorithm.name() == name)
    }

    pub(crate) fn names() -> String {
        Self::ALL.map(Self::name).join(", ")
    }
}

/// Calls by operation and algorithm.
pub(crate) type Usage = UsageTable<Algorithm>;

impl CountedAlgorithm for Algorithm {
    const ALGORITHMS: &'static [Self] = &Self::ALL;

    fn index(self) -> usize {
        self as usize
    }

    fn label(self) -> &'static str {
        self.name()
    }
}

#[cfg(test)]
mod tests {
    use comm_core::OpKind;

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
