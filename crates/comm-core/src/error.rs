//! The one error type of the workspace.

use std::borrow::Cow;
use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::op::OpKind;

/// Shorthand for a result with [`CommError`].
pub type Result<T, E = CommError> = std::result::Result<T, E>;

/// Where in a communicator's life an error arose.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct CallSite {
    /// The communicator's name, for example `world` or `world/0` for a group split from it.
    pub comm: String,
    /// The operation.
    pub op: OpKind,
    /// How many calls this communicator had issued before this one.
    pub seq: u64,
}

impl CallSite {
    /// A call site.
    #[must_use]
    pub fn new(comm: impl Into<String>, op: OpKind, seq: u64) -> Self {
        Self { comm: comm.into(), op, seq }
    }
}

impl fmt::Display for CallSite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} #{} on communicator {:?}", self.op, self.seq, self.comm)
    }
}

/// Everything that can go wrong in a communicator. Errors can be cloned and serialised, so that one rank's cause can
/// be reported by all.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error, Serialize, Deserialize)]
#[non_exhaustive]
pub enum CommError {
    /// The backend lacks the operation, or lacks it for these operands. Nothing was done. Of [`OpKind::Create`]: the
    /// backend cannot be used by these ranks.
    #[error("the {backend} backend does not support {op}: {reason}")]
    Unsupported {
        /// The operation.
        op: OpKind,
        /// The backend's name.
        backend: Cow<'static, str>,
        /// Why, and what would help.
        reason: String,
    },
    /// An argument is wrong in itself. Nothing was done.
    #[error("invalid {argument}: {reason}")]
    InvalidArgument {
        /// The argument.
        argument: Cow<'static, str>,
        /// What was wrong with it and what is right.
        reason: String,
    },
    /// Ranks did not arrive within the deadline.
    #[error("{at} timed out after {waited:?}: no sign of rank(s) {missing:?}")]
    Timeout {
        /// The call.
        at: CallSite,
        /// The ranks that had not arrived, in the communicator's numbering.
        missing: Vec<usize>,
        /// How long the call waited.
        waited: Duration,
    },
    /// A rank's process or thread is gone.
    #[error("{at} failed: rank {rank} died")]
    PeerDied {
        /// The call during which it was noticed.
        at: CallSite,
        /// The dead rank.
        rank: usize,
    },
    /// Another rank reported a failure of its own, for example a CUDA error.
    #[error("{at} failed: rank {rank} reported: {cause}")]
    PeerFailed {
        /// The call during which it was noticed.
        at: CallSite,
        /// The rank that failed.
        rank: usize,
        /// What that rank reported. Part of this error's text, and so not its source: a chain of errors prints it once.
        cause: Box<CommError>,
    },
    /// Checked mode found that ranks called different operations, or the same with different arguments.
    #[error("{at}: this rank calls {expected}, but rank {rank} calls {found}")]
    Mismatch {
        /// The call.
        at: CallSite,
        /// The lowest rank that differs.
        rank: usize,
        /// This rank's call.
        expected: String,
        /// That rank's call.
        found: String,
    },
    /// A handle outlived what it names: the buffer was freed or the peer restarted.
    #[error("stale handle {handle}: {reason}")]
    StaleHandle {
        /// The handle.
        handle: String,
        /// Why it is stale.
        reason: String,
    },
    /// The CUDA driver returned an error.
    #[error("CUDA call {call} failed with {code} ({message})")]
    Cuda {
        /// The driver function.
        call: Cow<'static, str>,
        /// The `CUresult`.
        code: i32,
        /// The driver's name for it.
        message: String,
    },
    /// A backend's library returned an error.
    #[error("{backend} call {call} failed with {code} ({message})")]
    Backend {
        /// The backend's name.
        backend: Cow<'static, str>,
        /// The library function.
        call: Cow<'static, str>,
        /// The library's status code.
        code: i64,
        /// The library's words for it.
        message: String,
    },
    /// A shared library, or a symbol in it, could not be loaded.
    #[error("cannot use {library}: {reason}")]
    Library {
        /// The library.
        library: Cow<'static, str>,
        /// What was tried, what was found, and what to do.
        reason: String,
    },
    /// A communicator could not be created. All ranks report the same rank and cause.
    #[error("creating a {backend} communicator failed on rank {rank}: {cause}")]
    CreationFailed {
        /// The backend's name.
        backend: Cow<'static, str>,
        /// The lowest rank to blame: one that failed by itself rather than because another had.
        rank: usize,
        /// That rank's error. Part of this error's text, and so not its source: a chain of errors prints it once.
        cause: Box<CommError>,
    },
    /// The rendezvous address belongs to another program.
    #[error("rendezvous address {addr} is in use: {reason}")]
    AddrInUse {
        /// The address.
        addr: String,
        /// What was found there.
        reason: String,
    },
    /// The other end of a connection is not a rank of this job.
    #[error("bad handshake with {peer}: {reason}")]
    BadHandshake {
        /// The other end.
        peer: String,
        /// What was wrong.
        reason: String,
    },
    /// The communicator was aborted.
    #[error("{at} failed: the communicator was aborted")]
    Aborted {
        /// The call.
        at: CallSite,
    },
    /// The communicator was closed.
    #[error("communicator {comm:?} is closed")]
    Closed {
        /// The communicator's name.
        comm: String,
    },
    /// A value could not be encoded or decoded.
    #[error("cannot {action} a value of type {type_name}: {reason}")]
    Serialization {
        /// `encode` or `decode`.
        action: Cow<'static, str>,
        /// The Rust type.
        type_name: String,
        /// The codec's words.
        reason: String,
    },
    /// The operating system returned an error.
    #[error("{context}: {message}")]
    Io {
        /// What was being done.
        context: String,
        /// The system's words.
        message: String,
    },
    /// A graph was replayed before the operands of its calls were made known to the other ranks.
    #[error("{at} was replayed before its operands were registered: call register_captured after capturing")]
    NotRegistered {
        /// The captured call.
        at: CallSite,
    },
}

