//! Combining several ranks' elements, in rank order.
//!
//! Owns the arithmetic of [`ReduceOp`] on host memory: 16-bit and fp8 types accumulate in `f32`, all others in
//! themselves. Works block by block through an accumulator that stays in the first-level cache, so the destination may
//! be one of the sources. It knows nothing of ranks beyond the order of the sources.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::dtype::{DType, F8E4M3, F8E5M2, ReduceOp};

/// Elements that are accumulated at a time.
const BLOCK: usize = 1024;

/// `dst[i] = op over s of srcs[s][i]`, for `i < count`.
///
/// # Safety
/// Each source is valid for reads and `dst` for writes of `count` elements of `dtype`, all aligned to its size. `dst`
/// equals a source or overlaps none. Nobody else writes to any of them, or reads `dst`, meanwhile.
pub(super) unsafe fn reduce(dst: *mut u8, srcs: &[*const u8], count: usize, dtype: DType, op: ReduceOp) {
    /// # Safety
    /// As [`reduce`], for elements of type `T`.
    unsafe fn typed<T: Lane>(dst: *mut u8, srcs: &[*const u8], count: usize, op: ReduceOp) {
        // SAFETY: as the caller vouches.
        unsafe {
            match op {
                ReduceOp::Sum => dispatch::<T, Sum>(dst, srcs, count),
                ReduceOp::Prod => dispatch::<T, Prod>(dst, srcs, count),
                ReduceOp::Min => dispatch::<T, Min>(dst, srcs, count),
                ReduceOp::Max => dispatch::<T, Max>(dst, srcs, count),
                ReduceOp::Avg => dispatch::<T, Avg>(dst, srcs, count),
            }
        }
    }
    // SAFETY: as the caller vouches; each arm's type is the dtype's.
    unsafe {
        match dtype {
            DType::F64 => typed::<f64>(dst, srcs, count, op),
            DType::F32 => typed::<f32>(dst, srcs, count, op),
            DType::F16 => typed::<f16>(dst, srcs, count, op),
            DType::BF16 => typed::<bf16>(dst, srcs, count, op),
            DType::F8E4M3 => typed::<F8E4M3>(dst, srcs, count, op),
            DType::F8E5M2 => typed::<F8E5M2>(dst, srcs, count, op),
            DType::I8 => typed::<i8>(dst, srcs, count, op),
            DType::U8 => typed::<u8>(dst, srcs, count, op),
            DType::I32 => typed::<i32>(dst, srcs, count, op),
            DType::U32 => typed::<u32>(dst, srcs, count, op),
            DType::I64 => typed::<i64>(dst, srcs, count, op),
            DType::U64 => typed::<u64>(dst, srcs, count, op),
        }
    }
}

/// # Safety
/// As [`reduce`].
unsafe fn dispatch<T: Lane, O: Combine>(dst: *mut u8, srcs: &[*const u8], count: usize) {
    #[cfg(target_arch = "x86_64")]
    {
        /// # Safety
        /// As [`reduce`], on a processor that has AVX2.
        #[target_feature(enable = "avx2")]
        unsafe fn avx2<T: Lane, O: Combine>(dst: *mut u8, srcs: &[*const u8], count: usize) {
            // SAFETY: as the caller vouches.
            unsafe { blocks::<T, O>(dst, srcs, count) }
        }
        if std::arch::is_x86_feature_detected!("avx2") {
            // SAFETY: the processor has AVX2; the rest as the caller vouches.
            return unsafe { avx2::<T, O>(dst, srcs, count) };
        }
    }
    // SAFETY: as the caller vouches.
    unsafe { blocks::<T, O>(dst, srcs, count) }
}

/// # Safety
/// As [`reduce`].
#[inline(always)]
unsafe fn blocks<T: Lane, O: Combine>(dst: *mut u8, srcs: &[*const u8], count: usize) {
    let Some((&first, others)) = srcs.split_first() else { return };
    let (dst, ranks) = (dst.cast::<T>(), srcs.len());
    let mut acc = [T::Acc::default(); BLOCK];
    let mut at = 0;
    while at < count {
        let len = BLOCK.min(count - at);
        let acc = &mut acc[..len];
        // SAFETY: the block is inside the source; no reference to `dst`, which may be the same memory, is alive.
        let block = |src: *const u8| unsafe { std::slice::from_raw_parts(src.cast::<T>().add(at), len) };
        match others {
            [second, rest @ ..] if T::DIRECT => {
                T::pair::<O>(acc, block(first), block(*second));
                for &src in rest {
                    T::fold::<O>(acc, block(src));
                }
            }
            _ => {
                T::widen(acc, block(first));
                for &src in others {
                    T::fold::<O>(acc, block(src));
                }
            }
        }
        if O::AVERAGE {
            for value in acc.iter_mut() {
                *value = value.divided(ranks);
            }
        }
        // SAFETY: the block is inside the destination, and the references to the sources' blocks are gone.
        T::narrow(unsafe { std::slice::from_raw_parts_mut(dst.add(at), len) }, acc);
        at += len;
    }
}

