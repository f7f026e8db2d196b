//! Ctrl-C and SIGTERM: noted in a flag that every wait of the program looks at, so that children are ended in order.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process_group};

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Whether the user asked the program to stop.
pub fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}

/// What must not outlive this program even when it ends at once.
static LIVE: Mutex<Live> = Mutex::new(Live { folders: Vec::new(), groups: Vec::new() });

struct Live {
    folders: Vec<PathBuf>,
    groups: Vec<Pid>,
}

fn live() -> std::sync::MutexGuard<'static, Live> {
    LIVE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A job's folder (which holds its token) or file, removed also when the program ends at once; until this is dropped.
pub struct Folder(PathBuf);

impl Folder {
    /// Remembers the folder or file.
    pub fn new(path: &Path) -> Self {
        live().folders.push(path.to_owned());
        Self(path.to_owned())
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        live().folders.retain(|path| *path != self.0);
    }
}

/// A process group, killed also when the program ends at once; until this is dropped. The parent-death signal reaches
/// the group's first process only, not what that one started.
pub struct Group(Pid);

impl Group {
    /// Remembers the group.
    pub fn new(pid: Pid) -> Self {
        live().groups.push(pid);
        Self(pid)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        live().groups.retain(|pid| *pid != self.0);
    }
}

/// Ends all groups and removes all folders that are remembered.
fn leave_nothing(live: &Live) {
    for &group in &live.groups {
        let _ = kill_process_group(group, Signal::KILL);
    }
    for folder in &live.folders {
        let _ = std::fs::remove_dir_all(folder).or_else(|_| std::fs::remove_file(folder));
    }
}

/// Starts noting signals. A second signal ends the program, its ranks' process groups and its jobs' folders at once.
///
/// # Errors
/// When the handler cannot be installed.
pub fn watch() -> Result<()> {
    ctrlc::set_handler(|| {
        if INTERRUPTED.swap(true, Ordering::Relaxed) {
            leave_nothing(&live());
            std::process::exit(130);
        }
        eprintln!("interrupted: ending the ranks (press again to leave at once)");
    })
    .context("installing the Ctrl-C handler")
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::{CommandExt, ExitStatusExt};
    use std::process::Command;

    use super::*;

    #[test]
    fn what_is_remembered_does_not_outlive_a_sudden_end() {
        let dir = tempfile::tempdir().unwrap();
        let job = dir.path().join("job");
        std::fs::create_dir(&job).unwrap();
        std::fs::write(job.join("token"), "secret").unwrap();
        let mut child = Command::new("sleep").arg("60").process_group(0).spawn().unwrap();
        let group = Pid::from_child(&child);
        leave_nothing(&Live { folders: vec![job.clone()], groups: vec![group] });
        assert!(!job.exists());
        assert_eq!(child.wait().unwrap().signal(), Some(9));
    }

    #[test]
    fn what_ended_is_forgotten() {
        let (path, pid) = (Path::new("/nonexistent/job"), Pid::from_raw(i32::MAX).unwrap());
        let (folder, group) = (Folder::new(path), Group::new(pid));
        assert!(live().folders.iter().any(|other| other == path) && live().groups.contains(&pid));
        drop((folder, group));
        assert!(!live().folders.iter().any(|other| other == path) && !live().groups.contains(&pid));
    }
}
