//! `cargo xtask tune`: which algorithm in which launch shape is fastest for which size, measured on this machine's GPUs
//! and written as a table that the backend reads.
//!
//! Ranks measure ([`rank`]), each size as far as its share of the time goes ([`explore`]); from the times, rows are
//! picked ([`pick`]).

mod explore;
mod pick;
pub mod rank;

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use comm_core::tuning::{Rule, Table, Tables};
use comm_core::{DType, OpKind};
use indicatif::{ProgressBar, ProgressStyle};

use crate::bench::{human, parse_sizes};
use crate::events::Event;
use crate::launch::{LaunchSpec, Mode};
use crate::rank::Job;
use crate::{gpus, job, kernels};

use pick::Point;
pub use rank::{TuneEvent, TuneJob};

/// Options of `cargo xtask tune`.
#[derive(Args, Debug)]
pub struct TuneArgs {
    /// Numbers of ranks, comma separated [default: all GPUs].
    #[arg(long, value_delimiter = ',', value_name = "N,..")]
    world: Vec<usize>,
    /// Operations, comma separated, or `all` that are chosen for by size.
    #[arg(long, default_value = "all", value_name = "OP,..")]
    op: String,
    /// The backend; p2p is the one that chooses by a table.
    #[arg(long, default_value = comm_p2p::NAME)]
    backend: String,
    /// Sizes of the full buffer, as for bench.
    #[arg(long, default_value = "1K..1G", value_name = "SIZES")]
    sizes: String,
    /// Rows of the fused norm, comma separated.
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "N,..",
        default_value = "1,2,4,8,16,32,64,128,256,512,1024"
    )]
    tokens: Vec<usize>,
    /// Columns of the fused norm.
    #[arg(long, default_value_t = 8192)]
    hidden: usize,
    /// Element type.
    #[arg(long, default_value = "bf16")]
    dtype: DType,
    /// Repetitions of each graph, of which the median counts.
    #[arg(long, default_value_t = 5)]
    reps: usize,
    /// Seconds for all measurements. Sizes share them; what is in force comes first, then each algorithm, then shapes.
    #[arg(long, default_value_t = 600)]
    budget: u64,
    /// Percent that a change to another row must gain.
    #[arg(long, default_value_t = 3.0)]
    hysteresis: f64,
    /// The table's file. What an older one there says of other GPUs, worlds and operations is kept.
    #[arg(long, default_value = "p2p-table.json", value_name = "FILE")]
    out: PathBuf,
    /// Every measurement, a line each, tab separated: ranks, operation, whether registered, bytes, microseconds, choice.
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,
}

/// Runs the command.
///
/// # Errors
/// When an argument makes no sense, a rank fails, or an algorithm gives wrong results.
pub fn run(args: &TuneArgs) -> Result<()> {
    rank::check_backend(&args.backend)?;
    ensure!(args.reps > 0 && args.budget > 0, "--reps and --budget must be at least 1");
    ensure!(args.hysteresis >= 0.0 && args.hysteresis < 100.0, "--hysteresis is a percentage from 0 to 100");
    ensure!(
        std::env::var_os("COMM_P2P_ALGO").is_none(),
        "COMM_P2P_ALGO forces an algorithm: unset it, or there is nothing to choose from"
    );
    gpus::refuse_shared()?;
    let mut tables = read(&args.out)?;
    let rules = parse_rules(&args.op)?;
    let sizes = parse_sizes(&args.sizes)?;
    let gpus = gpus::visible().map_err(anyhow::Error::msg)?;
    kernels::ensure()?;
    let worlds = if args.world.is_empty() { vec![gpus.len()] } else { args.world.clone() };
    let start = Instant::now();
    let (mut wrong, mut without) = (0, 0);
    for (index, &world) in worlds.iter().enumerate() {
        let left = args.budget as f64 - start.elapsed().as_secs_f64();
        let budget = (left / (worlds.len() - index) as f64).max(1.0);
        let tune = job_of(args, &rules, &sizes, budget);
        let limit = Duration::from_secs_f64(budget * 2.0 + 180.0);
        let spec =
            job::spec(world, Mode::Processes, limit, Duration::from_secs(30))?.with_gpus(&gpus, true)?;
        let (measured, problem) = measure(tune, spec, world)?;
        if let Some(path) = &args.log {
            measured.log(world, path)?;
        }
        wrong += measured.wrong;
        for (op, registered) in measured.without_choice() {
            let kind = if registered { " on registered operands" } else { "" };
            println!(
                "# {op}{kind}: no choice for it could be measured at some size; its rows stay as they were"
            );
            without += 1;
        }
        if let Some(table) = measured.table(&tables, world, args.hysteresis / 100.0)? {
            print!("{}", summary(&table));
            tables.insert(table);
            write(&args.out, &tables)?;
        }
        if let Some(problem) = problem {
            bail!("tuning for {world} ranks did not finish: {problem}; {} has what did", args.out.display());
        }
    }
    println!("# written to {0}; to use it: COMM_P2P_TABLE={0}", args.out.display());
    ensure!(wrong == 0, "{wrong} measurements gave wrong results; they are in no table");
    ensure!(without == 0, "{without} operations had no right choice at some size: see above");
    Ok(())
}

