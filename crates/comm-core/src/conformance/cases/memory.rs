//! Allocation and registration: cycles of them, with operands inside.

use super::super::buffers::Region;
use super::super::case::Case;
use super::super::data::{self, Fill};
use super::super::reference::{self, Equality};
use super::super::runner::Runner;
use crate::device_comm::Registration;
use crate::dtype::{DType, ReduceOp};
use crate::error::{CommError, Result};
use crate::op::{OpKind, OpQuery};

const SIZES: [usize; 5] = [256, 1 << 12, 100_000, 1 << 20, 4096];

/// More bytes than any machine has.
const TOO_MUCH: usize = 1 << 50;

pub(super) fn run(runner: &mut Runner<'_>) {
    runner.case(OpKind::Allocate, "allocate/cycles", allocate);
    runner.case(OpKind::Allocate, "allocate/too_much", too_much);
    runner.case(OpKind::Free, "free/unknown", free_unknown);
    runner.case(OpKind::Register, "register/cycles", register);
}

/// An all-reduce on operands that lie anywhere in the blocks.
fn call(case: &mut Case<'_, '_>, from: Region, to: Region) -> Result<()> {
    let (dtype, op) = (DType::F32, ReduceOp::Sum);
    let (seed, world, count) = (case.next_seed(), case.world, from.len / dtype.size());
    if !case.comm.supports(&OpQuery::new(OpKind::AllReduce, dtype, count).with_reduce(op)).is_supported() {
        return Ok(());
    }
    case.calls += 1;
    let input = data::filled(Fill::Sum, dtype, world, seed, case.rank, 0..count);
    case.arena.put(&from, &input)?;
    case.arena.poison(&to)?;
    // SAFETY: both operands hold `count` elements in live memory that only this call uses.
    unsafe { case.comm.all_reduce(from.addr(), to.addr(), count, dtype, op, case.stream()) }?;
    let got = case.fetch(&to, "recv")?;
    let expected = reference::reduced(Fill::Sum, dtype, op, world, seed, 0..count);
    case.expect(dtype, &expected, &got, Equality::Value);
    Ok(())
}

/// Waits until the work of all ranks has completed: what freeing and deregistering ask for.
fn settle(case: &mut Case<'_, '_>) -> Result<()> {
    if case.comm.supports(&OpQuery::new(OpKind::Barrier, DType::U8, 0)).is_supported() {
        // SAFETY: the stream is the memory's own.
        unsafe { case.comm.barrier(case.stream()) }?;
    }
    case.arena.memory().synchronize()
}

fn allocate(case: &mut Case<'_, '_>) -> Result<()> {
    for (turn, len) in SIZES.into_iter().enumerate() {
        let offset = turn * 12;
        let room = Region::room(offset, len);
        if !case.supported(&OpQuery::new(OpKind::Allocate, DType::U8, room)) {
            return Ok(());
        }
        case.at = format!("allocate of {room} bytes, cycle {turn}");
        let (from, to) = (case.comm.allocate(room)?, case.comm.allocate(room)?);
        case.calls += 2;
        if !from.is_aligned_to(256) || !to.is_aligned_to(256) {
            case.fail(format!("{from:?} or {to:?} is not aligned to 256"));
        }
        for _ in 0..2 {
            call(case, Region::inside(from, offset, len / 4 * 4), Region::inside(to, offset, len / 4 * 4))?;
        }
        settle(case)?;
        // SAFETY: the calls have completed on all ranks.
        unsafe { case.comm.free(from) }?;
        // SAFETY: as above.
        unsafe { case.comm.free(to) }?;
    }
    Ok(())
}

/// Memory that is not to be had is an error on every rank, and no more than that: the communicator goes on without.
fn too_much(case: &mut Case<'_, '_>) -> Result<()> {
    if !case.supported(&OpQuery::new(OpKind::Allocate, DType::U8, TOO_MUCH)) {
        return Ok(());
    }
    for _ in 0..2 {
        case.at = format!("allocate of {TOO_MUCH} bytes");
        let made = case.comm.allocate(TOO_MUCH);
        case.expect_invalid("more memory than there is", made.map(drop))?;
        case.at = "all_reduce after an allocation that failed".into();
        let operands = [case.arena.lay(0, 0, 4096)?, case.arena.lay(1, 0, 4096)?];
        call(case, operands[0], operands[1])?;
        case.at = "allocate after one that failed".into();
        let addr = case.comm.allocate(4096)?;
        case.calls += 1;
        settle(case)?;
        // SAFETY: no work has used it, on any rank.
        unsafe { case.comm.free(addr) }?;
    }
    Ok(())
}

fn free_unknown(case: &mut Case<'_, '_>) -> Result<()> {
    if !case.supported(&OpQuery::new(OpKind::Allocate, DType::U8, 256)) {
        return Ok(());
    }
    case.at = "free of an address that was not allocated".into();
    let region = case.arena.lay(0, 0, 64)?;
    // SAFETY: no work uses it; that it is no allocation of the communicator is what is tried.
    let result = unsafe { case.comm.free(region.addr()) };
    case.expect_error("free", "InvalidArgument or StaleHandle", result, refused)
}

const fn refused(error: &CommError) -> bool {
    matches!(error, CommError::InvalidArgument { .. } | CommError::StaleHandle { .. })
}

fn register(case: &mut Case<'_, '_>) -> Result<()> {
    let mut last: Option<Registration> = None;
    for (turn, len) in SIZES.into_iter().enumerate() {
        // The blocks hold operands at several places, so that interior addresses are used too.
        let room = Region::room(8, 2 * len);
        if !case.supported(&OpQuery::new(OpKind::Register, DType::U8, room)) {
            return Ok(());
        }
        case.at = format!("register of {room} bytes, cycle {turn}");
        let memory = case.arena.memory();
        let (from, to) = (memory.allocate(room)?, memory.allocate(room)?);
        // SAFETY: both blocks are freed after their deregistration.
        let registered = unsafe { [case.comm.register(from, room)?, case.comm.register(to, room)?] };
        case.calls += 2;
        for (at, bytes) in [(8, len), (len / 4 * 4, len / 2)] {
            call(case, Region::inside(from, at, bytes / 4 * 4), Region::inside(to, at, bytes / 4 * 4))?;
        }
        settle(case)?;
        if let Some(old) = last.as_ref().filter(|old| registered.contains(old)) {
            case.fail(format!("registration {old:?} was handed out twice"));
        }
        for registration in &registered {
            // SAFETY: the calls have completed on all ranks.
            unsafe { case.comm.deregister(registration) }?;
        }
        // SAFETY: as above; that it is no longer registered is what is tried.
        let again = unsafe { case.comm.deregister(&registered[0]) };
        case.expect_error("a second deregister", "StaleHandle or InvalidArgument", again, refused)?;
        call(case, Region::inside(from, 8, len / 4 * 4), Region::inside(to, 8, len / 4 * 4))?;
        memory.synchronize()?;
        // SAFETY: the last call on the blocks has completed, and they are not registered.
        unsafe { memory.free(from) }?;
        // SAFETY: as above.
        unsafe { memory.free(to) }?;
        let [first, _] = registered;
        last = Some(first);
    }
    Ok(())
}
