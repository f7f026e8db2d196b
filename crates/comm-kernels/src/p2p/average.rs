//! Launchers of averages: `cuda/p2p/average.cu`.

use std::sync::Arc;

use comm_core::{CommError, DType, DeviceAddr, Result, StreamHandle};
use cudarc::driver::CudaContext;

use super::functions::{PerFloat, by_world, float_index, per_float};
use super::{Link, P2pKernels, Parts, Shape, check_shape};
use crate::kernels::parameters;
use crate::module::Module;

/// The entry points of one world size.
pub(super) struct AverageFunctions {
    one_shot: PerFloat,
    two_shot: PerFloat,
    reduce_scatter: PerFloat,
    uneven: PerFloat,
}

impl AverageFunctions {
    pub(super) fn load(context: &Arc<CudaContext>, world: usize) -> Result<Self> {
        let average = Module::load(context, "p2p_average")?;
        Ok(Self {
            one_shot: per_float!(average, world, "p2p_ar1avg"),
            two_shot: per_float!(average, world, "p2p_ar2avg"),
            reduce_scatter: per_float!(average, world, "p2p_rsavg"),
            uneven: per_float!(average, world, "p2p_rsvavg"),
        })
    }
}

/// The safety contract is that of [`P2pKernels`]' other launchers. All average bf16, f16 or f32: sums in fp32 in rank
/// order, divided by the number of ranks in fp32 and rounded once.
#[allow(clippy::missing_safety_doc, reason = "the block's comment holds for every method")]
impl P2pKernels {
    /// Average all-reduce: with `one_hop` as [`all_reduce_one_shot`](Self::all_reduce_one_shot), else as
    /// [`all_reduce_two_shot`](Self::all_reduce_two_shot).
    ///
    /// # Errors
    /// [`CommError::InvalidArgument`], [`CommError::Cuda`].
    pub unsafe fn all_reduce_average(
        &self,
        link: &Link,
        one_hop: bool,
        (send, recv): (DeviceAddr, DeviceAddr),
        count: usize,
        dtype: DType,
        shape: Shape,
        stream: StreamHandle,
    ) -> Result<()> {
        let packs = (count * dtype.size()).div_ceil(12);
        if one_hop && packs > link.slot_packs as usize {
            return Err(CommError::invalid("count", format!("{packs} packs, {} fit", link.slot_packs)));
        }
        check_shape(shape, if one_hop { u64::MAX } else { link.slot_packs.into() })?;
        let average = &self.functions.average;
        let function = &(if one_hop { &average.one_shot } else { &average.two_shot })[float_index(dtype)?];
        let count = count as u64;
        // SAFETY: these are the kernel's parameters; the caller vouches for what they name.
        unsafe { self.launch(function, shape, stream, &mut parameters![*link, send, recv, count]) }
    }

    /// Average reduce-scatter by Lamport packs, `count` elements a rank.
    ///
    /// # Errors
    /// [`CommError::InvalidArgument`], [`CommError::Cuda`].
    pub unsafe fn reduce_scatter_average(
        &self,
        link: &Link,
        (send, recv): (DeviceAddr, DeviceAddr),
        count: usize,
        dtype: DType,
        shape: Shape,
        stream: StreamHandle,
    ) -> Result<()> {
        check_shape(shape, link.slot_packs.into())?;
        let function = &self.functions.average.reduce_scatter[float_index(dtype)?];
        let count = count as u64;
        // SAFETY: as above.
        unsafe { self.launch(function, shape, stream, &mut parameters![*link, send, recv, count]) }
    }

    /// The same of uneven parts, of whole elements.
    ///
    /// # Errors
    /// [`CommError::InvalidArgument`], [`CommError::Cuda`].
    pub unsafe fn reduce_scatter_v_average(
        &self,
        link: &Link,
        (send, recv): (DeviceAddr, DeviceAddr),
        parts: &Parts,
        dtype: DType,
        shape: Shape,
        stream: StreamHandle,
    ) -> Result<()> {
        parts.check()?;
        check_shape(shape, link.slot_packs.into())?;
        let function = &self.functions.average.uneven[float_index(dtype)?];
        // SAFETY: as above.
        unsafe { self.launch(function, shape, stream, &mut parameters![*link, send, recv, *parts]) }
    }
}
