//! The fault tests: for each fault a world of ranks, the fault, and the verdict on what the ranks saw.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::events::{CaseResult, Event};
use crate::job;
use crate::launch::{Exit, Fault, FaultKind, LaunchReport, LaunchSpec, Mode, lease};
use crate::rank::{FaultJob, GOES_ON, Job, NOTHING_OPEN};
use crate::signal;
use crate::tally::Tally;
use crate::test_gpus::verdict::{Evidence, Seen, judge};
use crate::test_gpus::{TestGpusArgs, World, report, selected};

/// The communicator's timeout in fault tests.
const TIMEOUT: Duration = Duration::from_secs(3);
/// The same with `--quick`, on host memory. On GPUs the survivors' new communicator must be made within it, too.
const QUICK_TIMEOUT: Duration = Duration::from_secs(1);
/// The timeout of the ranks' own meeting, which includes starting on their GPUs.
const MEETING: Duration = Duration::from_secs(60);

/// One run of a fault test.
struct Run<'a> {
    name: String,
    fault: &'a Fault,
    graph: bool,
}

/// Runs every fault that fits the world, `--repeat` times each, `--parallel` of them at a time.
///
/// # Errors
/// When ranks cannot be started.
pub fn run(
    args: &TestGpusArgs,
    faults: &Option<Vec<Fault>>,
    world: &World,
    gpus: &[String],
    tally: &mut Tally,
) -> Result<()> {
    if world.size < 2 {
        return Ok(());
    }
    let share = args.shares(world, gpus);
    let timeout = if args.quick && !world.backend.on_gpus { QUICK_TIMEOUT } else { TIMEOUT };
    let chosen = faults.clone().unwrap_or_else(|| standard(world.size));
    let mut runs = Vec::new();
    for fault in &chosen {
        for case in ["eager", "graph"] {
            if fault.case.as_deref().is_some_and(|only| only != case) {
                continue;
            }
            let test = format!("fault/{}:{}@{case}", fault.kind.name(), fault.rank);
            if !selected(args, world, &test) {
                continue;
            }
            let name = format!("{} {test}", world.name());
            if let Some(reason) = does_not_fit(fault, world, case == "graph", share) {
                // Only what was asked for by name is worth a line; the standard set is simply what fits.
                if faults.is_some() {
                    report(tally, &name, &CaseResult::Skipped(reason), None);
                }
                continue;
            }
            for run in 1..=args.repeat {
                let name = if args.repeat > 1 { format!("{name} #{run}") } else { name.clone() };
                runs.push(Run { name, fault, graph: case == "graph" });
            }
        }
    }
    if args.parallel < 2 || runs.len() < 2 {
        return runs
            .iter()
            .try_for_each(|run| carry_out(run, world, None, gpus, timeout, &Mutex::new(&mut *tally)));
    }
    // The runs share the GPUs with one another, and with nobody else.
    let _lease = world.backend.on_gpus.then(|| lease(gpus, gpus.len(), job::LEASE_PATIENCE)).transpose()?;
    let (next, tally) = (AtomicUsize::new(0), Mutex::new(tally));
    let work = |worker: usize| -> Result<()> {
        let seats = seats(gpus, world.size, worker);
        while let Some(run) = runs.get(next.fetch_add(1, Ordering::Relaxed)) {
            carry_out(run, world, Some(&seats), gpus, timeout, &tally)?;
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let work = &work;
        let workers: Vec<_> =
            (0..args.parallel.min(runs.len())).map(|worker| scope.spawn(move || work(worker))).collect();
        let ends = workers.into_iter().map(|worker| match worker.join() {
            Ok(end) => end,
            Err(panic) => std::panic::resume_unwind(panic),
        });
        // All are waited for, whatever one says.
        ends.fold(Ok(()), Result::and)
    })
}

/// The GPUs of the worlds of one worker: those next to the worker's before, beginning anew where there are no more.
fn seats(gpus: &[String], world: usize, worker: usize) -> Vec<String> {
    let start = worker * world % gpus.len().max(1);
    gpus.iter().cycle().skip(start).take(world.min(gpus.len())).cloned().collect()
}

