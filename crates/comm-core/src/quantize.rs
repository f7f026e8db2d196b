//! Numbers as fp8 with a scale: the arithmetic of the quantised operations, defined to the last bit.
//!
//! Owns the definition and its implementation in portable Rust, which other backends are measured against. Never
//! communicates.
//!
//! # Quantising
//! Of some numbers in `f32` that share a scale, let `a` be the largest magnitude, or [`LEAST_AMAX`] if that is larger.
//! With every operation in `f32`, rounded to nearest, ties to even:
//!
//! ```text
//! scale = a / 448                  the number that is kept beside the elements
//! q[i]  = e4m3(x[i] * (448 / a))   rounded to nearest, ties to even; NaN stays NaN, what is larger becomes 448
//! ```
//!
//! and `q[i] * scale` is what they stand for: within `a / 28` of `x[i]` (half a unit in the last place of the largest
//! element's binade), and for elements of at least `a / 28672` within a sixteenth of their own magnitude. If one is NaN
//! or infinite, all of them stand for NaN.
//!
//! # The quantised all-reduce
//! Elements `128 g` to `128 g + 127` of the vector share a scale, for every `g`; the last group may be shorter. With
//! `Q(x)` what quantising makes of `x`, group by group:
//!
//! ```text
//! sum  = Q(send of rank 0) + Q(send of rank 1) + ...     in f32, in rank order, this rank's own quantised too
//! recv = round(Q(sum))                                   to the operands' type, to nearest, ties to even
//! ```
//!
//! so every rank gets the same bits, whoever added them up. In a communicator of one rank nothing travels and nothing is
//! quantised: `recv = send`. Which NaN a NaN is depends on the backend.

use half::{bf16, f16};

use crate::dtype::{DType, F8E4M3};
use crate::error::{CommError, Result};

/// Elements that share a scale in a quantised all-reduce.
pub const GROUP: usize = 128;

/// The largest number of the fp8 type (`e4m3`).
pub const E4M3_MAX: f32 = 448.0;

/// The least magnitude that a scale is made for, 2^-100: keeps scales and their inverses ordinary numbers.
pub const LEAST_AMAX: f32 = f32::from_bits((127 - 100) << 23);

/// The scale of numbers whose largest magnitude is `amax`, and the factor that they are multiplied with before rounding.
///
/// ```
/// assert_eq!(comm_core::quantize::scale(896.0), (2.0, 0.5));
/// ```
#[must_use]
pub fn scale(amax: f32) -> (f32, f32) {
    let amax = larger(amax, LEAST_AMAX);
    (amax / E4M3_MAX, E4M3_MAX / amax)
}

/// The largest magnitude, 0 of nothing; NaN if there is one.
#[must_use]
pub fn amax(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |most, value| larger(most, *value))
}

/// The larger magnitude; NaN counts as larger than anything.
fn larger(a: f32, b: f32) -> f32 {
    let magnitude = |x: f32| x.to_bits() & !(1 << 31);
    f32::from_bits(magnitude(a).max(magnitude(b)))
}

/// The fp8 number nearest to `value`, ties to even, as an `f32`; magnitudes beyond 448 become 448, NaN stays NaN.
///
/// ```
/// # use comm_core::quantize::round_to_e4m3;
/// assert_eq!([1e9, -17.0, 19.0, 0.001].map(round_to_e4m3), [448.0, -16.0, 20.0, 0.001953125]);
/// ```
#[must_use]
pub fn round_to_e4m3(value: f32) -> f32 {
    // The least normal number is 2^-6; below it the numbers are multiples of 2^-9.
    const LEAST_NORMAL: f32 = 1.0 / 64.0;
    // Adding this pushes everything below 2^-9 out of an `f32`.
    const SHIFTER: f32 = 12_582_912.0 / 512.0;
    let magnitude = value.abs();
    let rounded = if magnitude < LEAST_NORMAL {
        (magnitude + SHIFTER) - SHIFTER
    } else if magnitude < 512.0 {
        // To three of the 23 bits of the significand.
        let bits = magnitude.to_bits();
        f32::from_bits((bits + 0x7_ffff + ((bits >> 20) & 1)) & !0xf_ffff).min(E4M3_MAX)
    } else if magnitude.is_nan() {
        f32::NAN
    } else {
        E4M3_MAX
    };
    rounded.copysign(value)
}

/// The same as an fp8 number. There is one NaN.
#[must_use]
pub fn to_e4m3(value: f32) -> F8E4M3 {
    let rounded = round_to_e4m3(value);
    if rounded.is_nan() {
        return F8E4M3::from_bits(0x7f);
    }
    let bits = rounded.to_bits();
    let magnitude = rounded.abs();
    let code = if magnitude < 1.0 / 64.0 {
        (magnitude * 512.0) as u32
    } else {
        // Exponents are kept with a bias of 7 instead of 127.
        ((bits & !(1 << 31)) >> 20) - ((127 - 7) << 3)
    };
    F8E4M3::from_bits((bits >> 31 << 7 | code) as u8)
}

/// Replaces numbers that share a scale by what they stand for once quantised.
pub fn through_fp8(group: &mut [f32]) {
    let (scale, inverse) = scale(amax(group));
    for value in group {
        *value = round_to_e4m3(*value * inverse) * scale;
    }
}

