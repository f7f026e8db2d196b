//! The fused norms: NCCL's reduction followed by a kernel.

use comm_core::{
    CommError, DType, DeviceAddr, DeviceComm, NormQuantization, OpKind, ReduceOp, Result, RmsNormArgs,
    StreamHandle, TwoGroupNormArgs, check, compose,
};
use comm_kernels::Kernels;

use super::comm::NcclComm;
use super::limits;
use super::usage::Algorithm;

impl NcclComm {
    fn norm(&self, op: OpKind) -> Result<&Kernels> {
        self.shared()
            .base
            .kernels
            .as_deref()
            .ok_or_else(|| CommError::unsupported(op, crate::NAME, "this rank has no norm kernel"))
    }

    /// # Safety
    /// As `DeviceComm::all_reduce_rmsnorm`.
    pub(super) unsafe fn fused_norm(
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
            let RmsNormArgs { tokens, hidden, dtype, eps, weight_offset, .. } = args;
            format!(
                "{tokens} x {hidden} {dtype}, eps {eps}, weight offset {weight_offset}{}",
                describe(quantized)
            )
        })?;
        let count = checked?;
        self.supported(kind, args.dtype, None, args.tokens)?;
        if count == 0 {
            return self.shared().healthy();
        }
        let norm = self.norm(kind)?;
        let call = self.shared().begin_on(kind, count * args.dtype.size(), stream)?;
        let (dtype, sum) = (limits::element(args.dtype), limits::reduction(ReduceOp::Sum));
        // SAFETY: the operands have been checked and the caller vouches for them; the sums go to `output`, which is
        // `input` only if the caller said so.
        call.nccl(|library, comm| unsafe {
            library.all_reduce(args.input, args.output, count, dtype, sum, comm, stream)
        })?;
        let summed = RmsNormArgs { input: args.output, ..*args };
        // SAFETY: as above; the kernel is ordered behind the reduction by the stream.
        call.fatal(unsafe { local_norm(norm, &summed, quantized, stream) })?;
        call.finish(stream, Algorithm::WithKernel)
    }

    /// # Safety
    /// As `DeviceComm::all_reduce_rmsnorm_two_group`.
    pub(super) unsafe fn fused_norm_two_group(
        &self,
        gather: &dyn DeviceComm,
        args: &TwoGroupNormArgs<'_>,
        quantized: Option<&NormQuantization>,
        stream: StreamHandle,
    ) -> Result<()> {
        let shared = self.shared();
        let (kind, checked) = match quantized {
            Some(quantized) => (
                OpKind::AllReduceRmsNormTwoGroupQuantized,
                check::two_group_norm_quantized(&shared.info, gather.info(), args, quantized),
            ),
            None => {
                (OpKind::AllReduceRmsNormTwoGroup, check::two_group_norm(&shared.info, gather.info(), args))
            }
        };
        let checked = checked.and_then(|own_row| {
            if gather.info().backend != shared.info.backend || gather.info().memory != shared.info.memory {
                return Err(CommError::invalid(
                    "gather",
                    format!(
                        "communicator {:?} is of backend {} on {:?}, but this one of {} on {:?}",
                        gather.info().name,
                        gather.info().backend,
                        gather.info().memory,
                        shared.info.backend,
                        shared.info.memory
                    ),
                ));
            }
            Ok(own_row)
        });
        self.compare(kind, &checked, || {
            let TwoGroupNormArgs { reduce_tokens, hidden, dtype, eps, weight_offset, .. } = args;
            format!(
                "{reduce_tokens:?} x {hidden} {dtype}, eps {eps}, weight offset {weight_offset}{}",
                describe(quantized)
            )
        })?;
        let own_row = checked?;
        let own = args.reduce_tokens[shared.info.rank];
        self.supported(kind, args.dtype, None, own)?;
        let norm = self.norm(kind)?;
        let at = |row: usize| row_address(args.hidden_states, row, args.hidden, args.dtype);
        let rows: usize = args.reduce_tokens.iter().sum();
        let call = shared.begin_on(kind, rows * args.hidden * args.dtype.size(), stream)?;
        // SAFETY: the operands have been checked and the caller vouches for them; this rank's part is received in place.
        unsafe {
            self.enqueue_reduce_scatter_v(
                &call,
                at(args.reduce_first_row),
                at(own_row),
                &|rank| args.reduce_tokens[rank] * args.hidden,
                (args.dtype, ReduceOp::Sum),
                stream,
            )
        }?;
        if own > 0 {
            let rows = RmsNormArgs {
                input: at(own_row),
                residual: args.residual,
                residual_out: args.residual,
                bias: args.bias,
                weight: args.weight,
                output: at(own_row),
                tokens: own,
                hidden: args.hidden,
                dtype: args.dtype,
                eps: args.eps,
                weight_offset: args.weight_offset,
            };
            let part = quantized.map(|quantized| quantized.from_row(own_row, args.hidden));
            // SAFETY: as above; the kernel is ordered behind the reduction by the stream.
            call.fatal(unsafe { local_norm(norm, &rows, part.as_ref(), stream) })?;
        }
        call.finish(stream, Algorithm::WithKernel)?;
        if let Some(quantized) = quantized {
            // SAFETY: as above.
            unsafe { compose::gather_quantized(gather, args, quantized, own_row, stream) }?;
            if !quantized.keep_unquantized {
                return Ok(());
            }
        }
        let counts: Vec<usize> = args.gather_tokens.iter().map(|tokens| tokens * args.hidden).collect();
        // SAFETY: as above; this rank's part is sent in place.
        unsafe { gather.all_gather_v(at(own_row), at(args.gather_first_row), &counts, args.dtype, stream) }
    }
}

/// The norm of rows whose sums are known.
///
/// # Safety
/// As `Kernels::rmsnorm` and `Kernels::rmsnorm_quantized`.
unsafe fn local_norm(
    kernels: &Kernels,
    args: &RmsNormArgs,
    quantized: Option<&NormQuantization>,
    stream: StreamHandle,
) -> Result<()> {
    // SAFETY: as the caller vouches.
    unsafe {
        match quantized {
            Some(quantized) => kernels.rmsnorm_quantized(args, quantized, stream),
            None => kernels.rmsnorm(args, stream),
        }
    }
}

/// What the ranks must agree on about an fp8 result.
fn describe(quantized: Option<&NormQuantization>) -> String {
    quantized.map_or_else(String::new, |quantized| {
        let scale = if quantized.scale.is_per_token() { "token" } else { "tensor" };
        let kept = if quantized.keep_unquantized { " and unquantised" } else { "" };
        format!(", to fp8 with a scale per {scale}{kept}")
    })
}

const fn row_address(base: DeviceAddr, row: usize, hidden: usize, dtype: DType) -> DeviceAddr {
    base.offset((row * hidden * dtype.size()) as u64)
}
