//! Checked mode: ranks that call different things are told so, all of them, and can go on.

use super::super::case::Case;
use super::super::runner::Runner;
use super::issue::{Operands, issue, query};
use super::{moves, reductions};
use crate::dtype::{DType, ReduceOp};
use crate::error::{CommError, Result};
use crate::op::OpKind;

pub(super) fn run(runner: &mut Runner<'_>) {
    if runner.config.checked {
        runner.case(OpKind::AllReduce, "all_reduce/mismatch", mismatches);
    }
}

const fn is_mismatch(error: &CommError) -> bool {
    matches!(error, CommError::Mismatch { .. })
}

fn mismatches(case: &mut Case<'_, '_>) -> Result<()> {
    let kinds = [OpKind::AllReduce, OpKind::AllGather];
    if !kinds.iter().all(|&kind| case.supported(&query(kind, DType::F32))) {
        return Ok(());
    }
    if case.world == 1 {
        case.skipped = Some("one rank has nobody to differ from".into());
        return Ok(());
    }
    let operands = Operands::new(case)?;
    let (comm, stream, last) = (case.comm, case.stream(), case.rank + 1 == case.world);
    let reduce = |count, dtype, op| {
        // SAFETY: the operands hold more elements than any of the counts below.
        unsafe { comm.all_reduce(operands.a, operands.b, count, dtype, op, stream) }
    };
    let (f32, sum) = (DType::F32, ReduceOp::Sum);
    let calls: [(&str, &dyn Fn() -> Result<()>); 4] = [
        ("the last rank passes another count", &|| reduce(if last { 5 } else { 4 }, f32, sum)),
        ("the last rank passes another type", &|| reduce(4, if last { DType::I32 } else { f32 }, sum)),
        ("the last rank passes another reduction", &|| {
            reduce(4, f32, if last { ReduceOp::Max } else { sum })
        }),
        ("the last rank calls another operation", &|| {
            issue(comm, kinds[usize::from(last)], f32, operands, stream)
        }),
    ];
    for (what, call) in calls {
        case.at = format!("all_reduce in checked mode: {what}");
        case.calls += 1;
        let result = call();
        case.expect_error("the call", "Mismatch", result, is_mismatch)?;
        reductions::simple(case, f32, sum, 33)?;
        moves::simple(case, f32, 33)?;
    }
    Ok(())
}
