//! Connections whose handshake is not done: the part of the hub that strangers can reach.
//!
//! Each costs one descriptor and a fixed buffer, however much is sent. There are never more than
//! [`CONNECTIONS_LIMIT`]; beyond that the oldest is dropped, so a flood of silent connections keeps nobody out.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};

use crate::host_comm::handshake::{HubSide, Identity, Step, VERDICT_LEN, Verdict};
use crate::host_comm::transport::Listener;

/// The most unauthenticated connections at a time.
const CONNECTIONS_LIMIT: usize = 256;
/// Connections accepted before those already there are served again.
const ACCEPT_BATCH: usize = 64;
/// How long a connection has for its handshake.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(2);
/// How long to leave the listener alone after the system had no descriptors left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);

struct Newcomer {
    fd: OwnedFd,
    side: HubSide,
    opened: Instant,
    /// Has something to read.
    ready: bool,
}

// What a stranger costs besides a descriptor.
const _: () = assert!(size_of::<Newcomer>() <= 512);

/// The listener and the connections that have yet to prove themselves.
pub(super) struct Newcomers {
    listener: Listener,
    /// Oldest first.
    waiting: VecDeque<Newcomer>,
    paused_until: Option<Instant>,
}

/// A connection that has proved itself.
pub(super) struct Admitted {
    pub(super) rank: usize,
    pub(super) fd: OwnedFd,
    /// To be sent first.
    pub(super) welcome: [u8; VERDICT_LEN],
}

impl Newcomers {
    pub(super) const fn new(listener: Listener) -> Self {
        Self { listener, waiting: VecDeque::new(), paused_until: None }
    }

    /// How long until a connection's time is up or accepting goes on.
    pub(super) fn patience(&self) -> Option<Duration> {
        let now = Instant::now();
        let oldest = self.waiting.front().map(|newcomer| newcomer.opened + HANDSHAKE_LIMIT);
        let next = oldest.into_iter().chain(self.paused_until).min()?;
        Some(next.saturating_duration_since(now) + Duration::from_millis(1))
    }

    /// Adds what is to be waited for: the connections, oldest first, and then the listener.
    pub(super) fn poll_fds<'a>(&'a self, fds: &mut Vec<PollFd<'a>>) {
        fds.extend(self.waiting.iter().map(|newcomer| PollFd::new(&newcomer.fd, PollFlags::IN)));
        if self.paused_until.is_none() {
            fds.push(PollFd::from_borrowed_fd(self.listener.fd(), PollFlags::IN));
        }
    }

    /// Takes note of what the wait for [`poll_fds`](Self::poll_fds) found, in the same order.
    pub(super) fn note_events(&mut self, events: impl Iterator<Item = PollFlags>) {
        for (newcomer, events) in self.waiting.iter_mut().zip(events) {
            newcomer.ready = !events.is_empty();
        }
    }

    /// Reads what has arrived, accepts what waits, and gives the connections that have proved to be a rank which is
    /// not yet `taken`. Everyone else whose time is up or whose bytes are wrong is dropped.
    pub(super) fn serve(&mut self, identity: &Identity, mut taken: Vec<bool>) -> Vec<Admitted> {
        let mut admitted = Vec::new();
        let now = Instant::now();
        // Those already here come first: a flood must not push out a rank whose proof has arrived.
        self.advance_all(identity, &mut taken, &mut admitted);
        while self.waiting.front().is_some_and(|newcomer| now - newcomer.opened >= HANDSHAKE_LIMIT) {
            self.waiting.pop_front();
        }
        if self.paused_until.is_some_and(|until| now >= until) {
            self.paused_until = None;
        }
        if self.paused_until.is_none() {
            self.accept();
        }
        self.advance_all(identity, &mut taken, &mut admitted);
        admitted
    }

    fn accept(&mut self) {
        for _ in 0..ACCEPT_BATCH {
            match self.listener.accept() {
                Ok(Some(fd)) => {
                    if self.waiting.len() >= CONNECTIONS_LIMIT {
                        self.waiting.pop_front();
                    }
                    self.waiting.push_back(Newcomer {
                        fd,
                        side: HubSide::new(),
                        opened: Instant::now(),
                        ready: true,
                    });
                }
                Ok(None) => return,
                Err(error) => {
                    // Out of descriptors: those held by strangers go first, then accepting is left for a moment.
                    tracing::warn!(%error, "the rendezvous cannot accept connections");
                    self.waiting.pop_front();
                    self.paused_until = Some(Instant::now() + ACCEPT_PAUSE);
                    return;
                }
            }
        }
    }

    fn advance_all(&mut self, identity: &Identity, taken: &mut [bool], admitted: &mut Vec<Admitted>) {
        for mut newcomer in std::mem::take(&mut self.waiting) {
            if !std::mem::take(&mut newcomer.ready) {
                self.waiting.push_back(newcomer);
                continue;
            }
            match newcomer.advance(identity, taken) {
                Ok(None) => self.waiting.push_back(newcomer),
                Ok(Some((rank, welcome))) => {
                    taken[rank] = true;
                    admitted.push(Admitted { rank, fd: newcomer.fd, welcome });
                }
                Err(reason) => tracing::debug!(reason, "dropped a connection to the rendezvous"),
            }
        }
    }
}

impl Newcomer {
    /// Reads what has arrived. Gives the rank that it has proved to be and its welcome, or says why to drop it.
    fn advance(
        &mut self,
        identity: &Identity,
        taken: &[bool],
    ) -> std::result::Result<Option<(usize, [u8; VERDICT_LEN])>, String> {
        loop {
            let count = match rustix::net::recv(&self.fd, self.side.space(), RecvFlags::DONTWAIT) {
                Ok((0, _)) => return Err("closed before the handshake was done".into()),
                Ok((count, _)) => count,
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => return Ok(None),
                Err(error) => return Err(error.to_string()),
            };
            match self.side.advance(count, identity)? {
                Step::More => {}
                Step::Challenge(challenge) => self.send(&challenge)?,
                Step::Authentic { rank, verdict } => {
                    let free = taken.get(rank) == Some(&false);
                    let verdict =
                        if verdict == Verdict::Welcome && !free { Verdict::RankTaken } else { verdict };
                    let frame = self.side.verdict(verdict, identity).ok_or("no verdict could be made")?;
                    if verdict == Verdict::Welcome {
                        return Ok(Some((rank, frame)));
                    }
                    self.send(&frame)?;
                    return Err(format!("claimed to be rank {rank}: {}", verdict.reason()));
                }
            }
        }
    }

    /// Sends one of the handshake's short frames, which a socket takes whole unless its peer does not read.
    fn send(&self, frame: &[u8]) -> std::result::Result<(), String> {
        match rustix::net::send(&self.fd, frame, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(sent) if sent == frame.len() => Ok(()),
            Ok(_) => Err("does not read".into()),
            Err(error) => Err(error.to_string()),
        }
    }
}
