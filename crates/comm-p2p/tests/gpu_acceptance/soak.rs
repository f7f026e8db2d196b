//! A million calls of mixed size, type and operation, most of them in replayed graphs, with rounds that begin just
//! below the wrap: no wrong value, and nothing grows.

use std::time::{Duration, Instant};

use comm_core::{DType, DeviceAddr, DeviceMemory as _, P2pOp, ReduceOp, Result, RmsNormArgs};
use comm_kernels::pattern::{self, Expected, Pattern};

use crate::common::{PATIENT, Rank, shared, world};
use crate::data::{Judge, SUM, at, encode, sums, timed};
use crate::setting::two_worlds;

const CALLS: usize = 1_000_000;
/// Where ranks share devices, and every call takes much longer.
const CALLS_WHERE_SHARED: usize = 100_000;
const GRAPHS: usize = 8;
const CALLS_OF_A_GRAPH: usize = 250;
const EAGER_CALLS: usize = 20;
/// Replays between two looks at the results.
const STRETCH: usize = 40;
/// Far more than it takes.
const LIMIT: Duration = Duration::from_secs(150);

/// Element types; the first three are those of the norm.
const TYPES: [DType; 6] = [DType::F32, DType::F16, DType::BF16, DType::I32, DType::F64, DType::U8];
/// Elements of every type that one graph sends, at most.
const ARENA: usize = 4 << 20;
/// Bytes that one graph receives, at most.
const RESULTS: usize = 96 << 20;
/// Elements of a norm, at most.
const NORM: usize = 16 * 4096;

#[derive(Clone, Copy, Debug)]
enum Op {
    Sum,
    SumInPlace,
    Max,
    Gather,
    Scatter,
    Broadcast(usize),
    Ring,
    AllToAll,
    Norm(usize, usize),
    Barrier,
}

/// A call: what is sent lies from element `first` of its type's arena on, the result `recv` bytes into the results.
#[derive(Clone, Copy, Debug)]
struct Call {
    op: Op,
    class: usize,
    count: usize,
    first: usize,
    recv: usize,
}

/// Calls that all ranks make alike, and how much of each arena they use.
struct Plan {
    calls: Vec<Call>,
    used: [usize; TYPES.len()],
    results: usize,
}

struct Random {
    seed: u64,
    drawn: u64,
}

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.drawn += 1;
        (pattern::hash(self.seed, 77, self.drawn) % bound as u64) as usize
    }

    /// Mostly small: every power of two up to `bits` is as likely as any other.
    fn count(&mut self, bits: usize) -> usize {
        let bits = self.below(bits + 1);
        1 + self.below(1 << bits)
    }
}

impl Plan {
    fn new(seed: u64, calls: usize, size: usize) -> Self {
        let mut random = Random { seed, drawn: 0 };
        let mut plan = Self { calls: Vec::new(), used: [0; TYPES.len()], results: 0 };
        for _ in 0..calls {
            let mut class = random.below(3);
            let large = random.below(60) == 0;
            let mut count = random.count(if large { 20 } else { 14 });
            let shared = random.count(if large { 16 } else { 13 });
            let op = match random.below(100) {
                0..45 => Op::Sum,
                45..58 => Op::SumInPlace,
                // What the fastest kernels do not take.
                58..62 => Op::Max,
                62..66 => {
                    class = random.below(TYPES.len());
                    Op::Sum
                }
                66..76 => Op::Gather,
                76..84 => Op::Scatter,
                84..90 => Op::Broadcast(random.below(size)),
                90..92 => Op::Ring,
                92..94 => Op::AllToAll,
                94..98 => Op::Norm(1 + random.below(16), [64, 1000, 2048, 4096][random.below(4)]),
                _ => Op::Barrier,
            };
            match op {
                Op::Gather | Op::Scatter | Op::AllToAll => count = shared,
                Op::Norm(tokens, hidden) => count = tokens * hidden,
                Op::Barrier => count = 0,
                _ => {}
            }
            plan.add(op, class, count, random.below(16), size);
        }
        plan
    }

