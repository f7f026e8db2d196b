//! `cargo xtask test-gpus`: the conformance suite, the fault tests and many communicators' lives on worlds of ranks, and the
//! GPU test programs that lie beside this one in a bundle.
//!
//! What cannot run says `SKIP` and why; `--require-gpus` turns that into a failure. Host-memory backends take part when
//! they are named, so the same tests run where there is no GPU.

mod faults;
mod lifecycle;
mod neighbours;
mod programs;
mod verdict;

use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use clap::Args;

use crate::backends::{self, Backend};
use crate::events::{CaseResult, Event};
use crate::gpus;
use crate::job;
use crate::kernels;
use crate::launch::{Fault, LaunchReport, Mode};
use crate::rank::{ConformanceJob, Job};
use crate::signal;
use crate::tally::Tally;

/// Options of `cargo xtask test-gpus`.
#[derive(Args, Debug)]
pub struct TestGpusArgs {
    /// World sizes, comma separated.
    #[arg(long, value_delimiter = ',', default_value = "2,4,8", value_name = "N,..")]
    pub world: Vec<usize>,
    /// Backends, comma separated.
    #[arg(long, value_delimiter = ',', default_value = "p2p,nccl", value_name = "NAME,..")]
    pub backend: Vec<String>,
    /// How the ranks run, comma separated [default: processes,threads; with --share-gpus: threads].
    #[arg(long, value_delimiter = ',')]
    pub mode: Vec<Mode>,
    /// Where there are fewer GPUs than ranks, let several ranks of p2p be on each, in turn. For results only: times mean
    /// nothing. As processes they take turns on a GPU, and everything takes very long.
    #[arg(long)]
    pub share_gpus: bool,
    /// Only tests whose name begins with this, with or without the world in front: `conformance`, `fault/kill`,
    /// `nccl/processesx2 fault`. What follows the suite's name selects its cases: `conformance/all_reduce`. A bundle's
    /// test programs run when it begins with `program`: `program`, `program/comm-nccl__gpu_faults`; what follows a
    /// program's whole name selects its tests: `program/comm-p2p__gpu_acceptance/soak`.
    #[arg(long)]
    pub filter: Option<String>,
    /// Every world ends after this many seconds.
    #[arg(long, default_value_t = 600)]
    pub timeout: u64,
    /// Every test program of a bundle ends after this many seconds.
    #[arg(long, default_value_t = 300, value_name = "SECONDS")]
    pub program_timeout: u64,
    /// Fail, instead of skipping, when fewer GPUs are usable.
    #[arg(long, value_name = "N")]
    pub require_gpus: Option<usize>,
    /// Run these faults only, each KIND:RANK or KIND:RANK@CASE, for example kill:1@graph; `none` for no fault tests.
    #[arg(long, value_delimiter = ',', value_name = "FAULT,..")]
    pub fault: Vec<String>,
    /// Run every fault test this often; each run counts.
    #[arg(long, default_value_t = 1)]
    pub repeat: usize,
    /// Run so many fault tests at a time; worlds that the GPUs are too few for share them.
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub parallel: usize,
    /// Fewer types and counts in the conformance suite.
    #[arg(long)]
    pub quick: bool,
}

impl TestGpusArgs {
    /// Whether some ranks of a world share a GPU.
    fn shares(&self, world: &World, gpus: &[String]) -> bool {
        self.share_gpus && world.backend.on_gpus && gpus.len() < world.size
    }

    fn modes(&self) -> &[Mode] {
        match (self.mode.as_slice(), self.share_gpus) {
            ([], false) => &[Mode::Processes, Mode::Threads],
            ([], true) => &[Mode::Threads],
            (asked, _) => asked,
        }
    }
}

/// A world to test.
#[derive(Clone, Copy, Debug)]
struct World {
    backend: Backend,
    size: usize,
    mode: Mode,
}

impl World {
    fn name(&self) -> String {
        format!("{}/{}x{}", self.backend.name, self.mode.name(), self.size)
    }
}

