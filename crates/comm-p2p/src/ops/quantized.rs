//! The quantised all-reduce.

use comm_core::{DType, DeviceAddr, OpKind, Result, StreamHandle, check};

use crate::comm::P2pComm;
use crate::usage::Algorithm;

#[allow(clippy::missing_safety_doc, reason = "`DeviceComm`'s contract holds for every method")]
impl P2pComm {
    pub(crate) unsafe fn do_all_reduce_quantized(
        &self,
        (send, recv): (DeviceAddr, DeviceAddr),
        count: usize,
        dtype: DType,
        stream: StreamHandle,
    ) -> Result<()> {
        const KIND: OpKind = OpKind::AllReduceQuantized;
        let checked = check::all_reduce_quantized(send, recv, count, dtype);
        self.compare(KIND, &checked, || format!("{count} {dtype}"))?;
        let bytes = checked?;
        let call = self.begin(KIND)?;
        let Some(channels) = self.channels(bytes) else {
            return self.local(call, send, recv, bytes, stream);
        };
        let plan = self.limits().all_reduce_quantized(count);
        let link = call.link(&channels.lamport);
        // SAFETY: the channels are live while the communicator is open, the plan is the same on all ranks, and the
        // caller vouches for the operands.
        call.fatal(unsafe {
            channels.kernels.all_reduce_quantized(&link, (send, recv), count, dtype, plan.shape, stream)
        })?;
        call.finish(Algorithm::TwoShot);
        Ok(())
    }
}
