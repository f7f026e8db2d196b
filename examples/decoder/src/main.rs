//! A tensor-parallel decoder, layer by layer: what communication costs a model, and what is left of it.
//!
//! Runs the layers of a Llama 70B (random weights) split over the GPUs of this machine, each a thread of this program, and
//! prints microseconds per layer with NCCL, with comm-p2p, with its fused norm, and without any communication. The output
//! is compared with what one GPU alone computes. Without GPUs it runs a small model on host memory.
//!
//! ```text
//! cargo xtask kernels
//! cargo run --release -p decoder
//! ```
//!
//! `model.rs` is what to read first.

#![allow(unreachable_pub, reason = "a program has no outside")]

mod cuda;
mod device;
mod measure;
mod model;
mod on_host;
mod plot;
mod report;
mod shape;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use comm_core::{HostFactory, run_threads};
use comm_kernels::driver;
use comm_nccl::{NcclFactory, NcclLibrary};
use comm_p2p::P2pFactory;

use crate::cuda::CudaDevice;
use crate::device::Effort;
use crate::measure::{Backend, PATIENCE, Plan};
use crate::on_host::HostDevice;
use crate::report::Report;
use crate::shape::Shape;

/// Measures the layers of a tensor-parallel decoder with different collectives.
#[derive(Parser)]
struct Args {
    /// Ranks [default: all GPUs that can share a layer; 4 on host memory].
    #[arg(long)]
    world: Option<usize>,
    /// Tokens of a forward pass [default: 1,8,32,128,512; 1,8,32 on host memory].
    #[arg(long, value_delimiter = ',')]
    tokens: Vec<usize>,
    /// Layers, each with weights of its own [default: 8; 2 on host memory].
    #[arg(long)]
    layers: Option<usize>,
    /// Samples of which the median counts.
    #[arg(long, default_value_t = 15)]
    samples: usize,
    /// Run on host memory even if there are GPUs.
    #[arg(long)]
    host: bool,
    /// Write the figures to this file as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write the figures to this file as a picture (SVG).
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
}

fn main() -> ExitCode {
    // NVLink multicast is not to be had on all machines, and makes NCCL fail there.
    if std::env::var_os("NCCL_NVLS_ENABLE").is_none() {
        // SAFETY: no other thread is running yet.
        unsafe { std::env::set_var("NCCL_NVLS_ENABLE", "0") };
    }
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<()> {
    let report = match gpus(args)? {
        Some(world) => on_gpus(args, world)?,
        None => on_host(args)?,
    };
    print!("{report}");
    if let Some(path) = &args.json {
        let text = serde_json::to_string_pretty(&report)? + "\n";
        std::fs::write(path, text).with_context(|| format!("writing {}", path.display()))?;
    }
    if let Some(path) = &args.plot {
        std::fs::write(path, plot::svg(&report)).with_context(|| format!("writing {}", path.display()))?;
    }
    report.verdict()
}

/// How many GPUs to run on; `None` for host memory, after saying why.
fn gpus(args: &Args) -> Result<Option<usize>> {
    if args.host {
        return Ok(None);
    }
    let found = match driver::device_count() {
        Ok(found) => found,
        Err(error) => {
            println!("no GPU ({error}): a small model on host memory\n");
            return Ok(None);
        }
    };
    if let Some(world) = args.world {
        ensure!(world <= found, "{world} ranks need as many GPUs, but there are {found}; --host needs none");
        return Ok(Some(world));
    }
    let world = [8, 4, 2].into_iter().find(|&world| world <= found);
    if world.is_none() {
        println!("{found} GPU, and a layer is shared by 2 at least: a small model on host memory\n");
    }
    Ok(world)
}

fn plan(args: &Args, shape: Shape, tokens: &[usize], layers: usize, passes: usize) -> Result<Plan> {
    let tokens = if args.tokens.is_empty() { tokens.to_vec() } else { args.tokens.clone() };
    let layers = args.layers.unwrap_or(layers);
    ensure!(layers > 0 && args.samples > 0, "--layers and --samples must be at least 1");
    ensure!(tokens.iter().all(|&tokens| tokens > 0), "--tokens must be at least 1");
    Ok(Plan { shape, layers, tokens, effort: Effort { samples: args.samples, passes } })
}

fn on_gpus(args: &Args, world: usize) -> Result<Report> {
    let plan = plan(args, Shape::LLAMA_70B, &[1, 8, 32, 128, 512], 8, 4)?;
    plan.shape.check(world)?;
    let nccl = NcclFactory::new();
    let mut report = first(run_threads(world, PATIENCE, |host| {
        let device = CudaDevice::open(host.rank())?;
        let backends =
            [Backend { factory: &nccl, fused: false }, Backend { factory: &P2pFactory, fused: true }];
        measure::run(&device, &host, &plan, &backends)
    })?)?;
    report.nccl = NcclLibrary::load().ok().map(|library| library.version().to_string());
    Ok(report)
}

fn on_host(args: &Args) -> Result<Report> {
    let world = args.world.unwrap_or(4);
    let plan = plan(args, Shape::SMALL, &[1, 8, 32], 2, 1)?;
    plan.shape.check(world)?;
    first(run_threads(world, PATIENCE, |host| {
        measure::run(&HostDevice::default(), &host, &plan, &[Backend { factory: &HostFactory, fused: true }])
    })?)
}

/// Rank 0's report, which is every rank's; or the error that the others' errors followed from.
fn first(results: Vec<Result<Report>>) -> Result<Report> {
    let mut report = None;
    let mut failures = Vec::new();
    for (rank, result) in results.into_iter().enumerate() {
        match result {
            Ok(own) => report = report.or(Some(own)),
            Err(error) => failures.push((rank, error)),
        }
    }
    // A rank that saw another one go says so; the one that went knows why.
    let follows = |error: &anyhow::Error| {
        matches!(
            error.downcast_ref(),
            Some(comm_core::CommError::PeerDied { .. } | comm_core::CommError::PeerFailed { .. })
        )
    };
    let cause = failures.iter().position(|(_, error)| !follows(error)).unwrap_or(0);
    match (report, failures.is_empty()) {
        (Some(report), true) => Ok(report),
        _ if failures.is_empty() => Err(anyhow::anyhow!("there are no ranks")),
        _ => {
            let (rank, error) = failures.swap_remove(cause);
            Err(error.context(format!("rank {rank}")))
        }
    }
}
