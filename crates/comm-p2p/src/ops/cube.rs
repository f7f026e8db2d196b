//! The all-reduces and the all-gather of hybrid cube meshes, and the all-reduce by reading.

use comm_core::{CommError, DType, DeviceAddr, OpKind, Result, StreamHandle};
use comm_kernels::p2p::{CubeRoles, Shape};

use crate::call::Call;
use crate::comm::P2pComm;
use crate::state::Channels;

/// This rank's part in the mesh. Without one the plan would have been another.
fn roles(channels: &Channels) -> Result<CubeRoles> {
    channels.mesh.as_ref().and_then(|mesh| mesh.cube).ok_or_else(|| {
        CommError::unsupported(OpKind::AllReduce, crate::NAME, "the ranks are no hybrid cube mesh")
    })
}

impl P2pComm {
    pub(super) fn cube_all_reduce(
        &self,
        call: &Call<'_>,
        channels: &Channels,
        (send, recv): (DeviceAddr, DeviceAddr),
        count: usize,
        dtype: DType,
        stream: StreamHandle,
    ) -> Result<()> {
        let roles = call.fatal(roles(channels))?;
        let (slices, shape) = self.limits().cube_all_reduce(count * dtype.size());
        let link = call.link(&channels.packet);
        // SAFETY: the channels are live while the communicator is open, the plan is the same on all ranks, and the
        // caller vouches for the operands.
        call.fatal(unsafe {
            channels.kernels.all_reduce_cube(&link, &roles, slices, (send, recv), count, dtype, shape, stream)
        })
    }

    pub(super) fn cube_all_gather(
        &self,
        call: &Call<'_>,
        channels: &Channels,
        (send, recv): (DeviceAddr, DeviceAddr),
        part: usize,
        shape: Shape,
        stream: StreamHandle,
    ) -> Result<()> {
        let roles = call.fatal(roles(channels))?;
        let link = call.link(&channels.packet);
        // SAFETY: as above.
        call.fatal(unsafe {
            channels.kernels.all_gather_cube(&link, &roles, (send, recv), part, shape, stream)
        })
    }

    /// In pieces of a half of the staging memory. The kernel ends when all ranks have read the piece.
    pub(super) fn pull_all_reduce(
        &self,
        call: &Call<'_>,
        channels: &Channels,
        (send, recv): (DeviceAddr, DeviceAddr),
        count: usize,
        dtype: DType,
        shape: Shape,
        stream: StreamHandle,
    ) -> Result<()> {
        let size = dtype.size();
        let most = channels.half / size;
        let link = call.link(&channels.packet);
        let mut done = 0;
        while done < count {
            let part = most.min(count - done);
            let at = |addr: DeviceAddr| addr.offset((done * size) as u64);
            let (operands, staging) = ((at(send), at(recv)), &channels.staging);
            // SAFETY: as above; the staging memory is free between exchanges and as large as a piece.
            call.fatal(unsafe {
                channels.kernels.all_reduce_pull(&link, operands, part, dtype, staging, shape, stream)
            })?;
            done += part;
        }
        Ok(())
    }
}
