//! What stores straight into registered results, which all ranks reach.

use comm_core::{DType, DeviceAddr, Result, StreamHandle};
use comm_kernels::p2p::Peers;

use crate::call::Call;
use crate::comm::P2pComm;
use crate::select::Plan;
use crate::state::Channels;
use crate::usage::Algorithm;

impl P2pComm {
    /// A sum all-reduce of bf16, f16 or f32 by stores into `recv[r]` on every rank `r`.
    pub(super) fn store_all_reduce(
        &self,
        call: &Call<'_>,
        channels: &Channels,
        plan: &Plan,
        (send, recv): (DeviceAddr, &Peers),
        (count, dtype): (usize, DType),
        stream: StreamHandle,
    ) -> Result<()> {
        let (kernels, link) = (&channels.kernels, call.link(&channels.cells));
        let Plan { shape, units, .. } = *plan;
        // SAFETY: here and below, the channels are live while the communicator is open, the plan is the same on all
        // ranks, `recv` is memory that all ranks reach, and the caller vouches for the operands.
        call.fatal(unsafe {
            if plan.algorithm == Algorithm::Steps {
                let link = (&link, self.shared().base.options.cell_ctas);
                kernels.all_reduce_steps(link, send, recv, count, dtype, shape.grid, stream)
            } else {
                kernels.all_reduce_cells(&link, units, send, recv, count, dtype, shape, stream)
            }
        })
    }

    /// An all-gather of `part` bytes a rank by stores into `recv[r]` on every rank `r`.
    pub(super) fn store_all_gather(
        &self,
        call: &Call<'_>,
        channels: &Channels,
        plan: &Plan,
        (send, recv): (DeviceAddr, &Peers),
        part: usize,
        stream: StreamHandle,
    ) -> Result<()> {
        let (kernels, link) = (&channels.kernels, call.link(&channels.packet));
        let Plan { shape, chunk, .. } = *plan;
        // SAFETY: as above.
        call.fatal(unsafe {
            match plan.algorithm {
                Algorithm::Steps => kernels.all_gather_steps(&link, send, recv, part, shape.grid, stream),
                Algorithm::Spread => kernels.all_gather_spread(&link, send, recv, part, shape.grid, stream),
                _ => kernels.all_gather_direct(&link, send, recv, (part, chunk), shape, stream),
            }
        })
    }

    /// A broadcast of `bytes` bytes by stores into `recv[r]` on every rank `r`.
    pub(super) fn store_broadcast(
        &self,
        call: &Call<'_>,
        channels: &Channels,
        plan: &Plan,
        (send, recv): (DeviceAddr, &Peers),
        (bytes, root): (usize, usize),
        stream: StreamHandle,
    ) -> Result<()> {
        let (kernels, link) = (&channels.kernels, call.link(&channels.packet));
        // SAFETY: as above.
        call.fatal(unsafe {
            kernels.broadcast_direct(&link, send, recv, bytes, (root, plan.chunk), plan.shape, stream)
        })
    }
}
