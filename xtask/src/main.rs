//! The workspace's own commands: `cargo xtask <command>`.
//!
//! The same program is what a bundle carries to a machine without a source tree, so nothing here depends on where it was
//! built, except for the commands that build.

#![allow(unreachable_pub, reason = "a program has no outside")]

mod backends;
mod bench;
mod bundle;
mod command;
mod cuda_device;
mod device;
mod doctor;
mod events;
mod gpus;
mod job;
mod kernels;
mod launch;
mod pip;
mod rank;
mod sanitize;
mod signal;
mod tally;
mod test;
mod test_gpus;
mod toolkits;
mod tune;

use std::process::ExitCode;

use clap::Parser;

/// Kernel builds, tests, benchmarks and multi-GPU orchestration.
#[derive(Parser)]
#[command(name = "cargo xtask", version)]
enum Command {
    /// Measure and verify every collective on whatever the machine has.
    Bench(bench::BenchArgs),
    /// Put runner, tests, kernels and targets into a folder that runs on a GPU machine without cargo.
    Bundle(bundle::BundleArgs),
    /// Say what this machine has, what is missing and how to get it.
    Doctor,
    /// Compile the CUDA kernels; installs NVIDIA's compiler into the target folder if there is none.
    Kernels(kernels::KernelsArgs),
    /// Run every kernel under NVIDIA's compute-sanitizer, ranks as processes or threads.
    Sanitize(sanitize::SanitizeArgs),
    /// Run every test that this machine can run.
    Test(test::TestArgs),
    /// Run the conformance suite, the fault tests and a bundle's test programs on worlds of GPUs.
    TestGpus(test_gpus::TestGpusArgs),
    /// Measure which algorithm is fastest for which size on this machine, and write the table.
    Tune(tune::TuneArgs),
    /// One rank of a job; started by the other commands.
    #[command(name = job::WORKER_COMMAND, hide = true)]
    RankWorker,
}

fn main() -> ExitCode {
    let command = Command::parse();
    let result = match &command {
        Command::RankWorker => rank::work(),
        _ => signal::watch().and_then(|()| match &command {
            Command::Bench(args) => bench::run(args),
            Command::Bundle(args) => bundle::run(args),
            Command::Doctor => {
                doctor::run();
                Ok(())
            }
            Command::Sanitize(args) => sanitize::run(args),
            Command::Test(args) => test::run(args),
            Command::Kernels(args) => kernels::run(args),
            Command::TestGpus(args) => test_gpus::run(args),
            Command::Tune(args) => tune::run(args),
            Command::RankWorker => Ok(()),
        }),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            if signal::interrupted() { ExitCode::from(130) } else { ExitCode::FAILURE }
        }
    }
}
