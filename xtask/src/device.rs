//! A rank's device as benchmarks and fault tests use it: memory, data, timing. One implementation per kind of memory;
//! this module holds the trait and the host's.

use std::time::Instant;

use anyhow::{Result, bail};
use comm_core::{DType, Deadline, DeviceAddr, DeviceMemory, HostComm, HostCommExt, HostMemory, HostReduceOp};
use comm_kernels::pattern::Pattern;

use crate::bench::data::{self, Content, Segment};
use crate::bench::plan::Effort;

/// Microseconds per operation, of this rank.
#[derive(Debug, Default)]
pub struct Samples {
    /// The mean of each repetition of the loop or graph.
    pub means: Vec<f64>,
    /// The finest samples there are: single operations on host memory, repetitions on GPUs.
    pub singles: Vec<f64>,
}

/// A call that may fail, made again and again.
pub type Call<'a> = &'a mut dyn FnMut() -> comm_core::Result<()>;

/// One rank's device.
pub trait Device: Send + Sync {
    /// Its memory.
    fn memory(&self) -> &dyn DeviceMemory;

    /// Writes a segment of a buffer, of which the content is a rank's own. May return before it is done.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Safety
    /// The segment is inside a live allocation that starts at `buffer`, and nothing else uses it.
    unsafe fn fill(&self, buffer: DeviceAddr, data: &Pattern, dtype: DType, segment: &Segment) -> Result<()>;

    /// Counts the elements of a segment that are not what they should be, after the stream's work.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Safety
    /// As [`fill`](Self::fill).
    unsafe fn wrong(
        &self,
        buffer: DeviceAddr,
        data: &Pattern,
        dtype: DType,
        segment: &Segment,
    ) -> Result<u64>;

    /// Overwrites `bytes` bytes, so that what an earlier operation left there cannot pass.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Safety
    /// The range is a live allocation, and nothing else uses it.
    unsafe fn poison(&self, buffer: DeviceAddr, bytes: usize) -> Result<()>;

    /// Copies `bytes` bytes within the device. May return before it is done.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Safety
    /// Both ranges are live allocations that do not overlap, and stay so until the copy is done; nothing else writes to
    /// them meanwhile.
    unsafe fn copy(&self, to: DeviceAddr, from: DeviceAddr, bytes: usize) -> comm_core::Result<()>;

    /// Times an operation as `effort` says. Collective: all ranks time the same operation.
    ///
    /// # Errors
    /// The operation's, the device's or the host communicator's.
    fn time(&self, host: &dyn HostComm, effort: &Effort, bytes: u64, op: Call<'_>) -> Result<Samples>;

    /// Waits for the stream's work, asking `poll` meanwhile; ends with the first error of either.
    ///
    /// # Errors
    /// `poll`'s, or the device's.
    fn wait(&self, poll: Call<'_>) -> comm_core::Result<()>;

    /// Captures `calls` calls of `op` into a graph, replays it once and waits for it as [`wait`](Self::wait) does. Where
    /// there are no graphs, just makes the calls.
    ///
    /// # Errors
    /// The operation's, `poll`'s or the device's.
    fn replay(&self, calls: usize, op: Call<'_>, poll: Call<'_>) -> comm_core::Result<()>;

    /// Brings about an error of the device that stays.
    ///
    /// # Errors
    /// When the device cannot fail.
    fn break_it(&self) -> Result<()>;
}

/// What [`Device::poison`] writes.
pub const POISON: u8 = 0x7b;

/// [`Device`] over host memory.
#[derive(Default)]
pub struct HostDevice {
    memory: HostMemory,
}

impl HostDevice {
    /// # Safety
    /// The range is inside a live allocation of this memory that nothing else uses while the slice lives.
    unsafe fn bytes<'a>(&self, buffer: DeviceAddr, offset: usize, bytes: usize) -> &'a mut [u8] {
        if bytes == 0 {
            return &mut [];
        }
        // SAFETY: the caller vouches for the range and for having it alone.
        unsafe { std::slice::from_raw_parts_mut(buffer.offset(offset as u64).0 as *mut u8, bytes) }
    }
}

impl Device for HostDevice {
    fn memory(&self) -> &dyn DeviceMemory {
        &self.memory
    }

    unsafe fn fill(&self, buffer: DeviceAddr, data: &Pattern, dtype: DType, segment: &Segment) -> Result<()> {
        let size = dtype.size();
        // SAFETY: the caller vouches for the segment.
        let bytes = unsafe { self.bytes(buffer, segment.offset * size, segment.count * size) };
        match segment.content {
            Content::Of { rank, first } => Ok(data::fill(bytes, dtype, data, rank, first)?),
            Content::Reduced { .. } => bail!("a rank sends its own elements, not reduced ones"),
        }
    }

    unsafe fn wrong(
        &self,
        buffer: DeviceAddr,
        data: &Pattern,
        dtype: DType,
        segment: &Segment,
    ) -> Result<u64> {
        let size = dtype.size();
        // SAFETY: the caller vouches for the segment.
        let bytes = unsafe { self.bytes(buffer, segment.offset * size, segment.count * size) };
        Ok(data::wrong(bytes, dtype, data, segment.content)?)
    }

    unsafe fn poison(&self, buffer: DeviceAddr, bytes: usize) -> Result<()> {
        // SAFETY: the caller vouches for the range.
        unsafe { self.bytes(buffer, 0, bytes) }.fill(POISON);
        Ok(())
    }

    unsafe fn copy(&self, to: DeviceAddr, from: DeviceAddr, bytes: usize) -> comm_core::Result<()> {
        // SAFETY: the caller vouches for both ranges.
        unsafe { self.bytes(to, 0, bytes).copy_from_slice(self.bytes(from, 0, bytes)) };
        Ok(())
    }

    fn time(&self, host: &dyn HostComm, effort: &Effort, _bytes: u64, op: Call<'_>) -> Result<Samples> {
        let start = Instant::now();
        for _ in 0..effort.warmup.max(1) {
            op()?;
        }
        let mine = start.elapsed().as_secs_f64() * 1e6 / effort.warmup.max(1) as f64;
        // All ranks must issue equally many operations, so they agree on the slowest one's estimate.
        let slowest = host.all_reduce(&[mine], HostReduceOp::Max)?[0];
        let iters = effort.host_iters(slowest);
        let mut samples = Samples::default();
        for _ in 0..effort.reps {
            host.barrier(Deadline::after(host.timeout()))?;
            let start = Instant::now();
            let mut last = start;
            for _ in 0..iters {
                op()?;
                let now = Instant::now();
                samples.singles.push((now - last).as_secs_f64() * 1e6);
                last = now;
            }
            samples.means.push((last - start).as_secs_f64() * 1e6 / iters as f64);
        }
        Ok(samples)
    }

    fn wait(&self, poll: Call<'_>) -> comm_core::Result<()> {
        poll()
    }

    fn replay(&self, calls: usize, op: Call<'_>, _poll: Call<'_>) -> comm_core::Result<()> {
        (0..calls).try_for_each(|_| op())
    }

    fn break_it(&self) -> Result<()> {
        bail!("host memory has no device that could fail")
    }
}
