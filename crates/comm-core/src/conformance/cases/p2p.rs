//! Sends, receives and groups of them.

use super::super::case::Case;
use super::super::data::{self, Fill};
use super::super::reference::Equality;
use super::super::runner::Runner;
use crate::device_comm::P2pOp;
use crate::dtype::DType;
use crate::error::Result;
use crate::op::{OpKind, OpQuery};

const TYPES: [DType; 4] = [DType::F32, DType::BF16, DType::U8, DType::I64];

pub(super) fn run(runner: &mut Runner<'_>) {
    for dtype in TYPES {
        runner.case(OpKind::Send, &format!("send/{dtype}/ring"), |case| {
            [0, 1, 7, 257, 4099].into_iter().try_for_each(|count| ring(case, dtype, count))
        });
        runner.case(OpKind::Group, &format!("group/{dtype}/ring"), |case| {
            [0, 1, 7, 257, 65_537].into_iter().try_for_each(|count| group_ring(case, dtype, count))
        });
        runner.case(OpKind::Group, &format!("group/{dtype}/all_pairs"), |case| {
            [1, 31, 1000].into_iter().try_for_each(|count| all_pairs(case, dtype, count))
        });
    }
}

/// Every rank sends to the next. Even ranks send first, so that blocking transfers cannot deadlock.
fn ring(case: &mut Case<'_, '_>, dtype: DType, count: usize) -> Result<()> {
    let queries = [OpKind::Send, OpKind::Recv].map(|kind| OpQuery::new(kind, dtype, count));
    if !queries.iter().all(|query| case.supported(query)) {
        return Ok(());
    }
    if case.world == 1 {
        case.skipped = Some("a ring needs two ranks".into());
        return Ok(());
    }
    let (seed, own, world) = (case.next_seed(), case.rank, case.world);
    let (next, previous) = ((own + 1) % world, (own + world - 1) % world);
    case.at = format!("send of {count} {dtype} to {next}, recv from {previous}");
    let input = data::filled(Fill::Bits, dtype, world, seed, own, 0..count);
    let (comm, stream) = (case.comm, case.stream());
    let form = super::super::case::Form::Apart { send_offset: dtype.size(), recv_offset: 3 * dtype.size() };
    let got = case.exchange(&input, input.len(), form, |from, to| {
        // SAFETY: both operands hold `count` elements in live memory that only these calls use.
        let send = || unsafe { comm.send(from, count, dtype, next, stream) };
        // SAFETY: as above.
        let recv = || unsafe { comm.recv(to, count, dtype, previous, stream) };
        if own % 2 == 0 { send().and_then(|()| recv()) } else { recv().and_then(|()| send()) }
    })?;
    let expected = data::filled(Fill::Bits, dtype, world, seed, previous, 0..count);
    case.expect(dtype, &expected, &got, Equality::Bits);
    Ok(())
}

/// The same as one group; in a world of one a transfer to itself.
fn group_ring(case: &mut Case<'_, '_>, dtype: DType, count: usize) -> Result<()> {
    if !case.supported(&OpQuery::new(OpKind::Group, dtype, count)) {
        return Ok(());
    }
    let (seed, own, world) = (case.next_seed(), case.rank, case.world);
    let (next, previous) = ((own + 1) % world, (own + world - 1) % world);
    case.at = format!("group: send {count} {dtype} to {next}, recv from {previous}");
    let input = data::filled(Fill::Bits, dtype, world, seed, own, 0..count);
    let (comm, stream) = (case.comm, case.stream());
    let form = super::super::case::Form::Apart { send_offset: dtype.size(), recv_offset: 0 };
    let got = case.exchange(&input, input.len(), form, |from, to| {
        let ops = [
            P2pOp::Recv { addr: to, count, dtype, peer: previous },
            P2pOp::Send { addr: from, count, dtype, peer: next },
        ];
        // SAFETY: both operands hold `count` elements in live memory that only this call uses.
        unsafe { comm.group(&ops, stream) }
    })?;
    let expected = data::filled(Fill::Bits, dtype, world, seed, previous, 0..count);
    case.expect(dtype, &expected, &got, Equality::Bits);
    Ok(())
}

/// Two messages between every pair of ranks, themselves included, the second one element longer: the order between a
/// pair must hold.
fn all_pairs(case: &mut Case<'_, '_>, dtype: DType, count: usize) -> Result<()> {
    if !case.supported(&OpQuery::new(OpKind::Group, dtype, count + 1)) {
        return Ok(());
    }
    let (seed, own, world) = (case.next_seed(), case.rank, case.world);
    case.at = format!("group: two messages of {count} and {} {dtype} between all pairs", count + 1);
    let pair = 2 * count + 1;
    let message = |from: usize, to: usize| {
        data::filled(Fill::Bits, dtype, world, seed, from, to * pair..(to + 1) * pair)
    };
    let input: Vec<u8> = (0..world).flat_map(|to| message(own, to)).collect();
    let expected: Vec<u8> = (0..world).flat_map(|from| message(from, own)).collect();
    let (comm, stream) = (case.comm, case.stream());
    let form = super::super::case::Form::Apart { send_offset: 0, recv_offset: dtype.size() };
    let got = case.exchange(&input, expected.len(), form, |from, to| {
        let mut ops = Vec::with_capacity(4 * world);
        for peer in 0..world {
            let at = |base: crate::DeviceAddr, part: usize| {
                base.offset(((peer * pair + part * count) * dtype.size()) as u64)
            };
            for part in 0..2 {
                let count = count + part;
                ops.push(P2pOp::Send { addr: at(from, part), count, dtype, peer });
                ops.push(P2pOp::Recv { addr: at(to, part), count, dtype, peer });
            }
        }
        // SAFETY: both operands hold a pair of messages for every rank; the receives are disjoint.
        unsafe { comm.group(&ops, stream) }
    })?;
    case.expect(dtype, &expected, &got, Equality::Bits);
    Ok(())
}
