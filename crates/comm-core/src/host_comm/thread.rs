//! [`HostComm`] between threads of one process.
//!
//! Every call is a *round*: each rank puts a contribution into the group's shared table under its own call number and
//! waits until the table holds all of them. Ranks that leave, die or fail are marked in the same table, and the marks
//! end the waits that need them. One mutex and one condition variable per group: this is the control path.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::error::{CallSite, CommError, Result};
use crate::host_comm::call::Call;
use crate::host_comm::{Deadline, HostComm, check_root, check_size};
use crate::op::OpKind;

/// What one rank brings to a round.
#[derive(Clone, Default)]
struct Contribution {
    bytes: Arc<[u8]>,
    fds: Arc<[OwnedFd]>,
    color: Option<u32>,
    key: i64,
}

struct Round {
    call: Call,
    opened_by: usize,
    parts: Vec<Option<Contribution>>,
    readers_left: usize,
}

/// What the other ranks know of a rank.
#[derive(Clone)]
enum Status {
    Alive,
    /// Dropped its handle in good order: only a round that still needs it fails.
    Departed,
    /// Its thread panicked: every wait ends.
    Died,
    /// Reported a failure or aborted: every wait ends at once.
    Failed(CommError),
    /// Gave up a call of its own after its deadline: only rounds that still need it fail, so that the others blame the
    /// rank that was missing, not the first one to notice.
    GaveUp(CommError),
}

struct State {
    rounds: HashMap<u64, Round>,
    status: Vec<Status>,
    /// Groups made by a split, until all their members have fetched them: (round, color) to group.
    children: HashMap<(u64, u32), (Arc<Group>, usize)>,
}

struct Group {
    name: String,
    size: usize,
    timeout: Duration,
    state: Mutex<State>,
    changed: Condvar,
}

impl Group {
    fn new(name: String, size: usize, timeout: Duration) -> Arc<Self> {
        let state =
            State { rounds: HashMap::new(), status: vec![Status::Alive; size], children: HashMap::new() };
        Arc::new(Self { name, size, timeout, state: Mutex::new(state), changed: Condvar::new() })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // The table is consistent between statements, so a panic elsewhere does not spoil it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn mark(&self, rank: usize, status: Status) {
        let mut state = self.lock();
        // The first mark stays, except that a failure that ends every wait outranks a call that failed.
        if matches!(
            (&state.status[rank], &status),
            (Status::Alive, _) | (Status::GaveUp(_), Status::Failed(_))
        ) {
            state.status[rank] = status;
        }
        drop(state);
        self.changed.notify_all();
    }
}

/// What the calls of one rank's handle, which are serialised, keep between them.
#[derive(Default)]
struct Calls {
    seq: u64,
    broken: Option<CommError>,
}

/// One rank's handle on a communicator between threads of one process.
///
/// Dropping a handle leaves the communicator: calls of other ranks that need this one fail with
/// [`CommError::PeerDied`].
pub struct ThreadComm {
    group: Arc<Group>,
    rank: usize,
    calls: Mutex<Calls>,
}

impl ThreadComm {
    /// A communicator of `size` ranks named `world`: one handle per rank, in rank order. `timeout` is the deadline of
    /// calls that take none.
    ///
    /// # Errors
    /// [`CommError::InvalidArgument`] for a size of zero or over 65536.
    pub fn create(size: usize, timeout: Duration) -> Result<Vec<Self>> {
        check_size(size)?;
        let group = Group::new("world".into(), size, timeout);
        Ok((0..size).map(|rank| Self::new(group.clone(), rank)).collect())
    }

    fn new(group: Arc<Group>, rank: usize) -> Self {
        Self { group, rank, calls: Mutex::default() }
    }

    fn site(&self, op: OpKind, seq: u64) -> CallSite {
        CallSite::new(&self.group.name, op, seq)
    }

