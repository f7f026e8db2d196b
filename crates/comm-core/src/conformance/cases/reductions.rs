//! All-reduce, reduce, reduce-scatter and its V form: every type and reduction, exact.

use super::super::buffers::Region;
use super::super::case::{Case, Form};
use super::super::data::{self, Fill};
use super::super::reference::{self, Equality, fill_for};
use super::super::runner::Runner;
use super::{all_at_one, counts, offsets};
use crate::dtype::{DType, ReduceOp};
use crate::error::Result;
use crate::op::{OpKind, OpQuery};

/// The reducing call under test.
#[derive(Clone, Copy)]
struct Call {
    kind: OpKind,
    dtype: DType,
    op: ReduceOp,
    fill: Fill,
}

pub(super) fn run(runner: &mut Runner<'_>) {
    let quick = runner.config.quick;
    for kind in [OpKind::AllReduce, OpKind::ReduceScatter, OpKind::ReduceScatterV, OpKind::Reduce] {
        for (index, dtype) in DType::ALL.into_iter().enumerate() {
            for (turn, op) in ReduceOp::ALL.into_iter().enumerate() {
                let thorough =
                    kind == OpKind::AllReduce || matches!(dtype, DType::F32 | DType::BF16 | DType::I32);
                if quick && !thorough && (index + turn) % ReduceOp::ALL.len() != 0 {
                    continue;
                }
                let fill = fill_for(op, runner.config.nan_propagates);
                let call = Call { kind, dtype, op, fill };
                runner.case(kind, &format!("{kind}/{dtype}/{op}"), |case| every_count(case, call));
                // One large count for each type, and the largest for the types that models use most.
                let large = (index + turn).is_multiple_of(ReduceOp::ALL.len()) && !quick;
                let huge = matches!(dtype, DType::F32 | DType::BF16)
                    && op == ReduceOp::Sum
                    && kind == OpKind::AllReduce;
                if large {
                    runner
                        .case(kind, &format!("{kind}/{dtype}/{op}/large"), |case| sized(case, call, 65_537));
                }
                if huge {
                    let count = if quick { 262_147 } else { 1_048_579 };
                    runner.case(kind, &format!("{kind}/{dtype}/{op}/huge"), |case| sized(case, call, count));
                }
            }
            if dtype.is_float() && matches!(kind, OpKind::AllReduce | OpKind::ReduceScatter) {
                for op in [ReduceOp::Sum, ReduceOp::Avg] {
                    let call = Call { kind, dtype, op, fill: Fill::Real };
                    runner.case(kind, &format!("{kind}/{dtype}/{op}/real"), |case| every_count(case, call));
                }
            }
        }
    }
}

fn sized(case: &mut Case<'_, '_>, call: Call, count: usize) -> Result<()> {
    let whole = matches!(call.kind, OpKind::ReduceScatter | OpKind::ReduceScatterV);
    let count = if whole { count.div_ceil(case.world) } else { count };
    step(case, call, count, 3)
}

fn every_count(case: &mut Case<'_, '_>, call: Call) -> Result<()> {
    let shorter = call.kind != OpKind::AllReduce || call.fill == Fill::Real;
    let mut ran = 0;
    for (index, &count) in counts(case.config.quick).iter().enumerate() {
        if shorter && (index % 2 == 1 && count != 1) {
            continue;
        }
        let before = case.calls;
        step(case, call, count, index + call.dtype.size())?;
        ran += case.calls - before;
    }
    if ran > 0 {
        case.skipped = None;
    }
    Ok(())
}

