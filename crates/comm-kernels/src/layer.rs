//! The small kernels of a decoder layer, bf16: random weights, attention over one's own token, the gated activation.
//!
//! For examples and benchmarks that need a model around their collectives; matrix products are not made here. Each
//! kernel's function on the host stands beside its launcher, so that a machine without a GPU computes the same model.

use std::fmt;
use std::sync::Arc;

use comm_core::{CommError, DType, DeviceAddr, Result, StreamHandle, check};
use cudarc::driver::CudaContext;
use half::bf16;

use crate::kernels::parameters;
use crate::module::{Function, Module};
use crate::pattern;

const THREADS: u32 = 256;
/// The most blocks of a launch: enough to fill any device; the kernels loop.
const MAX_BLOCKS: u64 = 2048;
/// Elements of an access of 16 bytes.
const WIDTH: usize = 8;

/// A block of a random matrix: each element follows from the seed and its place in the whole matrix, so that a rank's
/// shard and the whole matrix agree.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct UniformBlock {
    /// Rows of the block.
    pub rows: usize,
    /// Columns of the block.
    pub columns: usize,
    /// The block's first row in the whole matrix.
    pub first_row: usize,
    /// The block's first column in the whole matrix.
    pub first_column: usize,
    /// Columns of the whole matrix.
    pub whole_columns: usize,
    /// Different seeds give unrelated matrices.
    pub seed: u64,
    /// Elements are uniform in `-scale..scale`.
    pub scale: f32,
}

impl UniformBlock {
    /// The index of the block's element in the whole matrix.
    fn index(&self, row: usize, column: usize) -> u64 {
        ((self.first_row + row) * self.whole_columns + self.first_column + column) as u64
    }

    /// The block's elements, row by row: the same bits as [`LayerKernels::uniform`] makes.
    pub fn values(self) -> impl Iterator<Item = bf16> {
        (0..self.rows).flat_map(move |row| (0..self.columns).map(move |column| self.value(row, column)))
    }

    fn value(&self, row: usize, column: usize) -> bf16 {
        const ONE: i32 = 1 << 23;
        let hash = pattern::hash(self.seed, 0, self.index(row, column));
        // 24 bits, as the kernel takes them.
        let number = (hash >> 40) as i32 - ONE;
        bf16::from_f32(number as f32 / ONE as f32 * self.scale)
    }
}

/// The heads of an attention, of one rank or of all.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Heads {
    /// Query heads.
    pub query: usize,
    /// Key/value heads; each serves the same number of query heads.
    pub key_value: usize,
    /// Elements of a head. A multiple of 8.
    pub size: usize,
}

impl Heads {
    /// Elements of a row of queries, keys and values.
    #[must_use]
    pub const fn qkv(&self) -> usize {
        (self.query + 2 * self.key_value) * self.size
    }

    /// Where a row's element `at` of attention's output comes from, in its row of queries, keys and values.
    #[must_use]
    pub const fn value_of(&self, at: usize) -> usize {
        let group = self.query / self.key_value;
        (self.query + self.key_value) * self.size + at / (self.size * group) * self.size + at % self.size
    }

    fn check(&self) -> Result<()> {
        let groups = self.key_value > 0 && self.query > 0 && self.query.is_multiple_of(self.key_value);
        if groups && self.size > 0 && self.size.is_multiple_of(WIDTH) {
            return Ok(());
        }
        Err(CommError::invalid(
            "heads",
            format!(
                "{self:?}: query heads must be a multiple of key/value heads, and a head's size one of {WIDTH}"
            ),
        ))
    }
}

/// `silu(gate) * up`, rounded: what [`LayerKernels::silu_mul`] computes, but for the last bits of the exponential.
#[must_use]
pub fn silu_mul(gate: bf16, up: bf16) -> bf16 {
    let gate = gate.to_f32();
    bf16::from_f32(gate / (1.0 + (-gate).exp()) * up.to_f32())
}

/// The kernels, loaded into one context.
pub struct LayerKernels {
    context: Arc<CudaContext>,
    uniform: Function,
    attend_self: Function,
    silu_mul: Function,
}

impl fmt::Debug for LayerKernels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LayerKernels").field("ordinal", &self.context.ordinal()).finish_non_exhaustive()
    }
}

