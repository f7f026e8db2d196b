//! Kernels that need no other rank: norm, mark, and those of a decoder layer. (The ones that make and check data run all the
//! time.)

use anyhow::Result;
use comm_core::{CommError, DeviceAddr, DeviceMemory, ReduceOp, RmsNormArgs};
use comm_kernels::Mark;
use comm_kernels::capture::position;
use comm_kernels::layer::{Heads, LayerKernels, UniformBlock};

use super::{Bench, FLOATS};
use crate::events::{CaseResult, Event};
use crate::rank::RankContext;

impl Bench {
    /// Kernels that need no other rank.
    pub(super) fn local(&mut self, context: &RankContext) -> Result<()> {
        context.events.phase("kernels of one rank");
        let stream = self.memory.stream();
        // SAFETY: the words are this object's.
        unsafe { self.kernels.verify_reset(self.words, stream)? };
        let bytes = 64 << 10;
        let (one, two, sum) =
            (self.memory.allocate(bytes)?, self.memory.allocate(bytes)?, self.memory.allocate(bytes)?);
        for dtype in FLOATS {
            // By single elements, by 16 bytes, and in more than one block.
            for (hidden, skip) in [(100, 1), (264, 0), (4096, 0)] {
                let size = dtype.size() as u64;
                let place = |base: DeviceAddr, row: u64| base.offset(row * 16_384 + skip * size);
                for matrix in [one, two, sum] {
                    self.fill(matrix, bytes / dtype.size(), dtype, Some(ReduceOp::Sum))?;
                }
                let args = RmsNormArgs {
                    input: place(one, 0),
                    residual: place(two, 0),
                    residual_out: place(two, 0),
                    bias: Some(place(sum, 0)),
                    weight: place(sum, 1),
                    output: place(one, 0),
                    tokens: if hidden < 4096 { 3 } else { 1 },
                    hidden,
                    dtype,
                    eps: 1e-5,
                    weight_offset: 1.0,
                };
                // SAFETY: every matrix has three rows of 264 or one of 4096 elements of four bytes, and one more.
                unsafe { self.kernels.rmsnorm(&args, stream)? };
            }
        }
        self.poison(one, 64)?;
        let mark = Mark { counter: one, slots: one.offset(16), slot_count: 2, adds: 1, tag: 7 };
        // SAFETY: the counter is the first eight bytes, the slots lie behind it.
        unsafe { self.kernels.mark(mark, stream)? };
        // Both of a node's marks.
        let mut beside = self.memory.capture(|| {
            // SAFETY: as above, also in the replay, which the wait below ends; this thread alone captures.
            unsafe {
                let Some(here) = position(stream)? else {
                    return Err(CommError::invalid("stream", "it is not capturing"));
                };
                let node = self.kernels.mark_beside(mark, None, here.clone())?;
                self.kernels.mark_beside(mark, Some(node), here).map(drop)
            }
        })?;
        // SAFETY: the stream is the memory's own.
        unsafe { beside.launch(stream)? };
        let layer = LayerKernels::load(self.memory.context())?;
        let block = UniformBlock {
            rows: 2,
            columns: 64,
            first_row: 1,
            first_column: 8,
            whole_columns: 128,
            seed: 1,
            scale: 1.0,
        };
        let heads = Heads { query: 4, key_value: 2, size: 8 };
        // SAFETY: two rows of 64 elements are read, and fewer written.
        unsafe {
            layer.uniform(one, &block, stream)?;
            layer.attend_self(one, two, 2, heads, stream)?;
            layer.silu_mul(one, two, 2, 32, stream)?;
        }
        self.memory.synchronize()?;
        for buffer in [one, two, sum] {
            // SAFETY: all work has completed.
            unsafe { self.memory.free(buffer)? };
        }
        context.events.emit(Event::Case { name: "local".into(), result: CaseResult::Passed });
        Ok(())
    }
}
