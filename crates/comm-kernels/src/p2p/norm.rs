//! Launchers of the fused all-reduce + residual + bias + RMSNorm.

use std::ffi::c_void;

use comm_core::{CommError, DeviceAddr, NormQuantization, Result, RmsNormArgs, StreamHandle};

use super::functions::float_index;
use super::{Link, P2pKernels, Shape, Wire, check_shape};
use crate::kernels::parameters;
use crate::module::Function;

/// `NormArgs` of `norm.cuh`; pointers are alike for all element types.
#[repr(C)]
#[derive(Clone, Copy)]
struct NormArgs {
    input: DeviceAddr,
    residual: DeviceAddr,
    residual_out: DeviceAddr,
    bias: DeviceAddr,
    weight: DeviceAddr,
    output: DeviceAddr,
    tokens: u64,
    hidden: u32,
    eps: f32,
    weight_offset: f32,
    padding: u32,
}

impl NormArgs {
    fn new(args: &RmsNormArgs, quantized: Option<&NormQuantization>) -> Result<Self> {
        let hidden =
            u32::try_from(args.hidden).map_err(|_| CommError::invalid("hidden", "exceeds 32 bits"))?;
        Ok(Self {
            input: args.input,
            residual: args.residual,
            residual_out: args.residual_out,
            bias: args.bias.unwrap_or(DeviceAddr::NULL),
            weight: args.weight,
            output: match quantized {
                Some(quantized) if !quantized.keep_unquantized => DeviceAddr::NULL,
                _ => args.output,
            },
            tokens: args.tokens as u64,
            hidden,
            eps: args.eps,
            weight_offset: args.weight_offset,
            padding: 0,
        })
    }
}

/// `NormQuantized` of `norm.cuh`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Quantized {
    output: DeviceAddr,
    scale: DeviceAddr,
    per_token: u32,
    padding: u32,
}

impl Quantized {
    fn new(quantized: &NormQuantization) -> Self {
        Self {
            output: quantized.output,
            scale: quantized.scale.addr(),
            per_token: u32::from(quantized.scale.is_per_token()),
            padding: 0,
        }
    }
}

#[allow(clippy::missing_safety_doc, reason = "as for the other launchers")]
impl P2pKernels {
    /// The fused norm, with an fp8 result if `quantized` asks for one, in one hop: a cluster of `cluster` (1, 2, 4 or 8)
    /// blocks of `block` threads a row. `link` is the wire's channel's; `tokens * cluster * block` is at most its
    /// `slot_packs`, and `cluster * block` at least the packs of a row.
    ///
    /// # Errors
    /// [`CommError::InvalidArgument`], [`CommError::Cuda`].
    pub unsafe fn norm_one_shot(
        &self,
        (link, wire): (&Link, Wire),
        args: &RmsNormArgs,
        quantized: Option<&NormQuantization>,
        (cluster, block): (u32, u32),
        stream: StreamHandle,
    ) -> Result<()> {
        let grid = u32::try_from(args.tokens).ok().and_then(|tokens| tokens.checked_mul(cluster));
        let shape = Shape { grid: grid.unwrap_or(u32::MAX), block };
        check_shape(shape, link.slot_packs.into())?;
        let packs = (args.hidden * args.dtype.size()).div_ceil(wire.payload());
        if packs > cluster as usize * block as usize {
            return Err(CommError::invalid(
                "shape",
                format!("{packs} packs a row, {cluster} x {block} threads"),
            ));
        }
        let index = float_index(args.dtype)?;
        let args = NormArgs::new(args, quantized)?;
        let launch = |function: &Function, parameters: &mut [*mut c_void]| {
            // SAFETY: these are the kernel's parameters; the caller vouches for what they name.
            unsafe {
                let threads = (shape.grid, shape.block);
                function.launch_after(&self.context, threads, cluster, self.overlap, stream, parameters)
            }
        };
        match quantized.map(Quantized::new) {
            Some(to) => launch(
                &self.functions.norm_one_shot_fp8[wire as usize][index],
                &mut parameters![*link, args, to],
            ),
            None => {
                launch(&self.functions.norm_one_shot[wire as usize][index], &mut parameters![*link, args])
            }
        }
    }

    /// The same in two hops. `link` is the Lamport channel's; `shape.block` is a multiple of 32 and at least the
    /// 16-byte packs of a rank's share of a row.
    ///
    /// # Errors
    /// [`CommError::InvalidArgument`], [`CommError::Cuda`].
    pub unsafe fn norm_two_shot(
        &self,
        link: &Link,
        args: &RmsNormArgs,
        quantized: Option<&NormQuantization>,
        shape: Shape,
        stream: StreamHandle,
    ) -> Result<()> {
        check_shape(shape, link.slot_packs.into())?;
        let packs = (args.hidden * args.dtype.size()).div_ceil(16).div_ceil(self.world);
        if packs > shape.block as usize || !shape.block.is_multiple_of(32) {
            return Err(CommError::invalid(
                "shape",
                format!("{packs} packs a slice, {} threads", shape.block),
            ));
        }
        let index = float_index(args.dtype)?;
        let args = NormArgs::new(args, quantized)?;
        // SAFETY: as above.
        let launch = |function: &Function, parameters: &mut [*mut c_void]| unsafe {
            self.launch(function, shape, stream, parameters)
        };
        match quantized.map(Quantized::new) {
            Some(to) => launch(&self.functions.norm_two_shot_fp8[index], &mut parameters![*link, args, to]),
            None => launch(&self.functions.norm_two_shot[index], &mut parameters![*link, args]),
        }
    }
}
