//! One rank's part of tuning: for every operation and size, candidates measured one after the other over one
//! communicator, whose table is exchanged before each.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use comm_core::tuning::{Choice, Row, Rule, Table, Tables};
use comm_core::{
    BackendFactory, Capability, CreateContext, DType, DeviceComm, HostCommExt, HostReduceOp, OpKind,
    ReduceOp, create_with,
};
use comm_p2p::{P2pComm, P2pFactory};
use serde::{Deserialize, Serialize};

use crate::backends;
use crate::bench::human;
use crate::bench::measure::Bench;
use crate::bench::plan::{BenchJob, Case, Effort};
use crate::device::Device;
use crate::events::Event;
use crate::rank::RankContext;
use crate::tune::explore::{Explored, Outcome, explore};

/// What is tuned, as data that every rank gets the same copy of.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TuneJob {
    /// Operations, and whether their results are registered, in order.
    pub rules: Vec<(OpKind, bool)>,
    /// Bytes of the full buffer, ascending.
    pub sizes: Vec<u64>,
    /// Rows of the fused norms, ascending.
    pub tokens: Vec<usize>,
    /// Columns of the fused norms.
    pub hidden: usize,
    /// Element type.
    pub dtype: DType,
    /// Repetitions of each graph.
    pub reps: usize,
    /// Seconds for all of it.
    pub budget: f64,
}

/// What rank 0 reports.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum TuneEvent {
    /// Before anything is measured.
    Started {
        /// The kind of GPU.
        gpu: String,
        /// The text of the table in use.
        tables: String,
    },
    /// A size is done.
    Explored {
        /// The operation.
        op: OpKind,
        /// Whether results were registered.
        registered: bool,
        /// Bytes of the full buffer.
        bytes: u64,
        /// The choices that gave right results, with their microseconds per operation.
        times: Vec<(Choice, f64)>,
        /// The choices that did not, with the number of wrong elements.
        wrong: Vec<(Choice, u64)>,
        /// Measurements made.
        measurements: usize,
        /// Whether some choices were left out for want of time.
        cut_short: bool,
    },
}

impl TuneJob {
    /// The sizes of an operation as benchmark cases, ascending and without repetition. Rounded down to ranks' parts of
    /// whole 16 bytes, as models have them: others are slower, and would make rows for a number of ranks that divides no
    /// power of two.
    pub fn cases(&self, op: OpKind, world: usize) -> Vec<Case> {
        let mut job = self.bench(op, true);
        let unit = 16 * world as u64;
        job.sizes.iter_mut().for_each(|size| *size = *size / unit * unit);
        let mut cases = job.cases(world);
        cases.retain(|case| case.bytes > 0);
        cases.dedup_by_key(|case| case.bytes);
        cases
    }

    fn bench(&self, op: OpKind, registered: bool) -> BenchJob {
        BenchJob {
            backend: comm_p2p::NAME.to_owned(),
            ops: vec![op],
            sizes: self.sizes.clone(),
            tokens: self.tokens.clone(),
            hidden: self.hidden,
            dtype: self.dtype,
            redop: ReduceOp::Sum,
            registered,
            effort: Effort { iters: None, warmup: 1, reps: self.reps, graph: true, budget_us: 0.0 },
        }
    }
}

/// A backend that chooses by a table, as tuning needs it.
pub trait Tunable {
    /// The kind of GPU.
    fn gpu(&self) -> &str;

    /// The table in use.
    fn table(&self) -> Table;

    /// Uses another table from now on. Collective.
    ///
    /// # Errors
    /// When the ranks' tables differ or cannot be used.
    fn set_table(&self, table: &Table) -> comm_core::Result<()>;

    /// How the operation of a case, with elements of `size` bytes, would be launched.
    fn planned(&self, case: &Case, size: usize, registered: bool) -> Option<Choice>;
}

impl Tunable for P2pComm {
    fn gpu(&self) -> &str {
        Self::gpu(self)
    }

    fn table(&self) -> Table {
        Self::table(self)
    }

    fn set_table(&self, table: &Table) -> comm_core::Result<()> {
        Self::set_table(self, table)
    }

    fn planned(&self, case: &Case, size: usize, registered: bool) -> Option<Choice> {
        match case.norm {
            Some(shape) => self.planned_norm(shape.tokens, shape.hidden * size),
            None => Self::planned(self, case.op, usize::try_from(case.bytes).ok()?, registered),
        }
    }
}

/// Runs the job.
///
/// # Errors
/// The first failure; the other ranks' waits then end too.
pub fn run(job: &TuneJob, context: &RankContext) -> Result<()> {
    let device = context.open_device(comm_p2p::NAME)?;
    let (comm, p2p) = create(context, &*device)?;
    measure(job, context, &*device, (&comm, &*p2p), &mut |event| {
        if context.host.rank() == 0 {
            context.events.emit(Event::Tune(Box::new(event)));
        }
    })?;
    context.events.phase("closing");
    comm.close()?;
    Ok(())
}

