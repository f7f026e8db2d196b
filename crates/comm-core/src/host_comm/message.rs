//! What the ranks and the hub say to each other once a connection is authenticated.

use std::sync::Arc;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::error::{CallSite, CommError};
use crate::host_comm::call::Call;
use crate::host_comm::wire::{Segment, WireError, prefix_and_head};

/// The group of all ranks.
pub(super) const WORLD: u64 = 0;

/// An error's encoding may be this long, in bytes. It bounds how deeply causes nest, and so the decoder's recursion.
const CAUSE_LIMIT: usize = 4096;

/// An error that one rank reports to others.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct Cause(Vec<u8>);

impl Cause {
    pub(super) fn new(error: &CommError) -> Self {
        let encode = |error: &CommError| postcard::to_stdvec(error).unwrap_or_default();
        let bytes = encode(error);
        if !bytes.is_empty() && bytes.len() <= CAUSE_LIMIT {
            return Self(bytes);
        }
        let message: String = error.to_string().chars().take(CAUSE_LIMIT / 8).collect();
        Self(encode(&CommError::Io { context: "a rank's failure, shortened".into(), message }))
    }

    pub(super) fn error(&self) -> CommError {
        let decoded = if self.0.len() <= CAUSE_LIMIT { postcard::from_bytes(&self.0).ok() } else { None };
        decoded.unwrap_or_else(|| CommError::Io {
            context: "reading a rank's failure report".into(),
            message: "it is not a valid report".into(),
        })
    }
}

/// From a rank to the hub.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) enum ToHub {
    /// This rank's part of a round; the body is its bytes.
    Contribute { group: u64, seq: u64, call: Call, color: Option<u32>, key: i64, fds: u32 },
    /// This rank's deadline for a round has passed.
    WhoIsMissing { group: u64, seq: u64 },
    /// This rank failed or aborted: every wait of the group ends.
    Fail { group: u64, cause: Cause },
    /// This rank's call failed: only rounds that still need it end.
    GiveUp { group: u64, cause: Cause },
    /// This rank dropped its handle on a group; `died` when a panic did.
    Leave { group: u64, died: bool },
    /// This rank's rendezvous deadline has passed.
    Withdraw,
    /// This rank dropped its last handle.
    Bye,
}

/// Why a round, or a rank of a group, failed. Ranks are in the group's numbering.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) enum Failure {
    Died { rank: usize },
    Failed { rank: usize, cause: Cause },
    Mismatch { rank: usize, found: Call },
    TooLong { total: u64 },
}

impl Failure {
    pub(super) fn error(&self, at: CallSite, call: Call) -> CommError {
        match self {
            Self::Died { rank } => CommError::PeerDied { at, rank: *rank },
            Self::Failed { rank, cause } => {
                CommError::PeerFailed { at, rank: *rank, cause: Box::new(cause.error()) }
            }
            Self::Mismatch { rank, found } => {
                CommError::Mismatch { at, rank: *rank, expected: call.to_string(), found: found.to_string() }
            }
            Self::TooLong { total } => CommError::invalid(
                "bytes",
                format!(
                    "{at}: the ranks' {total} bytes together are over the limit of 1 GiB; send less at a time"
                ),
            ),
        }
    }
}

/// A group that a split made, as one member sees it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct Child {
    pub(super) group: u64,
    pub(super) name: String,
    pub(super) rank: usize,
    pub(super) size: usize,
    /// The group's rank whose process runs the hub, if it is a member.
    pub(super) hub_rank: Option<usize>,
}

/// From the hub to a rank.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) enum FromHub {
    /// All ranks have arrived.
    Formed,
    /// The rendezvous failed.
    Unformed { missing: Vec<usize> },
    /// A round's bytes, `lengths` of each rank one after the other in the body; and how many of the descriptors that
    /// came before are each rank's.
    Complete { group: u64, seq: u64, lengths: Vec<u64>, fds: Vec<u32> },
    /// The outcome of a split.
    Split { group: u64, seq: u64, child: Option<Child> },
    /// A round failed for this rank.
    RoundFailed { group: u64, seq: u64, failure: Failure },
    /// The answer to [`ToHub::WhoIsMissing`].
    Missing { group: u64, seq: u64, ranks: Vec<usize> },
    /// A rank of the group failed; for those that wait for nothing.
    Noticed { group: u64, failure: Failure },
    /// Brings one rank's descriptors for the [`Complete`](Self::Complete) that follows.
    Descriptors { count: u32 },
    /// The hub's own rank has dropped its last handle: the hub's end will be no death.
    HubLeft,
}

/// The prefix and head of a frame with this message.
pub(super) fn encode_head<T: Serialize>(message: &T, body_len: usize) -> Result<Segment, WireError> {
    // Messages hold no types that the codec refuses, so only an over-long head can fail.
    let head = postcard::to_stdvec(message).map_err(|_| WireError::TooLong)?;
    prefix_and_head(&head, body_len).map(Segment::Bytes)
}

/// The message in a frame's head.
pub(super) fn decode_head<T: DeserializeOwned>(head: &[u8]) -> Option<T> {
    postcard::from_bytes(head).ok()
}

/// Why descriptors that were sent to this process did not arrive.
pub(super) fn out_of_numbers(context: &str) -> CommError {
    CommError::Io {
        context: context.into(),
        message: "the process has no descriptor numbers left for them; raise its limit (ulimit -n)".into(),
    }
}

/// `bytes` as a frame's body, without a copy where nothing is to be sent.
pub(super) fn body_segment(bytes: &[u8]) -> Segment {
    Segment::Bytes(Arc::from(bytes))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn no_bytes_make_the_message_decoder_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            if let Some(ToHub::Fail { cause, .. } | ToHub::GiveUp { cause, .. }) = decode_head(&bytes) {
                cause.error();
            }
            let _: Option<FromHub> = decode_head(&bytes);
            Cause(bytes).error();
        }
    }

    #[test]
    fn a_cause_nested_beyond_the_limit_is_shortened() {
        let mut error = CommError::invalid("count", "x");
        for rank in 0..2000 {
            let at = CallSite::new("world", crate::OpKind::Poll, 0);
            error = CommError::PeerFailed { at, rank, cause: Box::new(error) };
        }
        let cause = Cause::new(&error);
        assert!(cause.0.len() <= CAUSE_LIMIT);
        assert!(matches!(cause.error(), CommError::Io { .. }));
        let small = CommError::invalid("count", "x");
        assert_eq!(Cause::new(&small).error(), small);
    }
}
