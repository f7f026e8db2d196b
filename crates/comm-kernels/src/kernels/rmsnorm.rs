//! Residual + bias + RMSNorm.

use comm_core::{CommError, DType, DeviceAddr, NormQuantization, Result, RmsNormArgs, StreamHandle, check};

use super::{Kernels, parameters};
use crate::module::{Function, Module};

const WARP: usize = 32;

/// Threads of a block that holds several rows, a warp each.
const SHARED_BLOCK: usize = 256;

/// The most threads of a block; what the kernels' launch bounds say.
const MAX_THREADS: usize = 1024;

/// The kernels by element type (`f32`, `f16`, `bf16`), for 16-byte accesses and for single elements.
pub(super) struct Variants {
    vector: [Function; 3],
    scalar: [Function; 3],
}

impl Variants {
    /// The kernels with an fp8 result.
    pub(super) fn load_fp8(module: &Module) -> Result<Self> {
        Ok(Self {
            vector: [
                module.function("rmsnorm_fp8_f32_vector")?,
                module.function("rmsnorm_fp8_f16_vector")?,
                module.function("rmsnorm_fp8_bf16_vector")?,
            ],
            scalar: [
                module.function("rmsnorm_fp8_f32_scalar")?,
                module.function("rmsnorm_fp8_f16_scalar")?,
                module.function("rmsnorm_fp8_bf16_scalar")?,
            ],
        })
    }

    fn of(&self, shape: Shape, dtype: DType) -> Result<&Function> {
        let variants = if shape.vector { &self.vector } else { &self.scalar };
        match dtype {
            DType::F32 => Ok(&variants[0]),
            DType::F16 => Ok(&variants[1]),
            DType::BF16 => Ok(&variants[2]),
            other => {
                Err(CommError::invalid("dtype", format!("RMSNorm takes f32, f16 and bf16, not {other}")))
            }
        }
    }

    pub(super) fn load(module: &Module) -> Result<Self> {
        Ok(Self {
            vector: [
                module.function("rmsnorm_f32_vector")?,
                module.function("rmsnorm_f16_vector")?,
                module.function("rmsnorm_bf16_vector")?,
            ],
            scalar: [
                module.function("rmsnorm_f32_scalar")?,
                module.function("rmsnorm_f16_scalar")?,
                module.function("rmsnorm_bf16_scalar")?,
            ],
        })
    }
}

/// How a norm is launched.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Shape {
    /// Whether 16 bytes are accessed at a time.
    vector: bool,
    /// Threads per row.
    threads: u32,
    /// Rows per block.
    rows: u32,
}

fn shape(args: &RmsNormArgs, quantized: Option<&NormQuantization>) -> Shape {
    let width = 16 / args.dtype.size();
    let operands = [args.input, args.residual, args.residual_out, args.weight, args.output];
    let vector = args.hidden.is_multiple_of(width)
        && operands.into_iter().chain(args.bias).all(|address: DeviceAddr| address.is_aligned_to(16))
        && quantized.is_none_or(|quantized| quantized.output.is_aligned_to(width as u64));
    let accesses = if vector { args.hidden / width } else { args.hidden };
    // One access per thread and row where that is possible: the time of a short batch is the time of one row.
    let threads = accesses.clamp(1, MAX_THREADS).next_multiple_of(WARP);
    let rows = if threads == WARP { SHARED_BLOCK / WARP } else { 1 };
    // Both are at most 1024.
    Shape { vector, threads: threads as u32, rows: rows as u32 }
}

impl Kernels {
    /// Residual + bias + RMSNorm as [`RmsNormArgs`] documents, of an `input` that already holds the sums over the
    /// ranks: what remains after an all-reduce. Accumulates in `f32`.
    ///
    /// Accesses 16 bytes at a time where all addresses and rows are aligned to that.
    ///
    /// # Errors
    /// [`CommError::InvalidArgument`], [`CommError::Cuda`].
    ///
    /// # Safety
    /// The ranges that `args` names are valid for reads and writes on this device until the work has completed,
    /// nothing else writes what is read or touches what is written in that time, and `stream` is a live stream of this
    /// context.
    pub unsafe fn rmsnorm(&self, args: &RmsNormArgs, stream: StreamHandle) -> Result<()> {
        if check::rmsnorm(args)? == 0 {
            return Ok(());
        }
        let shape = shape(args, None);
        let function = self.rmsnorm.of(shape, args.dtype)?;
        let RmsNormArgs { input, residual, residual_out, weight, output, eps, weight_offset, .. } = *args;
        let bias = args.bias.unwrap_or(DeviceAddr::NULL);
        let (tokens, hidden) = (args.tokens as u64, args.hidden as u64);
        let mut parameters = parameters![
            input,
            residual,
            residual_out,
            bias,
            weight,
            output,
            tokens,
            hidden,
            eps,
            weight_offset
        ];
        let grid = self.norm_grid(args.tokens, shape);
        // SAFETY: these are the kernel's parameters, in order, and the shape is one that it is written for; it touches
        // what `args` names, for which the caller vouches.
        unsafe { function.launch(&self.context, grid, (shape.threads, shape.rows), stream, &mut parameters) }
    }

