//! `cargo xtask bench`: every collective, timed and verified, on whatever the machine has.

mod check;
pub mod data;
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

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use comm_core::{DType, OpKind, ReduceOp};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use crate::backends::{self, Backend};
use crate::events::Event;
use crate::gpus;
use crate::job;
use crate::kernels;
use crate::launch::{LaunchSpec, Mode};
use crate::rank::Job;
pub use sizes::{human, parse_sizes};

use peer::{Figure, Peer, Torch};
use plan::{BenchJob, Effort};
use row::Row;
use versus::Versus;

/// The environment variable that names the file which the ranks load NCCL from.
const NCCL_LIBRARY: &str = "COMM_NCCL_LIBRARY";

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
    /// Backends, comma separated [default: nccl where there are GPUs and NCCL, otherwise host].
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
    /// Compare with a targets file, for example bench/targets/8xh200.json; fails where slower.
    #[arg(long, value_name = "FILE")]
    check: Option<PathBuf>,
    /// What --check holds times against: `target`, or a peer's name in the file, for example nccl.
    #[arg(long, default_value = "target", requires = "check")]
    against: check::Against,
    /// Percent by which a time may be exceeded [default: 0 for --check, 3 for --peer].
    #[arg(long)]
    tolerance: Option<f64>,
    /// Measure another system on the same GPUs right after ours, and compare. Our ranks then use its NCCL, unless
    /// COMM_NCCL_LIBRARY names another.
    #[arg(long, value_name = "PEER")]
    peer: Option<Peer>,
    /// Fail where slower than the peer beyond the tolerance, or where it cannot be measured.
    #[arg(long, requires = "peer")]
    check_peer: bool,
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
/// When an argument makes no sense, a rank fails, an element is wrong, or a checked time is exceeded.
pub fn run(args: &BenchArgs) -> Result<()> {
    ensure!(args.reps > 0 && args.iters != Some(0), "--reps and --iters must be at least 1");
    ensure!(args.tolerance.is_none_or(|percent| percent >= 0.0), "--tolerance must not be negative");
    gpus::refuse_shared()?;
    // Read before anything is measured: a mistyped name must not cost a measurement.
    let targets = args.check.as_deref().map(targets::Targets::load).transpose()?;
    let torch = args.peer.map(|Peer::Torch| find_torch());
    let found = torch.as_ref().and_then(|torch| torch.as_ref().ok());
    let (mut rows, mut libraries) = (Vec::new(), BTreeMap::new());
    println!("{}", table::header());
    for name in backend_names(args) {
        rows.extend(run_backend(args, backends::find(&name)?, found, &mut libraries)?);
    }
    println!("{}", table::summary(&rows));
    let peer = match torch {
        Some(Ok(torch)) => Some(compare_with(args, torch, &rows)?),
        Some(Err(reason)) if args.check_peer => return Err(reason.context("--check-peer")),
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
    let wrong = table::wrong(&rows);
    ensure!(wrong == 0, "{wrong} elements are wrong");
    if let Some(targets) = &targets {
        let tolerance = args.tolerance.unwrap_or(0.0);
        let verdicts = check::compare(&rows, targets, &args.against, tolerance)?;
        let (text, missed) = check::report(&verdicts, &args.against);
        println!("{text}");
        ensure!(missed == 0, "{missed} of {} checked times are exceeded", verdicts.len());
    }
    if let Some(peer) = peer.filter(|_| args.check_peer) {
        ensure!(!peer.versus.compared.is_empty(), "no row could be compared with PyTorch's");
        ensure!(
            peer.versus.slower() == 0,
            "{} of {} rows are slower than PyTorch's",
            peer.versus.slower(),
            peer.versus.compared.len()
        );
    }
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

fn backend_names(args: &BenchArgs) -> Vec<String> {
    if !args.backend.is_empty() {
        return args.backend.clone();
    }
    match (gpus::visible(), backends::nccl_is_there()) {
        (Ok(_), Ok(())) => vec!["nccl".into()],
        (Ok(gpus), Err(reason)) => {
            eprintln!("{} GPUs, but NCCL cannot be used: {reason}; benchmarking host memory", gpus.len());
            vec!["host".into()]
        }
        (Err(reason), _) => {
            eprintln!("{reason}; benchmarking ranks on host memory");
            vec!["host".into()]
        }
    }
}

fn run_backend(
    args: &BenchArgs,
    backend: Backend,
    torch: Option<&Torch>,
    libraries: &mut BTreeMap<String, String>,
) -> Result<Vec<Row>> {
    let (job, mut spec) = prepare(args, backend)?;
    let same_library = torch.and_then(|torch| torch.library.clone()).filter(|_| backend.on_gpus);
    match same_library {
        Some(file) if std::env::var_os(NCCL_LIBRARY).is_none() => {
            note(&format!("{} uses PyTorch's NCCL, so that like is compared with like", backend.name));
            spec.env.push((NCCL_LIBRARY.into(), file.into()));
        }
        Some(_) => note(&format!("{NCCL_LIBRARY} is set, so PyTorch may use another NCCL than ours")),
        None => {}
    }
    let total = job.cases(spec.world).len() as u64;
    let bar =
        ProgressBar::new(total).with_style(ProgressStyle::with_template("{pos}/{len} {msg} {elapsed}")?);
    let printer = bar.clone();
    let output: crate::launch::LineSink = std::sync::Arc::new(move |line: &str| {
        printer.suspend(|| eprintln!("{line}"));
    });
    let spec = LaunchSpec { output, ..spec };
    let mut rows: Vec<Row> = Vec::new();
    let report = job::launch_job(spec, &Job::Bench(job), &mut |message| match &message.event {
        Event::Library(library) => {
            bar.suspend(|| note(&format!("{}: {library}", backend.name)));
            libraries.insert(backend.name.to_owned(), library.clone());
        }
        Event::Phase(text) if message.rank == 0 => bar.set_message(text.clone()),
        Event::Row(row) => {
            bar.inc(1);
            bar.suspend(|| {
                if rows.last().is_none_or(|last| last.op != row.op) {
                    println!("{}", table::section(row));
                }
                println!("{}", table::line(row));
                let _ = std::io::stdout().flush();
            });
            rows.push((**row).clone());
        }
        _ => {}
    })?;
    bar.finish_and_clear();
    if let Some(problem) = report.problem() {
        bail!("the {} benchmark did not finish: {problem}", backend.name);
    }
    ensure!(rows.len() as u64 == total, "{} of {total} rows were measured", rows.len());
    Ok(rows)
}

/// A line of the table that is not a row.
fn note(text: &str) {
    println!("# {text}");
}

fn prepare(args: &BenchArgs, backend: Backend) -> Result<(BenchJob, LaunchSpec)> {
    let gpus = if backend.on_gpus { gpus::visible().map_err(anyhow::Error::msg)? } else { Vec::new() };
    if backend.on_gpus {
        kernels::ensure()?;
    }
    let world = args.world.unwrap_or(if backend.on_gpus { gpus.len() } else { 4 });
    let sizes = args.sizes.as_deref().unwrap_or(if backend.on_gpus { "1K..1G" } else { "1K..16M*4" });
    let tokens = match (args.tokens.is_empty(), backend.on_gpus) {
        (false, _) => args.tokens.clone(),
        (true, true) => vec![1, 4, 8, 32, 128, 512, 1024],
        (true, false) => vec![1, 8, 128, 1024],
    };
    let job = BenchJob {
        backend: backend.name.to_owned(),
        ops: parse_ops(&args.op)?,
        sizes: sizes::parse_sizes(sizes)?,
        tokens,
        hidden: args.hidden.unwrap_or(if backend.on_gpus { 8192 } else { 1024 }),
        dtype: args.dtype,
        redop: args.redop,
        effort: Effort {
            iters: args.iters,
            warmup: args.warmup,
            reps: args.reps,
            graph: !args.no_graph || args.graph,
            budget_us: 40_000.0,
        },
    };
    ensure!(job.hidden > 0, "--hidden must be at least 1");
    let mode = args.mode.unwrap_or(if backend.on_gpus { Mode::Processes } else { Mode::Threads });
    let spec = job::spec(world, mode, Duration::from_secs(args.timeout), Duration::from_secs(30))?;
    Ok((job, spec.with_gpus(&gpus, backend.on_gpus)?))
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
mod tests {
    use super::*;

    #[test]
    fn a_targets_file_that_is_not_there_is_noticed_before_anything_is_measured() {
        #[derive(clap::Parser)]
        struct Parsed {
            #[command(flatten)]
            args: BenchArgs,
        }
        // A backend that does not exist: measuring would be the first to say so.
        let words = ["bench", "--backend", "none", "--check", "/nonexistent/targets.json"];
        let args = <Parsed as clap::Parser>::try_parse_from(words).unwrap().args;
        let error = format!("{:#}", run(&args).unwrap_err());
        assert!(error.contains("/nonexistent/targets.json"), "{error}");
    }

    #[test]
    fn operations_are_named_as_the_library_names_them() {
        assert_eq!(parse_ops("all").unwrap().len(), 16);
        assert_eq!(parse_ops("all_gather, barrier").unwrap(), [OpKind::AllGather, OpKind::Barrier]);
        let error = parse_ops("all_reduce,allgather").unwrap_err().to_string();
        assert!(error.contains("\"allgather\"") && error.contains("all_gather_v"), "{error}");
    }
}
