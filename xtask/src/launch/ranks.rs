//! Starting ranks: environment, process groups, pinning.

use std::ffi::OsString;
use std::io::Read;
use std::net::TcpListener;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process_group, set_parent_process_death_signal};
use rustix::thread::CpuSet;

use crate::events::{EVENTS_ENV, Event, EventTail, Message};
use crate::launch::output::Forwarders;
use crate::launch::{LaunchSpec, Mode, THREADS_ENV};
use crate::signal;

/// A started rank (or, for ranks as threads, the process of them all).
pub struct Rank {
    /// The process.
    pub child: Child,
    /// Its process group.
    pub group: Pid,
    /// Ends the group when this program ends at once. Forgotten when the rank has been reaped: the number is free then.
    pub sudden_end: Option<signal::Group>,
    /// Its events.
    pub tail: EventTail,
    /// What it was doing last.
    pub last_phase: String,
    /// Whether it reported the end of its work.
    pub done: bool,
    /// Since when it is known to have ended.
    pub ended: Option<(std::process::ExitStatus, Instant)>,
}

impl Rank {
    /// Sends a signal to the rank's whole process group. A group that is gone already is fine.
    pub fn signal(&self, signal: Signal) {
        let _ = kill_process_group(self.group, signal);
    }

    /// New events, also kept as the rank's last phase and its being done.
    ///
    /// # Errors
    /// When the events file cannot be read.
    pub fn drain(&mut self) -> Result<Vec<Message>> {
        let messages = self.tail.drain()?;
        for message in &messages {
            match &message.event {
                Event::Phase(text) => self.last_phase.clone_from(text),
                Event::Done => self.done = true,
                _ => {}
            }
        }
        Ok(messages)
    }
}

/// The started ranks and the threads that forward their output.
pub struct Ranks {
    /// In rank order.
    pub ranks: Vec<Rank>,
    /// Copying their output.
    pub output: Forwarders,
}

impl Drop for Ranks {
    fn drop(&mut self) {
        for rank in self.ranks.iter().filter(|rank| rank.ended.is_none()) {
            rank.signal(Signal::KILL);
        }
        // A killed process ends as soon as the kernel gets to it; until it is waited for it stays as a zombie.
        let give_up = Instant::now() + REAP_PATIENCE;
        for rank in self.ranks.iter_mut().filter(|rank| rank.ended.is_none()) {
            while matches!(rank.child.try_wait(), Ok(None)) && Instant::now() < give_up {
                std::thread::sleep(Duration::from_millis(2));
            }
        }
    }
}

/// Starts every process of the job. When one cannot be started, dropping the list ends those that were.
pub fn start(spec: &LaunchSpec, folder: &Path) -> Result<Ranks> {
    let token = write_token(&folder.join("token"))?;
    let port = free_port()?;
    let processes = match spec.mode {
        Mode::Processes => spec.world,
        Mode::Threads => 1,
    };
    let pins = pins(processes);
    let mut started = Ranks { ranks: Vec::with_capacity(processes), output: Forwarders::default() };
    for rank in 0..processes {
        let events = folder.join(format!("events.{rank}"));
        let tail = EventTail::create(&events)?;
        let mut command = Command::new(&spec.program);
        command
            .args(&spec.args)
            .envs(MULTICAST_OFF)
            .envs(spec.env.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0);
        if !spec.gpus.is_empty() {
            command.env("CUDA_VISIBLE_DEVICES", spec.gpus.join(","));
        }
        if spec.share_gpus {
            command.envs(SHARE_GPUS);
        }
        if !spec.standalone {
            command
                .envs(job_env(spec, folder, port))
                .env("COMM_TOKEN_FILE", &token)
                .env("RANK", rank.to_string())
                .env("LOCAL_RANK", rank.to_string())
                .env(EVENTS_ENV, &events);
        }
        if spec.mode == Mode::Threads {
            command.env(THREADS_ENV, spec.world.to_string());
        } else {
            command.env_remove(THREADS_ENV);
        }
        let pin = pins.as_ref().map(|pins| pins[rank]);
        let parent = rustix::process::getpid();
        // SAFETY: between fork and exec only direct system calls are made, on values copied into the closure: no
        // allocation, no lock, nothing that another thread of the parent could have left half done.
        unsafe {
            command.pre_exec(move || {
                set_parent_process_death_signal(Some(Signal::KILL))?;
                stay_only_under(parent)?;
                if let Some(pin) = &pin {
                    rustix::thread::sched_setaffinity(None, pin)?;
                }
                Ok(())
            });
        }
        let mut child =
            command.spawn().with_context(|| format!("starting {} as rank {rank}", spec.program.display()))?;
        let label = if spec.mode == Mode::Threads { "threads".to_owned() } else { rank.to_string() };
        if let Some(stdout) = child.stdout.take() {
            forward(&mut started.output, &label, stdout, spec);
        }
        if let Some(stderr) = child.stderr.take() {
            forward(&mut started.output, &label, stderr, spec);
        }
        let group = Pid::from_child(&child);
        started.ranks.push(Rank {
            child,
            group,
            sudden_end: Some(signal::Group::new(group)),
            tail,
            last_phase: "starting".into(),
            done: false,
            ended: None,
        });
    }
    Ok(started)
}

