//! The fp8 results of the fused norms: laid out, and checked against the unquantised result they are made of.

use std::ops::Range;

use super::super::buffers::Region;
use super::super::case::Case;
use super::super::data;
use crate::dtype::{DType, F8E4M3};
use crate::error::Result;
use crate::fused::{NormQuantScale, NormQuantization};

/// Small enough that some elements are larger than fp8 numbers get.
const SCALE: f32 = 0.006;

/// An fp8 result in memory.
pub(super) struct Fp8 {
    pub(super) per_token: bool,
    hidden: usize,
    output: Region,
    scale: Region,
}

impl Fp8 {
    /// Makes room for `rows` rows, poisoned, and writes the scale if it is to be read.
    pub(super) fn lay(
        case: &mut Case<'_, '_>,
        per_token: bool,
        (rows, hidden): (usize, usize),
        offset: usize,
    ) -> Result<Self> {
        let scales = if per_token { rows } else { 1 };
        let output = case.arena.lay(6, offset, rows * hidden)?;
        let scale = case.arena.lay(7, 4 * offset, 4 * scales)?;
        let fp8 = Self { per_token, hidden, output, scale };
        fp8.poison(case)?;
        Ok(fp8)
    }

    pub(super) fn poison(&self, case: &mut Case<'_, '_>) -> Result<()> {
        case.arena.poison(&self.output)?;
        if self.per_token {
            return case.arena.poison(&self.scale).map(drop);
        }
        case.arena.put(&self.scale, &SCALE.to_ne_bytes())
    }

    pub(super) fn args(&self, keep_unquantized: bool) -> NormQuantization {
        let scale = self.scale.addr();
        NormQuantization {
            output: self.output.addr(),
            scale: match self.per_token {
                true => NormQuantScale::PerToken(scale),
                false => NormQuantScale::PerTensor(scale),
            },
            keep_unquantized,
        }
    }

    /// The fp8 elements and the scales.
    pub(super) fn fetch(&self, case: &mut Case<'_, '_>) -> Result<[Vec<u8>; 2]> {
        Ok([case.fetch(&self.output, "fp8 output")?, case.fetch(&self.scale, "scale")?])
    }

    /// Checks rows of the result, bit by bit. `unquantised`: the whole result in the operands' type.
    pub(super) fn check(
        &self,
        case: &mut Case<'_, '_>,
        dtype: DType,
        unquantised: &[u8],
        [elements, scales]: &[Vec<u8>; 2],
        rows: Range<usize>,
    ) {
        for row in rows {
            let range = row * self.hidden..(row + 1) * self.hidden;
            let values: Vec<f32> = (range.clone())
                .map(|index| data::to_f64(dtype, data::at(unquantised, dtype, index)) as f32)
                .collect();
            let most = values.iter().fold(2_f32.powi(-100), |most, value| most.max(value.abs()));
            let inverse = if self.per_token { 448.0 / most } else { 1.0 / SCALE };
            if self.per_token {
                let (expected, got) = ((most / 448.0).to_bits(), data::at(scales, DType::F32, row) as u32);
                if expected != got {
                    let (expected, got) = (f32::from_bits(expected), f32::from_bits(got));
                    return case.fail(format!("scale of row {row}: expected {expected:e}, got {got:e}"));
                }
            }
            for (value, byte) in values.into_iter().zip(&elements[range]) {
                let expected = F8E4M3::from_f32(value * inverse);
                if expected.to_bits() != *byte {
                    let got = F8E4M3::from_bits(*byte);
                    let text = format!("fp8 of {value} in row {row}: expected {expected}, got {got}");
                    return case.fail(text);
                }
            }
        }
    }
}
