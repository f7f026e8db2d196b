//! What makes two ranks' calls the same call.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::op::OpKind;

/// A call as the ranks must agree on it: ranks whose calls differ at the same sequence number have a mismatch.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct Call {
    pub(super) op: OpKind,
    /// Of a broadcast; zero for others.
    pub(super) root: usize,
}

impl Call {
    pub(super) const fn new(op: OpKind) -> Self {
        Self { op, root: 0 }
    }
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.op {
            OpKind::HostBroadcast => write!(f, "{} from root {}", self.op, self.root),
            op => write!(f, "{op}"),
        }
    }
}