/// Refuses to go on under another parent: one that died before the death signal was set sends none.
///
/// Called between fork and exec, so it makes a system call and nothing else.
fn stay_only_under(parent: Pid) -> std::io::Result<()> {
    if rustix::process::getppid() == Some(parent) {
        return Ok(());
    }
    Err(rustix::io::Errno::SRCH.into())
}

fn forward(output: &mut Forwarders, label: &str, stream: impl Read + Send + 'static, spec: &LaunchSpec) {
    output.forward(label.to_owned(), stream, spec.output.clone());
}

fn job_env(spec: &LaunchSpec, folder: &Path, port: u16) -> Vec<(&'static str, OsString)> {
    let mut address = OsString::from("unix:");
    address.push(folder.join("sock"));
    vec![
        ("WORLD_SIZE", spec.world.to_string().into()),
        ("LOCAL_WORLD_SIZE", spec.world.to_string().into()),
        ("MASTER_ADDR", "127.0.0.1".into()),
        ("MASTER_PORT", port.to_string().into()),
        ("COMM_RENDEZVOUS", address),
        ("COMM_JOB_ID", folder.file_name().unwrap_or_default().to_owned()),
        ("COMM_TIMEOUT_SECS", spec.comm_timeout.as_secs_f64().to_string().into()),
    ]
}

/// NVLink multicast stays off in every process that is started: it is not allowed on all machines, and where it is not,
/// asking for it can take the GPUs down.
pub const MULTICAST_OFF: [(&str, &str); 3] =
    [("NCCL_NVLS_ENABLE", "0"), ("NVSHMEM_DISABLE_NVLS", "1"), ("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")];

/// What ranks need that share GPUs: that p2p admits it and they deal themselves out (`gpus::of_rank`), and that the driver
/// keeps the streams of threads on one GPU apart.
pub const SHARE_GPUS: [(&str, &str); 2] =
    [(crate::gpus::SHARE_ENV, "on"), ("CUDA_DEVICE_MAX_CONNECTIONS", "32")];

fn write_token(path: &Path) -> Result<std::path::PathBuf> {
    use std::fmt::Write as _;
    use std::io::Write as _;
    let mut random = [0_u8; 32];
    let mut filled = 0;
    while filled < random.len() {
        filled += rustix::rand::getrandom(&mut random[filled..], rustix::rand::GetRandomFlags::empty())
            .context("drawing the job's token")?;
    }
    let hex = random.iter().fold(String::new(), |mut hex, byte| {
        let _ = write!(hex, "{byte:02x}");
        hex
    });
    std::fs::OpenOptions::new()
        .create_new(true)
        .write(true)
        .mode(0o600)
        .open(path)
        .and_then(|mut file| file.write_all(hex.as_bytes()))
        .with_context(|| format!("writing the job's token to {}", path.display()))?;
    Ok(path.to_owned())
}

/// A port that was free a moment ago, for programs that rendezvous by `MASTER_PORT`. The workspace's own rendezvous goes
/// through the job's socket and does not depend on it.
fn free_port() -> Result<u16> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).context("looking for a free port")?;
    Ok(listener.local_addr()?.port())
}

/// An even share of the processors for every process, or none where there are fewer processors than processes: then the
/// scheduler does better.
fn pins(processes: usize) -> Option<Vec<CpuSet>> {
    let allowed = rustix::thread::sched_getaffinity(None).ok()?;
    let cpus: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|&cpu| allowed.is_set(cpu)).collect();
    let share = cpus.len() / processes;
    if processes < 2 || share == 0 {
        return None;
    }
    Some(
        cpus.chunks(share)
            .take(processes)
            .map(|chunk| {
                let mut set = CpuSet::new();
                chunk.iter().for_each(|&cpu| set.set(cpu));
                set
            })
            .collect(),
    )
}

/// How long killed ranks are waited for. One that is stuck in the kernel (a driver that hangs) may take for ever.
const REAP_PATIENCE: Duration = Duration::from_secs(2);

/// How long a finished job's last lines of output are waited for.
pub const OUTPUT_PATIENCE: Duration = Duration::from_millis(500);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rank_whose_launcher_died_before_it_could_be_told_does_not_start() {
        let parent = rustix::process::getppid().unwrap();
        assert!(stay_only_under(parent).is_ok());
        assert!(stay_only_under(rustix::process::getpid()).is_err());
    }

    #[test]
    fn a_list_that_is_dropped_leaves_no_process_behind_and_no_zombie() {
        let dir = tempfile::tempdir().unwrap();
        let child = Command::new("sleep").arg("60").process_group(0).spawn().unwrap();
        let group = Pid::from_child(&child);
        let rank = Rank {
            child,
            group,
            sudden_end: None,
            tail: EventTail::create(&dir.path().join("events")).unwrap(),
            last_phase: String::new(),
            done: false,
            ended: None,
        };
        drop(Ranks { ranks: vec![rank], output: Forwarders::default() });
        assert!(!Path::new(&format!("/proc/{}", group.as_raw_nonzero())).exists());
    }
}
