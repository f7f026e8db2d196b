//! `cargo xtask sanitize`: every kernel of comm-kernels and comm-p2p under NVIDIA's compute-sanitizer, tool
//! by tool; a process per rank, or a thread. A kernel that was compiled and not launched is a failure, unless there is a
//! reason to leave it out (`rank/sweep/coverage.rs`).
//!
//! What each tool can and cannot see: `memcheck` and `synccheck` see all of it. `racecheck` sees shared memory only;
//! what the GPUs tell each other through flags and packs is proved by other tests. It knows barriers alone, so the sums
//! in steps, whose warps hand over by words that are released and acquired, are left out: a model checks those
//! (`comm-p2p/tests/protocol/handoff.rs`). `initcheck` does not see what another
//! process stores, so the memory that peers write counts as initialised: the communicator clears it beforehand. What it
//! checks is everything that a rank writes for itself: operands, results, counters, flags.

mod find;
mod summary;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use clap::{Args, ValueEnum};

use self::find::Sanitizer;
use crate::events::{CaseResult, Event};
use crate::gpus;
use crate::job;
use crate::kernels;
use crate::launch::{LaunchReport, LaunchSpec, Mode};
use crate::rank::{Job, SweepJob};
use crate::signal;
use crate::tally::Tally;

/// The exit code of a process in which the tool found something.
const FOUND: i32 = 88;
/// A kernel under a tool is slower by orders of magnitude, and so is loading one.
const COMM_TIMEOUT: Duration = Duration::from_secs(120);
/// What the names of the kernels begin with that racecheck would misjudge.
const NOT_FOR_RACECHECK: [&str; 2] = ["p2p_ars_", "p2p_rss_"];
/// Lines of the tool's report that are shown when there is something wrong.
const SHOWN: usize = 60;

/// A tool of compute-sanitizer.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Tool {
    /// Accesses out of bounds or misaligned, and failed driver calls.
    Memcheck,
    /// Reads of global memory that nobody wrote.
    Initcheck,
    /// Barriers that not all threads reach.
    Synccheck,
    /// Races on shared memory.
    Racecheck,
    /// None: the same kernels by themselves, to see that their results are right.
    Plain,
}

impl Tool {
    const fn name(self) -> &'static str {
        match self {
            Self::Memcheck => "memcheck",
            Self::Initcheck => "initcheck",
            Self::Synccheck => "synccheck",
            Self::Racecheck => "racecheck",
            Self::Plain => "plain",
        }
    }
}

/// Options of `cargo xtask sanitize`.
#[derive(Args, Debug)]
pub struct SanitizeArgs {
    /// Tools, comma separated.
    #[arg(long, value_delimiter = ',', default_value = "memcheck,initcheck,synccheck,racecheck")]
    tool: Vec<Tool>,
    /// The program; if not given, the newest on the PATH and in CUDA toolkits, or one from PyPI if those are too old.
    #[arg(long, value_name = "PATH")]
    sanitizer: Option<PathBuf>,
    /// Ranks, a GPU each. Eight run the kernels for hybrid cube meshes as well.
    #[arg(long, default_value_t = 2)]
    world: usize,
    /// Where there are fewer GPUs than ranks, let several ranks be on each, in turn.
    #[arg(long)]
    share_gpus: bool,
    /// How the ranks run [default: processes; where they share GPUs, threads: processes take turns on a GPU].
    #[arg(long, value_enum)]
    mode: Option<Mode>,
    /// Every tool ends after this many seconds.
    #[arg(long, default_value_t = 480)]
    timeout: u64,
    /// Fail, instead of skipping, when fewer GPUs are usable or there is no compute-sanitizer.
    #[arg(long, value_name = "N")]
    require_gpus: Option<usize>,
    /// Also show what the tools say when all is well.
    #[arg(long)]
    verbose: bool,
}

impl SanitizeArgs {
    /// Whether some ranks share a GPU, of so many.
    const fn shares(&self, gpus: usize) -> bool {
        self.share_gpus && gpus < self.world
    }

    /// How the ranks run on so many GPUs.
    fn mode(&self, gpus: usize) -> Mode {
        self.mode.unwrap_or(if self.shares(gpus) { Mode::Threads } else { Mode::Processes })
    }
}

/// Runs the command and prints the tally as the last line.
///
/// # Errors
/// When a tool found something or did not end well, or too few GPUs are usable.
pub fn run(args: &SanitizeArgs) -> Result<()> {
    let mut tally = Tally::default();
    let result = run_tools(args, &mut tally);
    if result.is_err() {
        tally.failed = tally.failed.max(1);
    }
    println!("{tally}");
    result?;
    ensure!(tally.failed == 0, "{} tools failed", tally.failed);
    Ok(())
}