    /// Contributes to this rank's next round and returns what `take` makes of all contributions, in rank order, and of
    /// the round's number. A part that this rank could not make up, or an outcome that it cannot take, is a call that
    /// failed, which the others learn of at once.
    fn exchange<T>(
        &self,
        call: Call,
        part: Result<Contribution>,
        deadline: Deadline,
        take: impl FnOnce(u64, Vec<Contribution>) -> Result<T>,
    ) -> Result<T> {
        let mut calls = self.calls.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(error) = &calls.broken {
            return Err(error.clone());
        }
        let seq = calls.seq;
        calls.seq += 1;
        let result = part.and_then(|part| self.round(call, seq, part, deadline));
        let result = result.and_then(|parts| take(seq, parts));
        if let Err(error) = &result {
            calls.broken = Some(error.clone());
            if !matches!(error, CommError::Aborted { .. }) {
                self.group.mark(self.rank, Status::GaveUp(error.clone()));
            }
        }
        result
    }

    fn round(
        &self,
        call: Call,
        seq: u64,
        part: Contribution,
        deadline: Deadline,
    ) -> Result<Vec<Contribution>> {
        let op = call.op;
        let group = &*self.group;
        let mut state = group.lock();
        let round = state.rounds.entry(seq).or_insert_with(|| Round {
            call,
            opened_by: self.rank,
            parts: vec![None; group.size],
            readers_left: group.size,
        });
        if round.call != call {
            return Err(CommError::Mismatch {
                at: self.site(op, seq),
                rank: round.opened_by,
                expected: call.to_string(),
                found: round.call.to_string(),
            });
        }
        round.parts[self.rank] = Some(part);
        group.changed.notify_all();
        loop {
            self.failure(&state, op, seq)?;
            if let Some(round) = state.rounds.get_mut(&seq)
                && round.parts.iter().all(Option::is_some)
            {
                let parts = round.parts.iter().flatten().cloned().collect();
                round.readers_left -= 1;
                if round.readers_left == 0 {
                    state.rounds.remove(&seq);
                }
                return Ok(parts);
            }
            let left = deadline.remaining();
            if left.is_zero() {
                return Err(CommError::Timeout {
                    at: self.site(op, seq),
                    missing: missing(&state, seq),
                    waited: deadline.elapsed(),
                });
            }
            state = group.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The failure that ends a wait for round `seq`, if there is one.
    fn failure(&self, state: &State, op: OpKind, seq: u64) -> Result<()> {
        let at = || self.site(op, seq);
        if let Status::Failed(cause) = &state.status[self.rank] {
            return Err(match cause {
                CommError::Aborted { .. } => CommError::Aborted { at: at() },
                other => other.clone(),
            });
        }
        let needed = missing(state, seq);
        let peer_failed = |rank, cause: &CommError| CommError::PeerFailed {
            at: at(),
            rank,
            cause: Box::new(cause.clone()),
        };
        // The likeliest root of the trouble goes first: a failure that ends every wait, a death, a rank that gave up and
        // can say why; then a rank that left, as others do once they have seen a failure.
        // A dead rank that has contributed ends the wait for others too: every survivor is to learn of it now.
        let died = || {
            let dead = state.status.iter().position(|status| matches!(status, Status::Died));
            dead.filter(|_| !needed.is_empty())
        };
        let departed = |rank: &&usize| matches!(state.status[**rank], Status::Departed);
        let gone = |rank: &usize| CommError::PeerDied { at: at(), rank: *rank };
        let failed = state.status.iter().enumerate().find_map(|(rank, status)| match status {
            Status::Failed(cause) => Some(peer_failed(rank, cause)),
            _ => None,
        });
        let gave_up = || {
            needed.iter().find_map(|&rank| match &state.status[rank] {
                Status::GaveUp(cause) => Some(peer_failed(rank, cause)),
                _ => None,
            })
        };
        failed
            .or_else(|| died().as_ref().map(gone))
            .or_else(gave_up)
            .or_else(|| needed.iter().find(departed).map(gone))
            .map_or(Ok(()), Err)
    }
}

/// The ranks that have not contributed to round `seq`.
fn missing(state: &State, seq: u64) -> Vec<usize> {
    let Some(round) = state.rounds.get(&seq) else { return Vec::new() };
    round.parts.iter().enumerate().filter(|(_, part)| part.is_none()).map(|(rank, _)| rank).collect()
}

impl HostComm for ThreadComm {
    fn name(&self) -> &str {
        &self.group.name
    }

    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.group.size
    }

    fn timeout(&self) -> Duration {
        self.group.timeout
    }

    fn same_process(&self) -> bool {
        true
    }

    fn split(&self, color: Option<u32>, key: i64, deadline: Deadline) -> Result<Option<Arc<dyn HostComm>>> {
        let part = Contribution { color, key, ..Contribution::default() };
        let both = |seq, parts| Ok((seq, parts));
        let (seq, parts) = self.exchange(Call::new(OpKind::Split), Ok(part), deadline, both)?;
        let Some(color) = color else { return Ok(None) };
        let mut members: Vec<(i64, usize)> = parts
            .iter()
            .enumerate()
            .filter(|(_, part)| part.color == Some(color))
            .map(|(rank, part)| (part.key, rank))
            .collect();
        members.sort_unstable();
        let rank = members.iter().position(|&(_, rank)| rank == self.rank).unwrap_or_default();
        let mut state = self.group.lock();
        let (child, fetched) = state.children.entry((seq, color)).or_insert_with(|| {
            let name = format!("{}/{seq}.{color}", self.group.name);
            (Group::new(name, members.len(), self.group.timeout), 0)
        });
        let child = child.clone();
        *fetched += 1;
        if *fetched == members.len() {
            state.children.remove(&(seq, color));
        }
        Ok(Some(Arc::new(Self::new(child, rank))))
    }

    fn barrier(&self, deadline: Deadline) -> Result<()> {
        self.exchange(Call::new(OpKind::HostBarrier), Ok(Contribution::default()), deadline, |_, _| Ok(()))
    }

    fn broadcast_bytes(&self, bytes: &[u8], root: usize, deadline: Deadline) -> Result<Vec<u8>> {
        check_root(root, self.size())?;
        let bytes = if self.rank == root { Arc::from(bytes) } else { Arc::default() };
        let part = Contribution { bytes, ..Contribution::default() };
        let call = Call { op: OpKind::HostBroadcast, root };
        self.exchange(call, Ok(part), deadline, |_, parts| Ok(parts[root].bytes.to_vec()))
    }

    fn all_gather_bytes(&self, bytes: &[u8], deadline: Deadline) -> Result<Vec<Vec<u8>>> {
        let part = Contribution { bytes: Arc::from(bytes), ..Contribution::default() };
        self.exchange(Call::new(OpKind::HostAllGather), Ok(part), deadline, |_, parts| {
            Ok(parts.iter().map(|part| part.bytes.to_vec()).collect())
        })
    }

    fn can_exchange_fds(&self) -> bool {
        true
    }

    fn exchange_fds(&self, fds: &[BorrowedFd<'_>], deadline: Deadline) -> Result<Vec<Vec<OwnedFd>>> {
        let duplicate = |fd: BorrowedFd<'_>| {
            fd.try_clone_to_owned().map_err(|e| CommError::io("duplicating a descriptor", &e))
        };
        let fds = fds.iter().map(|fd| duplicate(*fd)).collect::<Result<Arc<[_]>>>();
        let part = fds.map(|fds| Contribution { fds, ..Contribution::default() });
        self.exchange(Call::new(OpKind::HostExchangeFds), part, deadline, |_, parts| {
            parts.iter().map(|part| part.fds.iter().map(|fd| duplicate(fd.as_fd())).collect()).collect()
        })
    }

    fn poll(&self) -> Result<()> {
        let state = self.group.lock();
        let at = || self.site(OpKind::Poll, 0);
        if let Status::Failed(cause) | Status::GaveUp(cause) = &state.status[self.rank] {
            return Err(cause.clone());
        }
        let status = || state.status.iter().enumerate();
        if let Some((rank, _)) = status().find(|(_, status)| matches!(status, Status::Died)) {
            return Err(CommError::PeerDied { at: at(), rank });
        }
        for (rank, status) in status() {
            if let Status::Failed(cause) | Status::GaveUp(cause) = status {
                return Err(CommError::PeerFailed { at: at(), rank, cause: Box::new(cause.clone()) });
            }
        }
        Ok(())
    }

    fn report_failure(&self, cause: &CommError) {
        self.group.mark(self.rank, Status::Failed(cause.clone()));
    }

    fn abort(&self) {
        let at = self.site(OpKind::Close, 0);
        self.group.mark(self.rank, Status::Failed(CommError::Aborted { at }));
    }
}

impl Drop for ThreadComm {
    fn drop(&mut self) {
        let status = if std::thread::panicking() { Status::Died } else { Status::Departed };
        self.group.mark(self.rank, status);
    }
}
