//! What all ranks of a communicator can do, and how the contracts' types map to NCCL's.

use std::collections::{BTreeMap, BTreeSet};

use comm_core::{Capability, CommError, DType, OpKind, OpQuery, ReduceOp, Result, Support};

use crate::result::Version;
use crate::sys;

/// The facts' names in a [`Capability`].
pub(crate) mod fact {
    pub(crate) const VERSION: &str = "nccl.version";
    pub(crate) const GPU: &str = "cuda.uuid";
    pub(crate) const COMPUTE: &str = "cuda.compute_capability";
    pub(crate) const HOST: &str = "host";
    /// The host and the process's number on it.
    pub(crate) const PROCESS: &str = "process";
    /// Empty when the compiled kernels are there, otherwise why not.
    pub(crate) const KERNELS: &str = "kernels";
    /// `on`, or why captured work cannot be watched.
    pub(crate) const WATCH: &str = "nccl.watch_graphs";
    /// All options in effect, in words that are equal where the options are.
    pub(crate) const OPTIONS: &str = "nccl.options";
}

/// What [`fact::WATCH`] says when captured work can be watched.
pub(crate) const WATCHED: &str = "on";

/// The first version that has everything a communicator needs.
pub(crate) const OLDEST: Version = Version::new(2, 19, 0);
const FP8_SINCE: Version = Version::new(2, 24, 0);
const ALL_TO_ALL_SINCE: Version = Version::new(2, 28, 0);

/// The least of what the ranks have. Equal on all ranks.
#[derive(Clone, Debug)]
pub(crate) struct Limits {
    version: Version,
    /// Ten times the major plus the minor compute capability.
    compute: u32,
    /// Why the fused norm is not to be had, if it is not.
    norm: Option<String>,
    watch_graphs: bool,
    shares_process: bool,
}

impl Limits {
    /// From all ranks' facts, which must not name a GPU twice, nor differ in options.
    pub(crate) fn agree(capabilities: &[Capability]) -> Result<Self> {
        let mut first_options = None;
        let mut owners: BTreeMap<&str, usize> = BTreeMap::new();
        let mut processes: BTreeSet<&str> = BTreeSet::new();
        let mut limits = Self {
            version: Version::new(u32::MAX, 0, 0),
            compute: u32::MAX,
            norm: None,
            watch_graphs: true,
            shares_process: false,
        };
        for (rank, capability) in capabilities.iter().enumerate() {
            let get = |name: &'static str| {
                capability.facts.get(name).map(String::as_str).ok_or_else(|| {
                    CommError::invalid("capabilities", format!("rank {rank} does not state {name}"))
                })
            };
            let number = |name: &'static str| -> Result<u32> {
                get(name)?.parse().map_err(|_| {
                    CommError::invalid("capabilities", format!("rank {rank} states no number as {name}"))
                })
            };
            let gpu = get(fact::GPU)?;
            if let Some(other) = owners.insert(gpu, rank) {
                return Err(CommError::invalid(
                    "memory",
                    format!(
                        "ranks {other} and {rank} (on {}) both use GPU {gpu}, but NCCL needs one per rank; give \
                         them different devices",
                        get(fact::HOST)?
                    ),
                ));
            }
            let options = get(fact::OPTIONS)?;
            let first = *first_options.get_or_insert(options);
            if options != first {
                return Err(CommError::invalid(
                    "options",
                    format!(
                        "rank 0 has [{first}], but rank {rank} has [{options}]; give all ranks the same options"
                    ),
                ));
            }
            limits.version = limits.version.min(Version::from_code(number(fact::VERSION)?));
            limits.compute = limits.compute.min(number(fact::COMPUTE)?);
            limits.shares_process |= !processes.insert(get(fact::PROCESS)?);
            limits.watch_graphs &= get(fact::WATCH)? == WATCHED;
            let norm = get(fact::KERNELS)?;
            if !norm.is_empty() && limits.norm.is_none() {
                limits.norm = Some(format!("rank {rank} has no norm kernel: {norm}"));
            }
        }
        Ok(limits)
    }

    pub(crate) fn has_all_to_all(&self) -> bool {
        self.version >= ALL_TO_ALL_SINCE
    }

    /// Whether all ranks have the compiled kernels.
    pub(crate) const fn has_kernels(&self) -> bool {
        self.norm.is_none()
    }

    /// Whether captured work is watched, which takes kernels on all ranks: how far each is counts the same everywhere.
    pub(crate) const fn watches_graphs(&self) -> bool {
        self.watch_graphs && self.has_kernels()
    }

    /// Whether a process holds more than one of the ranks.
    pub(crate) const fn shares_process(&self) -> bool {
        self.shares_process
    }

    /// The answer of `DeviceComm::supports`.
    pub(crate) fn supports(&self, query: &OpQuery) -> Support {
        match query.kind {
            OpKind::AllReduce | OpKind::ReduceScatter | OpKind::ReduceScatterV | OpKind::Reduce
                if matches!(query.dtype, DType::F8E4M3 | DType::F8E5M2) =>
            {
                if self.version < FP8_SINCE {
                    return Support::no(format!(
                        "NCCL {} does not reduce {}; {FP8_SINCE} does",
                        self.version, query.dtype
                    ));
                }
                if self.compute < 90 {
                    return Support::no(format!(
                        "NCCL reduces {} on compute capability 9.0 and later, and a rank has {}.{}",
                        query.dtype,
                        self.compute / 10,
                        self.compute % 10
                    ));
                }
                Support::Yes
            }
            kind if kind.norms() => match &self.norm {
                _ if !matches!(query.dtype, DType::F32 | DType::F16 | DType::BF16) => {
                    Support::no(format!("RMSNorm takes f32, f16 and bf16, not {}", query.dtype))
                }
                Some(reason) => Support::no(reason.clone()),
                None => Support::Yes,
            },
            OpKind::AllReduceQuantized => Support::no("NCCL sums no quantised operands"),
            kind if OpKind::COLLECTIVES.contains(&kind) => Support::Yes,
            OpKind::Split
            | OpKind::Allocate
            | OpKind::Free
            | OpKind::Register
            | OpKind::Deregister
            | OpKind::Poll
            | OpKind::Close => Support::Yes,
            kind => Support::no(format!("{kind} is not an operation of a device communicator")),
        }
    }
}

