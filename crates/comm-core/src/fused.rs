//! Operands of the operations that have more of them than fit in a parameter list.

use crate::addr::DeviceAddr;
use crate::dtype::DType;

/// Operands of the fused all-reduce + residual + bias + RMSNorm.
///
/// With `s[t, h]` the sum over the ranks of `input[t, h]`, accumulated in `f32` in rank order:
///
/// ```text
/// r[t, h]            = round(s[t, h] + residual[t, h] + bias[h])
/// residual_out[t, h] = r[t, h]
/// output[t, h]       = round(r[t, h] * rsqrt(mean_h(r[t, h]^2) + eps) * (weight[h] + weight_offset))
/// ```
///
/// The arithmetic is in `f32`; `round` rounds to `dtype` to nearest, ties to even. A backend that sums in an
/// operation of its own may round `s` to `dtype` first. All matrices are row-major and dense. All ranks pass the same
/// `residual`, `bias` and `weight` values, and get the same bits in `residual_out` and `output`.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct RmsNormArgs {
    /// This rank's partial sums, `[tokens, hidden]`. Read only, unless `output` is the same address.
    pub input: DeviceAddr,
    /// `[tokens, hidden]`, read.
    pub residual: DeviceAddr,
    /// `[tokens, hidden]`, written. The same address as `residual` updates it in place.
    pub residual_out: DeviceAddr,
    /// `[hidden]`, or `None` for no bias.
    pub bias: Option<DeviceAddr>,
    /// `[hidden]`.
    pub weight: DeviceAddr,
    /// `[tokens, hidden]`, written. May be the same address as `input`.
    pub output: DeviceAddr,
    /// Rows. May be zero.
    pub tokens: usize,
    /// Columns. At least one.
    pub hidden: usize,
    /// Element type of every operand: `f32`, `f16` or `bf16`.
    pub dtype: DType,
    /// Added to the mean square. Finite and not negative.
    pub eps: f32,
    /// Added to every weight: 1 for zero-centred weights (Gemma's convention), otherwise 0.
    pub weight_offset: f32,
}

/// Operands of the two-group fused norm with uneven tokens: reduce-scatter in one group, residual + bias + RMSNorm on
/// the rows this rank then owns, all-gather in another group.
///
/// `hidden_states` is a `[rows, hidden]` matrix. The reduce group's rows begin at row `reduce_first_row`, and its rank
/// `i` owns the next `reduce_tokens[i]` of them; likewise for the gather group. A rank's own rows are the same rows in
/// both groupings. On return the gather group's rows of `hidden_states` hold the normalised values; other rows of the
/// reduce group are undefined.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct TwoGroupNormArgs<'a> {
    /// Row 0 of the `[rows, hidden]` matrix: partial sums before, normalised values after.
    pub hidden_states: DeviceAddr,
    /// First row of the residual of the rows that this rank owns, `[own tokens, hidden]`, updated in place.
    pub residual: DeviceAddr,
    /// `[hidden]`, or `None` for no bias.
    pub bias: Option<DeviceAddr>,
    /// `[hidden]`.
    pub weight: DeviceAddr,
    /// Row of `hidden_states` at which the reduce group's rows begin.
    pub reduce_first_row: usize,
    /// Rows owned by each rank of the reduce group, in its rank order.
    pub reduce_tokens: &'a [usize],
    /// Row of `hidden_states` at which the gather group's rows begin.
    pub gather_first_row: usize,
    /// Rows owned by each rank of the gather group, in its rank order.
    pub gather_tokens: &'a [usize],
    /// Columns. At least one.
    pub hidden: usize,
    /// Element type of every operand: `f32`, `f16` or `bf16`.
    pub dtype: DType,
    /// Added to the mean square. Finite and not negative.
    pub eps: f32,
    /// Added to every weight: 1 for zero-centred weights, otherwise 0.
    pub weight_offset: f32,
}

/// An fp8 result of a fused norm, besides the one in the operands' type or instead of it.
///
/// With `y` the result in the operands' type, rounded to it, and `e4m3` as [`quantize`](crate::quantize) defines it:
///
/// ```text
/// PerTensor:  q[t, h] = e4m3(y[t, h] * (1 / scale))
/// PerToken:   scale[t] = a / 448,  q[t, h] = e4m3(y[t, h] * (448 / a)),  a = max(max_h |y[t, h]|, 2^-100)
/// ```
///
/// with every operation in `f32`, rounded to nearest. So `q * scale` is what the next layer's fp8 GEMM stands for, and the
/// fp8 result is the same whether the unquantised one is kept or not.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct NormQuantization {
    /// `e4m3` elements, row-major and dense, written: `[tokens, hidden]`, or in the two-group form a matrix with the rows
    /// of `hidden_states`. Overlaps no other operand.
    pub output: DeviceAddr,
    /// Where the scale is, or goes.
    pub scale: NormQuantScale,
    /// Whether the unquantised result is wanted too. If not, the operand where it would be (`output`, or `hidden_states`)
    /// is scratch memory: as large as ever, undefined afterwards; `output` may still be `input`.
    pub keep_unquantized: bool,
}

/// The scale of a norm's fp8 result.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NormQuantScale {
    /// One `f32`, read: finite, positive, and equal on all ranks.
    PerTensor(DeviceAddr),
    /// `f32` scales, written: one for each row of the fp8 result.
    PerToken(DeviceAddr),
}

impl NormQuantScale {
    /// The address of the scale, or of the first one.
    #[must_use]
    pub const fn addr(self) -> DeviceAddr {
        match self {
            Self::PerTensor(addr) | Self::PerToken(addr) => addr,
        }
    }

    /// Whether every row has a scale of its own.
    #[must_use]
    pub const fn is_per_token(self) -> bool {
        matches!(self, Self::PerToken(_))
    }
}

impl NormQuantization {
    /// The same for the rows from `row` on, of `hidden` elements each.
    #[must_use]
    pub const fn from_row(self, row: usize, hidden: usize) -> Self {
        let scale = match self.scale {
            NormQuantScale::PerTensor(addr) => NormQuantScale::PerTensor(addr),
            NormQuantScale::PerToken(addr) => NormQuantScale::PerToken(addr.offset(row as u64 * 4)),
        };
        Self { output: self.output.offset((row * hidden) as u64), scale, ..self }
    }
}

/// Shape of an [`all_gather_2d`](crate::DeviceComm::all_gather_2d): every rank contributes a block of `height` rows of
/// `width` elements, and all ranks end with all blocks.
///
/// Element `(row, col)` of rank `r`'s block comes to `recv + r * rank_stride + row * row_pitch + col` (in elements).
/// With `rank_stride = width` and `row_pitch = size * width` the blocks lie side by side as columns of one matrix;
/// with `row_pitch = width` and `rank_stride = height * width` it is an ordinary all-gather.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Block2d {
    /// Rows of a block.
    pub height: usize,
    /// Elements in a row of a block.
    pub width: usize,
    /// Elements from one row to the next in `recv`. At least `width`.
    pub row_pitch: usize,
    /// Elements from one rank's block to the next one's in `recv`.
    pub rank_stride: usize,
    /// Elements from one row to the next in `send`. At least `width`.
    pub send_pitch: usize,
    /// Element type.
    pub dtype: DType,
    /// Whether this is the first of a run of calls on the same buffers with no other work between them. A backend may
    /// synchronise the ranks before the first only. `true` is always right.
    pub first: bool,
    /// Whether this is the last of such a run. A backend may leave the other ranks' data incomplete until the last.
    /// `true` is always right.
    pub last: bool,
}
