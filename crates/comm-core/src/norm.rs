//! The residual + bias + RMSNorm step on host memory: what the host backend computes with, and a reference for others.

use half::{bf16, f16};

use crate::check;
use crate::dtype::DType;
use crate::error::{CommError, Result};
use crate::fused::{NormQuantScale, NormQuantization, RmsNormArgs};
use crate::quantize;

/// One row of residual + bias + RMSNorm in `f32`, as [`RmsNormArgs`] defines it.
///
/// On entry `row` holds the sums over the ranks; on return, the normalised values before their final rounding. On entry
/// `residual` holds the residual; on return, the new one, rounded. `round` rounds to the operands' type and back. All
/// slices are of one length.
pub fn rmsnorm_row(
    row: &mut [f32],
    residual: &mut [f32],
    bias: Option<&[f32]>,
    weight: &[f32],
    eps: f32,
    weight_offset: f32,
    round: impl Fn(f32) -> f32,
) {
    match bias {
        Some(bias) => {
            for ((r, s), b) in residual.iter_mut().zip(&*row).zip(bias) {
                *r = round(*s + *r + *b);
            }
        }
        None => {
            for (r, s) in residual.iter_mut().zip(&*row) {
                *r = round(*s + *r);
            }
        }
    }
    let scale = 1.0 / (mean_square(residual) + eps).sqrt();
    for ((o, r), w) in row.iter_mut().zip(&*residual).zip(weight) {
        *o = *r * scale * (*w + weight_offset);
    }
}

/// Sixteen partial sums: they vectorise, and lose less than one running sum would.
fn mean_square(values: &[f32]) -> f32 {
    let mut partial = [0.0_f32; 16];
    let mut chunks = values.chunks_exact(16);
    for chunk in &mut chunks {
        for (p, v) in partial.iter_mut().zip(chunk) {
            *p += v * v;
        }
    }
    for (p, v) in partial.iter_mut().zip(chunks.remainder()) {
        *p += v * v;
    }
    let mut width = 8;
    while width > 0 {
        for at in 0..width {
            partial[at] += partial[at + width];
        }
        width /= 2;
    }
    partial[0] / values.len().max(1) as f32
}

trait Rounded: Copy {
    fn wide(self) -> f32;
    fn rounded(value: f32) -> Self;
}

macro_rules! rounded {
    ($($ty:ty: $wide:expr, $rounded:expr;)*) => {$(
        impl Rounded for $ty {
            fn wide(self) -> f32 { ($wide)(self) }
            fn rounded(value: f32) -> Self { ($rounded)(value) }
        }
    )*};
}
rounded! {
    f32: |x| x, |x| x;
    f16: f16::to_f32, f16::from_f32;
    bf16: bf16::to_f32, bf16::from_f32;
}

/// Residual + bias + RMSNorm of matrices in host memory, where `args.input` holds the sums over the ranks already.
///
/// # Errors
/// [`CommError::InvalidArgument`].
///
/// # Safety
/// The operands are valid as [`RmsNormArgs`] says, in this process's memory, and nobody else uses what is written.
pub unsafe fn rmsnorm_host(args: &RmsNormArgs) -> Result<()> {
    if check::rmsnorm(args)? == 0 {
        return Ok(());
    }
    // SAFETY: as the caller vouches.
    unsafe { of_type(args, None) }
}

/// The same with an fp8 result, as [`NormQuantization`] defines it.
///
/// # Errors
/// [`CommError::InvalidArgument`].
///
/// # Safety
/// As [`rmsnorm_host`]; the fp8 result and its scales too are valid, and used by nobody else.
pub unsafe fn rmsnorm_host_quantized(args: &RmsNormArgs, quantized: &NormQuantization) -> Result<()> {
    if check::rmsnorm_quantized(args, quantized)? == 0 {
        return Ok(());
    }
    // SAFETY: as the caller vouches.
    unsafe { of_type(args, Some(quantized)) }
}

/// # Safety
/// As the two above, with checked arguments.
unsafe fn of_type(args: &RmsNormArgs, quantized: Option<&NormQuantization>) -> Result<()> {
    // SAFETY: as the caller vouches; each arm's type is the dtype's.
    unsafe {
        match args.dtype {
            DType::F32 => rows::<f32>(args, quantized),
            DType::F16 => rows::<f16>(args, quantized),
            DType::BF16 => rows::<bf16>(args, quantized),
            other => return Err(CommError::invalid("dtype", format!("RMSNorm takes no {other}"))),
        }
    }
    Ok(())
}

