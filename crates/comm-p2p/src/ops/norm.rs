//! The fused norms.

use comm_core::{
    CommError, DeviceComm, NormQuantization, OpKind, ReduceOp, Result, RmsNormArgs, StreamHandle,
    TwoGroupNormArgs, check, compose,
};

use crate::comm::P2pComm;
use crate::select::Plan;
use crate::usage::Algorithm;

#[allow(clippy::missing_safety_doc, reason = "`DeviceComm`'s contract holds for every method")]
impl P2pComm {
    /// The norm of a communicator of one rank, or of sums that are known.
    unsafe fn local_norm(
        &self,
        args: &RmsNormArgs,
        quantized: Option<&NormQuantization>,
        stream: StreamHandle,
    ) -> Result<()> {
        let kernels = &self.shared().base.kernels;
        // SAFETY: the caller vouches for the operands.
        unsafe {
            match quantized {
                Some(quantized) => kernels.rmsnorm_quantized(args, quantized, stream),
                None => kernels.rmsnorm(args, stream),
            }
        }
    }

    pub(crate) unsafe fn do_norm(
        &self,
        args: &RmsNormArgs,
        quantized: Option<&NormQuantization>,
        stream: StreamHandle,
    ) -> Result<()> {
        let (kind, checked) = match quantized {
            Some(quantized) => (OpKind::AllReduceRmsNormQuantized, check::rmsnorm_quantized(args, quantized)),
            None => (OpKind::AllReduceRmsNorm, check::rmsnorm(args)),
        };
        self.compare(kind, &checked, || {
            let RmsNormArgs { tokens, hidden, dtype, eps, weight_offset, bias, .. } = args;
            format!(
                "{tokens} x {hidden} {dtype}, eps {eps}, weight offset {weight_offset}, {} bias{}",
                if bias.is_some() { "with" } else { "no" },
                describe(quantized)
            )
        })?;
        if checked? == 0 {
            self.begin(kind, stream)?.finish(Algorithm::Local, stream);
            return Ok(());
        }
        let Some(channels) = &self.shared().channels else {
            let call = self.begin(kind, stream)?;
            // SAFETY: the operands have been checked and the caller vouches for them. One rank's sum is its input.
            call.fatal(unsafe { self.local_norm(args, quantized, stream) })?;
            call.finish(Algorithm::Local, stream);
            return Ok(());
        };
        let Plan { algorithm, shape, chunk, .. } =
            self.limits().norm(args.tokens, args.hidden * args.dtype.size());
        let (eps, offset) = (args.eps.to_bits().into(), args.weight_offset.to_bits().into());
        let rest = [args.hidden as u64, eps, offset, args.bias.is_some().into(), form(quantized)];
        if algorithm == Algorithm::Composed {
            let (count, dtype) = (args.tokens * args.hidden, args.dtype);
            // SAFETY: as above; the sums go to `output`, which is `input` only if the caller said so, and the norm is
            // ordered behind them by the stream.
            unsafe { self.do_all_reduce((args.input, args.output), count, dtype, ReduceOp::Sum, stream) }?;
            let mut call = self.begin(kind, stream)?;
            call.passes(dtype, count, &rest);
            let summed = RmsNormArgs { input: args.output, ..*args };
            // SAFETY: as above.
            call.fatal(unsafe { self.local_norm(&summed, quantized, stream) })?;
            call.finish(algorithm, stream);
            return Ok(());
        }
        let mut call = self.begin(kind, stream)?;
        call.passes(args.dtype, args.tokens * args.hidden, &rest);
        let one_hop = matches!(algorithm, Algorithm::OneShot | Algorithm::Lamport);
        let (channel, wire) = channels.one_hop(if one_hop { algorithm } else { Algorithm::Lamport });
        let link = call.link(channel);
        if one_hop {
            self.share_a_buffer(&call, &link, stream)?;
        }
        // SAFETY: the channels are live while the communicator is open, the plan is the same on all ranks, and the
        // caller vouches for the operands.
        call.fatal(unsafe {
            if one_hop {
                let how = (chunk, shape.block);
                channels.kernels.norm_one_shot((&link, wire), args, quantized, how, stream)
            } else {
                channels.kernels.norm_two_shot(&link, args, quantized, shape, stream)
            }
        })?;
        call.finish(algorithm, stream);
        Ok(())
    }

    pub(crate) unsafe fn do_two_group_norm(
        &self,
        gather: &dyn DeviceComm,
        args: &TwoGroupNormArgs<'_>,
        quantized: Option<&NormQuantization>,
        stream: StreamHandle,
    ) -> Result<()> {
        let (shared, other) = (self.shared(), gather.info());
        let kind = match quantized {
            Some(quantized) => {
                check::two_group_norm_quantized(&shared.info, other, args, quantized)?;
                OpKind::AllReduceRmsNormTwoGroupQuantized
            }
            None => {
                check::two_group_norm(&shared.info, other, args)?;
                OpKind::AllReduceRmsNormTwoGroup
            }
        };
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
        let local = |rows: &RmsNormArgs, quantized: Option<&NormQuantization>| {
            let call = self.begin(kind, stream)?;
            // SAFETY: the operands have been checked and the caller vouches for them.
            call.fatal(unsafe { self.local_norm(rows, quantized, stream) })
        };
        // SAFETY: the caller vouches for the operands, and `local` is ordered on the stream.
        unsafe {
            match quantized {
                None => compose::two_group_norm(self, gather, args, stream, |rows| local(rows, None)),
                Some(quantized) => {
                    let local = |rows: &RmsNormArgs, part: &NormQuantization| local(rows, Some(part));
                    compose::two_group_norm_quantized(self, gather, args, quantized, stream, local)
                }
            }
        }?;
        shared.usage.count(kind, Algorithm::Composed);
        Ok(())
    }
}

/// What the ranks must agree on about an fp8 result, as a number.
fn form(quantized: Option<&NormQuantization>) -> u64 {
    quantized.map_or(0, |quantized| {
        1 | u64::from(quantized.scale.is_per_token()) << 1 | u64::from(quantized.keep_unquantized) << 2
    })
}

/// What the ranks must agree on about an fp8 result.
fn describe(quantized: Option<&NormQuantization>) -> String {
    quantized.map_or_else(String::new, |quantized| {
        let scale = if quantized.scale.is_per_token() { "token" } else { "tensor" };
        let kept = if quantized.keep_unquantized { " and unquantised" } else { "" };
        format!(", to fp8 with a scale per {scale}{kept}")
    })
}
