//! Which data lies where before an operation and which must lie there after it.
//!
//! The values themselves are `comm_kernels::pattern`'s: a function of (seed, rank, index), so the right answer is known
//! without a second implementation of the operation, and data from an earlier operation, which had another seed, does
//! not pass.

use comm_core::{DType, ReduceOp};
use comm_kernels::pattern::{self, Expected, Pattern};

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
        /// Index of the first element.
        first: u64,
    },
}

impl Content {
    /// The same in the generator's terms: what is expected, and from which index on.
    pub const fn expected(self) -> (Expected, u64) {
        match self {
            Self::Of { rank, first } => (Expected::Sent(rank), first),
            Self::Reduced { op, first } => (Expected::Reduced(op), first),
        }
    }
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

/// The data of an operation among `world` ranks; `op` for operations that reduce.
pub const fn pattern(seed: u64, op: Option<ReduceOp>, world: usize) -> Pattern {
    Pattern::new(seed, op, world)
}

/// Reads an element of a 16- or 32-bit floating-point type; NaN for other types.
pub fn read(dtype: DType, element: &[u8]) -> f64 {
    match (dtype, element) {
        (DType::F32, &[a, b, c, d]) => f64::from(f32::from_le_bytes([a, b, c, d])),
        (DType::F16, &[a, b]) => half::f16::from_le_bytes([a, b]).to_f64(),
        (DType::BF16, &[a, b]) => half::bf16::from_le_bytes([a, b]).to_f64(),
        _ => f64::NAN,
    }
}

/// Values as elements of a 16- or 32-bit floating-point type; no bytes for other types.
pub fn encode(dtype: DType, values: impl Iterator<Item = f64>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for value in values {
        match dtype {
            DType::F32 => bytes.extend_from_slice(&(value as f32).to_le_bytes()),
            DType::F16 => bytes.extend_from_slice(&half::f16::from_f64(value).to_le_bytes()),
            DType::BF16 => bytes.extend_from_slice(&half::bf16::from_f64(value).to_le_bytes()),
            _ => {}
        }
    }
    bytes
}

/// Writes what `rank` sends, from index `first` on.
///
/// # Errors
/// When `bytes` is no whole number of elements.
pub fn fill(
    bytes: &mut [u8],
    dtype: DType,
    data: &Pattern,
    rank: usize,
    first: u64,
) -> comm_core::Result<()> {
    pattern::fill(bytes, dtype, data, rank, first)
}

/// Counts the elements that are not the content.
///
/// # Errors
/// When `bytes` is no whole number of elements.
pub fn wrong(bytes: &[u8], dtype: DType, data: &Pattern, content: Content) -> comm_core::Result<u64> {
    let (expected, first) = content.expected();
    Ok(pattern::verify(bytes, dtype, data, expected, first, 0)?.wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_seed_rank_or_place_does_not_pass() {
        let (dtype, data) = (DType::BF16, pattern(7, Some(ReduceOp::Sum), 4));
        let mut bytes = vec![0; 2000];
        fill(&mut bytes, dtype, &data, 1, 0).unwrap();
        let of = |rank, first| Content::Of { rank, first };
        assert_eq!(wrong(&bytes, dtype, &data, of(1, 0)).unwrap(), 0);
        assert_eq!(wrong(&bytes[20..], dtype, &data, of(1, 10)).unwrap(), 0);
        assert!(wrong(&bytes, dtype, &data, of(0, 0)).unwrap() > 500);
        assert!(wrong(&bytes, dtype, &data, of(1, 1)).unwrap() > 500);
        assert!(wrong(&bytes, dtype, &pattern(8, Some(ReduceOp::Sum), 4), of(1, 0)).unwrap() > 500);
        assert!(wrong(&bytes, dtype, &data, Content::Reduced { op: ReduceOp::Sum, first: 0 }).unwrap() > 500);
    }

    #[test]
    fn floats_survive_the_round_trip() {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let bytes = encode(dtype, [1.5, -2.0].into_iter());
            let values: Vec<f64> = bytes.chunks(dtype.size()).map(|element| read(dtype, element)).collect();
            assert_eq!(values, [1.5, -2.0]);
        }
    }
}