    /// Adds a call, unless the arenas are full. `shift`: elements from an aligned place.
    fn add(&mut self, op: Op, class: usize, count: usize, shift: usize, size: usize) {
        let bytes = TYPES[class].size();
        let (send, recv) = match op {
            Op::Scatter => (count * size, count),
            Op::Gather => (count, count * size),
            Op::AllToAll => (count * size, count * size),
            Op::Norm(..) => (count, 2 * count),
            _ => (count, count),
        };
        let first = self.used[class] + shift;
        let place = self.results.next_multiple_of(256) + shift * bytes;
        if first + send > ARENA || place + recv * bytes > RESULTS {
            return;
        }
        self.used[class] = first + send;
        self.results = place + recv * bytes;
        self.calls.push(Call { op, class, count, first, recv: place });
    }
}

/// The memory of a rank's calls.
struct Buffers {
    sends: [DeviceAddr; TYPES.len()],
    results: DeviceAddr,
    /// The norm's residual, which is zero, so that the new residual is the sum; and its weights.
    zeros: DeviceAddr,
    weights: [DeviceAddr; 3],
}

impl Buffers {
    fn new(rank: &Rank) -> Self {
        let zeros = rank.space(NORM * 4);
        rank.upload(zeros, &vec![0; NORM * 4]);
        let weights = std::array::from_fn(|class| {
            let weight = rank.space(4096 * 4);
            rank.upload(weight, &encode(TYPES[class], (0..4096).map(|_| 1.0)));
            weight
        });
        Self {
            sends: TYPES.map(|dtype| rank.space(ARENA * dtype.size())),
            // The communicator's own, so that no algorithm is ruled out.
            results: rank.comm.allocate(RESULTS).unwrap(),
            zeros,
            weights,
        }
    }

    fn issue(&self, rank: &Rank, call: &Call) -> Result<()> {
        let Call { op, class, count, first, recv } = *call;
        let (comm, dtype, stream) = (&rank.comm, TYPES[class], rank.stream());
        let send = at(self.sends[class], first, dtype);
        let recv = self.results.offset(recv as u64);
        let (next, previous) = ((rank.rank + 1) % rank.size, (rank.rank + rank.size - 1) % rank.size);
        unsafe {
            match op {
                Op::Sum => comm.all_reduce(send, recv, count, dtype, ReduceOp::Sum, stream),
                Op::SumInPlace => comm.all_reduce(send, send, count, dtype, ReduceOp::Sum, stream),
                Op::Max => comm.all_reduce(send, recv, count, dtype, ReduceOp::Max, stream),
                Op::Gather => comm.all_gather(send, recv, count, dtype, stream),
                Op::Scatter => comm.reduce_scatter(send, recv, count, dtype, ReduceOp::Sum, stream),
                Op::Broadcast(root) => comm.broadcast(send, recv, count, dtype, root, stream),
                Op::AllToAll => comm.all_to_all(send, recv, count, dtype, stream),
                Op::Barrier => comm.barrier(stream),
                Op::Ring => {
                    let ops = [
                        P2pOp::Send { addr: send, count, dtype, peer: next },
                        P2pOp::Recv { addr: recv, count, dtype, peer: previous },
                    ];
                    comm.group(&ops, stream)
                }
                Op::Norm(tokens, hidden) => {
                    let args = RmsNormArgs {
                        input: send,
                        residual: self.zeros,
                        residual_out: recv,
                        bias: None,
                        weight: self.weights[class],
                        output: at(recv, count, dtype),
                        tokens,
                        hidden,
                        dtype,
                        eps: 1e-5,
                        weight_offset: 0.0,
                    };
                    comm.all_reduce_rmsnorm(&args, stream)
                }
            }
        }
    }

    /// Has the device check a call's result.
    fn check(&self, rank: &Rank, judge: &Judge, call: &Call, data: &Pattern, report: usize) -> Result<()> {
        let Call { op, class, count, first, recv } = *call;
        let dtype = TYPES[class];
        let recv = self.results.offset(recv as u64);
        let previous = (rank.rank + rank.size - 1) % rank.size;
        let one =
            |place, expected, first| judge.expect(rank, (place, count, dtype), data, expected, first, report);
        match op {
            Op::Sum | Op::Norm(..) => one(recv, SUM, first),
            Op::SumInPlace => one(at(self.sends[class], first, dtype), SUM, first),
            Op::Max => one(recv, Expected::Reduced(ReduceOp::Max), first),
            Op::Scatter => one(recv, SUM, first + rank.rank * count),
            Op::Broadcast(root) => one(recv, Expected::Sent(root), first),
            Op::Ring => one(recv, Expected::Sent(previous), first),
            Op::Gather => (0..rank.size)
                .try_for_each(|from| one(at(recv, from * count, dtype), Expected::Sent(from), first)),
            Op::AllToAll => (0..rank.size).try_for_each(|from| {
                let place = at(recv, from * count, dtype);
                one(place, Expected::Sent(from), first + rank.rank * count)
            }),
            Op::Barrier => Ok(()),
        }
    }

