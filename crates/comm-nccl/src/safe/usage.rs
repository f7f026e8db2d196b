//! How often each algorithm was used.

use comm_core::{CountedAlgorithm, UsageTable};

/// How an operation is carried out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Algorithm {
    /// NCCL's own operation of that name.
    Native,
    /// Grouped sends and receives.
    SendRecv,
    /// Grouped broadcasts, one per rank.
    Broadcasts,
    /// Grouped reductions, one per rank.
    Reduces,
    /// Grouped all-gathers, one per row.
    RowGathers,
    /// An all-gather into a staging buffer and copies out of it.
    Staged,
    /// NCCL's operation followed by a kernel.
    WithKernel,
}

impl Algorithm {
    const ALL: [Self; 7] = [
        Self::Native,
        Self::SendRecv,
        Self::Broadcasts,
        Self::Reduces,
        Self::RowGathers,
        Self::Staged,
        Self::WithKernel,
    ];

    const fn name(self) -> &'static str {
        match self {
            Self::Native => "nccl",
            Self::SendRecv => "nccl_send_recv",
            Self::Broadcasts => "nccl_broadcasts",
            Self::Reduces => "nccl_reduces",
            Self::RowGathers => "nccl_row_gathers",
            Self::Staged => "nccl_staged",
            Self::WithKernel => "nccl_kernel",
        }
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
        usage.count(OpKind::AllReduce, Algorithm::Native);
        usage.count(OpKind::AllGatherV, Algorithm::SendRecv);
        usage.count(OpKind::AllGatherV, Algorithm::SendRecv);
        usage.count(OpKind::Split, Algorithm::Native);
        let seen: Vec<_> =
            usage.snapshot().into_iter().map(|u| (u.op, u.algorithm.into_owned(), u.calls)).collect();
        assert_eq!(
            seen,
            [(OpKind::AllReduce, "nccl".to_owned(), 1), (OpKind::AllGatherV, "nccl_send_recv".to_owned(), 2)]
        );
        for (index, algorithm) in Algorithm::ALL.into_iter().enumerate() {
            assert_eq!(algorithm as usize, index);
        }
    }
}
