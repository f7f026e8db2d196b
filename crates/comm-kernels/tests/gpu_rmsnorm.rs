//! Residual + bias + RMSNorm on the device, against a reference on the host.

#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]
#![allow(
    clippy::undocumented_unsafe_blocks,
    reason = "all buffers are of the right size and outlive the work"
)]
#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    reason = "a reference in two precisions"
)]

mod common;

use comm_core::{DType, NormQuantScale, NormQuantization, RmsNormArgs, quantize};
use comm_kernels::pattern;
use half::{bf16, f16};

fn encode(dtype: DType, value: f32) -> Vec<u8> {
    match dtype {
        DType::F16 => f16::from_f32(value).to_le_bytes().to_vec(),
        DType::BF16 => bf16::from_f32(value).to_le_bytes().to_vec(),
        _ => value.to_le_bytes().to_vec(),
    }
}

fn decode(dtype: DType, raw: &[u8]) -> f32 {
    match dtype {
        DType::F16 => f16::from_le_bytes(raw.try_into().unwrap()).to_f32(),
        DType::BF16 => bf16::from_le_bytes(raw.try_into().unwrap()).to_f32(),
        _ => f32::from_le_bytes(raw.try_into().unwrap()),
    }
}

/// Numbers between -2 and 2 that the type can hold.
fn numbers(dtype: DType, seed: u64, count: usize) -> Vec<f32> {
    (0..count as u64)
        .map(|i| {
            let uniform = (pattern::hash(seed, 0, i) >> 40) as f32 / (1_u32 << 22) as f32 - 2.0;
            decode(dtype, &encode(dtype, uniform))
        })
        .collect()
}

fn bytes(dtype: DType, values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|&value| encode(dtype, value)).collect()
}

#[derive(Clone, Copy, Debug)]
struct Case {
    dtype: DType,
    tokens: usize,
    hidden: usize,
    bias: bool,
    weight_offset: f32,
    in_place: bool,
    offset: usize,
}

fn check(device: &common::Device, case: Case) {
    let Case { dtype, tokens, hidden, .. } = case;
    let (count, eps) = (tokens * hidden, 1e-5);
    let input = numbers(dtype, 1, count);
    let residual = numbers(dtype, 2, count);
    let bias = numbers(dtype, 3, hidden);
    let weight = numbers(dtype, 4, hidden);

    let at = |values: &[f32]| device.filled(&bytes(dtype, values), case.offset * dtype.size());
    let (input_at, residual_at, bias_at, weight_at) = (at(&input), at(&residual), at(&bias), at(&weight));
    let blank = || device.buffer(count * dtype.size(), case.offset * dtype.size());
    let (residual_out_at, output_at) = (blank(), blank());
    let residual_out_at = if case.in_place { &residual_at } else { &residual_out_at };
    let output_at = if case.in_place { &input_at } else { &output_at };
    let args = RmsNormArgs {
        input: input_at.addr(),
        residual: residual_at.addr(),
        residual_out: residual_out_at.addr(),
        bias: case.bias.then(|| bias_at.addr()),
        weight: weight_at.addr(),
        output: output_at.addr(),
        tokens,
        hidden,
        dtype,
        eps,
        weight_offset: case.weight_offset,
    };
    unsafe { device.kernels.rmsnorm(&args, device.stream()) }.unwrap();
    let (residual_out, output) = (residual_out_at.content(), output_at.content());
    if !case.in_place {
        for per_token in [false, true] {
            check_fp8(device, case, args, per_token, &output);
        }
    }

    let tolerance = match dtype {
        DType::F32 => 4e-6,
        DType::F16 => 1.1 / 1024.0,
        _ => 1.1 / 128.0,
    };
    for row in 0..tokens {
        let range = row * hidden..(row + 1) * hidden;
        let sums: Vec<f32> = range
            .clone()
            .map(|i| {
                let sum = input[i] + residual[i];
                let sum = if case.bias { sum + bias[i - row * hidden] } else { sum };
                decode(dtype, &encode(dtype, sum))
            })
            .collect();
        let raw = range.start * dtype.size()..range.end * dtype.size();
        assert!(residual_out[raw] == bytes(dtype, &sums), "residual_out of row {row}: {case:?}");
        let square = sums.iter().map(|&r| f64::from(r).powi(2)).sum::<f64>() / hidden as f64;
        let factor = 1.0 / (square + f64::from(eps)).sqrt();
        for (h, &r) in sums.iter().enumerate() {
            let wanted = f64::from(r) * factor * f64::from(weight[h] + case.weight_offset);
            let got = decode(dtype, &output[(row * hidden + h) * dtype.size()..][..dtype.size()]);
            let error = (f64::from(got) - wanted).abs();
            assert!(
                error <= tolerance * wanted.abs() + 1e-6,
                "row {row} column {h}: {got}, not {wanted}: {case:?}"
            );
        }
    }
}

