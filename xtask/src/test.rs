//! `cargo xtask test`: every test that this machine can run, and one tally of them all.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use clap::{Args, Parser};
use serde::Deserialize;

use crate::bundle::is_gpu_test;
use crate::gpus;
use crate::job;
use crate::kernels;
use crate::launch::{MULTICAST_OFF, lease};
use crate::signal;
use crate::tally::{Harness, Tally};
use crate::test_gpus::{self, TestGpusArgs};

/// What every call of cargo is about.
const WORKSPACE: [&str; 3] = ["test", "--workspace", "--all-features"];
/// Cargo's word for building tests only.
const NO_RUN: &str = "--no-run";
/// The most ranks that p2p takes, and so the largest world.
const MOST_RANKS: usize = comm_kernels::p2p::MAX_RANKS;
/// Two ranks each are tested in so many worlds at a time at most: their verdicts are about time.
const MOST_PAIRS: usize = 4;

/// Options of `cargo xtask test`.
#[derive(Args, Debug)]
pub struct TestArgs {
    /// Leave out the workspace's own tests, and run those on worlds of ranks only.
    #[arg(long)]
    no_cargo: bool,
}

/// What `test-gpus` would be called with.
#[derive(Parser)]
struct Worlds {
    #[command(flatten)]
    args: TestGpusArgs,
}

/// Runs the command and prints the tally as the last line.
///
/// # Errors
/// When a test failed, or could not be built.
pub fn run(args: &TestArgs) -> Result<()> {
    let mut tally = Tally::default();
    let mut problems = Vec::new();
    let gpus = gpus::visible();
    if gpus.is_ok()
        && let Err(error) = kernels::ensure()
    {
        println!("FAIL {error:#}");
        tally.failed += 1;
    }
    if !args.no_cargo {
        match cargo_tests(gpus.as_deref().unwrap_or_default(), &mut tally) {
            Ok(true) => {}
            Ok(false) => {
                // What does not compile fails no test of its own.
                tally.failed = tally.failed.max(1);
                problems.push("cargo test failed");
            }
            Err(error) => {
                println!("FAIL {error:#}");
                tally.failed += 1;
            }
        }
    }
    let mut lists = vec![words("--backend host --world 2,4 --quick")];
    match &gpus {
        Ok(gpus) => lists.extend(worlds_on_gpus(gpus.len())),
        Err(reason) => {
            println!("SKIP worlds of p2p: {reason}");
            println!("SKIP worlds of nccl: {reason}");
            tally.skipped += 2;
        }
    }
    let result = lists.iter().try_for_each(|list| test_gpus::run_tests(&worlds(list)?, &mut tally));
    if result.is_err() {
        tally.failed = tally.failed.max(1);
    }
    println!("{tally}");
    result?;
    ensure!(
        problems.is_empty() && tally.failed == 0,
        "{} tests failed; {}",
        tally.failed,
        problems.join("; ")
    );
    Ok(())
}

/// What `test-gpus` is called with on a machine of so many GPUs. The smallest world and the largest, in which an
/// algorithm's cases differ most, and the short form of the suite: `test-gpus` by itself runs all of it.
fn worlds_on_gpus(gpus: usize) -> Vec<Vec<String>> {
    if gpus < 2 {
        // Ranks of p2p can share the one; NCCL's cannot, and say so.
        return vec![
            words("--backend p2p --world 2 --quick --share-gpus"),
            words("--backend nccl --world 2 --quick"),
        ];
    }
    // Fault tests mostly wait, so worlds of two run side by side, as many as have GPUs of their own.
    let pairs = (gpus / 2).min(MOST_PAIRS);
    let mut lists = vec![words(&format!("--backend p2p,nccl --world 2 --quick --parallel {pairs}"))];
    if gpus > 2 {
        let most = gpus.min(MOST_RANKS);
        lists.push(words(&format!("--backend p2p,nccl --world {most} --quick")));
    }
    lists
}

fn worlds(list: &[String]) -> Result<TestGpusArgs> {
    let words = std::iter::once("test-gpus").chain(list.iter().map(String::as_str));
    Ok(Worlds::try_parse_from(words)?.args)
}

fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

/// One call of cargo.
#[derive(Clone, PartialEq, Eq, Debug)]
struct CargoRun {
    args: Vec<String>,
    /// Whether its tests use all GPUs, and so nothing else may meanwhile.
    on_gpus: bool,
}

