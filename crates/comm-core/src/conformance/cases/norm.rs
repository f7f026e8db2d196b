//! The fused all-reduce + residual + bias + RMSNorm.

use super::super::case::Case;
use super::super::data;
use super::super::reference::Equality;
use super::super::runner::Runner;
use super::quantized_norm::Fp8;
use crate::addr::DeviceAddr;
use crate::dtype::DType;
use crate::error::Result;
use crate::fused::RmsNormArgs;
use crate::op::{OpKind, OpQuery};

pub(super) const TYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// Keys of the data that all ranks share, beyond any rank.
const RESIDUAL: usize = 1 << 20;
const BIAS: usize = RESIDUAL + 1;
const WEIGHT: usize = RESIDUAL + 2;

pub(super) const EPS: f32 = 1e-5;

/// Integers so small that a row of 8192 has a sum of squares that `f32` holds exactly, in any order of summation.
pub(super) fn partial(dtype: DType, ranks: usize, seed: u64, rank: usize, index: usize) -> (f64, u64) {
    let limit = (16 / ranks as u64).max(1);
    integer(dtype, data::random(seed, rank, index), limit)
}

pub(super) fn residual(dtype: DType, seed: u64, index: usize) -> (f64, u64) {
    integer(dtype, data::random(seed, RESIDUAL, index), 16)
}

pub(super) fn bias(dtype: DType, seed: u64, index: usize) -> (f64, u64) {
    integer(dtype, data::random(seed, BIAS, index), 8)
}

/// Multiples of 1/16 within one: exact in every type, with 1 added too.
pub(super) fn weight(dtype: DType, seed: u64, index: usize) -> (f64, u64) {
    let (value, _) = integer(dtype, data::random(seed, WEIGHT, index), 16);
    (value / 16.0, data::from_f64(dtype, value / 16.0))
}

fn integer(dtype: DType, random: u64, limit: u64) -> (f64, u64) {
    let value = ((random >> 16) % (2 * limit + 1)) as f64 - limit as f64;
    (value, data::from_f64(dtype, value))
}

/// The normalised row in double precision, rounded once.
pub(super) fn normalise(dtype: DType, row: &[f64], weights: &[f64], offset: f32) -> Vec<u8> {
    let mean = row.iter().map(|x| x * x).sum::<f64>() / row.len() as f64;
    let scale = 1.0 / (mean + f64::from(EPS)).sqrt();
    let mut bytes = Vec::with_capacity(row.len() * dtype.size());
    for (x, w) in row.iter().zip(weights) {
        data::push(&mut bytes, dtype, data::from_f64(dtype, x * scale * (w + f64::from(offset))));
    }
    bytes
}

/// The outputs' tolerance; see the suite's documentation.
pub(super) const fn tolerance(dtype: DType) -> Equality {
    Equality::Ulps(if matches!(dtype, DType::F32) { 4 } else { 1 })
}

pub(super) fn encode(dtype: DType, elements: impl Iterator<Item = (f64, u64)>) -> Vec<u8> {
    let mut bytes = Vec::new();
    elements.for_each(|(_, bits)| data::push(&mut bytes, dtype, bits));
    bytes
}

#[derive(Clone, Copy, Debug)]
struct Shape {
    tokens: usize,
    hidden: usize,
    bias: bool,
    weight_offset: f32,
    residual_in_place: bool,
    output_is_input: bool,
    misaligned: bool,
}

pub(super) fn run(runner: &mut Runner<'_>) {
    let quick = runner.config.quick;
    let hiddens: &[usize] = if quick { &[7, 1024] } else { &[7, 1000, 1024, 2880, 8192] };
    let tokens: &[usize] = if quick { &[0, 1, 3] } else { &[0, 1, 3, 17] };
    for dtype in TYPES {
        for &hidden in hiddens {
            for kind in [OpKind::AllReduceRmsNorm, OpKind::AllReduceRmsNormQuantized] {
                runner.case(kind, &format!("{kind}/{dtype}/{hidden}"), |case| {
                    for (turn, &tokens) in tokens.iter().enumerate() {
                        for variant in 0..4 {
                            let flags = variant * 5 + turn * 3;
                            let shape = Shape {
                                tokens,
                                hidden,
                                bias: variant % 2 == 0,
                                weight_offset: f32::from(u8::from(variant / 2 == 1)),
                                residual_in_place: flags & 1 == 0,
                                output_is_input: (flags >> 1) & 1 == 0,
                                misaligned: turn % 2 == 1,
                            };
                            one(case, kind, dtype, shape)?;
                        }
                    }
                    Ok(())
                });
            }
        }
    }
}

