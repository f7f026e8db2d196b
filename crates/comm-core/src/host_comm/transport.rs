//! Listening and connecting at a [`RendezvousAddress`]: non-blocking sockets, private directories, peer checks.

use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType};

use crate::error::{CommError, Result};
use crate::host_comm::address::RendezvousAddress;

/// Connections that the kernel holds until they are accepted.
const BACKLOG: i32 = 1024;
const BIND_RETRIES: usize = 10;

/// A listening socket; dropping it removes a unix socket's file, and the directory if this made it.
pub(super) struct Listener {
    fd: OwnedFd,
    unix: Option<UnixPlace>,
}

struct UnixPlace {
    path: PathBuf,
    inode: (u64, u64),
    made_dir: Option<PathBuf>,
}

impl Listener {
    /// Listens at `address`.
    pub(super) fn bind(address: &RendezvousAddress) -> Result<Self> {
        match address {
            RendezvousAddress::Tcp { host, port } => {
                let target = resolve(host, *port)?;
                let listener = TcpListener::bind(target).map_err(|error| bind_error(address, &error))?;
                let io = |error: std::io::Error| CommError::io(format!("listening at {address}"), &error);
                listener.set_nonblocking(true).map_err(io)?;
                // The standard library's backlog is too short for a flood.
                rustix::net::listen(&listener, BACKLOG).map_err(|e| io(e.into()))?;
                Ok(Self { fd: listener.into(), unix: None })
            }
            RendezvousAddress::Unix(path) => Self::bind_unix(address, path),
        }
    }