/// Arithmetic on an accumulator.
trait Number: Copy + Default {
    fn plus(self, other: Self) -> Self;
    fn times(self, other: Self) -> Self;
    fn smaller(self, other: Self) -> Self;
    fn larger(self, other: Self) -> Self;
    fn divided(self, ranks: usize) -> Self;
}

macro_rules! float_numbers {
    ($($ty:ty),*) => {$(
        impl Number for $ty {
            #[inline(always)]
            fn plus(self, other: Self) -> Self { self + other }
            #[inline(always)]
            fn times(self, other: Self) -> Self { self * other }
            // A NaN on the left fails both comparisons and stays; one on the right is taken by the second.
            #[inline(always)]
            fn smaller(self, other: Self) -> Self {
                if other < self || (other.is_nan() && !self.is_nan()) { other } else { self }
            }
            #[inline(always)]
            fn larger(self, other: Self) -> Self {
                if other > self || (other.is_nan() && !self.is_nan()) { other } else { self }
            }
            #[inline(always)]
            fn divided(self, ranks: usize) -> Self { self / ranks as $ty }
        }
    )*};
}
float_numbers!(f32, f64);

macro_rules! integer_numbers {
    ($($ty:ty => $wide:ty),*) => {$(
        impl Number for $ty {
            #[inline(always)]
            fn plus(self, other: Self) -> Self { self.wrapping_add(other) }
            #[inline(always)]
            fn times(self, other: Self) -> Self { self.wrapping_mul(other) }
            #[inline(always)]
            fn smaller(self, other: Self) -> Self { self.min(other) }
            #[inline(always)]
            fn larger(self, other: Self) -> Self { self.max(other) }
            #[inline(always)]
            fn divided(self, ranks: usize) -> Self {
                // Wide enough that neither the sum nor the number of ranks is changed by the conversion; the quotient
                // is never larger than the sum.
                (self as $wide / ranks as $wide) as Self
            }
        }
    )*};
}
integer_numbers!(i8 => i64, u8 => u64, i32 => i64, u32 => u64, i64 => i64, u64 => u64);

/// A reduction, without its final step.
trait Combine {
    const AVERAGE: bool = false;
    fn combine<N: Number>(a: N, b: N) -> N;
}

macro_rules! combines {
    ($($name:ident: $method:ident $(, $average:literal)?;)*) => {$(
        struct $name;
        impl Combine for $name {
            $(const AVERAGE: bool = $average;)?
            #[inline(always)]
            fn combine<N: Number>(a: N, b: N) -> N { a.$method(b) }
        }
    )*};
}
combines! {
    Sum: plus;
    Prod: times;
    Min: smaller;
    Max: larger;
    Avg: plus, true;
}

/// An element type and how it accumulates. The slices of one call have equal lengths of at most [`BLOCK`].
trait Lane: Copy {
    type Acc: Number;
    /// Whether elements accumulate without a conversion.
    const DIRECT: bool = false;

    fn widen(acc: &mut [Self::Acc], src: &[Self]);
    fn narrow(dst: &mut [Self], acc: &[Self::Acc]);

    #[inline(always)]
    fn fold<O: Combine>(acc: &mut [Self::Acc], src: &[Self]) {
        let mut wide = [Self::Acc::default(); BLOCK];
        let wide = &mut wide[..src.len()];
        Self::widen(wide, src);
        for (a, b) in acc.iter_mut().zip(wide) {
            *a = O::combine(*a, *b);
        }
    }

    /// [`widen`](Self::widen) and [`fold`](Self::fold) in one pass.
    #[inline(always)]
    fn pair<O: Combine>(acc: &mut [Self::Acc], first: &[Self], second: &[Self]) {
        Self::widen(acc, first);
        Self::fold::<O>(acc, second);
    }
}

macro_rules! direct_lanes {
    ($($ty:ty),*) => {$(
        impl Lane for $ty {
            type Acc = Self;
            const DIRECT: bool = true;
            #[inline(always)]
            fn widen(acc: &mut [Self], src: &[Self]) { acc.copy_from_slice(src); }
            #[inline(always)]
            fn narrow(dst: &mut [Self], acc: &[Self]) { dst.copy_from_slice(acc); }
            #[inline(always)]
            fn fold<O: Combine>(acc: &mut [Self], src: &[Self]) {
                for (a, b) in acc.iter_mut().zip(src) {
                    *a = O::combine(*a, *b);
                }
            }
            #[inline(always)]
            fn pair<O: Combine>(acc: &mut [Self], first: &[Self], second: &[Self]) {
                for ((a, b), c) in acc.iter_mut().zip(first).zip(second) {
                    *a = O::combine(*b, *c);
                }
            }
        }
    )*};
}
direct_lanes!(f64, f32, i8, u8, i32, u32, i64, u64);

impl Lane for f16 {
    type Acc = f32;
    #[inline(always)]
    fn widen(acc: &mut [f32], src: &[Self]) {
        src.convert_to_f32_slice(acc);
    }
    #[inline(always)]
    fn narrow(dst: &mut [Self], acc: &[f32]) {
        dst.convert_from_f32_slice(acc);
    }
}

