//! The hub: one thread in rank 0's process through which all ranks' host communication passes.
//!
//! It owns every connection's hub end and the loop that waits on them all. It never blocks on any one of them, never
//! trusts a connection before its handshake is done, and decides nothing about rounds itself: that is the book's
//! ([`Groups`]).

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};

use crate::error::{CommError, Result};
use crate::host_comm::Deadline;
use crate::host_comm::handshake::Identity;
use crate::host_comm::message::{Cause, FromHub, ToHub, decode_head, encode_head, out_of_numbers};
use crate::host_comm::newcomers::Newcomers;
use crate::host_comm::passed_on::PassedOn;
use crate::host_comm::rounds::{Groups, Part, Reply};
use crate::host_comm::transport::{Listener, timespec};
use crate::host_comm::wire::{FDS_LIMIT, Frame, OutQueue, Receiver, Segment, WireError};

/// How long the hub goes on trying to tell ranks that the rendezvous failed.
const FAREWELL: Duration = Duration::from_millis(500);

/// What a hub is started with.
pub(super) struct HubConfig {
    pub(super) identity: Identity,
    /// None where rank 0 is alone.
    pub(super) listener: Option<Listener>,
    /// The hub's end of rank 0's own connection.
    pub(super) own: OwnedFd,
    /// Until when all ranks have to arrive.
    pub(super) deadline: Deadline,
    /// Removed once the rendezvous is over, before any rank hears of it.
    pub(super) remove_after: Option<PathBuf>,
    pub(super) passed_on: Arc<PassedOn>,
}

/// Starts the hub's thread, which ends when the last rank has left.
pub(super) fn start(config: HubConfig) -> Result<()> {
    let hub = Hub::new(config);
    let spawned = std::thread::Builder::new().name("comm-hub".into()).spawn(move || hub.run());
    spawned.map(drop).map_err(|error| CommError::io("starting the rendezvous hub's thread", &error))
}

struct Connection {
    fd: OwnedFd,
    receiver: Receiver,
    out: OutQueue,
}

/// A frame ready to be queued.
struct Encoded {
    segments: Vec<Segment>,
    fds: Option<Arc<[OwnedFd]>>,
}

/// Rank 0's answer to a round, which waits until the other ranks' answers to it have left this process.
struct Held {
    group: u64,
    seq: u64,
    /// The descriptors that the answer brings come first, and nothing may come in between.
    frames: Vec<Encoded>,
    /// Ranks, and how much of their queues has to be written.
    after: Vec<(usize, u64)>,
}

struct Hub {
    identity: Identity,
    newcomers: Option<Newcomers>,
    ranks: Vec<Option<Connection>>,
    /// Ranks that came to the rendezvous and gave up.
    withdrawn: Vec<bool>,
    groups: Groups,
    deadline: Deadline,
    formed: bool,
    ending: Option<Instant>,
    remove_after: Option<PathBuf>,
    held: Vec<Held>,
    passed_on: Arc<PassedOn>,
    /// Rank 0 has said its last; once this is sent, `passed_on` is set.
    own_left: bool,
}

impl Drop for Hub {
    fn drop(&mut self) {
        self.passed_on.set();
    }
}

impl Hub {
    fn new(config: HubConfig) -> Self {
        let size = config.identity.size;
        let mut ranks: Vec<Option<Connection>> = (0..size).map(|_| None).collect();
        ranks[0] = Some(Connection::new(config.own));
        Self {
            identity: config.identity,
            newcomers: config.listener.map(Newcomers::new),
            ranks,
            withdrawn: vec![false; size],
            groups: Groups::new(size),
            deadline: config.deadline,
            formed: false,
            ending: None,
            remove_after: config.remove_after,
            held: Vec::new(),
            passed_on: config.passed_on,
            own_left: false,
        }
    }

    fn run(mut self) {
        loop {
            if !self.formed {
                self.try_to_form();
            }
            self.release_held();
            if self.is_over() {
                return;
            }
            let readable = self.wait();
            for rank in readable {
                self.receive(rank);
            }
            self.admit();
        }
    }

    fn admit(&mut self) {
        let Some(newcomers) = &mut self.newcomers else { return };
        let taken = self.ranks.iter().map(Option::is_some).collect();
        for newcomer in newcomers.serve(&self.identity, taken) {
            let mut connection = Connection::new(newcomer.fd);
            let segments = vec![Segment::Bytes(Arc::from(newcomer.welcome))];
            connection.queue(Encoded { segments, fds: None });
            self.ranks[newcomer.rank] = Some(connection);
        }
    }

    fn try_to_form(&mut self) {
        let message = if self.ranks.iter().all(Option::is_some) {
            self.formed = true;
            FromHub::Formed
        } else if self.deadline.has_passed() && self.ending.is_none() {
            self.ending = Some(Instant::now() + FAREWELL);
            FromHub::Unformed { missing: self.missing_at_rendezvous() }
        } else {
            return;
        };
        // From here on the address is free for another job, so that no rank can be told and still meet this listener.
        self.newcomers = None;
        if let Some(path) = self.remove_after.take() {
            let _ = std::fs::remove_file(path);
        }
        for rank in (0..self.ranks.len()).rev() {
            self.send(Reply::plain(rank, message.clone()));
        }
    }

