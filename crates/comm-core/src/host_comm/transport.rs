//! Listening and connecting at a [`RendezvousAddress`]: non-blocking sockets, private directories, peer checks.

use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType};

use crate::error::{CommError, Result};
use crate::host_comm::address::RendezvousAddress;

/// Connections that the kernel holds until they are accepted.
const BACKLOG: i32 = 1024;
const BIND_RETRIES: usize = 10;
/// How long another rank 0 may take to bind in the same directory.
const LOCK_LIMIT: Duration = Duration::from_millis(500);
const LOCK_POLL: Duration = Duration::from_millis(2);

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

/// Connects to the first of `targets` that answers.
fn dial_tcp(targets: &[SocketAddr], until: Instant) -> Option<OwnedFd> {
    for (index, target) in targets.iter().enumerate() {
        // One that is silent leaves the others their share of the time.
        let left = until.saturating_duration_since(Instant::now()) / (targets.len() - index) as u32;
        let Ok(stream) = TcpStream::connect_timeout(target, left.max(Duration::from_millis(1))) else {
            continue;
        };
        // A connection to a free port of this host can meet itself when the kernel picks that very port.
        if stream.set_nonblocking(true).is_err() || stream.local_addr().ok() == stream.peer_addr().ok() {
            continue;
        }
        let fd = OwnedFd::from(stream);
        tune_tcp(&fd);
        return Some(fd);
    }
    None
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

/// The lock that those hold who bind, replace or remove what is in a rendezvous directory. It is on the directory itself,
/// so that nothing has to be left there, and ends with the process at the latest.
struct DirLock {
    dir: OwnedFd,
}

impl DirLock {
    /// Locks `dir`, or `None` when it is not there any more.
    fn take(address: &RendezvousAddress, dir: &Path, until: Instant) -> Result<Option<Self>> {
        loop {
            match Self::try_take(dir) {
                Ok(Some(lock)) => return Ok(lock.is_of(dir).then_some(lock)),
                Err(Errno::NOENT) => return Ok(None),
                Ok(None) if Instant::now() < until => std::thread::sleep(LOCK_POLL),
                Ok(None) => {
                    return Err(CommError::AddrInUse {
                        addr: address.to_string(),
                        reason: format!("another process keeps {} locked", dir.display()),
                    });
                }
                Err(error) => {
                    return Err(CommError::io(format!("locking {}", dir.display()), &error.into()));
                }
            }
        }
    }

    /// `None` where another holds it.
    fn try_take(dir: &Path) -> std::result::Result<Option<Self>, Errno> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let fd = rustix::fs::open(dir, flags, Mode::empty())?;
        match rustix::fs::flock(&fd, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(Self { dir: fd })),
            Err(Errno::AGAIN | Errno::INTR) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Whether `dir` is still the directory that was locked, and not a new one of that name.
    fn is_of(&self, dir: &Path) -> bool {
        let locked = rustix::fs::fstat(&self.dir).map(|stat| (stat.st_dev, stat.st_ino));
        let there = rustix::fs::lstat(dir).map(|stat| (stat.st_dev, stat.st_ino));
        locked.is_ok() && locked == there
    }
}

fn directory(path: &Path) -> &Path {
    path.parent().unwrap_or(Path::new("/"))
}

/// Makes the directory of `path`, mode 0700, where it is missing, and checks it. Returns it if this made it.
fn make_private_dir_of(path: &Path) -> Result<Option<PathBuf>> {
    let dir = directory(path);
    let made = match std::fs::DirBuilder::new().mode(0o700).create(dir) {
        Ok(()) => Some(dir.to_path_buf()),
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => None,
        Err(error) => return Err(CommError::io(format!("making {}", dir.display()), &error)),
    };
    check_private_dir(dir)?;
    Ok(made)
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

/// Listens at the first of `targets` that is this host's, which ranks of this host that try them in the same order meet.
fn bind_tcp(address: &RendezvousAddress, targets: &[SocketAddr]) -> Result<TcpListener> {
    let mut outcome = Err(std::io::ErrorKind::AddrNotAvailable.into());
    for target in targets {
        outcome = TcpListener::bind(target);
        if !matches!(&outcome, Err(error) if is_not_of_this_host(error)) {
            break;
        }
    }
    let listener = outcome.map_err(|error| bind_error(address, &error))?;
    if let (RendezvousAddress::Tcp { host, .. }, Ok(at)) = (address, listener.local_addr())
        && at.ip().is_loopback()
        && host != "localhost"
        && host.parse::<IpAddr>().is_err()
    {
        tracing::warn!(
            "the host name {host:?} stands for {} on this host, where ranks on other hosts cannot connect; if there \
             are any, meet at an address in numbers or change this host's /etc/hosts",
            at.ip()
        );
    }
    Ok(listener)
}

/// Another of a name's addresses may do: this one is of another host, or of a protocol that this host does not speak.
fn is_not_of_this_host(error: &std::io::Error) -> bool {
    error.kind() == std::io::ErrorKind::AddrNotAvailable
        || error.raw_os_error() == Some(Errno::AFNOSUPPORT.raw_os_error())
}

/// The addresses that `host` stands for, those that other hosts may reach first: a name may stand for a loopback address
/// on its own host too.
fn resolve(host: &str, port: u16) -> Result<Vec<SocketAddr>> {
    let wrong = |reason: String| CommError::invalid("rendezvous address", format!("host {host:?}: {reason}"));
    let found = (host, port).to_socket_addrs().map_err(|error| wrong(error.to_string()))?;
    let found = in_order(found.collect());
    if found.is_empty() { Err(wrong("no address found".into())) } else { Ok(found) }
}

fn in_order(mut found: Vec<SocketAddr>) -> Vec<SocketAddr> {
    found.sort_by_key(|address| address.ip().is_loopback());
    let mut seen = Vec::new();
    found.retain(|address| {
        let is_new = !seen.contains(address);
        seen.push(*address);
        is_new
    });
    found
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

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(5);

    fn addresses(texts: &[&str]) -> Vec<SocketAddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn addresses_that_other_hosts_reach_go_first() {
        let found = addresses(&["127.0.1.1:5", "192.0.2.1:5", "127.0.1.1:5", "[::1]:5", "192.0.2.1:5"]);
        assert_eq!(in_order(found), addresses(&["192.0.2.1:5", "127.0.1.1:5", "[::1]:5"]));
    }

    #[test]
    fn an_address_of_another_host_is_passed_over_when_binding_and_a_deaf_one_when_connecting() {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let address = RendezvousAddress::Tcp { host: "localhost".into(), port };
        // The first is reserved for documentation, and so no host's.
        let targets = addresses(&[&format!("192.0.2.1:{port}"), &format!("127.0.0.1:{port}")]);
        let listener = bind_tcp(&address, &targets).unwrap();
        assert_eq!(listener.local_addr().unwrap(), targets[1]);
        let taken = bind_tcp(&address, &targets).unwrap_err();
        assert!(matches!(taken, CommError::AddrInUse { .. }), "{taken:?}");
        let nowhere = bind_tcp(&address, &targets[..1]).unwrap_err();
        assert!(matches!(nowhere, CommError::InvalidArgument { .. }), "{nowhere:?}");
        let deaf = addresses(&["127.0.0.2:1"]);
        let targets = [&deaf[..], &targets[1..]].concat();
        assert!(dial_tcp(&targets, Instant::now() + PATIENCE).is_some());
        assert!(dial_tcp(&deaf, Instant::now() + PATIENCE).is_none());
    }

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
