//! Averages of bf16, f16 and f32 by packs.

use comm_core::{DType, DeviceAddr, ReduceOp, Result, StreamHandle};
use comm_kernels::p2p::{Link, Parts};

use crate::call::Call;
use crate::comm::P2pComm;
use crate::select::Plan;
use crate::state::Channels;
use crate::usage::Algorithm;

/// Whether the kernels here take it.
pub(super) const fn is_average(dtype: DType, op: ReduceOp) -> bool {
    matches!(dtype, DType::F32 | DType::F16 | DType::BF16) && matches!(op, ReduceOp::Avg)
}

/// Each returns what carried it out; [`Algorithm::Staged`] is left to the caller, with nothing enqueued.
impl P2pComm {
    pub(super) fn average_all_reduce(
        &self,
        call: &Call<'_>,
        channels: &Channels,
        operands: (DeviceAddr, DeviceAddr),
        count: usize,
        dtype: DType,
        stream: StreamHandle,
    ) -> Result<Algorithm> {
        let plan = self.limits().all_reduce_average(count * dtype.size());
        let (kernels, one_hop) = (&channels.kernels, plan.algorithm == Algorithm::OneShot);
        self.by_packs(call, channels, &plan, stream, |link| {
            // SAFETY: the channels are live while the communicator is open, the plan is the same on all ranks, and the
            // caller vouches for the operands.
            unsafe { kernels.all_reduce_average(link, one_hop, operands, count, dtype, plan.shape, stream) }
        })
    }

    pub(super) fn average_reduce_scatter(
        &self,
        call: &Call<'_>,
        channels: &Channels,
        operands: (DeviceAddr, DeviceAddr),
        count: usize,
        dtype: DType,
        stream: StreamHandle,
    ) -> Result<Algorithm> {
        let plan = self.limits().reduce_scatter_average(count * dtype.size());
        let kernels = &channels.kernels;
        self.by_packs(call, channels, &plan, stream, |link| {
            // SAFETY: as above.
            unsafe { kernels.reduce_scatter_average(link, operands, count, dtype, plan.shape, stream) }
        })
    }

    pub(super) fn average_reduce_scatter_v(
        &self,
        call: &Call<'_>,
        channels: &Channels,
        operands: (DeviceAddr, DeviceAddr),
        parts: &Parts,
        dtype: DType,
        stream: StreamHandle,
    ) -> Result<Algorithm> {
        let plan = self.limits().reduce_scatter_average(parts.longest());
        let kernels = &channels.kernels;
        self.by_packs(call, channels, &plan, stream, |link| {
            // SAFETY: as above.
            unsafe { kernels.reduce_scatter_v_average(link, operands, parts, dtype, plan.shape, stream) }
        })
    }

    /// Enqueues by `launch`, on the channel of the plan's packs, unless the plan is to stage.
    fn by_packs(
        &self,
        call: &Call<'_>,
        channels: &Channels,
        plan: &Plan,
        stream: StreamHandle,
        launch: impl FnOnce(&Link) -> Result<()>,
    ) -> Result<Algorithm> {
        if plan.algorithm != Algorithm::Staged {
            let one_hop = plan.algorithm == Algorithm::OneShot;
            let link = call.link(if one_hop { &channels.packet } else { &channels.lamport });
            self.share_a_buffer(call, &link, stream)?;
            call.fatal(launch(&link))?;
        }
        Ok(plan.algorithm)
    }
}
