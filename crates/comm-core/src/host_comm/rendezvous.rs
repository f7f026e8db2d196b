//! How the ranks of a job meet.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::error::{CallSite, CommError, Result};
use crate::host_comm::address::RendezvousAddress;
use crate::host_comm::environment;
use crate::host_comm::handshake::{CHALLENGE_LEN, Identity, RankSide, VERDICT_LEN};
use crate::host_comm::hub::{self, HubConfig};
use crate::host_comm::link::Link;
use crate::host_comm::message::ToHub;
use crate::host_comm::passed_on::PassedOn;
use crate::host_comm::socket::SocketComm;
use crate::host_comm::token::Token;
use crate::host_comm::transport::{self, DialError, ExchangeError, Listener};
use crate::host_comm::{Deadline, check_size};
use crate::op::OpKind;

/// How long whatever listens at the address has to prove that it is this job's rank 0: what is to be known within a second,
/// less what a busy machine takes to run this rank.
const HANDSHAKE_LIMIT: Duration = Duration::from_millis(800);
/// How long the hub has to answer a rank whose deadline has passed.
const HUB_PATIENCE: Duration = Duration::from_millis(300);
const FIRST_PAUSE: Duration = Duration::from_millis(2);
const LONGEST_PAUSE: Duration = Duration::from_millis(50);

/// What a rank needs to meet the others. All ranks pass the same, but for `rank`.
///
/// The ranks prove to each other that they know the token, which itself never crosses the network. What they say after
/// that crosses a TCP connection in the clear and unsigned: whoever can read or alter the traffic between the hosts can
/// read or alter it. Use a network that only the job's hosts are on. A unix socket is closed to other users altogether.
#[derive(Clone, Debug)]
pub struct Rendezvous {
    /// Where rank 0 listens.
    pub address: RendezvousAddress,
    /// This rank, below `size`.
    pub rank: usize,
    /// The number of ranks, at most 65536.
    pub size: usize,
    /// The job's id: jobs that differ in it never mix, even where they share an address and a token.
    pub job: String,
    /// The job's secret.
    pub token: Token,
    /// How long the ranks wait for each other here; later also the communicator's
    /// [`timeout`](crate::HostComm::timeout).
    pub timeout: Duration,
}

impl Rendezvous {
    /// Reads the environment, as torchrun or a launcher of one's own sets it:
    ///
    /// | variable | meaning |
    /// |---|---|
    /// | `RANK`, `WORLD_SIZE` | this rank and the number of ranks |
    /// | `COMM_RENDEZVOUS` | the address, `unix:/path` or `tcp:host:port` |
    /// | `MASTER_ADDR`, `MASTER_PORT` | used where `COMM_RENDEZVOUS` is not set; see below |
    /// | `COMM_PORT` | the TCP port to use with `MASTER_ADDR` |
    /// | `COMM_TOKEN_FILE`, `COMM_TOKEN` | the token: a file of mode 0600, or 64 hexadecimal digits |
    /// | `COMM_JOB_ID`, else `TORCHELASTIC_RUN_ID` | the job's id; `default` where neither is set |
    /// | `COMM_TIMEOUT_SECS` | the timeout in seconds, 60 where not set |
    ///
    /// torchrun's own store listens at `MASTER_PORT`, so the ranks never do. Where all ranks run on this host
    /// (`LOCAL_WORLD_SIZE` equals `WORLD_SIZE`; where it is not set, `MASTER_ADDR` is `localhost` or a loopback address)
    /// and `COMM_PORT` is not set, they meet at a unix socket in a directory of this user's alone; its name is made of the
    /// job's id, `MASTER_ADDR` and `MASTER_PORT`. Otherwise they meet over TCP at `MASTER_ADDR` and `COMM_PORT`, by
    /// default the port after `MASTER_PORT` (the one before it for 65535).
    ///
    /// Where no token is given and all ranks run on this host, rank 0 makes one and leaves it to the others in a file
    /// of mode 0600 in the same directory until all have arrived; they wait for it up to the timeout. The directory is
    /// `$XDG_RUNTIME_DIR/comm`, else `comm-<uid>` in the system's directory for temporary files.
    ///
    /// # Errors
    /// [`CommError::InvalidArgument`] names the variable that is missing or wrong; [`CommError::Timeout`] when rank 0
    /// has left no token in time; [`CommError::Io`] when files cannot be read or made.
    pub fn from_env() -> Result<Self> {
        environment::rendezvous(&|name| std::env::var(name).ok())
    }

    /// Meets the other ranks. Succeeds on all ranks or fails on all that arrived.
    ///
    /// # Errors
    /// - [`CommError::Timeout`] names the ranks that did not arrive;
    /// - [`CommError::AddrInUse`] on rank 0 and [`CommError::BadHandshake`] on the others, within a second, when the
    ///   address belongs to another program or job;
    /// - [`CommError::BadHandshake`] when this rank is not what rank 0 expects: another token, job, world size, or a
    ///   rank that is taken;
    /// - [`CommError::InvalidArgument`], for a host name that is not known by the deadline too, and [`CommError::Io`].
    ///
    /// The system's resolver is asked for a host name within the call and has timeouts of its own; an address in numbers
    /// avoids it.
    pub fn connect(&self) -> Result<SocketComm> {
        check_size(self.size)?;
        if self.rank >= self.size {
            let reason = format!("rank {} is not below the world size {}", self.rank, self.size);
            return Err(CommError::invalid("rank", reason));
        }
        if matches!(self.address, RendezvousAddress::Tcp { port: 0, .. }) {
            // The system would pick a port that no other rank knows.
            return Err(CommError::invalid("rendezvous address", "a port is from 1 to 65535"));
        }
        let deadline = Deadline::after(self.timeout);
        let link =
            if self.rank == 0 { self.host(deadline)? } else { Link::start(self.join(deadline)?, None)? };
        self.wait_until_formed(&link, deadline)?;
        let passes_fds = matches!(self.address, RendezvousAddress::Unix(_));
        Ok(SocketComm::world(link, self.rank, self.size, self.timeout, passes_fds))
    }

