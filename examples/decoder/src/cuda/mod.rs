//! [`Device`] on a GPU: matrix products by cuBLASLt, the rest by this workspace's kernels, time by events around a
//! replayed CUDA graph.

mod gemm;
mod library;

use std::sync::Arc;
use std::time::Duration;

use comm_core::{Deadline, DeviceAddr, DeviceMemory, HostComm, Result, RmsNormArgs};
use comm_kernels::layer::{Heads, LayerKernels, UniformBlock};
use comm_kernels::{CudaMemory, EventTimer, Kernels};

use self::gemm::Gemms;
use crate::device::{Device, Effort, Linear, median};

/// The longest that one sample may take.
const SAMPLE_LIMIT: Duration = Duration::from_secs(60);

/// One GPU of this process.
pub struct CudaDevice {
    // Before the memory, on which they work.
    gemms: Gemms,
    kernels: Arc<Kernels>,
    layer: LayerKernels,
    memory: CudaMemory,
}

impl CudaDevice {
    /// # Errors
    /// Without a driver, such a GPU, compiled kernels or cuBLASLt.
    pub fn open(ordinal: usize) -> Result<Self> {
        let memory = CudaMemory::new(ordinal)?;
        Ok(Self {
            gemms: Gemms::new(&memory)?,
            kernels: Kernels::load(memory.context())?,
            layer: LayerKernels::load(memory.context())?,
            memory,
        })
    }
}

impl Device for CudaDevice {
    fn memory(&self) -> &dyn DeviceMemory {
        &self.memory
    }

    fn name(&self) -> String {
        self.memory.context().name().unwrap_or_else(|_| "GPU".into())
    }

    unsafe fn uniform(&self, out: DeviceAddr, block: &UniformBlock) -> Result<()> {
        // SAFETY: as the caller vouches; the stream is this memory's own. The same holds for the calls below.
        unsafe { self.layer.uniform(out, block, self.memory.stream()) }
    }

    unsafe fn linear(
        &self,
        linear: &Linear,
        input: DeviceAddr,
        output: DeviceAddr,
        tokens: usize,
    ) -> Result<()> {
        // SAFETY: see `uniform`; all products are enqueued on this one stream.
        unsafe { self.gemms.enqueue(linear, (input, output), tokens, self.memory.stream()) }
    }

    unsafe fn attend_self(
        &self,
        qkv: DeviceAddr,
        output: DeviceAddr,
        tokens: usize,
        heads: Heads,
    ) -> Result<()> {
        // SAFETY: see `uniform`.
        unsafe { self.layer.attend_self(qkv, output, tokens, heads, self.memory.stream()) }
    }

    unsafe fn silu_mul(
        &self,
        gate_up: DeviceAddr,
        output: DeviceAddr,
        tokens: usize,
        width: usize,
    ) -> Result<()> {
        // SAFETY: see `uniform`.
        unsafe { self.layer.silu_mul(gate_up, output, tokens, width, self.memory.stream()) }
    }

    unsafe fn rmsnorm(&self, args: &RmsNormArgs) -> Result<()> {
        // SAFETY: see `uniform`.
        unsafe { self.kernels.rmsnorm(args, self.memory.stream()) }
    }

    fn time(
        &self,
        host: &dyn HostComm,
        effort: Effort,
        forward: &dyn Fn() -> Result<()>,
    ) -> Result<Duration> {
        let stream = self.memory.stream();
        // Plans products and loads kernels, which a capture must not.
        forward()?;
        self.memory.synchronize()?;
        let mut graph = self.memory.capture(forward)?;
        let mut timer = EventTimer::new(self.memory.context(), SAMPLE_LIMIT)?;
        let mut samples = Vec::with_capacity(effort.samples);
        for _ in 0..effort.samples {
            host.barrier(Deadline::after(host.timeout()))?;
            // SAFETY: the stream is this memory's own; the model's buffers outlive the replays, which are waited for.
            unsafe {
                // The first pass absorbs the ranks' different starts.
                graph.launch(stream)?;
                timer.start(stream)?;
                for _ in 0..effort.passes {
                    graph.launch(stream)?;
                }
                timer.stop(stream)?;
            }
            samples.push(timer.elapsed()? / effort.passes.max(1) as u32);
        }
        self.memory.synchronize()?;
        Ok(median(samples))
    }
}
