//! A rank at work: what runs in the processes that the launcher starts (the hidden `rank-worker` command).
//!
//! The job is a JSON file named by a variable, so that all ranks get the same copy of it.

mod conformance;
mod descriptors;
mod fault;
mod lifecycle;
mod log;
mod sweep;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use comm_core::{
    CommError, CreateContext, Deadline, DeviceComm, DeviceMemory, HostComm, Rendezvous, RendezvousAddress,
    ThreadComm,
};
use serde::{Deserialize, Serialize};

use crate::backends;
use crate::bench;
use crate::device::Device;
use crate::events::{Event, EventSink};
use crate::launch::THREADS_ENV;
use crate::tune;

pub use conformance::ConformanceJob;
pub use fault::{FaultJob, GOES_ON, NOTHING_OPEN};
pub use lifecycle::{FLAT_DESCRIPTORS, FLAT_MEMORY, LifecycleJob};
pub use sweep::SweepJob;

/// The environment variable that names the file which holds the job.
pub const JOB_ENV: &str = "COMM_XTASK_JOB";

/// What ranks can be started for.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Job {
    /// A benchmark.
    Bench(bench::plan::BenchJob),
    /// The conformance suite.
    Conformance(ConformanceJob),
    /// A fault test.
    Fault(FaultJob),
    /// Measurements for a table of algorithms.
    Tune(tune::TuneJob),
    /// Every kernel once.
    Sweep(SweepJob),
    /// Communicators one after another.
    Lifecycle(LifecycleJob),
}

/// What a rank knows of itself.
pub struct RankContext {
    /// How it reaches the others.
    pub host: Arc<dyn HostComm>,
    /// Its number among this host's ranks, and so the number of its GPU among those the job may see.
    pub local_rank: usize,
    /// Whom it reports to.
    pub events: EventSink,
    again: Again,
}

/// How ranks that outlived another one meet anew.
#[derive(Clone)]
enum Again {
    /// Threads: the first to come makes the communicators of all.
    Threads(Arc<Mutex<Vec<Option<ThreadComm>>>>),
    /// Processes: at another address beside the first.
    Processes(Rendezvous),
}

impl RankContext {
    /// A rank of a test's world of threads, whose events go nowhere.
    ///
    /// # Errors
    /// As [`EventSink::from_env`].
    #[cfg(test)]
    pub fn of_test(host: Arc<dyn HostComm>) -> Result<Self> {
        let (local_rank, events) = (host.rank(), EventSink::from_env(host.rank())?);
        Ok(Self { host, local_rank, events, again: Again::Threads(Arc::default()) })
    }

    /// The device that this rank works on.
    ///
    /// # Errors
    /// When it cannot be used.
    pub fn open_device(&self, backend: &str) -> Result<Box<dyn Device>> {
        backends::open_device(backend, self.local_rank)
    }

    /// A host communicator of `world` of the job's ranks, of which this is number `rank` now. Once per process.
    ///
    /// # Errors
    /// When they do not all come.
    pub fn meet_again(&self, rank: usize, world: usize) -> Result<Arc<dyn HostComm>> {
        match &self.again {
            Again::Threads(comms) => {
                let mut comms = comms.lock().unwrap_or_else(PoisonError::into_inner);
                if comms.is_empty() {
                    comms.extend(ThreadComm::create(world, self.host.timeout())?.into_iter().map(Some));
                }
                let comm = comms.get_mut(rank).and_then(Option::take);
                Ok(Arc::new(comm.with_context(|| format!("rank {rank} of {world} met again already"))?))
            }
            Again::Processes(first) => {
                let address = match &first.address {
                    RendezvousAddress::Unix(path) => RendezvousAddress::Unix(again_path(path)),
                    RendezvousAddress::Tcp { host, port } => {
                        RendezvousAddress::Tcp { host: host.clone(), port: port.wrapping_add(1) }
                    }
                };
                Ok(Arc::new(Rendezvous { address, rank, size: world, ..first.clone() }.connect()?))
            }
        }
    }

    /// This rank's end of a new communicator of all ranks.
    ///
    /// # Errors
    /// When it cannot be created.
    pub fn create(
        &self,
        backend: &str,
        memory: &dyn DeviceMemory,
        alike: bool,
    ) -> comm_core::Result<Arc<dyn DeviceComm>> {
        backends::registry().create(backend, &self.create_context(memory, alike))
    }

