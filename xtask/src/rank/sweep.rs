//! One rank's part of a run of every kernel: small, in every algorithm, with every result checked. For running under a
//! tool that watches the kernels.

use std::collections::BTreeSet;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use comm_core::{
    CreateContext, DType, Deadline, DeviceAddr, DeviceComm, DeviceMemory, OpKind, P2pOp, ReduceOp,
    RmsNormArgs, create_with,
};
use comm_kernels::pattern::{Expected, Mismatches, Pattern};
use comm_kernels::{CudaMemory, Kernels};
use comm_p2p::P2pFactory;
use serde::{Deserialize, Serialize};

use crate::events::{CaseResult, Event};
use crate::rank::RankContext;

/// A run of every kernel.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SweepJob {}

const FLOATS: [DType; 3] = [DType::F32, DType::F16, DType::BF16];
/// Small enough for several rounds of every algorithm at the counts below.
const SMALL: [(&str, &str); 5] = [
    ("p2p.packet_slots", "512"),
    ("p2p.lamport_slots", "512"),
    ("p2p.staging_bytes", "16384"),
    ("p2p.pair_bytes", "1024"),
    ("p2p.cell_ctas", "2"),
];
/// One element; less than a pack more than many; more than one round.
const COUNTS: [usize; 3] = [1, 771, 3000];
/// Bytes from which all-reduces and reduce-scatters by cells use their long bursts, and those of their buffers.
const LONG: [(OpKind, usize); 2] = [(OpKind::AllReduce, 24 << 20), (OpKind::ReduceScatter, 128 << 20)];
const REDUCTIONS: [ReduceOp; 5] =
    [ReduceOp::Sum, ReduceOp::Prod, ReduceOp::Min, ReduceOp::Max, ReduceOp::Avg];

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
    bench.local(context)?;
    let algorithms = [
        "one_shot", "two_shot", "cells", "steps", "packets", "relayed", "direct", "spread", "staged",
        "composed",
    ];
    for algorithm in algorithms {
        context.events.phase(format!("algorithm {algorithm}"));
        let mut options = SMALL.to_vec();
        options.push(("p2p.algorithm", algorithm));
        let comm = bench.connect(context, &options)?;
        bench.collectives(&*comm)?;
        if algorithm == "staged" {
            bench.staged(&*comm)?;
        }
        bench.end(context, comm, algorithm, &[algorithm])?;
    }
    context.events.phase("long buffers");
    let comm = bench.connect(context, &[("p2p.algorithm", "cells")])?;
    bench.long(&*comm)?;
    bench.end(context, comm, "long buffers", &["cells"])
}

impl Bench {
    fn connect(&self, context: &RankContext, options: &[(&str, &str)]) -> Result<Arc<dyn DeviceComm>> {
        let promises = [("p2p.symmetric_operands", "on"), ("p2p.test_clear_peers", "on")];
        let options = options.iter().chain(&promises);
        let create = CreateContext {
            host: Arc::clone(&context.host),
            memory: self.memory.kind(),
            timeout: context.host.timeout(),
            checked: false,
            options: options.map(|&(name, value)| (name.to_owned(), value.to_owned())).collect(),
        };
        Ok(create_with(&P2pFactory, &create)?)
    }