/// The fp8 results, with the unquantised one and without: what quantising `output` gives, bit by bit.
fn check_fp8(device: &common::Device, case: Case, args: RmsNormArgs, per_token: bool, output: &[u8]) {
    let Case { dtype, tokens, hidden, .. } = case;
    let scale = 0.01_f32;
    let scales_at = match per_token {
        true => device.buffer(4 * tokens, 4 * case.offset),
        false => device.filled(&scale.to_ne_bytes(), 4 * case.offset),
    };
    let fp8_at = device.buffer(tokens * hidden, case.offset);
    for keep_unquantized in [true, false] {
        let quantized = NormQuantization {
            output: fp8_at.addr(),
            scale: match per_token {
                true => NormQuantScale::PerToken(scales_at.addr()),
                false => NormQuantScale::PerTensor(scales_at.addr()),
            },
            keep_unquantized,
        };
        unsafe { device.kernels.rmsnorm_quantized(&args, &quantized, device.stream()) }.unwrap();
        let (found, scales) = (fp8_at.content(), scales_at.content());
        for row in 0..tokens {
            let values: Vec<f32> = (row * hidden..(row + 1) * hidden)
                .map(|i| decode(dtype, &output[i * dtype.size()..][..dtype.size()]))
                .collect();
            let (wanted, inverse) = match per_token {
                true => quantize::scale(quantize::amax(&values)),
                false => (scale, 1.0 / scale),
            };
            if per_token {
                assert!(scales[4 * row..4 * row + 4] == wanted.to_ne_bytes(), "scale of row {row}: {case:?}");
            }
            let wanted: Vec<u8> = values.iter().map(|x| quantize::to_e4m3(x * inverse).to_bits()).collect();
            assert!(found[row * hidden..(row + 1) * hidden] == wanted, "fp8 of row {row}: {case:?}");
        }
    }
}

const PLAIN: Case = Case {
    dtype: DType::BF16,
    tokens: 3,
    hidden: 4096,
    bias: true,
    weight_offset: 0.0,
    in_place: false,
    offset: 0,
};

#[test]
fn every_type_and_width() {
    let Some(device) = common::device() else { return };
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        // One element; less than a warp; several rows a block; partial warps; more than fits in registers, with and
        // without 16-byte accesses.
        for hidden in [1, 7, 8, 64, 100, 250, 256, 264, 1000, 2880, 4096, 5120, 8192, 20_000, 33_000, 40_001]
        {
            check(&device, Case { dtype, hidden, ..PLAIN });
        }
    }
}

#[test]
fn every_variant() {
    let Some(device) = common::device() else { return };
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        for bias in [false, true] {
            for in_place in [false, true] {
                for offset in [0, 1] {
                    for (tokens, hidden) in [(1, 8192), (5, 40_000), (17, 128), (9, 33)] {
                        let weight_offset = if bias { 0.0 } else { 1.0 };
                        check(&device, Case { dtype, tokens, hidden, bias, weight_offset, in_place, offset });
                    }
                }
            }
        }
    }
}

#[test]
fn more_rows_than_blocks() {
    let Some(device) = common::device() else { return };
    for (tokens, hidden) in [(40_000, 16), (7000, 1032)] {
        check(&device, Case { tokens, hidden, ..PLAIN });
    }
}

#[test]
fn no_rows_and_bad_arguments() {
    let Some(device) = common::device() else { return };
    let (buffer, stream) = (device.buffer(4096, 0), device.stream());
    let part = |i: u64| buffer.addr().offset(512 * i);
    let args = RmsNormArgs {
        input: part(0),
        residual: part(1),
        residual_out: part(2),
        bias: None,
        weight: part(3),
        output: part(4),
        tokens: 1,
        hidden: 16,
        dtype: DType::BF16,
        eps: 1e-6,
        weight_offset: 0.0,
    };
    let run = |args| unsafe { device.kernels.rmsnorm(&args, stream) };
    assert!(run(args).is_ok());
    assert!(run(RmsNormArgs { tokens: 0, ..args }).is_ok());
    assert!(run(RmsNormArgs { dtype: DType::I32, ..args }).is_err());
    assert!(run(RmsNormArgs { hidden: 0, ..args }).is_err());
    assert!(run(RmsNormArgs { output: args.residual, ..args }).is_err());
    assert!(run(RmsNormArgs { input: comm_core::DeviceAddr::NULL, ..args }).is_err());
    assert!(run(RmsNormArgs { eps: f32::NAN, ..args }).is_err());
}
