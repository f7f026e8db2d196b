//! One rank's part of a test of many lives: communicators that are created, used in every way that takes something, and
//! closed, one after another in one process. What a life leaves behind adds up.

use anyhow::{Context, Result, ensure};
use comm_core::{DType, Deadline, DeviceAddr, DeviceComm, OpKind, OpQuery, ReduceOp};
use nvml_wrapper::Nvml;
use serde::{Deserialize, Serialize};

use crate::backends;
use crate::bench::data::{Content, Segment, pattern};
use crate::bench::human;
use crate::bench::measure::Buffer;
use crate::device::Device;
use crate::events::{CaseResult, Event};
use crate::gpus;
use crate::rank::RankContext;
use crate::rank::descriptors::Descriptors;

/// The case that reports whether as many descriptors are open in the end as in the beginning.
pub const FLAT_DESCRIPTORS: &str = "open descriptors stay as many";
/// The case that reports whether as much of the GPU's memory is in use.
pub const FLAT_MEMORY: &str = "memory in use stays as much";

/// Lives after which a process has everything that it opens or takes once and keeps.
const SETTLED: usize = 5;
/// Elements of the buffers: 2 MiB, so that one that stays in use is seen among the driver's own books.
const COUNT: usize = 1 << 19;
/// What the driver's own books may differ by.
const SLACK: u64 = 2 << 20;

/// A test of many lives.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LifecycleJob {
    /// The backend's name.
    pub backend: String,
    /// Lives: more than a few, since the first ones do not count.
    pub rounds: usize,
}

/// Runs the test's part; every rank reports its cases.
///
/// # Errors
/// When a communicator cannot be had, or does not do what it should.
pub fn run(job: &LifecycleJob, context: &RankContext) -> Result<()> {
    ensure!(job.rounds > SETTLED, "{} rounds: the first {SETTLED} do not count", job.rounds);
    let device = context.open_device(&job.backend)?;
    let gauge = backends::find(&job.backend)?.on_gpus.then(|| Gauge::open(context));
    let mut settled = None;
    for round in 0..job.rounds {
        context.events.phase(format!("life {round}"));
        live(job, context, &*device, round).with_context(|| format!("life {round}"))?;
        if round + 1 == SETTLED {
            let used = used(context, gauge.as_ref())?;
            settled = Some((together(context, Descriptors::settled)??, used));
        }
    }
    let (descriptors, before) = settled.context("no round was the one to compare with")?;
    let more = together(context, || descriptors.grown())??;
    let after = used(context, gauge.as_ref())?;
    let case = |name: &str, result| context.events.emit(Event::Case { name: name.to_owned(), result });
    let rounds = job.rounds - SETTLED;
    case(
        FLAT_DESCRIPTORS,
        match more.as_slice() {
            [] => CaseResult::Passed,
            more => CaseResult::Failed(format!("after {rounds} more lives: {}", more.join("; "))),
        },
    );
    if gauge.is_some() {
        case(FLAT_MEMORY, judge(before, after, rounds));
    }
    Ok(())
}

/// A look at a time when no rank has a communicator.
fn together<T>(context: &RankContext, look: impl FnOnce() -> T) -> Result<T> {
    let meet = || context.host.barrier(Deadline::after(context.host.timeout()));
    meet()?;
    let seen = look();
    meet()?;
    Ok(seen)
}

/// One communicator's life. Every other time what it was given is taken back before its end; else its end does that.
fn live(job: &LifecycleJob, context: &RankContext, device: &dyn Device, round: usize) -> Result<()> {
    let memory = device.memory();
    let comm = context.create(&job.backend, memory, true)?;
    let has = |kind| comm.supports(&OpQuery::new(kind, DType::F32, COUNT)).is_supported();
    let (send, recv) = (Buffer::new(memory, COUNT * 4)?, Buffer::new(memory, COUNT * 4)?);
    let reached = has(OpKind::Allocate).then(|| comm.allocate(COUNT * 4)).transpose()?;
    // SAFETY: the buffer is freed behind the communicator's end.
    let registered =
        has(OpKind::Register).then(|| unsafe { comm.register(recv.addr, recv.bytes) }).transpose()?;
    for result in [Some(recv.addr), reached].into_iter().flatten() {
        sum(context, device, &*comm, (send.addr, result), round)?;
    }
    if has(OpKind::Split) {
        let group = comm.split(Some(0), -(context.host.rank() as i32))?.context("no group for a colour")?;
        sum(context, device, &*group, (send.addr, recv.addr), round)?;
        group.close()?;
    }
    if round.is_multiple_of(2) {
        together(context, || ())?;
        // SAFETY: each rank has waited for its work in `sum`, and all have met since.
        unsafe {
            registered.iter().try_for_each(|registered| comm.deregister(registered))?;
            reached.into_iter().try_for_each(|reached| comm.free(reached))?;
        }
    }
    comm.close()?;
    // What the other ranks have of this rank's memory goes with their ends, which come before this one's does.
    together(context, || ())
}

