//! A rank's device as benchmarks and fault tests use it: memory, data, timing. One implementation per kind of memory;
//! this module holds the trait and the host's.

use std::time::Instant;

use anyhow::Result;
use comm_core::{Deadline, DeviceAddr, DeviceMemory, HostComm, HostCommExt, HostMemory, HostReduceOp};

use crate::bench::data::{Pattern, Segment};
use crate::bench::plan::Effort;

/// Microseconds per operation, of this rank.
#[derive(Debug, Default)]
pub struct Samples {
    /// The mean of each repetition of the loop or graph.
    pub means: Vec<f64>,
    /// The finest samples there are: single operations on host memory, repetitions on GPUs.
    pub singles: Vec<f64>,
}

/// One rank's device.
pub trait Device: Send + Sync {
    /// Its memory.
    fn memory(&self) -> &dyn DeviceMemory;

    /// Writes a segment of a buffer. Ordered after the stream's work; may return before it is done.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Safety
    /// The segment is inside a live allocation that starts at `buffer`.
    unsafe fn fill(&self, buffer: DeviceAddr, pattern: &Pattern, segment: &Segment) -> Result<()>;

    /// Counts the elements of a segment that are not what they should be, after the stream's work.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Safety
    /// The segment is inside a live allocation that starts at `buffer`.
    unsafe fn wrong(&self, buffer: DeviceAddr, pattern: &Pattern, segment: &Segment) -> Result<u64>;

    /// Overwrites `bytes` bytes with a value that no pattern produces in a run.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Safety
    /// The range is a live allocation.
    unsafe fn poison(&self, buffer: DeviceAddr, bytes: usize) -> Result<()>;

    /// Times an operation as `effort` says. Collective: all ranks time the same operation.
    ///
    /// # Errors
    /// The operation's, the device's or the host communicator's.
    fn time(
        &self,
        host: &dyn HostComm,
        effort: &Effort,
        bytes: u64,
        op: &mut dyn FnMut() -> comm_core::Result<()>,
    ) -> Result<Samples>;

    /// Runs `op`'s work inside a captured graph, `replays` times, and waits for it. Where there are no graphs: that many
    /// calls.
    ///
    /// # Errors
    /// The operation's or the device's.
    fn replay(&self, replays: usize, op: &mut dyn FnMut() -> comm_core::Result<()>) -> comm_core::Result<()>;
}

/// What [`Device::poison`] writes: in every type far from the small values of the patterns.
pub const POISON: u8 = 0x7b;

/// [`Device`] over host memory.
#[derive(Default)]
pub struct HostDevice {
    memory: HostMemory,
}

impl HostDevice {
    /// # Safety
    /// The range is inside a live allocation of this memory that nothing else uses now.
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

    unsafe fn fill(&self, buffer: DeviceAddr, pattern: &Pattern, segment: &Segment) -> Result<()> {
        let size = pattern.dtype.size();
        // SAFETY: the caller vouches for the segment; no operation runs while data is prepared.
        let bytes = unsafe { self.bytes(buffer, segment.offset * size, segment.count * size) };
        pattern.fill(bytes, segment.content);
        Ok(())
    }

    unsafe fn wrong(&self, buffer: DeviceAddr, pattern: &Pattern, segment: &Segment) -> Result<u64> {
        let size = pattern.dtype.size();
        // SAFETY: the caller vouches for the segment; no operation runs while results are compared.
        let bytes = unsafe { self.bytes(buffer, segment.offset * size, segment.count * size) };
        Ok(pattern.wrong(bytes, segment.content))
    }

    unsafe fn poison(&self, buffer: DeviceAddr, bytes: usize) -> Result<()> {
        // SAFETY: the caller vouches for the range; no operation runs while data is prepared.
        unsafe { self.bytes(buffer, 0, bytes) }.fill(POISON);
        Ok(())
    }

    fn time(
        &self,
        host: &dyn HostComm,
        effort: &Effort,
        _bytes: u64,
        op: &mut dyn FnMut() -> comm_core::Result<()>,
    ) -> Result<Samples> {
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

    fn replay(&self, replays: usize, op: &mut dyn FnMut() -> comm_core::Result<()>) -> comm_core::Result<()> {
        (0..replays).try_for_each(|_| op())
    }
}
