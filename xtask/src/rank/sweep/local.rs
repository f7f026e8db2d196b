//! Kernels that need no other rank: norms, copies of rows, marks, and those of a decoder layer. (The ones that make and
//! check data run all the time.)

use anyhow::{Context, Result};
use comm_core::{CommError, DType, DeviceMemory};
use comm_kernels::Mark;
use comm_kernels::capture::position;
use comm_kernels::layer::{self, Heads, LayerKernels, UniformBlock};
use comm_kernels::pattern::Expected;

use super::host::{self, NormData};
use super::norms::{Call, Form};
use super::{Bench, FLOATS};
use crate::rank::RankContext;

/// By single elements, by 16 bytes, and in more than one block: rows, columns, and elements that operands are off.
const NORMS: [(usize, usize, usize); 3] = [(3, 100, 1), (3, 264, 0), (1, 4096, 0)];

impl Bench {
    /// Kernels that need no other rank.
    pub(super) fn local(&mut self, context: &RankContext) -> Result<()> {
        context.events.phase("kernels of one rank");
        // SAFETY: the words are this object's.
        unsafe { self.kernels.verify_reset(self.words, self.memory.stream())? };
        self.rmsnorms().context("norms")?;
        self.rows_of_bytes().context("copies of rows")?;
        self.marks().context("marks")?;
        self.layer().context("the layer's kernels")?;
        self.report(context, "kernels of one rank", None)
    }

    fn rmsnorms(&mut self) -> Result<()> {
        let operands = self.operands(20 << 10)?;
        let (kernels, stream) = (std::sync::Arc::clone(&self.kernels), self.memory.stream());
        let call: Call<'_> = &|args, quantized| {
            // SAFETY: every buffer holds more than the largest matrix, and lives until the rank's end.
            unsafe {
                match quantized {
                    Some(quantized) => kernels.rmsnorm_quantized(args, quantized, stream),
                    None => kernels.rmsnorm(args, stream),
                }
            }
        };
        for dtype in FLOATS {
            for (rows, hidden, skip) in NORMS {
                for in_place in [false, true] {
                    let seed = self.next_seed();
                    let (rank, ranks, bias) = (0, 1, in_place);
                    let data = NormData { seed, rank, ranks, hidden, bias, weight_offset: 1.0 };
                    self.norm(&operands, data, Form { rows, dtype, in_place, skip }, call)?;
                }
            }
        }
        Ok(())
    }

    /// Copies by every unit, and one that a word keeps from being made.
    fn rows_of_bytes(&mut self) -> Result<()> {
        let (rows, pitch, stream) = (5_usize, 320_usize, self.memory.stream());
        let (from, to) = (self.memory.allocate(rows * pitch)?, self.memory.allocate(rows * pitch)?);
        let words = self.memory.allocate(8)?;
        self.put(words, &[0, 0, 0, 0, 1, 0, 0, 0])?;
        for width in [64, 72, 68, 66, 63] {
            let data = self.fill(from, rows * pitch, DType::U8, None)?;
            for stopped in [false, true] {
                self.poison(to, rows * pitch)?;
                let mut expected = self.fetch(to, rows * pitch)?;
                let unless = words.offset(if stopped { 4 } else { 0 });
                // SAFETY: both buffers hold the rows and live until the rank's end, as do the words.
                unsafe {
                    self.kernels.copy_rows_unless(unless, (from, pitch), (to, pitch), width, rows, stream)?;
                }
                let found = self.fetch(to, rows * pitch)?;
                for row in (0..rows).filter(|_| !stopped) {
                    let at = row * pitch;
                    self.expect(
                        to.offset(at as u64),
                        width,
                        DType::U8,
                        &data,
                        (Expected::Sent(self.rank), at),
                    )?;
                    // Between the rows nothing is written.
                    expected[at..at + width].copy_from_slice(&found[at..at + width]);
                }
                let what = format!("rows of {width} bytes, stopped: {stopped}");
                self.must_hold(&what, "the rest", host::other_bits(DType::U8, &expected, &found));
            }
        }
        Ok(())
    }

    /// A mark in a stream, and a node of two beside one.
    fn marks(&mut self) -> Result<()> {
        let stream = self.memory.stream();
        let counter = self.memory.allocate(48)?;
        self.put(counter, &[0; 48])?;
        let mark = Mark { counter, slots: counter.offset(16), slot_count: 2, adds: 1, tag: 7 };
        // SAFETY: the counter is the first eight bytes, the slots lie behind it; they live until the rank's end.
        unsafe { self.kernels.mark(mark, stream)? };
        let mut beside = self.memory.capture(|| {
            // SAFETY: as above, also in the replay, which the download below waits for; this thread alone captures.
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
        let found = self.fetch(counter, 48)?;
        // Three passes of one each: the count in the low 48 bits and the passes above, and the last two in the slots.
        let words = [3 << 48 | 3_u64, 0, 2, 7, 3, 7];
        let expected: Vec<u8> = words.into_iter().flat_map(u64::to_le_bytes).collect();
        self.must_hold("three marks", "counter and slots", host::other_bits(DType::U64, &expected, &found));
        Ok(())
    }

    fn layer(&mut self) -> Result<()> {
        let (dtype, stream) = (DType::BF16, self.memory.stream());
        let kernels = LayerKernels::load(self.memory.context())?;
        let (one, two) = (self.memory.allocate(4096)?, self.memory.allocate(4096)?);
        let block = UniformBlock {
            rows: 3,
            columns: 64,
            first_row: 1,
            first_column: 8,
            whole_columns: 128,
            seed: 1,
            scale: 12.0,
        };
        let numbers: Vec<half::bf16> = block.values().collect();
        let heads = Heads { query: 4, key_value: 2, size: 8 };
        let (tokens, row, width) = (block.rows, block.columns, block.columns / 2);
        // SAFETY: here and below, three rows of 64 elements are written, read, and fewer written; both buffers live until
        // the rank's end.
        unsafe { kernels.uniform(one, &block, stream)? };
        let expected: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
        let found = self.fetch(one, expected.len())?;
        self.must_hold("random matrix", "block", host::other_bits(dtype, &expected, &found));

        // SAFETY: see above.
        unsafe { kernels.attend_self(one, two, tokens, heads, stream)? };
        let values = (0..tokens * width).map(|at| numbers[at / width * row + heads.value_of(at % width)]);
        let expected: Vec<u8> = values.flat_map(half::bf16::to_le_bytes).collect();
        let found = self.fetch(two, expected.len())?;
        self.must_hold("attention", "result", host::other_bits(dtype, &expected, &found));

        // SAFETY: see above.
        unsafe { kernels.silu_mul(one, two, tokens, width, stream)? };
        let product = |at: usize| {
            let gate = at / width * row + at % width;
            layer::silu_mul(numbers[gate], numbers[gate + width]).to_f32()
        };
        let expected: Vec<f32> = (0..tokens * width).map(product).collect();
        let found = self.fetch(two, expected.len() * dtype.size())?;
        // All but the last bits of the exponential are the host's.
        self.must_hold("gated activation", "result", host::difference(dtype, &expected, &found, 1));
        Ok(())
    }
}
