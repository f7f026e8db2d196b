//! What typed calls take besides slices: numbers and shapes, without what the slices' types say already.

use crate::addr::DeviceAddr;
use crate::dtype::{DType, Element, F8E4M3};
use crate::fused::{Block2d, TwoGroupNormArgs};

/// The numbers of an RMSNorm; see [`RmsNormArgs`](crate::RmsNormArgs).
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct NormScale {
    /// Added to the mean square. Finite and not negative.
    pub eps: f32,
    /// Added to every weight: 1 for zero-centred weights (Gemma's convention), otherwise 0.
    pub weight_offset: f32,
}

/// Which rows of the matrix belong to whom in a two-group norm; see [`TwoGroupNormArgs`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TwoGroupRows<'a> {
    /// Row at which the reduce group's rows begin.
    pub reduce_first_row: usize,
    /// Rows owned by each rank of the reduce group, in its rank order.
    pub reduce_tokens: &'a [usize],
    /// Row at which the gather group's rows begin.
    pub gather_first_row: usize,
    /// Rows owned by each rank of the gather group, in its rank order.
    pub gather_tokens: &'a [usize],
}

impl<'a> TwoGroupRows<'a> {
    /// The operation's arguments, but for the addresses.
    pub(super) const fn args(&self, dtype: DType, hidden: usize, scale: NormScale) -> TwoGroupNormArgs<'a> {
        TwoGroupNormArgs {
            hidden_states: DeviceAddr::NULL,
            residual: DeviceAddr::NULL,
            bias: None,
            weight: DeviceAddr::NULL,
            reduce_first_row: self.reduce_first_row,
            reduce_tokens: self.reduce_tokens,
            gather_first_row: self.gather_first_row,
            gather_tokens: self.gather_tokens,
            hidden,
            dtype,
            eps: scale.eps,
            weight_offset: scale.weight_offset,
        }
    }
}

/// The shape of a two-dimensional all-gather, in elements; [`Block2d`] says what comes where. A typed call is a run of its
/// own: it is first and last.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BlockShape {
    /// Rows of a block.
    pub height: usize,
    /// Elements in a row of a block.
    pub width: usize,
    /// From one row to the next in the result. At least `width`.
    pub row_pitch: usize,
    /// From one rank's block to the next one's in the result.
    pub rank_stride: usize,
    /// From one row to the next in what is sent. At least `width`.
    pub send_pitch: usize,
}

impl BlockShape {
    /// Dense blocks of `height` rows of `width` elements, side by side: the columns of a dense matrix that `size` ranks
    /// share.
    #[must_use]
    pub const fn columns(size: usize, height: usize, width: usize) -> Self {
        // One that does not fit into any memory does not fit into the slices either.
        let row_pitch = size.saturating_mul(width);
        Self { height, width, row_pitch, rank_stride: width, send_pitch: width }
    }

    pub(super) const fn block(&self, dtype: DType) -> Block2d {
        let Self { height, width, row_pitch, rank_stride, send_pitch } = *self;
        Block2d { height, width, row_pitch, rank_stride, send_pitch, dtype, first: true, last: true }
    }
}

/// What fp8 results are made of: [`F8E4M3`](crate::F8E4M3), or `u8` for its bits where the owner of the memory does not
/// know the type.
pub trait Fp8Bits: Element {}

impl Fp8Bits for F8E4M3 {}
impl Fp8Bits for u8 {}
