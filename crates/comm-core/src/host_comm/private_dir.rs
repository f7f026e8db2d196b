//! Directories that this user alone may enter: making, checking and locking them.

use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;

use crate::error::{CommError, Result};
use crate::host_comm::address::RendezvousAddress;

const LOCK_POLL: Duration = Duration::from_millis(2);

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
pub(super) struct DirLock {
    dir: OwnedFd,
}

impl DirLock {
    /// Locks `dir`, or `None` when it is not there any more.
    pub(super) fn take(address: &RendezvousAddress, dir: &Path, until: Instant) -> Result<Option<Self>> {
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
    pub(super) fn try_take(dir: &Path) -> std::result::Result<Option<Self>, Errno> {
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

pub(super) fn directory(path: &Path) -> &Path {
    path.parent().unwrap_or(Path::new("/"))
}

/// Makes the directory of `path`, mode 0700, where it is missing, and checks it. Returns it if this made it.
pub(super) fn make_private_dir_of(path: &Path) -> Result<Option<PathBuf>> {
    let dir = directory(path);
    let made = match std::fs::DirBuilder::new().mode(0o700).create(dir) {
        Ok(()) => Some(dir.to_path_buf()),
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => None,
        Err(error) => return Err(CommError::io(format!("making {}", dir.display()), &error)),
    };
    check_private_dir(dir)?;
    Ok(made)
}