fn run_tools(args: &SanitizeArgs, tally: &mut Tally) -> Result<()> {
    ensure!(args.world >= 2, "--world must be at least 2: most kernels are for ranks that have peers");
    let ready = ready(args);
    let (sanitizer, gpus) = match ready {
        Ok(ready) => ready,
        Err(reason) if args.require_gpus.is_some() => bail!(reason),
        Err(reason) => {
            for tool in &args.tool {
                report(tally, *tool, &CaseResult::Skipped(reason.clone()), Duration::ZERO);
            }
            return Ok(());
        }
    };
    kernels::ensure()?;
    for &tool in &args.tool {
        let start = Instant::now();
        let result = match one(args, tool, sanitizer.as_ref(), &gpus)? {
            CaseResult::Skipped(why) if args.require_gpus.is_some() => CaseResult::Failed(why),
            result => result,
        };
        if signal::interrupted() {
            bail!("interrupted");
        }
        report(tally, tool, &result, start.elapsed());
    }
    Ok(())
}

/// compute-sanitizer, if a tool of it is wanted, and the GPUs; or why there is nothing to run with.
fn ready(args: &SanitizeArgs) -> Result<(Option<Sanitizer>, Vec<String>), String> {
    let gpus = gpus::visible()?;
    let needed = gpus::needed(args.world, gpus.len(), args.share_gpus).max(args.require_gpus.unwrap_or(0));
    if gpus.len() < needed {
        return Err(format!("{needed} GPUs are needed; {} are usable", gpus.len()));
    }
    let wanted = args.tool.iter().any(|&tool| tool != Tool::Plain);
    let sanitizer = wanted
        .then(|| find::sanitizer(args.sanitizer.as_deref(), kernels::target_of_source_tree().as_deref()))
        .transpose()?;
    Ok((sanitizer, gpus))
}

fn report(tally: &mut Tally, tool: Tool, result: &CaseResult, took: Duration) {
    tally.count(result);
    let (name, took) = (tool.name(), took.as_secs_f64());
    match result {
        CaseResult::Passed => println!("ok   sanitize/{name} ({took:.1} s)"),
        CaseResult::Failed(why) | CaseResult::NotRun(why) => {
            println!("FAIL sanitize/{name} ({took:.1} s): {why}");
        }
        CaseResult::Skipped(why) => println!("SKIP sanitize/{name}: {why}"),
    }
}

/// The tool's command line in front of this program's own as a rank.
fn words(tool: Tool, runner: &Path) -> Vec<std::ffi::OsString> {
    let found = FOUND.to_string();
    let mut words: Vec<std::ffi::OsString> = [
        "--tool",
        tool.name(),
        "--error-exitcode",
        &found,
        "--print-limit",
        "200",
        "--launch-timeout",
        "120",
    ]
    .map(Into::into)
    .into();
    if tool == Tool::Memcheck {
        // The driver is asked what it may not know (which memory can be exported, which peer is enabled already), and
        // answers are no errors.
        words.extend(["--report-api-errors", "no"].map(Into::into));
    }
    if tool == Tool::Racecheck {
        let excluded =
            NOT_FOR_RACECHECK.map(|name| ["--kernel-name-exclude".into(), format!("kns={name}").into()]);
        words.extend(excluded.into_iter().flatten());
    }
    words.extend([runner.into(), job::WORKER_COMMAND.into()]);
    words
}

fn one(
    args: &SanitizeArgs,
    tool: Tool,
    sanitizer: Option<&Sanitizer>,
    gpus: &[String],
) -> Result<CaseResult> {
    if tool == Tool::Initcheck
        && let Some(why) = sanitizer.and_then(Sanitizer::initcheck_problem)
    {
        return Ok(CaseResult::Skipped(why));
    }
    eprintln!("running {} ...", tool.name());
    let mode = args.mode(gpus.len());
    let spec = job::spec(args.world, mode, Duration::from_secs(args.timeout), COMM_TIMEOUT)?;
    let spec = spec.sharing(args.shares(gpus.len())).with_gpus(gpus, true)?;
    let lines = Arc::new(Mutex::new(Vec::new()));
    let output = {
        let (lines, verbose) = (Arc::clone(&lines), args.verbose);
        Arc::new(move |line: &str| {
            if verbose {
                eprintln!("{line}");
            }
            lines.lock().unwrap_or_else(PoisonError::into_inner).push(line.to_owned());
        })
    };
    let mut spec = LaunchSpec { output, ..spec };
    let watched = sanitizer.filter(|_| tool != Tool::Plain);
    if let Some(sanitizer) = watched {
        println!("{} --tool {}", sanitizer.path.display(), tool.name());
        spec = LaunchSpec { args: words(tool, &spec.program), program: sanitizer.path.clone(), ..spec };
    }
    // The check of the GPUs' links is no kernel of its own, and its verdict would be kept.
    spec.env.push(("COMM_P2P_CHECK".to_owned(), "skip".into()));
    // The ranks impose what they need themselves, communicator by communicator.
    spec.env.push(("COMM_P2P_TOPOLOGY".to_owned(), "".into()));
    let (mut passed, mut failed) = (0, Vec::new());
    let outcome = job::launch_job(spec, &Job::Sweep(SweepJob {}), &mut |message| {
        if let Event::Case { name, result } = &message.event {
            match result {
                CaseResult::Passed => passed += 1,
                CaseResult::Skipped(why) => println!("     left out, {name}: {why}"),
                CaseResult::Failed(why) | CaseResult::NotRun(why) => {
                    failed.push(format!("rank {}, {name}: {why}", message.rank));
                }
            }
        }
    })?;
    let lines = lines.lock().unwrap_or_else(PoisonError::into_inner);
    let processes = if mode == Mode::Threads { 1 } else { args.world };
    let result = verdict(&outcome, &lines, watched.map(|_| processes), passed, &failed);
    if matches!(result, CaseResult::Failed(_)) {
        for line in lines.iter().filter(|line| summary::is_of_tool(line)).take(SHOWN) {
            println!("    {line}");
        }
        println!("    the end of what was said:");
        for line in &lines[lines.len().saturating_sub(20)..] {
            println!("    {line}");
        }
    }
    Ok(result)
}