    fn bind_unix(address: &RendezvousAddress, path: &Path) -> Result<Self> {
        let io = |error: Errno| CommError::io(format!("listening at {address}"), &error.into());
        let name = unix_name(path)?;
        let fd = unix_socket().map_err(io)?;
        let mut made_dir = make_private_dir_of(path)?;
        let mut bound = rustix::net::bind(&fd, &name);
        // Another job that made the directory may remove it between the two.
        for _ in 0..BIND_RETRIES {
            if bound != Err(Errno::NOENT) {
                break;
            }
            made_dir = make_private_dir_of(path)?;
            bound = rustix::net::bind(&fd, &name);
        }
        if let Err(error) = bound {
            if error != Errno::ADDRINUSE {
                return Err(io(error));
            }
            remove_stale_socket(address, path)?;
            rustix::net::bind(&fd, &name).map_err(|error| bind_error(address, &error.into()))?;
        }
        let meta = std::fs::symlink_metadata(path)
            .map_err(|error| CommError::io(format!("listening at {address}"), &error))?;
        let unix = UnixPlace { path: path.into(), inode: (meta.dev(), meta.ino()), made_dir };
        let listener = Self { fd, unix: Some(unix) };
        rustix::net::listen(&listener.fd, BACKLOG).map_err(io)?;
        Ok(listener)
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// The next connection, non-blocking, or `None` when there is none. A connection of another user's is dropped.
    pub(super) fn accept(&self) -> std::result::Result<Option<OwnedFd>, Errno> {
        loop {
            match rustix::net::accept_with(&self.fd, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
                Ok(fd) if self.unix.is_some() && !is_same_user(&fd) => {
                    tracing::warn!("dropped a connection of another user to the rendezvous socket");
                }
                Ok(fd) => {
                    if self.unix.is_none() {
                        tune_tcp(&fd);
                    }
                    return Ok(Some(fd));
                }
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(Errno::AGAIN) => return Ok(None),
                Err(error) => return Err(error),
            }
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let Some(place) = &self.unix else { return };
        // Another job may have put its own socket there; only this one's is this one's to remove.
        let ours = std::fs::symlink_metadata(&place.path).is_ok_and(|m| (m.dev(), m.ino()) == place.inode);
        if ours {
            let _ = std::fs::remove_file(&place.path);
        }
        if let Some(dir) = &place.made_dir {
            let _ = std::fs::remove_dir(dir);
        }
    }
}

/// Why a connection could not be made.
pub(super) enum DialError {
    /// Nobody listens there yet, or the queue is full: worth another try.
    NotYet,
    /// Another try would not help.
    Hopeless(CommError),
}

/// Connects to `address` within `limit`; the socket is non-blocking.
pub(super) fn dial(address: &RendezvousAddress, limit: Duration) -> std::result::Result<OwnedFd, DialError> {
    match address {
        RendezvousAddress::Tcp { host, port } => {
            let target = resolve(host, *port).map_err(DialError::Hopeless)?;
            let stream = TcpStream::connect_timeout(&target, limit.max(Duration::from_millis(1)))
                .map_err(|_| DialError::NotYet)?;
            stream.set_nonblocking(true).map_err(|_| DialError::NotYet)?;
            // A connection to a free port of this host can meet itself when the kernel picks that very port.
            if stream.local_addr().ok() == stream.peer_addr().ok() {
                return Err(DialError::NotYet);
            }
            let fd = OwnedFd::from(stream);
            tune_tcp(&fd);
            Ok(fd)
        }
        RendezvousAddress::Unix(path) => {
            let name = unix_name(path).map_err(DialError::Hopeless)?;
            let fd = unix_socket().map_err(|_| DialError::NotYet)?;
            match rustix::net::connect(&fd, &name) {
                Ok(()) if is_same_user(&fd) => Ok(fd),
                Ok(()) => Err(DialError::Hopeless(CommError::BadHandshake {
                    peer: address.to_string(),
                    reason: "the socket belongs to another user's process".into(),
                })),
                Err(Errno::ACCESS | Errno::PERM) => Err(DialError::Hopeless(CommError::invalid(
                    "rendezvous address",
                    format!("{address}: this user may not connect there"),
                ))),
                Err(_) => Err(DialError::NotYet),
            }
        }
    }
}

/// Why an exchange on a socket ended early.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum ExchangeError {
    Closed,
    TimedOut,
}

/// Fills `buffer` from a non-blocking socket.
pub(super) fn read_exact(
    fd: &OwnedFd,
    buffer: &mut [u8],
    until: Instant,
) -> std::result::Result<(), ExchangeError> {
    let mut filled = 0;
    while filled < buffer.len() {
        match rustix::net::recv(fd, &mut buffer[filled..], RecvFlags::DONTWAIT) {
            Ok((0, _)) => return Err(ExchangeError::Closed),
            Ok((count, _)) => filled += count,
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => wait_for(fd, PollFlags::IN, until)?,
            Err(_) => return Err(ExchangeError::Closed),
        }
    }
    Ok(())
}

/// Sends all of `bytes` on a non-blocking socket.
pub(super) fn write_all(
    fd: &OwnedFd,
    mut bytes: &[u8],
    until: Instant,
) -> std::result::Result<(), ExchangeError> {
    while !bytes.is_empty() {
        match rustix::net::send(fd, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(count) => bytes = &bytes[count..],
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => wait_for(fd, PollFlags::OUT, until)?,
            Err(_) => return Err(ExchangeError::Closed),
        }
    }
    Ok(())
}

fn wait_for(fd: &OwnedFd, flags: PollFlags, until: Instant) -> std::result::Result<(), ExchangeError> {
    let left = until.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(ExchangeError::TimedOut);
    }
    // An interrupted or early return is no error: the caller tries again.
    let _ = rustix::event::poll(&mut [PollFd::new(fd, flags)], Some(&timespec(left)));
    Ok(())
}

/// A duration as the kernel takes it.
pub(super) fn timespec(duration: Duration) -> Timespec {
    Timespec::try_from(duration).unwrap_or(Timespec { tv_sec: i64::from(i32::MAX), tv_nsec: 0 })
}

