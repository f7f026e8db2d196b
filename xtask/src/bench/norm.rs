//! The fused all-reduce + residual + bias + RMSNorm as a benchmark row, compared with a reference in f64.

use anyhow::{Result, ensure};
use comm_core::{
    DType, DeviceAddr, F8E4M3, NormQuantScale, NormQuantization, OpKind, RmsNormArgs, TwoGroupNormArgs,
};

use crate::bench::data::{self, Content, Segment, encode, pattern, read};
use crate::bench::measure::{Bench, Buffer};
use crate::bench::plan::{Case, uneven};
use crate::bench::row::{NormShape, Row};
use crate::device::POISON;

const EPS: f32 = 1e-5;
const WEIGHT_OFFSET: f32 = 0.0;

/// Measures one shape into `row`. The plain form is out of place; the two-group form, with this communicator as both
/// groups, is in place by its nature.
///
/// # Errors
/// The operation's, the device's or the host communicator's.
pub fn measure(bench: &Bench<'_>, number: u64, case: &Case, row: &mut Row) -> Result<()> {
    let dtype = bench.job.dtype;
    ensure!(
        matches!(dtype, DType::F32 | DType::F16 | DType::BF16),
        "the fused norm takes f32, f16 and bf16, not {dtype}"
    );
    let Some(NormShape { tokens, hidden }) = case.norm else { return Ok(()) };
    let memory = bench.device.memory();
    let (matrix, vector) = (tokens * hidden * dtype.size(), hidden * dtype.size());
    let [input, residual, residual_out, output] = [(); 4].map(|()| Buffer::new(memory, matrix));
    let (input, residual, residual_out, output) = (input?, residual?, residual_out?, output?);
    let (bias, weight) = (Buffer::new(memory, vector)?, Buffer::new(memory, vector)?);

    let partials = pattern(number << 1, Some(comm_core::ReduceOp::Sum), bench.comm.size());
    let values = Values::new(tokens, hidden, dtype);
    let own = Segment {
        offset: 0,
        count: tokens * hidden,
        content: Content::Of { rank: bench.comm.rank(), first: 0 },
    };
    // SAFETY: every buffer was allocated with the size of what is written.
    unsafe {
        bench.device.fill(input.addr, &partials, dtype, &own)?;
        memory.upload(residual.addr, &values.residual)?;
        memory.upload(bias.addr, &values.bias)?;
        memory.upload(weight.addr, &values.weight)?;
        bench.device.poison(output.addr, matrix)?;
        bench.device.poison(residual_out.addr, matrix)?;
    }
    let mut sums = vec![0.0; tokens * hidden];
    let mut part = vec![0; matrix];
    for rank in 0..bench.comm.size() {
        data::fill(&mut part, dtype, &partials, rank, 0)?;
        for (sum, element) in sums.iter_mut().zip(part.chunks_exact(dtype.size())) {
            *sum += read(dtype, element);
        }
    }
    let expected = values.expected(&sums);

    if matches!(case.op, OpKind::AllReduceRmsNorm | OpKind::AllReduceRmsNormQuantized) {
        let args = RmsNormArgs {
            input: input.addr,
            residual: residual.addr,
            residual_out: residual_out.addr,
            bias: Some(bias.addr),
            weight: weight.addr,
            output: output.addr,
            tokens,
            hidden,
            dtype,
            eps: EPS,
            weight_offset: WEIGHT_OFFSET,
        };
        let (fp8, scales) = (Buffer::new(memory, tokens * hidden)?, Buffer::new(memory, tokens * 4)?);
        // What an fp8 layer asks for: the fp8 result alone.
        let quantized = (case.op == OpKind::AllReduceRmsNormQuantized).then_some(NormQuantization {
            output: fp8.addr,
            scale: NormQuantScale::PerToken(scales.addr),
            keep_unquantized: false,
        });
        // SAFETY: all operands have the sizes that the arguments say and outlive the work, which is waited for below.
        let mut issue = || unsafe {
            match &quantized {
                Some(quantized) => bench.comm.all_reduce_rmsnorm_quantized(&args, quantized, memory.stream()),
                None => bench.comm.all_reduce_rmsnorm(&args, memory.stream()),
            }
        };
        let samples = bench.device.time(&*bench.context.host, &bench.job.effort, case.bytes, &mut issue)?;
        // The timed operations are what is verified: out of place, each gives the same result.
        let outputs = match quantized {
            Some(_) => values.wrong_fp8(
                &download(bench, fp8.addr, tokens * hidden)?,
                &download(bench, scales.addr, tokens * 4)?,
                &expected.1,
            ),
            None => values.wrong(&download(bench, output.addr, matrix)?, &expected.1, 2),
        };
        let wrong = outputs + values.wrong(&download(bench, residual_out.addr, matrix)?, &expected.0, 0);
        row.out_of_place = Some(bench.timing(case, &samples.means, &samples.singles, wrong)?);
    } else {
        let counts = uneven(tokens, bench.comm.size());
        let rank = bench.comm.rank();
        let before: usize = counts[..rank].iter().sum();
        let args = TwoGroupNormArgs {
            hidden_states: input.addr,
            residual: residual.addr.offset((before * vector) as u64),
            bias: Some(bias.addr),
            weight: weight.addr,
            reduce_first_row: 0,
            reduce_tokens: &counts,
            gather_first_row: 0,
            gather_tokens: &counts,
            hidden,
            dtype,
            eps: EPS,
            weight_offset: WEIGHT_OFFSET,
        };
        // SAFETY: as above; the residual's own rows are inside the buffer of all rows.
        let mut issue =
            || unsafe { bench.comm.all_reduce_rmsnorm_two_group(&**bench.comm, &args, memory.stream()) };
        // It overwrites its input, so the first operation alone has a known result.
        issue()?;
        let wrong = values.wrong(&download(bench, input.addr, matrix)?, &expected.1, 2);
        let samples = bench.device.time(&*bench.context.host, &bench.job.effort, case.bytes, &mut issue)?;
        row.in_place = Some(bench.timing(case, &samples.means, &samples.singles, wrong)?);
    }
    Ok(())
}

