//! The data that goes in, as a function of (seed, rank, index): no element can be right by being left over from an
//! earlier call or from another place.
//!
//! Owns the choice of values for which a reduction's result is exact in the element type, in any order of summation.

use half::{bf16, f16};

use crate::dtype::{DType, F8E4M3, F8E5M2};

/// Which values a buffer holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Fill {
    /// Any bit pattern: for operations that only move data.
    Bits,
    /// Small integers whose sums are exact; any bit pattern for integer types, which wrap.
    Sum,
    /// Powers of two with either sign; any bit pattern for integer types.
    Prod,
    /// Any value but NaN and the infinities.
    Ordered,
    /// The same with NaNs strewn in.
    OrderedOrNan,
    /// Values whose average is exact; for integer types, values whose sum does not overflow.
    Avg,
    /// Reals of a few binades, rounded to the type: for floats.
    Real,
}

/// A random number that depends on all three.
pub(super) fn random(seed: u64, rank: usize, index: usize) -> u64 {
    let mut z = seed
        .wrapping_add((rank as u64 + 1).wrapping_mul(0xd1b5_4a32_d192_ed03))
        .wrapping_add((index as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// What all ranks share at an index.
const EVERYONE: usize = usize::MAX - 1;

/// The largest integer up to which the type holds all integers.
const fn exact_integers(dtype: DType) -> i64 {
    match dtype {
        DType::F8E5M2 => 8,
        DType::F8E4M3 => 16,
        DType::BF16 => 256,
        DType::F16 => 2048,
        DType::F32 => 1 << 24,
        _ => 1 << 40,
    }
}

pub(super) const fn is_signed_integer(dtype: DType) -> bool {
    matches!(dtype, DType::I8 | DType::I32 | DType::I64)
}

/// The low bits that an element has.
pub(super) const fn mask(dtype: DType) -> u64 {
    u64::MAX >> (64 - 8 * dtype.size())
}

/// A float element's value.
pub(super) fn to_f64(dtype: DType, bits: u64) -> f64 {
    match dtype {
        DType::F64 => f64::from_bits(bits),
        DType::F32 => f64::from(f32::from_bits(bits as u32)),
        DType::F16 => f16::from_bits(bits as u16).to_f64(),
        DType::BF16 => bf16::from_bits(bits as u16).to_f64(),
        DType::F8E4M3 => f64::from(F8E4M3::from_bits(bits as u8).to_f32()),
        DType::F8E5M2 => f64::from(F8E5M2::from_bits(bits as u8).to_f32()),
        _ => integer(dtype, bits) as f64,
    }
}

/// The float element nearest to an `f64`, rounded once.
pub(super) fn from_f64(dtype: DType, value: f64) -> u64 {
    match dtype {
        DType::F64 => value.to_bits(),
        DType::F32 => u64::from((value as f32).to_bits()),
        DType::F16 => u64::from(f16::from_f64(value).to_bits()),
        DType::BF16 => u64::from(bf16::from_f64(value).to_bits()),
        DType::F8E4M3 => u64::from(F8E4M3::from_f32(value as f32).to_bits()),
        DType::F8E5M2 => u64::from(F8E5M2::from_f32(value as f32).to_bits()),
        _ => value as i64 as u64 & mask(dtype),
    }
}

/// An integer element's value.
pub(super) const fn integer(dtype: DType, bits: u64) -> i128 {
    match dtype {
        DType::I8 => bits as u8 as i8 as i128,
        DType::I32 => bits as u32 as i32 as i128,
        DType::I64 => bits as i64 as i128,
        _ => bits as i128,
    }
}

/// `value % (2 * limit + 1) - limit`, as a float with either zero.
fn small(dtype: DType, random: u64, limit: i64) -> u64 {
    let value = ((random >> 8) % (2 * limit as u64 + 1)) as i64 - limit;
    let value = value as f64;
    from_f64(dtype, if value == 0.0 && random & 1 == 1 { -0.0 } else { value })
}

/// Whether a rank takes part at an index, so that at most `limit` ranks do.
fn takes_part(world: usize, limit: usize, shared: u64, rank: usize) -> bool {
    limit >= world || (rank + (shared % world as u64) as usize) % world < limit
}

/// The bits of one element.
pub(super) fn element(fill: Fill, dtype: DType, world: usize, seed: u64, rank: usize, index: usize) -> u64 {
    let own = random(seed, rank, index);
    if fill == Fill::Bits {
        return own & mask(dtype);
    }
    if !dtype.is_float() {
        return match fill {
            Fill::Avg if is_signed_integer(dtype) => {
                let largest = (mask(dtype) >> 1) / world as u64;
                let value = ((own >> 1) % (largest + 1)) as i64;
                (if own & 1 == 1 { -value } else { value }) as u64 & mask(dtype)
            }
            Fill::Avg => own % (mask(dtype) / world as u64).max(1),
            _ => own & mask(dtype),
        };
    }
    let shared = random(seed, EVERYONE, index);
    let exact = exact_integers(dtype);
    match fill {
        Fill::Sum => {
            let active = world.min(exact as usize);
            if takes_part(world, active, shared, rank) { small(dtype, own, exact / active as i64) } else { 0 }
        }
        Fill::Prod => {
            let exponent = if takes_part(world, 8, shared, rank) { (own >> 8) % 3 } else { 1 };
            let magnitude = [0.5, 1.0, 2.0][exponent as usize];
            from_f64(dtype, if own & 1 == 1 { -magnitude } else { magnitude })
        }
        Fill::Avg => {
            let limit = (exact / (2 * world as i64)).max(1);
            let base = ((shared >> 8) % (2 * limit as u64 + 1)) as i64 - limit;
            let more = ((shared >> 32) % (limit as u64 + 1)) as i64;
            let (giver, taker) = (shared % world as u64, (shared >> 40) % world as u64);
            let own = base + if rank as u64 == taker { more } else { 0 };
            from_f64(dtype, (own - if rank as u64 == giver { more } else { 0 }) as f64)
        }
        Fill::Real => {
            let unit = (own >> 11) as f64 / (1_u64 << 52) as f64 - 1.0;
            from_f64(dtype, unit * [0.25, 1.0, 4.0][(own % 3) as usize])
        }
        Fill::Ordered | Fill::OrderedOrNan | Fill::Bits => {
            if fill == Fill::OrderedOrNan
                && shared.is_multiple_of(5)
                && (shared >> 8) % world as u64 == rank as u64
            {
                return from_f64(dtype, f64::NAN);
            }
            let bits = own & mask(dtype);
            // Without its second-highest bit, which is the exponent's highest, the pattern is an ordinary number.
            if to_f64(dtype, bits).is_finite() { bits } else { bits & !(1 << (8 * dtype.size() - 2)) }
        }
    }
}

/// Appends elements, in memory order.
pub(super) fn push(bytes: &mut Vec<u8>, dtype: DType, bits: u64) {
    match dtype.size() {
        1 => bytes.push(bits as u8),
        2 => bytes.extend_from_slice(&(bits as u16).to_ne_bytes()),
        4 => bytes.extend_from_slice(&(bits as u32).to_ne_bytes()),
        _ => bytes.extend_from_slice(&bits.to_ne_bytes()),
    }
}

/// Element `index` of a buffer.
pub(super) fn at(bytes: &[u8], dtype: DType, index: usize) -> u64 {
    let size = dtype.size();
    let mut bits = [0; 8];
    let element = &bytes[index * size..(index + 1) * size];
    if cfg!(target_endian = "little") {
        bits[..size].copy_from_slice(element);
    } else {
        bits[8 - size..].copy_from_slice(element);
    }
    u64::from_ne_bytes(bits)
}

/// `count` elements of a rank, from index `first` on.
pub(super) fn filled(
    fill: Fill,
    dtype: DType,
    world: usize,
    seed: u64,
    rank: usize,
    range: std::ops::Range<usize>,
) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(range.len() * dtype.size());
    for index in range {
        push(&mut bytes, dtype, element(fill, dtype, world, seed, rank, index));
    }
    bytes
}
