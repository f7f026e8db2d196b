//! What a communicator says of itself and of memory, and a transfer as data: no behaviour.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

use crate::addr::DeviceAddr;
use crate::dtype::DType;
use crate::memory::MemoryKind;
use crate::op::OpKind;

/// What a communicator is: fixed at its creation.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct CommInfo {
    /// Unique among the job's communicators, for example `world` or `world/1`.
    pub name: String,
    /// The backend's name, for example `host`.
    pub backend: Cow<'static, str>,
    /// This rank, below `size`.
    pub rank: usize,
    /// The number of ranks.
    pub size: usize,
    /// The memory the operands lie in.
    pub memory: MemoryKind,
}

/// How often one algorithm was used.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct AlgorithmUsage {
    /// The operation.
    pub op: OpKind,
    /// The algorithm, for example `nccl` or `two_shot`.
    pub algorithm: Cow<'static, str>,
    /// Calls enqueued with it, on this rank. A captured call counts once, however often its graph is replayed.
    pub calls: u64,
}

/// A buffer that was made known to the communicator, so that operations on it need no staging copy.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Registration {
    /// The registration's number within its communicator.
    pub id: u64,
    /// First byte.
    pub addr: DeviceAddr,
    /// Length.
    pub bytes: usize,
    /// Differs from every earlier registration's that had the same `id`.
    pub generation: u64,
}

/// One transfer of a grouped send/recv.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum P2pOp {
    /// Send `count` elements at `addr` to `peer`.
    Send {
        /// First element.
        addr: DeviceAddr,
        /// Elements.
        count: usize,
        /// Element type.
        dtype: DType,
        /// The receiving rank. This rank itself is allowed.
        peer: usize,
    },
    /// Receive `count` elements from `peer` to `addr`.
    Recv {
        /// First element.
        addr: DeviceAddr,
        /// Elements.
        count: usize,
        /// Element type.
        dtype: DType,
        /// The sending rank. This rank itself is allowed.
        peer: usize,
    },
}
