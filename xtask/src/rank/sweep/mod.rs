//! One rank's part of a run of every kernel: small, in every algorithm, with every result checked. For running under a
//! tool that watches the kernels.

mod local;
mod operations;
mod uneven;

use std::collections::BTreeSet;
use std::sync::Arc;

use anyhow::{Context, Result};
use comm_core::tuning::{Choice, Row, Rule, Table};
use comm_core::{
    BackendFactory, CreateContext, DType, Deadline, DeviceAddr, DeviceComm, DeviceMemory, HostCommExt,
    OpKind, ReduceOp,
};
use comm_kernels::pattern::{Expected, Mismatches, Pattern};
use comm_kernels::{CudaMemory, Kernels};
use comm_p2p::{P2pComm, P2pFactory};
use serde::{Deserialize, Serialize};

use crate::events::{CaseResult, Event};
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

/// A rank's device and the data on it.
struct Bench {
    memory: CudaMemory,
    kernels: Arc<Kernels>,
    words: DeviceAddr,
    rank: usize,
    world: usize,
    seed: u64,
}

/// Runs all kernels; every rank reports its cases.
///
/// # Errors
/// When the device or a communicator cannot be had, or a call fails. Wrong results are reported as failed cases.
pub fn run(context: &RankContext) -> Result<()> {
    context.events.phase("starting on the GPU");
    let memory = CudaMemory::new(context.local_rank)?;
    let kernels = Kernels::load(memory.context()).context("loading the kernels")?;
    let words = memory.allocate(16)?;
    let (rank, world) = (context.host.rank(), context.host.size());
    let mut bench = Bench { memory, kernels, words, rank, world, seed: 0 };
    bench.local(context).context("kernels of one device")?;
    let algorithms = [
        "one_shot", "two_shot", "cells", "steps", "packets", "relayed", "lamport", "lines", "direct",
        "spread", "staged", "composed",
    ];
    for algorithm in algorithms {
        context.events.phase(format!("algorithm {algorithm}"));
        bench.algorithm(context, algorithm).with_context(|| format!("algorithm {algorithm}"))?;
    }
    for units in [2, 4] {
        let name = format!("cells of {units} units");
        context.events.phase(name.clone());
        bench.cells(context, units, &name).context(name)?;
    }
    Ok(())
}

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
        if algorithm == "staged" {
            self.staged(&*comm)?;
            self.blocks(&*comm)?;
        }
        let uneven: &[&str] = match algorithm {
            // For its averages; there is no V form of it.
            "one_shot" => &["all_reduce one_shot"],
            "two_shot" => &["reduce_scatter_v two_shot"],
            "packets" => &["all_gather_v packets"],
            "direct" => &["all_gather_v direct"],
            "staged" => &["all_gather_v staged", "reduce_scatter_v staged"],
            _ => &[],
        };
        if !uneven.is_empty() {
            self.uneven(&*comm)?;
        }
        self.end(context, comm, algorithm, &[&[algorithm], uneven].concat())
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
    fn end(&self, context: &RankContext, comm: Arc<P2pComm>, name: &str, used: &[&str]) -> Result<()> {
        let found = self.verdict()?;
        comm.poll()?;
        let seen: BTreeSet<String> = comm
            .usage()
            .into_iter()
            .flat_map(|used| [format!("{} {}", used.op, used.algorithm), used.algorithm.into_owned()])
            .collect();
        context.host.barrier(Deadline::after(context.host.timeout()))?;
        comm.close()?;
        let missing: Vec<_> = used.iter().filter(|name| !seen.contains(**name)).collect();
        let result = match (found.wrong, missing.is_empty()) {
            (0, true) => CaseResult::Passed,
            (0, false) => CaseResult::Failed(format!("never used: {missing:?}; used: {seen:?}")),
            _ => CaseResult::Failed(format!("{found:?}")),
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

    /// New data of this rank.
    fn fill(&mut self, to: DeviceAddr, count: usize, dtype: DType, op: Option<ReduceOp>) -> Result<Pattern> {
        self.seed += 1;
        let data = Pattern::new(self.seed, op, self.world);
        // SAFETY: callers pass ranges of their own allocations; the stream is the memory's own.
        unsafe { self.kernels.fill(to, count, dtype, &data, self.rank, 0, self.memory.stream())? };
        Ok(data)
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
