//! What the kernels should compute, computed slowly on the host: the yardstick of tests, here and in crates that build
//! on the kernels. No CUDA is needed.

use comm_core::{CommError, DType, ReduceOp, Result};

use crate::pattern::{Number, by_dtype};

/// Reduces `inputs` into `output`, all `[elements of dtype]` in host memory: in the given order, accumulated as
/// [`ReduceOp`] says and rounded once.
///
/// # Errors
/// [`CommError::InvalidArgument`] without inputs, or when the lengths differ or are no whole number of elements.
pub fn reduce(inputs: &[&[u8]], output: &mut [u8], dtype: DType, op: ReduceOp) -> Result<()> {
    let count = u32::try_from(inputs.len()).ok().filter(|&count| count > 0);
    let Some(count) = count else {
        return Err(CommError::invalid("inputs", format!("{} buffers given", inputs.len())));
    };
    if !output.len().is_multiple_of(dtype.size()) || inputs.iter().any(|input| input.len() != output.len()) {
        return Err(CommError::invalid(
            "inputs",
            format!("all must be as long as the output, whole elements of {dtype}"),
        ));
    }
    by_dtype!(dtype, reduce_as(inputs, output, op, count));
    Ok(())
}

fn reduce_as<T: Number>(inputs: &[&[u8]], output: &mut [u8], op: ReduceOp, count: u32) {
    let size = size_of::<T>();
    for (i, place) in output.chunks_exact_mut(size).enumerate() {
        let mut operands = inputs.iter().map(|input| {
            let mut raw = [0; 8];
            raw[..size].copy_from_slice(&input[i * size..][..size]);
            T::from_bits64(u64::from_le_bytes(raw)).widen()
        });
        let Some(first) = operands.next() else { return };
        let sum = operands.fold(first, |acc, next| T::combine(op, acc, next));
        place.copy_from_slice(&T::finish(op, sum, count).bits64().to_le_bytes()[..size]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_round_once_in_the_given_order() {
        // In bf16, 256 + 1 rounds back to 256: only an f32 accumulator arrives at 258.
        let bytes = |value: f32| half::bf16::from_f32(value).to_le_bytes();
        let (large, one) = (bytes(256.0), bytes(1.0));
        let mut sum = [0; 2];
        reduce(&[&large, &one, &one], &mut sum, DType::BF16, ReduceOp::Sum).unwrap();
        assert_eq!(sum, bytes(258.0));
    }

    #[test]
    fn averages_truncate_and_nan_wins() {
        let mut out = [0];
        reduce(&[&[0xff], &[0xfe]], &mut out, DType::I8, ReduceOp::Avg).unwrap();
        assert_eq!(out, [0xff], "-3 / 2");
        let (nan, one) = (f32::NAN.to_le_bytes(), 1_f32.to_le_bytes());
        for inputs in [[&nan[..], &one], [&one, &nan]] {
            for op in [ReduceOp::Min, ReduceOp::Max] {
                let mut out = [0; 4];
                reduce(&inputs, &mut out, DType::F32, op).unwrap();
                assert!(f32::from_le_bytes(out).is_nan());
            }
        }
    }

    #[test]
    fn lengths_are_checked() {
        assert!(reduce(&[], &mut [0; 4], DType::F32, ReduceOp::Sum).is_err());
        assert!(reduce(&[&[0; 4], &[0; 8]], &mut [0; 4], DType::F32, ReduceOp::Sum).is_err());
        assert!(reduce(&[&[0; 3]], &mut [0; 3], DType::F32, ReduceOp::Sum).is_err());
    }
}