/// Runs the command and prints the tally as the last line.
///
/// # Errors
/// When a test failed, too few GPUs are usable, or an argument makes no sense.
pub fn run(args: &TestGpusArgs) -> Result<()> {
    let mut tally = Tally::default();
    let result = run_tests(args, &mut tally);
    if result.is_err() {
        // What kept the tests from running must show in the counts too: they may be all that is looked at.
        tally.failed = tally.failed.max(1);
    }
    println!("{tally}");
    result?;
    ensure!(tally.failed == 0, "{} tests failed", tally.failed);
    ensure!(
        tally.passed + tally.skipped > 0,
        "no test was selected by --filter {:?} and --fault {:?}",
        args.filter.as_deref().unwrap_or_default(),
        args.fault.join(",")
    );
    Ok(())
}

/// Runs the tests, each with a line of its own, and counts them into `tally`.
///
/// # Errors
/// When an argument makes no sense, too few GPUs are usable, or the user interrupts.
pub fn run_tests(args: &TestGpusArgs, tally: &mut Tally) -> Result<()> {
    ensure!(args.repeat > 0, "--repeat must be at least 1");
    ensure!(args.parallel > 0, "--parallel must be at least 1");
    let gpus = gpus::visible();
    let count = gpus.as_ref().map_or(0, Vec::len);
    if let Some(needed) = args.require_gpus
        && count < needed
    {
        let why = gpus.err().unwrap_or_else(|| format!("{count} are usable"));
        bail!("{needed} GPUs are required: {why}");
    }
    let faults = parse_faults(&args.fault)?;
    let mut worlds = Vec::new();
    for name in &args.backend {
        let backend = backends::find(name)?;
        for &size in &args.world {
            ensure!(size > 0, "a world needs at least one rank");
            worlds.extend(args.modes().iter().map(|&mode| World { backend, size, mode }));
        }
    }
    for world in worlds {
        if let Some(reason) = cannot_run(&world, &gpus, args.share_gpus) {
            report(tally, &world.name(), &not_run(args, &world, reason), None);
            continue;
        }
        let available = gpus.as_deref().unwrap_or_default();
        if world.backend.on_gpus {
            kernels::ensure()?;
        }
        conformance(args, &world, available, tally)?;
        neighbours::run(args, &world, available, tally)?;
        lifecycle::run(args, &world, available, tally)?;
        faults::run(args, &faults, &world, available, tally)?;
        if signal::interrupted() {
            bail!("interrupted");
        }
    }
    programs::run(args, gpus.as_deref().unwrap_or_default(), tally)
}

fn cannot_run(world: &World, gpus: &Result<Vec<String>, String>, share: bool) -> Option<String> {
    if !world.backend.on_gpus {
        return None;
    }
    match gpus {
        Err(reason) => Some(reason.clone()),
        Ok(gpus) if gpus.len() < world.size && share && world.backend.name == comm_nccl::NAME => {
            Some(format!("{} ranks on {} GPUs: NCCL takes no two on one", world.size, gpus.len()))
        }
        Ok(gpus) if gpus.len() < gpus::needed(world.size, gpus.len(), share) => {
            Some(format!("{} ranks need {} GPUs; {} are usable", world.size, world.size, gpus.len()))
        }
        Ok(_) => {
            backends::nccl_is_there().err().filter(|_| world.backend.name == "nccl").map(|e| format!("{e:#}"))
        }
    }
}

/// A world that cannot run is a skip, unless the GPUs that `--require-gpus` asked for are enough for it: then the
/// machine was said to be fit, and what is missing (a library, say) is a failure.
fn not_run(args: &TestGpusArgs, world: &World, reason: String) -> CaseResult {
    let required = world.backend.on_gpus && args.require_gpus.is_some_and(|gpus| world.size <= gpus);
    if required { CaseResult::Failed(reason) } else { CaseResult::Skipped(reason) }
}

/// One line per test, with the time it took; a failure's reason and a skip's stand beside it.
fn report(tally: &mut Tally, name: &str, result: &CaseResult, took: Option<Duration>) {
    tally.count(result);
    let took = took.map_or_else(String::new, |took| format!(" ({:.1} s)", took.as_secs_f64()));
    match result {
        CaseResult::Passed => println!("ok   {name}{took}"),
        CaseResult::Failed(why) | CaseResult::NotRun(why) => println!("FAIL {name}{took}: {why}"),
        CaseResult::Skipped(why) => println!("SKIP {name}: {why}"),
    }
}

/// Whether the filter selects a suite's test: `test` is its name without the world.
fn selected(args: &TestGpusArgs, world: &World, test: &str) -> bool {
    args.filter.as_deref().is_none_or(|filter| {
        test.starts_with(filter) || format!("{} {test}", world.name()).starts_with(filter)
    })
}

