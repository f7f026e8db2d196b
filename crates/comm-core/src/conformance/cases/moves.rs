//! All-gather and its V form, broadcast and all-to-all: arbitrary bit patterns, bit by bit.

use super::super::case::{Case, Form};
use super::super::data::{self, Fill};
use super::super::reference::Equality;
use super::super::runner::Runner;
use super::{all_at_one, counts, offsets};
use crate::dtype::DType;
use crate::error::Result;
use crate::op::{OpKind, OpQuery};

pub(super) fn run(runner: &mut Runner<'_>) {
    for kind in [OpKind::AllGather, OpKind::AllGatherV, OpKind::Broadcast, OpKind::AllToAll] {
        for dtype in DType::ALL {
            runner.case(kind, &format!("{kind}/{dtype}"), |case| every_count(case, kind, dtype));
        }
        let (dtype, count) = (DType::BF16, if runner.config.quick { 65_537 } else { 1_048_579 });
        runner.case(kind, &format!("{kind}/{dtype}/large"), |case| {
            let part = if kind == OpKind::Broadcast { count } else { count / case.world };
            step(case, kind, dtype, part, 5)
        });
    }
}

fn every_count(case: &mut Case<'_, '_>, kind: OpKind, dtype: DType) -> Result<()> {
    let mut ran = 0;
    for (turn, &count) in counts(case.config.quick).iter().enumerate() {
        let before = case.calls;
        step(case, kind, dtype, count, turn + dtype.size())?;
        ran += case.calls - before;
    }
    if ran > 0 {
        case.skipped = None;
    }
    Ok(())
}

fn step(case: &mut Case<'_, '_>, kind: OpKind, dtype: DType, count: usize, turn: usize) -> Result<()> {
    if count * dtype.size() * case.world > case.config.max_bytes {
        case.skipped.get_or_insert("larger than max_bytes".into());
        return Ok(());
    }
    if !case.supported(&OpQuery::new(kind, dtype, count)) {
        return Ok(());
    }
    let (send_offset, recv_offset) = offsets(turn, dtype);
    let apart = Form::Apart { send_offset, recv_offset };
    match kind {
        OpKind::Broadcast => {
            for root in 0..case.world {
                broadcast(case, dtype, count, root, apart)?;
                broadcast(case, dtype, count, root, Form::SendInRecv(0))?;
            }
            Ok(())
        }
        OpKind::AllToAll => all_to_all(case, dtype, count, apart),
        _ => {
            let all = vec![count; case.world];
            gather(case, kind, dtype, &all, None)?;
            gather(case, kind, dtype, &all, Some(apart))?;
            if kind == OpKind::AllGatherV {
                let shared = case.next_seed() as usize;
                for zeros in 0..2 {
                    let uneven: Vec<usize> = (0..case.world)
                        .map(|rank| {
                            if (rank + zeros) % 3 == 2 {
                                0
                            } else {
                                (count * (rank + 1) + shared % 7) % (count + 1)
                            }
                        })
                        .collect();
                    gather(case, kind, dtype, &uneven, Some(apart).filter(|_| zeros == 0))?;
                    let one = all_at_one(case.world, count, turn + zeros);
                    gather(case, kind, dtype, &one, Some(apart).filter(|_| zeros == 1))?;
                }
            }
            Ok(())
        }
    }
}

/// `form` is `None` for in place.
fn gather(
    case: &mut Case<'_, '_>,
    kind: OpKind,
    dtype: DType,
    counts: &[usize],
    form: Option<Form>,
) -> Result<()> {
    let (seed, size, world) = (case.next_seed(), dtype.size(), case.world);
    let first: usize = counts[..case.rank].iter().sum();
    let own = counts[case.rank];
    let form = form.unwrap_or(Form::SendInRecv(first * size));
    case.at = format!("{kind} of {counts:?} {dtype}, {form:?}");
    let input = data::filled(Fill::Bits, dtype, world, seed, case.rank, 0..own);
    let expected: Vec<u8> = (0..world)
        .flat_map(|rank| data::filled(Fill::Bits, dtype, world, seed, rank, 0..counts[rank]))
        .collect();
    let (comm, stream) = (case.comm, case.stream());
    let got = case.exchange(&input, expected.len(), form, |send, recv| {
        if kind == OpKind::AllGatherV {
            // SAFETY: `send` holds this rank's count, `recv` all counts, in live memory that only this call uses.
            unsafe { comm.all_gather_v(send, recv, counts, dtype, stream) }
        } else {
            // SAFETY: as above, with equal counts.
            unsafe { comm.all_gather(send, recv, own, dtype, stream) }
        }
    })?;
    case.expect(dtype, &expected, &got, Equality::Bits);
    Ok(())
}

fn broadcast(case: &mut Case<'_, '_>, dtype: DType, count: usize, root: usize, form: Form) -> Result<()> {
    let (seed, is_root) = (case.next_seed(), case.rank == root);
    case.at = format!("broadcast of {count} {dtype} from root {root}, {form:?}");
    let expected = data::filled(Fill::Bits, dtype, case.world, seed, root, 0..count);
    let (comm, stream) = (case.comm, case.stream());
    // Other ranks than the root have nothing to send: null, or whatever lies in the place of the result.
    let input: &[u8] = if is_root { &expected } else { &[] };
    let got = case.exchange(input, expected.len(), form, |send, recv| {
        // SAFETY: `recv` holds `count` elements, and `send` too on the root, in live memory that only this call uses.
        unsafe { comm.broadcast(send, recv, count, dtype, root, stream) }
    })?;
    case.expect(dtype, &expected, &got, Equality::Bits);
    Ok(())
}

fn all_to_all(case: &mut Case<'_, '_>, dtype: DType, count: usize, form: Form) -> Result<()> {
    let (seed, world, own) = (case.next_seed(), case.world, case.rank);
    case.at = format!("all_to_all of {count} {dtype}, {form:?}");
    let input = data::filled(Fill::Bits, dtype, world, seed, own, 0..count * world);
    let expected: Vec<u8> = (0..world)
        .flat_map(|rank| data::filled(Fill::Bits, dtype, world, seed, rank, own * count..(own + 1) * count))
        .collect();
    let (comm, stream) = (case.comm, case.stream());
    let got = case.exchange(&input, expected.len(), form, |send, recv| {
        // SAFETY: both operands hold `world * count` elements in live memory that only this call uses.
        unsafe { comm.all_to_all(send, recv, count, dtype, stream) }
    })?;
    case.expect(dtype, &expected, &got, Equality::Bits);
    Ok(())
}

/// One checked all-gather, for cases about something else.
pub(super) fn simple(case: &mut Case<'_, '_>, dtype: DType, count: usize) -> Result<()> {
    if !case.comm.supports(&OpQuery::new(OpKind::AllGather, dtype, count)).is_supported() {
        return Ok(());
    }
    let counts = vec![count; case.world];
    let form = Form::Apart { send_offset: dtype.size(), recv_offset: 0 };
    gather(case, OpKind::AllGather, dtype, &counts, Some(form))
}
