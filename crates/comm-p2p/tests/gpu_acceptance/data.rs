//! Elements on the host, and generated data that the device itself makes and checks.

use std::sync::{Arc, Mutex, Once, PoisonError};
use std::time::Instant;

use comm_core::{DType, DeviceAddr, DeviceComm, DeviceMemory as _, ReduceOp};
use comm_kernels::Kernels;
use comm_kernels::pattern::{self, Expected, Mismatches, Pattern};
use half::{bf16, f16};

use crate::common::{Rank, hold_contexts, is_process};

pub(crate) const FLOATS: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// Scratch memory that is quickly made, for tests that make many communicators; several rounds for what is not small.
pub(crate) const SMALL: [(&str, &str); 6] = [
    ("p2p.packet_slots", "4096"),
    ("p2p.lamport_slots", "4096"),
    ("p2p.line_slots", "512"),
    ("p2p.staging_bytes", "1048576"),
    ("p2p.cell_ctas", "4"),
    ("p2p.pair_bytes", "65536"),
];

/// Runs a test and says how long it took. One at a time: kernels of two tests that wait on the same GPUs could keep each
/// other's peers from running.
pub(crate) fn timed(name: &str, test: impl FnOnce()) {
    static ALONE: Mutex<()> = Mutex::new(());
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    // A process that is a rank holds its own device's.
    static HELD: Once = Once::new();
    if !is_process() {
        HELD.call_once(hold_contexts);
    }
    let start = Instant::now();
    test();
    println!("{name}: {:.1} s", start.elapsed().as_secs_f64());
}

pub(crate) fn encode(dtype: DType, values: impl Iterator<Item = f32>) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(values.size_hint().0 * dtype.size());
    for value in values {
        match dtype {
            DType::F16 => bytes.extend_from_slice(&f16::from_f32(value).to_le_bytes()),
            DType::BF16 => bytes.extend_from_slice(&bf16::from_f32(value).to_le_bytes()),
            DType::F32 => bytes.extend_from_slice(&value.to_le_bytes()),
            other => panic!("{other} is no float of these tests"),
        }
    }
    bytes
}

pub(crate) fn decode(dtype: DType, bytes: &[u8]) -> Vec<f32> {
    let one = |raw: &[u8]| match dtype {
        DType::F16 => f16::from_le_bytes([raw[0], raw[1]]).to_f32(),
        DType::BF16 => bf16::from_le_bytes([raw[0], raw[1]]).to_f32(),
        DType::F32 => f32::from_le_bytes([raw[0], raw[1], raw[2], raw[3]]),
        other => panic!("{other} is no float of these tests"),
    };
    bytes.chunks_exact(dtype.size()).map(one).collect()
}

/// Element `index` of what `rank` sends: an integer from 1 to 15.
pub(crate) fn integer(seed: u64, rank: usize, index: usize) -> f32 {
    (1 + pattern::hash(seed, rank as u64, index as u64) % 15) as f32
}

/// Element `index` of what `rank` sends: any number between -2 and 2, of 24 bits.
pub(crate) fn real(seed: u64, rank: usize, index: usize) -> f32 {
    (pattern::hash(seed, rank as u64, index as u64) >> 40) as f32 / (1_u32 << 22) as f32 - 2.0
}

impl Rank {
    pub(crate) fn upload(&self, to: DeviceAddr, bytes: &[u8]) {
        unsafe { self.memory.upload(to, bytes).unwrap() };
    }

    pub(crate) fn download(&self, from: DeviceAddr, bytes: usize) -> Vec<u8> {
        let mut content = vec![0; bytes];
        unsafe { self.memory.download(&mut content, from).unwrap() };
        content
    }

    pub(crate) fn space(&self, bytes: usize) -> DeviceAddr {
        self.memory.allocate(bytes).unwrap()
    }

    pub(crate) fn reduce(
        &self,
        comm: &dyn DeviceComm,
        (send, recv): (DeviceAddr, DeviceAddr),
        count: usize,
        dtype: DType,
    ) -> comm_core::Result<()> {
        unsafe { comm.all_reduce(send, recv, count, dtype, ReduceOp::Sum, self.stream()) }
    }
}

/// The address `count` elements on.
pub(crate) fn at(base: DeviceAddr, count: usize, dtype: DType) -> DeviceAddr {
    base.offset((count * dtype.size()) as u64)
}

/// Makes data and checks results on a rank's device, in the order of its stream.
pub(crate) struct Judge {
    kernels: Arc<Kernels>,
    words: DeviceAddr,
}

impl Judge {
    pub(crate) fn new(rank: &Rank) -> Self {
        let judge = Self { kernels: Kernels::load(rank.memory.context()).unwrap(), words: rank.space(16) };
        judge.reset(rank);
        judge
    }

    fn reset(&self, rank: &Rank) {
        unsafe { self.kernels.verify_reset(self.words, rank.stream()).unwrap() };
    }

    /// Writes what `who` sends, from its element `first` on.
    pub(crate) fn fill(
        &self,
        rank: &Rank,
        (to, count, dtype): (DeviceAddr, usize, DType),
        pattern: &Pattern,
        who: usize,
        first: usize,
    ) -> comm_core::Result<()> {
        unsafe { self.kernels.fill(to, count, dtype, pattern, who, first as u64, rank.stream()) }
    }

    /// Overwrites `bytes` bytes with what no test expects.
    pub(crate) fn poison(&self, rank: &Rank, to: DeviceAddr, bytes: usize) -> comm_core::Result<()> {
        self.fill(rank, (to, bytes, DType::U8), &Pattern::new(0xdead_beef, None, 1), 0, 0)
    }

    /// Has the device compare a range, bit for bit; what is wrong counts from `report` on.
    pub(crate) fn expect(
        &self,
        rank: &Rank,
        (data, count, dtype): (DeviceAddr, usize, DType),
        pattern: &Pattern,
        expected: Expected,
        first: usize,
        report: usize,
    ) -> comm_core::Result<()> {
        let stream = rank.stream();
        unsafe {
            self.kernels.verify(
                data,
                count,
                dtype,
                pattern,
                expected,
                first as u64,
                report as u64,
                self.words,
                stream,
            )
        }
    }

    /// What was wrong since the last verdict. Waits for the stream.
    pub(crate) fn verdict(&self, rank: &Rank) -> Mismatches {
        let bytes = rank.download(self.words, 16);
        let word = |i: usize| u64::from_le_bytes(bytes[8 * i..][..8].try_into().unwrap());
        let found = Mismatches::from_words([word(0), word(1)]);
        self.reset(rank);
        found
    }

    /// Fails the test if anything was wrong since the last verdict.
    pub(crate) fn all_right(&self, rank: &Rank, what: &str) {
        let found = self.verdict(rank);
        let (me, size) = (rank.rank, rank.size);
        assert!(found.wrong == 0, "{what}: rank {me} of {size}: {found:?}; {:?}", rank.comm.poll());
    }
}

/// The data of a sum among `world` ranks.
pub(crate) fn sums(seed: usize, world: usize) -> Pattern {
    Pattern::new(seed as u64, Some(ReduceOp::Sum), world)
}

pub(crate) const SUM: Expected = Expected::Reduced(ReduceOp::Sum);