    fn identity(&self) -> Identity {
        Identity { token: self.token.clone(), size: self.size, job: self.job.clone() }
    }

    /// Rank 0: starts the hub and connects to it within the process.
    fn host(&self, deadline: Deadline) -> Result<Link> {
        let listener = if self.size > 1 { Some(Listener::bind(&self.address)?) } else { None };
        let io = |error: std::io::Error| CommError::io("connecting to the rendezvous hub", &error);
        let (own, hub_end) = std::os::unix::net::UnixStream::pair().map_err(io)?;
        own.set_nonblocking(true).map_err(io)?;
        hub_end.set_nonblocking(true).map_err(io)?;
        let passed_on = Arc::new(PassedOn::default());
        hub::start(HubConfig {
            identity: self.identity(),
            listener,
            own: hub_end.into(),
            deadline,
            remove_after: self.token_file(),
            passed_on: passed_on.clone(),
        })?;
        Link::start(own.into(), Some(passed_on))
    }

    /// The file in which rank 0 left its token to the others, if [`from_env`](Self::from_env) made one.
    fn token_file(&self) -> Option<PathBuf> {
        environment::own_token_file(&self.address, &self.job, &self.token)
    }

    /// Another rank: connects and proves itself, as often as it takes until rank 0 listens.
    fn join(&self, deadline: Deadline) -> Result<OwnedFd> {
        let identity = self.identity();
        let mut pause = FIRST_PAUSE;
        // Since when something has been listening that has not yet proved to be this job's rank 0.
        let mut contact: Option<Instant> = None;
        let bad = |reason: String| CommError::BadHandshake { peer: self.address.to_string(), reason };
        loop {
            let mut unresolved = None;
            let limit = deadline.remaining().min(HANDSHAKE_LIMIT);
            match transport::dial(&self.address, limit) {
                Ok(fd) => {
                    let since = *contact.get_or_insert_with(Instant::now);
                    let until = (since + HANDSHAKE_LIMIT).min(deadline.instant());
                    match self.shake_hands(&fd, &identity, until) {
                        Ok(()) => return Ok(fd),
                        Err(Refusal::Final(error)) => return Err(error),
                        Err(Refusal::Cut { authentic: true }) => contact = None,
                        Err(Refusal::Cut { authentic: false }) if Instant::now() < until => {}
                        Err(Refusal::Cut { authentic: false }) => {
                            return Err(bad(
                                "what listens there does not answer as rank 0 of this job would; another program \
                                 may hold the address"
                                    .into(),
                            ));
                        }
                    }
                }
                Err(DialError::NotYet) => contact = None,
                Err(DialError::Unresolved(error)) => (contact, unresolved) = (None, Some(error)),
                Err(DialError::Hopeless(error)) => return Err(error),
            }
            if deadline.has_passed() {
                return Err(unresolved.unwrap_or_else(|| self.timed_out(vec![0], deadline)));
            }
            std::thread::sleep(pause.min(deadline.remaining()));
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    fn shake_hands(
        &self,
        fd: &OwnedFd,
        identity: &Identity,
        until: Instant,
    ) -> std::result::Result<(), Refusal> {
        let bad = |reason| Refusal::Final(CommError::BadHandshake { peer: self.address.to_string(), reason });
        let cut = |authentic| move |_: ExchangeError| Refusal::Cut { authentic };
        let mut side = RankSide::new(identity, self.rank).map_err(Refusal::Final)?;
        transport::write_all(fd, side.hello(), until).map_err(cut(false))?;
        let mut challenge = [0; CHALLENGE_LEN];
        transport::read_exact(fd, &mut challenge, until).map_err(cut(false))?;
        let proof = side.prove(&challenge).map_err(bad)?;
        transport::write_all(fd, &proof, until).map_err(cut(true))?;
        let mut verdict = [0; VERDICT_LEN];
        transport::read_exact(fd, &mut verdict, until).map_err(cut(true))?;
        side.verdict(&verdict).map_err(bad)
    }

    fn wait_until_formed(&self, link: &Link, deadline: Deadline) -> Result<()> {
        let mut state = link.lock();
        let mut patience = deadline;
        let mut asked = false;
        loop {
            match &state.formed {
                Some(Ok(())) => return Ok(()),
                Some(Err(missing)) => return Err(self.timed_out(missing.clone(), deadline)),
                None if state.hub_gone => return Err(CommError::PeerDied { at: self.site(), rank: 0 }),
                None => {}
            }
            if patience.has_passed() {
                if asked {
                    return Err(self.timed_out(vec![0], deadline));
                }
                // The hub decides, so that a job that forms at this very moment forms for all.
                link.post(&mut state, &ToHub::Withdraw, &[], None);
                asked = true;
                patience = Deadline::after(HUB_PATIENCE);
            }
            state = link.wait(state, patience);
        }
    }

    fn site(&self) -> CallSite {
        CallSite::new("world", OpKind::Rendezvous, 0)
    }

    fn timed_out(&self, missing: Vec<usize>, deadline: Deadline) -> CommError {
        CommError::Timeout { at: self.site(), missing, waited: deadline.elapsed() }
    }
}

/// Why a handshake did not end in a welcome.
enum Refusal {
    /// The other end said so, or is not of this job.
    Final(CommError),
    /// The connection ended or went silent; `authentic` when it had proved to be rank 0's by then.
    Cut { authentic: bool },
}