/// Measures everything on a communicator, of which `tuned` is the same. Every rank reports the same.
///
/// # Errors
/// The first failure.
pub fn measure(
    job: &TuneJob,
    context: &RankContext,
    device: &dyn Device,
    (comm, tuned): (&Arc<dyn DeviceComm>, &dyn Tunable),
    report: &mut dyn FnMut(TuneEvent),
) -> Result<()> {
    let table = tuned.table();
    let tables = Tables::new(vec![table.clone()])?.to_string();
    report(TuneEvent::Started { gpu: tuned.gpu().to_owned(), tables });
    let world = context.host.size();
    let mut left: usize = job.rules.iter().map(|&(op, _)| job.cases(op, world).len()).sum();
    let start = Instant::now();
    let mut number = 0;
    for &(op, registered) in &job.rules {
        let bench_job = job.bench(op, registered);
        let bench = Bench { job: &bench_job, context, device, comm };
        for case in job.cases(op, world) {
            // What is left of the time, in equal parts. The slowest clock counts.
            let used = context.host.all_reduce(&[start.elapsed().as_secs_f64()], HostReduceOp::Max)?[0];
            let share = (job.budget - used).max(0.0) / left.max(1) as f64;
            left = left.saturating_sub(1);
            let point = Point { bench: &bench, tuned, table: &table, case, registered, share };
            let Explored { times, wrong, measurements, cut_short } = point.explore(&mut number)?;
            let bytes = case.bytes;
            report(TuneEvent::Explored { op, registered, bytes, times, wrong, measurements, cut_short });
        }
    }
    Ok(())
}

/// One size of one operation.
struct Point<'a> {
    bench: &'a Bench<'a>,
    tuned: &'a dyn Tunable,
    table: &'a Table,
    case: Case,
    registered: bool,
    /// Seconds that it may take.
    share: f64,
}

impl Point<'_> {
    fn explore(&self, number: &mut u64) -> Result<Explored> {
        let Case { op, bytes, .. } = self.case;
        let mut choices = Vec::new();
        // First what is in force: however short the time, a new table is measured against the old one.
        choices.extend(self.table.choose(op, self.registered, bytes).cloned());
        choices.extend(comm_p2p::candidates(op));
        let mut seen: Vec<Choice> = Vec::new();
        choices.retain(|choice| {
            let new = !seen.contains(choice);
            seen.push(choice.clone());
            new
        });
        let start = Instant::now();
        explore(
            &choices,
            |choice| self.launch(choice),
            |choice| {
                *number += 1;
                self.time(*number, choice, start)
            },
        )
    }

    /// Makes a choice the only one, and says how it would be launched.
    fn launch(&self, choice: &Choice) -> Result<Option<Choice>> {
        let rows = vec![Row { from: 0, choice: choice.clone() }];
        let rule = Rule { op: self.case.op, registered: self.registered, rows, measured: Vec::new() };
        self.tuned.set_table(&self.table.clone().with_rule(rule)?)?;
        let planned = self.tuned.planned(&self.case, self.bench.job.dtype.size(), self.registered);
        Ok(planned.filter(|planned| planned.algorithm == choice.algorithm))
    }

    fn time(&self, number: u64, choice: &Choice, start: Instant) -> Result<Outcome> {
        let Case { op, bytes, .. } = self.case;
        let context = self.bench.context;
        let what = format!("{op} {} by {choice}", human(bytes));
        context.events.phase(what.clone());
        let timing = self.bench.out_of_place_only(number, self.case).context(what)?;
        let took = context.host.all_reduce(&[start.elapsed().as_secs_f64()], HostReduceOp::Max)?[0];
        Ok(Outcome { us: timing.us, wrong: timing.wrong, time_is_up: took > self.share })
    }
}

/// The communicator as every user has it, and with its own methods.
fn create(context: &RankContext, device: &dyn Device) -> Result<(Arc<dyn DeviceComm>, Arc<P2pComm>)> {
    let factory = Keeping { made: Mutex::new(None) };
    let comm = create_with(&factory, &context.create_context(device.memory(), true))?;
    let made = factory.made.into_inner().unwrap_or_else(PoisonError::into_inner);
    Ok((comm, made.context("a communicator was created by no factory")?))
}

/// The backend's factory, which keeps what it makes.
struct Keeping {
    made: Mutex<Option<Arc<P2pComm>>>,
}

impl BackendFactory for Keeping {
    fn name(&self) -> &str {
        P2pFactory.name()
    }

    fn probe(&self, context: &CreateContext) -> comm_core::Result<Capability> {
        P2pFactory.probe(context)
    }

    fn create(
        &self,
        context: &CreateContext,
        capabilities: &[Capability],
    ) -> comm_core::Result<Arc<dyn DeviceComm>> {
        let comm = Arc::new(P2pFactory.connect(context, capabilities)?);
        *self.made.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(&comm));
        Ok(comm)
    }
}

/// Whether tables of this backend can be made.
///
/// # Errors
/// When it has none.
pub fn check_backend(name: &str) -> Result<()> {
    backends::find(name)?;
    ensure!(name == comm_p2p::NAME, "the {name} backend chooses by no table; {} does", comm_p2p::NAME);
    Ok(())
}
