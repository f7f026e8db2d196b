//! The checks of the fused norms with fp8 results.

use std::ops::Range;

use super::{overlap, rmsnorm, span, two_group_norm};
use crate::device_comm::CommInfo;
use crate::dtype::DType;
use crate::error::{CommError, Result};
use crate::fused::{NormQuantScale, NormQuantization, RmsNormArgs, TwoGroupNormArgs};

/// The fp8 result of `rows` rows must not touch `others`, which the operation reads or writes.
fn apart(
    quantized: &NormQuantization,
    (rows, hidden): (usize, usize),
    others: &[Range<u64>],
    written: &[Range<u64>],
) -> Result<()> {
    let too_many = || CommError::invalid("tokens", format!("{rows} rows of {hidden} elements overflow"));
    let count = rows.checked_mul(hidden).ok_or_else(too_many)?;
    let output = span("quantized.output", quantized.output, count, DType::F8E4M3)?;
    let (scale, may_touch) = match quantized.scale {
        NormQuantScale::PerTensor(addr) => (span("quantized.scale", addr, 1, DType::F32)?, written),
        NormQuantScale::PerToken(addr) => (span("quantized.scale", addr, rows, DType::F32)?, others),
    };
    let clash = overlap(&output, &scale)
        || others.iter().any(|other| overlap(&output, other))
        || may_touch.iter().any(|other| overlap(&scale, other));
    if clash {
        return Err(CommError::invalid(
            "quantized",
            "the fp8 result and its scales may overlap no other operand",
        ));
    }
    Ok(())
}

/// Checks a fused norm with an fp8 result. Returns the elements of each matrix.
///
/// # Errors
/// [`CommError::InvalidArgument`].
pub fn rmsnorm_quantized(args: &RmsNormArgs, quantized: &NormQuantization) -> Result<usize> {
    let count = rmsnorm(args)?;
    if count == 0 {
        return Ok(0);
    }
    let RmsNormArgs { hidden, dtype, .. } = *args;
    let mut others = vec![
        span("residual_out", args.residual_out, count, dtype)?,
        span("output", args.output, count, dtype)?,
    ];
    let written = others.clone();
    others.push(span("input", args.input, count, dtype)?);
    others.push(span("residual", args.residual, count, dtype)?);
    for vector in [Some(args.weight), args.bias].into_iter().flatten() {
        others.push(span("weight", vector, hidden, dtype)?);
    }
    apart(quantized, (args.tokens, hidden), &others, &written)?;
    Ok(count)
}

/// Checks a two-group fused norm with an fp8 result. Returns the row of `hidden_states` at which this rank's own rows
/// begin.
///
/// # Errors
/// [`CommError::InvalidArgument`].
pub fn two_group_norm_quantized(
    reduce: &CommInfo,
    gather: &CommInfo,
    args: &TwoGroupNormArgs<'_>,
    quantized: &NormQuantization,
) -> Result<usize> {
    let own_row = two_group_norm(reduce, gather, args)?;
    let TwoGroupNormArgs { hidden, dtype, .. } = *args;
    // These sums and products have been found not to overflow.
    let end = |first: usize, tokens: &[usize]| first + tokens.iter().sum::<usize>();
    let gathered = end(args.gather_first_row, args.gather_tokens);
    let rows = gathered.max(end(args.reduce_first_row, args.reduce_tokens));
    let own = args.reduce_tokens[reduce.rank];
    let written = [
        span("hidden_states", args.hidden_states, rows * hidden, dtype)?,
        span("residual", args.residual, own * hidden, dtype)?,
    ];
    let mut others = written.to_vec();
    for vector in [Some(args.weight), args.bias].into_iter().flatten() {
        others.push(span("weight", vector, hidden, dtype)?);
    }
    apart(quantized, (gathered, hidden), &others, &written)?;
    Ok(own_row)
}