/// Whether the filter selects a test program. A short filter such as `p2p` or `conformance` means suites, whatever
/// programs there are.
fn program_selected(args: &TestGpusArgs, name: &str) -> bool {
    let names_programs = |filter: &str| filter.starts_with("program") && name.starts_with(filter);
    args.filter.as_deref().is_none_or(names_programs) || program_tests(args, name).is_some()
}

/// Which tests of a program are wanted, if not all.
fn program_tests<'a>(args: &'a TestGpusArgs, name: &str) -> Option<&'a str> {
    args.filter.as_deref()?.strip_prefix(name)?.strip_prefix('/')
}

/// Whether the conformance suite is wanted, and which cases of it, if not all.
fn conformance_cases<'a>(args: &'a TestGpusArgs, world: &World) -> Option<Option<&'a str>> {
    let Some(filter) = args.filter.as_deref() else { return Some(None) };
    let suite = filter.strip_prefix(&world.name()).map_or(filter, str::trim_start);
    match suite.strip_prefix("conformance/") {
        Some(cases) => Some(Some(cases)),
        None => selected(args, world, "conformance").then_some(None),
    }
}

fn conformance(args: &TestGpusArgs, world: &World, gpus: &[String], tally: &mut Tally) -> Result<()> {
    let name = format!("{} conformance", world.name());
    let Some(filter) = conformance_cases(args, world) else { return Ok(()) };
    let filter = filter.map(str::to_owned);
    let job =
        Job::Conformance(ConformanceJob { backend: world.backend.name.into(), filter, quick: args.quick });
    let timeout = Duration::from_secs(args.timeout);
    let spec = job::spec(world.size, world.mode, timeout, Duration::from_secs(10))?;
    let spec = spec.sharing(args.shares(world, gpus)).with_gpus(gpus, world.backend.on_gpus)?;
    eprintln!("running {name} ...");
    let mut cases = Tally::default();
    let (mut ran, mut not_run) = (0, Vec::new());
    let start = Instant::now();
    let outcome = job::launch_job(spec, &job, &mut |message| {
        if let Event::Case { name: case, result } = &message.event {
            ran += 1;
            match result {
                CaseResult::Passed => cases.count(result),
                // One failure's many consequences are one line.
                CaseResult::NotRun(why) => {
                    cases.count(result);
                    not_run.push(why.clone());
                }
                _ => report(&mut cases, &format!("{name}/{case}"), result, None),
            }
        }
    })?;
    if let Some(why) = not_run.first() {
        println!("FAIL {name}: {} cases {why}", not_run.len());
    }
    println!("{name}: {cases} ({:.1} s)", start.elapsed().as_secs_f64());
    *tally += cases;
    if let Some(problem) = problem_of(&outcome, ran) {
        report(tally, &name, &CaseResult::Failed(problem), Some(start.elapsed()));
    }
    Ok(())
}

/// A job that ended badly, or that said nothing, is a failure even if no case of it failed.
fn problem_of(outcome: &LaunchReport, ran: usize) -> Option<String> {
    outcome.problem().or_else(|| (ran == 0).then(|| "no case ran".to_owned()))
}