    /// Closes a communicator and reports how its calls went; `used`: algorithms of which at least one call was made.
    fn end(&self, context: &RankContext, comm: Arc<dyn DeviceComm>, name: &str, used: &[&str]) -> Result<()> {
        let found = self.verdict()?;
        comm.poll()?;
        let seen: BTreeSet<String> =
            comm.usage().into_iter().map(|used| used.algorithm.into_owned()).collect();
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

    /// Kernels that need no other rank.
    fn local(&mut self, context: &RankContext) -> Result<()> {
        context.events.phase("kernels of one rank");
        let stream = self.memory.stream();
        // SAFETY: the words are this object's.
        unsafe { self.kernels.verify_reset(self.words, stream)? };
        let bytes = 64 << 10;
        let (one, two, sum) =
            (self.memory.allocate(bytes)?, self.memory.allocate(bytes)?, self.memory.allocate(bytes)?);
        for dtype in FLOATS {
            // By single elements, by 16 bytes, and in more than one block.
            for (hidden, skip) in [(100, 1), (264, 0), (4096, 0)] {
                let size = dtype.size() as u64;
                let place = |base: DeviceAddr, row: u64| base.offset(row * 16_384 + skip * size);
                for matrix in [one, two, sum] {
                    self.fill(matrix, bytes / dtype.size(), dtype, Some(ReduceOp::Sum))?;
                }
                let args = RmsNormArgs {
                    input: place(one, 0),
                    residual: place(two, 0),
                    residual_out: place(two, 0),
                    bias: Some(place(sum, 0)),
                    weight: place(sum, 1),
                    output: place(one, 0),
                    tokens: if hidden < 4096 { 3 } else { 1 },
                    hidden,
                    dtype,
                    eps: 1e-5,
                    weight_offset: 1.0,
                };
                // SAFETY: every matrix has three rows of 264 or one of 4096 elements of four bytes, and one more.
                unsafe { self.kernels.rmsnorm(&args, stream)? };
            }
        }
        self.poison(one, 64)?;
        // SAFETY: the counter is the first eight bytes, the slots lie behind it.
        unsafe { self.kernels.mark(one, one.offset(16), 2, 7, stream)? };
        self.memory.synchronize()?;
        for buffer in [one, two, sum] {
            // SAFETY: all work has completed.
            unsafe { self.memory.free(buffer)? };
        }
        context.events.emit(Event::Case { name: "local".into(), result: CaseResult::Passed });
        Ok(())
    }

    /// All collectives of the types and the sum that have kernels of their own, into memory of the communicator.
    fn collectives(&mut self, comm: &dyn DeviceComm) -> Result<()> {
        let (world, rank, stream) = (self.world, self.rank, self.memory.stream());
        let most = COUNTS[COUNTS.len() - 1];
        let bytes = most * world * 4 + 256;
        let send = self.memory.allocate(bytes)?;
        let recv = comm.allocate(bytes)?;
        let sum = Expected::Reduced(ReduceOp::Sum);
        for dtype in FLOATS {
            for (turn, count) in COUNTS.into_iter().enumerate() {
                // The second time misaligned.
                let shift = if turn == 1 { dtype.size() as u64 } else { 0 };
                let (send, recv) = (send.offset(shift), recv.offset(shift));
                for kind in [OpKind::AllReduce, OpKind::ReduceScatter, OpKind::AllGather, OpKind::Broadcast] {
                    let data = self.fill(send, count * world, dtype, Some(ReduceOp::Sum))?;
                    self.poison(recv, count * world * dtype.size())?;
                    // SAFETY: both buffers hold `count * world` elements behind the shift, `recv` at one offset of one
                    // allocation on all ranks; they live until the end, which waits.
                    unsafe {
                        match kind {
                            OpKind::AllReduce => {
                                comm.all_reduce(send, recv, count, dtype, ReduceOp::Sum, stream)?
                            }
                            OpKind::ReduceScatter => {
                                comm.reduce_scatter(send, recv, count, dtype, ReduceOp::Sum, stream)?;
                            }
                            OpKind::AllGather => comm.all_gather(send, recv, count, dtype, stream)?,
                            _ => comm.broadcast(send, recv, count, dtype, 1, stream)?,
                        }
                    }
                    match kind {
                        OpKind::AllReduce => self.expect(recv, count, dtype, &data, (sum, 0))?,
                        OpKind::ReduceScatter => {
                            self.expect(recv, count, dtype, &data, (sum, rank * count))?;
                        }
                        OpKind::AllGather => {
                            for from in 0..world {
                                let at = recv.offset((from * count * dtype.size()) as u64);
                                self.expect(at, count, dtype, &data, (Expected::Sent(from), 0))?;
                            }
                        }
                        _ => self.expect(recv, count, dtype, &data, (Expected::Sent(1), 0))?,
                    }
                }
            }
            self.norms(comm, dtype)?;
            // SAFETY: the stream is the memory's own.
            unsafe { comm.barrier(stream)? };
        }
        self.memory.synchronize()?;
        Ok(())
    }

    /// The fused norm: a row in one block, in a cluster, and slices that are not even. The residual is zero, so the new
    /// one is the sum.
    fn norms(&mut self, comm: &dyn DeviceComm, dtype: DType) -> Result<()> {
        let stream = self.memory.stream();
        let bytes = 16 << 10;
        let buffer = || self.memory.allocate(bytes);
        let (input, residual, updated, output, weight) =
            (buffer()?, buffer()?, buffer()?, buffer()?, buffer()?);
        for (tokens, hidden) in [(3, 264), (1, 1000), (2, 101)] {
            let count = tokens * hidden;
            let data = self.fill(input, count, dtype, Some(ReduceOp::Sum))?;
            self.fill(weight, hidden, dtype, Some(ReduceOp::Sum))?;
            self.poison(updated, bytes)?;
            self.poison(output, bytes)?;
            // SAFETY: the buffer is that long.
            unsafe { self.memory.upload(residual, &vec![0; bytes])? };
            let args = RmsNormArgs {
                input,
                residual,
                residual_out: updated,
                bias: None,
                weight,
                output,
                tokens,
                hidden,
                dtype,
                eps: 1e-5,
                weight_offset: 0.0,
            };
            // SAFETY: every buffer holds more than `tokens * hidden` elements and lives until the rank's end.
            unsafe { comm.all_reduce_rmsnorm(&args, stream)? };
            self.expect(updated, count, dtype, &data, (Expected::Reduced(ReduceOp::Sum), 0))?;
        }
        Ok(())
    }

    /// What goes by way of staging memory whatever the algorithm: all types and reductions, and transfers.
    fn staged(&mut self, comm: &dyn DeviceComm) -> Result<()> {
        let (world, rank, stream) = (self.world, self.rank, self.memory.stream());
        let count = 1500;
        let (send, recv) =
            (self.memory.allocate(count * world * 8)?, self.memory.allocate(count * world * 8)?);
        for dtype in DType::ALL {
            for op in REDUCTIONS {
                let data = self.fill(send, count, dtype, Some(op))?;
                self.poison(recv, count * dtype.size())?;
                // SAFETY: here and below, the buffers are large enough for every type and live until the rank's end.
                unsafe { comm.all_reduce(send, recv, count, dtype, op, stream)? };
                self.expect(recv, count, dtype, &data, (Expected::Reduced(op), 0))?;
            }
        }
        let dtype = DType::U64;
        let data = self.fill(send, count * world, dtype, None)?;
        // SAFETY: see above.
        unsafe { comm.all_to_all(send, recv, count, dtype, stream)? };
        for from in 0..world {
            let at = recv.offset((from * count * 8) as u64);
            self.expect(at, count, dtype, &data, (Expected::Sent(from), rank * count))?;
        }
        let (next, previous) = ((rank + 1) % world, (rank + world - 1) % world);
        let ops = [
            P2pOp::Send { addr: send, count, dtype, peer: next },
            P2pOp::Recv { addr: recv, count, dtype, peer: previous },
        ];
        self.poison(recv, count * 8)?;
        // SAFETY: see above.
        unsafe { comm.group(&ops, stream)? };
        self.expect(recv, count, dtype, &data, (Expected::Sent(previous), 0))?;
        self.memory.synchronize()?;
        Ok(())
    }

    /// The kernels of long bursts.
    fn long(&mut self, comm: &dyn DeviceComm) -> Result<()> {
        let (world, rank, stream) = (self.world, self.rank, self.memory.stream());
        let send = self.memory.allocate(LONG[1].1)?;
        let recv = comm.allocate(LONG[1].1)?;
        for dtype in FLOATS {
            for (kind, bytes) in LONG {
                let total = bytes / dtype.size();
                let data = self.fill(send, total, dtype, Some(ReduceOp::Sum))?;
                let count = if kind == OpKind::AllReduce { total } else { total.div_ceil(world) };
                ensure!(kind == OpKind::AllReduce || total.is_multiple_of(world), "{world} ranks");
                self.poison(recv, count * dtype.size())?;
                // SAFETY: both buffers hold `total` elements; as in `collectives`.
                unsafe {
                    if kind == OpKind::AllReduce {
                        comm.all_reduce(send, recv, count, dtype, ReduceOp::Sum, stream)?;
                    } else {
                        comm.reduce_scatter(send, recv, count, dtype, ReduceOp::Sum, stream)?;
                    }
                }
                let first = if kind == OpKind::AllReduce { 0 } else { rank * count };
                self.expect(recv, count, dtype, &data, (Expected::Reduced(ReduceOp::Sum), first))?;
            }
        }
        self.memory.synchronize()?;
        Ok(())
    }
}