/// One count: out of place at changing offsets, and in place.
fn step(case: &mut Case<'_, '_>, call: Call, count: usize, turn: usize) -> Result<()> {
    if count * call.dtype.size() * case.world > case.config.max_bytes {
        case.skipped.get_or_insert("larger than max_bytes".into());
        return Ok(());
    }
    let query = OpQuery::new(call.kind, call.dtype, count).with_reduce(call.op);
    if !case.supported(&query) {
        return Ok(());
    }
    let (send_offset, recv_offset) = offsets(turn, call.dtype);
    let apart = Form::Apart { send_offset, recv_offset };
    match call.kind {
        OpKind::AllReduce => {
            all_reduce(case, call, count, apart)?;
            all_reduce(case, call, count, Form::SendInRecv(0))
        }
        OpKind::Reduce => {
            for root in 0..case.world {
                reduce(case, call, count, root, apart)?;
                if root == turn % case.world {
                    reduce(case, call, count, root, Form::SendInRecv(0))?;
                }
            }
            Ok(())
        }
        _ => {
            let all = vec![count; case.world];
            scatter(case, call, &all, false, apart)?;
            scatter(case, call, &all, true, apart)?;
            if call.kind == OpKind::ReduceScatterV {
                let shared = case.next_seed() as usize;
                for zeros in 0..2 {
                    // Uneven counts, among them none, of which all ranks think alike.
                    let uneven: Vec<usize> = (0..case.world)
                        .map(|rank| {
                            if (rank + zeros) % 3 == 2 {
                                0
                            } else {
                                (count * (rank + 1) + shared % 5) % (count + 1)
                            }
                        })
                        .collect();
                    scatter(case, call, &uneven, zeros == 1, apart)?;
                    let one = all_at_one(case.world, count, turn + zeros);
                    scatter(case, call, &one, zeros == 0, apart)?;
                }
            }
            Ok(())
        }
    }
}

impl Call {
    /// Bit by bit, except where zeros have a sign of their own or the backend does not promise more.
    fn equality(self, case: &Case<'_, '_>) -> Equality {
        let inexact = self.op == ReduceOp::Avg && !case.world.is_power_of_two() && !case.config.ordered_sums;
        if inexact && self.dtype.is_float() { Equality::Ulps(case.world as u64) } else { Equality::Value }
    }

    fn input(self, case: &Case<'_, '_>, seed: u64, count: usize) -> Vec<u8> {
        data::filled(self.fill, self.dtype, case.world, seed, case.rank, 0..count)
    }

    fn check(self, case: &mut Case<'_, '_>, seed: u64, range: std::ops::Range<usize>, got: &[u8]) {
        let (dtype, world) = (self.dtype, case.world);
        if self.fill != Fill::Real || case.config.ordered_sums {
            let expected = reference::reduced(self.fill, dtype, self.op, world, seed, range);
            return case.expect(dtype, &expected, got, self.equality(case));
        }
        for (index, at) in range.enumerate() {
            let values: Vec<u64> =
                (0..world).map(|rank| data::element(self.fill, dtype, world, seed, rank, at)).collect();
            let bits = data::at(got, dtype, index);
            if let Err(expected) = reference::is_close(dtype, self.op, &values, bits) {
                let got = reference::show(dtype, bits);
                return case.fail(format!("element {at}: expected about {expected}, got {got}"));
            }
        }
    }
}

fn all_reduce(case: &mut Case<'_, '_>, call: Call, count: usize, form: Form) -> Result<()> {
    let seed = case.next_seed();
    case.at = format!("all_reduce of {count} {} {}, {form:?}", call.dtype, call.op);
    let (comm, stream) = (case.comm, case.stream());
    let input = call.input(case, seed, count);
    let got = case.exchange(&input, input.len(), form, |send, recv| {
        // SAFETY: the operands hold `count` elements in live memory that only this call uses.
        unsafe { comm.all_reduce(send, recv, count, call.dtype, call.op, stream) }
    })?;
    call.check(case, seed, 0..count, &got);
    case.note_equal(&got);
    Ok(())
}