fn job_of(args: &TuneArgs, rules: &[(OpKind, bool)], sizes: &[u64], budget: f64) -> TuneJob {
    let (mut sizes, mut tokens) = (sizes.to_vec(), args.tokens.clone());
    sizes.sort_unstable();
    tokens.sort_unstable();
    let (hidden, dtype, reps) = (args.hidden.max(1), args.dtype, args.reps);
    TuneJob { rules: rules.to_vec(), sizes, tokens, hidden, dtype, reps, budget }
}

/// What the ranks reported.
#[derive(Default)]
struct Measured {
    gpu: String,
    in_force: Option<Table>,
    points: Vec<(OpKind, bool, Point)>,
    /// The rules of which every size was measured.
    complete: Vec<(OpKind, bool)>,
    /// Measurements with wrong results.
    wrong: usize,
}

impl Measured {
    /// Adds every measurement to a file.
    fn log(&self, world: usize, path: &Path) -> Result<()> {
        let mut text = String::new();
        for (op, registered, Point { bytes, times }) in &self.points {
            for (choice, us) in times {
                text += &format!("{world}\t{op}\t{registered}\t{bytes}\t{us:.3}\t{choice}\n");
            }
        }
        let mut file = std::fs::File::options().create(true).append(true).open(path)?;
        file.write_all(text.as_bytes()).with_context(|| format!("writing {}", path.display()))
    }

    fn of_rule(&self, rule: (OpKind, bool)) -> impl Iterator<Item = &Point> {
        self.points.iter().filter(move |point| (point.0, point.1) == rule).map(|(.., point)| point)
    }

    /// The complete rules with a size at which no choice could be measured: none can be in force there.
    fn without_choice(&self) -> impl Iterator<Item = (OpKind, bool)> {
        let lacking = |&rule: &(OpKind, bool)| self.of_rule(rule).any(|point| point.times.is_empty());
        self.complete.iter().copied().filter(lacking)
    }

    /// The table with the new rows; over the file's for the same GPU and world, or else the one in force. `None` if there
    /// are no new ones: no rule is complete, or none has a choice for every size.
    fn table(&self, file: &Tables, world: usize, hysteresis: f64) -> Result<Option<Table>> {
        let Some(in_force) = &self.in_force else { return Ok(None) };
        let of_file = file.of_world(&self.gpu, world).filter(|table| table.gpu() == self.gpu);
        let mut rules = of_file.unwrap_or(in_force).rules().to_vec();
        let (mut names, mut renewed): (Vec<&str>, usize) = (Vec::new(), 0);
        for &(op, registered) in &self.complete {
            let points: Vec<Point> = self.of_rule((op, registered)).cloned().collect();
            let Some(rows) = pick::pick(&points, hysteresis) else { continue };
            renewed += 1;
            let rule = Rule { op, registered, measured: pick::figures(&points, &rows), rows };
            match rules.iter_mut().find(|other| (other.op, other.registered) == (op, registered)) {
                Some(other) => *other = rule,
                None => rules.push(rule),
            }
            if names.last() != Some(&op.name()) {
                names.push(op.name());
            }
        }
        if renewed == 0 {
            return Ok(None);
        }
        let before =
            of_file.map_or_else(|| format!("else {}", in_force.source()), |table| table.source().to_owned());
        let source = match renewed == comm_p2p::TUNABLE.len() {
            true => format!("measured by tune on {world} x {}", self.gpu),
            false => format!("{} measured by tune on {world} x {}; {before}", names.join(", "), self.gpu),
        };
        Ok(Some(Table::new(&*self.gpu, world, source, rules)?))
    }
}

