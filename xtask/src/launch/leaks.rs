//! What a job must not leave behind: shared-memory files, processes, sockets, memory of its GPUs.

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::Pid;

use super::gpu_memory::{self, Changes};

/// More than passes between making a file and mapping it.
const MAPPING_TIME: Duration = Duration::from_millis(100);

/// The shared-memory files of this user, and the memory in use on the job's GPUs, before the job.
pub struct Before {
    shm: BTreeSet<PathBuf>,
    gpus: Option<gpu_memory::Before>,
}

impl Before {
    /// Looks around before the ranks start. `own_gpus`: those that no other job has as long as this one runs.
    pub fn look(own_gpus: &[String]) -> Self {
        let gpus = (!own_gpus.is_empty()).then(|| gpu_memory::Before::look(own_gpus));
        Self { shm: own_shm_files(), gpus }
    }

    /// What has become of the GPUs' memory. Every process of the job has ended.
    pub fn gpu_memory(&self) -> Changes {
        self.gpus.as_ref().map_or_else(Changes::default, gpu_memory::Before::changes)
    }

    /// What is there now and was not there before, in words; empty when nothing leaked. `groups` are the process groups
    /// of the ranks, `socket` the job's rendezvous socket if it should be gone.
    pub fn leaks(&self, groups: &[Pid], socket: Option<&Path>) -> Vec<String> {
        let mut leaks = Vec::new();
        let mut stray = self.stray();
        if !stray.is_empty() {
            // A job beside this one may have made a file and not mapped it yet.
            std::thread::sleep(MAPPING_TIME);
            stray = &stray & &self.stray();
        }
        leaks.extend(stray.iter().map(|path| format!("shared-memory file {}", path.display())));
        for (pid, group) in running_in(groups) {
            leaks.push(format!("process {pid} of process group {group} still runs"));
        }
        if let Some(socket) = socket.filter(|socket| socket.exists()) {
            leaks.push(format!("rendezvous socket {}", socket.display()));
        }
        leaks
    }

    /// New files that nobody maps. One that a living process maps belongs to a job beside this one: this job's processes
    /// are gone.
    fn stray(&self) -> BTreeSet<PathBuf> {
        // The files first: one that is made and mapped between the two looks must not seem unmapped.
        let candidates = &own_shm_files() - &self.shm;
        if candidates.is_empty() { candidates } else { &candidates - &mapped_shm_files() }
    }
}

fn own_shm_files() -> BTreeSet<PathBuf> {
    let uid = rustix::process::getuid().as_raw();
    let Ok(entries) = std::fs::read_dir("/dev/shm") else { return BTreeSet::new() };
    entries
        .flatten()
        .filter(|entry| entry.metadata().is_ok_and(|meta| meta.uid() == uid))
        .map(|entry| entry.path())
        .collect()
}

/// Processes of these groups, except for those that have ended and only wait to be reaped by whoever adopted them.
fn running_in(groups: &[Pid]) -> Vec<(u32, i32)> {
    let Ok(processes) = std::fs::read_dir("/proc") else { return Vec::new() };
    let groups: BTreeSet<i32> = groups.iter().map(|group| group.as_raw_nonzero().get()).collect();
    let mut running = Vec::new();
    for process in processes.flatten() {
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let Ok(stat) = std::fs::read_to_string(process.path().join("stat")) else { continue };
        // The program's name stands in parentheses and may hold anything; the fields after it are state, parent, group.
        let Some((_, fields)) = stat.rsplit_once(") ") else { continue };
        let mut fields = fields.split(' ');
        let (state, _, group) = (fields.next(), fields.next(), fields.next());
        let Some(group) = group.and_then(|group| group.parse().ok()).filter(|group| groups.contains(group))
        else {
            continue;
        };
        if !matches!(state, Some("Z" | "X")) {
            running.push((pid, group));
        }
    }
    running
}

fn mapped_shm_files() -> BTreeSet<PathBuf> {
    let Ok(processes) = std::fs::read_dir("/proc") else { return BTreeSet::new() };
    let mut mapped = BTreeSet::new();
    for process in processes.flatten() {
        if !process.file_name().as_encoded_bytes().iter().all(u8::is_ascii_digit) {
            continue;
        }
        let Ok(maps) = std::fs::read_to_string(process.path().join("maps")) else { continue };
        mapped.extend(
            maps.lines().filter_map(|line| line.find("/dev/shm/").map(|at| PathBuf::from(&line[at..]))),
        );
    }
    mapped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_forgotten_file_is_named_and_a_mapped_one_is_not_ours() {
        let before = Before::look(&[]);
        let Ok(file) = tempfile::Builder::new().prefix("comm-leak-test").tempfile_in("/dev/shm") else {
            eprintln!("SKIP: /dev/shm is not writable");
            return;
        };
        let leaks = before.leaks(&[], None);
        let name = file.path().display().to_string();
        assert!(leaks.iter().any(|leak| leak.contains(&name)), "{leaks:?}");
        drop(file);
        assert_eq!(before.gpu_memory(), Changes::default(), "there were no GPUs to look at");
        assert!(!before.leaks(&[], None).iter().any(|leak| leak.contains(&name)));
    }
}