fn reduce(case: &mut Case<'_, '_>, call: Call, count: usize, root: usize, form: Form) -> Result<()> {
    let seed = case.next_seed();
    case.at = format!("reduce of {count} {} {} to root {root}, {form:?}", call.dtype, call.op);
    let (comm, stream, is_root) = (case.comm, case.stream(), case.rank == root);
    let input = call.input(case, seed, count);
    // Other ranks than the root have no result, and their `recv` may be null.
    let (len, form) = match form {
        Form::Apart { .. } if !is_root => (0, form),
        Form::SendInRecv(_) if !is_root => (0, Form::Apart { send_offset: 0, recv_offset: 0 }),
        _ => (input.len(), form),
    };
    let got = case.exchange(&input, len, form, |send, recv| {
        // SAFETY: the operands hold `count` elements (none where `recv` is ignored) that only this call uses.
        unsafe { comm.reduce(send, recv, count, call.dtype, call.op, root, stream) }
    })?;
    if is_root {
        call.check(case, seed, 0..count, &got);
    }
    Ok(())
}

fn scatter(case: &mut Case<'_, '_>, call: Call, counts: &[usize], in_place: bool, form: Form) -> Result<()> {
    let seed = case.next_seed();
    let total: usize = counts.iter().sum();
    let first: usize = counts[..case.rank].iter().sum();
    let own = counts[case.rank];
    let size = call.dtype.size();
    let form = if in_place { Form::RecvInSend(first * size) } else { form };
    case.at = format!("{} of {counts:?} {} {}, {form:?}", call.kind, call.dtype, call.op);
    let (comm, stream) = (case.comm, case.stream());
    let input = call.input(case, seed, total);
    let got = case.exchange(&input, own * size, form, |send, recv| {
        if call.kind == OpKind::ReduceScatterV {
            // SAFETY: `send` holds all counts, `recv` this rank's, in live memory that only this call uses.
            unsafe { comm.reduce_scatter_v(send, recv, counts, call.dtype, call.op, stream) }
        } else {
            // SAFETY: as above, with equal counts.
            unsafe { comm.reduce_scatter(send, recv, own, call.dtype, call.op, stream) }
        }
    })?;
    call.check(case, seed, first..first + own, &got);
    Ok(())
}

/// One checked all-reduce, for cases about something else.
pub(super) fn simple(case: &mut Case<'_, '_>, dtype: DType, op: ReduceOp, count: usize) -> Result<()> {
    let query = OpQuery::new(OpKind::AllReduce, dtype, count).with_reduce(op);
    if !case.comm.supports(&query).is_supported() {
        return Ok(());
    }
    let call = Call { kind: OpKind::AllReduce, dtype, op, fill: fill_for(op, false) };
    let form = Form::Apart { send_offset: 0, recv_offset: dtype.size() };
    all_reduce(case, call, count, form)
}

/// An all-reduce that is prepared, issued and checked at different times.
pub(super) struct Pending {
    call: Call,
    count: usize,
    seed: u64,
    from: Region,
    to: Region,
}

impl Pending {
    pub(super) fn prepare(
        case: &mut Case<'_, '_>,
        dtype: DType,
        op: ReduceOp,
        count: usize,
        index: usize,
    ) -> Result<Self> {
        let call = Call { kind: OpKind::AllReduce, dtype, op, fill: fill_for(op, false) };
        let seed = case.next_seed();
        let input = call.input(case, seed, count);
        let from = case.arena.lay(8 + 2 * index, 0, input.len())?;
        let to = case.arena.lay(9 + 2 * index, dtype.size(), input.len())?;
        case.arena.put(&from, &input)?;
        case.arena.poison(&to)?;
        Ok(Self { call, count, seed, from, to })
    }

    pub(super) fn issue(&self, case: &Case<'_, '_>) -> Result<()> {
        let (call, from, to) = (self.call, self.from.addr(), self.to.addr());
        // SAFETY: both operands hold `count` elements in live memory that only this call uses until it is checked.
        unsafe { case.comm.all_reduce(from, to, self.count, call.dtype, call.op, case.stream()) }
    }

    pub(super) fn check(self, case: &mut Case<'_, '_>) -> Result<()> {
        let got = case.fetch(&self.to, "recv")?;
        self.call.check(case, self.seed, 0..self.count, &got);
        case.note_equal(&got);
        Ok(())
    }
}
