//! [`Device`] on a CUDA GPU: data by kernels, timing by events around replayed graphs.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use comm_core::{CommError, DType, Deadline, DeviceAddr, DeviceMemory, HostComm};
use comm_kernels::pattern::{Mismatches, Pattern};
use comm_kernels::{CapturedGraph, CudaMemory, EventTimer, Kernels, raw};

use crate::bench::data::{Content, Segment};
use crate::bench::plan::Effort;
use crate::device::{Call, Device, Samples};

/// The longest that one repetition of a timed graph or loop may take.
const REPETITION_LIMIT: Duration = Duration::from_secs(60);
/// Between two looks at work that is waited for.
const LOOK: Duration = Duration::from_millis(2);
/// `CUDA_ERROR_NOT_READY`: what a wait that ran out of time reports.
const NOT_READY: i32 = 600;
/// Elements of a stretch of poison.
const POISON_SEED: u64 = 0xdead_beef;

/// One GPU of this process.
pub struct CudaDevice {
    memory: CudaMemory,
    kernels: std::sync::Arc<Kernels>,
    mismatches: DeviceAddr,
}

impl CudaDevice {
    /// The GPU `ordinal` of those that this process may see; `reserve`: the bytes of its memory that are taken at once, and
    /// that all buffers then come out of.
    ///
    /// # Errors
    /// When it, or the compiled kernels, cannot be used.
    pub fn open(ordinal: usize, reserve: Option<usize>) -> Result<Self> {
        let memory = CudaMemory::new(ordinal)
            .and_then(|memory| match reserve {
                Some(bytes) => memory.with_reserve(bytes),
                None => Ok(memory),
            })
            .with_context(|| format!("using GPU {ordinal}"))?;
        let kernels =
            Kernels::load(memory.context()).context("loading the kernels that make and check data")?;
        let mismatches = memory.allocate(2 * size_of::<u64>())?;
        Ok(Self { memory, kernels, mismatches })
    }

    fn capture(&self, calls: usize, op: Call<'_>) -> comm_core::Result<CapturedGraph> {
        self.memory.capture(|| (0..calls).try_for_each(|_| op()))
    }
}

impl Device for CudaDevice {
    fn memory(&self) -> &dyn DeviceMemory {
        &self.memory
    }

    unsafe fn fill(&self, buffer: DeviceAddr, data: &Pattern, dtype: DType, segment: &Segment) -> Result<()> {
        let Content::Of { rank, first } = segment.content else {
            bail!("a rank sends its own elements, not reduced ones");
        };
        let at = buffer.offset((segment.offset * dtype.size()) as u64);
        // SAFETY: the caller vouches for the segment; the stream is this memory's own.
        unsafe { self.kernels.fill(at, segment.count, dtype, data, rank, first, self.memory.stream())? };
        Ok(())
    }

    unsafe fn wrong(
        &self,
        buffer: DeviceAddr,
        data: &Pattern,
        dtype: DType,
        segment: &Segment,
    ) -> Result<u64> {
        let at = buffer.offset((segment.offset * dtype.size()) as u64);
        let (expected, first) = segment.content.expected();
        let stream = self.memory.stream();
        let mut words = [0_u8; 16];
        // SAFETY: the caller vouches for the segment; the two words were allocated for this in `open`, and this
        // method's use of them ends with the download.
        unsafe {
            self.kernels.verify_reset(self.mismatches, stream)?;
            self.kernels.verify(
                at,
                segment.count,
                dtype,
                data,
                expected,
                first,
                0,
                self.mismatches,
                stream,
            )?;
            self.memory.download(&mut words, self.mismatches)?;
        }
        let (wrong, first) = words.split_at(8);
        let word = |bytes: &[u8]| bytes.iter().rev().fold(0_u64, |word, &byte| word << 8 | u64::from(byte));
        Ok(Mismatches::from_words([word(wrong), word(first)]).wrong)
    }

