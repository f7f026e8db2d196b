//! The checks of the fused norms.

use std::ops::Range;

use super::{overlap, span, total};
use crate::device_comm::CommInfo;
use crate::dtype::DType;
use crate::error::{CommError, Result};
use crate::fused::{RmsNormArgs, TwoGroupNormArgs};

fn norm_type(dtype: DType, hidden: usize, eps: f32) -> Result<()> {
    if !matches!(dtype, DType::F32 | DType::F16 | DType::BF16) {
        return Err(CommError::invalid("dtype", format!("RMSNorm takes f32, f16 and bf16, not {dtype}")));
    }
    if hidden == 0 {
        return Err(CommError::invalid("hidden", "must be at least 1"));
    }
    if !(eps.is_finite() && eps >= 0.0) {
        return Err(CommError::invalid("eps", format!("{eps} is not finite and non-negative")));
    }
    Ok(())
}

fn elements(argument: &'static str, rows: usize, columns: usize) -> Result<usize> {
    rows.checked_mul(columns)
        .ok_or_else(|| CommError::invalid(argument, format!("{rows} rows of {columns} elements overflow")))
}

/// Checks a fused norm. Returns the elements of each matrix.
///
/// # Errors
/// [`CommError::InvalidArgument`].
pub fn rmsnorm(args: &RmsNormArgs) -> Result<usize> {
    let RmsNormArgs { tokens, hidden, dtype, .. } = *args;
    norm_type(dtype, hidden, args.eps)?;
    let count = elements("tokens", tokens, hidden)?;
    if count == 0 {
        return Ok(0);
    }
    let input = span("input", args.input, count, dtype)?;
    let residual = span("residual", args.residual, count, dtype)?;
    let residual_out = span("residual_out", args.residual_out, count, dtype)?;
    let output = span("output", args.output, count, dtype)?;
    let weight = span("weight", args.weight, hidden, dtype)?;
    let bias = args.bias.map(|bias| span("bias", bias, hidden, dtype)).transpose()?;
    let clash =
        |a: &Range<u64>, b: &Range<u64>, may_equal: bool| overlap(a, b) && !(may_equal && a.start == b.start);
    let vectors = [Some(&weight), bias.as_ref()];
    if clash(&residual_out, &residual, true)
        || clash(&output, &input, true)
        || overlap(&residual_out, &input)
        || overlap(&residual_out, &output)
        || overlap(&output, &residual)
        || vectors.into_iter().flatten().any(|v| overlap(v, &output) || overlap(v, &residual_out))
    {
        return Err(CommError::invalid(
            "args",
            "output may share the input's range and residual_out the residual's; no others may overlap",
        ));
    }
    Ok(count)
}

/// Checks a two-group fused norm. Returns the row of `hidden_states` at which this rank's own rows begin.
///
/// # Errors
/// [`CommError::InvalidArgument`].
pub fn two_group_norm(reduce: &CommInfo, gather: &CommInfo, args: &TwoGroupNormArgs<'_>) -> Result<usize> {
    let TwoGroupNormArgs { hidden, dtype, reduce_tokens, gather_tokens, .. } = *args;
    norm_type(dtype, hidden, args.eps)?;
    let reduce_rows = total(reduce, reduce_tokens)?;
    let gather_rows = total(gather, gather_tokens)?;
    let own = reduce_tokens[reduce.rank];
    let after = |first: usize, rows: usize| {
        let too_many = || CommError::invalid("tokens", format!("row {first} and {rows} more overflow"));
        first.checked_add(rows).ok_or_else(too_many)
    };
    let own_row = after(args.reduce_first_row, reduce_tokens[..reduce.rank].iter().sum())?;
    let own_row_gather = after(args.gather_first_row, gather_tokens[..gather.rank].iter().sum())?;
    if own != gather_tokens[gather.rank] || (own > 0 && own_row != own_row_gather) {
        return Err(CommError::invalid(
            "tokens",
            format!(
                "this rank owns {own} rows from row {own_row} of the reduce group, but {} rows from row \
                 {own_row_gather} of the gather group; they must be the same rows",
                gather_tokens[gather.rank]
            ),
        ));
    }
    let rows = after(args.reduce_first_row, reduce_rows)?.max(after(args.gather_first_row, gather_rows)?);
    let states = span("hidden_states", args.hidden_states, elements("tokens", rows, hidden)?, dtype)?;
    let residual = span("residual", args.residual, elements("tokens", own, hidden)?, dtype)?;
    let weight = span("weight", args.weight, hidden, dtype)?;
    let bias = args.bias.map(|bias| span("bias", bias, hidden, dtype)).transpose()?;
    let read_only = [Some(&weight), bias.as_ref()];
    if overlap(&states, &residual)
        || read_only.into_iter().flatten().any(|v| overlap(v, &states) || overlap(v, &residual))
    {
        return Err(CommError::invalid("args", "no two operands of a two-group norm may overlap"));
    }
    Ok(own_row)
}