impl LayerKernels {
    /// Loads the kernels into `context`.
    ///
    /// # Errors
    /// [`CommError::Library`] when no compiled kernels are found, or they do not fit this program or this GPU;
    /// [`CommError::Cuda`] otherwise.
    pub fn load(context: &Arc<CudaContext>) -> Result<Self> {
        let module = Module::load(context, "layer")?;
        Ok(Self {
            uniform: module.function("uniform_bf16")?,
            attend_self: module.function("attend_self_bf16")?,
            silu_mul: module.function("silu_mul_bf16")?,
            context: Arc::clone(context),
        })
    }

    /// Writes a block of a random matrix to `out`, row-major and dense.
    ///
    /// # Errors
    /// [`CommError::InvalidArgument`], [`CommError::Cuda`].
    ///
    /// # Safety
    /// `rows * columns` elements at `out` are valid for writes on this device until the work has completed, nothing else
    /// uses them in that time, and `stream` is a live stream of this context.
    pub unsafe fn uniform(&self, out: DeviceAddr, block: &UniformBlock, stream: StreamHandle) -> Result<()> {
        let elements = elements("block", block.rows, block.columns)?;
        check::span("out", out, elements, DType::BF16)?;
        if elements == 0 {
            return Ok(());
        }
        let (rows, columns, first) = (block.rows as u64, block.columns as u64, block.index(0, 0));
        let (pitch, seed, scale) = (block.whole_columns as u64, block.seed, block.scale);
        let mut parameters = parameters![out, rows, columns, first, pitch, seed, scale];
        let grid = rows.min(MAX_BLOCKS) as u32;
        // SAFETY: these are `uniform_bf16`'s parameters, in order; it writes `rows * columns` elements at `out`, for which
        // the caller vouches.
        unsafe { self.uniform.launch(&self.context, grid, (THREADS, 1), stream, &mut parameters) }
    }

    /// Attention of every token to itself alone: `out[t, i] = qkv[t, heads.value_of(i)]`. The softmax of one score is 1,
    /// so that queries and keys do not matter. `qkv` is `[tokens, heads.qkv()]`, `out` `[tokens, query * size]`; both are
    /// aligned to 16.
    ///
    /// # Errors
    /// [`CommError::InvalidArgument`], [`CommError::Cuda`].
    ///
    /// # Safety
    /// `qkv` is valid for reads and `out` for writes on this device until the work has completed, nothing else touches
    /// them in that time, and `stream` is a live stream of this context.
    pub unsafe fn attend_self(
        &self,
        qkv: DeviceAddr,
        out: DeviceAddr,
        tokens: usize,
        heads: Heads,
        stream: StreamHandle,
    ) -> Result<()> {
        heads.check()?;
        operands(("qkv", qkv, heads.qkv()), ("out", out, heads.query * heads.size), tokens)?;
        if tokens == 0 {
            return Ok(());
        }
        let vectors = |elements: usize| (elements / WIDTH) as u32;
        let (row, values) = (vectors(heads.qkv()), vectors(heads.value_of(0)));
        let (queries, head) = (vectors(heads.query * heads.size), vectors(heads.size));
        let group = (heads.query / heads.key_value) as u32;
        let count = tokens as u64;
        let mut parameters = parameters![qkv, out, count, row, values, queries, head, group];
        let grid = blocks(count * u64::from(queries));
        // SAFETY: these are `attend_self_bf16`'s parameters, in order; it reads and writes the two matrices, for which the
        // caller vouches, in vectors, to which they are aligned.
        unsafe { self.attend_self.launch(&self.context, grid, (THREADS, 1), stream, &mut parameters) }
    }

    /// The gated activation: `out[t, i] = silu(both[t, i]) * both[t, width + i]`. `both` is `[tokens, 2 * width]`, `out`
    /// `[tokens, width]`; both are aligned to 16, and `width` is a multiple of 8.
    ///
    /// # Errors
    /// [`CommError::InvalidArgument`], [`CommError::Cuda`].
    ///
    /// # Safety
    /// As for [`attend_self`](Self::attend_self), with `both` and `out`.
    pub unsafe fn silu_mul(
        &self,
        both: DeviceAddr,
        out: DeviceAddr,
        tokens: usize,
        width: usize,
        stream: StreamHandle,
    ) -> Result<()> {
        if !width.is_multiple_of(WIDTH) {
            return Err(CommError::invalid("width", format!("{width} is no multiple of {WIDTH}")));
        }
        operands(("both", both, 2 * width), ("out", out, width), tokens)?;
        if tokens == 0 || width == 0 {
            return Ok(());
        }
        let (count, vectors) = (tokens as u64, (width / WIDTH) as u32);
        let mut parameters = parameters![both, out, count, vectors];
        let grid = blocks(count * u64::from(vectors));
        // SAFETY: these are `silu_mul_bf16`'s parameters, in order; it reads and writes the two matrices, for which the
        // caller vouches, in vectors, to which they are aligned.
        unsafe { self.silu_mul.launch(&self.context, grid, (THREADS, 1), stream, &mut parameters) }
    }
}

