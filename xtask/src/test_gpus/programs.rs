//! GPU test programs in a bundle: every file of the folder `tests` beside this program, one after another.

use std::ffi::OsString;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::events::CaseResult;
use crate::job;
use crate::launch::{Exit, LaunchSpec, Mode, launch, lease};
use crate::signal;
use crate::tally::Tally;
use crate::test_gpus::{TestGpusArgs, program_selected, program_tests, report};

/// How the names of programs begin whose ranks can share GPUs.
const SHARERS: &str = "program/comm-p2p__";

/// Lines of a failed program's output that are shown again beside its verdict.
const TAIL: usize = 40;

/// Runs them with the GPUs that there are. Outside a bundle there are none.
///
/// # Errors
/// When a program cannot be started.
pub fn run(args: &TestGpusArgs, gpus: &[String], tally: &mut Tally) -> Result<()> {
    for program in programs()? {
        let name = format!("program/{}", program.file_name().unwrap_or_default().to_string_lossy());
        if !program_selected(args, &name) || signal::interrupted() {
            continue;
        }
        if args.share_gpus && !name.starts_with(SHARERS) {
            let why = "its ranks share no GPUs; run it without --share-gpus";
            report(tally, &name, &CaseResult::Skipped(why.into()), None);
            continue;
        }
        if gpus.is_empty() {
            report(tally, &name, &CaseResult::Skipped("no GPU is usable".into()), None);
            continue;
        }
        eprintln!("running {name} ...");
        one(args, program, gpus, &name, tally)?;
    }
    Ok(())
}

fn one(args: &TestGpusArgs, program: PathBuf, gpus: &[String], name: &str, tally: &mut Tally) -> Result<()> {
    let lines = Arc::new(Mutex::new(String::new()));
    let output = {
        let lines = Arc::clone(&lines);
        Arc::new(move |line: &str| {
            eprintln!("{line}");
            let mut lines = lines.lock().unwrap_or_else(PoisonError::into_inner);
            lines.push_str(line.strip_prefix("[0] ").unwrap_or(line));
            lines.push('\n');
        })
    };
    let timeout = Duration::from_secs(args.program_timeout);
    let base = job::spec(1, Mode::Processes, timeout, Duration::from_secs(30))?;
    let mut env = vec![("COMM_REQUIRE_GPUS".into(), gpus.len().to_string().into())];
    if args.share_gpus {
        let most = args.world.iter().copied().max().unwrap_or(1);
        env.push(("COMM_TEST_WORLD".into(), most.to_string().into()));
    }
    let mut words: Vec<OsString> = vec!["--test-threads=1".into(), "--nocapture".into()];
    words.extend(program_tests(args, name).map(Into::into));
    let spec = LaunchSpec {
        program,
        args: words,
        env,
        share_gpus: args.share_gpus,
        // The tests start ranks of their own and must not take themselves for one.
        standalone: true,
        // The tests use as many as there are, so they wait until no other job has one.
        gpus: gpus.to_vec(),
        _lease: Some(lease(gpus, gpus.len(), job::LEASE_PATIENCE)?),
        output,
        ..base
    };
    let start = Instant::now();
    let outcome = launch(&spec, &mut |_| {})?;
    let lines = lines.lock().unwrap_or_else(PoisonError::into_inner);
    let counts = Tally::of_harness(&lines);
    println!("{name}: {counts} ({:.1} s)", start.elapsed().as_secs_f64());
    *tally += counts;
    match outcome.ranks.first().map(|end| end.exit) {
        Some(Exit::Code(0)) if outcome.leaks.is_empty() => return Ok(()),
        Some(Exit::Code(_)) if counts.failed > 0 && !outcome.timed_out => {}
        _ if outcome.timed_out => {
            let why = format!("still running after {timeout:?} (--program-timeout)");
            report(tally, name, &CaseResult::Failed(why), None);
        }
        exit => {
            let why = format!("{exit:?}; left behind: {:?}", outcome.leaks);
            report(tally, name, &CaseResult::Failed(why), None);
        }
    }
    println!("the end of what {name} said:");
    tail(&lines, TAIL).for_each(|line| println!("    {line}"));
    Ok(())
}

/// The last `count` lines.
fn tail(text: &str, count: usize) -> impl Iterator<Item = &str> {
    let before = text.lines().count().saturating_sub(count);
    text.lines().skip(before)
}

fn programs() -> Result<Vec<PathBuf>> {
    let exe = std::env::current_exe().context("finding this program's own path")?;
    let Some(folder) = exe.parent().map(|folder| folder.join("tests")) else { return Ok(Vec::new()) };
    let Ok(entries) = std::fs::read_dir(&folder) else { return Ok(Vec::new()) };
    let mut programs: Vec<PathBuf> = (entries.flatten())
        .filter(|entry| {
            entry.metadata().is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
        })
        .map(|entry| entry.path())
        .collect();
    programs.sort();
    Ok(programs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tail_is_the_last_lines() {
        assert_eq!(tail("a\nb\nc\n", 2).collect::<Vec<_>>(), ["b", "c"]);
        assert_eq!(tail("a\n", 2).collect::<Vec<_>>(), ["a"]);
    }
}