/// NCCL's name for an element type in a reduction.
pub(crate) const fn element(dtype: DType) -> sys::DataType {
    match dtype {
        DType::F64 => sys::FLOAT64,
        DType::F32 => sys::FLOAT32,
        DType::F16 => sys::FLOAT16,
        DType::BF16 => sys::BFLOAT16,
        DType::F8E4M3 => sys::FLOAT8E4M3,
        DType::F8E5M2 => sys::FLOAT8E5M2,
        DType::I8 => sys::INT8,
        DType::U8 => sys::UINT8,
        DType::I32 => sys::INT32,
        DType::U32 => sys::UINT32,
        DType::I64 => sys::INT64,
        DType::U64 => sys::UINT64,
    }
}

/// NCCL's name for an element type that is only moved: bytes stand in for the types that old versions do not know.
pub(crate) const fn moved(dtype: DType) -> sys::DataType {
    match dtype {
        DType::F8E4M3 | DType::F8E5M2 => sys::UINT8,
        other => element(other),
    }
}

/// NCCL's name for a reduction.
pub(crate) const fn reduction(op: ReduceOp) -> sys::RedOp {
    match op {
        ReduceOp::Sum => sys::SUM,
        ReduceOp::Prod => sys::PROD,
        ReduceOp::Min => sys::MIN,
        ReduceOp::Max => sys::MAX,
        ReduceOp::Avg => sys::AVG,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn capability(gpu: &str, version: u32, compute: u32, norm: &str) -> Capability {
        let facts = [
            (fact::GPU, gpu.to_owned()),
            (fact::VERSION, version.to_string()),
            (fact::COMPUTE, compute.to_string()),
            (fact::HOST, "node".to_owned()),
            (fact::PROCESS, format!("node/{gpu}")),
            (fact::KERNELS, norm.to_owned()),
            (fact::OPTIONS, "max_ctas=8".to_owned()),
            (fact::WATCH, if norm.is_empty() { WATCHED } else { "no kernels" }.to_owned()),
        ];
        Capability { protocol: 1, facts: facts.map(|(k, v)| (k.to_owned(), v)).into() }
    }

    #[test]
    fn two_ranks_on_one_gpu_are_named() {
        let ranks =
            [capability("a", 22809, 90, ""), capability("b", 22809, 90, ""), capability("a", 22809, 90, "")];
        let message = Limits::agree(&ranks).unwrap_err().to_string();
        assert!(message.contains("ranks 0 and 2") && message.contains("GPU a"), "{message}");
    }

    #[test]
    fn ranks_of_one_process_are_known_to_all() {
        let mut ranks = [capability("a", 22809, 90, ""), capability("b", 22809, 90, "")];
        assert!(!Limits::agree(&ranks).unwrap().shares_process());
        for rank in &mut ranks {
            rank.facts.insert(fact::PROCESS.to_owned(), "node/7".to_owned());
        }
        assert!(Limits::agree(&ranks).unwrap().shares_process());
    }

    #[test]
    fn a_rank_with_other_options_is_named() {
        let mut ranks = [capability("a", 22809, 90, ""), capability("b", 22809, 90, "")];
        assert!(Limits::agree(&ranks).is_ok());
        ranks[1].facts.insert(fact::OPTIONS.to_owned(), "max_ctas=16".to_owned());
        let message = Limits::agree(&ranks).unwrap_err().to_string();
        assert!(message.contains("rank 1 has [max_ctas=16]"), "{message}");
    }

    #[test]
    fn the_weakest_rank_decides() {
        let query = OpQuery::new(OpKind::AllReduce, DType::F8E4M3, 1).with_reduce(ReduceOp::Sum);
        let new = capability("a", 22809, 90, "");
        let limits = Limits::agree(&[new.clone(), capability("b", 22809, 90, "")]).unwrap();
        assert!(limits.supports(&query).is_supported() && limits.has_all_to_all() && limits.watches_graphs());
        let limits = Limits::agree(&[new.clone(), capability("b", 22203, 90, "")]).unwrap();
        assert!(!limits.supports(&query).is_supported() && !limits.has_all_to_all());
        assert!(limits.supports(&OpQuery::new(OpKind::AllGather, DType::F8E4M3, 1)).is_supported());
        let limits = Limits::agree(&[new, capability("b", 22809, 80, "not built")]).unwrap();
        assert!(!limits.supports(&query).is_supported() && !limits.watches_graphs());
        let norm = limits.supports(&OpQuery::new(OpKind::AllReduceRmsNorm, DType::BF16, 1));
        assert!(
            matches!(norm, Support::No { reason } if reason.contains("rank 1") && reason.contains("not built"))
        );
    }

    #[test]
    fn types_and_reductions_have_the_header_s_numbers() {
        assert_eq!(DType::ALL.map(element), [8, 7, 6, 9, 10, 11, 0, 1, 2, 3, 4, 5]);
        assert_eq!(DType::ALL.map(moved), [8, 7, 6, 9, 1, 1, 0, 1, 2, 3, 4, 5]);
        assert_eq!(ReduceOp::ALL.map(reduction), [0, 1, 3, 2, 4]);
    }
}