fn carry_out(
    run: &Run<'_>,
    world: &World,
    seats: Option<&[String]>,
    gpus: &[String],
    timeout: Duration,
    tally: &Mutex<&mut Tally>,
) -> Result<()> {
    if signal::interrupted() {
        return Ok(());
    }
    let start = Instant::now();
    let result = one(run.fault, run.graph, world, seats, gpus, timeout)?;
    if !signal::interrupted() {
        let mut tally = tally.lock().unwrap_or_else(PoisonError::into_inner);
        report(&mut tally, &run.name, &result, Some(start.elapsed()));
    }
    Ok(())
}

/// The last rank and rank 0, whose process relays the host communicator's calls, by turns.
fn standard(world: usize) -> Vec<Fault> {
    let hit = |kind, rank| Fault { kind, rank, case: None };
    let mut faults: Vec<Fault> = FaultKind::ALL.into_iter().map(|kind| hit(kind, world - 1)).collect();
    faults.push(hit(FaultKind::Kill, 0));
    faults.push(hit(FaultKind::Stop, 0));
    faults
}

fn does_not_fit(fault: &Fault, world: &World, graph: bool, share: bool) -> Option<String> {
    if share {
        return Some(
            "ranks that share a GPU also wait for one another's driver calls: nothing to time".into(),
        );
    }
    if fault.rank >= world.size {
        return Some(format!("there is no rank {}", fault.rank));
    }
    if fault.kind.is_signal() && world.mode == Mode::Threads {
        return Some("a signal would hit all threads".into());
    }
    if fault.kind == FaultKind::CudaError && !world.backend.on_gpus {
        return Some("host memory has no device that could fail".into());
    }
    if fault.kind == FaultKind::CudaError && world.mode == Mode::Threads {
        return Some("a CUDA error that stays may hit every GPU of the process".into());
    }
    if fault.kind == FaultKind::CudaError && graph {
        return Some("a device that fails does so between operations, whoever issued them".into());
    }
    (graph && !world.backend.on_gpus).then(|| "host memory has no graphs".into())
}

/// `seats`: the GPUs to use, which somebody has leased; without them the world leases its own out of `gpus`.
fn one(
    fault: &Fault,
    graph: bool,
    world: &World,
    seats: Option<&[String]>,
    gpus: &[String],
    timeout: Duration,
) -> Result<CaseResult> {
    let job =
        Job::Fault(FaultJob { backend: world.backend.name.into(), fault: fault.clone(), graph, timeout });
    // Until the fault point the ranks start and connect; from there on they must notice the fault, leave and go on.
    let bound = timeout * 3 + Duration::from_secs(10);
    let spec = job::spec(world.size, world.mode, MEETING + bound, MEETING)?;
    let mut spec = match seats {
        Some(seats) if world.backend.on_gpus => LaunchSpec { gpus: seats.to_vec(), ..spec },
        _ => spec.with_gpus(gpus, world.backend.on_gpus)?,
    };
    spec.fault = Some(fault.clone());
    spec.after_fault_point = Some(bound);
    // Ranks complain about the fault, as they should; their words matter only when the verdict is bad.
    let words = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    spec.output = {
        let words = std::sync::Arc::clone(&words);
        std::sync::Arc::new(move |line: &str| {
            words.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(line.to_owned());
        })
    };
    let (mut seen, mut went_on, mut counted) = (Vec::new(), Vec::new(), Vec::new());
    let outcome = job::launch_job(spec, &job, &mut |message| match &message.event {
        Event::Failed { error, began, returned, before } => {
            let (rank, error) = (message.rank, error.clone());
            let (began, returned, before) = (*began, *returned, *before);
            seen.push(Seen { rank, error, began, returned, before, dropped: None });
        }
        Event::Dropped { at } => {
            seen.iter_mut()
                .filter(|seen| seen.rank == message.rank)
                .for_each(|seen| seen.dropped = Some(*at));
        }
        Event::Case { name, result } if name == GOES_ON => went_on.push((message.rank, result.clone())),
        Event::Case { name, result } if name == NOTHING_OPEN => counted.push((message.rank, result.clone())),
        _ => {}
    })?;
    let evidence = Evidence {
        fault,
        world: world.size,
        timeout,
        fault_at: outcome.fault_at,
        seen: &seen,
        went_on: &went_on,
    };
    let mut problems = judge(&evidence);
    if world.mode == Mode::Processes {
        problems.extend(left_open(fault.rank, world.size, &counted));
    }
    problems.extend(bad_ends(&outcome, fault, world.mode));
    if problems.is_empty() {
        return Ok(CaseResult::Passed);
    }
    let words = words.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    for line in words.iter().chain(&evidence.history()) {
        eprintln!("    {line}");
    }
    Ok(CaseResult::Failed(problems.join("; ")))
}

