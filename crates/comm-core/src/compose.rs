//! Operations made of other operations, for backends that have no kernel of their own for them.

use crate::addr::DeviceAddr;
use crate::addr::StreamHandle;
use crate::check;
use crate::device_comm::DeviceComm;
use crate::dtype::ReduceOp;
use crate::error::{CommError, Result};
use crate::fused::{RmsNormArgs, TwoGroupNormArgs};

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
        local_norm(&RmsNormArgs {
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
        })?;
    }
    // SAFETY: as above.
    unsafe { gather.all_gather_v(own, row(args.gather_first_row)?, &gather_counts, dtype, stream) }
}
