//! Data whose right answer is known exactly: every element follows from a seed, a rank and an index, so whoever checks
//! a result can say what any rank sent.
//!
//! This is the host's half; the kernels `fill` and `verify` compute the same function on the device, bit for bit. No
//! CUDA is needed here.
//!
//! # The generator
//! All arithmetic wraps, in 64 bits; `mix` is the finaliser of splitmix64 and `GAMMA` is `0x9E3779B97F4A7C15`:
//!
//! ```text
//! hash(seed, rank, index) = mix(mix(seed + (rank + 1) * GAMMA) + (index + 1) * GAMMA)
//! mix(z): z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9; z = (z ^ z >> 27) * 0x94D049BB133111EB; z ^ z >> 31
//! small(hash, m) = ((hash >> 32) * (2 m + 1) >> 32) - m          an integer in -m ..= m
//! ```
//!
//! An element is, by [`PatternKind`]:
//! - `Bits`: the hash's low bits, as many as the type has. NaNs occur; data that is only moved must keep even those.
//! - `Sum`: for floats `small(hash, m)`, with `m` so small that a sum over up to 8 ranks (16 and more for types wider
//!   than 8 bits) is exact in the type itself, in any order; for integers the hash's low bits.
//! - `Prod`: for floats one of ±½, ±1, ±2, exponent `small(hash, 1)`, negative where the hash is odd; so products over
//!   up to 8 ranks are exact in any order. For integers the hash's low bits.
//! - `Avg`: `world * small(hash, m)`, for unsigned types `world * (small(hash, m) + m)`: the average is exact however
//!   a backend divides, before the sum or after.
//!
//! Sums and products of integers wrap, and that is exact in any order too.

mod number;

use comm_core::{CommError, DType, ReduceOp, Result};

pub(crate) use self::number::Number;

const GAMMA: u64 = 0x9E37_79B9_7F4A_7C15;

/// What an element is made for: see the module's documentation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum PatternKind {
    /// Any bits: for data that is moved.
    Bits = 0,
    /// For sums, minima and maxima.
    Sum = 1,
    /// For products.
    Prod = 2,
    /// For averages.
    Avg = 3,
}

impl PatternKind {
    /// The kind whose results are exact for a reduction; [`Bits`](Self::Bits) for operations that do not reduce.
    #[must_use]
    pub const fn for_op(op: Option<ReduceOp>) -> Self {
        match op {
            None => Self::Bits,
            Some(ReduceOp::Sum | ReduceOp::Min | ReduceOp::Max) => Self::Sum,
            Some(ReduceOp::Prod) => Self::Prod,
            Some(ReduceOp::Avg) => Self::Avg,
        }
    }
}

/// The data of all ranks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Pattern {
    /// Different seeds give unrelated data. Use a new one for every call, so that stale data cannot pass.
    pub seed: u64,
    /// What the data is for.
    pub kind: PatternKind,
    /// The number of ranks whose data is reduced. At least 1, at most 65536.
    pub world: usize,
}

impl Pattern {
    /// The data for an operation among `world` ranks.
    #[must_use]
    pub const fn new(seed: u64, op: Option<ReduceOp>, world: usize) -> Self {
        Self { seed, kind: PatternKind::for_op(op), world }
    }

    pub(crate) fn check(&self) -> Result<u32> {
        match u32::try_from(self.world) {
            Ok(world @ 1..=65536) => Ok(world),
            _ => Err(CommError::invalid("world", format!("{} is not in 1..=65536", self.world))),
        }
    }
}

/// What a buffer should hold.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Expected {
    /// What this rank sent.
    Sent(usize),
    /// What all ranks sent, reduced in rank order.
    Reduced(ReduceOp),
}

/// How many elements were wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Mismatches {
    /// Wrong elements.
    pub wrong: u64,
    /// The lowest index of a wrong element.
    pub first: Option<u64>,
}

impl Mismatches {
    /// The result of [`Kernels::verify`](crate::Kernels::verify), as two words copied from the device.
    #[must_use]
    pub const fn from_words(words: [u64; 2]) -> Self {
        Self { wrong: words[0], first: if words[1] == u64::MAX { None } else { Some(words[1]) } }
    }

    fn add(&mut self, index: u64) {
        self.wrong += 1;
        self.first = Some(self.first.map_or(index, |first| first.min(index)));
    }
}

