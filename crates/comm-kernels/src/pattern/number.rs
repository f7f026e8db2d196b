//! The element types as numbers: what the generator and the exact reduction need to know of each.

use comm_core::{Element, F8E4M3, F8E5M2, ReduceOp};
use half::{bf16, f16};

/// An element type. Mirrors `Numeric` and `Magnitude` of the CUDA headers.
pub(crate) trait Number: Element {
    /// What reductions accumulate in.
    type Acc: Copy;
    /// Whether the type is a float.
    const FLOAT: bool;
    /// Whether the type has negative values.
    const SIGNED: bool;
    /// The largest magnitude of an element for sums (floats only).
    const SUM: i32;
    /// The largest magnitude of an element for averages, before it is multiplied by the world size.
    const AVG: i32;

    /// The value whose bits are the low bits of `bits`.
    fn from_bits64(bits: u64) -> Self;
    /// The value's bits.
    fn bits64(self) -> u64;
    /// The integer, rounded.
    fn from_i64(value: i64) -> Self;
    /// `±2^exponent`, for floats and small exponents.
    fn signed_power_of_two(exponent: i32, negative: bool) -> Self;
    /// As an accumulator.
    fn widen(self) -> Self::Acc;
    /// One step of a reduction.
    fn combine(op: ReduceOp, a: Self::Acc, b: Self::Acc) -> Self::Acc;
    /// The end of a reduction of `count` operands.
    fn finish(op: ReduceOp, acc: Self::Acc, count: u32) -> Self;
}

macro_rules! floats {
    ($($ty:ty, $acc:ty, $bits:ty, $sum:literal, $avg:literal, $widen:expr, $narrow:expr;)*) => {$(
        #[allow(clippy::cast_possible_truncation, clippy::cast_precision_loss, clippy::cast_lossless,
            reason = "the low bits are meant; the integers are small")]
        impl Number for $ty {
            type Acc = $acc;
            const FLOAT: bool = true;
            const SIGNED: bool = true;
            const SUM: i32 = $sum;
            const AVG: i32 = $avg;

            fn from_bits64(bits: u64) -> Self {
                <$ty>::from_bits(bits as $bits)
            }
            fn bits64(self) -> u64 {
                self.to_bits() as u64
            }
            fn from_i64(value: i64) -> Self {
                $narrow(value as $acc)
            }
            fn signed_power_of_two(exponent: i32, negative: bool) -> Self {
                let power: $acc = <$acc>::powi(2.0, exponent);
                $narrow(if negative { -power } else { power })
            }
            fn widen(self) -> $acc {
                $widen(self)
            }
            fn combine(op: ReduceOp, a: $acc, b: $acc) -> $acc {
                match op {
                    ReduceOp::Sum | ReduceOp::Avg => a + b,
                    ReduceOp::Prod => a * b,
                    ReduceOp::Min => if b < a || b.is_nan() { b } else { a },
                    ReduceOp::Max => if b > a || b.is_nan() { b } else { a },
                }
            }
            fn finish(op: ReduceOp, acc: $acc, count: u32) -> Self {
                $narrow(if op == ReduceOp::Avg { acc / count as $acc } else { acc })
            }
        }
    )*};
}

floats! {
    f64, f64, u64, 32768, 1024, std::convert::identity, std::convert::identity;
    f32, f32, u32, 32768, 1024, std::convert::identity, std::convert::identity;
    f16, f32, u16, 64, 4, f16::to_f32, f16::from_f32;
    bf16, f32, u16, 8, 1, bf16::to_f32, bf16::from_f32;
    F8E4M3, f32, u8, 2, 1, |v: F8E4M3| v.to_f32(), F8E4M3::from_f32;
    F8E5M2, f32, u8, 1, 1, |v: F8E5M2| v.to_f32(), F8E5M2::from_f32;
}

macro_rules! integers {
    ($($ty:ty, $bits:ty, $signed:literal, $avg:literal;)*) => {$(
        #[allow(clippy::cast_possible_truncation, clippy::cast_possible_wrap, clippy::cast_sign_loss,
            clippy::cast_lossless, reason = "integer elements wrap")]
        impl Number for $ty {
            type Acc = $ty;
            const FLOAT: bool = false;
            const SIGNED: bool = $signed;
            const SUM: i32 = 0;
            const AVG: i32 = $avg;

            fn from_bits64(bits: u64) -> Self {
                bits as $ty
            }
            fn bits64(self) -> u64 {
                self as $bits as u64
            }
            fn from_i64(value: i64) -> Self {
                value as $ty
            }
            fn signed_power_of_two(exponent: i32, _negative: bool) -> Self {
                (1_u64 << exponent.clamp(0, 1)) as $ty
            }
            fn widen(self) -> $ty {
                self
            }
            fn combine(op: ReduceOp, a: $ty, b: $ty) -> $ty {
                match op {
                    ReduceOp::Sum | ReduceOp::Avg => a.wrapping_add(b),
                    ReduceOp::Prod => a.wrapping_mul(b),
                    ReduceOp::Min => a.min(b),
                    ReduceOp::Max => a.max(b),
                }
            }
            fn finish(op: ReduceOp, acc: $ty, count: u32) -> Self {
                if op == ReduceOp::Avg { (acc as i128 / count as i128) as $ty } else { acc }
            }
        }
    )*};
}

integers! {
    i8, u8, true, 1;
    u8, u8, false, 1;
    i32, u32, true, 1024;
    u32, u32, false, 1024;
    i64, u64, true, 1024;
    u64, u64, false, 1024;
}
