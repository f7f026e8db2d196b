//! Backends by name.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::device_comm::DeviceComm;
use crate::error::Result;
use crate::host_comm::HostComm;
use crate::memory::MemoryKind;

/// What a backend needs to make a communicator.
#[derive(Clone)]
pub struct CreateContext {
    /// How the ranks meet. The new communicator has its ranks, in its order.
    pub host: Arc<dyn HostComm>,
    /// The memory that this rank's operands lie in.
    pub memory: MemoryKind,
    /// The longest that any wait of the new communicator may take.
    pub timeout: Duration,
    /// Checked mode: before each launch the ranks compare what they are about to do, and a difference is a
    /// [`Mismatch`](crate::CommError::Mismatch). For finding bugs: it synchronises the host with the other ranks.
    pub checked: bool,
    /// Settings for one backend or another, by name; all ranks pass the same. Backends ignore those they do not know.
    pub options: BTreeMap<String, String>,
}

/// What one rank can do, exchanged when a communicator is created.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Capability {
    /// The backend's protocol version: ranks whose versions differ cannot form a communicator.
    pub protocol: u32,
    /// Facts that the backend's ranks decide by, for example a library version or a device's UUID.
    pub facts: BTreeMap<String, String>,
}

/// A way of making communicators of one backend.
pub trait BackendFactory: Send + Sync {
    /// The backend's name, as configuration spells it.
    fn name(&self) -> &str;

    /// What this rank can do. Local: it does not communicate.
    ///
    /// # Errors
    /// When this rank cannot take part: then creation fails on every rank, with this cause.
    fn probe(&self, context: &CreateContext) -> Result<Capability>;

    /// Makes this rank's end of a communicator. Called on all ranks, only after every rank's probe succeeded;
    /// `capabilities` holds them in rank order. May use `context.host`.
    ///
    /// # Errors
    /// Reported on every rank.
    fn create(&self, context: &CreateContext, capabilities: &[Capability]) -> Result<Arc<dyn DeviceComm>>;
}