    /// New data, the calls one behind the other, and then all checks.
    fn run(&self, rank: &Rank, judge: &Judge, plan: &Plan, seed: usize) -> Result<()> {
        let data = sums(seed, rank.size);
        for ((&send, dtype), used) in self.sends.iter().zip(TYPES).zip(plan.used) {
            judge.fill(rank, (send, used, dtype), &data, rank.rank, 0)?;
        }
        judge.poison(rank, self.results, plan.results)?;
        plan.calls.iter().try_for_each(|call| self.issue(rank, call))?;
        (plan.calls.iter().enumerate())
            .try_for_each(|(number, call)| self.check(rank, judge, call, &data, number << 32))
    }
}

/// What must not grow: descriptors, threads and resident pages of the process, which rank 0 counts, and used memory of
/// the rank's device.
fn possessions(rank: &Rank) -> [usize; 4] {
    rank.memory.synchronize().unwrap();
    rank.meet();
    let (free, total) = cudarc::driver::result::mem_get_info().unwrap();
    let mut found = [0, 0, 0, total - free];
    if rank.rank == 0 {
        let entries = |path| std::fs::read_dir(path).unwrap().count();
        let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
        let pages = statm.split(' ').nth(1).and_then(|pages| pages.parse().ok());
        found = [entries("/proc/self/fd"), entries("/proc/self/task"), pages.unwrap(), found[3]];
    }
    rank.meet();
    found
}

fn soak(rank: &Rank) {
    let start = Instant::now();
    let most = if shared() { CALLS_WHERE_SHARED } else { CALLS };
    let judge = Judge::new(rank);
    let buffers = Buffers::new(rank);
    let plans: Vec<Plan> =
        (0..GRAPHS).map(|graph| Plan::new(1 + graph as u64, CALLS_OF_A_GRAPH, rank.size)).collect();
    let mut graphs: Vec<_> = (plans.iter().enumerate())
        .map(|(seed, plan)| rank.memory.capture(|| buffers.run(rank, &judge, plan, 1 + seed)).unwrap())
        .collect();
    let mut random = Random { seed: 4242, drawn: 0 };
    let (mut done, mut last, mut before) = (0, 0, None);
    for stretch in 0.. {
        for replay in 0..STRETCH {
            // Never the graph of the replay before, so that what that one left is wrong now.
            last = if stretch == 0 && replay < GRAPHS {
                replay
            } else {
                (last + 1 + random.below(GRAPHS - 1)) % GRAPHS
            };
            unsafe { graphs[last].launch(rank.stream()).unwrap() };
            done += plans[last].calls.len();
        }
        let plan = Plan::new(1000 + stretch, EAGER_CALLS, rank.size);
        buffers.run(rank, &judge, &plan, 1_000_000 + stretch as usize).unwrap();
        done += plan.calls.len();
        judge.all_right(rank, &format!("after {done} calls"));
        before = before.or_else(|| Some(possessions(rank)));
        assert!(start.elapsed() < LIMIT, "{done} calls took {:?}", start.elapsed());
        if done >= most {
            break;
        }
    }
    let (before, after) = (before.unwrap(), possessions(rank));
    if rank.rank == 0 {
        println!(
            "{} ranks: {done} calls in {:.1} s; descriptors, threads, pages, device bytes: {before:?}, then {after:?}",
            rank.size,
            start.elapsed().as_secs_f64()
        );
    }
    assert_eq!(after[..2], before[..2], "descriptors and threads");
    assert!(after[2] <= before[2] + (32 << 20) / 4096, "resident pages: {before:?}, then {after:?}");
    assert!(after[3] <= before[3] + (2 << 20), "device memory: {before:?}, then {after:?}");
}

#[test]
fn a_million_mixed_calls() {
    timed("a million calls", || {
        for size in two_worlds() {
            // 2^32 - 100
            world(size, PATIENT, &[("p2p.first_round", "4294967196")], |rank| {
                soak(&rank);
                rank.comm.close().unwrap();
            });
        }
    });
}