    unsafe fn poison(&self, buffer: DeviceAddr, bytes: usize) -> Result<()> {
        let data = Pattern::new(POISON_SEED, None, 1);
        // SAFETY: the caller vouches for the range; the stream is this memory's own.
        unsafe { self.kernels.fill(buffer, bytes, DType::U8, &data, 0, 0, self.memory.stream())? };
        Ok(())
    }

    unsafe fn copy(&self, to: DeviceAddr, from: DeviceAddr, bytes: usize) -> comm_core::Result<()> {
        let _current = raw::Current::enter(self.memory.context())?;
        // SAFETY: the caller vouches for the ranges; the stream is this memory's own. One row, so its pitch is nothing.
        unsafe { raw::copy_2d((from, bytes), (to, bytes), bytes, 1, self.memory.stream()) }
    }

    fn time(&self, host: &dyn HostComm, effort: &Effort, bytes: u64, op: Call<'_>) -> Result<Samples> {
        let stream = self.memory.stream();
        let iters = effort.gpu_iters(bytes);
        for _ in 0..effort.warmup {
            op()?;
        }
        self.memory.synchronize()?;
        let mut graph = if effort.graph { Some(self.capture(iters, op)?) } else { None };
        let mut timer = EventTimer::new(self.memory.context(), REPETITION_LIMIT)?;
        let mut samples = Samples::default();
        let mut round = || -> comm_core::Result<()> {
            match &mut graph {
                // SAFETY: the stream is this device's own; the operands outlive the round, which is waited for.
                Some(graph) => unsafe { graph.launch(stream) },
                None => (0..iters).try_for_each(|_| op()),
            }
        };
        for _ in 0..2 {
            round()?;
        }
        self.memory.synchronize()?;
        for _ in 0..effort.reps {
            host.barrier(Deadline::after(host.timeout()))?;
            // The first round absorbs the ranks' different starts; the second starts as the first one's operations let
            // all ranks go.
            round()?;
            // SAFETY: the stream is this device's own.
            unsafe { timer.start(stream)? };
            round()?;
            // SAFETY: as above.
            unsafe { timer.stop(stream)? };
            let elapsed = timer.elapsed()?;
            samples.means.push(elapsed.as_secs_f64() * 1e6 / iters as f64);
        }
        self.memory.synchronize()?;
        samples.singles.clone_from(&samples.means);
        Ok(samples)
    }

    fn wait(&self, poll: Call<'_>) -> comm_core::Result<()> {
        let mut timer = EventTimer::new(self.memory.context(), LOOK)?;
        let stream = self.memory.stream();
        // SAFETY: the stream is this device's own.
        unsafe {
            timer.start(stream)?;
            timer.stop(stream)?;
        }
        loop {
            poll()?;
            match timer.elapsed() {
                Err(CommError::Cuda { code: NOT_READY, .. }) => {}
                other => return other.map(|_| ()),
            }
        }
    }

    fn replay(&self, calls: usize, op: Call<'_>, poll: Call<'_>) -> comm_core::Result<()> {
        let mut graph = self.capture(calls, op)?;
        // SAFETY: the stream is this device's own; the operands are the caller's, who keeps them until the wait ends or
        // the communicator is lost.
        unsafe { graph.launch(self.memory.stream())? };
        self.wait(poll)
    }

    fn break_it(&self) -> Result<()> {
        // An address that no allocation can have: the kernel faults, and the fault stays with the context. That is the
        // purpose, so nothing is vouched for here but that the stream is this device's own.
        let nowhere = DeviceAddr(0x10_0000);
        // SAFETY: the driver confines the fault to this process's context, which the test gives up.
        unsafe {
            let data = Pattern::new(POISON_SEED, None, 1);
            self.kernels.fill(nowhere, 1024, DType::U8, &data, 0, 0, self.memory.stream())?;
        }
        Ok(())
    }
}
