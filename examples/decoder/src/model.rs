//! The model: a loop over decoder layers, of which every rank holds a shard.
//!
//! ```text
//! x, residual = tokens                              hidden
//! every layer:
//!     qkv  = x * Wqkv           split by heads      (64 + 8 + 8) * 128 / world
//!     a    = attention(qkv)     stand-in, see below 64 * 128 / world
//!     p    = a * Wo             partial sums        hidden
//!     x, residual = norm(all_reduce(p) + residual)           <- communication
//!     g, u = x * Wgate_up       split by columns    2 * 28672 / world
//!     p    = (silu(g) * u) * Wdown  partial sums    hidden
//!     x, residual = norm(all_reduce(p) + residual)           <- communication
//! ```
//!
//! Attention stands in for itself over a context of one token, the token itself: no cache is needed, and its cost in a
//! real model depends on the length of the context, which is no matter of communication. Rotary embedding is left out.

use std::sync::Arc;

use comm_core::{DType, DeviceAddr, DeviceComm, OpKind, OpQuery, ReduceOp, Result, RmsNormArgs};
use comm_kernels::layer::UniformBlock;
use half::bf16;

use crate::device::{Device, Linear};
use crate::shape::{Shard, column_block, row_blocks};

const DTYPE: DType = DType::BF16;
const EPS: f32 = 1e-5;
/// The seed of the tokens' hidden states; those of the weights follow it.
const SEED: u64 = 70;

/// How a block's partial sums become the next block's input.
#[derive(Clone, Copy)]
pub enum Reduction<'a> {
    /// Every rank goes on with its own sums, as if they were all: wrong, and what the rest of a layer costs.
    None,
    /// An all-reduce, then residual and norm by a kernel of the device.
    AllReduce(&'a dyn DeviceComm),
    /// All in one operation of the communicator.
    Fused(&'a dyn DeviceComm),
}

impl Reduction<'_> {
    /// Whether the output is the model's.
    pub fn is_right(self) -> bool {
        !matches!(self, Self::None)
    }

    /// The communicator's failure, if there is one: on a device it comes to light after the call.
    ///
    /// # Errors
    /// That failure.
    pub fn poll(self) -> Result<()> {
        match self {
            Self::None => Ok(()),
            Self::AllReduce(comm) | Self::Fused(comm) => comm.poll(),
        }
    }
}

/// One layer's weights, of one rank.
struct Layer {
    qkv: Linear,
    attention_out: Linear,
    gate_up: Linear,
    down: Linear,
    /// After attention, and after the MLP (the next layer's first norm).
    norms: [DeviceAddr; 2],
}

/// A rank's shard of the model, and the buffers of a forward pass of up to `max_tokens` tokens.
pub struct Model<'a> {
    device: &'a dyn Device,
    shard: Shard,
    layers: Vec<Layer>,
    /// The tokens' hidden states, of magnitude 1 and so their own norm: what the first layer starts from. Read only.
    embedding: DeviceAddr,
    /// The running hidden states and their norm, the pass's output.
    residual: DeviceAddr,
    normed: DeviceAddr,
    /// Within a block.
    qkv: DeviceAddr,
    attended: DeviceAddr,
    gate_up: DeviceAddr,
    gated: DeviceAddr,
    buffers: Vec<DeviceAddr>,
}

