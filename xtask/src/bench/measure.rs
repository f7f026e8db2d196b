//! One rank's part of a benchmark: data, operation, verification, timing, row by row.

use std::sync::Arc;

use anyhow::{Context, Result};
use comm_core::{
    DType, DeviceAddr, DeviceComm, DeviceMemory, HostCommExt, HostReduceOp, OpKind, OpQuery, ReduceOp,
    Registration, Support,
};

use comm_kernels::pattern::Pattern;

use crate::backends;
use crate::bench::choose;
use crate::bench::copy::Copies;
use crate::bench::data::{Segment, pattern};
use crate::bench::norm;
use crate::bench::operands::{Operands, ROOT, query};
use crate::bench::plan::{BenchJob, Case};
use crate::bench::quantized;
use crate::bench::row::{Row, Timing};
use crate::bench::sizes::human;
use crate::bench::stats::{median, percentile};
use crate::device::Device;
use crate::events::Event;
use crate::rank::RankContext;

/// Runs the job's cases; rank 0 reports the rows.
///
/// # Errors
/// The first failure; the other ranks' waits then end too.
pub fn run(job: &BenchJob, context: &RankContext) -> Result<()> {
    let device = context.open_device(&job.backend)?;
    let comm = match context.create(&job.backend, device.memory(), job.registered) {
        Ok(comm) => comm,
        Err(error) => {
            // All ranks see the same error, so all of them stop here.
            let Some(reason) = choose::obstacle(&error) else { return Err(error.into()) };
            if context.host.rank() == 0 {
                context.events.emit(Event::NotMade(reason));
            }
            return Ok(());
        }
    };
    if context.host.rank() == 0
        && let Some(library) = backends::library(&job.backend)
    {
        context.events.emit(Event::Library(library));
    }
    let bench = Bench { job, context, device: &*device, comm: &comm };
    let mut copies = Copies::default();
    for (number, case) in job.cases(context.host.size()).into_iter().enumerate() {
        context.events.phase(format!("{} {}", case.op, human(case.bytes)));
        let row = bench
            .row(number as u64, case, &mut copies)
            .with_context(|| format!("{} of {}", case.op, human(case.bytes)))?;
        if context.host.rank() == 0 {
            context.events.emit(Event::Row(Box::new(row)));
        }
    }
    context.events.phase("closing");
    comm.close()?;
    Ok(())
}

/// What the rows of a job share.
pub struct Bench<'a> {
    /// The job.
    pub job: &'a BenchJob,
    /// This rank.
    pub context: &'a RankContext,
    /// Its device.
    pub device: &'a dyn Device,
    /// Its end of the communicator.
    pub comm: &'a Arc<dyn DeviceComm>,
}

