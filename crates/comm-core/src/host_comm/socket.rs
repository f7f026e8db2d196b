//! [`HostComm`] between processes, over a unix socket or TCP.
//!
//! A call sends this rank's part to the hub in rank 0's process and waits for the round's outcome. This module owns
//! the calls' semantics: sequence numbers, deadlines, and what each failure becomes; it never reads a socket.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::error::{CallSite, CommError, Result};
use crate::host_comm::call::Call;
use crate::host_comm::link::{Answer, GroupState, Link, LinkState};
use crate::host_comm::message::{Cause, Child, ToHub, WORLD, out_of_numbers};
use crate::host_comm::wire::{BODY_LIMIT, FDS_LIMIT, Frame};
use crate::host_comm::{Deadline, HostComm, check_root};
use crate::op::OpKind;

/// How long the hub has to say who is missing. A hub that does not is taken to be missing itself.
const HUB_PATIENCE: Duration = Duration::from_millis(200);

/// What the calls of one handle, which are serialised, keep between them.
#[derive(Default)]
struct Calls {
    seq: u64,
    broken: Option<CommError>,
}

/// One rank's handle on a communicator between processes, made by [`Rendezvous::connect`](crate::Rendezvous::connect).
///
/// All messages pass through rank 0's process, in every group, groups without rank 0 included: where that process ends,
/// calls fail with [`CommError::PeerDied`], which names rank 0; for a group that rank 0 is not in, the error's call
/// site says `world`. So rank 0 leaves last, which a barrier before the end provides for.
///
/// Dropping a handle leaves the communicator: calls of other ranks that need this one fail with
/// [`CommError::PeerDied`].
///
/// One rank contributes at most 1 GiB to a broadcast, and all ranks together to an all-gather. More is a call that failed,
/// with [`CommError::InvalidArgument`]: the other ranks are in it already.
pub struct SocketComm {
    link: Arc<Link>,
    group: u64,
    name: String,
    rank: usize,
    size: usize,
    hub_rank: Option<usize>,
    timeout: Duration,
    passes_fds: bool,
    calls: Mutex<Calls>,
}

/// What a rank brings to a call.
#[derive(Default)]
struct Part<'a> {
    bytes: &'a [u8],
    fds: Option<Arc<[OwnedFd]>>,
    color: Option<u32>,
    key: i64,
}

impl<'a> Part<'a> {
    /// Bytes that one frame can carry. What all ranks bring together is the hub's to judge, which alone knows it.
    fn of_bytes(bytes: &'a [u8]) -> Result<Self> {
        if bytes.len() <= BODY_LIMIT {
            return Ok(Self { bytes, ..Self::default() });
        }
        let reason = format!("{} bytes are over the limit of {BODY_LIMIT} (1 GiB)", bytes.len());
        Err(CommError::invalid("bytes", reason))
    }

    /// Duplicates of descriptors that one frame can carry.
    fn of_fds(fds: &[BorrowedFd<'_>]) -> Result<Self> {
        if fds.len() > FDS_LIMIT {
            return Err(CommError::invalid("fds", format!("{} descriptors; {FDS_LIMIT} at most", fds.len())));
        }
        let duplicate = |fd: &BorrowedFd<'_>| {
            fd.try_clone_to_owned().map_err(|e| CommError::io("duplicating a descriptor", &e))
        };
        let fds = fds.iter().map(duplicate).collect::<Result<Arc<[_]>>>()?;
        Ok(Self { fds: Some(fds), ..Self::default() })
    }
}

impl SocketComm {
    pub(super) fn world(link: Link, rank: usize, size: usize, timeout: Duration, passes_fds: bool) -> Self {
        let child = Child { group: WORLD, name: "world".into(), rank, size, hub_rank: Some(0) };
        Self::new(Arc::new(link), child, timeout, passes_fds)
    }

    fn new(link: Arc<Link>, child: Child, timeout: Duration, passes_fds: bool) -> Self {
        let Child { group, name, rank, size, hub_rank } = child;
        Self { link, group, name, rank, size, hub_rank, timeout, passes_fds, calls: Mutex::default() }
    }

    fn site(&self, op: OpKind, seq: u64) -> CallSite {
        CallSite::new(&self.name, op, seq)
    }

    /// The call site and rank by which to name the hub's rank, which may not be in this group.
    fn hub_site(&self, op: OpKind, seq: u64) -> (CallSite, usize) {
        match self.hub_rank {
            Some(rank) => (self.site(op, seq), rank),
            None => (CallSite::new("world", op, seq), 0),
        }
    }

