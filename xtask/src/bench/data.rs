//! Which data lies where before an operation and which must lie there after it, and the comparison on the host.
//!
//! Every element is a function of (seed, rank, index), small enough that sums and products over 8 ranks are exact in
//! every element type. So the right answer is known without a second implementation of the operation, and data from an
//! earlier operation, which had another seed, does not pass.

use comm_core::{DType, F8E4M3, F8E5M2, ReduceOp};

/// How a run of elements comes about.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Content {
    /// A rank's own elements, from index `first` on.
    Of {
        /// The rank.
        rank: usize,
        /// Index of the first element.
        first: u64,
    },
    /// The reduction of all ranks' elements, from index `first` on.
    Reduced {
        /// The reduction.
        op: ReduceOp,
        /// Ranks.
        world: usize,
        /// Index of the first element.
        first: u64,
    },
}

/// A run of elements in a buffer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Segment {
    /// Elements before it.
    pub offset: usize,
    /// Its elements.
    pub count: usize,
    /// What they are.
    pub content: Content,
}

/// The values of one measured form of an operation.
#[derive(Clone, Copy, Debug)]
pub struct Pattern {
    /// Differs from every other's of the run.
    pub seed: u64,
    /// Element type.
    pub dtype: DType,
    /// The reduction that the elements will go through: products need smaller values than sums.
    pub redop: ReduceOp,
}