impl Bench<'_> {
    fn row(&self, number: u64, case: Case, copies: &mut Copies) -> Result<Row> {
        let mut row = self.case(number, case)?;
        if !self.job.registered && row.skipped.is_none() {
            row.copy = copies.time(self, row.bytes)?;
        }
        Ok(row)
    }

    fn case(&self, number: u64, case: Case) -> Result<Row> {
        let mut row = self.unmeasured(&case);
        let world = self.comm.size();
        if let Support::No { reason } =
            self.comm.supports(&query(&case, world, self.job.dtype, self.job.redop))
        {
            row.skipped = Some(reason);
            return Ok(row);
        }
        if case.norm.is_some() {
            norm::measure(self, number, &case, &mut row)?;
            return Ok(row);
        }
        if case.op == OpKind::AllReduceQuantized {
            quantized::measure(self, number, &case, &mut row)?;
            return Ok(row);
        }
        let redop = if case.op.reduces() { self.job.redop } else { ReduceOp::Sum };
        let operands = Operands::new(case, self.comm.rank(), world, redop);
        let data = |form: u64| pattern(number << 1 | form, case.op.reduces().then_some(redop), world);
        row.out_of_place = Some(self.out_of_place(&operands, &data(0), &case)?);
        if let Some(places) = operands.in_place {
            row.in_place = Some(self.in_place(&operands, places, &data(1), &case)?);
        }
        Ok(row)
    }

    /// Verifies and times one case in its out-of-place form.
    ///
    /// # Errors
    /// The operation's, the device's or the host communicator's.
    pub fn out_of_place_only(&self, number: u64, case: Case) -> Result<Timing> {
        if case.norm.is_some() {
            let mut row = self.unmeasured(&case);
            norm::measure(self, number, &case, &mut row)?;
            return row.out_of_place.context("the norm has no out-of-place form");
        }
        let redop = if case.op.reduces() { self.job.redop } else { ReduceOp::Sum };
        let operands = Operands::new(case, self.comm.rank(), self.comm.size(), redop);
        let data = pattern(number << 1, case.op.reduces().then_some(redop), self.comm.size());
        self.out_of_place(&operands, &data, &case)
    }

    fn unmeasured(&self, case: &Case) -> Row {
        let rooted = matches!(case.op, OpKind::Broadcast | OpKind::Reduce);
        Row {
            op: case.op.name().to_owned(),
            backend: self.comm.info().backend.to_string(),
            dtype: self.job.dtype.name().to_owned(),
            redop: case.op.reduces().then(|| self.job.redop.name().to_owned()),
            root: rooted.then_some(ROOT),
            world: self.comm.size(),
            graph: self.job.effort.graph
                && matches!(self.device.memory().kind(), comm_core::MemoryKind::Cuda { .. }),
            bytes: case.bytes,
            count: case.count as u64,
            norm: case.norm,
            registered: self.job.registered,
            out_of_place: None,
            in_place: None,
            copy: None,
            skipped: None,
        }
    }

    fn out_of_place(&self, operands: &Operands, data: &Pattern, case: &Case) -> Result<Timing> {
        let dtype = self.job.dtype;
        let size = dtype.size();
        let memory = self.device.memory();
        // A registration is of equal length on all ranks, also where their parts are uneven.
        let bytes = [operands.send_count, operands.recv_count].map(|count| (count * size) as u64);
        let bytes = self.context.host.all_reduce(&bytes, HostReduceOp::Max)?;
        let send = Buffer::new(memory, bytes[0] as usize)?;
        let recv = Buffer::new(memory, bytes[1] as usize)?;
        let _registered = (self.register(&send)?, self.register(&recv)?);
        // SAFETY: `Operands` sized both buffers; they outlive the work, which `verify` and `time` wait for.
        let mut issue =
            || unsafe { operands.issue(&**self.comm, send.addr, recv.addr, dtype, memory.stream()) };
        // SAFETY: the segments are inside the buffers that were sized by the same operands.
        unsafe {
            self.device.poison(recv.addr, recv.bytes)?;
            self.device.fill(send.addr, data, dtype, &operands.input())?;
        }
        issue()?;
        let mut wrong = self.verify(recv.addr, data, &operands.output())?;
        // The timed operations are verified too: they write into poisoned memory, from an input that must not have changed.
        // SAFETY: as above; `verify` has waited for the operation.
        unsafe { self.device.poison(recv.addr, recv.bytes)? };
        let samples = self.device.time(&*self.context.host, &self.job.effort, case.bytes, &mut issue)?;
        wrong += self.verify(recv.addr, data, &operands.output())?;
        wrong += self.verify(send.addr, data, &[operands.input()])?;
        self.timing(case, &samples.means, &samples.singles, wrong)
    }

    fn in_place(
        &self,
        operands: &Operands,
        places: (usize, usize),
        data: &Pattern,
        case: &Case,
    ) -> Result<Timing> {
        let dtype = self.job.dtype;
        let size = dtype.size();
        let memory = self.device.memory();
        let elements = (places.0 + operands.send_count).max(places.1 + operands.recv_count);
        let both = Buffer::new(memory, elements * size)?;
        let _registered = self.register(&both)?;
        let (send, recv) =
            (both.addr.offset((places.0 * size) as u64), both.addr.offset((places.1 * size) as u64));
        let input = Segment { offset: places.0, ..operands.input() };
        let output: Vec<Segment> = operands
            .output()
            .iter()
            .map(|part| Segment { offset: part.offset + places.1, ..*part })
            .collect();
        // SAFETY: the buffer spans both operands; it outlives the work, which `verify` and `time` wait for.
        let mut issue = || unsafe { operands.issue(&**self.comm, send, recv, dtype, memory.stream()) };
        // SAFETY: the segments are inside the buffer.
        unsafe {
            self.device.poison(both.addr, both.bytes)?;
            self.device.fill(both.addr, data, dtype, &input)?;
        }
        issue()?;
        let mut wrong = self.verify(both.addr, data, &output)?;
        let samples = self.device.time(&*self.context.host, &self.job.effort, case.bytes, &mut issue)?;
        // What the timed operations left is verified where it must be what one leaves. A reduction in place has gone on from
        // its own result, so one more is made as the timed ones were, from fresh data.
        if case.op.reduces() {
            // SAFETY: as above; `time` has waited for the operations.
            unsafe {
                self.device.poison(both.addr, both.bytes)?;
                self.device.fill(both.addr, data, dtype, &input)?;
            }
            if self.job.effort.graph {
                self.device.replay(1, &mut issue, &mut || self.comm.poll())?;
            } else {
                issue()?;
            }
        }
        wrong += self.verify(both.addr, data, &output)?;
        self.timing(case, &samples.means, &samples.singles, wrong)
    }

    fn register<'b>(&'b self, buffer: &Buffer<'_>) -> Result<Option<Registered<'b>>> {
        self.job.registered.then(|| Registered::new(&**self.comm, buffer)).transpose()
    }

    fn verify(&self, buffer: DeviceAddr, data: &Pattern, segments: &[Segment]) -> Result<u64> {
        self.device.memory().synchronize()?;
        self.comm.poll()?;
        let mut wrong = 0;
        for segment in segments {
            // SAFETY: the segments are inside the buffer that was sized for them; the work on it has ended.
            wrong += unsafe { self.device.wrong(buffer, data, self.job.dtype, segment)? };
        }
        Ok(wrong)
    }

    /// The slowest rank's times and all ranks' wrong elements.
    ///
    /// # Errors
    /// The host communicator's.
    pub fn timing(&self, case: &Case, means: &[f64], singles: &[f64], wrong: u64) -> Result<Timing> {
        let host = &*self.context.host;
        let mine = [
            median(means).unwrap_or(f64::NAN),
            percentile(singles, 50.0).unwrap_or(f64::NAN),
            percentile(singles, 99.0).unwrap_or(f64::NAN),
        ];
        let slowest = host.all_reduce(&mine, HostReduceOp::Max)?;
        let wrong = host.all_reduce(&[wrong], HostReduceOp::Sum)?[0];
        Ok(Timing::new(case.op, host.size(), case.bytes, slowest[0], slowest[1], slowest[2], wrong))
    }
}