/// Fails unless `dir` is a directory of this user's that is closed to all others.
pub(super) fn check_private_dir(dir: &Path) -> Result<()> {
    let refuse = |reason: String| {
        Err(CommError::invalid("rendezvous directory", format!("{}: {reason}", dir.display())))
    };
    let meta = std::fs::symlink_metadata(dir)
        .map_err(|error| CommError::io(format!("looking at {}", dir.display()), &error))?;
    if !meta.is_dir() {
        return refuse("it is not a directory".into());
    }
    if meta.uid() != rustix::process::geteuid().as_raw() {
        return refuse(format!("it belongs to user {}, not to this process's user", meta.uid()));
    }
    if meta.mode() & 0o077 != 0 {
        return refuse(format!(
            "its mode {:o} lets others in; chmod 700 it or name another",
            meta.mode() & 0o777
        ));
    }
    Ok(())
}

/// Makes the directory of `path`, mode 0700, where it is missing, and checks it. Returns it if this made it.
fn make_private_dir_of(path: &Path) -> Result<Option<PathBuf>> {
    let dir = path.parent().unwrap_or(Path::new("/"));
    let made = match std::fs::DirBuilder::new().mode(0o700).create(dir) {
        Ok(()) => Some(dir.to_path_buf()),
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => None,
        Err(error) => return Err(CommError::io(format!("making {}", dir.display()), &error)),
    };
    check_private_dir(dir)?;
    Ok(made)
}

/// Removes the socket file that a process which is gone has left at `path`.
fn remove_stale_socket(address: &RendezvousAddress, path: &Path) -> Result<()> {
    use std::os::unix::fs::FileTypeExt;
    let in_use = |reason: &str| CommError::AddrInUse { addr: address.to_string(), reason: reason.into() };
    let io = |error: std::io::Error| CommError::io(format!("listening at {address}"), &error);
    if !std::fs::symlink_metadata(path).map_err(io)?.file_type().is_socket() {
        return Err(in_use("there is a file that is not a socket"));
    }
    let probe = unix_socket().map_err(|e| io(e.into()))?;
    match rustix::net::connect(&probe, &unix_name(path)?) {
        Err(Errno::CONNREFUSED) => std::fs::remove_file(path).map_err(io),
        _ => Err(in_use("another process listens on this socket")),
    }
}

fn bind_error(address: &RendezvousAddress, error: &std::io::Error) -> CommError {
    match error.kind() {
        std::io::ErrorKind::AddrInUse => CommError::AddrInUse {
            addr: address.to_string(),
            reason: "another program listens there; choose another port".into(),
        },
        std::io::ErrorKind::AddrNotAvailable => CommError::invalid(
            "rendezvous address",
            format!("{address} is not an address of this host, where rank 0 runs"),
        ),
        _ => CommError::io(format!("listening at {address}"), error),
    }
}

/// The first address that `host` stands for.
pub(super) fn resolve(host: &str, port: u16) -> Result<SocketAddr> {
    let wrong = |reason: String| CommError::invalid("rendezvous address", format!("host {host:?}: {reason}"));
    let mut found = (host, port).to_socket_addrs().map_err(|error| wrong(error.to_string()))?;
    found.next().ok_or_else(|| wrong("no address found".into()))
}

fn unix_socket() -> std::result::Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}

fn unix_name(path: &Path) -> Result<SocketAddrUnix> {
    SocketAddrUnix::new(path).map_err(|_| {
        CommError::invalid(
            "rendezvous address",
            format!("unix:{}: a unix socket's path has at most 107 bytes", path.display()),
        )
    })
}

fn is_same_user(fd: &OwnedFd) -> bool {
    rustix::net::sockopt::socket_peercred(fd).is_ok_and(|peer| peer.uid == rustix::process::geteuid())
}

/// Small messages leave at once, and a host that vanishes is noticed. Best effort: without them it still works.
fn tune_tcp(fd: &OwnedFd) {
    use rustix::net::sockopt;
    let _ = sockopt::set_tcp_nodelay(fd, true);
    let _ = sockopt::set_socket_keepalive(fd, true);
    let _ = sockopt::set_tcp_keepidle(fd, Duration::from_secs(1));
    let _ = sockopt::set_tcp_keepintvl(fd, Duration::from_secs(1));
    let _ = sockopt::set_tcp_keepcnt(fd, 5);
    let _ = sockopt::set_tcp_user_timeout(fd, 10_000);
}