impl<'a> Model<'a> {
    /// Makes the shard's weights, the same for a place in the whole matrices whatever the number of ranks.
    ///
    /// # Errors
    /// When the device has too little memory, or fails.
    pub fn new(device: &'a dyn Device, shard: Shard, layers: usize, max_tokens: usize) -> Result<Self> {
        let hidden = shard.shape.hidden;
        let mut buffers = Buffers { device, all: Vec::new() };
        let mut made = Vec::with_capacity(layers);
        for layer in 0..layers as u64 {
            let seed = |matrix: u64| SEED + 1 + layer * 6 + matrix;
            let split = (shard.rank, shard.world);
            let attended = shard.shape.heads.query * shard.shape.heads.size;
            made.push(Layer {
                qkv: buffers.linear(&row_blocks(&shard.qkv_rows(), hidden, seed(0)))?,
                attention_out: buffers.linear(&[column_block(hidden, attended, split, seed(1))])?,
                gate_up: buffers.linear(&row_blocks(&shard.gate_up_rows(), hidden, seed(2)))?,
                down: buffers.linear(&[column_block(hidden, shard.shape.intermediate, split, seed(3))])?,
                norms: [buffers.norm_weight(hidden, seed(4))?, buffers.norm_weight(hidden, seed(5))?],
            });
        }
        let tokens = UniformBlock {
            rows: max_tokens,
            columns: hidden,
            first_row: 0,
            first_column: 0,
            whole_columns: hidden,
            seed: SEED,
            // Uniform between plus and minus this has a mean square of 1.
            scale: 3_f32.sqrt(),
        };
        Ok(Self {
            embedding: buffers.filled(&[tokens])?,
            residual: buffers.matrix(max_tokens, hidden)?,
            normed: buffers.matrix(max_tokens, hidden)?,
            qkv: buffers.matrix(max_tokens, shard.heads().qkv())?,
            attended: buffers.matrix(max_tokens, shard.attended())?,
            gate_up: buffers.matrix(max_tokens, 2 * shard.intermediate())?,
            gated: buffers.matrix(max_tokens, shard.intermediate())?,
            device,
            shard,
            layers: made,
            buffers: buffers.all,
        })
    }

    /// Enqueues a forward pass of `tokens` tokens, at most as many as the model was made for. `partial` holds
    /// `[tokens, hidden]` and is best memory of the reduction's communicator.
    ///
    /// # Errors
    /// The device's and the communicator's.
    ///
    /// # Safety
    /// `partial` is valid until the pass has completed, and nothing else uses it in that time.
    pub unsafe fn forward(&self, tokens: usize, partial: DeviceAddr, reduction: Reduction<'_>) -> Result<()> {
        let (device, heads) = (self.device, self.shard.heads());
        let (mut input, mut residual) = (self.embedding, self.embedding);
        for layer in &self.layers {
            // SAFETY: all operands are buffers of this model, made for its shard and at least `tokens` rows, or `partial`,
            // for which the caller vouches; the device works on them in order.
            unsafe {
                device.linear(&layer.qkv, input, self.qkv, tokens)?;
                device.attend_self(self.qkv, self.attended, tokens, heads)?;
                device.linear(&layer.attention_out, self.attended, partial, tokens)?;
                self.reduce_and_norm(reduction, partial, residual, layer.norms[0], tokens)?;
                (input, residual) = (self.normed, self.residual);

                device.linear(&layer.gate_up, input, self.gate_up, tokens)?;
                device.silu_mul(self.gate_up, self.gated, tokens, self.shard.intermediate())?;
                device.linear(&layer.down, self.gated, partial, tokens)?;
                self.reduce_and_norm(reduction, partial, residual, layer.norms[1], tokens)?;
            }
        }
        Ok(())
    }

    /// Where a block ends: `residual = sum over the ranks of partial + residual`, and its norm. This is the whole of what
    /// a model does with a communicator.
    ///
    /// # Safety
    /// As [`forward`](Self::forward).
    unsafe fn reduce_and_norm(
        &self,
        reduction: Reduction<'_>,
        partial: DeviceAddr,
        residual: DeviceAddr,
        weight: DeviceAddr,
        tokens: usize,
    ) -> Result<()> {
        let hidden = self.shard.shape.hidden;
        let args = RmsNormArgs {
            input: partial,
            residual,
            residual_out: self.residual,
            bias: None,
            weight,
            output: self.normed,
            tokens,
            hidden,
            dtype: DTYPE,
            eps: EPS,
            weight_offset: 0.0,
        };
        let stream = self.device.memory().stream();
        // SAFETY: as in `forward`: the operands are valid for `tokens` rows.
        unsafe {
            match reduction {
                Reduction::None => self.device.rmsnorm(&args),
                Reduction::AllReduce(comm) => {
                    comm.all_reduce(partial, partial, tokens * hidden, DTYPE, ReduceOp::Sum, stream)?;
                    self.device.rmsnorm(&args)
                }
                Reduction::Fused(comm) => comm.all_reduce_rmsnorm(&args, stream),
            }
        }
    }

