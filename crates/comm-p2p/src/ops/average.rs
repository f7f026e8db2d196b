//! Averages of bf16, f16 and f32 by packs.

use comm_core::{DType, DeviceAddr, ReduceOp, Result, StreamHandle};
use comm_kernels::p2p::Parts;

use crate::comm::P2pComm;
use crate::select::Plan;
use crate::state::{Call, Channels};
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
        let Plan { algorithm, shape, .. } = self.limits().all_reduce_average(count * dtype.size());
        if algorithm == Algorithm::Staged {
            return Ok(algorithm);
        }
        let one_hop = algorithm == Algorithm::OneShot;
        let link = call.link(if one_hop { &channels.packet } else { &channels.lamport });
        self.share_a_buffer(call, &link, stream)?;
        // SAFETY: the channels are live while the communicator is open, the plan is the same on all ranks, and the
        // caller vouches for the operands.
        call.fatal(unsafe {
            channels.kernels.all_reduce_average(&link, one_hop, operands, count, dtype, shape, stream)
        })?;
        Ok(algorithm)
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
        let Plan { algorithm, shape, .. } = self.limits().reduce_scatter_average(count * dtype.size());
        if algorithm == Algorithm::Staged {
            return Ok(algorithm);
        }
        let link = call.link(&channels.lamport);
        self.share_a_buffer(call, &link, stream)?;
        // SAFETY: as above.
        call.fatal(unsafe {
            channels.kernels.reduce_scatter_average(&link, operands, count, dtype, shape, stream)
        })?;
        Ok(algorithm)
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
        let Plan { algorithm, shape, .. } = self.limits().reduce_scatter_average(parts.longest());
        if algorithm == Algorithm::Staged {
            return Ok(algorithm);
        }
        let link = call.link(&channels.lamport);
        self.share_a_buffer(call, &link, stream)?;
        // SAFETY: as above.
        call.fatal(unsafe {
            channels.kernels.reduce_scatter_v_average(&link, operands, parts, dtype, shape, stream)
        })?;
        Ok(algorithm)
    }
}
