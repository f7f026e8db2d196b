//! The entry points of one world size.

use comm_core::{CommError, DType, Result};

use super::average::AverageFunctions;
use super::lines::LineFunctions;
use super::link::MAX_RANKS;
use super::mesh::MeshFunctions;
use super::uneven::UnevenFunctions;
use crate::module::{Function, Module};

/// One entry point each for bf16, f16 and f32.
pub(super) type PerFloat = [Function; 3];

pub(super) fn float_index(dtype: DType) -> Result<usize> {
    match dtype {
        DType::BF16 => Ok(0),
        DType::F16 => Ok(1),
        DType::F32 => Ok(2),
        other => Err(CommError::invalid("dtype", format!("the kernel takes bf16, f16 and f32, not {other}"))),
    }
}

/// A kernel's name for a world size that is known only at run time.
macro_rules! by_world {
    ($world:expr, $prefix:expr) => {
        match $world {
            2 => concat!($prefix, "_w2"),
            3 => concat!($prefix, "_w3"),
            4 => concat!($prefix, "_w4"),
            5 => concat!($prefix, "_w5"),
            6 => concat!($prefix, "_w6"),
            7 => concat!($prefix, "_w7"),
            _ => concat!($prefix, "_w8"),
        }
    };
}

macro_rules! per_float {
    ($module:expr, $world:expr, $prefix:literal) => {
        [
            $module.function(by_world!($world, concat!($prefix, "_bf16")))?,
            $module.function(by_world!($world, concat!($prefix, "_f16")))?,
            $module.function(by_world!($world, concat!($prefix, "_f32")))?,
        ]
    };
}

pub(super) use {by_world, per_float};

/// Every entry point for one world size.
pub(super) struct Functions {
    /// By packets, then by Lamport packs.
    pub(super) one_shot: [PerFloat; 2],
    pub(super) two_shot: PerFloat,
    pub(super) reduce_scatter: PerFloat,
    /// By cells: two packs per thread, slice and chunk, then four.
    pub(super) all_reduce_cells: [PerFloat; 2],
    pub(super) reduce_scatter_cells: [PerFloat; 2],
    pub(super) all_reduce_steps: PerFloat,
    pub(super) reduce_scatter_steps: PerFloat,
    pub(super) quantized: PerFloat,
    pub(super) norm_one_shot: [PerFloat; 2],
    pub(super) norm_two_shot: PerFloat,
    /// With an fp8 result.
    pub(super) norm_one_shot_fp8: [PerFloat; 2],
    pub(super) norm_two_shot_fp8: PerFloat,
    pub(super) all_gather_packets: Function,
    pub(super) all_gather_direct: Function,
    pub(super) all_gather_steps: Function,
    pub(super) all_gather_spread: Function,
    pub(super) broadcast_packets: Function,
    pub(super) broadcast_relayed: Function,
    pub(super) broadcast_direct: Function,
    pub(super) barrier: Function,
    pub(super) lift: Function,
    pub(super) pair: Function,
    pub(super) mesh: MeshFunctions,
    pub(super) uneven: UnevenFunctions,
    pub(super) average: AverageFunctions,
    pub(super) lines: LineFunctions,
}

impl Functions {
    pub(super) fn load(context: &std::sync::Arc<cudarc::driver::CudaContext>, world: usize) -> Result<Self> {
        if !(2..=MAX_RANKS).contains(&world) {
            return Err(CommError::invalid(
                "world",
                format!("{world} ranks; the kernels are for 2 to {MAX_RANKS}"),
            ));
        }
        let reduce = Module::load(context, "p2p_all_reduce")?;
        let cells = Module::load(context, "p2p_cells")?;
        let steps = Module::load(context, "p2p_steps")?;
        let gather = Module::load(context, "p2p_gather")?;
        let norm = Module::load(context, "p2p_norm")?;
        let norm_fp8 = Module::load(context, "p2p_norm_fp8")?;
        let quantized = Module::load(context, "p2p_quantized")?;
        let meet = Module::load(context, "p2p_meet")?;
        Ok(Self {
            one_shot: [per_float!(reduce, world, "p2p_ar1"), per_float!(reduce, world, "p2p_ar1l")],
            two_shot: per_float!(reduce, world, "p2p_ar2"),
            reduce_scatter: per_float!(reduce, world, "p2p_rs"),
            all_reduce_cells: [per_float!(cells, world, "p2p_arc2"), per_float!(cells, world, "p2p_arc4")],
            reduce_scatter_cells: [
                per_float!(cells, world, "p2p_rsc2"),
                per_float!(cells, world, "p2p_rsc4"),
            ],
            all_reduce_steps: per_float!(steps, world, "p2p_ars"),
            reduce_scatter_steps: per_float!(steps, world, "p2p_rss"),
            quantized: per_float!(quantized, world, "p2p_arq"),
            norm_one_shot: [per_float!(norm, world, "p2p_norm1"), per_float!(norm, world, "p2p_norm1l")],
            norm_two_shot: per_float!(norm, world, "p2p_norm2"),
            norm_one_shot_fp8: [
                per_float!(norm_fp8, world, "p2p_norm1_fp8"),
                per_float!(norm_fp8, world, "p2p_norm1l_fp8"),
            ],
            norm_two_shot_fp8: per_float!(norm_fp8, world, "p2p_norm2_fp8"),
            all_gather_packets: gather.function(by_world!(world, "p2p_ag_packet"))?,
            all_gather_direct: gather.function(by_world!(world, "p2p_ag_direct"))?,
            all_gather_steps: steps.function(by_world!(world, "p2p_ag_steps"))?,
            all_gather_spread: steps.function(by_world!(world, "p2p_ag_spread"))?,
            broadcast_packets: gather.function(by_world!(world, "p2p_bc1_packet"))?,
            broadcast_relayed: gather.function(by_world!(world, "p2p_bc2_packet"))?,
            broadcast_direct: gather.function(by_world!(world, "p2p_bc_direct"))?,
            barrier: meet.function(by_world!(world, "p2p_barrier"))?,
            lift: meet.function("p2p_lift")?,
            pair: meet.function("p2p_pair")?,
            mesh: MeshFunctions::load(context)?,
            uneven: UnevenFunctions::load(context, world)?,
            average: AverageFunctions::load(context, world)?,
            lines: LineFunctions::load(context, world)?,
        })
    }
}
