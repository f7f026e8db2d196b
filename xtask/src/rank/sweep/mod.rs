//! One rank's part of a run of every kernel: small, in every algorithm, with every result checked. For running under a
//! tool that watches the kernels.

mod coverage;
mod host;
mod local;
mod moves;
mod norms;
mod operations;
mod quantized;
mod uneven;

use std::collections::BTreeSet;
use std::sync::Arc;

use anyhow::{Context, Result};
use comm_core::tuning::{Choice, Row, Rule, Table};
use comm_core::{
    BackendFactory, CreateContext, DType, Deadline, DeviceAddr, DeviceComm, DeviceMemory, HostCommExt,
    OpKind, ReduceOp,
};
use comm_kernels::locate::KernelSet;
use comm_kernels::pattern::{Expected, Mismatches, Pattern};
use comm_kernels::{CudaMemory, Kernels, launched};
use comm_p2p::{P2pComm, P2pFactory};
use serde::{Deserialize, Serialize};

use self::coverage::{CUBE, Run};
use crate::events::{CaseResult, Event};
use crate::gpus;
use crate::rank::RankContext;

/// A run of every kernel.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SweepJob {}

const FLOATS: [DType; 3] = [DType::F32, DType::F16, DType::BF16];
/// Small enough for several rounds of every algorithm at the counts below.
const SMALL: [(&str, &str); 6] = [
    ("p2p.packet_slots", "512"),
    ("p2p.lamport_slots", "512"),
    ("p2p.line_slots", "512"),
    ("p2p.staging_bytes", "16384"),
    ("p2p.pair_bytes", "1024"),
    ("p2p.cell_ctas", "2"),
];
/// Memory of a rank that shares its GPU, taken at once as other commands' ranks do: more than the run uses.
const RESERVE: usize = 128 << 20;
/// What is wrong with one part of the run is told by its first few problems.
const TOLD: usize = 4;

/// A rank's device and the data on it.
struct Bench {
    memory: CudaMemory,
    kernels: Arc<Kernels>,
    words: DeviceAddr,
    rank: usize,
    world: usize,
    seed: u64,
    /// Whether lines could be sent.
    lines: bool,
    /// What was wrong since the last verdict, besides what the words count.
    problems: Vec<String>,
}

/// Every algorithm that can be forced.
const ALGORITHMS: [&str; 13] = [
    "one_shot", "two_shot", "cells", "steps", "packets", "relayed", "lamport", "lines", "direct", "spread",
    "staged", "composed", "pull",
];

/// Runs all kernels; every rank reports its cases.
///
/// # Errors
/// When the device or a communicator cannot be had, or a call fails. Wrong results are reported as failed cases.
pub fn run(context: &RankContext) -> Result<()> {
    context.events.phase("starting on the GPU");
    // Before the first is looked up.
    launched::record();
    let memory = open(context)?;
    let kernels = Kernels::load(memory.context()).context("loading the kernels")?;
    let words = memory.allocate(16)?;
    let (rank, world) = (context.host.rank(), context.host.size());
    let mut bench = Bench { memory, kernels, words, rank, world, seed: 0, lines: true, problems: Vec::new() };
    bench.local(context).context("kernels of one device")?;
    for algorithm in ALGORITHMS {
        context.events.phase(format!("algorithm {algorithm}"));
        bench.algorithm(context, algorithm).with_context(|| format!("algorithm {algorithm}"))?;
    }
    for units in [2, 4] {
        let name = format!("cells of {units} units");
        context.events.phase(name.clone());
        bench.cells(context, units, &name).context(name)?;
    }
    if world == CUBE {
        context.events.phase("hybrid cube mesh");
        bench.cube(context).context("hybrid cube mesh")?;
    }
    none_is_missed(context, &Run { world, lines: bench.lines, shared: gpus::are_shared() })
}

