//! A rank's connection to the hub, shared by all communicators that the rank has on it.
//!
//! A background thread reads the connection, so a failure is known with no call under way, and finishes writes that
//! the socket did not take at once, so no caller ever blocks on the socket. The state that both sides meet in is one
//! mutex and one condition variable.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags};

use crate::error::{CommError, Result};
use crate::host_comm::Deadline;
use crate::host_comm::message::{
    Child, Failure, FromHub, ToHub, WORLD, body_segment, decode_head, encode_head,
};
use crate::host_comm::passed_on::PassedOn;
use crate::host_comm::transport::timespec;
use crate::host_comm::wire::{Frame, OutQueue, Receiver, WireError};

/// How long a dropped connection goes on sending what its process still had to say.
const LINGER: Duration = Duration::from_secs(2);
/// How long rank 0's last drop lets the hub, a thread of the same process, pass its farewell on.
const FAREWELL: Duration = Duration::from_millis(100);

/// What a call waits for.
pub(super) enum Answer {
    Complete {
        frame: Frame,
        lengths: Vec<u64>,
        fds: Vec<Vec<OwnedFd>>,
    },
    Split(Option<Child>),
    Failed(Failure),
    /// The call is complete for the other ranks, but this process had no descriptor numbers for what it brought.
    LostDescriptors,
}

/// What is known of one group. Calls on a group are serialised, so there is one wait at most.
#[derive(Default)]
pub(super) struct GroupState {
    /// This rank's own failure, abort or failed call: ends its waits and all later calls.
    pub(super) own_failure: Option<CommError>,
    /// A failure or abort was reported, which is done once.
    pub(super) reported: bool,
    /// The first failure of another rank, for those that poll.
    pub(super) noticed: Option<Failure>,
    pub(super) waiting: Option<u64>,
    pub(super) answer: Option<Answer>,
    pub(super) missing: Option<Vec<usize>>,
}

#[derive(Default)]
pub(super) struct LinkState {
    out: OutQueue,
    pub(super) groups: HashMap<u64, GroupState>,
    /// The rendezvous' outcome: the missing ranks if it failed.
    pub(super) formed: Option<std::result::Result<(), Vec<usize>>>,
    pub(super) hub_gone: bool,
    /// The hub's rank left in good order before: the hub's end is then no death.
    pub(super) hub_left: bool,
    closing: Option<Instant>,
}

struct Shared {
    fd: OwnedFd,
    wake: OwnedFd,
    state: Mutex<LinkState>,
    changed: Condvar,
}

/// A rank's connection to the hub. Dropping it says goodbye and leaves the rest to the background thread.
pub(super) struct Link {
    shared: Arc<Shared>,
    /// In rank 0's process: when the hub has told the others what rank 0 said last.
    passed_on: Option<Arc<PassedOn>>,
}

impl Link {
    /// Takes over an authenticated, non-blocking connection.
    pub(super) fn start(fd: OwnedFd, passed_on: Option<Arc<PassedOn>>) -> Result<Self> {
        let wake = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|error| CommError::io("making an event descriptor", &error.into()))?;
        let mut state = LinkState::default();
        state.groups.insert(WORLD, GroupState::default());
        let shared = Arc::new(Shared { fd, wake, state: Mutex::new(state), changed: Condvar::new() });
        let background = shared.clone();
        std::thread::Builder::new()
            .name("comm-link".into())
            .spawn(move || background.run())
            .map_err(|error| CommError::io("starting a host communicator's thread", &error))?;
        Ok(Self { shared, passed_on })
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, LinkState> {
        self.shared.lock()
    }

