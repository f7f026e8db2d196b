//! `cargo xtask bench`: every collective, timed and verified, on whatever the machine has.

mod ahead;
mod check;
mod choose;
mod copy;
pub mod data;
mod judge;
pub mod measure;
mod norm;
mod operands;
mod peer;
pub mod plan;
mod plot;
mod quantized;
pub mod row;
mod sizes;
mod stats;
mod table;
mod targets;
mod versus;
mod world;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Args;
use comm_core::{DType, OpKind, ReduceOp};
use serde::Serialize;

use crate::gpus;
use crate::launch::Mode;
pub use sizes::{human, parse_sizes};

use peer::{Figure, Peer, Torch};
use row::Row;
use versus::Versus;

/// The interpreter whose PyTorch is the peer.
const PYTHON: &str = "python3";

/// Options of `cargo xtask bench`.
#[derive(Args, Debug)]
pub struct BenchArgs {
    /// Operations, comma separated, or `all`.
    #[arg(long, default_value = "all", value_name = "OP,..")]
    op: String,
    /// Sizes of the full buffer: `1K..1G` (doubling), `1K..1G*4`, lists [default: 1K..16M*4 on host memory, 1K..1G on GPUs].
    #[arg(long, value_name = "SIZES")]
    sizes: Option<String>,
    /// Rows of the fused norms, comma separated.
    #[arg(long, value_delimiter = ',', value_name = "N,..")]
    tokens: Vec<usize>,
    /// Columns of the fused norms [default: 1024 on host memory, 8192 on GPUs].
    #[arg(long)]
    hidden: Option<usize>,
    /// Element type.
    #[arg(long, default_value = "bf16")]
    dtype: DType,
    /// Reduction: sum, prod, min, max or avg.
    #[arg(long, default_value = "sum")]
    redop: ReduceOp,
    /// Backends, comma separated [default: on GPUs p2p and nccl, each where it can be made, otherwise host].
    #[arg(long, value_delimiter = ',', value_name = "NAME,..")]
    backend: Vec<String>,
    /// Ranks [default: 4 on host memory, all GPUs otherwise].
    #[arg(long)]
    world: Option<usize>,
    /// How the ranks run [default: threads on host memory, processes on GPUs].
    #[arg(long)]
    mode: Option<Mode>,
    /// On GPUs, replay CUDA graphs of back-to-back operations (the default).
    #[arg(long, overrides_with = "no_graph")]
    graph: bool,
    /// On GPUs, issue the operations one by one.
    #[arg(long)]
    no_graph: bool,
    /// Register no operands, which then are plain device memory and may lie differently on every rank; and show what a copy
    /// of each size within a GPU takes, the most that registering is to save.
    #[arg(long)]
    unregistered: bool,
    /// Operations in a graph or loop [default: by size].
    #[arg(long)]
    iters: Option<usize>,
    /// Operations before the first that is timed.
    #[arg(long, default_value_t = 3)]
    warmup: usize,
    /// Repetitions of the graph or loop.
    #[arg(long, default_value_t = 7)]
    reps: usize,
    /// Everything ends after this many seconds.
    #[arg(long, default_value_t = 1800)]
    timeout: u64,
    /// Write the rows as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Draw time and bus bandwidth by size.
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
    /// Compare p2p's times (all, where it is not measured) with a targets file, for example bench/targets/8xh200.json, out of
    /// place and in place; fails where slower.
    #[arg(long, value_name = "FILE")]
    check: Option<PathBuf>,
    /// What --check holds times against: `target`, or a peer's name in the file, for example nccl.
    #[arg(long, default_value = "target", requires = "check")]
    against: check::Against,
    /// Percent by which a time may be exceeded [default: 0 for --check and --ahead, 3 for --peer].
    #[arg(long)]
    tolerance: Option<f64>,
    /// Measure another system on the same GPUs right after ours, and compare. Our ranks then use its NCCL, unless
    /// COMM_NCCL_LIBRARY names another.
    #[arg(long, value_name = "PEER")]
    peer: Option<Peer>,
    /// Fail where slower than the peer beyond the tolerance, or where it cannot be measured.
    #[arg(long, requires = "peer")]
    check_peer: bool,
    /// Fail unless p2p is so far ahead of nccl in this run, or, with --peer, of the peer: `3@64K` for at least 3 times as fast
    /// up to 64K and at least as fast above, `1` for at least as fast at every size.
    #[arg(long, value_name = "N@SIZE")]
    ahead: Option<ahead::Ahead>,
}

/// What `--json` writes.
#[derive(Serialize)]
struct Report<'a> {
    schema: u32,
    host: String,
    /// What each backend works with.
    libraries: &'a BTreeMap<String, String>,
    rows: &'a [Row],
    #[serde(skip_serializing_if = "Option::is_none")]
    peer: Option<&'a PeerReport>,
}

/// A peer's part of the report.
#[derive(Serialize)]
struct PeerReport {
    #[serde(flatten)]
    torch: Torch,
    figures: Vec<Figure>,
    #[serde(flatten)]
    versus: Versus,
}

/// Percent by which we may be slower than a peer, unless told otherwise: what two runs of the same code differ by.
const PEER_TOLERANCE: f64 = 3.0;