/// Device memory that goes back when it is dropped.
pub struct Buffer<'a> {
    memory: &'a dyn DeviceMemory,
    /// Its first byte.
    pub addr: DeviceAddr,
    /// Its length.
    pub bytes: usize,
}

impl<'a> Buffer<'a> {
    /// # Errors
    /// When the memory is not to be had.
    pub fn new(memory: &'a dyn DeviceMemory, bytes: usize) -> Result<Self> {
        let addr = memory.allocate(bytes).with_context(|| format!("allocating {}", human(bytes as u64)))?;
        Ok(Self { memory, addr, bytes })
    }
}

impl Drop for Buffer<'_> {
    fn drop(&mut self) {
        // Work that still uses the buffer must end first; where it cannot, the memory goes with the process.
        if self.memory.synchronize().is_ok() {
            // SAFETY: the stream's work, which alone could use the buffer, has ended.
            let _ = unsafe { self.memory.free(self.addr) };
        }
    }
}

/// A buffer made known to the communicator, where its backend takes registrations; until it is dropped, which the
/// buffer must outlive.
struct Registered<'a> {
    comm: &'a dyn DeviceComm,
    registration: Option<Registration>,
}

impl<'a> Registered<'a> {
    /// # Errors
    /// When the backend takes registrations, but not this one.
    fn new(comm: &'a dyn DeviceComm, buffer: &Buffer<'_>) -> Result<Self> {
        let query = OpQuery::new(OpKind::Register, DType::U8, buffer.bytes);
        let registration = match buffer.bytes > 0 && comm.supports(&query).is_supported() {
            // SAFETY: the caller drops this before the buffer.
            true => Some(unsafe { comm.register(buffer.addr, buffer.bytes)? }),
            false => None,
        };
        Ok(Self { comm, registration })
    }
}

impl Drop for Registered<'_> {
    fn drop(&mut self) {
        if let Some(registration) = &self.registration {
            // SAFETY: the ranks have exchanged the times of the work that used it, so it has ended on all of them.
            let _ = unsafe { self.comm.deregister(registration) };
        }
    }
}

#[cfg(test)]
mod tests;
