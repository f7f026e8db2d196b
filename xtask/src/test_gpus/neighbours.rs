//! Two jobs at once on the same GPUs: neither must see anything of the other.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::events::{CaseResult, Event};
use crate::gpus;
use crate::job;
use crate::launch::{LaunchSpec, Mode, lease};
use crate::rank::{ConformanceJob, Job};
use crate::tally::Tally;
use crate::test_gpus::{TestGpusArgs, World, problem_of, report, selected};

/// The communicators' timeout. Where two processes share a GPU they take turns, so everything takes longer.
const PATIENCE: Duration = Duration::from_secs(20);
/// What each of the jobs does: enough to be at work at the same time.
const CASES: &str = "all_reduce";

/// Runs the test, `--repeat` times. Ranks as threads of one process are no two jobs.
///
/// # Errors
/// When ranks cannot be started.
pub fn run(args: &TestGpusArgs, world: &World, gpus: &[String], tally: &mut Tally) -> Result<()> {
    let test = "neighbours/two-jobs";
    if world.mode == Mode::Threads || world.size < 2 || !selected(args, world, test) {
        return Ok(());
    }
    for run in 1..=args.repeat {
        let number = if args.repeat > 1 { format!(" #{run}") } else { String::new() };
        let start = Instant::now();
        let result = both(world, gpus, args.shares(world, gpus), Duration::from_secs(args.timeout))?;
        report(tally, &format!("{} {test}{number}", world.name()), &result, Some(start.elapsed()));
    }
    Ok(())
}

fn both(world: &World, gpus: &[String], share: bool, timeout: Duration) -> Result<CaseResult> {
    let count = gpus::needed(world.size, gpus.len(), share);
    let leased = world.backend.on_gpus.then(|| lease(gpus, count, job::LEASE_PATIENCE)).transpose()?;
    let seats = leased.as_ref().map_or_else(Vec::new, |lease| lease.gpus().to_vec());
    let seats = &seats;
    let ends = std::thread::scope(|scope| {
        let jobs = [0, 1].map(|_| scope.spawn(move || one(world, seats, share, timeout)));
        jobs.map(|job| job.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    });
    let mut problems = Vec::new();
    for (number, end) in ends.into_iter().enumerate() {
        problems.extend(end?.into_iter().map(|problem| format!("job {number}: {problem}")));
    }
    Ok(if problems.is_empty() { CaseResult::Passed } else { CaseResult::Failed(problems.join("; ")) })
}

/// One of the jobs; what went wrong in it, if anything did.
fn one(world: &World, seats: &[String], share: bool, timeout: Duration) -> Result<Vec<String>> {
    let suite =
        ConformanceJob { backend: world.backend.name.into(), filter: Some(CASES.into()), quick: true };
    let spec = job::spec(world.size, world.mode, timeout, PATIENCE)?.sharing(share);
    let words = std::sync::Arc::new(Mutex::new(Vec::new()));
    let output = {
        let words = std::sync::Arc::clone(&words);
        std::sync::Arc::new(move |line: &str| {
            words.lock().unwrap_or_else(PoisonError::into_inner).push(line.to_owned());
        })
    };
    let spec = LaunchSpec { gpus: seats.to_vec(), output, ..spec };
    let (mut ran, mut problems) = (0, Vec::new());
    let outcome = job::launch_job(spec, &Job::Conformance(suite), &mut |message| {
        if let Event::Case { name, result } = &message.event {
            ran += 1;
            if let CaseResult::Failed(why) | CaseResult::NotRun(why) = result {
                problems.push(format!("{name}: {why}"));
            }
        }
    })?;
    problems.extend(problem_of(&outcome, ran));
    if !problems.is_empty() {
        words.lock().unwrap_or_else(PoisonError::into_inner).iter().for_each(|line| eprintln!("    {line}"));
    }
    Ok(problems)
}
