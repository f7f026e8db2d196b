//! Communication between the ranks' host sides: how communicators meet, agree and notice a death.

mod address;
mod call;
mod environment;
mod handshake;
mod hub;
mod launch;
mod link;
mod message;
mod newcomers;
mod passed_on;
mod private_dir;
mod rendezvous;
mod rounds;
mod socket;
mod tcp;
mod thread;
mod token;
mod transport;
mod wire;

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::error::{CallSite, CommError, Result};
use crate::op::OpKind;

pub use address::RendezvousAddress;
pub use environment::local_rank_from_env;
pub use launch::run_threads;
pub use rendezvous::Rendezvous;
pub use socket::SocketComm;
pub use thread::ThreadComm;
pub use token::Token;

/// The instant at which a call gives up.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Deadline {
    start: Instant,
    end: Instant,
}

impl Deadline {
    /// Gives up `timeout` from now.
    #[must_use]
    pub fn after(timeout: Duration) -> Self {
        let start = Instant::now();
        // A century stands in for "practically never", so that absurd durations cannot overflow the clock.
        let end = start.checked_add(timeout).unwrap_or(start + Duration::from_secs(3_155_760_000));
        Self { start, end }
    }

    /// The instant itself.
    #[must_use]
    pub const fn instant(&self) -> Instant {
        self.end
    }

    /// Time left; zero once it has passed.
    #[must_use]
    pub fn remaining(&self) -> Duration {
        self.end.saturating_duration_since(Instant::now())
    }

    /// Time since the deadline was set: what an error reports as waited.
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        self.start.elapsed()
    }

    /// Whether the deadline has passed.
    #[must_use]
    pub fn has_passed(&self) -> bool {
        self.remaining().is_zero()
    }
}

/// A communicator between the host sides of `size` ranks, which may be threads or processes.
///
/// Every rank makes the same calls in the same order on a communicator; a communicator split from it has an order of
/// its own. Every call ends by its deadline with a value or an error that names the ranks to blame. Calls of several
/// threads on one handle take turns, and a turn may begin only when the call before it has ended, by the deadline of that
/// one. A call that failed after it had begun, with a [`Mismatch`](CommError::Mismatch) too, ends the communicator: every
/// later call returns the same cause.
///
/// Values cross as bytes here; [`HostCommExt`] adds serialisable types and reductions.
pub trait HostComm: Send + Sync {
    /// The communicator's name, unique among the communicators of the job, for example `world/0`.
    fn name(&self) -> &str;

    /// This rank, below [`size`](Self::size).
    fn rank(&self) -> usize;

    /// The number of ranks.
    fn size(&self) -> usize;

    /// The timeout for calls made through [`HostCommExt`], which take no deadline.
    fn timeout(&self) -> Duration;

    /// Whether all ranks are threads of one process, and so share addresses.
    fn same_process(&self) -> bool;

    /// Splits into groups of the ranks that pass the same `color`, ordered by `key` and then by rank here. Ranks that
    /// pass `None` join no group and get `None`. Collective.
    ///
    /// # Errors
    /// [`CommError::Timeout`], [`CommError::PeerDied`], [`CommError::PeerFailed`], [`CommError::Aborted`] or
    /// [`CommError::Closed`].
    fn split(&self, color: Option<u32>, key: i64, deadline: Deadline) -> Result<Option<Arc<dyn HostComm>>>;

    /// Returns once every rank has called it.
    ///
    /// # Errors
    /// As [`split`](Self::split).
    fn barrier(&self, deadline: Deadline) -> Result<()>;

    /// Gives every rank `root`'s bytes. `bytes` is ignored on the other ranks.
    ///
    /// # Errors
    /// As [`split`](Self::split), and [`CommError::InvalidArgument`] for a root out of range.
    fn broadcast_bytes(&self, bytes: &[u8], root: usize, deadline: Deadline) -> Result<Vec<u8>>;

    /// Gives every rank all ranks' bytes, in rank order. Lengths may differ.
    ///
    /// # Errors
    /// As [`split`](Self::split).
    fn all_gather_bytes(&self, bytes: &[u8], deadline: Deadline) -> Result<Vec<Vec<u8>>>;

    /// Whether [`exchange_fds`](Self::exchange_fds) works here: threads of a process, or processes over a unix socket.
    fn can_exchange_fds(&self) -> bool;