/// Survivors must have counted their descriptors, and no more than before.
fn left_open(hit: usize, world: usize, counted: &[(usize, CaseResult)]) -> Vec<String> {
    let problem = |rank| match counted.iter().find(|(other, _)| *other == rank) {
        Some((_, CaseResult::Passed)) => None,
        Some((_, CaseResult::Failed(more))) => Some(format!("rank {rank} left descriptors open: {more}")),
        other => Some(format!("rank {rank} did not count its descriptors: {:?}", other.map(|(_, how)| how))),
    };
    (0..world).filter(|&rank| rank != hit).filter_map(problem).collect()
}

/// Survivors must have ended by themselves, and nothing may be left behind.
fn bad_ends(outcome: &LaunchReport, fault: &Fault, mode: Mode) -> Vec<String> {
    let mut problems: Vec<String> = outcome.leaks.iter().map(|leak| format!("left behind: {leak}")).collect();
    if outcome.timed_out {
        problems.push("time was up".into());
    }
    for (rank, end) in outcome.ranks.iter().enumerate() {
        let hit = mode == Mode::Processes && rank == fault.rank;
        if !hit && (end.exit != Exit::Code(0) || !end.done) {
            problems.push(format!("rank {rank} ended with {:?} in: {}", end.exit, end.last_phase));
        }
    }
    problems
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backends;

    #[test]
    fn worlds_side_by_side_use_all_gpus_and_none_twice() {
        let gpus: Vec<String> = (0..8).map(|gpu| gpu.to_string()).collect();
        let first: Vec<_> = (0..5).map(|worker| seats(&gpus, 2, worker)[0].clone()).collect();
        assert_eq!(first, ["0", "2", "4", "6", "0"]);
        assert_eq!(seats(&gpus, 3, 2), ["6", "7", "0"]);
        assert_eq!(seats(&gpus, 8, 3), gpus);
        assert!(seats(&[], 2, 1).is_empty());
    }

    #[test]
    fn survivors_must_have_closed_everything_and_said_so() {
        let passed = |rank| (rank, CaseResult::Passed);
        assert!(left_open(1, 3, &[passed(0), passed(2)]).is_empty());
        let open = left_open(1, 3, &[passed(0), (2, CaseResult::Failed("4 of socket, before 3".into()))]);
        assert!(open.len() == 1 && open[0].contains("rank 2") && open[0].contains("4 of socket"), "{open:?}");
        assert!(left_open(0, 2, &[])[0].contains("rank 1 did not count"));
    }

    #[test]
    fn only_faults_that_make_sense_are_run() {
        let world = |name, mode| World { backend: backends::find(name).unwrap(), size: 2, mode };
        let kill = Fault { kind: FaultKind::Kill, rank: 1, case: None };
        assert!(does_not_fit(&kill, &world("nccl", Mode::Processes), true, false).is_none());
        // Whatever else holds, not on shared GPUs.
        assert!(does_not_fit(&kill, &world("nccl", Mode::Processes), true, true).is_some());
        assert!(does_not_fit(&kill, &world("nccl", Mode::Threads), true, false).is_some());
        assert!(does_not_fit(&kill, &world("host", Mode::Processes), true, false).is_some());
        assert!(
            does_not_fit(&Fault { rank: 2, ..kill }, &world("host", Mode::Processes), false, false).is_some()
        );
        assert_eq!(standard(4).iter().filter(|fault| fault.rank == 0).count(), 2);
    }
}