const fn mix(z: u64) -> u64 {
    let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// The part of the hash that is the same for all of a rank's elements.
const fn stream(seed: u64, rank: u64) -> u64 {
    mix(seed.wrapping_add((rank.wrapping_add(1)).wrapping_mul(GAMMA)))
}

const fn element_hash(stream: u64, index: u64) -> u64 {
    mix(stream.wrapping_add(index.wrapping_add(1).wrapping_mul(GAMMA)))
}

/// `hash(seed, rank, index)` as the module's documentation defines it.
#[must_use]
pub const fn hash(seed: u64, rank: u64, index: u64) -> u64 {
    element_hash(stream(seed, rank), index)
}

/// An integer in `-m ..= m`.
fn small(hash: u64, magnitude: i32) -> i32 {
    let span = 2 * u64::from(magnitude.unsigned_abs()) + 1;
    // The quotient is below `span`, which is far below 2^31.
    i32::try_from(((hash >> 32) * span) >> 32).unwrap_or(0) - magnitude
}

fn element<T: Number>(kind: PatternKind, world: u32, hash: u64) -> T {
    match kind {
        PatternKind::Avg => {
            let value = small(hash, T::AVG) + if T::SIGNED { 0 } else { T::AVG };
            T::from_i64(i64::from(value) * i64::from(world))
        }
        PatternKind::Sum if T::FLOAT => T::from_i64(i64::from(small(hash, T::SUM))),
        PatternKind::Prod if T::FLOAT => T::signed_power_of_two(small(hash, 1), hash & 1 == 1),
        _ => T::from_bits64(hash),
    }
}

fn reduced<T: Number>(pattern: &Pattern, world: u32, streams: &[u64], op: ReduceOp, index: u64) -> T {
    let mut elements =
        streams.iter().map(|&s| element::<T>(pattern.kind, world, element_hash(s, index)).widen());
    let first = elements.next().unwrap_or_else(|| T::from_bits64(0).widen());
    T::finish(op, elements.fold(first, |acc, next| T::combine(op, acc, next)), world)
}

fn fill_as<T: Number>(bytes: &mut [u8], pattern: &Pattern, world: u32, rank: u64, first_index: u64) {
    let stream = stream(pattern.seed, rank);
    for (index, chunk) in (first_index..).zip(bytes.chunks_exact_mut(size_of::<T>())) {
        let raw = element::<T>(pattern.kind, world, element_hash(stream, index)).bits64().to_le_bytes();
        chunk.copy_from_slice(&raw[..size_of::<T>()]);
    }
}

fn verify_as<T: Number>(
    bytes: &[u8],
    pattern: &Pattern,
    world: u32,
    expected: Expected,
    first_index: u64,
    report_base: u64,
) -> Mismatches {
    let mut found = Mismatches::default();
    let streams: Vec<u64> = (0..u64::from(world)).map(|rank| stream(pattern.seed, rank)).collect();
    for (i, chunk) in (0_u64..).zip(bytes.chunks_exact(size_of::<T>())) {
        let index = first_index.wrapping_add(i);
        let right: T = match expected {
            Expected::Sent(rank) => element(pattern.kind, world, hash(pattern.seed, rank as u64, index)),
            Expected::Reduced(op) => reduced(pattern, world, &streams, op, index),
        };
        let mut raw = [0; 8];
        raw[..size_of::<T>()].copy_from_slice(chunk);
        if u64::from_le_bytes(raw) != right.bits64() {
            found.add(report_base + i);
        }
    }
    found
}

macro_rules! by_dtype {
    ($dtype:expr, $function:ident($($argument:expr),*)) => {
        match $dtype {
            DType::F64 => $function::<f64>($($argument),*),
            DType::F32 => $function::<f32>($($argument),*),
            DType::F16 => $function::<half::f16>($($argument),*),
            DType::BF16 => $function::<half::bf16>($($argument),*),
            DType::F8E4M3 => $function::<comm_core::F8E4M3>($($argument),*),
            DType::F8E5M2 => $function::<comm_core::F8E5M2>($($argument),*),
            DType::I8 => $function::<i8>($($argument),*),
            DType::U8 => $function::<u8>($($argument),*),
            DType::I32 => $function::<i32>($($argument),*),
            DType::U32 => $function::<u32>($($argument),*),
            DType::I64 => $function::<i64>($($argument),*),
            DType::U64 => $function::<u64>($($argument),*),
        }
    };
}

pub(crate) use by_dtype;

fn whole_elements(bytes: usize, dtype: DType) -> Result<()> {
    if bytes.is_multiple_of(dtype.size()) {
        return Ok(());
    }
    Err(CommError::invalid("bytes", format!("{bytes} bytes are no whole number of {dtype} elements")))
}

/// Fills a host buffer with what `rank` sends, from its element `first_index` on.
///
/// # Errors
/// [`CommError::InvalidArgument`] when `bytes` is no whole number of elements, or the world is out of range.
pub fn fill(bytes: &mut [u8], dtype: DType, pattern: &Pattern, rank: usize, first_index: u64) -> Result<()> {
    whole_elements(bytes.len(), dtype)?;
    let world = pattern.check()?;
    by_dtype!(dtype, fill_as(bytes, pattern, world, rank as u64, first_index));
    Ok(())
}

/// Compares a host buffer, bit for bit, with what it should hold from element `first_index` on. Indices of wrong
/// elements count from `report_base`.
///
/// # Errors
/// [`CommError::InvalidArgument`] when `bytes` is no whole number of elements, or the world is out of range.
pub fn verify(
    bytes: &[u8],
    dtype: DType,
    pattern: &Pattern,
    expected: Expected,
    first_index: u64,
    report_base: u64,
) -> Result<Mismatches> {
    whole_elements(bytes.len(), dtype)?;
    let world = pattern.check()?;
    Ok(by_dtype!(dtype, verify_as(bytes, pattern, world, expected, first_index, report_base)))
}

#[cfg(test)]
mod tests;
