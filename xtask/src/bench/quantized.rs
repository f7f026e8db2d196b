//! The quantised all-reduce as a benchmark row, compared bit by bit with the definition of its arithmetic.

use anyhow::Result;
use comm_core::quantize::sum_host;
use comm_core::{DeviceAddr, ReduceOp};

use crate::bench::data::{self, Content, Segment, pattern};
use crate::bench::measure::{Bench, Buffer};
use crate::bench::plan::Case;
use crate::bench::row::Row;
use crate::device::POISON;

/// Elements that are compared at either end of the result: the definition's arithmetic takes the host a while.
const COMPARED: usize = 1 << 16;

/// Measures one size into `row`, out of place: in place, one operation's result would be the next one's operand.
///
/// # Errors
/// The operation's, the device's or the host communicator's.
pub fn measure(bench: &Bench<'_>, number: u64, case: &Case, row: &mut Row) -> Result<()> {
    let (dtype, count, memory) = (bench.job.dtype, case.count, bench.device.memory());
    let bytes = count * dtype.size();
    let (send, recv) = (Buffer::new(memory, bytes)?, Buffer::new(memory, bytes)?);
    let values = pattern(number << 1, Some(ReduceOp::Sum), bench.comm.size());
    let own = Segment { offset: 0, count, content: Content::Of { rank: bench.comm.rank(), first: 0 } };
    // SAFETY: both buffers have the size of what is written.
    unsafe {
        bench.device.fill(send.addr, &values, dtype, &own)?;
        bench.device.poison(recv.addr, bytes)?;
    }
    // SAFETY: both hold `count` elements and outlive the work, which is waited for below.
    let mut issue =
        || unsafe { bench.comm.all_reduce_quantized(send.addr, recv.addr, count, dtype, memory.stream()) };
    let samples = bench.device.time(&*bench.context.host, &bench.job.effort, case.bytes, &mut issue)?;
    // Groups are counted from the vector's beginning, so the last part begins with one.
    let last = count.saturating_sub(COMPARED) / comm_core::quantize::GROUP * comm_core::quantize::GROUP;
    let mut wrong = 0;
    for (first, count) in [(0, count.min(COMPARED)), (last, count - last)] {
        let at = recv.addr.offset((first * dtype.size()) as u64);
        wrong += differing(bench, &values, at, (first, count))?;
    }
    row.out_of_place = Some(bench.timing(case, &samples.means, &samples.singles, wrong)?);
    Ok(())
}

/// Elements of a part of the result at `at` that are not what the definition says.
fn differing(
    bench: &Bench<'_>,
    values: &comm_kernels::pattern::Pattern,
    at: DeviceAddr,
    (first, count): (usize, usize),
) -> Result<u64> {
    let (dtype, world) = (bench.job.dtype, bench.comm.size());
    let bytes = count * dtype.size();
    let mut parts = vec![vec![0_u8; bytes]; world];
    for (rank, part) in parts.iter_mut().enumerate() {
        data::fill(part, dtype, values, rank, first as u64)?;
    }
    let mut expected = parts[0].clone();
    if world > 1 {
        let sources: Vec<*const u8> = parts.iter().map(|part| part.as_ptr()).collect();
        // SAFETY: all of them hold `count` elements, and none overlaps another.
        unsafe { sum_host(expected.as_mut_ptr(), &sources, count, dtype)? };
    }
    let mut found = vec![POISON; bytes];
    // SAFETY: the buffer holds the part.
    unsafe { bench.device.memory().download(&mut found, at)? };
    bench.comm.poll()?;
    let elements = found.chunks(dtype.size()).zip(expected.chunks(dtype.size()));
    Ok(elements.filter(|(found, expected)| found != expected).count() as u64)
}
