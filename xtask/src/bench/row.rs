//! One line of the benchmark's table, as data.

use std::fmt;

use comm_core::OpKind;
use serde::{Deserialize, Serialize};

use crate::bench::sizes::human;

/// What was measured for one operation at one size.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// The operation's name.
    pub op: String,
    /// The backend's name.
    pub backend: String,
    /// Element type.
    pub dtype: String,
    /// Reduction, for operations that reduce.
    pub redop: Option<String>,
    /// Root, for operations that have one.
    pub root: Option<usize>,
    /// Ranks.
    pub world: usize,
    /// Whether the operations ran inside a replayed CUDA graph.
    pub graph: bool,
    /// Bytes of the full buffer: what all ranks together hold of the result of a gather or of the input of a scatter.
    pub bytes: u64,
    /// Elements as the operation's count argument takes them.
    pub count: u64,
    /// Shape, for the fused norm.
    pub norm: Option<NormShape>,
    /// Whether operands are made known to the communicator, where its backend takes registrations.
    pub registered: bool,
    /// With distinct operands.
    pub out_of_place: Option<Timing>,
    /// With operands that coincide, for operations that have such a form.
    pub in_place: Option<Timing>,
    /// Microseconds that a copy of `bytes` bytes within the device takes, the slowest rank's. Measured where operands are
    /// not registered, for comparison.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub copy: Option<f64>,
    /// Why nothing was measured.
    pub skipped: Option<String>,
}

/// How an operation's operands lie.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Form {
    /// Apart.
    OutOfPlace,
    /// One is the other, or a part of it.
    InPlace,
}

impl Form {
    /// Both.
    pub const ALL: [Self; 2] = [Self::OutOfPlace, Self::InPlace];
}

impl fmt::Display for Form {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::OutOfPlace => "out of place",
            Self::InPlace => "in place",
        })
    }
}

impl Row {
    /// Operation and size, for people.
    pub fn what(&self) -> String {
        match self.norm {
            Some(NormShape { tokens, hidden }) => format!("{} {tokens} tokens x {hidden}", self.op),
            None => format!("{} {}", self.op, human(self.bytes)),
        }
    }

    /// What was measured of a form.
    pub const fn timing(&self, form: Form) -> Option<Timing> {
        match form {
            Form::OutOfPlace => self.out_of_place,
            Form::InPlace => self.in_place,
        }
    }
}

/// The matrix of a fused norm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NormShape {
    /// Rows.
    pub tokens: usize,
    /// Columns.
    pub hidden: usize,
}

/// Times of one form of the operation. Each is the slowest rank's.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Timing {
    /// Microseconds per operation: the median over the repetitions.
    pub us: f64,
    /// The median of the single samples, in microseconds: single operations on host memory, replays or loops on GPUs.
    pub p50: f64,
    /// The 99th percentile of the same samples.
    pub p99: f64,
    /// Full bytes per time, in GB/s (10^9).
    pub algbw: f64,
    /// `algbw` times the operation's share of traffic per link, comparable with the hardware's bandwidth.
    pub busbw: f64,
    /// Wrong elements, summed over the ranks.
    pub wrong: u64,
}

impl Timing {
    /// Bandwidths from the time; `bytes` is the row's.
    pub fn new(op: OpKind, world: usize, bytes: u64, us: f64, p50: f64, p99: f64, wrong: u64) -> Self {
        let algbw = if us > 0.0 { bytes as f64 / us / 1e3 } else { 0.0 };
        Self { us, p50, p99, algbw, busbw: algbw * bus_factor(op, world), wrong }
    }
}

/// What a link carries for each byte of the full buffer, as nccl-tests' PERFORMANCE.md derives it.
pub fn bus_factor(op: OpKind, world: usize) -> f64 {
    let n = world as f64;
    match op {
        op if matches!(op, OpKind::AllReduce | OpKind::AllReduceQuantized) || op.norms() => {
            2.0 * (n - 1.0) / n
        }
        OpKind::AllGather
        | OpKind::AllGatherV
        | OpKind::AllGather2d
        | OpKind::ReduceScatter
        | OpKind::ReduceScatterV
        | OpKind::AllToAll => (n - 1.0) / n,
        _ => 1.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bandwidths_follow_from_time_and_traffic() {
        let t = Timing::new(OpKind::AllReduce, 4, 1_000_000, 100.0, 90.0, 120.0, 0);
        assert!((t.algbw - 10.0).abs() < 1e-9 && (t.busbw - 15.0).abs() < 1e-9, "{t:?}");
        let t = Timing::new(OpKind::AllGather, 4, 1_000_000, 100.0, 90.0, 120.0, 0);
        assert!((t.busbw - 7.5).abs() < 1e-9, "{t:?}");
        assert_eq!(bus_factor(OpKind::Broadcast, 8), 1.0);
        assert_eq!(Timing::new(OpKind::Barrier, 4, 0, 5.0, 5.0, 5.0, 0).busbw, 0.0);
    }
}
