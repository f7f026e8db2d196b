//! Calls that are being captured and whose results the ranks will get to know afterwards.
//!
//! Only with the option `p2p.graph_registration`, and only where a registered result would be faster: the other calls
//! need no registration and are captured as they are.

use comm_core::{DType, DeviceAddr, Result, StreamHandle};
use comm_kernels::capture::{CapturingGraph, capturing_graph};

use crate::call::Call;
use crate::comm::P2pComm;
use crate::select::Plan;
use crate::state::Channels;
use crate::usage::Algorithm;

#[allow(clippy::missing_safety_doc, reason = "`DeviceComm`'s contract holds for every method")]
impl P2pComm {
    /// The entry for the result, and the kernels that take it.
    fn entry(
        call: &mut Call<'_>,
        graph: CapturingGraph,
        recv: DeviceAddr,
        bytes: usize,
    ) -> Result<Option<DeviceAddr>> {
        let reserved =
            call.owned.captured.as_mut().map(|captured| captured.reserve(graph, recv, bytes)).transpose();
        match reserved {
            Err(error) if error.is_fatal() => call.fatal(Err(error)),
            other => other,
        }
    }

    /// Captures an all-reduce on an unregistered result if that is to be registered afterwards, and says whether it did.
    pub(super) unsafe fn capture_all_reduce(
        &self,
        call: &mut Call<'_>,
        channels: &Channels,
        (send, recv): (DeviceAddr, DeviceAddr),
        count: usize,
        dtype: DType,
        stream: StreamHandle,
    ) -> Result<bool> {
        if call.owned.captured.is_none() {
            return Ok(false);
        }
        let bytes = count * dtype.size();
        let mut limits = self.limits();
        // Steps have no captured form: cells are the next best.
        if limits.all_reduce(bytes, true).algorithm == Algorithm::Steps {
            limits.forced = Some(Algorithm::Cells);
        }
        let Plan { algorithm, shape, units, .. } = limits.all_reduce(bytes, true);
        let fits = shape.threads() <= channels.lamport.slot_packs.into();
        if algorithm != Algorithm::Cells || !fits {
            return Ok(false);
        }
        // SAFETY: the caller vouches for the stream.
        let Some(graph) = call.fatal(unsafe { capturing_graph(stream) })? else { return Ok(false) };
        let Some(entry) = Self::entry(call, graph, recv, bytes)? else { return Ok(false) };
        let Some(captured) = &call.owned.captured else { return Ok(false) };
        let links = (&call.link(&channels.cells), &call.link(&channels.lamport));
        // SAFETY: the channels and the table are live while the communicator is open; the plan is the same on all ranks,
        // which all capture the call and so reserve the entry of the same number; the caller vouches for the operands.
        call.fatal(unsafe {
            captured.kernels.all_reduce(links, units, (send, recv), count, dtype, shape, entry, stream)
        })?;
        Ok(true)
    }

    /// The same for an all-gather of `part` bytes a rank.
    pub(super) unsafe fn capture_all_gather(
        &self,
        call: &mut Call<'_>,
        channels: &Channels,
        (send, recv): (DeviceAddr, DeviceAddr),
        part: usize,
        stream: StreamHandle,
    ) -> Result<bool> {
        if call.owned.captured.is_none() {
            return Ok(false);
        }
        let mut limits = self.limits();
        // As above: direct stores.
        if matches!(limits.all_gather(part, true).algorithm, Algorithm::Steps | Algorithm::Spread) {
            limits.forced = Some(Algorithm::Direct);
        }
        let Plan { algorithm, mut shape, chunk, .. } = limits.all_gather(part, true);
        if algorithm != Algorithm::Direct {
            return Ok(false);
        }
        // Where the packets have fewer slots than the direct stores would have threads, blocks of whole warps that fit.
        let most = channels.packet.slot_packs / shape.grid.max(1) / 32 * 32;
        shape.block = shape.block.min(most);
        if shape.block == 0 {
            return Ok(false);
        }
        // SAFETY: as above.
        let Some(graph) = call.fatal(unsafe { capturing_graph(stream) })? else { return Ok(false) };
        let bytes = part * self.shared().info.size;
        let Some(entry) = Self::entry(call, graph, recv, bytes)? else { return Ok(false) };
        let Some(captured) = &call.owned.captured else { return Ok(false) };
        let link = call.link(&channels.packet);
        // SAFETY: see above.
        call.fatal(unsafe {
            captured.kernels.all_gather(&link, (send, recv), (part, chunk), shape, entry, stream)
        })?;
        Ok(true)
    }
}