fn download(bench: &Bench<'_>, from: DeviceAddr, bytes: usize) -> Result<Vec<u8>> {
    let mut out = vec![POISON; bytes];
    // SAFETY: the buffer has that size.
    unsafe { bench.device.memory().download(&mut out, from)? };
    bench.comm.poll()?;
    Ok(out)
}

/// The operands that are equal on all ranks.
struct Values {
    hidden: usize,
    dtype: DType,
    residual: Vec<u8>,
    bias: Vec<u8>,
    weight: Vec<u8>,
}

impl Values {
    fn new(tokens: usize, hidden: usize, dtype: DType) -> Self {
        // Small integers and quarters, so that the residual sum is exact in every type.
        Self {
            hidden,
            dtype,
            residual: encode(dtype, (0..tokens * hidden).map(|i| ((i * 7) % 5) as f64)),
            bias: encode(dtype, (0..hidden).map(|h| (h % 3) as f64)),
            weight: encode(dtype, (0..hidden).map(|h| 0.5 + (h % 4) as f64 * 0.25)),
        }
    }

    /// The residual and the normalised output, in f64.
    fn expected(&self, sums: &[f64]) -> (Vec<f64>, Vec<f64>) {
        let value = |bytes: &[u8], index: usize| {
            let size = self.dtype.size();
            read(self.dtype, &bytes[index * size..(index + 1) * size])
        };
        let elements = self.residual.len() / self.dtype.size();
        let residual: Vec<f64> = (0..elements)
            .map(|i| sums[i] + value(&self.residual, i) + value(&self.bias, i % self.hidden))
            .collect();
        let mut output = Vec::with_capacity(elements);
        for row in residual.chunks(self.hidden) {
            let mean = row.iter().map(|r| r * r).sum::<f64>() / self.hidden as f64;
            let scale = 1.0 / (mean + f64::from(EPS)).sqrt();
            output.extend(
                row.iter()
                    .enumerate()
                    .map(|(h, r)| r * scale * (value(&self.weight, h) + f64::from(WEIGHT_OFFSET))),
            );
        }
        (residual, output)
    }

    /// Counts the fp8 elements that stand for something further from what they should than rounding explains: half a unit
    /// of their type, and what the unquantised result may be off.
    fn wrong_fp8(&self, bytes: &[u8], scales: &[u8], expected: &[f64]) -> u64 {
        let mut wrong = 0;
        let rows = bytes.chunks(self.hidden).zip(scales.chunks_exact(4)).zip(expected.chunks(self.hidden));
        for ((row, scale), expected) in rows {
            let scale = read(DType::F32, scale);
            for (byte, expected) in row.iter().zip(expected) {
                let off = (f64::from(F8E4M3::from_bits(*byte).to_f32()) * scale - expected).abs();
                wrong += u64::from(off.is_nan() || off > expected.abs() / 12.0 + scale / 512.0);
            }
        }
        wrong
    }

    /// Counts the elements further than `ulps` units in the last place from what they should be.
    fn wrong(&self, bytes: &[u8], expected: &[f64], ulps: u32) -> u64 {
        let ulp = match self.dtype {
            DType::BF16 => 2_f64.powi(-7),
            DType::F16 => 2_f64.powi(-10),
            // A sum of thousands of squares in f32 is itself good to a few units only.
            _ => 8.0 * f64::from(f32::EPSILON),
        };
        let slack = f64::from(ulps) * ulp;
        let elements = bytes.chunks_exact(self.dtype.size());
        let wrong = elements.zip(expected).filter(|(element, expected)| {
            let off = (read(self.dtype, element) - **expected).abs();
            off.is_nan() || off > slack * expected.abs()
        });
        wrong.count() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reference_is_a_norm_and_wrong_elements_count() {
        let values = Values::new(2, 8, DType::BF16);
        let (residual, output) = values.expected(&(0..16).map(f64::from).collect::<Vec<_>>());
        // Row 0, column 3: sum 3, residual (3 * 7) % 5 = 1, bias 0.
        assert_eq!(residual[3], 4.0);
        let unweighted: f64 =
            output[..8].iter().enumerate().map(|(h, o)| (o / (0.5 + (h % 4) as f64 * 0.25)).powi(2)).sum();
        assert!(
            (unweighted / 8.0 - 1.0).abs() < 1e-4,
            "the mean square of a normalised row is 1: {unweighted}"
        );
        let mut bytes = encode(DType::BF16, output.iter().copied());
        assert_eq!(values.wrong(&bytes, &output, 2), 0);
        let fp8: Vec<u8> = output.iter().map(|x| F8E4M3::from_f32((x * 32.0) as f32).to_bits()).collect();
        let scales = [1_f32 / 32.0, 1.0 / 32.0].map(f32::to_le_bytes).concat();
        assert_eq!(values.wrong_fp8(&fp8, &scales, &output), 0);
        let other = [1_f32 / 32.0, 1.0 / 16.0].map(f32::to_le_bytes).concat();
        assert_eq!(values.wrong_fp8(&fp8, &other, &output), 8);
        bytes[7] ^= 0x40;
        assert_eq!(values.wrong(&bytes, &output, 2), 1);
        bytes[6..8].copy_from_slice(&half::bf16::NAN.to_le_bytes());
        assert_eq!(values.wrong(&bytes, &output, 2), 1);
    }
}