/// An all-reduce whose result is right.
fn sum(
    context: &RankContext,
    device: &dyn Device,
    comm: &dyn DeviceComm,
    (send, recv): (DeviceAddr, DeviceAddr),
    round: usize,
) -> Result<()> {
    let (op, dtype, memory) = (ReduceOp::Sum, DType::F32, device.memory());
    let data = pattern(round as u64, Some(op), comm.size());
    let whole = |content| Segment { offset: 0, count: COUNT, content };
    let rank = context.host.rank();
    // SAFETY: both buffers hold `COUNT` f32 elements and outlive the work, which `synchronize` waits for.
    let wrong = unsafe {
        device.poison(recv, COUNT * 4)?;
        device.fill(send, &data, dtype, &whole(Content::Of { rank, first: 0 }))?;
        comm.all_reduce(send, recv, COUNT, dtype, op, memory.stream())?;
        memory.synchronize()?;
        device.wrong(recv, &data, dtype, &whole(Content::Reduced { op, first: 0 }))?
    };
    comm.poll()?;
    ensure!(wrong == 0, "{wrong} of {COUNT} elements are wrong");
    Ok(())
}

/// What tells how much of the rank's GPU's memory is in use.
struct Gauge {
    gpu: String,
    /// Ranks on the GPU.
    ranks: usize,
}

/// Bytes in use, or why they say nothing.
type Reading = Result<u64, String>;

impl Gauge {
    fn open(context: &RankContext) -> Self {
        let visible = std::env::var("CUDA_VISIBLE_DEVICES").unwrap_or_default();
        let gpus: Vec<&str> = visible.split(',').collect();
        let of = |rank| gpus::of_rank(rank, gpus.len(), gpus::are_shared());
        let own = of(context.local_rank);
        let ranks = (0..context.host.size()).filter(|&rank| of(rank) == own).count();
        let gpu = gpus.get(own).copied().unwrap_or_default().to_owned();
        Self { gpu, ranks }
    }

    fn read(&self) -> Reading {
        let ask = || {
            // Not kept: what a communicator leaves open by starting it again and again would go unseen.
            let nvml = Nvml::init()?;
            let device = gpus::device(&nvml, &self.gpu)?;
            Ok((device.memory_info()?.used, device.running_compute_processes()?.len()))
        };
        match ask().map_err(|error: nvml_wrapper::error::NvmlError| error.to_string())? {
            (_, programs) if programs > self.ranks => Err("another program is on the GPU".to_owned()),
            (used, _) => Ok(used),
        }
    }
}

fn used(context: &RankContext, gauge: Option<&Gauge>) -> Result<Reading> {
    together(context, || gauge.map_or_else(|| Err("there is no GPU".to_owned()), Gauge::read))
}

fn judge(before: Reading, after: Reading, rounds: usize) -> CaseResult {
    match (before, after) {
        (Err(why), _) | (_, Err(why)) => CaseResult::Skipped(why),
        (Ok(before), Ok(after)) if after > before.saturating_add(SLACK) => {
            let (before, after) = (human(before), human(after));
            CaseResult::Failed(format!("{after} after {rounds} more lives, {before} before"))
        }
        _ => CaseResult::Passed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use comm_core::run_threads;

    #[test]
    fn lives_on_host_memory_end_well() {
        let job = LifecycleJob { backend: "host".into(), rounds: SETTLED + 2 };
        let timeout = std::time::Duration::from_secs(20);
        let device = crate::device::HostDevice::default();
        let ends = run_threads(2, timeout, |host| {
            let context = RankContext::of_test(host)?;
            (0..3).try_for_each(|round| live(&job, &context, &device, round))
        });
        for end in ends.unwrap() {
            end.unwrap();
        }
    }

    #[test]
    fn memory_may_differ_by_the_drivers_books_and_no_more() {
        let mib = |count: u64| Ok(count << 20);
        assert_eq!(judge(mib(700), mib(702), 45), CaseResult::Passed);
        assert_eq!(judge(mib(700), mib(100), 45), CaseResult::Passed);
        assert!(matches!(judge(mib(700), mib(703), 45), CaseResult::Failed(_)));
        assert_eq!(judge(mib(700), Err("no".into()), 45), CaseResult::Skipped("no".into()));
    }
}
