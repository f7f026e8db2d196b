//! The right answers, and how near an answer must come.

use crate::dtype::{DType, ReduceOp};

use super::data::{self, Fill, from_f64, integer, mask, to_f64};

/// The values that a reduction is tried on.
pub(super) fn fill_for(op: ReduceOp, nan: bool) -> Fill {
    match op {
        ReduceOp::Sum => Fill::Sum,
        ReduceOp::Prod => Fill::Prod,
        ReduceOp::Avg => Fill::Avg,
        ReduceOp::Min | ReduceOp::Max if nan => Fill::OrderedOrNan,
        ReduceOp::Min | ReduceOp::Max => Fill::Ordered,
    }
}

/// The reduction of one element over the ranks, as [`ReduceOp`] defines it: in rank order, `f32` accumulation.
pub(super) fn reduce(dtype: DType, op: ReduceOp, world: usize, of_rank: impl Fn(usize) -> u64) -> u64 {
    match dtype {
        DType::F64 => {
            fold(op, world, |r| f64::from_bits(of_rank(r)), f64::is_nan, |a| a / world as f64).to_bits()
        }
        _ if dtype.is_float() => {
            let value =
                fold(op, world, |r| to_f64(dtype, of_rank(r)) as f32, |x| x.is_nan(), |a| a / world as f32);
            from_f64(dtype, f64::from(value))
        }
        _ => integers(dtype, op, world, of_rank),
    }
}

fn fold<T>(
    op: ReduceOp,
    world: usize,
    value: impl Fn(usize) -> T,
    is_nan: impl Fn(T) -> bool,
    average: impl Fn(T) -> T,
) -> T
where
    T: Copy + PartialOrd + std::ops::Add<Output = T> + std::ops::Mul<Output = T>,
{
    let mut result = value(0);
    for rank in 1..world {
        let other = value(rank);
        result = match op {
            ReduceOp::Sum | ReduceOp::Avg => result + other,
            ReduceOp::Prod => result * other,
            _ if is_nan(result) => result,
            ReduceOp::Min if is_nan(other) || other < result => other,
            ReduceOp::Max if is_nan(other) || other > result => other,
            ReduceOp::Min | ReduceOp::Max => result,
        };
    }
    if op == ReduceOp::Avg { average(result) } else { result }
}

fn integers(dtype: DType, op: ReduceOp, world: usize, of_rank: impl Fn(usize) -> u64) -> u64 {
    let bits = match op {
        ReduceOp::Sum => (0..world).fold(0, |sum: u64, rank| sum.wrapping_add(of_rank(rank))),
        ReduceOp::Prod => (0..world).fold(1, |product: u64, rank| product.wrapping_mul(of_rank(rank))),
        ReduceOp::Avg => {
            let sum: i128 = (0..world).map(|rank| integer(dtype, of_rank(rank))).sum();
            (sum / world as i128) as u64
        }
        ReduceOp::Min | ReduceOp::Max => {
            let all = (0..world).map(|rank| integer(dtype, of_rank(rank)));
            let result = if op == ReduceOp::Min { all.min() } else { all.max() };
            result.unwrap_or_default() as u64
        }
    };
    bits & mask(dtype)
}

/// How a result is compared.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) enum Equality {
    /// The same bits.
    Bits,
    /// The same value: either zero equals the other, and any NaN any other.
    Value,
    /// At most so many units in the last place apart.
    Ulps(u64),
}

impl Equality {
    pub(super) fn holds(self, dtype: DType, expected: u64, got: u64) -> bool {
        if expected == got {
            return true;
        }
        if self == Self::Bits || !dtype.is_float() {
            return false;
        }
        let (a, b) = (to_f64(dtype, expected), to_f64(dtype, got));
        a == b
            || (a.is_nan() && b.is_nan())
            || match self {
                Self::Ulps(ulps) => {
                    !a.is_nan()
                        && !b.is_nan()
                        && place(dtype, expected).abs_diff(place(dtype, got)) <= u128::from(ulps)
                }
                Self::Bits | Self::Value => false,
            }
    }
}

/// A float's place in the order of all floats of its type.
fn place(dtype: DType, bits: u64) -> i128 {
    let sign = 1_u64 << (8 * dtype.size() - 1);
    let magnitude = i128::from(bits & (sign - 1));
    if bits & sign == 0 { magnitude } else { -magnitude }
}

/// Whether a sum (or average) of arbitrary values is as near as any order of additions brings it.
pub(super) fn is_close(dtype: DType, op: ReduceOp, values: &[u64], got: u64) -> Result<(), f64> {
    let epsilon = match dtype {
        DType::F64 => f64::EPSILON,
        DType::F32 => f64::from(f32::EPSILON),
        DType::F16 => 2_f64.powi(-10),
        DType::BF16 => 2_f64.powi(-7),
        DType::F8E4M3 => 2_f64.powi(-3),
        _ => 2_f64.powi(-2),
    };
    let values = values.iter().map(|&bits| to_f64(dtype, bits));
    let world = values.len() as f64;
    let (sum, size) = values.fold((0.0, 0.0), |(sum, size): (f64, f64), v| (sum + v, size + v.abs()));
    let scale = if op == ReduceOp::Avg { 1.0 / world } else { 1.0 };
    let (expected, allowed) = (sum * scale, (size * scale * epsilon * (world + 1.0)).max(1e-3 * epsilon));
    if (to_f64(dtype, got) - expected).abs() <= allowed { Ok(()) } else { Err(expected) }
}

/// An element for a message.
pub(super) fn show(dtype: DType, bits: u64) -> String {
    if dtype.is_float() {
        format!("{} ({bits:#x})", to_f64(dtype, bits))
    } else {
        format!("{}", integer(dtype, bits))
    }
}

/// The expected result of a reduction of `range` on data from [`data::element`].
pub(super) fn reduced(
    fill: Fill,
    dtype: DType,
    op: ReduceOp,
    world: usize,
    seed: u64,
    range: std::ops::Range<usize>,
) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(range.len() * dtype.size());
    for index in range {
        let of_rank = |rank| data::element(fill, dtype, world, seed, rank, index);
        data::push(&mut bytes, dtype, reduce(dtype, op, world, of_rank));
    }
    bytes
}