    /// Contributes to this rank's next round and returns its outcome. A part that this rank could not make up is a call
    /// that failed, which the others learn of at once.
    fn exchange(&self, call: Call, part: Result<Part<'_>>, deadline: Deadline) -> Result<Answer> {
        let mut calls = self.calls.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(error) = &calls.broken {
            return Err(error.clone());
        }
        let seq = calls.seq;
        calls.seq += 1;
        let result = part.and_then(|part| self.round(call, seq, part, deadline));
        if let Err(error) = &result {
            calls.broken = Some(error.clone());
            let mut state = self.link.lock();
            if let Some(group) = state.groups.get_mut(&self.group)
                && group.own_failure.is_none()
            {
                group.own_failure = Some(error.clone());
                let message = ToHub::GiveUp { group: self.group, cause: Cause::new(error) };
                self.link.post(&mut state, &message, &[], None);
            }
        }
        result
    }

    fn round(&self, call: Call, seq: u64, part: Part<'_>, deadline: Deadline) -> Result<Answer> {
        let mut state = self.link.lock();
        if let Some(group) = state.groups.get_mut(&self.group) {
            (group.waiting, group.answer, group.missing) = (Some(seq), None, None);
        }
        let fds = part.fds.as_ref().map_or(0, |fds| fds.len() as u32);
        let (color, key) = (part.color, part.key);
        let message = ToHub::Contribute { group: self.group, seq, call, color, key, fds };
        self.link.post(&mut state, &message, part.bytes, part.fds);
        let (mut state, mut outcome) = self.wait(state, call, seq, deadline);
        if outcome.is_none() {
            self.link.post(&mut state, &ToHub::WhoIsMissing { group: self.group, seq }, &[], None);
            (state, outcome) = self.wait(state, call, seq, Deadline::after(HUB_PATIENCE));
        }
        let missing = state.groups.get_mut(&self.group).and_then(|group| {
            group.waiting = None;
            group.missing.take()
        });
        drop(state);
        outcome.unwrap_or_else(|| {
            let (at, missing) = match missing {
                Some(missing) => (self.site(call.op, seq), missing),
                None => {
                    let (at, rank) = self.hub_site(call.op, seq);
                    (at, vec![rank])
                }
            };
            Err(CommError::Timeout { at, missing, waited: deadline.elapsed() })
        })
    }

    /// Waits for the round's outcome; `None` when the deadline passed first, or the hub said who is missing.
    fn wait<'a>(
        &'a self,
        mut state: MutexGuard<'a, LinkState>,
        call: Call,
        seq: u64,
        deadline: Deadline,
    ) -> (MutexGuard<'a, LinkState>, Option<Result<Answer>>) {
        loop {
            let hub_gone = state.hub_gone;
            if let Some(group) = state.groups.get_mut(&self.group)
                && let Some(outcome) = self.outcome(group, call, seq, hub_gone)
            {
                return (state, Some(outcome));
            }
            let answered = state.groups.get(&self.group).is_some_and(|group| group.missing.is_some());
            if answered || deadline.has_passed() {
                return (state, None);
            }
            state = self.link.wait(state, deadline);
        }
    }

    fn outcome(
        &self,
        group: &mut GroupState,
        call: Call,
        seq: u64,
        hub_gone: bool,
    ) -> Option<Result<Answer>> {
        match &group.own_failure {
            Some(CommError::Aborted { .. }) => {
                return Some(Err(CommError::Aborted { at: self.site(call.op, seq) }));
            }
            Some(cause) => return Some(Err(cause.clone())),
            None => {}
        }
        match group.answer.take() {
            Some(Answer::Failed(failure)) => Some(Err(failure.error(self.site(call.op, seq), call))),
            Some(Answer::LostDescriptors) => Some(Err(out_of_numbers("receiving descriptors"))),
            Some(answer) => Some(Ok(answer)),
            // An earlier failure is why the hub's rank has gone, more likely than not.
            None if hub_gone && group.noticed.is_some() => {
                let failure = group.noticed.as_ref()?;
                Some(Err(failure.error(self.site(call.op, seq), call)))
            }
            None if hub_gone => {
                let (at, rank) = self.hub_site(call.op, seq);
                Some(Err(CommError::PeerDied { at, rank }))
            }
            None => None,
        }
    }

    /// A round whose outcome is all ranks' bytes and descriptors.
    fn gather(&self, call: Call, part: Result<Part<'_>>, deadline: Deadline) -> Result<Gathered> {
        match self.exchange(call, part, deadline)? {
            Answer::Complete { frame, lengths, fds } => Ok(Gathered { frame, lengths, fds }),
            Answer::Split(_) | Answer::Failed(_) | Answer::LostDescriptors => Err(wrong_answer()),
        }
    }

    fn fail(&self, cause: &CommError) {
        let mut state = self.link.lock();
        let Some(group) = state.groups.get_mut(&self.group) else { return };
        if std::mem::replace(&mut group.reported, true) {
            return;
        }
        group.own_failure.get_or_insert_with(|| cause.clone());
        let message = ToHub::Fail { group: self.group, cause: Cause::new(cause) };
        self.link.post(&mut state, &message, &[], None);
        drop(state);
        self.link.notify();
    }
}

