//! One backend's part of a benchmark, seen from outside: its ranks are started, and what they report becomes the table.

use std::collections::BTreeMap;
use std::io::Write;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use indicatif::{ProgressBar, ProgressStyle};

use crate::backends::Backend;
use crate::bench::choose::Outcome;
use crate::bench::peer::Torch;
use crate::bench::plan::{BenchJob, Effort};
use crate::bench::row::Row;
use crate::bench::{BenchArgs, parse_ops, sizes, table};
use crate::events::Event;
use crate::gpus;
use crate::job;
use crate::kernels;
use crate::launch::{LaunchSpec, Mode};
use crate::rank::Job;

/// The environment variable that names the file which the ranks load NCCL from.
const NCCL_LIBRARY: &str = "COMM_NCCL_LIBRARY";

/// Measures a backend and prints its rows as they come. `torch`: the peer that is measured next, whose NCCL ours is to use.
/// What the backend works with goes to `libraries`.
///
/// # Errors
/// When an argument makes no sense or a rank fails. That the machine is not one for the backend is an outcome.
pub fn run(
    args: &BenchArgs,
    backend: Backend,
    torch: Option<&Torch>,
    libraries: &mut BTreeMap<String, String>,
) -> Result<Outcome> {
    let (job, mut spec) = prepare(args, backend)?;
    let same_library =
        torch.and_then(|torch| torch.library.clone()).filter(|_| backend.name == comm_nccl::NAME);
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
    let mut not_made = None;
    let report = job::launch_job(spec, &Job::Bench(job), &mut |message| match &message.event {
        Event::Library(library) => {
            bar.suspend(|| note(&format!("{}: {library}", backend.name)));
            libraries.insert(backend.name.to_owned(), library.clone());
        }
        Event::NotMade(reason) => not_made = Some(reason.clone()),
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
    if let Some(reason) = not_made {
        return Ok(Outcome::NotMade(reason));
    }
    ensure!(rows.len() as u64 == total, "{} of {total} rows were measured", rows.len());
    Ok(Outcome::Rows(rows))
}

/// A line of the table that is not a row.
pub fn note(text: &str) {
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
        registered: !args.unregistered,
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