/// `None` for the default set, an empty list for none.
fn parse_faults(texts: &[String]) -> Result<Option<Vec<Fault>>> {
    match texts {
        [] => Ok(None),
        [none] if none == "none" => Ok(Some(Vec::new())),
        texts => texts.iter().map(|text| text.parse()).collect::<Result<Vec<Fault>>>().map(Some),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fault_lists_parse() {
        assert!(parse_faults(&[]).unwrap().is_none());
        assert!(parse_faults(&["none".into()]).unwrap().unwrap().is_empty());
        assert_eq!(parse_faults(&["kill:1".into(), "stop:0@graph".into()]).unwrap().unwrap().len(), 2);
        assert!(parse_faults(&["explode:1".into()]).is_err());
    }

    #[test]
    fn filters_select_by_the_beginning_of_a_name() {
        let host = World { backend: backends::find("host").unwrap(), size: 2, mode: Mode::Threads };
        let selects = |filter: &str| {
            let args = parse(&["t", "--filter", filter]);
            let cases = conformance_cases(&args, &host).map(|cases| cases.map(str::to_owned));
            let fault = selected(&args, &host, "fault/kill:1@eager");
            (cases, fault, program_selected(&args, "program/comm-p2p__gpu_conformance"))
        };
        let cases = |text: &str| Some(Some(text.to_owned()));
        assert_eq!(selects("conformance"), (Some(None), false, false));
        assert_eq!(selects("conformance/all_reduce"), (cases("all_reduce"), false, false));
        assert_eq!(selects("host/threadsx2 conformance/all"), (cases("all"), false, false));
        assert_eq!(selects("host/threadsx2"), (Some(None), true, false));
        assert_eq!(selects("host/threadsx4 conformance/all"), (None, false, false));
        assert_eq!(selects("fault/kill"), (None, true, false));
        assert_eq!(selects("kill"), (None, false, false));
        assert_eq!(selects("p"), (None, false, false));
        assert_eq!(selects("program/comm-p2p"), (None, false, true));
        assert_eq!(selects("program/comm-p2p__gpu_conformance/checked"), (None, false, true));
        assert_eq!(selects("program/comm-p2p__gpu_conf/checked"), (None, false, false));
        let some = parse(&["t", "--filter", "program/x/soak"]);
        assert_eq!(
            (program_tests(&some, "program/x"), program_tests(&some, "program/y")),
            (Some("soak"), None)
        );
        let all = parse(&["t"]);
        assert_eq!(conformance_cases(&all, &host), Some(None));
        assert!(program_selected(&all, "program/x") && selected(&all, &host, "fault/x"));
    }

    fn parse(words: &[&str]) -> TestGpusArgs {
        #[derive(clap::Parser)]
        struct Parsed {
            #[command(flatten)]
            args: TestGpusArgs,
        }
        <Parsed as clap::Parser>::try_parse_from(words).unwrap().args
    }

    #[test]
    fn required_gpus_turn_a_skip_into_a_failure() {
        let of = |name, size| World { backend: backends::find(name).unwrap(), size, mode: Mode::Threads };
        let why = || "NCCL was not found".to_owned();
        let (plain, required) = (parse(&["t"]), parse(&["t", "--require-gpus", "4"]));
        assert_eq!(not_run(&plain, &of("nccl", 4), why()), CaseResult::Skipped(why()));
        assert_eq!(not_run(&required, &of("nccl", 4), why()), CaseResult::Failed(why()));
        // More GPUs than were asked for are no promise.
        assert_eq!(not_run(&required, &of("nccl", 8), why()), CaseResult::Skipped(why()));
    }

    #[test]
    fn worlds_larger_than_the_machine_are_skipped_with_the_reason() {
        let nccl = backends::find("nccl").unwrap();
        let world = World { backend: nccl, size: 4, mode: Mode::Threads };
        assert!(cannot_run(&world, &Err("no driver".into()), false).unwrap().contains("no driver"));
        assert!(cannot_run(&world, &Ok(vec!["0".into()]), false).unwrap().contains("1 are usable"));
        let host = World { backend: backends::find("host").unwrap(), ..world };
        assert!(cannot_run(&host, &Err("no driver".into()), false).is_none());
        assert_eq!(host.name(), "host/threadsx4");
    }

    #[test]
    fn shared_gpus_are_enough_for_p2p_and_never_for_nccl() {
        let world = |name| World { backend: backends::find(name).unwrap(), size: 4, mode: Mode::Threads };
        let one = Ok(vec!["0".to_owned()]);
        assert_eq!(cannot_run(&world("p2p"), &one, true), None);
        assert!(cannot_run(&world("nccl"), &one, true).unwrap().contains("NCCL takes no two"));
        assert!(cannot_run(&world("p2p"), &Ok(Vec::new()), true).is_some());
        let args = parse(&["t", "--share-gpus"]);
        let gpus = |count: usize| vec![String::new(); count];
        assert!(args.shares(&world("p2p"), &gpus(3)) && !args.shares(&world("p2p"), &gpus(4)));
        assert!(!args.shares(&world("host"), &gpus(1)));
        assert!(!parse(&["t"]).shares(&world("p2p"), &gpus(1)));
        assert_eq!((args.modes(), parse(&["t"]).modes().len()), (&[Mode::Threads][..], 2));
        assert_eq!(parse(&["t", "--share-gpus", "--mode", "processes"]).modes(), [Mode::Processes]);
    }
}
