//! Communicators one after another in the same processes: what one of them leaves behind adds up and is seen.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::events::{CaseResult, Event};
use crate::job;
use crate::launch::{LaunchSpec, Mode};
use crate::rank::{FLAT_DESCRIPTORS, FLAT_MEMORY, Job, LifecycleJob};
use crate::tally::Tally;
use crate::test_gpus::{TestGpusArgs, World, report, selected};

/// The communicators' timeout.
const PATIENCE: Duration = Duration::from_secs(20);
/// Communicators in each process.
const ROUNDS: usize = 50;
/// The same with `--quick`, and for NCCL, which takes a second for each.
const FEW_ROUNDS: usize = 12;

/// Runs the test. As processes: threads of one see each other's descriptors.
///
/// # Errors
/// When ranks cannot be started.
pub fn run(args: &TestGpusArgs, world: &World, gpus: &[String], tally: &mut Tally) -> Result<()> {
    let test = "lifecycle/one-after-another";
    if world.mode == Mode::Threads || world.size < 2 || !selected(args, world, test) {
        return Ok(());
    }
    let name = format!("{} {test}", world.name());
    eprintln!("running {name} ...");
    let rounds = if args.quick || world.backend.name == comm_nccl::NAME { FEW_ROUNDS } else { ROUNDS };
    let start = Instant::now();
    let result = one(args, world, gpus, rounds)?;
    report(tally, &name, &result, Some(start.elapsed()));
    Ok(())
}

fn one(args: &TestGpusArgs, world: &World, gpus: &[String], rounds: usize) -> Result<CaseResult> {
    let spec = job::spec(world.size, world.mode, Duration::from_secs(args.timeout), PATIENCE)?;
    let spec = spec.sharing(args.shares(world, gpus)).with_gpus(gpus, world.backend.on_gpus)?;
    let words = Arc::new(Mutex::new(Vec::new()));
    let output = {
        let words = Arc::clone(&words);
        Arc::new(move |line: &str| {
            words.lock().unwrap_or_else(PoisonError::into_inner).push(line.to_owned());
        })
    };
    let spec = LaunchSpec { output, ..spec };
    let lives = LifecycleJob { backend: world.backend.name.into(), rounds };
    let mut cases = Vec::new();
    let outcome = job::launch_job(spec, &Job::Lifecycle(lives), &mut |message| {
        if let Event::Case { name, result } = &message.event {
            cases.push((message.rank, name.clone(), result.clone()));
        }
    })?;
    let mut problems = problems(world, &cases);
    problems.extend(outcome.problem());
    if problems.is_empty() {
        return Ok(CaseResult::Passed);
    }
    words.lock().unwrap_or_else(PoisonError::into_inner).iter().for_each(|line| eprintln!("    {line}"));
    Ok(CaseResult::Failed(problems.join("; ")))
}

/// Every rank must have said of everything that it is flat; of memory that nobody can tell, why.
fn problems(world: &World, cases: &[(usize, String, CaseResult)]) -> Vec<String> {
    let expected =
        if world.backend.on_gpus { &[FLAT_DESCRIPTORS, FLAT_MEMORY][..] } else { &[FLAT_DESCRIPTORS] };
    let mut problems = Vec::new();
    for (rank, expected) in (0..world.size).flat_map(|rank| expected.iter().map(move |case| (rank, *case))) {
        match cases.iter().find(|(of, name, _)| *of == rank && name == expected) {
            Some((.., CaseResult::Passed)) => {}
            Some((.., CaseResult::Skipped(why))) => {
                println!("     rank {rank}: not known that {expected}: {why}")
            }
            Some((.., CaseResult::Failed(why) | CaseResult::NotRun(why))) => {
                problems.push(format!("rank {rank}, {expected}: {why}"));
            }
            None => problems.push(format!("rank {rank} did not say that {expected}")),
        }
    }
    problems
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backends;

    #[test]
    fn every_rank_must_have_said_that_everything_is_flat() {
        let world = |name| World { backend: backends::find(name).unwrap(), size: 2, mode: Mode::Processes };
        let case = |rank, name: &str, result| (rank, name.to_owned(), result);
        let flat = [0, 1].map(|rank| case(rank, FLAT_DESCRIPTORS, CaseResult::Passed));
        assert!(problems(&world("host"), &flat).is_empty());
        assert_eq!(problems(&world("host"), &flat[..1]).len(), 1);
        // On GPUs their memory as well, unless nobody can tell.
        assert_eq!(problems(&world("p2p"), &flat).len(), 2);
        let memory = |rank, result| case(rank, FLAT_MEMORY, result);
        let untold = memory(0, CaseResult::Skipped("no".into()));
        let grown = memory(1, CaseResult::Failed("90 MiB".into()));
        let all = [&flat[..], &[untold, grown]].concat();
        let told = problems(&world("p2p"), &all);
        assert!(told.len() == 1 && told[0].contains("rank 1") && told[0].contains("90 MiB"), "{told:?}");
    }
}
