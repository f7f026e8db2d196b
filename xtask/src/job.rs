//! Jobs of this program's own ranks: the specification with its defaults, the job file, the lease.

use std::ffi::OsString;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::events::Message;
use crate::gpus;
use crate::launch::{LaunchReport, LaunchSpec, Lease, Mode, launch, lease, stderr_sink, worker_program};
use crate::rank::{JOB_ENV, Job};
use crate::signal;

/// How long a job waits for GPUs that other jobs hold.
pub const LEASE_PATIENCE: Duration = Duration::from_secs(300);

/// The name of the hidden command that a rank's process runs.
pub const WORKER_COMMAND: &str = "rank-worker";

/// A world of this program's own ranks, without GPUs.
///
/// # Errors
/// When this program's own path is not to be had, or the world is empty.
pub fn spec(world: usize, mode: Mode, timeout: Duration, comm_timeout: Duration) -> Result<LaunchSpec> {
    ensure!(world > 0, "a world needs at least one rank");
    Ok(LaunchSpec {
        program: worker_program()?,
        args: vec![WORKER_COMMAND.into()],
        env: Vec::new(),
        world,
        mode,
        gpus: Vec::new(),
        _lease: None,
        share_gpus: false,
        standalone: false,
        timeout,
        after_fault_point: None,
        comm_timeout,
        fault: None,
        output: stderr_sink(),
    })
}

impl LaunchSpec {
    /// The same job with several ranks on each GPU where there are fewer GPUs than ranks.
    #[must_use]
    pub fn sharing(self, share_gpus: bool) -> Self {
        Self { share_gpus, ..self }
    }

    /// The same job on GPUs of its own out of `available`, if `wanted`.
    ///
    /// # Errors
    /// When there are too few or they do not come free.
    pub fn with_gpus(self, available: &[String], wanted: bool) -> Result<Self> {
        if !wanted {
            return Ok(self);
        }
        let count = gpus::needed(self.world, available.len(), self.share_gpus);
        let lease: Lease = lease(available, count, LEASE_PATIENCE)?;
        Ok(Self { gpus: lease.gpus().to_vec(), _lease: Some(lease), ..self })
    }
}

/// Runs `job` on the ranks of `spec`.
///
/// # Errors
/// As [`launch`].
pub fn launch_job(spec: LaunchSpec, job: &Job, on_event: &mut dyn FnMut(&Message)) -> Result<LaunchReport> {
    let file = tempfile::Builder::new()
        .prefix("comm-job-")
        .suffix(".json")
        .tempfile()
        .context("creating the job file")?;
    let _sudden_end = signal::Folder::new(file.path());
    serde_json::to_writer(&file, job).context("writing the job file")?;
    let mut spec = spec;
    spec.env.push((JOB_ENV.to_owned(), OsString::from(file.path())));
    launch(&spec, on_event)
}