/// All ranks must have reached their end, with every result right, and the tool must have said on each that it found
/// nothing: in each of the `watched` processes.
fn verdict(
    outcome: &LaunchReport,
    lines: &[String],
    watched: Option<usize>,
    passed: usize,
    failed: &[String],
) -> CaseResult {
    if lines.iter().any(|line| line.contains("Device not supported")) {
        return CaseResult::Skipped("compute-sanitizer does not support the device on this machine".into());
    }
    let found: Vec<u64> = lines.iter().filter_map(|line| summary::errors(line)).collect();
    let mut problems = failed.to_vec();
    let errors: u64 = found.iter().sum();
    if errors > 0 {
        problems.push(format!("{errors} errors"));
    }
    if let Some(world) = watched.filter(|&world| found.len() < world) {
        problems.push(format!("{} of {world} processes have a summary", found.len()));
    }
    problems.extend(outcome.problem());
    if passed == 0 {
        problems.push("no kernel ran".into());
    }
    if problems.is_empty() { CaseResult::Passed } else { CaseResult::Failed(problems.join("; ")) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::launch::{Exit, RankEnd};

    fn outcome(code: i32) -> LaunchReport {
        let end = RankEnd { exit: Exit::Code(code), done: true, last_phase: String::new() };
        LaunchReport {
            ranks: vec![end; 2],
            timed_out: false,
            interrupted: false,
            fault_at: None,
            leaks: Vec::new(),
        }
    }

    #[test]
    fn only_a_clean_summary_of_every_rank_passes() {
        let clean = |rank| format!("[{rank}] ========= ERROR SUMMARY: 0 errors");
        let lines = [clean(0), clean(1)];
        assert_eq!(verdict(&outcome(0), &lines, Some(2), 5, &[]), CaseResult::Passed);
        for bad in [
            verdict(&outcome(0), &lines[..1], Some(2), 5, &[]),
            verdict(&outcome(FOUND), &lines, Some(2), 5, &[]),
            verdict(&outcome(0), &lines, Some(2), 0, &[]),
            verdict(&outcome(0), &lines, Some(2), 5, &["rank 0: wrong".into()]),
            verdict(&outcome(0), &[clean(0), "========= ERROR SUMMARY: 1 error".into()], Some(2), 5, &[]),
        ] {
            assert!(matches!(bad, CaseResult::Failed(_)), "{bad:?}");
        }
        assert_eq!(verdict(&outcome(0), &[], None, 5, &[]), CaseResult::Passed);
        let unsupported =
            ["[0] ========= Error: Device not supported. Please refer to the manual".to_owned()];
        assert!(matches!(verdict(&outcome(1), &unsupported, Some(2), 0, &[]), CaseResult::Skipped(_)));
    }

    #[test]
    fn ranks_share_gpus_as_threads_where_they_may_and_must() {
        #[derive(clap::Parser)]
        struct Parsed {
            #[command(flatten)]
            args: SanitizeArgs,
        }
        let parse = |words: &[&str]| {
            let words = ["t"].iter().chain(words);
            <Parsed as clap::Parser>::try_parse_from(words).unwrap().args
        };
        let plain = parse(&[]);
        assert!(!plain.shares(1) && plain.mode(1) == Mode::Processes);
        let eight = parse(&["--world", "8", "--share-gpus"]);
        assert!(eight.shares(4) && eight.mode(4) == Mode::Threads);
        assert!(!eight.shares(8) && eight.mode(8) == Mode::Processes);
        let asked = parse(&["--world", "8", "--share-gpus", "--mode", "processes"]);
        assert!(asked.shares(2) && asked.mode(2) == Mode::Processes);
    }

    #[test]
    fn the_rank_comes_after_the_tools_own_words() {
        let words = words(Tool::Racecheck, Path::new("/r"));
        assert_eq!(words[..2], ["--tool", "racecheck"]);
        assert_eq!(words[words.len() - 2..], ["/r", "rank-worker"]);
    }
}