fn one(case: &mut Case<'_, '_>, kind: OpKind, dtype: DType, shape: Shape) -> Result<()> {
    let Shape { tokens, hidden, .. } = shape;
    let count = tokens * hidden;
    if !case.supported(&OpQuery::new(kind, dtype, count)) {
        return Ok(());
    }
    let (seed, world, size) = (case.next_seed(), case.world, dtype.size());
    case.at = format!("{kind} {dtype} {shape:?}");
    case.calls += 1;
    let own = case.rank;
    let input = encode(dtype, (0..count).map(|i| partial(dtype, world, seed, own, i)));
    let before = encode(dtype, (0..count).map(|i| residual(dtype, seed, i)));
    let weights = encode(dtype, (0..hidden).map(|i| weight(dtype, seed, i)));
    let biases = encode(dtype, (0..hidden).map(|i| bias(dtype, seed, i)));
    let off = |elements: usize| if shape.misaligned { elements * size } else { 0 };
    let arena = &mut *case.arena;
    let in_ = arena.lay(0, off(1), input.len())?;
    let out = if shape.output_is_input { in_ } else { arena.lay(1, off(3), input.len())? };
    let res = arena.lay(2, off(0), before.len())?;
    let res_out = if shape.residual_in_place { res } else { arena.lay(3, off(5), before.len())? };
    let weight_at = arena.lay(4, off(1), weights.len())?;
    let bias_at = arena.lay(5, off(7), biases.len())?;
    arena.poison(&out)?;
    arena.poison(&res_out)?;
    arena.put(&in_, &input)?;
    arena.put(&res, &before)?;
    arena.put(&weight_at, &weights)?;
    arena.put(&bias_at, &biases)?;
    let args = RmsNormArgs {
        input: in_.addr(),
        residual: res.addr(),
        residual_out: res_out.addr(),
        bias: shape.bias.then(|| bias_at.addr()),
        weight: weight_at.addr(),
        output: out.addr(),
        tokens,
        hidden,
        dtype,
        eps: EPS,
        weight_offset: shape.weight_offset,
    };
    let (comm, stream): (_, _) = (case.comm, case.stream());
    let fp8 = match kind {
        OpKind::AllReduceRmsNorm => None,
        // With either scale, at every number of tokens.
        _ => {
            Some(Fp8::lay(case, shape.bias == (shape.weight_offset == 0.0), (tokens, hidden), off(3) / size)?)
        }
    };
    // SAFETY: every operand holds the elements that the arguments say, in live memory that only this call uses.
    unsafe {
        match &fp8 {
            Some(fp8) => comm.all_reduce_rmsnorm_quantized(&args, &fp8.args(true), stream),
            None => comm.all_reduce_rmsnorm(&args, stream),
        }
    }?;

    let weight_values: Vec<f64> = (0..hidden).map(|i| weight(dtype, seed, i).0).collect();
    let (mut sums, mut outputs) = (Vec::new(), Vec::new());
    for token in 0..tokens {
        let row: Vec<f64> = (0..hidden)
            .map(|h| {
                let i = token * hidden + h;
                let sum: f64 = (0..world).map(|rank| partial(dtype, world, seed, rank, i).0).sum();
                sum + residual(dtype, seed, i).0 + if shape.bias { bias(dtype, seed, h).0 } else { 0.0 }
            })
            .collect();
        row.iter().for_each(|&x| data::push(&mut sums, dtype, data::from_f64(dtype, x)));
        outputs.extend(normalise(dtype, &row, &weight_values, shape.weight_offset));
    }
    let got_residual = case.fetch(&res_out, "residual_out")?;
    let at = std::mem::take(&mut case.at);
    case.at = format!("{at}, residual_out");
    case.expect(dtype, &sums, &got_residual, Equality::Value);
    case.at = format!("{at}, output");
    let got = case.fetch(&out, "output")?;
    case.expect(dtype, &outputs, &got, tolerance(dtype));
    case.note_equal(&got_residual);
    case.note_equal(&got);
    case.at = at;
    if let Some(fp8) = fp8 {
        let quantised = fp8.fetch(case)?;
        fp8.check(case, dtype, &got, &quantised, 0..tokens);
        quantised.iter().for_each(|bytes| case.note_equal(bytes));
        // The same without the unquantised result.
        fp8.poison(case)?;
        case.arena.put(&in_, &input)?;
        case.arena.put(&res, &before)?;
        case.calls += 1;
        // SAFETY: as above.
        unsafe { comm.all_reduce_rmsnorm_quantized(&args, &fp8.args(false), stream) }?;
        if fp8.fetch(case)? != quantised {
            case.fail("the fp8 result differs where the unquantised one is not kept");
        }
        if case.fetch(&res_out, "residual_out")? != got_residual {
            case.fail("residual_out differs where the unquantised result is not kept");
        }
    }
    let mut untouched = vec![(weight_at, "weight", weights), (bias_at, "bias", biases)];
    if !shape.output_is_input {
        untouched.push((in_, "input", input));
    }
    if !shape.residual_in_place {
        untouched.push((res, "residual", before));
    }
    for (region, name, contents) in untouched {
        if case.fetch(&region, name)? != contents {
            case.fail(format!("the {name} was modified"));
        }
    }
    Ok(())
}

/// Null for nothing.
pub(super) fn or_null(addr: DeviceAddr, count: usize) -> DeviceAddr {
    if count == 0 { DeviceAddr::NULL } else { addr }
}