/// The rank's GPU: its own, or where they are shared, the one that it is dealt.
fn open(context: &RankContext) -> Result<CudaMemory> {
    let shared = gpus::are_shared();
    let ordinal = gpus::of_rank(context.local_rank, comm_kernels::driver::device_count()?, shared);
    let memory = CudaMemory::new(ordinal)?;
    Ok(if shared { memory.with_reserve(RESERVE)? } else { memory })
}

/// Whether the ranks have launched every kernel among them. Rank 0 says so, and which were left out for what reason.
fn none_is_missed(context: &RankContext, run: &Run) -> Result<()> {
    let own: Vec<String> = launched::names().into_iter().map(str::to_owned).collect();
    let launched: BTreeSet<String> = context.host.all_gather(&own)?.into_iter().flatten().collect();
    if context.host.rank() > 0 {
        return Ok(());
    }
    let set = KernelSet::locate()?;
    let compiled = set.manifest().modules.values().flat_map(|module| module.kernels.keys());
    let case = |name: String, result| context.events.emit(Event::Case { name, result });
    match run.judge(compiled.map(String::as_str), &launched) {
        Ok(left_out) => {
            for (reason, count) in left_out {
                case(format!("{count} kernels"), CaseResult::Skipped(reason.to_owned()));
            }
            case(format!("{} kernels launched", launched.len()), CaseResult::Passed);
        }
        Err(problem) => case("every kernel".to_owned(), CaseResult::Failed(problem)),
    }
    Ok(())
}

/// What everything by staging memory must have used.
const STAGED: [&str; 12] = [
    "all_reduce staged",
    "reduce staged",
    "all_to_all staged",
    "send staged",
    "recv staged",
    "group staged",
    "barrier flags",
    "all_gather_2d staged",
    "all_gather_v staged",
    "reduce_scatter staged",
    "reduce_scatter_v staged",
    "broadcast staged",
];

/// The communicator's table, with small blocks of cells and direct stores at every size.
fn by_cells(comm: &P2pComm, units: u32) -> Result<Table> {
    let cells = Choice { block: Some(128), units: Some(units), ..Choice::of("cells".to_owned()) };
    let direct = Choice { block: Some(64), chunk: Some(4096), ..Choice::of("direct".to_owned()) };
    let rules = [
        (OpKind::AllReduce, true, &cells),
        (OpKind::ReduceScatter, false, &cells),
        (OpKind::AllGather, true, &direct),
    ];
    let mut table = comm.table();
    for (op, registered, choice) in rules {
        let rows = vec![Row { from: 0, choice: choice.clone() }];
        table = table.with_rule(Rule { op, registered, rows, measured: Vec::new() })?;
    }
    Ok(table)
}

impl Bench {
    fn algorithm(&mut self, context: &RankContext, algorithm: &str) -> Result<()> {
        let mut options = SMALL.to_vec();
        options.push(("p2p.algorithm", algorithm));
        let comm = self.connect(context, &options)?;
        self.collectives(&*comm)?;
        // What has the algorithm, and of that what must have been used.
        let used: &[&str] = match algorithm {
            // Its averages.
            "one_shot" => {
                self.uneven(&*comm)?;
                self.norms(&*comm)?;
                &[
                    "all_reduce one_shot",
                    "all_reduce_rmsnorm one_shot",
                    "all_reduce_rmsnorm_quantized one_shot",
                ]
            }
            "lamport" => {
                self.norms(&*comm)?;
                &["all_reduce_rmsnorm lamport", "all_reduce_rmsnorm_quantized lamport"]
            }
            "two_shot" => {
                self.uneven(&*comm)?;
                self.norms(&*comm)?;
                self.two_groups(&*comm)?;
                self.quantized(&*comm)?;
                &[
                    "reduce_scatter_v two_shot",
                    "all_reduce_rmsnorm two_shot",
                    "all_reduce_rmsnorm_quantized two_shot",
                    "all_reduce_rmsnorm_two_group composed",
                    "all_reduce_rmsnorm_two_group_quantized composed",
                    "all_reduce_quantized two_shot",
                ]
            }
            "composed" => {
                self.norms(&*comm)?;
                &["all_reduce_rmsnorm composed", "all_reduce_rmsnorm_quantized composed"]
            }
            "packets" => {
                self.uneven(&*comm)?;
                &["all_gather_v packets"]
            }
            "direct" => {
                self.uneven(&*comm)?;
                &["all_gather_v direct"]
            }
            "staged" => {
                self.by_staging(&*comm)?;
                &STAGED
            }
            "lines" => {
                // Whether they can be sent is for the ranks' links to say; the table says what goes instead.
                let plan = comm.planned(OpKind::AllGather, 4096 * self.world, false);
                self.lines = plan.is_some_and(|plan| plan.algorithm == algorithm);
                if self.lines {
                    &["all_gather lines", "broadcast lines", "reduce_scatter lines"]
                } else {
                    &[]
                }
            }
            _ => &[algorithm],
        };
        self.end(context, comm, algorithm, used)
    }