/// Runs the ranks. What they reported before a failure is returned with it.
fn measure(tune: TuneJob, spec: LaunchSpec, world: usize) -> Result<(Measured, Option<String>)> {
    let cases: Vec<_> = tune.rules.iter().map(|&(op, _)| tune.cases(op, world).len()).collect();
    let expected: Vec<_> = tune.rules.iter().copied().zip(cases.iter().copied()).collect();
    let total = cases.iter().sum::<usize>() as u64;
    ensure!(cases.iter().all(|&count| count > 0), "there is no size to measure for some operation");
    let style = ProgressStyle::with_template("{pos}/{len} {msg} {elapsed}")?;
    let bar = ProgressBar::new(total).with_style(style);
    let printer = bar.clone();
    let output: crate::launch::LineSink =
        std::sync::Arc::new(move |line: &str| printer.suspend(|| eprintln!("{line}")));
    let spec = LaunchSpec { output, ..spec };
    let mut measured = Measured::default();
    let mut unread = None;
    let report = job::launch_job(spec, &Job::Tune(tune), &mut |message| match &message.event {
        Event::Phase(text) if message.rank == 0 => bar.set_message(text.clone()),
        Event::Tune(event) => match &**event {
            TuneEvent::Started { gpu, tables } => {
                bar.suspend(|| println!("# {world} x {gpu}"));
                measured.gpu.clone_from(gpu);
                match Tables::parse(tables) {
                    Ok(tables) => measured.in_force = tables.all().first().cloned(),
                    Err(error) => unread = Some(error),
                }
            }
            TuneEvent::Explored { op, registered, bytes, times, wrong, measurements, cut_short } => {
                bar.inc(1);
                let point = Point { bytes: *bytes, times: times.clone() };
                bar.suspend(|| {
                    println!("{}", line(*op, *registered, &point, *measurements, *cut_short));
                    for (choice, count) in wrong {
                        println!("    WRONG: {choice}: {count} elements");
                    }
                });
                measured.wrong += wrong.len();
                measured.points.push((*op, *registered, point));
            }
        },
        _ => {}
    })?;
    bar.finish_and_clear();
    if let Some(error) = unread {
        return Err(error).context("reading the table in force");
    }
    for ((op, registered), count) in expected {
        let done = measured.points.iter().filter(|point| (point.0, point.1) == (op, registered)).count();
        if done == count {
            measured.complete.push((op, registered));
        }
    }
    Ok((measured, report.problem()))
}

/// The three fastest at a size.
fn line(op: OpKind, registered: bool, point: &Point, measurements: usize, cut_short: bool) -> String {
    let mut sorted: Vec<_> = point.times.iter().collect();
    sorted.sort_by(|a, b| a.1.total_cmp(&b.1));
    let fastest =
        sorted.iter().take(3).map(|(choice, us)| format!("{us:.2} us {choice}")).collect::<Vec<_>>();
    format!(
        "{op:<20} {:<12} {:>6}  {}  ({measurements} measured{})",
        if registered { "registered" } else { "" },
        human(point.bytes),
        fastest.join(" | "),
        if cut_short { ", time was up" } else { "" },
    )
}

fn summary(table: &Table) -> String {
    let mut text = format!("# {} for {} x {}\n", table.source(), table.world(), table.gpu());
    for rule in table.rules().iter().filter(|rule| !rule.measured.is_empty()) {
        for row in &rule.rows {
            let kind = if rule.registered { "registered" } else { "" };
            text += &format!("{:<20} {kind:<12} from {:>6}  {}\n", rule.op, human(row.from), row.choice);
        }
    }
    text
}

/// The rules of the named operations.
fn parse_rules(text: &str) -> Result<Vec<(OpKind, bool)>> {
    if text == "all" {
        return Ok(comm_p2p::TUNABLE.to_vec());
    }
    let mut rules = Vec::new();
    for name in text.split(',').map(str::trim) {
        let before = rules.len();
        rules.extend(comm_p2p::TUNABLE.into_iter().filter(|(op, _)| op.name() == name));
        if rules.len() == before {
            let mut known: Vec<_> = comm_p2p::TUNABLE.iter().map(|(op, _)| op.name()).collect();
            known.dedup();
            bail!("{name:?} is no operation that is chosen for by size; known are all, {}", known.join(", "));
        }
    }
    Ok(rules)
}

fn read(path: &Path) -> Result<Tables> {
    if !path.exists() {
        return Ok(Tables::default());
    }
    let text = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    Tables::parse(&text).with_context(|| {
        format!("{} exists and is no file of tables; remove it or name another", path.display())
    })
}

fn write(path: &Path, tables: &Tables) -> Result<()> {
    // Whole or not at all: a run that is ended must not leave half a table.
    let temporary = path.with_extension("json.new");
    std::fs::write(&temporary, tables.to_string())
        .and_then(|()| std::fs::rename(&temporary, path))
        .with_context(|| format!("writing {}", path.display()))
}

#[cfg(test)]
mod tests;