impl Pattern {
    fn value(&self, rank: usize, index: u64) -> i64 {
        let mut z = self.seed ^ (rank as u64) << 56 ^ index;
        z = z.wrapping_add(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        let small = match (self.redop, self.dtype) {
            // Products of 8 ranks stay within 2^8.
            (ReduceOp::Prod, _) => return 1 + (z & 1) as i64,
            // 3 or 2 bits of mantissa hold every integer up to 16 or 8.
            (_, DType::F8E4M3 | DType::F8E5M2) => 2,
            // 8 ranks' sum stays below 2^7, which bfloat16 and i8 hold.
            _ => 16,
        };
        (z % small) as i64
    }

    fn expected(&self, content: Content, offset: u64) -> f64 {
        match content {
            Content::Of { rank, first } => self.value(rank, first + offset) as f64,
            Content::Reduced { op, world, first } => {
                let values = (0..world).map(|rank| self.value(rank, first + offset));
                match op {
                    ReduceOp::Sum => values.sum::<i64>() as f64,
                    ReduceOp::Prod => values.product::<i64>() as f64,
                    ReduceOp::Min => values.min().unwrap_or(0) as f64,
                    ReduceOp::Max => values.max().unwrap_or(0) as f64,
                    ReduceOp::Avg if self.dtype.is_float() => values.sum::<i64>() as f64 / world as f64,
                    ReduceOp::Avg => (values.sum::<i64>() / world as i64) as f64,
                }
            }
        }
    }

    /// Writes the content into `bytes`, from its first element on.
    pub fn fill(&self, bytes: &mut [u8], content: Content) {
        let size = self.dtype.size();
        for (index, element) in bytes.chunks_exact_mut(size).enumerate() {
            write(self.dtype, self.expected(content, index as u64), element);
        }
    }

    /// Counts the elements of `bytes` that are not the content.
    ///
    /// An average may differ from the exact quotient by one rounding of each of its steps: a library may divide before
    /// it adds.
    pub fn wrong(&self, bytes: &[u8], content: Content) -> u64 {
        let size = self.dtype.size();
        let inexact = matches!(content, Content::Reduced { op: ReduceOp::Avg, .. }) && self.dtype.is_float();
        let mut right = [0_u8; 8];
        let mut wrong = 0;
        for (index, element) in bytes.chunks_exact(size).enumerate() {
            let expected = self.expected(content, index as u64);
            write(self.dtype, expected, &mut right[..size]);
            if element != &right[..size]
                && !(inexact && (read(self.dtype, element) - expected).abs() <= expected.abs() * slack(self.dtype))
            {
                wrong += 1;
            }
        }
        wrong
    }
}

/// The relative error that an average may have: a rounding for each of 8 ranks.
fn slack(dtype: DType) -> f64 {
    8.0 * match dtype {
        DType::F64 => f64::EPSILON,
        DType::F32 => f64::from(f32::EPSILON),
        DType::F16 => 2_f64.powi(-10),
        DType::BF16 => 2_f64.powi(-7),
        DType::F8E4M3 => 2_f64.powi(-3),
        DType::F8E5M2 => 2_f64.powi(-2),
        _ => 0.0,
    }
}

fn write(dtype: DType, value: f64, element: &mut [u8]) {
    match dtype {
        DType::F64 => element.copy_from_slice(&value.to_le_bytes()),
        DType::F32 => element.copy_from_slice(&(value as f32).to_le_bytes()),
        DType::F16 => element.copy_from_slice(&half::f16::from_f64(value).to_le_bytes()),
        DType::BF16 => element.copy_from_slice(&half::bf16::from_f64(value).to_le_bytes()),
        DType::F8E4M3 => element[0] = F8E4M3::from_f64(value).to_bits(),
        DType::F8E5M2 => element[0] = F8E5M2::from_f64(value).to_bits(),
        DType::I8 => element.copy_from_slice(&(value as i64 as i8).to_le_bytes()),
        DType::U8 => element.copy_from_slice(&(value as i64 as u8).to_le_bytes()),
        DType::I32 => element.copy_from_slice(&(value as i32).to_le_bytes()),
        DType::U32 => element.copy_from_slice(&(value as u32).to_le_bytes()),
        DType::I64 => element.copy_from_slice(&(value as i64).to_le_bytes()),
        DType::U64 => element.copy_from_slice(&(value as u64).to_le_bytes()),
    }
}

/// Reads a floating-point element. Integers, which are compared bit by bit, read as NaN.
pub fn read(dtype: DType, element: &[u8]) -> f64 {
    match (dtype, element) {
        (DType::F64, &[a, b, c, d, e, f, g, h]) => f64::from_le_bytes([a, b, c, d, e, f, g, h]),
        (DType::F32, &[a, b, c, d]) => f64::from(f32::from_le_bytes([a, b, c, d])),
        (DType::F16, &[a, b]) => half::f16::from_le_bytes([a, b]).to_f64(),
        (DType::BF16, &[a, b]) => half::bf16::from_le_bytes([a, b]).to_f64(),
        (DType::F8E4M3, &[a]) => F8E4M3::from_bits(a).to_f64(),
        (DType::F8E5M2, &[a]) => F8E5M2::from_bits(a).to_f64(),
        _ => f64::NAN,
    }
}

/// Writes values of a floating-point type, for operands that are no pattern.
pub fn encode(dtype: DType, values: impl Iterator<Item = f64>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for value in values {
        let mut element = [0; 8];
        write(dtype, value, &mut element[..dtype.size()]);
        bytes.extend_from_slice(&element[..dtype.size()]);
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reductions_are_exact_in_every_type_and_a_wrong_element_is_counted() {
        for dtype in DType::ALL {
            for op in ReduceOp::ALL {
                let pattern = Pattern { seed: 7, dtype, redop: op };
                let content = Content::Reduced { op, world: 8, first: 5 };
                let mut bytes = vec![0; 100 * dtype.size()];
                pattern.fill(&mut bytes, content);
                assert_eq!(pattern.wrong(&bytes, content), 0);
                for index in 0..100 {
                    let value = pattern.expected(content, index);
                    let element = &bytes[index as usize * dtype.size()..][..dtype.size()];
                    assert!(
                        !dtype.is_float() || op == ReduceOp::Avg || read(dtype, element) == value,
                        "{dtype} {op}: {value} is not exact"
                    );
                }
                bytes[3 * dtype.size()..4 * dtype.size()].fill(0x5b);
                assert_eq!(pattern.wrong(&bytes, content), 1, "{dtype} {op}");
            }
        }
    }

    #[test]
    fn another_seed_or_rank_does_not_pass() {
        let pattern = Pattern { seed: 7, dtype: DType::BF16, redop: ReduceOp::Sum };
        let content = Content::Of { rank: 1, first: 0 };
        let mut bytes = vec![0; 2000];
        pattern.fill(&mut bytes, content);
        assert!(Pattern { seed: 8, ..pattern }.wrong(&bytes, content) > 800);
        assert!(pattern.wrong(&bytes, Content::Of { rank: 0, first: 0 }) > 800);
        assert_eq!(pattern.wrong(&bytes[20..], Content::Of { rank: 1, first: 10 }), 0);
    }
}