    /// Waits for a change, at most until `deadline`.
    pub(super) fn wait<'a>(
        &'a self,
        state: MutexGuard<'a, LinkState>,
        deadline: Deadline,
    ) -> MutexGuard<'a, LinkState> {
        let waited = self.shared.changed.wait_timeout(state, deadline.remaining());
        waited.unwrap_or_else(PoisonError::into_inner).0
    }

    /// Wakes all that wait, after a change that did not come from the hub.
    pub(super) fn notify(&self) {
        self.shared.changed.notify_all();
    }

    /// Sends a message. Never blocks: what the socket does not take is left to the background thread.
    pub(super) fn post(
        &self,
        state: &mut LinkState,
        message: &ToHub,
        body: &[u8],
        fds: Option<Arc<[OwnedFd]>>,
    ) {
        self.shared.post(state, message, body, fds);
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        let mut state = self.lock();
        self.shared.post(&mut state, &ToHub::Bye, &[], None);
        state.closing = Some(Instant::now() + LINGER);
        let hub_gone = state.hub_gone;
        drop(state);
        self.shared.wake();
        // The process may exit right after this, and the hub's thread with it. It is a thread of this process that
        // never blocks, so this is a hand-over and not a wait for another rank.
        if let Some(passed_on) = &self.passed_on
            && !hub_gone
        {
            passed_on.wait(FAREWELL);
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, LinkState> {
        // The state is consistent between statements, so a panic elsewhere does not spoil it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn post(&self, state: &mut LinkState, message: &ToHub, body: &[u8], fds: Option<Arc<[OwnedFd]>>) {
        if state.hub_gone {
            return;
        }
        let Ok(head) = encode_head(message, body.len()) else {
            tracing::error!("a message to the hub was too long to send");
            return;
        };
        state.out.push(head, fds);
        state.out.push(body_segment(body), None);
        // A failed write shows as a closed connection to the background thread.
        let _ = state.out.flush(self.fd.as_fd());
        if !state.out.is_empty() {
            self.wake();
        }
    }

    fn wake(&self) {
        // A full counter wakes the thread as well.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    fn run(&self) {
        let mut receiver = Receiver::default();
        loop {
            let (has_output, closing) = {
                let state = self.lock();
                (!state.out.is_empty(), state.closing)
            };
            let left = closing.map(|end| end.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero() || !has_output) {
                break;
            }
            let out = if has_output { PollFlags::OUT } else { PollFlags::empty() };
            let mut fds =
                [PollFd::new(&self.fd, PollFlags::IN | out), PollFd::new(&self.wake, PollFlags::IN)];
            if rustix::event::poll(&mut fds, left.map(timespec).as_ref()).is_err() {
                continue;
            }
            let (events, woken) = (fds[0].revents(), !fds[1].revents().is_empty());
            if woken {
                let _ = rustix::io::read(&self.wake, &mut [0_u8; 8]);
            }
            if events.contains(PollFlags::OUT) {
                let _ = self.lock().out.flush(self.fd.as_fd());
            }
            if events.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR) {
                let result = receiver.fill(self.fd.as_fd());
                let understood = self.deliver(&mut receiver);
                if result.is_err() || !understood {
                    break;
                }
            }
        }
        let mut state = self.lock();
        state.hub_gone = true;
        drop(state);
        self.changed.notify_all();
        // The hub sees the end of the stream now, and not when the last handle is gone.
        let _ = rustix::net::shutdown(&self.fd, rustix::net::Shutdown::Both);
    }

    /// Hands the frames that have arrived to those they concern; false when one makes no sense.
    fn deliver(&self, receiver: &mut Receiver) -> bool {
        if receiver.frames.is_empty() {
            return true;
        }
        let mut state = self.lock();
        let mut understood = true;
        while let Some(frame) = receiver.frames.pop_front() {
            understood = decode_head::<FromHub>(frame.head())
                .is_some_and(|message| self.handle(&mut state, message, frame, receiver));
            if !understood {
                break;
            }
        }
        drop(state);
        self.changed.notify_all();
        understood
    }

    fn handle(&self, state: &mut LinkState, message: FromHub, frame: Frame, receiver: &mut Receiver) -> bool {
        match message {
            FromHub::Formed => state.formed = Some(Ok(())),
            FromHub::Unformed { missing } => state.formed = Some(Err(missing)),
            FromHub::HubLeft => state.hub_left = true,
            FromHub::Descriptors { .. } => {}
            FromHub::Noticed { group, failure } => {
                if let Some(group) = state.groups.get_mut(&group) {
                    group.noticed.get_or_insert(failure);
                }
            }
            FromHub::Missing { group, seq, ranks } => {
                if let Some(group) = state.groups.get_mut(&group)
                    && group.waiting == Some(seq)
                {
                    group.missing = Some(ranks);
                }
            }
            FromHub::RoundFailed { group, seq, failure } => {
                answer(state, group, seq, Answer::Failed(failure));
            }
            FromHub::Split { group, seq, child } => {
                let id = child.as_ref().map(|child| child.group);
                if answer(state, group, seq, Answer::Split(child)) {
                    // From now on, not from when the caller wakes: the child's own messages may follow at once.
                    state.groups.extend(id.map(|id| (id, GroupState::default())));
                } else if let Some(id) = id {
                    // The caller has given up: nobody will hold this handle.
                    self.post(state, &ToHub::Leave { group: id, died: false }, &[], None);
                }
            }
            FromHub::Complete { group, seq, lengths, fds } => {
                let total = lengths.iter().try_fold(0_u64, |sum, len| sum.checked_add(*len));
                if total != Some(frame.body().len() as u64) {
                    return false;
                }
                // All are taken, whichever were lost: the next answer's come right behind them.
                let taken: Vec<_> = fds.iter().map(|&count| receiver.take_fds(count as usize)).collect();
                let outcome = match taken.into_iter().collect() {
                    Ok(fds) => Answer::Complete { frame, lengths, fds },
                    Err(WireError::LostDescriptors) => Answer::LostDescriptors,
                    Err(_) => return false,
                };
                answer(state, group, seq, outcome);
            }
        }
        true
    }
}

/// Gives a call its answer; false when nobody waits for it.
fn answer(state: &mut LinkState, group: u64, seq: u64, answer: Answer) -> bool {
    match state.groups.get_mut(&group) {
        Some(group) if group.waiting == Some(seq) => {
            group.answer = Some(answer);
            true
        }
        _ => false,
    }
}
