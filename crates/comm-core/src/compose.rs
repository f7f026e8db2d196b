//! Operations made of other operations, for backends that have no kernel of their own for them.

use crate::addr::DeviceAddr;
use crate::addr::StreamHandle;
use crate::check;
use crate::device_comm::DeviceComm;
use crate::dtype::{DType, ReduceOp};
use crate::error::{CommError, Result};
use crate::fused::{NormQuantScale, NormQuantization, RmsNormArgs, TwoGroupNormArgs};

/// The two-group fused norm as a reduce-scatter V in `reduce`, `local_norm` on the rows that this rank then owns, and an
/// all-gather V in `gather`, all in place in `hidden_states`.
///
/// `local_norm` normalises `input` into `output` (the same rows) and updates the residual in place; it does not
/// communicate, and is called only on ranks that own rows.
///
/// # Errors
/// [`CommError::InvalidArgument`], and what the two operations and `local_norm` return.
///
/// # Safety
/// As for [`DeviceComm::all_reduce_rmsnorm_two_group`], with `local_norm` ordered on `stream`.
pub unsafe fn two_group_norm(
    reduce: &dyn DeviceComm,
    gather: &dyn DeviceComm,
    args: &TwoGroupNormArgs<'_>,
    stream: StreamHandle,
    mut local_norm: impl FnMut(&RmsNormArgs) -> Result<()>,
) -> Result<()> {
    let own_row = check::two_group_norm(reduce.info(), gather.info(), args)?;
    // SAFETY: as the caller vouches.
    unsafe { two_group(reduce, gather, args, None, own_row, stream, |rows, _| local_norm(rows)) }
}

/// The same with an fp8 result: what is gathered is that, its scales, and the unquantised result where it is kept.
///
/// # Errors
/// As [`two_group_norm`].
///
/// # Safety
/// As for [`DeviceComm::all_reduce_rmsnorm_two_group_quantized`], with `local_norm` ordered on `stream`.
pub unsafe fn two_group_norm_quantized(
    reduce: &dyn DeviceComm,
    gather: &dyn DeviceComm,
    args: &TwoGroupNormArgs<'_>,
    quantized: &NormQuantization,
    stream: StreamHandle,
    mut local_norm: impl FnMut(&RmsNormArgs, &NormQuantization) -> Result<()>,
) -> Result<()> {
    let own_row = check::two_group_norm_quantized(reduce.info(), gather.info(), args, quantized)?;
    let local = |rows: &RmsNormArgs, quantized: Option<NormQuantization>| match quantized {
        Some(quantized) => local_norm(rows, &quantized),
        None => Ok(()),
    };
    // SAFETY: as the caller vouches.
    unsafe { two_group(reduce, gather, args, Some(quantized), own_row, stream, local) }
}

/// Gathers the fp8 result of a two-group norm and its scales, in place; this rank's rows begin at `own_row`.
///
/// # Errors
/// [`CommError::InvalidArgument`], and what the operation returns.
///
/// # Safety
/// As for [`DeviceComm::all_reduce_rmsnorm_two_group_quantized`].
pub unsafe fn gather_quantized(
    gather: &dyn DeviceComm,
    args: &TwoGroupNormArgs<'_>,
    quantized: &NormQuantization,
    own_row: usize,
    stream: StreamHandle,
) -> Result<()> {
    let (own, first) =
        (quantized.from_row(own_row, args.hidden), quantized.from_row(args.gather_first_row, args.hidden));
    let counts: Vec<usize> = args.gather_tokens.iter().map(|tokens| tokens * args.hidden).collect();
    // SAFETY: the caller vouches for all rows of the gather group; this rank's part is where in-place operation wants it.
    unsafe {
        gather.all_gather_v(own.output, first.output, &counts, DType::F8E4M3, stream)?;
        if let (NormQuantScale::PerToken(own), NormQuantScale::PerToken(first)) = (own.scale, first.scale) {
            gather.all_gather_v(own, first, args.gather_tokens, DType::F32, stream)?;
        }
    }
    Ok(())
}

/// # Safety
/// As for the two forms above, with checked arguments.
unsafe fn two_group(
    reduce: &dyn DeviceComm,
    gather: &dyn DeviceComm,
    args: &TwoGroupNormArgs<'_>,
    quantized: Option<&NormQuantization>,
    own_row: usize,
    stream: StreamHandle,
    mut local_norm: impl FnMut(&RmsNormArgs, Option<NormQuantization>) -> Result<()>,
) -> Result<()> {
    let TwoGroupNormArgs { hidden, dtype, .. } = *args;
    let row = |row: usize| -> Result<DeviceAddr> {
        let elements = row.checked_mul(hidden).ok_or_else(|| CommError::invalid("hidden", "too large"))?;
        Ok(args.hidden_states.offset(check::bytes(elements, dtype)? as u64))
    };
    let counts = |tokens: &[usize]| -> Result<Vec<usize>> {
        let count = |&rows: &usize| rows.checked_mul(hidden);
        tokens
            .iter()
            .map(count)
            .collect::<Option<_>>()
            .ok_or_else(|| CommError::invalid("tokens", "too many"))
    };
    let own_tokens = args.reduce_tokens[reduce.rank()];
    let own = row(own_row)?;
    let reduce_counts = counts(args.reduce_tokens)?;
    let gather_counts = counts(args.gather_tokens)?;
    // SAFETY: the caller vouches for all rows of both groups; the part at `own` is where in-place operation wants it.
    unsafe {
        let first = row(args.reduce_first_row)?;
        reduce.reduce_scatter_v(first, own, &reduce_counts, dtype, ReduceOp::Sum, stream)?;
    }
    if own_tokens > 0 {
        let rows = RmsNormArgs {
            input: own,
            residual: args.residual,
            residual_out: args.residual,
            bias: args.bias,
            weight: args.weight,
            output: own,
            tokens: own_tokens,
            hidden,
            dtype,
            eps: args.eps,
            weight_offset: args.weight_offset,
        };
        local_norm(&rows, quantized.map(|quantized| quantized.from_row(own_row, hidden)))?;
    }
    // SAFETY: as above.
    unsafe {
        if let Some(quantized) = quantized {
            gather_quantized(gather, args, quantized, own_row, stream)?;
            if !quantized.keep_unquantized {
                return Ok(());
            }
        }
        gather.all_gather_v(own, row(args.gather_first_row)?, &gather_counts, dtype, stream)
    }
}
