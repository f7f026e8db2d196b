//! A communicator's life: what it refuses, what it counts, barriers, long mixed sequences, and its end.

use std::collections::HashMap;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

use super::super::case::Case;
use super::super::data;
use super::super::runner::Runner;
use super::issue::{Operands, issue, one_sided, query};
use super::{moves, reductions};
use crate::dtype::{DType, ReduceOp};
use crate::error::{CommError, Result};
use crate::op::{OpKind, OpQuery};

pub(super) fn before(runner: &mut Runner<'_>) {
    runner.case(OpKind::Create, "create/info", info);
    for kind in OpKind::COLLECTIVES {
        runner.case(kind, &format!("{kind}/supports"), |case| supports(case, kind));
    }
}

pub(super) fn run(runner: &mut Runner<'_>) {
    runner.judged(OpKind::Barrier, "barrier/order", barrier_order, barrier);
    for kind in one_sided() {
        runner.case(kind, &format!("{kind}/usage"), |case| usage(case, kind));
    }
    let rounds = if runner.config.quick { 200 } else { 1000 };
    runner.case(OpKind::AllReduce, "all_reduce/mixed_sequence", |case| mixed(case, rounds));
    runner.case(OpKind::AllReduce, "all_reduce/interleaved_sizes", interleaved);
}

pub(super) fn end(runner: &mut Runner<'_>) {
    if runner.config.close {
        runner.case(OpKind::Close, "close/then_call", closed);
    }
}

/// Every rank is what it says, and all are of one communicator.
fn info(case: &mut Case<'_, '_>) -> Result<()> {
    case.at = "info".into();
    let info = case.comm.info();
    if info.rank >= info.size {
        case.fail(format!("rank {} of {}", info.rank, info.size));
    }
    let kind = case.arena.memory().kind();
    if info.memory != kind {
        case.fail(format!("works on {:?}, but was made for {kind:?}", info.memory));
    }
    case.note_equal(format!("{} {} {}", info.name, info.backend, info.size).as_bytes());
    case.comm.poll()
}

/// All ranks give equal answers, and what is refused beforehand is refused by the call.
fn supports(case: &mut Case<'_, '_>, kind: OpKind) -> Result<()> {
    let mut refused = Vec::new();
    for dtype in DType::ALL {
        for count in [0, 1, 4, 1 << 12, 1 << 22] {
            for op in ReduceOp::ALL {
                let query = OpQuery::new(kind, dtype, count);
                let query = if kind.reduces() { query.with_reduce(op) } else { query };
                case.facts.push(u64::from(case.comm.supports(&query).is_supported()));
            }
        }
        if !case.comm.supports(&query(kind, dtype)).is_supported() {
            refused.push(dtype);
        }
    }
    let operands = Operands::new(case)?;
    for dtype in refused {
        case.at = format!("{kind} of {dtype}, which supports refuses");
        let result = issue(case.comm, kind, dtype, operands, case.stream());
        let floats = kind.norms() || kind == OpKind::AllReduceQuantized;
        let never = floats && !matches!(dtype, DType::F32 | DType::F16 | DType::BF16);
        case.expect_error("the call", "Unsupported", result, |error| {
            // A type that the operation does not take at all may be called an invalid argument as well.
            matches!(error, CommError::Unsupported { .. })
                || (never && matches!(error, CommError::InvalidArgument { .. }))
        })?;
    }
    Ok(())
}

/// Calls count, refused calls do not.
fn usage(case: &mut Case<'_, '_>, kind: OpKind) -> Result<()> {
    let dtype = DType::F32;
    if !case.supported(&query(kind, dtype)) {
        return Ok(());
    }
    let counted = |case: &Case<'_, '_>| -> u64 {
        case.comm.usage().iter().filter(|usage| usage.op == kind).map(|usage| usage.calls).sum()
    };
    let operands = Operands::new(case)?;
    case.at = format!("usage of {kind}");
    let before = counted(case);
    for _ in 0..3 {
        issue(case.comm, kind, dtype, operands, case.stream())?;
        case.calls += 1;
    }
    case.arena.memory().synchronize()?;
    let moved = counted(case) - before;
    if moved != 3 {
        case.fail(format!("three calls moved the counters by {moved}"));
    }
    if kind == OpKind::AllReduce {
        let null = crate::DeviceAddr::NULL;
        // SAFETY: null addresses are refused.
        let result = unsafe { case.comm.all_reduce(null, null, 4, dtype, ReduceOp::Sum, case.stream()) };
        case.expect_invalid("a null address", result)?;
        if counted(case) != before + 3 {
            case.fail("a refused call moved the counters");
        }
    }
    Ok(())
}