impl Lane for bf16 {
    type Acc = f32;
    // Written out rather than through the slice conversions because these loops vectorise.
    #[inline(always)]
    fn widen(acc: &mut [f32], src: &[Self]) {
        for (a, b) in acc.iter_mut().zip(src) {
            *a = f32::from_bits(u32::from(b.to_bits()) << 16);
        }
    }
    #[inline(always)]
    fn narrow(dst: &mut [Self], acc: &[f32]) {
        for (d, a) in dst.iter_mut().zip(acc) {
            let bits = a.to_bits();
            let even = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
            let quiet = bits >> 16 | 0x40;
            *d = Self::from_bits(if a.is_nan() { quiet } else { even } as u16);
        }
    }
}

macro_rules! f8_lanes {
    ($($ty:ty => $table:ident),*) => {$(
        static $table: std::sync::LazyLock<[f32; 256]> =
            std::sync::LazyLock::new(|| std::array::from_fn(|bits| <$ty>::from_bits(bits as u8).to_f32()));
        impl Lane for $ty {
            type Acc = f32;
            fn widen(acc: &mut [f32], src: &[Self]) {
                let table: &[f32; 256] = &$table;
                for (a, b) in acc.iter_mut().zip(src) {
                    *a = table[usize::from(b.to_bits())];
                }
            }
            fn narrow(dst: &mut [Self], acc: &[f32]) {
                for (d, a) in dst.iter_mut().zip(acc) {
                    *d = Self::from_f32(*a);
                }
            }
        }
    )*};
}
f8_lanes!(F8E4M3 => E4M3_VALUES, F8E5M2 => E5M2_VALUES);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::Element;

    fn run<T: Element>(ranks: &[Vec<T>], op: ReduceOp) -> Vec<T> {
        let mut dst = ranks[0].clone();
        let srcs: Vec<*const u8> = ranks.iter().map(|rank| rank.as_ptr().cast()).collect();
        // SAFETY: every vector holds as many elements as the first, and the destination is a vector of its own.
        unsafe { reduce(dst.as_mut_ptr().cast(), &srcs, dst.len(), T::DTYPE, op) };
        dst
    }

    #[test]
    fn bf16_rounds_as_half_does() {
        let values: Vec<f32> = (0..=u16::MAX)
            .flat_map(|high| {
                [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff].map(|low| f32::from_bits(u32::from(high) << 16 | low))
            })
            .collect();
        for block in values.chunks(BLOCK) {
            let mut out = vec![bf16::ZERO; block.len()];
            bf16::narrow(&mut out, block);
            for (x, y) in block.iter().zip(out) {
                assert_eq!(y.to_bits(), bf16::from_f32(*x).to_bits(), "{x:?}");
            }
        }
    }

    #[test]
    fn nan_wins_from_either_side() {
        for op in [ReduceOp::Min, ReduceOp::Max] {
            for nan_at in 0..3 {
                let ranks: Vec<Vec<f32>> =
                    (0..3).map(|r| vec![if r == nan_at { f32::NAN } else { r as f32 }; 5]).collect();
                assert!(run(&ranks, op).iter().all(|x| x.is_nan()), "{op} {nan_at}");
                let ranks: Vec<Vec<f16>> =
                    ranks.iter().map(|rank| rank.iter().map(|x| f16::from_f32(*x)).collect()).collect();
                assert!(run(&ranks, op).iter().all(|x| x.is_nan()), "{op} {nan_at}");
            }
        }
    }

    #[test]
    fn sixteen_bit_sums_round_once() {
        // 256 + 1 + 1 is 258 when accumulated in f32, and 256 when rounded to bf16's 8 bits at every step.
        let ranks: Vec<Vec<bf16>> = [256.0, 1.0, 1.0].map(|x| vec![bf16::from_f32(x); 3]).to_vec();
        assert_eq!(run(&ranks, ReduceOp::Sum), vec![bf16::from_f32(258.0); 3]);
    }

    #[test]
    fn integers_wrap_and_averages_truncate() {
        assert_eq!(run(&[vec![100_i8], vec![100]], ReduceOp::Sum), [-56]);
        assert_eq!(run(&[vec![-3_i32], vec![-4]], ReduceOp::Avg), [-3]);
        assert_eq!(run(&[vec![u64::MAX], vec![3]], ReduceOp::Sum), [2]);
        assert_eq!(run(&[vec![7_u8], vec![2], vec![2]], ReduceOp::Avg), [3]);
    }

    #[test]
    fn in_place_equals_out_of_place() {
        let ranks: Vec<Vec<f32>> =
            (0..4).map(|r| (0..3000).map(|i| (i * 7 + r) as f32 * 0.37).collect()).collect();
        let expected = run(&ranks, ReduceOp::Sum);
        let mut ranks = ranks;
        let srcs: Vec<*const u8> =
            ranks.iter_mut().map(|rank| rank.as_mut_ptr().cast_const().cast()).collect();
        // SAFETY: the destination is exactly the third source; all have 3000 elements.
        unsafe { reduce(srcs[2].cast_mut(), &srcs, 3000, DType::F32, ReduceOp::Sum) };
        assert_eq!(ranks[2], expected);
    }
}
