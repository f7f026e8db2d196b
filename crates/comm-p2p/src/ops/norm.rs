//! The fused norms.

use comm_core::{
    CommError, DeviceComm, OpKind, ReduceOp, Result, RmsNormArgs, StreamHandle, TwoGroupNormArgs, check,
    compose,
};

use crate::comm::P2pComm;
use crate::select::Plan;
use crate::usage::Algorithm;

#[allow(clippy::missing_safety_doc, reason = "`DeviceComm`'s contract holds for every method")]
impl P2pComm {
    pub(crate) unsafe fn do_norm(&self, args: &RmsNormArgs, stream: StreamHandle) -> Result<()> {
        const KIND: OpKind = OpKind::AllReduceRmsNorm;
        let checked = check::rmsnorm(args);
        self.compare(KIND, &checked, || {
            let RmsNormArgs { tokens, hidden, dtype, eps, weight_offset, bias, .. } = args;
            format!(
                "{tokens} x {hidden} {dtype}, eps {eps}, weight offset {weight_offset}, {} bias",
                if bias.is_some() { "with" } else { "no" }
            )
        })?;
        if checked? == 0 {
            self.begin(KIND)?.finish(Algorithm::Local);
            return Ok(());
        }
        let Some(channels) = &self.shared().channels else {
            let call = self.begin(KIND)?;
            // SAFETY: the operands have been checked and the caller vouches for them. One rank's sum is its input.
            call.fatal(unsafe { self.shared().base.kernels.rmsnorm(args, stream) })?;
            call.finish(Algorithm::Local);
            return Ok(());
        };
        let Plan { algorithm, shape, chunk, .. } =
            self.limits().norm(args.tokens, args.hidden * args.dtype.size());
        if algorithm == Algorithm::Composed {
            let (count, dtype) = (args.tokens * args.hidden, args.dtype);
            // SAFETY: as above; the sums go to `output`, which is `input` only if the caller said so, and the norm is
            // ordered behind them by the stream.
            unsafe { self.do_all_reduce((args.input, args.output), count, dtype, ReduceOp::Sum, stream) }?;
            let call = self.begin(KIND)?;
            let summed = RmsNormArgs { input: args.output, ..*args };
            // SAFETY: as above.
            call.fatal(unsafe { self.shared().base.kernels.rmsnorm(&summed, stream) })?;
            call.finish(algorithm);
            return Ok(());
        }
        let mut call = self.begin(KIND)?;
        call.passes(args.dtype, args.tokens * args.hidden, &[args.hidden as u64, args.eps.to_bits().into()]);
        // SAFETY: the channels are live while the communicator is open, the plan is the same on all ranks, and the
        // caller vouches for the operands.
        call.fatal(unsafe {
            if algorithm == Algorithm::OneShot {
                let link = call.link(&channels.packet);
                channels.kernels.norm_one_shot(&link, args, (chunk, shape.block), stream)
            } else {
                let link = call.link(&channels.lamport);
                channels.kernels.norm_two_shot(&link, args, shape, stream)
            }
        })?;
        call.finish(algorithm);
        Ok(())
    }

    pub(crate) unsafe fn do_two_group_norm(
        &self,
        gather: &dyn DeviceComm,
        args: &TwoGroupNormArgs<'_>,
        stream: StreamHandle,
    ) -> Result<()> {
        const KIND: OpKind = OpKind::AllReduceRmsNormTwoGroup;
        let (shared, other) = (self.shared(), gather.info());
        check::two_group_norm(&shared.info, other, args)?;
        if other.backend != shared.info.backend || other.memory != shared.info.memory {
            return Err(CommError::invalid(
                "gather",
                format!(
                    "communicator {:?} is of backend {} on {:?}, but this one of {} on {:?}",
                    other.name, other.backend, other.memory, shared.info.backend, shared.info.memory
                ),
            ));
        }
        shared.healthy()?;
        let local = |rows: &RmsNormArgs| {
            let call = self.begin(KIND)?;
            // SAFETY: the operands have been checked and the caller vouches for them.
            call.fatal(unsafe { shared.base.kernels.rmsnorm(rows, stream) })
        };
        // SAFETY: the caller vouches for the operands, and `local` is ordered on the stream.
        unsafe { compose::two_group_norm(self, gather, args, stream, local) }?;
        shared.usage.count(KIND, Algorithm::Composed);
        Ok(())
    }
}
