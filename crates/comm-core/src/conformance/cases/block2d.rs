//! The two-dimensional all-gather.

use super::super::case::{Case, Form};
use super::super::data::{self, Fill};
use super::super::reference::Equality;
use super::super::runner::Runner;
use crate::dtype::DType;
use crate::error::Result;
use crate::fused::Block2d;
use crate::op::{OpKind, OpQuery};

pub(super) fn run(runner: &mut Runner<'_>) {
    for dtype in [DType::F32, DType::BF16, DType::U8, DType::F64] {
        runner.case(OpKind::AllGather2d, &format!("all_gather_2d/{dtype}"), |case| {
            for (height, width) in [(1, 1), (3, 7), (16, 64), (5, 129), (0, 8), (33, 1)] {
                let world = case.world;
                // Side by side, dense and with gaps between the columns and the rows of the input.
                shape(case, dtype, height, width, width * world, width, width, 1)?;
                shape(case, dtype, height, width, (width + 2) * world + 1, width + 2, width + 3, 1)?;
                // One after another, dense and with gaps.
                shape(case, dtype, height, width, width, height * width, width, 1)?;
                shape(case, dtype, height, width, width + 1, height * (width + 1) + 2, width, 1)?;
                // A run of three calls with only the first and the last marked as such.
                shape(case, dtype, height, width, width * world, width, width, 3)?;
            }
            Ok(())
        });
    }
}

fn shape(
    case: &mut Case<'_, '_>,
    dtype: DType,
    height: usize,
    width: usize,
    row_pitch: usize,
    rank_stride: usize,
    send_pitch: usize,
    runs: usize,
) -> Result<()> {
    if !case.supported(&OpQuery::new(OpKind::AllGather2d, dtype, height * width)) {
        return Ok(());
    }
    let (seed, world, size) = (case.next_seed(), case.world, dtype.size());
    let block = Block2d { height, width, row_pitch, rank_stride, send_pitch, dtype, first: true, last: true };
    case.at = format!("all_gather_2d of {block:?}, {runs} call(s) in a run");
    let extent = |pitch: usize| height.saturating_sub(1) * pitch + if height == 0 { 0 } else { width };
    // Every call of a run has rows of its own, one under another.
    let one_send = extent(send_pitch);
    let one_recv = if height == 0 { 0 } else { (world - 1) * rank_stride + extent(row_pitch) };
    let input = data::filled(Fill::Bits, dtype, world, seed, case.rank, 0..one_send * runs);
    let (comm, stream) = (case.comm, case.stream());
    let form = Form::Apart { send_offset: size, recv_offset: 3 * size };
    let got = case.exchange(&input, one_recv * runs * size, form, |send, recv| {
        (0..runs).try_for_each(|run| {
            let block = Block2d { first: run == 0, last: run + 1 == runs, ..block };
            let (from, to) =
                (send.offset((run * one_send * size) as u64), recv.offset((run * one_recv * size) as u64));
            // SAFETY: the operands hold `runs` times the block's extents.
            unsafe { comm.all_gather_2d(from, to, &block, stream) }
        })
    })?;
    // What belongs to no block must be as it was.
    let mut expected = std::mem::take(&mut case.before);
    for run in 0..runs {
        for rank in 0..world {
            for row in 0..height {
                let from = run * one_send + row * send_pitch;
                let to = (run * one_recv + rank * rank_stride + row * row_pitch) * size;
                let part = data::filled(Fill::Bits, dtype, world, seed, rank, from..from + width);
                expected[to..to + part.len()].copy_from_slice(&part);
            }
        }
    }
    case.expect(dtype, &expected, &got, Equality::Bits);
    Ok(())
}
