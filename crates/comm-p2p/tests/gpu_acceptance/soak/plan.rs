//! What is called: random calls, the same on all ranks, and where their operands lie.

use comm_core::DType;
use comm_kernels::pattern;

/// Element types; the first three are those of the norms and of what sums in `f32`.
pub(super) const TYPES: [DType; 6] = [DType::F32, DType::F16, DType::BF16, DType::I32, DType::F64, DType::U8];
const FLOATS: usize = 3;
/// Of products, which are exact where they wrap.
const WHOLE: [usize; 2] = [3, 5];
/// Of sums in a group.
pub(super) const GROUP_CLASS: usize = 0;
/// Elements of every type that one graph sends, at most, and that it sends in a group.
pub(super) const ARENA: usize = 4 << 20;
pub(super) const GROUP_ARENA: usize = 1 << 20;
/// Bytes that one graph receives, at most.
pub(super) const RESULTS: usize = 96 << 20;
/// Elements of a norm, and of its row, at most.
pub(super) const NORM: usize = 16 * HIDDEN;
pub(super) const HIDDEN: usize = 4096;

#[derive(Clone, Copy, Debug)]
pub(super) enum Op {
    Sum,
    SumInPlace,
    Max,
    Min,
    Prod,
    Average,
    Gather,
    GatherV,
    Gather2d,
    Scatter,
    ScatterV,
    Broadcast(usize),
    Reduce(usize),
    Ring,
    AllToAll,
    Quantized,
    /// Tokens and hidden size, as below.
    Norm(usize, usize),
    Fp8Norm(usize, usize),
    /// Hidden size.
    TwoGroupNorm(usize),
    /// A sum in the rank's group.
    InGroup,
    Barrier,
}

/// A call: what is sent lies from element `first` of its type's arena on, the result `recv` bytes into the results.
#[derive(Clone, Copy, Debug)]
pub(super) struct Call {
    pub(super) op: Op,
    pub(super) class: usize,
    /// Elements: of a rank, of the largest part, of a row of a block, of a norm's matrix.
    pub(super) count: usize,
    pub(super) first: usize,
    pub(super) recv: usize,
    /// Tells calls of one kind apart: elements from an aligned place, whose part is the largest.
    pub(super) shift: usize,
}

impl Call {
    pub(super) const fn dtype(&self) -> DType {
        TYPES[self.class]
    }

    /// Elements of each rank where they differ; more than none in all.
    pub(super) fn parts(&self, size: usize) -> Vec<usize> {
        let share = |rank| match (rank + self.shift) % size % 4 {
            0 => self.count,
            1 => self.count / 3,
            2 => 0,
            _ => 1,
        };
        (0..size).map(share).collect()
    }

    /// Rows of a block.
    pub(super) const fn height(&self) -> usize {
        1 + self.shift % 2
    }

    /// Rows of each rank in a two-group norm.
    pub(super) fn rows(&self, size: usize) -> Vec<usize> {
        (0..size).map(|rank| [2, 0, 3, 1][(rank + self.shift) % 4]).collect()
    }

    /// Whether an fp8 norm keeps its unquantised result.
    pub(super) const fn keeps(&self) -> bool {
        self.shift.is_multiple_of(2)
    }

    /// Where an fp8 norm's scales and elements are, in bytes of the results: behind its two results in the operands' type.
    pub(super) const fn scales_and_fp8(&self, tokens: usize) -> (usize, usize) {
        let scales = (self.recv + 2 * self.count * self.dtype().size()).next_multiple_of(4);
        (scales, scales + 4 * tokens)
    }

    /// Elements that are sent, and bytes that are received.
    fn sizes(&self, size: usize) -> (usize, usize) {
        let (count, bytes) = (self.count, self.dtype().size());
        let all = || self.parts(size).iter().sum::<usize>();
        match self.op {
            Op::Scatter => (count * size, count * bytes),
            Op::ScatterV => (all(), count * bytes),
            Op::Gather => (count, count * size * bytes),
            Op::GatherV => (count, all() * bytes),
            Op::Gather2d => (count * self.height(), count * self.height() * size * bytes),
            Op::AllToAll => (count * size, count * size * bytes),
            Op::Norm(..) => (count, 2 * count * bytes),
            Op::Fp8Norm(tokens, _) => {
                let (_, fp8) = self.scales_and_fp8(tokens);
                (count, fp8 + count - self.recv)
            }
            _ => (count, count * bytes),
        }
    }
}

