//! One rank's part of a fault test: collectives without end, until one fails; then a new communicator in this process. In
//! the end no more descriptors are open than before the communicator that failed was made.
//!
//! This reports what the rank saw and when. Whether that is right is judged by the program that started the ranks, which
//! knows when the fault happened.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use comm_core::{CommError, CreateContext, DType, DeviceComm, HostComm, HostCommExt, ReduceOp};
use serde::{Deserialize, Serialize};

use crate::backends;
use crate::bench::data::{Content, Segment, pattern};
use crate::bench::measure::Buffer;
use crate::device::Device;
use crate::events::{CaseResult, Event, GoodCall, monotonic_nanos};
use crate::launch::{FAULT_POINT, Fault, FaultKind};
use crate::rank::RankContext;
use crate::rank::descriptors::Descriptors;

/// The case that reports whether the survivors could go on.
pub const GOES_ON: &str = "a new communicator in the same process";
/// The case that reports, where each rank is a process, whether a survivor has as few descriptors open as before.
pub const NOTHING_OPEN: &str = "no more descriptors than before";

/// Elements of the collectives: 1 MiB, so that they take several of a backend's steps.
const COUNT: usize = 1 << 18;
/// Between the ranks' start and a fault that a rank brings about itself.
const LEAD: Duration = Duration::from_millis(200);
/// Calls in one captured graph.
const GRAPH_CALLS: usize = 20;

/// A fault test.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct FaultJob {
    /// The backend's name.
    pub backend: String,
    /// What goes wrong.
    pub fault: Fault,
    /// Whether the collectives run inside a replayed graph.
    pub graph: bool,
    /// The communicator's timeout.
    pub timeout: Duration,
}

/// Runs the test's part.
///
/// # Errors
/// When the ranks could not be brought to the fault, or nothing failed after it.
pub fn run(job: &FaultJob, context: &RankContext) -> Result<()> {
    let device = context.open_device(&job.backend)?;
    let memory = device.memory();
    let (send, recv) = (Buffer::new(memory, COUNT * 4)?, Buffer::new(memory, COUNT * 4)?);
    // SAFETY: both buffers hold `COUNT` f32 elements and outlive the work, which is waited for or abandoned below.
    let all_reduce = |comm: &dyn DeviceComm| unsafe {
        comm.all_reduce(send.addr, recv.addr, COUNT, DType::F32, ReduceOp::Sum, memory.stream())
    };
    // Threads of one process open and close what all of them see.
    let opened = match context.host.same_process() {
        true => None,
        false => {
            // Driver and libraries open what they keep for as long as the process lives when something is first done. So
            // all is done once before.
            warm_up(job, context, &*device, &all_reduce)
                .context("a communicator before the one that fails")?;
            Some(Descriptors::settled()?)
        }
    };
    let comm = create(job, &context.host, &*device)?;
    // One good call, so that the fault meets a communicator at work and not one that still connects.
    all_reduce(&*comm)?;
    memory.synchronize()?;
    context.host.all_gather(&0_u8)?;
    let am_hit = context.host.rank() == job.fault.rank;
    context.events.phase(FAULT_POINT);

    if am_hit && job.fault.kind == FaultKind::Late {
        // Until the others have given up, and some more: they must miss a rank that is there.
        std::thread::sleep(job.timeout + Duration::from_secs(2));
        return Ok(());
    }
    let aborter = (am_hit && job.fault.kind == FaultKind::Abort).then(|| {
        let comm = Arc::clone(&comm);
        std::thread::spawn(move || {
            std::thread::sleep(LEAD);
            comm.abort();
        })
    });
    let start = Instant::now();
    let give_up = job.timeout * 2 + Duration::from_secs(3);
    let mut broken = false;
    let mut before: Option<GoodCall> = None;
    let error = loop {
        let began = monotonic_nanos();
        let result = if job.graph {
            device.replay(GRAPH_CALLS, &mut || all_reduce(&*comm), &mut || comm.poll())
        } else {
            all_reduce(&*comm).and_then(|()| device.wait(&mut || comm.poll()))
        };
        // What the communicator knows says more than what its abort did to the device's work.
        let result = comm.poll().and(result);
        let returned = monotonic_nanos();
        if let Err(error) = result {
            context.events.emit(Event::Failed { error: error.clone(), began, returned, before });
            break error;
        }
        let index = before.map_or(0, |good| good.index + 1);
        before = Some(GoodCall { index, began, returned });
        if start.elapsed() > give_up {
            bail!("{give_up:?} after the fault no call had failed");
        }
        if am_hit && job.fault.kind == FaultKind::CudaError && !broken && start.elapsed() > LEAD {
            device.break_it()?;
            broken = true;
        }
    };
    if let Some(aborter) = aborter {
        let _ = aborter.join();
    }
    drop(comm);
    context.events.emit(Event::Dropped { at: monotonic_nanos() });
    if am_hit {
        // Stays for longer than the others may take, so that they see the fault itself and not this process's end.
        std::thread::sleep(job.timeout.min(Duration::from_secs(2)));
        return Ok(());
    }
    let result = match go_on(job, context, &*device).with_context(|| format!("after {error}")) {
        Ok(()) => CaseResult::Passed,
        Err(error) => CaseResult::Failed(format!("{error:#}")),
    };
    context.events.emit(Event::Case { name: GOES_ON.to_owned(), result });
    if let Some(opened) = opened {
        context.events.phase("counting open descriptors");
        let result = match opened.grown()?.as_slice() {
            [] => CaseResult::Passed,
            more => CaseResult::Failed(more.join(", ")),
        };
        context.events.emit(Event::Case { name: NOTHING_OPEN.to_owned(), result });
    }
    Ok(())
}

