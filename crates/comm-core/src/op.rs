//! What can be asked of a communicator, as data.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::dtype::{DType, ReduceOp};

/// Every operation of a communicator, device side and host side. Errors and usage counters name operations by it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[non_exhaustive]
#[allow(missing_docs, reason = "each variant is the method of the same name")]
pub enum OpKind {
    AllReduce,
    AllGather,
    AllGatherV,
    ReduceScatter,
    ReduceScatterV,
    Broadcast,
    Reduce,
    AllToAll,
    Send,
    Recv,
    Group,
    Barrier,
    AllGather2d,
    AllReduceRmsNorm,
    AllReduceRmsNormTwoGroup,
    AllReduceQuantized,
    AllReduceRmsNormQuantized,
    AllReduceRmsNormTwoGroupQuantized,
    Create,
    Split,
    Allocate,
    Free,
    Register,
    Deregister,
    Poll,
    Close,
    Rendezvous,
    HostBarrier,
    HostBroadcast,
    HostAllGather,
    HostAllReduce,
    HostExchangeFds,
}

impl OpKind {
    /// The operations that move or combine data on a device: what a conformance suite or a benchmark runs.
    pub const COLLECTIVES: [Self; 18] = [
        Self::AllReduce,
        Self::AllGather,
        Self::AllGatherV,
        Self::ReduceScatter,
        Self::ReduceScatterV,
        Self::Broadcast,
        Self::Reduce,
        Self::AllToAll,
        Self::Send,
        Self::Recv,
        Self::Group,
        Self::Barrier,
        Self::AllGather2d,
        Self::AllReduceRmsNorm,
        Self::AllReduceRmsNormTwoGroup,
        Self::AllReduceQuantized,
        Self::AllReduceRmsNormQuantized,
        Self::AllReduceRmsNormTwoGroupQuantized,
    ];

    /// The name used on command lines, in tables and in errors.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::AllReduce => "all_reduce",
            Self::AllGather => "all_gather",
            Self::AllGatherV => "all_gather_v",
            Self::ReduceScatter => "reduce_scatter",
            Self::ReduceScatterV => "reduce_scatter_v",
            Self::Broadcast => "broadcast",
            Self::Reduce => "reduce",
            Self::AllToAll => "all_to_all",
            Self::Send => "send",
            Self::Recv => "recv",
            Self::Group => "group",
            Self::Barrier => "barrier",
            Self::AllGather2d => "all_gather_2d",
            Self::AllReduceRmsNorm => "all_reduce_rmsnorm",
            Self::AllReduceRmsNormTwoGroup => "all_reduce_rmsnorm_two_group",
            Self::AllReduceQuantized => "all_reduce_quantized",
            Self::AllReduceRmsNormQuantized => "all_reduce_rmsnorm_quantized",
            Self::AllReduceRmsNormTwoGroupQuantized => "all_reduce_rmsnorm_two_group_quantized",
            Self::Create => "create",
            Self::Split => "split",
            Self::Allocate => "allocate",
            Self::Free => "free",
            Self::Register => "register",
            Self::Deregister => "deregister",
            Self::Poll => "poll",
            Self::Close => "close",
            Self::Rendezvous => "rendezvous",
            Self::HostBarrier => "host_barrier",
            Self::HostBroadcast => "host_broadcast",
            Self::HostAllGather => "host_all_gather",
            Self::HostAllReduce => "host_all_reduce",
            Self::HostExchangeFds => "host_exchange_fds",
        }
    }

    /// Whether the operation ends in a fused norm.
    #[must_use]
    pub const fn norms(self) -> bool {
        matches!(
            self,
            Self::AllReduceRmsNorm
                | Self::AllReduceRmsNormTwoGroup
                | Self::AllReduceRmsNormQuantized
                | Self::AllReduceRmsNormTwoGroupQuantized
        )
    }

    /// Whether the operation combines elements and so takes a [`ReduceOp`].
    #[must_use]
    pub const fn reduces(self) -> bool {
        matches!(self, Self::AllReduce | Self::ReduceScatter | Self::ReduceScatterV | Self::Reduce)
    }
}

impl fmt::Display for OpKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A call that [`DeviceComm::supports`](crate::DeviceComm::supports) is asked about. All ranks ask with equal values
/// and so get equal answers.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct OpQuery {
    /// The operation.
    pub kind: OpKind,
    /// The element type.
    pub dtype: DType,
    /// The reduction, for operations where [`OpKind::reduces`] holds.
    pub reduce: Option<ReduceOp>,
    /// The element count as the operation's method takes it. A V operation's is the largest of its counts, a group's the
    /// largest of its transfers', a two-dimensional block's its height times its width, and the fused norm's its tokens
    /// times its hidden size. The two-group norm's is the hidden size alone, since ranks of different groups know
    /// different token counts and must come to one answer. Allocate and register count bytes; a barrier, a split and
    /// the like ask with zero.
    pub count: usize,
}

impl OpQuery {
    /// A query for an operation that does not reduce.
    #[must_use]
    pub const fn new(kind: OpKind, dtype: DType, count: usize) -> Self {
        Self { kind, dtype, reduce: None, count }
    }

    /// The same query with a reduction.
    #[must_use]
    pub const fn with_reduce(self, op: ReduceOp) -> Self {
        Self { reduce: Some(op), ..self }
    }
}

/// The answer to an [`OpQuery`].
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Support {
    /// The call will be carried out.
    Yes,
    /// The call would return `Err(Unsupported)`, with this reason.
    No {
        /// Why not, and what would change it.
        reason: String,
    },
}

impl Support {
    /// A refusal.
    #[must_use]
    pub fn no(reason: impl Into<String>) -> Self {
        Self::No { reason: reason.into() }
    }

    /// Whether the call will be carried out.
    #[must_use]
    pub const fn is_supported(&self) -> bool {
        matches!(self, Self::Yes)
    }
}
