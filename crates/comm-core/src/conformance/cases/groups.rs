//! Splits: who is where, and groups that go their own ways.

use super::super::case::Case;
use super::super::runner::Runner;
use super::{moves, reductions};
use crate::device_comm::DeviceComm;
use crate::dtype::{DType, ReduceOp};
use crate::error::Result;
use crate::op::{OpKind, OpQuery};

pub(super) fn run(runner: &mut Runner<'_>) {
    type Body = fn(&mut Case<'_, '_>) -> Result<()>;
    let cases: [(&str, Body); 4] = [
        ("split/reversed_key", reversed),
        ("split/uneven_calls", uneven_calls),
        ("split/none", left_out),
        ("split/alone", alone),
    ];
    for (name, body) in cases {
        runner.case(OpKind::Split, name, |case| {
            if case.supported(&OpQuery::new(OpKind::Split, DType::U8, 0)) { body(case) } else { Ok(()) }
        });
    }
}

/// A few calls on a group, with results checked.
fn calls(case: &mut Case<'_, '_>, group: &dyn DeviceComm, salt: u64, rounds: usize) -> Result<()> {
    let at = case.at.clone();
    let mut inner = case.on(group, salt);
    let result = (0..rounds).try_for_each(|round| {
        let count = [257, 1, 4099, 32][round % 4];
        reductions::simple(&mut inner, DType::F32, ReduceOp::Sum, count)?;
        moves::simple(&mut inner, DType::BF16, count)
    });
    let (calls, failure, inner_at) = (inner.calls, inner.failure, inner.at);
    case.absorb(calls, failure.map(|message| format!("{at}: {message}")));
    case.at = if result.is_err() { format!("{at}: {inner_at}") } else { at };
    result
}

/// Where this rank must be among the ranks of its color, with that key.
fn check_place(case: &mut Case<'_, '_>, group: &dyn DeviceComm, members: &[usize]) {
    let own = members.iter().position(|&rank| rank == case.rank).unwrap_or(usize::MAX);
    if (group.rank(), group.size()) != (own, members.len()) {
        case.fail(format!(
            "this rank became rank {} of {}, but must be rank {own} of {}",
            group.rank(),
            group.size(),
            members.len()
        ));
    }
}

fn reversed(case: &mut Case<'_, '_>) -> Result<()> {
    case.at = "split of all ranks with color 7 and key -rank".into();
    let Some(group) = case.comm.split(Some(7), -(case.rank as i32))? else {
        case.fail("a rank that passed a color got no group");
        return Ok(());
    };
    let members: Vec<usize> = (0..case.world).rev().collect();
    check_place(case, &*group, &members);
    calls(case, &*group, 1, 4)?;
    group.close()
}

fn uneven_calls(case: &mut Case<'_, '_>) -> Result<()> {
    let color = case.rank % 2;
    case.at = format!("split with color {color} (rank % 2) and equal keys");
    let Some(group) = case.comm.split(Some(color as u32), 0)? else {
        case.fail("a rank that passed a color got no group");
        return Ok(());
    };
    let members: Vec<usize> = (0..case.world).filter(|rank| rank % 2 == color).collect();
    check_place(case, &*group, &members);
    for turn in 0..3_u64 {
        // The groups differ in the number of calls between calls of all ranks.
        calls(case, &*group, 10 + turn, if color == 0 { 5 } else { 2 })?;
        let comm = case.comm;
        calls(case, comm, 20 + turn, 1)?;
    }
    group.close()
}

fn left_out(case: &mut Case<'_, '_>) -> Result<()> {
    let color = if case.rank == 0 { None } else { Some(3) };
    case.at = format!("split with color {color:?}");
    match (case.comm.split(color, 0)?, color) {
        (None, None) => Ok(()),
        (Some(group), Some(_)) => {
            let members: Vec<usize> = (1..case.world).collect();
            check_place(case, &*group, &members);
            calls(case, &*group, 30, 2)?;
            group.close()
        }
        (group, _) => {
            case.fail(format!("got {} group", if group.is_some() { "a" } else { "no" }));
            Ok(())
        }
    }
}

fn alone(case: &mut Case<'_, '_>) -> Result<()> {
    case.at = "split with a color of its own for every rank".into();
    let Some(group) = case.comm.split(Some(case.rank as u32), 0)? else {
        case.fail("a rank that passed a color got no group");
        return Ok(());
    };
    let members = [case.rank];
    check_place(case, &*group, &members);
    calls(case, &*group, 40, 2)?;
    group.close()
}
