//! The quantised all-reduce: operands through the staging windows as they are, the arithmetic of the definition after.

use super::call::Call;
use super::core::Op;
use super::layout::{Layout, copy};
use super::usage::Algorithm;
use crate::addr::DeviceAddr;
use crate::dtype::DType;
use crate::error::Result;
use crate::op::OpKind;
use crate::quantize::{GROUP, sum_host};

/// The quantised sum of checked operands.
///
/// # Safety
/// The operands are valid as the operation's contract says.
pub(super) unsafe fn sum(
    op: &mut Op<'_>,
    (send, recv): (DeviceAddr, DeviceAddr),
    count: usize,
    dtype: DType,
) -> Result<()> {
    let call = Call::of(OpKind::AllReduceQuantized, count, dtype);
    let (bytes, group) = (count * dtype.size(), GROUP * dtype.size());
    // Whole groups, so that a group is never cut.
    let window = op.core.control().window() / group * group;
    let windows = bytes.div_ceil(window).max(1);
    op.count(if windows == 1 { Algorithm::OneShot } else { Algorithm::ShmPipeline });
    let (send, to) = (Layout::dense(send.0 as usize), recv.0 as usize);
    for index in 0..windows {
        let (a, b) = (index * window, ((index + 1) * window).min(bytes));
        let mine = Layout::window(op.stage(), a);
        // SAFETY: the own operand is valid, and nobody reads this window of the step to come yet.
        unsafe { copy(mine, send, a, b) };
        if index == 0 {
            op.enter(&call)?;
        } else {
            op.barrier()?;
        }
        if op.size() == 1 {
            // SAFETY: `recv` is valid, and the window was written above.
            unsafe { copy(Layout::dense(to), mine, a, b) };
            continue;
        }
        let staged: Vec<usize> = (0..op.size()).map(|rank| op.staged(rank)).collect();
        op.pieces(b - a, |from, end| {
            let sources: Vec<*const u8> = staged.iter().map(|base| (base + from) as *const u8).collect();
            let target = (to + a + from) as *mut u8;
            // SAFETY: peers wrote their windows before they arrived and will not reuse them before this rank arrives at
            // the step after; `recv` is valid, and pieces are whole groups.
            let _ = unsafe { sum_host(target, &sources, (end - from) / dtype.size(), dtype) };
        })?;
    }
    Ok(())
}