    /// Gives every rank duplicates of all ranks' file descriptors, in rank order, close-on-exec. Numbers may differ
    /// (at most 64 a rank).
    ///
    /// # Errors
    /// As [`split`](Self::split), and [`CommError::Unsupported`] where [`can_exchange_fds`](Self::can_exchange_fds) is
    /// false.
    fn exchange_fds(&self, fds: &[BorrowedFd<'_>], deadline: Deadline) -> Result<Vec<Vec<OwnedFd>>>;

    /// The failure known so far, if any: noticed in the background within a second of a peer's death, with no call
    /// under way. Never blocks.
    ///
    /// # Errors
    /// The failure.
    fn poll(&self) -> Result<()>;

    /// Tells every rank that this one has failed: their waits end with [`CommError::PeerFailed`]. Never blocks.
    fn report_failure(&self, cause: &CommError);

    /// Ends every wait on this communicator, here and on the other ranks: this rank's with [`CommError::Aborted`], the
    /// others' with [`CommError::PeerFailed`]. Never blocks; may be called from any thread.
    fn abort(&self);
}

/// Typed calls on a [`HostComm`], with its own [`timeout`](HostComm::timeout) as deadline where they take none.
pub trait HostCommExt: HostComm {
    /// Gives every rank `root`'s value. Only the root's `value` is used; the others pass `None`.
    ///
    /// # Errors
    /// As [`HostComm::broadcast_bytes`], and [`CommError::Serialization`].
    fn broadcast<T: Serialize + DeserializeOwned>(&self, value: Option<&T>, root: usize) -> Result<T> {
        check_root(root, self.size())?;
        let bytes = match value {
            Some(value) if self.rank() == root => encode(value)?,
            None if self.rank() == root => {
                return Err(CommError::invalid("value", "the root of a broadcast must pass a value"));
            }
            _ => Vec::new(),
        };
        decode(&self.broadcast_bytes(&bytes, root, Deadline::after(self.timeout()))?)
    }

    /// Gives every rank all ranks' values, in rank order.
    ///
    /// # Errors
    /// As [`HostComm::all_gather_bytes`], and [`CommError::Serialization`].
    fn all_gather<T: Serialize + DeserializeOwned>(&self, value: &T) -> Result<Vec<T>> {
        self.all_gather_by(value, Deadline::after(self.timeout()))
    }

    /// [`all_gather`](Self::all_gather) by a deadline of the caller's, for what has a timeout of its own, as the
    /// communicators that are made over this one do.
    ///
    /// # Errors
    /// As [`HostComm::all_gather_bytes`], and [`CommError::Serialization`].
    fn all_gather_by<T: Serialize + DeserializeOwned>(
        &self,
        value: &T,
        deadline: Deadline,
    ) -> Result<Vec<T>> {
        let all = self.all_gather_bytes(&encode(value)?, deadline)?;
        all.iter().map(|bytes| decode(bytes)).collect()
    }

    /// Combines the ranks' values element by element, in rank order; every rank gets the same result.
    ///
    /// # Errors
    /// As [`HostComm::all_gather_bytes`], and [`CommError::Mismatch`] when the ranks' lengths differ.
    fn all_reduce<T>(&self, values: &[T], op: HostReduceOp) -> Result<Vec<T>>
    where
        T: HostNumber,
    {
        let all: Vec<Vec<T>> = self.all_gather(&values.to_vec())?;
        if let Some(rank) = all.iter().position(|other| other.len() != values.len()) {
            return Err(CommError::Mismatch {
                at: CallSite::new(self.name(), OpKind::HostAllReduce, 0),
                rank,
                expected: format!("all_reduce of {} values", values.len()),
                found: format!("all_reduce of {} values", all[rank].len()),
            });
        }
        let mut ranks = all.into_iter();
        let mut result = ranks.next().unwrap_or_default();
        for other in ranks {
            for (a, b) in result.iter_mut().zip(other) {
                *a = a.combine(b, op);
            }
        }
        Ok(result)
    }
}

/// How [`HostCommExt::all_reduce`] combines values.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub enum HostReduceOp {
    /// Sum; integers wrap.
    Sum,
    /// Smallest.
    Min,
    /// Largest.
    Max,
}

/// A number that [`HostCommExt::all_reduce`] can combine.
pub trait HostNumber: Copy + Serialize + DeserializeOwned {
    /// `self op other`.
    #[must_use]
    fn combine(self, other: Self, op: HostReduceOp) -> Self;
}

macro_rules! host_numbers {
    ($add:expr => $($ty:ty),*) => {$(
        impl HostNumber for $ty {
            fn combine(self, other: Self, op: HostReduceOp) -> Self {
                match op {
                    HostReduceOp::Sum => ($add)(self, other),
                    HostReduceOp::Min => self.min(other),
                    HostReduceOp::Max => self.max(other),
                }
            }
        }
    )*};
}
host_numbers!(|a: Self, b: Self| a.wrapping_add(b) => i8, i16, i32, i64, isize, u8, u16, u32, u64, usize);
host_numbers!(|a: Self, b: Self| a + b => f32, f64);

pub(crate) fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>> {
    postcard::to_stdvec(value).map_err(|error| codec_error::<T>("encode", &error))
}

pub(crate) fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T> {
    postcard::from_bytes(bytes).map_err(|error| codec_error::<T>("decode", &error))
}

fn codec_error<T>(action: &'static str, error: &postcard::Error) -> CommError {
    CommError::Serialization {
        action: action.into(),
        type_name: std::any::type_name::<T>().into(),
        reason: error.to_string(),
    }
}

impl<C: HostComm + ?Sized> HostCommExt for C {}

/// The most ranks of a communicator: what a mistyped size is told from, and so that none makes tables too large to hold.
const SIZE_LIMIT: usize = 1 << 16;

/// Fails with [`CommError::InvalidArgument`] unless a communicator can have `size` ranks.
fn check_size(size: usize) -> Result<()> {
    match size {
        0 => Err(CommError::invalid("size", "a communicator has at least one rank")),
        1..=SIZE_LIMIT => Ok(()),
        _ => {
            Err(CommError::invalid("size", format!("{size} ranks; a communicator has {SIZE_LIMIT} at most")))
        }
    }
}

/// Fails with [`CommError::InvalidArgument`] unless `root` is a rank of a communicator of `size`.
pub(crate) fn check_root(root: usize, size: usize) -> Result<()> {
    if root < size {
        return Ok(());
    }
    Err(CommError::invalid("root", format!("{root} is not a rank of a communicator of size {size}")))
}