/// A communicator that does what the one that fails will do, and ends well.
fn warm_up(
    job: &FaultJob,
    context: &RankContext,
    device: &dyn Device,
    all_reduce: &dyn Fn(&dyn DeviceComm) -> Result<(), CommError>,
) -> Result<()> {
    let comm = create(job, &context.host, device)?;
    all_reduce(&*comm)?;
    device.wait(&mut || comm.poll())?;
    if job.graph {
        device.replay(GRAPH_CALLS, &mut || all_reduce(&*comm), &mut || comm.poll())?;
    }
    comm.close()?;
    context.host.all_gather(&0_u8)?;
    Ok(())
}

/// The ranks that the fault did not hit meet anew, and get a right result.
fn go_on(job: &FaultJob, context: &RankContext, device: &dyn Device) -> Result<()> {
    context.events.phase("meeting again");
    let (rank, world) = (context.host.rank(), context.host.size() - 1);
    let rank = if rank > job.fault.rank { rank - 1 } else { rank };
    let host = context.meet_again(rank, world)?;
    let comm = create(job, &host, device)?;
    let memory = device.memory();
    let (send, recv) = (Buffer::new(memory, COUNT * 4)?, Buffer::new(memory, COUNT * 4)?);
    let (op, dtype) = (ReduceOp::Sum, DType::F32);
    let pattern = pattern(0xafae, Some(op), world);
    let whole = |content| Segment { offset: 0, count: COUNT, content };
    // SAFETY: both buffers hold `COUNT` f32 elements and outlive the work, which `synchronize` waits for.
    let wrong = unsafe {
        device.poison(recv.addr, recv.bytes)?;
        device.fill(send.addr, &pattern, dtype, &whole(Content::Of { rank, first: 0 }))?;
        comm.all_reduce(send.addr, recv.addr, COUNT, dtype, op, memory.stream())?;
        memory.synchronize()?;
        device.wrong(recv.addr, &pattern, dtype, &whole(Content::Reduced { op, first: 0 }))?
    };
    comm.close()?;
    // The first of the survivors relays the others' calls, so nobody leaves before all are through.
    host.all_gather(&0_u8)?;
    if wrong > 0 { bail!("{wrong} of {COUNT} elements are wrong") } else { Ok(()) }
}

fn create(
    job: &FaultJob,
    host: &Arc<dyn HostComm>,
    device: &dyn Device,
) -> Result<Arc<dyn DeviceComm>, CommError> {
    let context = CreateContext {
        host: Arc::clone(host),
        memory: device.memory().kind(),
        timeout: job.timeout,
        checked: false,
        options: std::collections::BTreeMap::default(),
    };
    backends::registry().create(&job.backend, &context)
}
