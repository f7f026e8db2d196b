//! What a benchmark runs, as data that every rank gets the same copy of.

use comm_core::{DType, OpKind, ReduceOp};
use serde::{Deserialize, Serialize};

use crate::bench::row::NormShape;

/// A benchmark for a world of ranks.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct BenchJob {
    /// The backend's name.
    pub backend: String,
    /// Operations, in order.
    pub ops: Vec<OpKind>,
    /// Bytes of the full buffer, for the plain collectives.
    pub sizes: Vec<u64>,
    /// Rows, for the fused norms.
    pub tokens: Vec<usize>,
    /// Columns, for the fused norms.
    pub hidden: usize,
    /// Element type.
    pub dtype: DType,
    /// Reduction.
    pub redop: ReduceOp,
    /// Whether operands are registered, where the backend takes registrations, and promised to lie alike on all ranks.
    pub registered: bool,
    /// How much is measured.
    pub effort: Effort,
}

/// How much is measured.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Effort {
    /// Operations in a graph or loop; chosen by size when absent.
    pub iters: Option<usize>,
    /// Operations before the first that is timed.
    pub warmup: usize,
    /// Repetitions of the graph or loop, of which the median counts.
    pub reps: usize,
    /// Whether GPUs replay a captured graph; otherwise the operations are issued one by one.
    pub graph: bool,
    /// Microseconds that one form of an operation may take on host memory where `iters` is absent.
    pub budget_us: f64,
}

impl Effort {
    /// Operations in a graph or loop on a GPU: enough that a replay is long against the clock's resolution.
    pub fn gpu_iters(&self, bytes: u64) -> usize {
        self.iters.unwrap_or(if bytes <= 8 << 20 { 20 } else { 5 })
    }

    /// Operations in a loop on host memory, for an operation that takes about `us` microseconds.
    pub fn host_iters(&self, us: f64) -> usize {
        let fitting = self.budget_us / (us.max(0.1) * self.reps as f64);
        self.iters.unwrap_or((fitting as usize).clamp(1, 500))
    }
}

/// One row's worth of work.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// The operation.
    pub op: OpKind,
    /// Elements as the operation's method takes them; for V operations those of all ranks together, for a block of two
    /// dimensions those of a block.
    pub count: usize,
    /// Bytes of the full buffer.
    pub bytes: u64,
    /// The matrix, for a fused norm.
    pub norm: Option<NormShape>,
}

impl BenchJob {
    /// The rows in the order in which they are measured, for a world of `world` ranks.
    pub fn cases(&self, world: usize) -> Vec<Case> {
        self.ops.iter().flat_map(|&op| self.cases_of(op, world)).collect()
    }

    fn cases_of(&self, op: OpKind, world: usize) -> Vec<Case> {
        let element = self.dtype.size() as u64;
        match op {
            OpKind::Barrier => vec![Case { op, count: 0, bytes: 0, norm: None }],
            op if op.norms() => (self.tokens.iter())
                .map(|&tokens| {
                    let count = tokens * self.hidden;
                    let norm = Some(NormShape { tokens, hidden: self.hidden });
                    Case { op, count, bytes: count as u64 * element, norm }
                })
                .collect(),
            _ => (self.sizes.iter())
                .map(|&size| {
                    // As nccl-tests does, sizes that do not divide evenly are rounded down to ones that do.
                    let parts = if splits(op) { world as u64 } else { 1 };
                    let count = size / element / parts;
                    Case { op, count: count as usize, bytes: count * element * parts, norm: None }
                })
                .collect(),
        }
    }
}

/// Whether the operation's count is a rank's share of the full buffer.
fn splits(op: OpKind) -> bool {
    matches!(op, OpKind::AllGather | OpKind::ReduceScatter | OpKind::AllToAll | OpKind::AllGather2d)
}

/// The counts of a V operation over `total` elements: uneven, with the first rank's share the smallest, and none for it
/// where there are few.
pub fn uneven(total: usize, world: usize) -> Vec<usize> {
    let weights = world * (world + 1) / 2;
    let mut counts: Vec<usize> = (0..world).map(|rank| total / weights * (rank + 1)).collect();
    let rest = total - counts.iter().sum::<usize>();
    if let Some(last) = counts.last_mut() {
        *last += rest;
    }
    counts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(ops: Vec<OpKind>) -> BenchJob {
        BenchJob {
            backend: "host".into(),
            ops,
            sizes: vec![1000, 1 << 20],
            tokens: vec![1, 4],
            hidden: 8192,
            dtype: DType::BF16,
            redop: ReduceOp::Sum,
            registered: true,
            effort: Effort { iters: None, warmup: 1, reps: 5, graph: true, budget_us: 50_000.0 },
        }
    }

    #[test]
    fn sizes_mean_the_full_buffer() {
        let cases =
            job(vec![OpKind::AllReduce, OpKind::AllGather, OpKind::AllReduceRmsNorm, OpKind::Barrier])
                .cases(8);
        let sums: Vec<_> = cases.iter().map(|case| (case.count, case.bytes)).collect();
        assert_eq!(
            sums,
            [
                (500, 1000),
                (1 << 19, 1 << 20),
                (62, 992),
                (1 << 16, 1 << 20),
                (8192, 16384),
                (32768, 65536),
                (0, 0)
            ]
        );
    }

    #[test]
    fn iterations_follow_the_method_of_the_targets() {
        let effort = job(vec![]).effort;
        assert_eq!((effort.gpu_iters(8 << 20), effort.gpu_iters(16 << 20)), (20, 5));
        assert_eq!((effort.host_iters(10.0), effort.host_iters(1e9), effort.host_iters(0.0)), (500, 1, 500));
        assert_eq!(Effort { iters: Some(3), ..effort }.gpu_iters(1), 3);
    }

    #[test]
    fn uneven_counts_add_up() {
        assert_eq!(uneven(100, 4), [10, 20, 30, 40]);
        assert_eq!(uneven(3, 4), [0, 0, 0, 3]);
        assert_eq!(uneven(7, 1), [7]);
    }
}