/// Runs the command.
///
/// # Errors
/// When an argument makes no sense, a rank fails, an element is wrong, or a time is not what was asked for.
pub fn run(args: &BenchArgs) -> Result<()> {
    ensure!(args.reps > 0 && args.iters != Some(0), "--reps and --iters must be at least 1");
    ensure!(args.tolerance.is_none_or(|percent| percent >= 0.0), "--tolerance must not be negative");
    gpus::refuse_shared()?;
    let gpus = gpus::visible().map(drop);
    // Before anything is measured: a mistyped name must not cost a measurement, nor must a peer that is not there.
    let targets = args.check.as_deref().map(targets::Targets::load).transpose()?;
    judge::can_be_ahead(args, &gpus)?;
    let torch = match args.peer.map(|Peer::Torch| find_torch()) {
        Some(Err(reason)) if args.check_peer || args.ahead.is_some() => {
            return Err(reason.context("PyTorch, which the rows are to be held against"));
        }
        other => other,
    };
    let found = torch.as_ref().and_then(|torch| torch.as_ref().ok());
    let mut libraries = BTreeMap::new();
    println!("{}", table::header(!args.unregistered));
    let mut measure = |backend| world::run(args, backend, found, &mut libraries);
    let rows = choose::measure_each(&args.backend, gpus, &mut measure, &mut world::note)?;
    println!("{}", table::summary(&rows));
    let peer = match torch {
        Some(Ok(torch)) => Some(compare_with(args, torch, &rows)?),
        Some(Err(reason)) => {
            println!("# no comparison with PyTorch: {reason:#}");
            None
        }
        None => None,
    };
    if let Some(path) = &args.json {
        let report =
            Report { schema: 1, host: hostname(), libraries: &libraries, rows: &rows, peer: peer.as_ref() };
        let text = serde_json::to_string_pretty(&report)?;
        std::fs::write(path, text + "\n").with_context(|| format!("writing {}", path.display()))?;
    }
    if let Some(path) = &args.plot {
        plot::plot(path, &rows, peer.as_ref().map_or(&[], |peer| &peer.figures))?;
    }
    let problems = judge::problems(args, &rows, targets.as_ref(), peer.as_ref().map(|peer| &peer.versus));
    ensure!(problems.is_empty(), "{}", problems.join("; "));
    Ok(())
}

fn find_torch() -> Result<Torch> {
    gpus::visible().map_err(anyhow::Error::msg)?;
    Torch::find(Path::new(PYTHON), peer::PROBE)
}

/// Measures PyTorch and prints the comparison.
fn compare_with(args: &BenchArgs, torch: Torch, rows: &[Row]) -> Result<PeerReport> {
    eprintln!("measuring {} ...", torch.describe());
    let method = peer::Method {
        python: Path::new(PYTHON),
        script: peer::SCRIPT,
        reps: args.reps,
        iters: args.iters,
        timeout: Duration::from_secs(args.timeout),
    };
    let gpus = gpus::visible().map_err(anyhow::Error::msg)?;
    let (figures, bad_end) = peer::measure(rows, &gpus, &method)?;
    let tolerance = args.tolerance.unwrap_or(PEER_TOLERANCE);
    let versus = versus::compare(rows, &figures, bad_end.as_deref(), tolerance);
    println!("{}", versus.table(&torch.describe(), tolerance));
    Ok(PeerReport { torch, figures, versus })
}

/// The operations with a row of their own. A receive is the other half of a send's row, and what the two-group norm does
/// about fp8 is in the rows of its parts.
fn parse_ops(text: &str) -> Result<Vec<OpKind>> {
    let unmeasured = [OpKind::Recv, OpKind::AllReduceRmsNormTwoGroupQuantized];
    let measured = || OpKind::COLLECTIVES.into_iter().filter(|op| !unmeasured.contains(op));
    if text == "all" {
        return Ok(measured().collect());
    }
    text.split(',')
        .map(|name| {
            measured().find(|op| op.name() == name.trim()).with_context(|| {
                let known: Vec<_> = measured().map(OpKind::name).collect();
                format!("unknown operation {name:?}; known are all, {}", known.join(", "))
            })
        })
        .collect()
}

fn hostname() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(super) fn parse(words: &[&str]) -> BenchArgs {
        #[derive(clap::Parser)]
        struct Parsed {
            #[command(flatten)]
            args: BenchArgs,
        }
        let words = std::iter::once("bench").chain(words.iter().copied());
        <Parsed as clap::Parser>::try_parse_from(words).unwrap().args
    }

    #[test]
    fn what_cannot_be_judged_is_noticed_before_anything_is_measured() {
        // A backend that does not exist: measuring would be the first to say so.
        let error = |words: &[&str]| {
            format!("{:#}", run(&parse(&[&["--backend", "none"], words].concat())).unwrap_err())
        };
        let targets = error(&["--check", "/nonexistent/targets.json"]);
        assert!(targets.contains("/nonexistent/targets.json"), "{targets}");
        let ahead = error(&["--ahead", "3@64K"]);
        assert!(ahead.contains("--ahead") && ahead.contains("p2p"), "{ahead}");
    }

    #[test]
    fn operations_are_named_as_the_library_names_them() {
        assert_eq!(parse_ops("all").unwrap().len(), 16);
        assert_eq!(parse_ops("all_gather, barrier").unwrap(), [OpKind::AllGather, OpKind::Barrier]);
        let error = parse_ops("all_reduce,allgather").unwrap_err().to_string();
        assert!(error.contains("\"allgather\"") && error.contains("all_gather_v"), "{error}");
    }
}
