//! Listening and connecting at a [`RendezvousAddress`]: non-blocking sockets, stale ones, peer checks.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType};

use crate::error::{CommError, Result};
use crate::host_comm::address::RendezvousAddress;
use crate::host_comm::private_dir::{DirLock, directory, make_private_dir_of};
use crate::host_comm::tcp::{bind_tcp, dial_tcp, resolve, tune_tcp};

/// Connections that the kernel holds until they are accepted.
const BACKLOG: i32 = 1024;
const BIND_RETRIES: usize = 10;
/// How long another rank 0 may take to bind in the same directory.
const LOCK_LIMIT: Duration = Duration::from_millis(500);

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
                let listener = bind_tcp(address, &resolve(host, *port)?)?;
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
        let until = Instant::now() + LOCK_LIMIT;
        let mut attempt = 0;
        let made_dir = loop {
            attempt += 1;
            let made_dir = make_private_dir_of(path)?;
            // Another job that made the directory may remove it until it is locked.
            let Some(_lock) = DirLock::take(address, directory(path), until)? else {
                if attempt < BIND_RETRIES {
                    continue;
                }
                return Err(io(Errno::NOENT));
            };
            match rustix::net::bind(&fd, &name) {
                Ok(()) => {}
                Err(Errno::ADDRINUSE) => {
                    remove_stale_socket(address, path)?;
                    rustix::net::bind(&fd, &name).map_err(|error| bind_error(address, &error.into()))?;
                }
                Err(error) => return Err(io(error)),
            }
            // Under the lock still: a socket that is bound and does not listen yet looks stale.
            rustix::net::listen(&fd, BACKLOG).map_err(io)?;
            break made_dir;
        };
        let meta = std::fs::symlink_metadata(path)
            .map_err(|error| CommError::io(format!("listening at {address}"), &error))?;
        let unix = UnixPlace { path: path.into(), inode: (meta.dev(), meta.ino()), made_dir };
        Ok(Self { fd, unix: Some(unix) })
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
        if let Some(dir) = &place.made_dir
            // Whoever else holds the lock is about to listen there.
            && let Ok(Some(_lock)) = DirLock::try_take(dir)
        {
            let _ = std::fs::remove_dir(dir);
        }
    }
}

/// Why a connection could not be made.
pub(super) enum DialError {
    /// Nobody listens there yet, or the queue is full: worth another try.
    NotYet,
    /// The host's name is not known, or not yet: worth another try, and if none helps this is why.
    Unresolved(CommError),
    /// Another try would not help.
    Hopeless(CommError),
}

/// Connects to `address` within `limit`; the socket is non-blocking.
pub(super) fn dial(address: &RendezvousAddress, limit: Duration) -> std::result::Result<OwnedFd, DialError> {
    match address {
        RendezvousAddress::Tcp { host, port } => {
            // A name may appear only once its host is up, as those of a cluster's pods do.
            let targets = resolve(host, *port).map_err(DialError::Unresolved)?;
            dial_tcp(&targets, Instant::now() + limit).ok_or(DialError::NotYet)
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

/// Removes the socket file that a process which is gone has left at `path`. The directory is locked.
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

pub(super) fn bind_error(address: &RendezvousAddress, error: &std::io::Error) -> CommError {
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

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(5);

    /// However many processes find a stale socket at once, one of them replaces it and the others find that one's.
    #[test]
    fn a_stale_socket_is_replaced_once() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("job").join("s.sock");
        let address = RendezvousAddress::Unix(path.clone());
        for _ in 0..30 {
            drop(make_private_dir_of(&path).unwrap());
            drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
            let start = std::sync::Barrier::new(4);
            let outcomes: Vec<Result<Listener>> = std::thread::scope(|scope| {
                let bind = || {
                    start.wait();
                    Listener::bind(&address)
                };
                let threads: Vec<_> = (0..4).map(|_| scope.spawn(bind)).collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            let bound = outcomes.iter().filter(|outcome| outcome.is_ok()).count();
            let refused =
                outcomes.iter().filter(|outcome| matches!(outcome, Err(CommError::AddrInUse { .. }))).count();
            assert_eq!((bound, refused), (1, 3));
            assert!(dial(&address, PATIENCE).is_ok(), "the one that is bound cannot be reached");
        }
    }

    #[test]
    fn a_directory_that_stays_locked_is_an_error_in_bounded_time() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("job").join("s.sock");
        make_private_dir_of(&path).unwrap();
        let lock = DirLock::try_take(directory(&path)).unwrap().unwrap();
        let address = RendezvousAddress::Unix(path);
        let start = Instant::now();
        assert!(matches!(Listener::bind(&address), Err(CommError::AddrInUse { .. })));
        assert!(start.elapsed() < PATIENCE);
        drop(lock);
        Listener::bind(&address).unwrap();
    }
}