    /// The last pass's output, row by row, after it has completed.
    ///
    /// # Errors
    /// When the pass failed.
    pub fn output(&self, tokens: usize) -> Result<Vec<bf16>> {
        let mut bytes = vec![0; tokens * self.shard.shape.hidden * DTYPE.size()];
        // SAFETY: the buffer holds at least that many rows.
        unsafe { self.device.memory().download(&mut bytes, self.normed)? };
        Ok(bytes.chunks_exact(2).map(|pair| bf16::from_le_bytes([pair[0], pair[1]])).collect())
    }

    /// Gives the memory back, after the work has completed.
    ///
    /// # Errors
    /// When the device failed.
    pub fn free(self) -> Result<()> {
        let memory = self.device.memory();
        memory.synchronize()?;
        for buffer in self.buffers {
            // SAFETY: the buffer is this model's own, and the work on it has ended.
            unsafe { memory.free(buffer)? };
        }
        Ok(())
    }
}

/// Makes a model's buffers and remembers them.
struct Buffers<'a> {
    device: &'a dyn Device,
    all: Vec<DeviceAddr>,
}

impl Buffers<'_> {
    fn matrix(&mut self, rows: usize, columns: usize) -> Result<DeviceAddr> {
        let addr = self.device.memory().allocate(rows * columns * DTYPE.size())?;
        self.all.push(addr);
        Ok(addr)
    }

    /// A matrix of the blocks' rows, one block after the other.
    fn filled(&mut self, blocks: &[UniformBlock]) -> Result<DeviceAddr> {
        let rows = blocks.iter().map(|block| block.rows).sum();
        let columns = blocks.first().map_or(0, |block| block.columns);
        let addr = self.matrix(rows, columns)?;
        let mut row = 0;
        for block in blocks {
            let at = addr.offset((row * columns * DTYPE.size()) as u64);
            // SAFETY: the matrix was made for the rows of all blocks, which are equally wide.
            unsafe { self.device.uniform(at, block)? };
            row += block.rows;
        }
        Ok(addr)
    }

    fn linear(&mut self, blocks: &[UniformBlock]) -> Result<Linear> {
        let weight = self.filled(blocks)?;
        let inputs = blocks.first().map_or(0, |block| block.columns);
        Ok(Linear { weight, inputs, outputs: blocks.iter().map(|block| block.rows).sum() })
    }

    /// A norm's weights, around 1.
    fn norm_weight(&mut self, hidden: usize, seed: u64) -> Result<DeviceAddr> {
        let block = column_block(1, hidden, (0, 1), seed);
        let around_one = UniformBlock { scale: 0.25, ..block }.values().map(|value| 1.0 + value.to_f32());
        let bytes: Vec<u8> = around_one.flat_map(|value| bf16::from_f32(value).to_le_bytes()).collect();
        let addr = self.matrix(1, hidden)?;
        // SAFETY: the buffer is as long.
        unsafe { self.device.memory().upload(addr, &bytes)? };
        Ok(addr)
    }
}

/// A buffer for partial sums: memory of the communicator, which its operations reach without staging, where it has such.
pub struct Partial {
    comm: Option<Arc<dyn DeviceComm>>,
    /// The first element.
    pub addr: DeviceAddr,
}

impl Partial {
    /// `[tokens, hidden]` elements. Collective, if there is a communicator.
    ///
    /// # Errors
    /// When the memory is not to be had.
    pub fn new(
        device: &dyn Device,
        comm: Option<&Arc<dyn DeviceComm>>,
        tokens: usize,
        hidden: usize,
    ) -> Result<Self> {
        let bytes = tokens * hidden * DTYPE.size();
        let query = OpQuery::new(OpKind::Allocate, DType::U8, bytes);
        let comm = comm.filter(|comm| comm.supports(&query).is_supported()).cloned();
        let addr = match &comm {
            Some(comm) => comm.allocate(bytes)?,
            None => device.memory().allocate(bytes)?,
        };
        Ok(Self { comm, addr })
    }

    /// Gives it back. Collective, if there is a communicator.
    ///
    /// # Errors
    /// When it is lost.
    ///
    /// # Safety
    /// No work that uses it is running, on any rank.
    pub unsafe fn free(self, device: &dyn Device) -> Result<()> {
        // SAFETY: as the caller vouches.
        unsafe {
            match &self.comm {
                Some(comm) => comm.free(self.addr),
                None => device.memory().free(self.addr),
            }
        }
    }
}