/// The sum of a quantised all-reduce over vectors in host memory, one of each rank in rank order; see the module.
///
/// # Errors
/// [`CommError::InvalidArgument`] for another type than `f32`, `f16` and `bf16`.
///
/// # Safety
/// `count` elements of `dtype` are valid for reads at each of `sources`, and for writes at `to`, which may equal any of
/// them but not overlap it otherwise.
pub unsafe fn sum_host(to: *mut u8, sources: &[*const u8], count: usize, dtype: DType) -> Result<()> {
    // SAFETY: as the caller vouches; each arm's type is the dtype's.
    unsafe {
        match dtype {
            DType::F32 => sum::<f32>(to, sources, count, |x| x, |x| x),
            DType::F16 => sum::<f16>(to, sources, count, f16::to_f32, f16::from_f32),
            DType::BF16 => sum::<bf16>(to, sources, count, bf16::to_f32, bf16::from_f32),
            other => {
                return Err(CommError::invalid("dtype", format!("a quantised all-reduce takes no {other}")));
            }
        }
    }
    Ok(())
}

/// # Safety
/// As [`sum_host`], with `T` of the dtype.
unsafe fn sum<T: Copy>(
    to: *mut u8,
    sources: &[*const u8],
    count: usize,
    wide: impl Fn(T) -> f32,
    rounded: impl Fn(f32) -> T,
) {
    let (mut total, mut part) = ([0.0; GROUP], [0.0; GROUP]);
    for first in (0..count).step_by(GROUP) {
        let len = GROUP.min(count - first);
        let (total, part) = (&mut total[..len], &mut part[..len]);
        for (rank, source) in sources.iter().enumerate() {
            for (index, value) in part.iter_mut().enumerate() {
                // SAFETY: the element is one of the `count` that the caller vouches for.
                *value = wide(unsafe { source.cast::<T>().add(first + index).read_unaligned() });
            }
            through_fp8(part);
            if rank == 0 {
                total.copy_from_slice(part);
            } else {
                total.iter_mut().zip(&*part).for_each(|(total, part)| *total += part);
            }
        }
        through_fp8(total);
        for (index, value) in total.iter().enumerate() {
            let value = if value.is_nan() { f32::NAN } else { *value };
            // SAFETY: as above; this group of every source has been read.
            unsafe { to.cast::<T>().add(first + index).write_unaligned(rounded(value)) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_is_that_of_the_fp8_crate() {
        // Every sign, exponent and upper half of the significand, with lower bits that decide ties.
        for upper in 0..=u16::MAX {
            for lower in [0, 1, 0x7fff, 0x8000, 0xffff] {
                let value = f32::from_bits(u32::from(upper) << 16 | lower);
                let (found, expected) = (to_e4m3(value), F8E4M3::from_f32(value));
                if value.is_nan() {
                    assert_eq!(found.to_bits(), 0x7f);
                    assert!(round_to_e4m3(value).is_nan());
                } else {
                    assert_eq!(found.to_bits(), expected.to_bits(), "{value:e}");
                    assert_eq!(round_to_e4m3(value).to_bits(), expected.to_f32().to_bits(), "{value:e}");
                }
            }
        }
    }

    #[test]
    fn scales_stay_ordinary_numbers() {
        for amax in [0.0, f32::from_bits(1), 1e-38, LEAST_AMAX, 1.0, 3e38] {
            let (scale, inverse) = scale(amax);
            assert!(scale.is_normal() && inverse.is_normal(), "{amax:e}: {scale:e} {inverse:e}");
        }
        assert!(amax(&[1.0, f32::NAN, f32::INFINITY]).is_nan());
        assert_eq!(amax(&[-3.0, 2.0]), 3.0);
    }

    #[test]
    fn a_group_with_an_infinity_is_nan_and_its_neighbours_are_not() {
        let mut send = vec![1.0_f32; 2 * GROUP + 1];
        send[GROUP + 3] = f32::INFINITY;
        let mut recv = vec![0.0_f32; send.len()];
        let source = send.as_ptr().cast();
        // SAFETY: both hold that many elements.
        unsafe { sum_host(recv.as_mut_ptr().cast(), &[source, source], send.len(), DType::F32) }.unwrap();
        assert!(recv[GROUP..2 * GROUP].iter().all(|x| x.is_nan()));
        assert!(recv[..GROUP].iter().chain(&recv[2 * GROUP..]).all(|x| *x == 2.0), "{recv:?}");
    }

    #[test]
    fn errors_are_within_the_bounds_given() {
        let values: Vec<f32> = (0..GROUP).map(|i| ((i * 37 % 128) as f32 - 50.3) * 0.0071).collect();
        let most = amax(&values);
        let mut group = values.clone();
        through_fp8(&mut group);
        for (value, stands_for) in values.iter().zip(&group) {
            let error = (value - stands_for).abs();
            assert!(error <= most / 28.0 * 1.0001, "{value} {stands_for}");
            assert!(value.abs() < most / 28_672.0 || error <= value.abs() / 16.0 * 1.0001);
        }
    }
}
