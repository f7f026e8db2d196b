//! The quantised all-reduce, bit by bit against its definition on the host.

use anyhow::Result;
use comm_core::{DType, DeviceComm, DeviceMemory, ReduceOp, quantize};
use comm_kernels::pattern::{self, Pattern};

use super::{Bench, FLOATS, host};

impl Bench {
    /// One element; part of a group; more rows of a slice than there are warps, and a group that is not whole.
    pub(super) fn quantized(&mut self, comm: &dyn DeviceComm) -> Result<()> {
        let counts = [1, 771, 8192 * self.world + 5];
        let bytes = counts[2] * 4 + 16;
        let (send, recv) = (self.memory.allocate(bytes)?, self.memory.allocate(bytes)?);
        for dtype in FLOATS {
            for (turn, count) in counts.into_iter().enumerate() {
                // The second time misaligned.
                let shift = if turn == 1 { dtype.size() as u64 } else { 0 };
                let (send, recv) = (send.offset(shift), recv.offset(shift));
                let data = self.fill(send, count, dtype, Some(ReduceOp::Sum))?;
                self.poison(recv, count * dtype.size())?;
                // SAFETY: both buffers hold `count` elements behind the shift and live until the rank's end.
                unsafe { comm.all_reduce_quantized(send, recv, count, dtype, self.memory.stream())? };
                let found = self.fetch(recv, count * dtype.size())?;
                let expected = expected(&data, count, dtype)?;
                let what = format!("quantised all-reduce of {count} {dtype}");
                self.must_hold(&what, "result", host::other_bits(dtype, &expected, &found));
            }
        }
        Ok(())
    }
}

/// What all ranks get of the elements that each has of `data`.
fn expected(data: &Pattern, count: usize, dtype: DType) -> Result<Vec<u8>> {
    let mut vectors = vec![vec![0; count * dtype.size()]; data.world];
    for (rank, vector) in vectors.iter_mut().enumerate() {
        pattern::fill(vector, dtype, data, rank, 0)?;
    }
    let mut sum = vec![0; count * dtype.size()];
    let sources: Vec<*const u8> = vectors.iter().map(|vector| vector.as_ptr()).collect();
    // SAFETY: `count` elements lie at each of the sources and at the sum, which is none of them; it asks for no alignment.
    unsafe { quantize::sum_host(sum.as_mut_ptr(), &sources, count, dtype)? };
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sum_is_that_of_what_all_ranks_sent_as_fp8() {
        let data = Pattern::new(5, Some(ReduceOp::Sum), 2);
        let values = host::numbers(DType::BF16, &expected(&data, 300, DType::BF16).unwrap());
        let exact: Vec<f32> = (0..300)
            .map(|index| {
                let of = |rank| {
                    let mut element = [0; 2];
                    pattern::fill(&mut element, DType::BF16, &data, rank, index).unwrap();
                    host::numbers(DType::BF16, &element)[0]
                };
                of(0) + of(1)
            })
            .collect();
        // Each rank's part, of up to 8, is within 8 / 28, and what is made of their sum within 16 / 28 of that.
        assert!(values.iter().zip(&exact).all(|(value, exact)| (value - exact).abs() < 32.0 / 28.0 + 1e-3));
        assert_ne!(values, exact, "nothing was quantised");
    }
}
