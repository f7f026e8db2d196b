//! The targets file: what peers reach on a named machine, and what this workspace must reach there.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::bench::row::{NormShape, Row};

/// The version of the file's schema that this program reads.
const SCHEMA: u32 = 1;

/// Times of other systems, in microseconds, by name.
pub type Peers = BTreeMap<String, f64>;

/// A targets file. All times are microseconds per operation.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Targets {
    /// The schema's version.
    pub schema: u32,
    /// The machine that the figures hold for.
    pub machine: Machine,
    /// How the figures were taken.
    pub method: String,
    /// What the hardware does, by name.
    pub hardware: BTreeMap<String, serde_json::Value>,
    /// The formula behind [`CollectiveTarget::model`].
    pub model: String,
    /// What the figures do not say.
    pub notes: Vec<String>,
    /// Plain collectives.
    pub collectives: Vec<CollectiveTarget>,
    /// The fused all-reduce + residual + bias + RMSNorm.
    pub norms: Vec<NormTarget>,
    /// GEMMs overlapped with a collective.
    pub gemms: Vec<GemmTarget>,
}

/// A machine and its software.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Machine {
    /// Its short name.
    pub name: String,
    /// Number and type of GPUs.
    pub gpus: String,
    /// What connects them.
    pub links: String,
    /// CUDA's version.
    pub cuda: String,
    /// The driver's.
    pub driver: String,
    /// NCCL's.
    pub nccl: String,
    /// PyTorch's.
    pub pytorch: String,
    /// Whether NVLink multicast was on.
    pub multicast: bool,
    /// The day of the measurements.
    pub measured: String,
}

/// Figures of one collective at one size.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CollectiveTarget {
    /// The operation's name.
    pub op: String,
    /// Element type.
    pub dtype: String,
    /// Ranks.
    pub world: usize,
    /// Bytes of the full buffer.
    pub bytes: u64,
    /// Other systems.
    pub peers: Peers,
    /// What the hardware would allow by the file's model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<f64>,
    /// What is to be reached.
    pub target: f64,
    /// What is to be reached with luck.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stretch: Option<f64>,
}

/// Figures of the fused norm at one shape.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NormTarget {
    /// The operation's name.
    pub op: String,
    /// Element type.
    pub dtype: String,
    /// Ranks.
    pub world: usize,
    /// Rows.
    pub tokens: usize,
    /// Columns.
    pub hidden: usize,
    /// Other systems.
    pub peers: Peers,
    /// What is to be reached.
    pub target: f64,
}

/// Figures of an overlapped GEMM at one shape.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GemmTarget {
    /// The operation's name.
    pub op: String,
    /// Element type.
    pub dtype: String,
    /// Ranks.
    pub world: usize,
    /// Rows of the result, of all ranks together.
    pub m: usize,
    /// The summed dimension, of all ranks together.
    pub k: usize,
    /// Columns of the result, of all ranks together.
    pub n: usize,
    /// The GEMM alone.
    pub gemm: f64,
    /// The collective alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub collective: Option<f64>,
    /// Other systems.
    pub peers: Peers,
    /// What is to be reached.
    pub target: f64,
}

impl Targets {
    /// Reads a targets file.
    ///
    /// # Errors
    /// When it cannot be read, has another schema, or holds figures that cannot be.
    pub fn load(path: &Path) -> Result<Self> {
        let text =
            std::fs::read_to_string(path).with_context(|| format!("reading targets {}", path.display()))?;
        let targets: Self =
            serde_json::from_str(&text).with_context(|| format!("reading targets {}", path.display()))?;
        ensure!(
            targets.schema == SCHEMA,
            "{} has schema {}, but this program reads {SCHEMA}",
            path.display(),
            targets.schema
        );
        let times = (targets.collectives.iter().map(|t| (&t.op, t.target, &t.peers)))
            .chain(targets.norms.iter().map(|t| (&t.op, t.target, &t.peers)))
            .chain(targets.gemms.iter().map(|t| (&t.op, t.target, &t.peers)));
        for (op, target, peers) in times {
            ensure!(
                target > 0.0 && peers.values().all(|&time| time > 0.0),
                "{}: a figure for {op} is not a positive time",
                path.display()
            );
        }
        Ok(targets)
    }

    /// The target and the peers for a measured row; `None` where the file has none.
    pub fn find(&self, row: &Row) -> Option<(f64, &Peers)> {
        if let Some(NormShape { tokens, hidden }) = row.norm {
            let same = |t: &&NormTarget| {
                (t.op.as_str(), t.dtype.as_str(), t.world) == (&row.op, &row.dtype, row.world)
                    && (t.tokens, t.hidden) == (tokens, hidden)
            };
            return self.norms.iter().find(same).map(|t| (t.target, &t.peers));
        }
        let same = |t: &&CollectiveTarget| {
            (t.op.as_str(), t.dtype.as_str(), t.world, t.bytes) == (&row.op, &row.dtype, row.world, row.bytes)
        };
        self.collectives.iter().find(same).map(|t| (t.target, &t.peers))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::bench::table::tests::row;
    use comm_core::OpKind;

    pub(crate) fn repository_targets() -> Targets {
        Targets::load(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../bench/targets/8xh200.json")))
            .unwrap()
    }

    #[test]
    fn the_repositorys_file_is_complete() {
        let targets = repository_targets();
        let of = |op: &str| targets.collectives.iter().filter(|t| t.op == op).count();
        assert_eq!(
            [of("all_reduce"), of("all_gather"), of("reduce_scatter"), of("broadcast")],
            [16, 7, 7, 7]
        );
        assert_eq!((targets.norms.len(), targets.gemms.len()), (7, 9));
        for t in &targets.collectives {
            assert!(OpKind::COLLECTIVES.iter().any(|op| op.name() == t.op), "{} is no operation", t.op);
            let best = t.peers.values().copied().fold(f64::INFINITY, f64::min);
            assert!(t.target <= best, "{} at {}: the target is behind a peer", t.op, t.bytes);
            assert!(t.model.is_none_or(|model| model < t.target), "{} at {} beats physics", t.op, t.bytes);
        }
    }

    #[test]
    fn rows_find_their_target_by_op_type_world_and_size() {
        let targets = repository_targets();
        let mut row = row(OpKind::AllReduce, 1 << 20, 30.0);
        let (target, peers) = targets.find(&row).unwrap();
        assert_eq!((target, peers["pytorch_two_shot"]), (12.0, 14.0));
        row.world = 4;
        assert!(targets.find(&row).is_none());
        row.world = 8;
        row.dtype = "f32".into();
        assert!(targets.find(&row).is_none());
        row.dtype = "bf16".into();
        row.op = "all_reduce_rmsnorm".into();
        row.norm = Some(NormShape { tokens: 128, hidden: 8192 });
        assert_eq!(targets.find(&row).unwrap().0, 20.0);
    }

    #[test]
    fn a_file_that_is_wrong_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("targets.json");
        let mut targets = repository_targets();
        targets.collectives[3].target = 0.0;
        std::fs::write(&path, serde_json::to_string(&targets).unwrap()).unwrap();
        assert!(Targets::load(&path).unwrap_err().to_string().contains("all_reduce"));
        targets.schema = 2;
        std::fs::write(&path, serde_json::to_string(&targets).unwrap()).unwrap();
        assert!(Targets::load(&path).unwrap_err().to_string().contains("schema 2"));
        assert!(Targets::load(Path::new("/nonexistent")).is_err());
    }
}