/// The calls of cargo that run the workspace's tests, given the names of its test programs.
///
/// Without GPUs one call is enough: what needs them says at once that there are none. With them, tests that each use all
/// GPUs, and some of which judge times, must not run side by side, while the others would take long one by one. So
/// everything is built first, while no GPU is held, and then the two kinds run on their own. Cargo does not let
/// documentation tests be named beside others.
fn cargo_runs(programs: &BTreeSet<String>, gpus: bool) -> Vec<CargoRun> {
    let run = |selection: &[String], harness: &[&str], on_gpus: bool| {
        let own = |list: &[&str]| list.iter().map(|&word| word.to_owned()).collect::<Vec<_>>();
        let args = [&own(&WORKSPACE), &own(&["--no-fail-fast"]), selection, &own(&["--"]), &own(harness)];
        CargoRun { args: args.concat(), on_gpus }
    };
    if !gpus {
        return vec![run(&[], &["--show-output"], false)];
    }
    let (on_gpus, others): (Vec<&String>, Vec<&String>) =
        programs.iter().partition(|program| is_gpu_test(program));
    let select = |programs: &[&String]| -> Vec<String> {
        programs.iter().flat_map(|&program| ["--test".to_owned(), program.clone()]).collect()
    };
    let build =
        CargoRun { args: WORKSPACE.iter().chain(&[NO_RUN]).map(|&w| w.to_owned()).collect(), on_gpus: false };
    let mut runs = vec![
        build,
        run(&[words("--lib --bins"), select(&others)].concat(), &["--show-output"], false),
        run(&words("--doc"), &["--show-output"], false),
    ];
    // With nothing selected cargo would run everything.
    if !on_gpus.is_empty() {
        runs.push(run(&select(&on_gpus), &["--test-threads=1", "--show-output"], true));
    }
    runs
}

/// Runs the workspace's tests by cargo with their output streaming, and adds up what they say. Returns whether cargo was
/// content.
fn cargo_tests(gpus: &[String], tally: &mut Tally) -> Result<bool> {
    let programs = if gpus.is_empty() { BTreeSet::new() } else { test_programs()? };
    let mut all_ok = true;
    for run in cargo_runs(&programs, !gpus.is_empty()) {
        // Other jobs' ranks keep off the GPUs meanwhile.
        let lease = run.on_gpus.then(|| lease(gpus, gpus.len(), job::LEASE_PATIENCE)).transpose()?;
        let (counts, ok) = cargo_test(&run.args)?;
        drop(lease);
        *tally += counts;
        all_ok &= ok;
        let not_built = !ok && run.args.iter().any(|word| word == NO_RUN);
        if not_built || signal::interrupted() {
            // The others would only say the same again.
            break;
        }
    }
    Ok(all_ok)
}

fn cargo() -> OsString {
    std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into())
}

/// The names of the workspace's test programs, of which several packages may have one.
fn test_programs() -> Result<BTreeSet<String>> {
    let cargo = cargo();
    let output = Command::new(&cargo)
        .args(["metadata", "--no-deps", "--format-version", "1"])
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("starting {}", cargo.display()))?;
    ensure!(output.status.success(), "cargo metadata failed");
    programs_of(&output.stdout)
}

/// The same from what `cargo metadata` prints.
fn programs_of(metadata: &[u8]) -> Result<BTreeSet<String>> {
    #[derive(Deserialize)]
    struct Metadata {
        packages: Vec<Package>,
    }
    #[derive(Deserialize)]
    struct Package {
        targets: Vec<Target>,
    }
    #[derive(Deserialize)]
    struct Target {
        kind: Vec<String>,
        name: String,
    }
    let metadata: Metadata = serde_json::from_slice(metadata).context("reading what cargo metadata says")?;
    let targets = metadata.packages.into_iter().flat_map(|package| package.targets);
    Ok(targets.filter(|target| target.kind == ["test"]).map(|target| target.name).collect())
}