    /// A form of cells, which a table tells from the other by size, and what is captured on results of its own.
    fn cells(&mut self, context: &RankContext, units: u32, name: &str) -> Result<()> {
        let mut options: Vec<_> = SMALL.into_iter().filter(|(name, _)| *name != "p2p.packet_slots").collect();
        options.push(("p2p.graph_registration", "on"));
        let comm = self.connect(context, &options)?;
        comm.set_table(&by_cells(&comm, units)?)?;
        self.collectives(&*comm)?;
        self.captured(&*comm)?;
        self.uneven(&*comm)?;
        let used = ["cells", "direct", "captured", "all_gather_v direct", "reduce_scatter_v cells"];
        self.end(context, comm, name, &used)
    }

    /// Eight ranks as if each reached four others alone: the kernels for that, and what goes by staging memory there.
    fn cube(&mut self, context: &RankContext) -> Result<()> {
        let mut options = SMALL.to_vec();
        options.push(("p2p.topology", "hybrid_cube_mesh"));
        let comm = self.connect(context, &options)?;
        self.collectives(&*comm)?;
        self.by_staging(&*comm)?;
        self.norms(&*comm)?;
        let used = ["all_reduce cube_mesh", "all_gather cube_mesh", "all_reduce_rmsnorm composed"];
        self.end(context, comm, "hybrid cube mesh", &[&used[..], &STAGED].concat())
    }

    /// What goes by staging memory, or by none of the ranks' own kernels.
    fn by_staging(&mut self, comm: &dyn DeviceComm) -> Result<()> {
        self.reductions(comm)?;
        self.transfers(comm)?;
        self.blocks(comm)?;
        self.uneven(comm)
    }

    fn connect(&self, context: &RankContext, options: &[(&str, &str)]) -> Result<Arc<P2pComm>> {
        let promises = [("p2p.symmetric_operands", "on"), ("p2p.test_clear_peers", "on")];
        let options = options.iter().chain(&promises);
        let create = CreateContext {
            host: Arc::clone(&context.host),
            memory: self.memory.kind(),
            timeout: context.host.timeout(),
            checked: false,
            options: options.map(|&(name, value)| (name.to_owned(), value.to_owned())).collect(),
        };
        let capabilities = context.host.all_gather(&P2pFactory.probe(&create)?)?;
        Ok(Arc::new(P2pFactory.connect(&create, &capabilities)?))
    }

    /// Closes a communicator and reports how its calls went; `used`: algorithms of which at least one call was made, of any
    /// operation or, behind its name, of one.
    fn end(&mut self, context: &RankContext, comm: Arc<P2pComm>, name: &str, used: &[&str]) -> Result<()> {
        self.memory.synchronize()?;
        comm.poll()?;
        let seen: BTreeSet<String> = comm
            .usage()
            .into_iter()
            .flat_map(|used| [format!("{} {}", used.op, used.algorithm), used.algorithm.into_owned()])
            .collect();
        context.host.barrier(Deadline::after(context.host.timeout()))?;
        comm.close()?;
        let missing: Vec<_> = used.iter().filter(|name| !seen.contains(**name)).collect();
        // Shares of GPUs have no room for some algorithms.
        let must_be_used = !gpus::are_shared();
        let unused =
            (must_be_used && !missing.is_empty()).then(|| format!("never used: {missing:?}; used: {seen:?}"));
        self.report(context, name, unused)
    }

