//! The quantised all-reduce, bit by bit against a model of its definition.

use half::{bf16, f16};

use super::super::case::{Case, Form};
use super::super::data;
use super::super::reference::Equality;
use super::super::runner::Runner;
use super::offsets;
use crate::dtype::{DType, F8E4M3};
use crate::error::Result;
use crate::op::{OpKind, OpQuery};
use crate::quantize::GROUP;

const KIND: OpKind = OpKind::AllReduceQuantized;
const TYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

pub(super) fn run(runner: &mut Runner<'_>) {
    for dtype in TYPES {
        for values in [Values::Real, Values::Wild, Values::Special] {
            runner.case(KIND, &format!("{KIND}/{dtype}/{values:?}"), |case| every_count(case, dtype, values));
        }
    }
}

/// What is summed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Values {
    /// Reals of a few binades.
    Real,
    /// Any magnitude that the type has; some groups all zero, with either sign.
    Wild,
    /// The same with NaNs and infinities strewn in.
    Special,
}

impl Values {
    fn element(self, dtype: DType, seed: u64, rank: usize, index: usize) -> f32 {
        let random = data::random(seed, rank, index);
        let of_group = data::random(seed, rank, (1 << 40) | (index / GROUP));
        let unit = (random >> 40) as f32 / (1 << 23) as f32 - 1.0;
        if self == Self::Real {
            return unit * [0.25, 1.0, 4.0][(random % 3) as usize];
        }
        if of_group.is_multiple_of(5) {
            return if random & 1 == 1 { -0.0 } else { 0.0 };
        }
        if self == Self::Special && of_group.is_multiple_of(3) && random.is_multiple_of(61) {
            return [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][(random >> 8) as usize % 3];
        }
        // From the type's subnormal numbers up to where eight ranks' sum is infinite.
        let binades = if dtype == DType::F16 { 40 } else { 276 };
        let top = if dtype == DType::F16 { 16 } else { 128 };
        let group = (of_group >> 8) % binades;
        let own = (group + (random >> 4) % 12).min(binades);
        (f64::from(unit) * 2_f64.powi(top - own as i32)) as f32
    }
}

fn every_count(case: &mut Case<'_, '_>, dtype: DType, values: Values) -> Result<()> {
    let world = case.world;
    let quick = [0, 1, 8, 127, 129, 256 * world, 4096, 4103, 4096 * world + 8];
    let more = [2, 7, 128, 511, 512, 513, 512 * world, 512 * world + 1, 4096 * world, 65_537];
    let large = [1_048_583, 9_437_219];
    let counts = quick.into_iter().chain(more.into_iter().filter(|_| !case.config.quick));
    // Values that are everywhere alike need no large counts.
    let large = large.into_iter().filter(|_| values == Values::Real && !case.config.quick);
    let counts: Vec<usize> = counts.chain(large).collect();
    let mut ran = false;
    for (turn, count) in counts.into_iter().enumerate() {
        if count * dtype.size() * world > case.config.max_bytes {
            continue;
        }
        if !case.supported(&OpQuery::new(KIND, dtype, count)) {
            return Ok(());
        }
        let (send_offset, recv_offset) = offsets(turn, dtype);
        one(case, dtype, values, count, Form::Apart { send_offset, recv_offset })?;
        one(case, dtype, values, count, Form::SendInRecv(0))?;
        ran = true;
    }
    if !ran {
        case.skipped.get_or_insert("larger than max_bytes".into());
    }
    Ok(())
}

fn one(case: &mut Case<'_, '_>, dtype: DType, values: Values, count: usize, form: Form) -> Result<()> {
    let (seed, world, rank) = (case.next_seed(), case.world, case.rank);
    case.at = format!("{KIND} of {count} {dtype}, {values:?}, {form:?}");
    let bits = |rank: usize, index: usize| {
        data::from_f64(dtype, f64::from(values.element(dtype, seed, rank, index)))
    };
    let mut input = Vec::new();
    (0..count).for_each(|index| data::push(&mut input, dtype, bits(rank, index)));
    let (comm, stream) = (case.comm, case.stream());
    let got = case.exchange(&input, input.len(), form, |send, recv| {
        // SAFETY: the operands hold `count` elements in live memory that only this call uses.
        unsafe { comm.all_reduce_quantized(send, recv, count, dtype, stream) }
    })?;
    let expected = match world {
        1 => input,
        _ => expected(dtype, world, count, |rank, index| data::to_f64(dtype, bits(rank, index)) as f32),
    };
    case.expect(dtype, &expected, &got, equality(&expected, dtype));
    case.note_equal(&got);
    Ok(())
}

/// The same bits; of NaNs, any.
fn equality(expected: &[u8], dtype: DType) -> Equality {
    let mut values =
        (0..expected.len() / dtype.size()).map(|i| data::to_f64(dtype, data::at(expected, dtype, i)));
    if values.any(f64::is_nan) { Equality::Value } else { Equality::Bits }
}

/// The definition, as the documentation has it, with another implementation of the fp8 type than the library's own.
fn expected(dtype: DType, world: usize, count: usize, element: impl Fn(usize, usize) -> f32) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(count * dtype.size());
    for first in (0..count).step_by(GROUP) {
        let range = first..count.min(first + GROUP);
        let mut sum = vec![0.0_f32; range.len()];
        for rank in 0..world {
            let part: Vec<f32> = quantised(range.clone().map(|index| element(rank, index)).collect());
            match rank {
                0 => sum = part,
                _ => sum.iter_mut().zip(part).for_each(|(sum, part)| *sum += part),
            }
        }
        for value in quantised(sum) {
            data::push(&mut bytes, dtype, rounded(dtype, value));
        }
    }
    bytes
}

/// From `f32`, in which the definition computes; by way of `f64` a tie in the last place may fall otherwise.
fn rounded(dtype: DType, value: f32) -> u64 {
    match dtype {
        DType::F16 => u64::from(f16::from_f32(value).to_bits()),
        DType::BF16 => u64::from(bf16::from_f32(value).to_bits()),
        _ => u64::from(value.to_bits()),
    }
}

fn quantised(values: Vec<f32>) -> Vec<f32> {
    if !values.iter().all(|value| value.is_finite()) {
        return vec![f32::NAN; values.len()];
    }
    let most = values.iter().fold(2_f32.powi(-100), |most, value| most.max(value.abs()));
    let (scale, inverse) = (most / 448.0, 448.0 / most);
    values.into_iter().map(|value| F8E4M3::from_f32(value * inverse).to_f32() * scale).collect()
}