struct Gathered {
    frame: Frame,
    lengths: Vec<u64>,
    fds: Vec<Vec<OwnedFd>>,
}

fn wrong_answer() -> CommError {
    CommError::Io {
        context: "waiting for the rendezvous hub's answer".into(),
        message: "it answered another kind of call; do all ranks run the same version?".into(),
    }
}

impl HostComm for SocketComm {
    fn name(&self) -> &str {
        &self.name
    }

    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn timeout(&self) -> Duration {
        self.timeout
    }

    fn same_process(&self) -> bool {
        false
    }

    fn split(&self, color: Option<u32>, key: i64, deadline: Deadline) -> Result<Option<Arc<dyn HostComm>>> {
        let part = Part { color, key, ..Part::default() };
        match self.exchange(Call::new(OpKind::Split), Ok(part), deadline)? {
            Answer::Split(child) => Ok(child.map(|child| {
                let comm = Self::new(self.link.clone(), child, self.timeout, self.passes_fds);
                Arc::new(comm) as Arc<dyn HostComm>
            })),
            Answer::Complete { .. } | Answer::Failed(_) | Answer::LostDescriptors => Err(wrong_answer()),
        }
    }

    fn barrier(&self, deadline: Deadline) -> Result<()> {
        self.gather(Call::new(OpKind::HostBarrier), Ok(Part::default()), deadline).map(drop)
    }

    fn broadcast_bytes(&self, bytes: &[u8], root: usize, deadline: Deadline) -> Result<Vec<u8>> {
        check_root(root, self.size)?;
        let bytes = if self.rank == root { bytes } else { &[] };
        let call = Call { op: OpKind::HostBroadcast, root };
        self.gather(call, Part::of_bytes(bytes), deadline).map(|gathered| gathered.frame.body().to_vec())
    }

    fn all_gather_bytes(&self, bytes: &[u8], deadline: Deadline) -> Result<Vec<Vec<u8>>> {
        let gathered = self.gather(Call::new(OpKind::HostAllGather), Part::of_bytes(bytes), deadline)?;
        let mut rest = gathered.frame.body();
        let take = |&length: &u64| {
            let (part, later) = rest.split_at_checked(length as usize).unwrap_or((rest, &[]));
            rest = later;
            part.to_vec()
        };
        Ok(gathered.lengths.iter().map(take).collect())
    }

    fn can_exchange_fds(&self) -> bool {
        self.passes_fds
    }

    fn exchange_fds(&self, fds: &[BorrowedFd<'_>], deadline: Deadline) -> Result<Vec<Vec<OwnedFd>>> {
        if !self.passes_fds {
            return Err(CommError::unsupported(
                OpKind::HostExchangeFds,
                "socket",
                "descriptors cannot cross a TCP connection; let the ranks meet at a unix: address",
            ));
        }
        self.gather(Call::new(OpKind::HostExchangeFds), Part::of_fds(fds), deadline)
            .map(|gathered| gathered.fds)
    }

    fn poll(&self) -> Result<()> {
        let state = self.link.lock();
        let Some(group) = state.groups.get(&self.group) else { return Ok(()) };
        if let Some(cause) = &group.own_failure {
            return Err(cause.clone());
        }
        if let Some(failure) = &group.noticed {
            return Err(failure.error(self.site(OpKind::Poll, 0), Call::new(OpKind::Poll)));
        }
        if state.hub_gone && !state.hub_left {
            let (at, rank) = self.hub_site(OpKind::Poll, 0);
            return Err(CommError::PeerDied { at, rank });
        }
        Ok(())
    }

    fn report_failure(&self, cause: &CommError) {
        self.fail(cause);
    }

    fn abort(&self) {
        self.fail(&CommError::Aborted { at: self.site(OpKind::Close, 0) });
    }
}

impl Drop for SocketComm {
    fn drop(&mut self) {
        let mut state = self.link.lock();
        state.groups.remove(&self.group);
        let message = ToHub::Leave { group: self.group, died: std::thread::panicking() };
        self.link.post(&mut state, &message, &[], None);
    }
}