    /// Reports how a part of the run went, and begins the next.
    fn report(&mut self, context: &RankContext, name: &str, unused: Option<String>) -> Result<()> {
        let found = self.verdict()?;
        let mut problems = std::mem::take(&mut self.problems);
        problems.truncate(TOLD);
        problems.extend((found.wrong > 0).then(|| format!("{found:?}")));
        problems.extend(unused);
        let result = match problems.is_empty() {
            true => CaseResult::Passed,
            false => CaseResult::Failed(problems.join("; ")),
        };
        context.events.emit(Event::Case { name: name.to_owned(), result });
        Ok(())
    }

    /// What was wrong since the last verdict.
    fn verdict(&self) -> Result<Mismatches> {
        let mut bytes = [0; 16];
        // SAFETY: both words are this object's, and the stream is its memory's own.
        unsafe {
            self.memory.download(&mut bytes, self.words)?;
            self.kernels.verify_reset(self.words, self.memory.stream())?;
        }
        let (wrong, first) = bytes.split_at(8);
        let word = |bytes: &[u8]| bytes.iter().rev().fold(0_u64, |word, &byte| word << 8 | u64::from(byte));
        Ok(Mismatches::from_words([word(wrong), word(first)]))
    }

    /// A number for data that is not what any data was before.
    const fn next_seed(&mut self) -> u64 {
        self.seed += 1;
        self.seed
    }

    /// New data of this rank.
    fn fill(&mut self, to: DeviceAddr, count: usize, dtype: DType, op: Option<ReduceOp>) -> Result<Pattern> {
        let data = Pattern::new(self.next_seed(), op, self.world);
        // SAFETY: callers pass ranges of their own allocations; the stream is the memory's own.
        unsafe { self.kernels.fill(to, count, dtype, &data, self.rank, 0, self.memory.stream())? };
        Ok(data)
    }

    /// Bytes from the host.
    fn put(&self, to: DeviceAddr, bytes: &[u8]) -> Result<()> {
        // SAFETY: as in `fill`.
        unsafe { self.memory.upload(to, bytes)? };
        Ok(())
    }

    /// Bytes for the host, once all that was enqueued is done.
    fn fetch(&self, from: DeviceAddr, bytes: usize) -> Result<Vec<u8>> {
        let mut content = vec![0; bytes];
        // SAFETY: as in `fill`.
        unsafe { self.memory.download(&mut content, from)? };
        Ok(content)
    }

    /// Keeps what a comparison on the host has found for the next verdict.
    fn must_hold(&mut self, what: &str, part: &str, problem: Option<String>) {
        self.problems.extend(problem.map(|problem| format!("{what}: {part}: {problem}")));
    }

    fn poison(&self, to: DeviceAddr, bytes: usize) -> Result<()> {
        let data = Pattern::new(0xdead_beef, None, 1);
        // SAFETY: as in `fill`.
        unsafe { self.kernels.fill(to, bytes, DType::U8, &data, 0, 0, self.memory.stream())? };
        Ok(())
    }

    fn expect(
        &self,
        at: DeviceAddr,
        count: usize,
        dtype: DType,
        data: &Pattern,
        what: (Expected, usize),
    ) -> Result<()> {
        let (expected, first) = (what.0, what.1 as u64);
        // SAFETY: as in `fill`; the words are this object's.
        unsafe {
            let stream = self.memory.stream();
            self.kernels.verify(at, count, dtype, data, expected, first, 0, self.words, stream)?;
        }
        Ok(())
    }
}
