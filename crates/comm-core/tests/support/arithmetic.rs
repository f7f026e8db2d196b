//! Reductions of bytes, per element type.

use comm_core::{DType, F8E4M3, F8E5M2, ReduceOp};
use half::{bf16, f16};

/// Elements of a type that norms take, in `f32`.
pub(crate) fn widen(dtype: DType, bytes: &[u8]) -> Vec<f32> {
    let element = |bytes: &[u8]| match (dtype, bytes) {
        (DType::F16, &[a, b]) => f16::from_ne_bytes([a, b]).to_f32(),
        (DType::BF16, &[a, b]) => bf16::from_ne_bytes([a, b]).to_f32(),
        (_, bytes) => f32::from_ne_bytes(bytes.try_into().unwrap()),
    };
    bytes.chunks(dtype.size()).map(element).collect()
}

pub(crate) fn reduce(dtype: DType, op: ReduceOp, parts: &[&[u8]]) -> Vec<u8> {
    macro_rules! int {
        ($ty:ty) => {
            elements(
                parts,
                |b| <$ty>::from_ne_bytes(b),
                |all: &[$ty]| match op {
                    ReduceOp::Sum => all.iter().fold(0, |a: $ty, b| a.wrapping_add(*b)),
                    ReduceOp::Prod => all.iter().fold(1, |a: $ty, b| a.wrapping_mul(*b)),
                    ReduceOp::Min => *all.iter().min().unwrap(),
                    ReduceOp::Max => *all.iter().max().unwrap(),
                    ReduceOp::Avg => {
                        (all.iter().map(|x| *x as i128).sum::<i128>() / all.len() as i128) as $ty
                    }
                },
                |v| v.to_ne_bytes(),
            )
        };
    }
    match dtype {
        DType::I8 => int!(i8),
        DType::U8 => int!(u8),
        DType::I32 => int!(i32),
        DType::U32 => int!(u32),
        DType::I64 => int!(i64),
        DType::U64 => int!(u64),
        DType::F64 => elements(parts, f64::from_ne_bytes, |all| float64(op, all), f64::to_ne_bytes),
        DType::F32 => elements(parts, f32::from_ne_bytes, |all| float32(op, all), f32::to_ne_bytes),
        DType::F16 => elements(
            parts,
            |b| f16::from_ne_bytes(b).to_f32(),
            |all| float32(op, all),
            |v| f16::from_f32(v).to_ne_bytes(),
        ),
        DType::BF16 => elements(
            parts,
            |b| bf16::from_ne_bytes(b).to_f32(),
            |all| float32(op, all),
            |v| bf16::from_f32(v).to_ne_bytes(),
        ),
        DType::F8E4M3 => elements(
            parts,
            |b: [u8; 1]| F8E4M3::from_bits(b[0]).to_f32(),
            |all| float32(op, all),
            |v| [F8E4M3::from_f32(v).to_bits()],
        ),
        DType::F8E5M2 => elements(
            parts,
            |b: [u8; 1]| F8E5M2::from_bits(b[0]).to_f32(),
            |all| float32(op, all),
            |v| [F8E5M2::from_f32(v).to_bits()],
        ),
    }
}

fn elements<T, const N: usize>(
    parts: &[&[u8]],
    decode: impl Fn([u8; N]) -> T,
    combine: impl Fn(&[T]) -> T,
    encode: impl Fn(T) -> [u8; N],
) -> Vec<u8> {
    let mut result = Vec::with_capacity(parts[0].len());
    let mut all = Vec::with_capacity(parts.len());
    for at in (0..parts[0].len()).step_by(N) {
        all.clear();
        all.extend(parts.iter().map(|part| decode(part[at..at + N].try_into().unwrap())));
        result.extend(encode(combine(&all)));
    }
    result
}

macro_rules! float {
    ($name:ident, $ty:ty) => {
        fn $name(op: ReduceOp, all: &[$ty]) -> $ty {
            let pick = |better: fn(&$ty, &$ty) -> bool| {
                let nan = all.iter().find(|x| x.is_nan());
                *nan.unwrap_or_else(|| all.iter().reduce(|a, b| if better(b, a) { b } else { a }).unwrap())
            };
            match op {
                ReduceOp::Sum => all.iter().copied().reduce(|a, b| a + b).unwrap(),
                ReduceOp::Avg => all.iter().copied().reduce(|a, b| a + b).unwrap() / all.len() as $ty,
                ReduceOp::Prod => all.iter().product(),
                ReduceOp::Min => pick(|a, b| a < b),
                ReduceOp::Max => pick(|a, b| a > b),
            }
        }
    };
}
float!(float32, f32);
float!(float64, f64);

/// A row of `r = s + residual + bias` and of the normalised output.
pub(crate) fn norm_row(
    dtype: DType,
    sum: &[u8],
    residual: &[u8],
    bias: Option<&[u8]>,
    weight: &[u8],
    eps: f32,
    offset: f32,
) -> (Vec<u8>, Vec<u8>) {
    let [sum, residual, weight] = [sum, residual, weight].map(|bytes| floats(dtype, bytes));
    let bias = bias.map_or_else(|| vec![0.0; sum.len()], |bytes| floats(dtype, bytes));
    let rows: Vec<f32> = (0..sum.len()).map(|i| sum[i] + residual[i] + bias[i]).collect();
    let rounded = bytes(dtype, &rows);
    let rows = floats(dtype, &rounded);
    let mean = rows.iter().map(|x| x * x).sum::<f32>() / rows.len() as f32;
    let scale = 1.0 / (mean + eps).sqrt();
    let output: Vec<f32> = rows.iter().zip(&weight).map(|(x, w)| x * scale * (w + offset)).collect();
    (rounded, bytes(dtype, &output))
}

fn floats(dtype: DType, bytes: &[u8]) -> Vec<f32> {
    bytes
        .chunks(dtype.size())
        .map(|b| match dtype {
            DType::F32 => f32::from_ne_bytes(b.try_into().unwrap()),
            DType::F16 => f16::from_ne_bytes(b.try_into().unwrap()).to_f32(),
            _ => bf16::from_ne_bytes(b.try_into().unwrap()).to_f32(),
        })
        .collect()
}

fn bytes(dtype: DType, values: &[f32]) -> Vec<u8> {
    values
        .iter()
        .flat_map(|&v| match dtype {
            DType::F32 => v.to_ne_bytes().to_vec(),
            DType::F16 => f16::from_f32(v).to_ne_bytes().to_vec(),
            _ => bf16::from_f32(v).to_ne_bytes().to_vec(),
        })
        .collect()
}
