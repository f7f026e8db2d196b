//! `cargo xtask test`: every test that this machine can run, and one tally of them all.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use clap::{Args, Parser};

use crate::gpus;
use crate::kernels;
use crate::launch::MULTICAST_OFF;
use crate::tally::{Harness, Tally};
use crate::test_gpus::{self, TestGpusArgs};

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
    if gpus::visible().is_ok()
        && let Err(error) = kernels::ensure()
    {
        println!("FAIL {error:#}");
        tally.failed += 1;
    }
    if !args.no_cargo {
        let (counts, ok) = cargo_test()?;
        tally += counts;
        if !ok {
            // What does not compile fails no test of its own.
            tally.failed = tally.failed.max(1);
            problems.push("cargo test failed");
        }
    }
    let mut worlds = vec![worlds(&["--backend", "host", "--world", "2,4", "--quick"])?];
    match gpus::visible() {
        Ok(_) => worlds.push(worlds_on_gpus()?),
        Err(reason) => {
            println!("SKIP nccl: {reason}");
            tally.skipped += 1;
        }
    }
    let result = worlds.iter().try_for_each(|world| test_gpus::run_tests(world, &mut tally));
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

fn worlds_on_gpus() -> Result<TestGpusArgs> {
    worlds(&["--backend", "nccl"])
}

fn worlds(args: &[&str]) -> Result<TestGpusArgs> {
    let words = std::iter::once("test-gpus").chain(args.iter().copied());
    Ok(Worlds::try_parse_from(words)?.args)
}

/// Runs `cargo test` on the workspace with its output streaming, and adds up what it says.
fn cargo_test() -> Result<(Tally, bool)> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut child = Command::new(&cargo)
        .args(["test", "--workspace", "--all-features", "--no-fail-fast", "--", "--show-output"])
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

    #[test]
    fn the_worlds_on_host_memory_need_no_gpu() {
        let args = worlds(&["--backend", "host", "--world", "2,4", "--quick"]).unwrap();
        assert_eq!((args.world, args.backend), (vec![2, 4], vec!["host".to_owned()]));
        assert!(args.quick && args.mode.is_empty() && args.require_gpus.is_none() && !args.share_gpus);
    }
}