/// Calls that all ranks make alike, and how much of each arena they use.
pub(super) struct Plan {
    pub(super) calls: Vec<Call>,
    pub(super) used: [usize; TYPES.len()],
    pub(super) used_in_group: usize,
    pub(super) results: usize,
}

pub(super) struct Random {
    pub(super) seed: u64,
    pub(super) drawn: u64,
}

impl Random {
    pub(super) fn below(&mut self, bound: usize) -> usize {
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
    pub(super) fn new(seed: u64, calls: usize, size: usize) -> Self {
        let mut random = Random { seed, drawn: 0 };
        let mut plan = Self { calls: Vec::new(), used: [0; TYPES.len()], used_in_group: 0, results: 0 };
        for _ in 0..calls {
            let mut class = random.below(FLOATS);
            let large = random.below(60) == 0;
            let mut count = random.count(if large { 20 } else { 14 });
            let shared = random.count(if large { 16 } else { 13 });
            let (tokens, hidden) = (1 + random.below(16), [64, 1000, 2048, HIDDEN][random.below(4)]);
            let op = match random.below(1000) {
                0..390 => Op::Sum,
                390..500 => Op::SumInPlace,
                // What the fastest kernels do not take, in several steps each.
                500..515 => Op::Max,
                515..525 => Op::Min,
                525..535 => {
                    class = WHOLE[random.below(WHOLE.len())];
                    Op::Prod
                }
                535..570 => {
                    class = random.below(TYPES.len());
                    Op::Sum
                }
                570..600 => Op::Average,
                600..670 => Op::Gather,
                670..700 => Op::GatherV,
                700..705 => Op::Gather2d,
                705..765 => Op::Scatter,
                765..795 => Op::ScatterV,
                795..855 => Op::Broadcast(random.below(size)),
                855..860 => Op::Reduce(random.below(size)),
                860..880 => Op::Ring,
                880..890 => Op::AllToAll,
                890..910 => Op::Quantized,
                910..935 => Op::Norm(tokens, hidden),
                935..955 => Op::Fp8Norm(tokens, hidden),
                955..965 => Op::TwoGroupNorm(hidden),
                965..985 => {
                    class = GROUP_CLASS;
                    Op::InGroup
                }
                _ => Op::Barrier,
            };
            let shift = random.below(16);
            match op {
                Op::Gather
                | Op::GatherV
                | Op::Gather2d
                | Op::Scatter
                | Op::ScatterV
                | Op::AllToAll
                | Op::InGroup => count = shared,
                Op::Norm(tokens, hidden) | Op::Fp8Norm(tokens, hidden) => count = tokens * hidden,
                Op::Barrier => count = 0,
                _ => {}
            }
            let mut call = Call { op, class, count, first: 0, recv: 0, shift };
            if let Op::TwoGroupNorm(hidden) = op {
                call.count = call.rows(size).iter().sum::<usize>() * hidden;
            }
            plan.add(call, size);
        }
        plan
    }

    /// Adds a call, unless the arenas are full.
    fn add(&mut self, mut call: Call, size: usize) {
        let in_group = matches!(call.op, Op::InGroup);
        let (used, most) = match in_group {
            true => (&mut self.used_in_group, GROUP_ARENA),
            false => (&mut self.used[call.class], ARENA),
        };
        call.first = *used + call.shift;
        call.recv = self.results.next_multiple_of(256) + call.shift * call.dtype().size();
        let (send, recv) = call.sizes(size);
        if call.first + send > most || call.recv + recv > RESULTS {
            return;
        }
        *used = call.first + send;
        self.results = call.recv + recv;
        self.calls.push(call);
    }
}
