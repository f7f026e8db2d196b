//! What the model needs of a device, besides a communicator. `cuda` and `on_host` implement it.

use std::time::Duration;

use comm_core::{DeviceAddr, DeviceMemory, HostComm, Result, RmsNormArgs};
use comm_kernels::layer::{Heads, UniformBlock};

/// A matrix of weights, `[outputs, inputs]` row-major as PyTorch's `Linear` holds it: `y = x * transpose(w)`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Linear {
    /// The first element.
    pub weight: DeviceAddr,
    /// Columns.
    pub inputs: usize,
    /// Rows.
    pub outputs: usize,
}

/// How often a forward pass is repeated to be timed.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Samples, of which the median counts.
    pub samples: usize,
    /// Forward passes of a sample, back to back.
    pub passes: usize,
}

/// One rank's device. All matrices are bf16, row-major and dense; the work is enqueued on the stream of its memory, in
/// order, and can be captured in a CUDA graph.
///
/// # Safety
/// For callers: the addresses are those of live buffers of this device that hold what the arguments say, until the work
/// has completed, and no operand that is written overlaps another.
#[allow(clippy::missing_safety_doc, reason = "the trait's Safety section holds for every method")]
pub trait Device {
    /// Memory, stream and copies.
    fn memory(&self) -> &dyn DeviceMemory;

    /// What it is, for the report.
    fn name(&self) -> String;

    /// Writes a block of a random matrix.
    unsafe fn uniform(&self, out: DeviceAddr, block: &UniformBlock) -> Result<()>;

    /// `output = input * transpose(weight)`: `[tokens, inputs]` to `[tokens, outputs]`.
    unsafe fn linear(
        &self,
        linear: &Linear,
        input: DeviceAddr,
        output: DeviceAddr,
        tokens: usize,
    ) -> Result<()>;

    /// Attention of each token to itself alone: `[tokens, heads.qkv()]` to `[tokens, query heads * size]`.
    unsafe fn attend_self(
        &self,
        qkv: DeviceAddr,
        output: DeviceAddr,
        tokens: usize,
        heads: Heads,
    ) -> Result<()>;

    /// `silu(gate) * up`: `[tokens, 2 * width]` to `[tokens, width]`.
    unsafe fn silu_mul(
        &self,
        gate_up: DeviceAddr,
        output: DeviceAddr,
        tokens: usize,
        width: usize,
    ) -> Result<()>;

    /// Residual and RMSNorm of an input that holds the sums over the ranks already.
    unsafe fn rmsnorm(&self, args: &RmsNormArgs) -> Result<()>;

    /// The median time of a forward pass, in the way this device's users would run it. Collective: all ranks of `host`
    /// time the same pass.
    fn time(&self, host: &dyn HostComm, effort: Effort, forward: &dyn Fn() -> Result<()>)
    -> Result<Duration>;
}

/// The middle of the samples.
pub fn median(mut samples: Vec<Duration>) -> Duration {
    samples.sort();
    samples.get(samples.len() / 2).copied().unwrap_or_default()
}
