//! GPUs on loan: a lock file per GPU, so that worlds smaller than the machine run side by side and never share a GPU.
//!
//! Owns the lock files only. It never touches a GPU.

use std::fs::{DirBuilder, File, OpenOptions};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::{FlockOperation, flock};

use crate::signal;

/// GPUs held until this is dropped. The kernel drops the locks of a process that dies, so nothing can leak.
#[derive(Debug)]
pub struct Lease {
    gpus: Vec<String>,
    _locks: Vec<File>,
}

impl Lease {
    /// The leased GPUs, as `CUDA_VISIBLE_DEVICES` spells them.
    pub fn gpus(&self) -> &[String] {
        &self.gpus
    }
}

/// Leases `count` of `available`, waiting up to `patience` for other jobs to give theirs back.
///
/// All are taken or none, so two jobs that each want most of the machine cannot starve each other holding halves.
///
/// # Errors
/// When there are too few GPUs at all, when they are not free in time, or when the lock files cannot be made.
pub fn lease(available: &[String], count: usize, patience: Duration) -> Result<Lease> {
    lease_in(&lock_dir()?, available, count, patience)
}

fn lease_in(dir: &Path, available: &[String], count: usize, patience: Duration) -> Result<Lease> {
    ensure!(available.len() >= count, "{count} GPUs wanted, but this machine has {}", available.len());
    let give_up = Instant::now() + patience;
    loop {
        let mut lease = Lease { gpus: Vec::new(), _locks: Vec::new() };
        for gpu in available {
            if lease.gpus.len() == count {
                break;
            }
            if let Some(lock) = try_lock(dir, gpu)? {
                lease.gpus.push(gpu.clone());
                lease._locks.push(lock);
            }
        }
        if lease.gpus.len() == count {
            return Ok(lease);
        }
        let free = lease.gpus.len();
        drop(lease);
        if Instant::now() >= give_up {
            bail!(
                "{count} GPUs wanted, but only {free} of {} came free within {patience:?}; the others are leased in {}",
                available.len(),
                dir.display()
            );
        }
        ensure!(!signal::interrupted(), "interrupted while waiting for {count} free GPUs");
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn try_lock(dir: &Path, gpu: &str) -> Result<Option<File>> {
    let name: String =
        gpu.chars().map(|c| if c.is_ascii_alphanumeric() || c == '-' { c } else { '_' }).collect();
    let path = dir.join(format!("gpu-{name}.lock"));
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(&path)
        .with_context(|| format!("opening lock file {}", path.display()))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(file)),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
        Err(error) => Err(error).with_context(|| format!("locking {}", path.display())),
    }
}

fn lock_dir() -> Result<PathBuf> {
    let uid = rustix::process::getuid().as_raw();
    let dir = std::env::temp_dir().join(format!("comm-gpu-leases-{uid}"));
    match DirBuilder::new().mode(0o700).create(&dir) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
            return Err(error).with_context(|| format!("creating {}", dir.display()));
        }
        _ => {}
    }
    // Another user could have made the folder first and point the locks anywhere.
    let meta = std::fs::symlink_metadata(&dir).with_context(|| format!("looking at {}", dir.display()))?;
    ensure!(
        meta.is_dir() && meta.uid() == uid,
        "{} is not a folder owned by user {uid}; remove it",
        dir.display()
    );
    Ok(dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gpus(n: usize) -> Vec<String> {
        (0..n).map(|i| i.to_string()).collect()
    }

    #[test]
    fn small_worlds_get_different_gpus() {
        let dir = tempfile::tempdir().unwrap();
        let first = lease_in(dir.path(), &gpus(4), 2, Duration::ZERO).unwrap();
        let second = lease_in(dir.path(), &gpus(4), 2, Duration::ZERO).unwrap();
        assert_eq!(first.gpus(), ["0", "1"]);
        assert_eq!(second.gpus(), ["2", "3"]);
        let error = lease_in(dir.path(), &gpus(4), 1, Duration::ZERO).unwrap_err().to_string();
        assert!(error.contains("only 0 of 4"), "{error}");
        drop(first);
        assert_eq!(lease_in(dir.path(), &gpus(4), 1, Duration::ZERO).unwrap().gpus(), ["0"]);
    }

    #[test]
    fn more_than_the_machine_has_is_refused_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let error = lease_in(dir.path(), &gpus(1), 2, Duration::from_secs(60)).unwrap_err().to_string();
        assert!(error.contains("this machine has 1"), "{error}");
    }
}