    fn norm_grid(&self, tokens: usize, shape: Shape) -> u32 {
        let resident = (2048 / (shape.threads * shape.rows)).max(1);
        let blocks = tokens.div_ceil(shape.rows as usize);
        u32::try_from(blocks).unwrap_or(u32::MAX).clamp(1, self.multiprocessors * resident * 4)
    }

    /// The same with an fp8 result, as [`NormQuantization`] documents.
    ///
    /// # Errors
    /// [`CommError::InvalidArgument`], [`CommError::Cuda`].
    ///
    /// # Safety
    /// As [`rmsnorm`](Self::rmsnorm), for the fp8 result and its scales too.
    pub unsafe fn rmsnorm_quantized(
        &self,
        args: &RmsNormArgs,
        quantized: &NormQuantization,
        stream: StreamHandle,
    ) -> Result<()> {
        if check::rmsnorm_quantized(args, quantized)? == 0 {
            return Ok(());
        }
        let shape = shape(args, Some(quantized));
        let function = self.rmsnorm_fp8.of(shape, args.dtype)?;
        let RmsNormArgs { input, residual, residual_out, weight, eps, weight_offset, .. } = *args;
        let bias = args.bias.unwrap_or(DeviceAddr::NULL);
        let output = if quantized.keep_unquantized { args.output } else { DeviceAddr::NULL };
        let (tokens, hidden) = (args.tokens as u64, args.hidden as u64);
        let (to, scale) = (quantized.output, quantized.scale.addr());
        let per_token = u32::from(quantized.scale.is_per_token());
        let mut parameters = parameters![
            input,
            residual,
            residual_out,
            bias,
            weight,
            output,
            tokens,
            hidden,
            eps,
            weight_offset,
            to,
            scale,
            per_token
        ];
        let grid = self.norm_grid(args.tokens, shape);
        // SAFETY: as above.
        unsafe { function.launch(&self.context, grid, (shape.threads, shape.rows), stream, &mut parameters) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(hidden: usize, dtype: DType) -> RmsNormArgs {
        RmsNormArgs {
            input: DeviceAddr(0x1000),
            residual: DeviceAddr(0x2000),
            residual_out: DeviceAddr(0x3000),
            bias: None,
            weight: DeviceAddr(0x4000),
            output: DeviceAddr(0x5000),
            tokens: 1,
            hidden,
            dtype,
            eps: 1e-6,
            weight_offset: 0.0,
        }
    }

    #[test]
    fn shapes_suit_the_row() {
        let of = |hidden, dtype| shape(&args(hidden, dtype), None);
        assert_eq!(of(8192, DType::BF16), Shape { vector: true, threads: 1024, rows: 1 });
        assert_eq!(of(4096, DType::F16), Shape { vector: true, threads: 512, rows: 1 });
        assert_eq!(of(128, DType::BF16), Shape { vector: true, threads: 32, rows: 8 });
        assert_eq!(of(1, DType::F32), Shape { vector: false, threads: 32, rows: 8 });
        assert_eq!(of(100, DType::BF16), Shape { vector: false, threads: 128, rows: 1 });
        assert_eq!(of(1_000_000, DType::F32), Shape { vector: true, threads: 1024, rows: 1 });
        let odd = RmsNormArgs { bias: Some(DeviceAddr(0x6002)), ..args(4096, DType::BF16) };
        assert!(!shape(&odd, None).vector);
        let quantized = |output| NormQuantization {
            output: DeviceAddr(output),
            scale: comm_core::NormQuantScale::PerTensor(DeviceAddr(0x7004)),
            keep_unquantized: true,
        };
        let of = |output| shape(&args(4096, DType::BF16), Some(&quantized(output))).vector;
        assert!(of(0x8008) && !of(0x8004));
    }
}