/// # Safety
/// As [`rmsnorm_host`], with checked arguments and `T` of their dtype.
unsafe fn rows<T: Rounded>(args: &RmsNormArgs, quantized: Option<&NormQuantization>) {
    let hidden = args.hidden;
    let vector = |addr: u64| -> Vec<f32> {
        // SAFETY: the caller vouches for `hidden` elements at each of these; they overlap nothing that is written.
        let values = unsafe { std::slice::from_raw_parts(addr as *const T, hidden) };
        values.iter().map(|x| x.wide()).collect()
    };
    let weight = vector(args.weight.0);
    let bias = args.bias.map(|bias| vector(bias.0));
    let (mut row, mut residual) = (vec![0.0; hidden], vec![0.0; hidden]);
    for token in 0..args.tokens {
        // SAFETY: row `token` is inside each matrix, as the caller vouches. Operands may be equal in pairs, so a row is
        // read completely before any is written, and no two references are alive at a time.
        unsafe {
            load::<T>(&mut row, args.input.0, token);
            load::<T>(&mut residual, args.residual.0, token);
        }
        let round = |x: f32| T::rounded(x).wide();
        rmsnorm_row(&mut row, &mut residual, bias.as_deref(), &weight, args.eps, args.weight_offset, round);
        // SAFETY: as above.
        unsafe {
            store::<T>(&residual, args.residual_out.0, token);
            if quantized.is_none_or(|quantized| quantized.keep_unquantized) {
                store::<T>(&row, args.output.0, token);
            }
        }
        if let Some(quantized) = quantized {
            row.iter_mut().for_each(|value| *value = round(*value));
            // SAFETY: as above.
            unsafe { store_quantized(&row, quantized, token) };
        }
    }
}

/// # Safety
/// Row `token` of the fp8 result is valid for writes, and so is its scale, or the scale of all for reads.
unsafe fn store_quantized(row: &[f32], quantized: &NormQuantization, token: usize) {
    let inverse = match quantized.scale {
        // SAFETY: as the caller vouches.
        NormQuantScale::PerTensor(addr) => 1.0 / unsafe { *(addr.0 as *const f32) },
        NormQuantScale::PerToken(addr) => {
            let (scale, inverse) = quantize::scale(quantize::amax(row));
            // SAFETY: as above.
            unsafe { *(addr.0 as *mut f32).add(token) = scale };
            inverse
        }
    };
    // SAFETY: as above.
    let to = unsafe {
        std::slice::from_raw_parts_mut((quantized.output.0 as *mut u8).add(token * row.len()), row.len())
    };
    for (byte, value) in to.iter_mut().zip(row) {
        *byte = quantize::to_e4m3(*value * inverse).to_bits();
    }
}

/// # Safety
/// Row `token` of the matrix at `addr` is valid for reads of `T`.
unsafe fn load<T: Rounded>(row: &mut [f32], addr: u64, token: usize) {
    // SAFETY: as the caller vouches.
    let values = unsafe { std::slice::from_raw_parts((addr as *const T).add(token * row.len()), row.len()) };
    for (wide, value) in row.iter_mut().zip(values) {
        *wide = value.wide();
    }
}

/// # Safety
/// Row `token` of the matrix at `addr` is valid for writes of `T`.
unsafe fn store<T: Rounded>(row: &[f32], addr: u64, token: usize) {
    // SAFETY: as the caller vouches.
    let values =
        unsafe { std::slice::from_raw_parts_mut((addr as *mut T).add(token * row.len()), row.len()) };
    for (value, wide) in values.iter_mut().zip(row) {
        *value = T::rounded(*wide);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_by_hand() {
        let mut row = [1.0, -2.0, 0.0];
        let mut residual = [2.0, 2.0, -3.0];
        rmsnorm_row(&mut row, &mut residual, Some(&[0.0, 4.0, 0.0]), &[1.0, 0.5, 0.0], 0.0, 1.0, |x| x);
        assert_eq!(residual, [3.0, 4.0, -3.0]);
        let scale = (3.0 / 34.0_f32).sqrt();
        for (found, expected) in row.iter().zip([3.0 * 2.0, 4.0 * 1.5, -3.0].map(|x| x * scale)) {
            assert!((found - expected).abs() < 1e-6, "{found} {expected}");
        }
    }
}