fn now() -> u64 {
    let time = clock_gettime(ClockId::Monotonic);
    u64::try_from(time.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(time.tv_nsec).unwrap_or(0)
}

/// A number of the running system, so that ranks know whether they read the same clock.
fn system() -> u64 {
    let id = std::fs::read("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    id.iter().fold(0, |hash, &byte| data::random(hash, 0, usize::from(byte)))
}

/// One rank after another comes late; the judge sees whether the others waited.
fn barrier(case: &mut Case<'_, '_>) -> Result<()> {
    if !case.supported(&query(OpKind::Barrier, DType::U8)) {
        return Ok(());
    }
    case.facts.push(system());
    for late in 0..case.world {
        case.at = format!("barrier with rank {late} late");
        case.calls += 1;
        if late == case.rank {
            std::thread::sleep(Duration::from_millis(10));
        }
        case.facts.push(now());
        // SAFETY: the stream is the memory's own.
        unsafe { case.comm.barrier(case.stream()) }?;
        case.arena.memory().synchronize()?;
        case.facts.push(now());
    }
    Ok(())
}

fn barrier_order(facts: &[Vec<u64>]) -> Option<String> {
    if facts.iter().any(|rank| rank.first() != facts[0].first() || rank.len() != facts[0].len()) {
        return None;
    }
    (1..facts[0].len()).step_by(2).find_map(|turn| {
        let (entered, last) = facts.iter().map(|rank| rank[turn]).zip(0..).max()?;
        let (left, first) = facts.iter().map(|rank| rank[turn + 1]).zip(0..).min()?;
        let early = entered.saturating_sub(left);
        (early > 0)
            .then(|| format!("barrier {}: rank {first} left {early} ns before rank {last} came", turn / 2))
    })
}

/// Many small calls of all kinds, checked as they go.
fn mixed(case: &mut Case<'_, '_>, rounds: usize) -> Result<()> {
    let seed = case.next_seed();
    for round in 0..rounds {
        let choice = data::random(seed, 0, round);
        let count = (choice >> 8) as usize % 97;
        match choice % 4 {
            0 => reductions::simple(case, DType::BF16, ReduceOp::Sum, count)?,
            1 => reductions::simple(case, DType::I32, ReduceOp::Max, count)?,
            2 => moves::simple(case, DType::U8, count)?,
            _ => reductions::simple(case, DType::F32, ReduceOp::Avg, count)?,
        }
    }
    Ok(())
}

/// Calls of alternating sizes with nothing in between that waits for them; then all results are checked.
fn interleaved(case: &mut Case<'_, '_>) -> Result<()> {
    let (dtype, op) = (DType::BF16, ReduceOp::Sum);
    let pattern = [1, 4096, 16, 24_576, 96, 8, 65_536, 1];
    if !pattern.iter().all(|&n| case.supported(&OpQuery::new(OpKind::AllReduce, dtype, n).with_reduce(op))) {
        return Ok(());
    }
    for turn in 0..3 {
        let mut pending = Vec::new();
        for (index, &count) in pattern.iter().enumerate() {
            pending.push(reductions::Pending::prepare(case, dtype, op, count, index)?);
        }
        case.at = format!("all_reduce of {pattern:?} {dtype} back to back, turn {turn}");
        pending.iter().try_for_each(|call| call.issue(case))?;
        case.calls += pattern.len() as u64;
        for call in pending {
            call.check(case)?;
        }
    }
    Ok(())
}

/// After a close every call says so.
fn closed(case: &mut Case<'_, '_>) -> Result<()> {
    let operands = Operands::new(case)?;
    let mut supported: HashMap<OpKind, bool> = HashMap::new();
    for kind in one_sided() {
        supported.insert(kind, case.comm.supports(&query(kind, DType::F32)).is_supported());
    }
    case.at = "close".into();
    case.comm.close()?;
    for kind in one_sided().filter(|kind| supported[kind]) {
        case.at = format!("{kind} after close");
        let result = issue(case.comm, kind, DType::F32, operands, case.stream());
        let outcome =
            case.expect_error("the call", "Closed", result, |e| matches!(e, CommError::Closed { .. }));
        if outcome.is_err() {
            break;
        }
    }
    Ok(())
}
