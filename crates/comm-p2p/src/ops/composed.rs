//! All-reduces of results that the other ranks cannot reach, too large for packs: a reduce-scatter, then an all-gather.

use comm_core::{DType, DeviceAddr, Result, StreamHandle};
use comm_kernels::p2p::{Shape, Wire};

use crate::call::Call;
use crate::comm::P2pComm;
use crate::select::slice;
use crate::state::Channels;

impl P2pComm {
    /// A sum of bf16, f16 or f32. In place is allowed: a rank's slice is summed where it lies, and nobody but this rank
    /// reads what the gather then overwrites.
    pub(super) fn composed_all_reduce(
        &self,
        call: &Call<'_>,
        channels: &Channels,
        (send, recv): (DeviceAddr, DeviceAddr),
        count: usize,
        dtype: DType,
        stream: StreamHandle,
    ) -> Result<()> {
        let (info, size) = (&self.shared().info, dtype.size());
        let part = slice(count, size, info.size);
        if part > 0 {
            let (sums, copies) = self.limits().parts_of_all_reduce(part * size);
            let own = recv.offset((info.rank * part * size) as u64);
            self.launch_reduce_scatter(call, channels, &sums, (send, own), part, dtype, stream)?;
            self.launch_all_gather(call, channels, &copies, (own, recv), part * size, stream)?;
        }
        let done = part * info.size;
        if done < count {
            // Less than a pack a rank.
            let (rest, shape) = ((done * size) as u64, Shape { grid: 1, block: 32 });
            let link = (&call.link(&channels.packet), Wire::Packet);
            let operands = (send.offset(rest), recv.offset(rest));
            // SAFETY: the channel is live while the communicator is open, and the caller vouches for the operands.
            call.fatal(unsafe {
                channels.kernels.all_reduce_one_shot(link, operands, count - done, dtype, shape, stream)
            })?;
        }
        Ok(())
    }
}
