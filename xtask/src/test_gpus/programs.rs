//! GPU test programs in a bundle: every file of the folder `tests` beside this program, one after another.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::events::CaseResult;
use crate::job;
use crate::launch::{Exit, LaunchSpec, Mode, launch};
use crate::signal;
use crate::tally::Tally;
use crate::test_gpus::{TestGpusArgs, report, selected};

/// Runs them with the GPUs that there are. Outside a bundle there are none.
///
/// # Errors
/// When a program cannot be started.
pub fn run(args: &TestGpusArgs, gpus: usize, tally: &mut Tally) -> Result<()> {
    for program in programs()? {
        let name = format!("program/{}", program.file_name().unwrap_or_default().to_string_lossy());
        if !selected(args, &name) || signal::interrupted() {
            continue;
        }
        if gpus == 0 {
            report(tally, &name, &CaseResult::Skipped("no GPU is usable".into()), None);
            continue;
        }
        eprintln!("running {name} ...");
        one(args, program, gpus, &name, tally)?;
    }
    Ok(())
}

fn one(args: &TestGpusArgs, program: PathBuf, gpus: usize, name: &str, tally: &mut Tally) -> Result<()> {
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
    let timeout = Duration::from_secs(args.timeout);
    let base = job::spec(1, Mode::Processes, timeout, Duration::from_secs(30))?;
    let spec = LaunchSpec {
        program,
        args: vec!["--test-threads=1".into(), "--nocapture".into()],
        // The tests start ranks of their own and must not take themselves for one.
        env: vec![("COMM_REQUIRE_GPUS".into(), gpus.to_string().into())],
        standalone: true,
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
        Some(Exit::Code(0)) if outcome.leaks.is_empty() => {}
        Some(Exit::Code(_)) if counts.failed > 0 => {}
        exit => {
            let why = format!("{exit:?}; left behind: {:?}; timed out: {}", outcome.leaks, outcome.timed_out);
            report(tally, name, &CaseResult::Failed(why), None);
        }
    }
    Ok(())
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
