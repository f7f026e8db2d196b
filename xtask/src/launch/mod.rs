//! Starting the ranks of a job and seeing them to their end.
//!
//! Owns the ranks' processes, their environment, their output, the job's folder and the GPUs it leased. It knows nothing
//! about what the ranks do, except for the [`events`](crate::events) they report. Nothing it started outlives
//! [`launch`]: every rank is in a process group of its own, dies with this process, and is killed when time is up.

mod fault;
mod gpu_memory;
mod leaks;
mod lease;
mod output;
mod ranks;
mod supervise;

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::events::Message;
use crate::signal;

pub use fault::{Fault, FaultKind};
pub use lease::{Lease, lease};
pub use output::{LineSink, stderr_sink};
pub use ranks::MULTICAST_OFF;

/// How a world's ranks run.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum, Serialize, Deserialize)]
pub enum Mode {
    /// A process per rank.
    Processes,
    /// A thread per rank, all in one process.
    Threads,
}

impl Mode {
    /// The name on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Processes => "processes",
            Self::Threads => "threads",
        }
    }
}

/// A job: what to start, how often, and for how long.
pub struct LaunchSpec {
    /// The program that every process runs.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<OsString>,
    /// Variables on top of this process's environment and of those that describe the job to a rank.
    pub env: Vec<(String, OsString)>,
    /// Ranks.
    pub world: usize,
    /// Whether they share a process.
    pub mode: Mode,
    /// The GPUs that the job may see, one per rank, as `CUDA_VISIBLE_DEVICES` spells them. Empty for none.
    pub gpus: Vec<String>,
    /// Whether several ranks may be on each of those GPUs.
    pub share_gpus: bool,
    /// Whether the program is no rank but starts ranks of its own: then it gets no variables that describe a job.
    pub standalone: bool,
    /// What keeps those GPUs from other jobs as long as this one runs.
    pub _lease: Option<Lease>,
    /// After this long everything is ended.
    pub timeout: Duration,
    /// After this long from the first rank's phase that contains [`FAULT_POINT`] everything is ended, too: how long the
    /// ranks take to get there depends on the machine, what they may take from there does not.
    pub after_fault_point: Option<Duration>,
    /// The timeout of the ranks' communicators.
    pub comm_timeout: Duration,
    /// A fault for the launcher to bring about, once its rank reports a phase that contains [`FAULT_POINT`].
    pub fault: Option<Fault>,
    /// Where the ranks' output goes.
    pub output: LineSink,
}

/// The word in a phase that asks the launcher to bring its fault about.
pub const FAULT_POINT: &str = "fault point";

/// The world size, for the one process whose threads are the ranks.
pub const THREADS_ENV: &str = "COMM_XTASK_THREADS";

/// How a process ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Exit {
    /// By itself, with this code.
    Code(i32),
    /// By a signal that was not the launcher's own way of ending it.
    Signal(i32),
    /// By the launcher, because time was up, another rank had failed or the user asked for it.
    Ended,
}

/// One process's end.
#[derive(Clone, Debug)]
pub struct RankEnd {
    /// How it ended.
    pub exit: Exit,
    /// Whether it reported that its work was done.
    pub done: bool,
    /// What it was doing last.
    pub last_phase: String,
}

/// A job's end.
#[derive(Debug)]
pub struct LaunchReport {
    /// Every process, in rank order (one process when the ranks are threads).
    pub ranks: Vec<RankEnd>,
    /// Whether the job was ended because its time was up.
    pub timed_out: bool,
    /// Whether the user ended it.
    pub interrupted: bool,
    /// `CLOCK_MONOTONIC` nanoseconds at which the launcher brought its fault about.
    pub fault_at: Option<u64>,
    /// What the job left behind.
    pub leaks: Vec<String>,
}

impl LaunchReport {
    /// What went wrong, for a job in which nothing should; `None` for a clean end.
    pub fn problem(&self) -> Option<String> {
        let mut problems = Vec::new();
        if self.interrupted {
            problems.push("interrupted".to_owned());
        }
        if self.timed_out {
            problems.push("time was up".to_owned());
        }
        for (rank, end) in self.ranks.iter().enumerate() {
            match end.exit {
                Exit::Code(0) if end.done => {}
                Exit::Code(0) => problems.push(format!("rank {rank} left before its work was done")),
                Exit::Code(code) => problems.push(format!("rank {rank} exited with {code}")),
                Exit::Signal(signal) => {
                    problems.push(format!("rank {rank} died of signal {signal} in: {}", end.last_phase));
                }
                Exit::Ended => problems.push(format!("rank {rank} was ended in: {}", end.last_phase)),
            }
        }
        problems.extend(self.leaks.iter().map(|leak| format!("left behind: {leak}")));
        (!problems.is_empty()).then(|| problems.join("; "))
    }
}

/// Runs a job to its end, handing on what its ranks report.
///
/// Must be called from a thread that lives as long as the job: the ranks die with the thread that started them.
///
/// # Errors
/// When a rank could not be started (the others are ended first) or the job's folder could not be made. How the ranks
/// fared is in the report.
pub fn launch(spec: &LaunchSpec, on_event: &mut dyn FnMut(&Message)) -> Result<LaunchReport> {
    ensure!(spec.world > 0, "a job needs at least one rank");
    ensure!(
        spec.gpus.is_empty() || spec.gpus.len() >= spec.world || spec.share_gpus,
        "{} GPUs for {} ranks: every rank needs one of its own",
        spec.gpus.len(),
        spec.world
    );
    let folder = tempfile::Builder::new()
        .prefix("comm-job-")
        .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o700))
        .tempdir()
        .context("creating the job's folder")?;
    let _sudden_end = signal::Folder::new(folder.path());
    // On GPUs that others may be using, too, nobody could say whose memory is whose.
    let own_gpus = if spec._lease.is_some() { spec.gpus.as_slice() } else { &[] };
    let before = leaks::Before::look(own_gpus);
    let ranks = ranks::start(spec, folder.path())?;
    supervise::supervise(spec, ranks, &before, folder.path(), on_event)
}

/// A job of this very program's hidden `rank-worker` command, so that a bundle needs one binary only.
///
/// # Errors
/// When this program's own path is not to be had.
pub fn worker_program() -> Result<PathBuf> {
    let path = std::env::current_exe().context("finding this program's own path")?;
    // A program that was rebuilt while it runs is still to be had through the kernel's link.
    Ok(if path.exists() { path } else { PathBuf::from("/proc/self/exe") })
}