/// Blocks for `units` threads' work.
fn blocks(units: u64) -> u32 {
    units.div_ceil(u64::from(THREADS)).clamp(1, MAX_BLOCKS) as u32
}

fn elements(argument: &'static str, rows: usize, columns: usize) -> Result<usize> {
    rows.checked_mul(columns)
        .ok_or_else(|| CommError::invalid(argument, format!("{rows} x {columns} overflows")))
}

/// A matrix as an argument: its name, first element and columns.
type Matrix = (&'static str, DeviceAddr, usize);

/// Checks that two matrices of `rows` rows exist, are aligned for vectors, and lie apart.
fn operands(from: Matrix, to: Matrix, rows: usize) -> Result<()> {
    let mut ranges = Vec::with_capacity(2);
    for (argument, addr, columns) in [from, to] {
        if u32::try_from(columns).is_err() {
            return Err(CommError::invalid(argument, format!("{columns} columns are too many")));
        }
        ranges.push(check::span(argument, addr, elements(argument, rows, columns)?, DType::BF16)?);
        if !addr.is_aligned_to(16) {
            return Err(CommError::invalid(argument, format!("{addr:?} is not aligned to 16 bytes")));
        }
    }
    if ranges[0].start < ranges[1].end && ranges[1].start < ranges[0].end {
        return Err(CommError::invalid(to.0, format!("overlaps {}", from.0)));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const WHOLE: UniformBlock = UniformBlock {
        rows: 40,
        columns: 56,
        first_row: 0,
        first_column: 0,
        whole_columns: 56,
        seed: 3,
        scale: 0.5,
    };

    #[test]
    fn a_block_holds_the_whole_matrix_s_values() {
        let whole: Vec<bf16> = WHOLE.values().collect();
        let block = UniformBlock { rows: 7, columns: 9, first_row: 30, first_column: 47, ..WHOLE };
        for (at, value) in block.values().enumerate() {
            assert_eq!(value, whole[(30 + at / 9) * 56 + 47 + at % 9]);
        }
    }

    #[test]
    fn values_fill_their_range_evenly() {
        let values: Vec<f64> = WHOLE.values().map(f64::from).collect();
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        let square = values.iter().map(|value| value * value).sum::<f64>() / values.len() as f64;
        assert!(values.iter().all(|value| (-0.5..=0.5).contains(value)));
        assert!(mean.abs() < 0.02 && (square - 0.25 / 3.0).abs() < 0.005, "{mean} {square}");
        let other = UniformBlock { seed: 4, ..WHOLE };
        assert!(WHOLE.values().zip(other.values()).filter(|(a, b)| a == b).count() < 100);
    }

    #[test]
    fn heads_take_the_values_of_their_group() {
        let heads = Heads { query: 4, key_value: 2, size: 8 };
        assert_eq!(heads.qkv(), 64);
        assert_eq!([0, 7, 8, 15, 16, 31].map(|at| heads.value_of(at)), [48, 55, 48, 55, 56, 63]);
        assert!(heads.check().is_ok());
        assert!(Heads { query: 3, ..heads }.check().is_err());
        assert!(Heads { size: 4, ..heads }.check().is_err());
    }

    #[test]
    fn operands_are_checked() {
        let at = |addr| DeviceAddr(addr);
        assert!(operands(("a", at(4096), 16), ("b", at(4096 + 64), 8), 2).is_ok());
        assert!(operands(("a", at(4096), 16), ("b", at(4096 + 48), 8), 2).is_err());
        assert!(operands(("a", at(4096), 16), ("b", at(8200), 8), 2).is_err());
    }
}
