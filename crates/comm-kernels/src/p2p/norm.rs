//! Launchers of the fused all-reduce + residual + bias + RMSNorm.

use comm_core::{CommError, DeviceAddr, Result, RmsNormArgs, StreamHandle};

use super::functions::float_index;
use super::{Link, P2pKernels, Shape, check_shape};
use crate::kernels::parameters;

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
    fn new(args: &RmsNormArgs) -> Result<Self> {
        let hidden =
            u32::try_from(args.hidden).map_err(|_| CommError::invalid("hidden", "exceeds 32 bits"))?;
        Ok(Self {
            input: args.input,
            residual: args.residual,
            residual_out: args.residual_out,
            bias: args.bias.unwrap_or(DeviceAddr::NULL),
            weight: args.weight,
            output: args.output,
            tokens: args.tokens as u64,
            hidden,
            eps: args.eps,
            weight_offset: args.weight_offset,
            padding: 0,
        })
    }
}

#[allow(clippy::missing_safety_doc, reason = "as for the other launchers")]
impl P2pKernels {
    /// The fused norm in one hop: a cluster of `cluster` (1, 2, 4 or 8) blocks of `block` threads a row. `link` is the
    /// packet channel's; `tokens * cluster * block` is at most its `slot_packs`, and `cluster * block` at least the
    /// 12-byte packs of a row.
    ///
    /// # Errors
    /// [`CommError::InvalidArgument`], [`CommError::Cuda`].
    pub unsafe fn norm_one_shot(
        &self,
        link: &Link,
        args: &RmsNormArgs,
        (cluster, block): (u32, u32),
        stream: StreamHandle,
    ) -> Result<()> {
        let grid = u32::try_from(args.tokens).ok().and_then(|tokens| tokens.checked_mul(cluster));
        let shape = Shape { grid: grid.unwrap_or(u32::MAX), block };
        check_shape(shape, link.slot_packs.into())?;
        let packs = (args.hidden * args.dtype.size()).div_ceil(12);
        if packs > cluster as usize * block as usize {
            return Err(CommError::invalid(
                "shape",
                format!("{packs} packs a row, {cluster} x {block} threads"),
            ));
        }
        let function = &self.functions.norm_one_shot[float_index(args.dtype)?];
        let args = NormArgs::new(args)?;
        let mut parameters = parameters![*link, args];
        // SAFETY: these are the kernel's parameters; the caller vouches for what they name.
        unsafe {
            function.launch_ahead(&self.context, shape.grid, shape.block, cluster, stream, &mut parameters)
        }
    }

    /// The fused norm in two hops. `link` is the Lamport channel's; `shape.block` is a multiple of 32 and at least the
    /// 16-byte packs of a rank's share of a row.
    ///
    /// # Errors
    /// [`CommError::InvalidArgument`], [`CommError::Cuda`].
    pub unsafe fn norm_two_shot(
        &self,
        link: &Link,
        args: &RmsNormArgs,
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
        let function = &self.functions.norm_two_shot[float_index(args.dtype)?];
        let args = NormArgs::new(args)?;
        // SAFETY: as above.
        unsafe { self.launch(function, shape, stream, &mut parameters![*link, args]) }
    }
}