impl CommError {
    /// An [`InvalidArgument`](Self::InvalidArgument).
    #[must_use]
    pub fn invalid(argument: impl Into<Cow<'static, str>>, reason: impl Into<String>) -> Self {
        Self::InvalidArgument { argument: argument.into(), reason: reason.into() }
    }

    /// An [`Unsupported`](Self::Unsupported).
    #[must_use]
    pub fn unsupported(op: OpKind, backend: impl Into<Cow<'static, str>>, reason: impl Into<String>) -> Self {
        Self::Unsupported { op, backend: backend.into(), reason: reason.into() }
    }

    /// An [`Io`](Self::Io) from the standard library's error.
    #[must_use]
    pub fn io(context: impl Into<String>, error: &std::io::Error) -> Self {
        Self::Io { context: context.into(), message: error.to_string() }
    }

    /// Whether the communicator is lost: only [`close`](crate::DeviceComm::close) and creating a new one make sense.
    ///
    /// Errors for which this is false left a [`DeviceComm`](crate::DeviceComm) as it was: the call was refused before
    /// anything was enqueued. A [`HostComm`](crate::HostComm) is lost after a [`Mismatch`](Self::Mismatch) as well.
    #[must_use]
    pub const fn is_fatal(&self) -> bool {
        !matches!(
            self,
            Self::Unsupported { .. }
                | Self::InvalidArgument { .. }
                | Self::Mismatch { .. }
                | Self::Serialization { .. }
                | Self::StaleHandle { .. }
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_name_communicator_op_sequence_and_culprit() {
        let at = CallSite::new("world/1", OpKind::AllReduce, 42);
        let text = CommError::PeerDied { at, rank: 3 }.to_string();
        for part in ["world/1", "all_reduce", "42", "rank 3"] {
            assert!(text.contains(part), "{text:?} lacks {part:?}");
        }
    }

    #[test]
    fn a_chain_of_errors_tells_each_cause_once() {
        let cause = CommError::invalid("device", "the one cause");
        let at = CallSite::new("world", OpKind::Create, 0);
        let failed = CommError::PeerFailed { at, rank: 1, cause: Box::new(cause) };
        let created = CommError::CreationFailed { backend: "host".into(), rank: 1, cause: Box::new(failed) };
        let mut text = String::new();
        let mut link: Option<&dyn std::error::Error> = Some(&created);
        while let Some(error) = link {
            text.push_str(&error.to_string());
            link = error.source();
        }
        assert_eq!(text.matches("the one cause").count(), 1, "{text}");
    }
}