    /// What a communicator of all ranks is created from. `alike`: the promise that registered operands lie alike on all
    /// ranks, as those of benchmarks and suite do.
    pub fn create_context(&self, memory: &dyn DeviceMemory, alike: bool) -> CreateContext {
        // Backends other than p2p ignore it.
        let promise = alike.then(|| ("p2p.symmetric_operands".to_owned(), "on".to_owned()));
        CreateContext {
            host: Arc::clone(&self.host),
            memory: memory.kind(),
            timeout: self.host.timeout(),
            checked: false,
            options: promise.into_iter().collect(),
        }
    }
}

/// The `rank-worker` command.
///
/// # Errors
/// When this process was not started by the launcher, cannot meet the other ranks, or its work fails.
pub fn work() -> Result<()> {
    let path = std::env::var_os(JOB_ENV)
        .with_context(|| format!("{JOB_ENV} is not set: rank-worker is started by xtask itself"))?;
    let path = Path::new(&path);
    let text =
        std::fs::read_to_string(path).with_context(|| format!("reading the job {}", path.display()))?;
    let job: Job =
        serde_json::from_str(&text).with_context(|| format!("reading the job {}", path.display()))?;
    if matches!(job, Job::Fault(_)) {
        log::start();
    }
    match std::env::var(THREADS_ENV) {
        Ok(world) => {
            let world = world.parse().with_context(|| format!("{THREADS_ENV}={world}"))?;
            work_as_threads(&job, world, comm_timeout()?)
        }
        Err(_) => work_as_process(&job),
    }
}

fn work_as_threads(job: &Job, world: usize, timeout: Duration) -> Result<()> {
    let events = EventSink::from_env(0)?;
    let again = Again::Threads(Arc::default());
    let results = comm_core::run_threads(world, timeout, |host| {
        let (local_rank, events) = (host.rank(), events.for_rank(host.rank()));
        run_rank(job, &RankContext { host, local_rank, events, again: again.clone() })
    })?;
    finish(&events, &results)
}

fn work_as_process(job: &Job) -> Result<()> {
    let rendezvous = Rendezvous::from_env()?;
    let events = EventSink::from_env(rendezvous.rank)?;
    events.phase("meeting the other ranks");
    let local_rank = comm_core::local_rank_from_env().unwrap_or(rendezvous.rank);
    let host: Arc<dyn HostComm> = Arc::new(rendezvous.connect()?);
    let again = Again::Processes(rendezvous);
    let result =
        run_rank(job, &RankContext { host: Arc::clone(&host), local_rank, events: events.clone(), again });
    let all_are_left = !matches!(job, Job::Fault(_));
    if all_are_left && result.is_ok() && host.poll().is_ok() {
        // Rank 0's process relays the others' calls, so nobody leaves before all are through.
        host.barrier(Deadline::after(host.timeout()))?;
    }
    finish(&events, &[result])
}

/// The end of a process's ranks: every failure is told, and only a whole success counts as done.
fn finish(events: &EventSink, results: &[Result<()>]) -> Result<()> {
    let mut failed = 0;
    for (rank, result) in results.iter().enumerate() {
        if let Err(error) = result {
            eprintln!("rank {rank} failed: {error:#}");
            failed += 1;
        }
    }
    if failed > 0 {
        bail!("{failed} of this process's {} ranks failed", results.len());
    }
    events.emit(Event::Done);
    Ok(())
}

fn run_rank(job: &Job, context: &RankContext) -> Result<()> {
    let result = match job {
        Job::Bench(job) => bench::measure::run(job, context),
        Job::Conformance(job) => conformance::run(job, context),
        Job::Fault(job) => fault::run(job, context),
        Job::Tune(job) => tune::rank::run(job, context),
        Job::Sweep(_) => sweep::run(context),
        Job::Lifecycle(job) => lifecycle::run(job, context),
    };
    if let Err(error) = &result {
        // The others need not wait for their timeouts, and learn why.
        let cause = error.downcast_ref::<CommError>().cloned();
        let cause =
            cause.unwrap_or_else(|| CommError::Io { context: "rank".into(), message: format!("{error:#}") });
        context.host.report_failure(&cause);
    }
    result
}

fn again_path(first: &Path) -> PathBuf {
    first.with_extension("again")
}

fn comm_timeout() -> Result<Duration> {
    match std::env::var("COMM_TIMEOUT_SECS") {
        Ok(text) => {
            let seconds: f64 = text.parse().with_context(|| format!("COMM_TIMEOUT_SECS={text}"))?;
            Duration::try_from_secs_f64(seconds).with_context(|| format!("COMM_TIMEOUT_SECS={text}"))
        }
        Err(_) => Ok(Duration::from_secs(30)),
    }
}