    /// The ranks that never came, else those that came and gave up.
    fn missing_at_rendezvous(&self) -> Vec<usize> {
        let absent = || (0..self.ranks.len()).filter(|&rank| self.ranks[rank].is_none());
        let never: Vec<usize> = absent().filter(|&rank| !self.withdrawn[rank]).collect();
        if never.is_empty() { absent().collect() } else { never }
    }

    fn is_over(&self) -> bool {
        let mut connections = self.ranks.iter().flatten();
        match self.ending {
            Some(end) => Instant::now() >= end || connections.all(|c| c.out.is_empty()),
            None => connections.next().is_none(),
        }
    }

    /// Waits until something can be done, and returns the ranks whose connections can be read.
    fn wait(&mut self) -> Vec<usize> {
        let limit = if let Some(end) = self.ending {
            Some(end.saturating_duration_since(Instant::now()))
        } else if self.formed {
            None
        } else {
            let own = self.deadline.remaining();
            Some(self.newcomers.as_ref().and_then(Newcomers::patience).map_or(own, |p| p.min(own)))
        };
        let mut fds = Vec::new();
        let mut owners = Vec::new();
        for (rank, connection) in self.ranks.iter().enumerate() {
            if let Some(connection) = connection {
                let out = if connection.out.is_empty() { PollFlags::empty() } else { PollFlags::OUT };
                fds.push(PollFd::new(&connection.fd, PollFlags::IN | out));
                owners.push(rank);
            }
        }
        if let Some(newcomers) = &self.newcomers {
            newcomers.poll_fds(&mut fds);
        }
        // An error (an interruption) shows no events; the next turn tries again.
        if rustix::event::poll(&mut fds, limit.map(timespec).as_ref()).is_err() {
            return Vec::new();
        }
        let events: Vec<PollFlags> = fds.iter().map(PollFd::revents).collect();
        let (of_ranks, of_newcomers) = events.split_at(owners.len());
        if let Some(newcomers) = &mut self.newcomers {
            newcomers.note_events(of_newcomers.iter().copied());
        }
        let mut readable = Vec::new();
        for (rank, events) in owners.into_iter().zip(of_ranks.iter().copied()) {
            if events.contains(PollFlags::OUT)
                && let Some(connection) = &mut self.ranks[rank]
            {
                // What cannot be written will show as a closed connection when it is read.
                let _ = connection.out.flush(connection.fd.as_fd());
            }
            if events.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR) {
                readable.push(rank);
            }
        }
        readable
    }

    fn receive(&mut self, rank: usize) {
        let Some(connection) = &mut self.ranks[rank] else { return };
        let mut lost = connection.receiver.fill(connection.fd.as_fd()).err();
        // What came before the end of the stream still counts: a report may be a dying rank's last word.
        while let Some(connection) = &mut self.ranks[rank]
            && let Some(frame) = connection.receiver.frames.pop_front()
        {
            if !self.handle(rank, frame) {
                lost = Some(WireError::Nonsense);
                break;
            }
        }
        if let Some(error) = lost
            && self.ranks[rank].take().is_some()
        {
            tracing::debug!(rank, ?error, "a rank's connection to the hub ended");
            self.disconnected(rank);
        }
    }

    fn disconnected(&mut self, rank: usize) {
        if self.formed {
            let mut replies = Vec::new();
            self.groups.disconnect(rank, &mut replies);
            self.send_all(replies);
        } else if rank == 0 {
            // Without rank 0 there will be no job; the others are told so in the next turn.
            self.deadline = Deadline::after(Duration::ZERO);
        }
    }

    /// Acts on a rank's message; false when it makes no sense, and the connection is to be closed.
    fn handle(&mut self, from: usize, frame: Frame) -> bool {
        let Some(message) = decode_head::<ToHub>(frame.head()) else { return false };
        let mut replies = Vec::new();
        match message {
            ToHub::Withdraw if !self.formed && from == 0 => self.deadline = Deadline::after(Duration::ZERO),
            ToHub::Withdraw if !self.formed => {
                // The rank leaves; it may come again, and the others learn by their own deadlines who never came.
                let missing = self.missing_at_rendezvous();
                self.send(Reply::plain(from, FromHub::Unformed { missing }));
                self.withdrawn[from] = true;
                self.ranks[from] = None;
            }
            // It crossed with the news that the job has formed.
            ToHub::Withdraw => {}
            _ if !self.formed => return false,
            ToHub::Contribute { group, seq, call, color, key, fds } => {
                let Some(connection) = &mut self.ranks[from] else { return true };
                if fds as usize > FDS_LIMIT {
                    return false;
                }
                let fds: Arc<[OwnedFd]> = match connection.receiver.take_fds(fds as usize) {
                    Ok(fds) => fds.into(),
                    Err(WireError::LostDescriptors) => {
                        // They were lost in this process, so it is rank 0 that failed, where that is a member.
                        let culprit = self.groups.rank_in(group, 0).map_or(from, |_| 0);
                        let context = "receiving descriptors in rank 0's process, which passes them on";
                        self.groups.fail(culprit, group, Cause::new(&out_of_numbers(context)), &mut replies);
                        Arc::default()
                    }
                    Err(_) => return false,
                };
                let part = Part { frame: Arc::new(frame), fds, color, key };
                self.groups.contribute(from, (group, seq), call, part, &mut replies);
            }
            ToHub::WhoIsMissing { group, seq } => {
                // What has been written since goes before the news that nobody is missing.
                self.release_held();
                let mut ranks = self.groups.missing(group, seq);
                if from == 0
                    && let Some(held) = self.held.iter().find(|held| (held.group, held.seq) == (group, seq))
                {
                    let unread = held.after.iter().filter(|(rank, mark)| !self.has_written(*rank, *mark));
                    ranks.extend(unread.filter_map(|&(rank, _)| self.groups.rank_in(group, rank)));
                }
                replies.push(Reply::plain(from, FromHub::Missing { group, seq, ranks }));
            }
            ToHub::Fail { group, cause } => {
                tracing::debug!(rank = from, group, cause = %cause.error(), "a rank reported a failure");
                self.groups.fail(from, group, cause, &mut replies);
            }
            ToHub::GiveUp { group, cause } => self.groups.give_up(from, group, cause, &mut replies),
            ToHub::Leave { group, died } => {
                tracing::debug!(rank = from, group, died, "a rank left a group");
                self.groups.leave(from, group, died, &mut replies);
            }
            ToHub::Bye if from == 0 => {
                self.own_left = true;
                replies.extend((1..self.ranks.len()).map(|rank| Reply::plain(rank, FromHub::HubLeft)));
            }
            ToHub::Bye => {}
        }
        self.send_all(replies);
        if self.own_left {
            self.passed_on.set();
        }
        true
    }

    /// Sends the replies to one message, which ends one round at most.
    fn send_all(&mut self, replies: Vec<Reply>) {
        let mut answered = None;
        let mut frames = Vec::new();
        let mut after: Vec<(usize, u64)> = Vec::new();
        for reply in replies {
            let is_answer = match &reply.message {
                FromHub::Complete { group, seq, .. } | FromHub::Split { group, seq, .. } => {
                    answered = Some((*group, *seq));
                    true
                }
                FromHub::Descriptors { .. } => true,
                _ => false,
            };
            if is_answer && reply.to == 0 {
                frames.extend(self.encode(&reply));
                continue;
            }
            let to = reply.to;
            self.send(reply);
            if let Some(connection) = self.ranks[to].as_ref().filter(|c| to != 0 && !c.out.is_empty()) {
                after.retain(|&(known, _)| known != to);
                after.push((to, connection.out.progress().0));
            }
        }
        if let Some((group, seq)) = answered.filter(|_| !frames.is_empty()) {
            self.held.push(Held { group, seq, frames, after });
        }
        self.release_held();
    }

    fn has_written(&self, rank: usize, mark: u64) -> bool {
        self.ranks[rank].as_ref().is_none_or(|connection| connection.out.progress().1 >= mark)
    }

    /// Sends rank 0 the answers that wait for nothing any more: its process may exit once it has them. One round's
    /// never waits for another's, so a rank that does not read holds up the rounds that it takes part in and no others.
    fn release_held(&mut self) {
        for held in std::mem::take(&mut self.held) {
            if !held.after.iter().all(|&(rank, mark)| self.has_written(rank, mark)) {
                self.held.push(held);
            } else if let Some(connection) = &mut self.ranks[0] {
                held.frames.into_iter().for_each(|frame| connection.queue(frame));
            }
        }
    }

    fn encode(&self, reply: &Reply) -> Option<Encoded> {
        let body_len = reply.bodies.iter().map(|frame| frame.body().len()).sum();
        match encode_head(&reply.message, body_len) {
            Ok(head) => {
                let bodies = reply.bodies.iter().map(|frame| Segment::Body(frame.clone()));
                let segments = std::iter::once(head).chain(bodies).collect();
                Some(Encoded { segments, fds: reply.fds.clone() })
            }
            Err(error) => {
                tracing::error!(rank = reply.to, ?error, "an answer was too long to send");
                None
            }
        }
    }

    fn send(&mut self, reply: Reply) {
        let frame = self.encode(&reply);
        if let (Some(frame), Some(connection)) = (frame, &mut self.ranks[reply.to]) {
            connection.queue(frame);
        }
    }
}

impl Connection {
    fn new(fd: OwnedFd) -> Self {
        Self { fd, receiver: Receiver::default(), out: OutQueue::default() }
    }

    fn queue(&mut self, mut frame: Encoded) {
        for segment in frame.segments {
            self.out.push(segment, frame.fds.take());
        }
        // What cannot be written now goes out when the socket takes it; a lost connection shows when it is read.
        let _ = self.out.flush(self.fd.as_fd());
    }
}
