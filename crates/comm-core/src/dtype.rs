//! Element types and reductions.

use std::fmt;
use std::str::FromStr;

pub use float8::{F8E4M3, F8E5M2};
use half::{bf16, f16};
use serde::{Deserialize, Serialize};

use crate::error::CommError;

/// The type of one element of a buffer.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub enum DType {
    /// IEEE binary64.
    F64,
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// bfloat16.
    BF16,
    /// 8-bit float, 4 exponent and 3 mantissa bits, no infinities (`e4m3fn`).
    F8E4M3,
    /// 8-bit float, 5 exponent and 2 mantissa bits.
    F8E5M2,
    /// Signed 8-bit integer.
    I8,
    /// Unsigned 8-bit integer.
    U8,
    /// Signed 32-bit integer.
    I32,
    /// Unsigned 32-bit integer.
    U32,
    /// Signed 64-bit integer.
    I64,
    /// Unsigned 64-bit integer.
    U64,
}

impl DType {
    /// Every element type, widest floats first.
    pub const ALL: [Self; 12] = [
        Self::F64,
        Self::F32,
        Self::F16,
        Self::BF16,
        Self::F8E4M3,
        Self::F8E5M2,
        Self::I8,
        Self::U8,
        Self::I32,
        Self::U32,
        Self::I64,
        Self::U64,
    ];

    /// Bytes per element; also the alignment that every operand must have.
    #[must_use]
    pub const fn size(self) -> usize {
        match self {
            Self::F64 | Self::I64 | Self::U64 => 8,
            Self::F32 | Self::I32 | Self::U32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::F8E4M3 | Self::F8E5M2 | Self::I8 | Self::U8 => 1,
        }
    }

    /// Whether the type is a floating-point type.
    #[must_use]
    pub const fn is_float(self) -> bool {
        matches!(self, Self::F64 | Self::F32 | Self::F16 | Self::BF16 | Self::F8E4M3 | Self::F8E5M2)
    }

    /// The lower-case name used on command lines and in tables.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::F64 => "f64",
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::BF16 => "bf16",
            Self::F8E4M3 => "f8e4m3",
            Self::F8E5M2 => "f8e5m2",
            Self::I8 => "i8",
            Self::U8 => "u8",
            Self::I32 => "i32",
            Self::U32 => "u32",
            Self::I64 => "i64",
            Self::U64 => "u64",
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for DType {
    type Err = CommError;

    fn from_str(name: &str) -> Result<Self, CommError> {
        Self::ALL.into_iter().find(|dtype| dtype.name() == name).ok_or_else(|| {
            let names = Self::ALL.map(Self::name).join(", ");
            CommError::invalid("dtype", format!("unknown element type {name:?}; known are {names}"))
        })
    }
}

/// How the ranks' elements are combined.
///
/// Sums, products and averages of `f16`, `bf16` and the fp8 types are accumulated in `f32` in rank order and rounded
/// once, so every rank gets the same bits in every run. Integer sums and products wrap. The average of integers
/// truncates towards zero.
///
/// The `nccl` backend leaves all of this to NCCL: there the ranks get the same bits as one another, but the order and the
/// precision of the accumulation are NCCL's own, and minima and maxima may lose a NaN.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub enum ReduceOp {
    /// Sum over the ranks.
    Sum,
    /// Product over the ranks.
    Prod,
    /// Smallest element. If any rank's element is NaN the result is NaN.
    Min,
    /// Largest element. If any rank's element is NaN the result is NaN.
    Max,
    /// Sum divided by the number of ranks.
    Avg,
}

impl ReduceOp {
    /// Every reduction.
    pub const ALL: [Self; 5] = [Self::Sum, Self::Prod, Self::Min, Self::Max, Self::Avg];

    /// The lower-case name used on command lines and in tables.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Sum => "sum",
            Self::Prod => "prod",
            Self::Min => "min",
            Self::Max => "max",
            Self::Avg => "avg",
        }
    }
}

impl fmt::Display for ReduceOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for ReduceOp {
    type Err = CommError;

    fn from_str(name: &str) -> Result<Self, CommError> {
        Self::ALL.into_iter().find(|op| op.name() == name).ok_or_else(|| {
            let names = Self::ALL.map(Self::name).join(", ");
            CommError::invalid("reduce op", format!("unknown reduction {name:?}; known are {names}"))
        })
    }
}

mod sealed {
    pub trait Sealed {}
}

/// A Rust type that is laid out as one [`DType`] element.
///
/// # Safety
/// Implementors have exactly the size and layout of [`Element::DTYPE`], no padding, and every bit pattern is valid.
/// The trait is sealed.
pub unsafe trait Element:
    sealed::Sealed + Copy + Send + Sync + PartialEq + fmt::Debug + 'static
{
    /// The element type.
    const DTYPE: DType;
}

macro_rules! elements {
    ($($ty:ty => $dtype:ident),* $(,)?) => {$(
        impl sealed::Sealed for $ty {}
        // SAFETY: the type is a plain number (or a `repr(transparent)` wrapper of one) of that size; all bit patterns
        // are values.
        unsafe impl Element for $ty {
            const DTYPE: DType = DType::$dtype;
        }
        const _: () = assert!(size_of::<$ty>() == DType::$dtype.size());
    )*};
}

elements! {
    f64 => F64, f32 => F32, f16 => F16, bf16 => BF16, F8E4M3 => F8E4M3, F8E5M2 => F8E5M2,
    i8 => I8, u8 => U8, i32 => I32, u32 => U32, i64 => I64, u64 => U64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for dtype in DType::ALL {
            assert_eq!(dtype.name().parse::<DType>().unwrap(), dtype);
        }
        for op in ReduceOp::ALL {
            assert_eq!(op.name().parse::<ReduceOp>().unwrap(), op);
        }
        let message = "f12".parse::<DType>().unwrap_err().to_string();
        assert!(message.contains("f12") && message.contains("bf16"), "{message}");
    }
}