fn cargo_test(args: &[String]) -> Result<(Tally, bool)> {
    let cargo = cargo();
    let mut child = Command::new(&cargo)
        .args(args)
        .envs(MULTICAST_OFF)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("starting {}; the tests are built by cargo", cargo.display()))?;
    let mut harness = Harness::default();
    if let Some(stdout) = child.stdout.take() {
        // Tests may print what is no UTF-8.
        for line in BufReader::new(stdout).split(b'\n') {
            let line = line.context("reading cargo's output")?;
            let line = String::from_utf8_lossy(&line);
            if harness.read(&line) {
                println!("{line}");
            }
        }
    }
    let status = child.wait().context("waiting for cargo")?;
    Ok((harness.tally, status.success()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::launch::Mode;

    #[test]
    fn the_worlds_on_host_memory_need_no_gpu() {
        let args = worlds(&words("--backend host --world 2,4 --quick")).unwrap();
        assert_eq!((args.world, args.backend), (vec![2, 4], vec!["host".to_owned()]));
        assert!(args.quick && args.mode.is_empty() && args.require_gpus.is_none() && !args.share_gpus);
    }

    #[test]
    fn both_backends_are_tested_in_the_smallest_and_the_largest_world_of_any_machine() {
        let parsed = |gpus: usize| -> Vec<TestGpusArgs> {
            worlds_on_gpus(gpus).iter().map(|list| worlds(list).unwrap()).collect()
        };
        for (gpus, sizes, pairs) in [(2, &[2][..], 1), (4, &[2, 4], 2), (8, &[2, 8], 4), (16, &[2, 8], 4)] {
            let lists = parsed(gpus);
            assert_eq!(lists.iter().flat_map(|args| args.world.clone()).collect::<Vec<_>>(), sizes, "{gpus}");
            for args in &lists {
                assert_eq!(args.backend, ["p2p", "nccl"]);
                // As processes and as threads, every suite: conformance, two jobs, the standard faults.
                assert!(args.mode.is_empty() && args.filter.is_none() && args.fault.is_empty(), "{args:?}");
                assert!(!args.share_gpus);
                // No two fault tests at a time on one GPU.
                assert!(args.parallel * args.world[0] <= gpus.max(2), "{args:?}");
            }
            assert_eq!(lists[0].parallel, pairs);
        }
    }

    #[test]
    fn on_one_gpu_only_p2p_s_ranks_share_it() {
        let lists = worlds_on_gpus(1);
        let [p2p, nccl] = [&lists[0], &lists[1]].map(|list| worlds(list).unwrap());
        assert_eq!((&*p2p.backend, p2p.share_gpus), (&["p2p".to_owned()][..], true));
        assert_eq!((&*nccl.backend, nccl.share_gpus), (&["nccl".to_owned()][..], false));
        assert!(!p2p.mode.contains(&Mode::Processes), "they would take turns on the GPU");
    }

    fn programs() -> BTreeSet<String> {
        ["host_backend", "gpu_faults", "protocol", "gpu_bits"].map(str::to_owned).into()
    }

    #[test]
    fn without_gpus_all_tests_run_side_by_side_in_one_call() {
        let runs = cargo_runs(&programs(), false);
        let args = words("test --workspace --all-features --no-fail-fast -- --show-output");
        assert_eq!(runs, [CargoRun { args, on_gpus: false }]);
    }

    #[test]
    fn with_gpus_their_tests_run_one_at_a_time_and_the_others_side_by_side() {
        let text = |run: &CargoRun| run.args.join(" ");
        let runs = cargo_runs(&programs(), true);
        let [build, others, docs, on_gpus] = &runs[..] else { panic!("{runs:?}") };
        assert_eq!(text(build), "test --workspace --all-features --no-run");
        let common = "test --workspace --all-features --no-fail-fast";
        assert_eq!(
            text(others),
            format!("{common} --lib --bins --test host_backend --test protocol -- --show-output")
        );
        assert_eq!(text(docs), format!("{common} --doc -- --show-output"));
        assert_eq!(
            text(on_gpus),
            format!("{common} --test gpu_bits --test gpu_faults -- --test-threads=1 --show-output")
        );
        assert_eq!(runs.iter().map(|run| run.on_gpus).collect::<Vec<_>>(), [false, false, false, true]);
        let none = cargo_runs(&["protocol".to_owned()].into(), true);
        assert!(none.iter().all(|run| !run.on_gpus), "{none:?}");
    }

    #[test]
    fn test_programs_are_told_from_what_else_cargo_builds() {
        let metadata = br#"{"packages": [
            {"name": "a", "targets": [{"kind": ["lib"], "name": "a"}, {"kind": ["test"], "name": "gpu_faults"}]},
            {"name": "b", "targets": [{"kind": ["test"], "name": "gpu_faults"}, {"kind": ["test"], "name": "tidy"},
                                      {"kind": ["bench"], "name": "enqueue"}, {"kind": ["example"], "name": "e"}]}
        ], "version": 1}"#;
        let programs: Vec<_> = programs_of(metadata).unwrap().into_iter().collect();
        assert_eq!(programs, ["gpu_faults", "tidy"]);
        assert!(programs_of(b"no JSON").is_err());
    }
}
