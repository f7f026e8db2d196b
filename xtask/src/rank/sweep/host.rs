//! The host's side of what no kernel checks: small numbers, norms of them, and how near a result must come.

use comm_core::norm::rmsnorm_row;
use comm_core::{DType, quantize};
use comm_kernels::pattern;

use crate::bench::data::{encode, read};

pub(super) const EPS: f32 = 1e-5;

/// The streams of numbers that all ranks share; a rank's own is numbered by the rank.
const RESIDUAL: u64 = 1 << 20;
const BIAS: u64 = RESIDUAL + 1;
const WEIGHT: u64 = RESIDUAL + 2;

/// The operands of a fused norm: integers so small that sums of the ranks' parts are exact in every type, and sums of a
/// row's squares in `f32`, in any order. So only the last steps may round differently from device to host.
#[derive(Clone, Copy, Debug)]
pub(super) struct NormData {
    pub(super) seed: u64,
    /// This rank, and how many there are: of what one device does alone, 0 of 1.
    pub(super) rank: usize,
    pub(super) ranks: usize,
    pub(super) hidden: usize,
    pub(super) bias: bool,
    pub(super) weight_offset: f32,
}

impl NormData {
    fn integer(&self, stream: u64, index: usize, limit: u64) -> f32 {
        let hash = pattern::hash(self.seed, stream, index as u64);
        ((hash >> 16) % (2 * limit + 1)) as f32 - limit as f32
    }

    /// A rank's part of an element's sum.
    fn partial(&self, rank: usize, index: usize) -> f32 {
        self.integer(rank as u64, index, (16 / self.ranks as u64).max(1))
    }

    /// This rank's.
    pub(super) fn own(&self, index: usize) -> f32 {
        self.partial(self.rank, index)
    }

    pub(super) fn residual(&self, index: usize) -> f32 {
        self.integer(RESIDUAL, index, 16)
    }

    pub(super) fn biases(&self) -> Vec<f32> {
        (0..self.hidden).map(|column| self.integer(BIAS, column, 8)).collect()
    }

    /// Multiples of a sixteenth.
    pub(super) fn weights(&self) -> Vec<f32> {
        (0..self.hidden).map(|column| self.integer(WEIGHT, column, 16) / 16.0).collect()
    }

    /// The new residual and the result of some rows, the latter before it is rounded.
    pub(super) fn rows(&self, rows: std::ops::Range<usize>) -> (Vec<f32>, Vec<f32>) {
        let (weights, biases) = (self.weights(), self.bias.then(|| self.biases()));
        let (mut updated, mut results) = (Vec::new(), Vec::new());
        for row in rows {
            let elements = row * self.hidden..(row + 1) * self.hidden;
            let sum = |index| (0..self.ranks).map(|rank| self.partial(rank, index)).sum();
            let mut result: Vec<f32> = elements.clone().map(sum).collect();
            let mut residual: Vec<f32> = elements.map(|index| self.residual(index)).collect();
            // Every type holds these sums as they are.
            let round = |sum| sum;
            let biases = biases.as_deref();
            rmsnorm_row(&mut result, &mut residual, biases, &weights, EPS, self.weight_offset, round);
            updated.append(&mut residual);
            results.append(&mut result);
        }
        (updated, results)
    }
}

/// Units in the last place by which a norm's result may differ from the host's, as in the conformance suite.
pub(super) const fn norm_tolerance(dtype: DType) -> i64 {
    if matches!(dtype, DType::F32) { 4 } else { 1 }
}

/// Numbers as elements of a floating-point type.
pub(super) fn elements(dtype: DType, values: &[f32]) -> Vec<u8> {
    encode(dtype, values.iter().map(|&value| f64::from(value)))
}

/// Elements of a floating-point type as numbers.
pub(super) fn numbers(dtype: DType, bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(dtype.size()).map(|element| read(dtype, element) as f32).collect()
}

/// A float's place among all of its type, with the zeros at the same one.
fn place(element: &[u8]) -> i64 {
    let bits = element.iter().rev().fold(0_i64, |bits, &byte| bits << 8 | i64::from(byte));
    let sign = 1_i64 << (8 * element.len() - 1);
    if bits & sign == 0 { bits } else { sign - bits }
}

/// The first element that is further than `ulps` units in the last place from what it should be, once that is rounded.
pub(super) fn difference(dtype: DType, expected: &[f32], found: &[u8], ulps: i64) -> Option<String> {
    let (expected, size) = (elements(dtype, expected), dtype.size());
    if expected.len() != found.len() {
        return Some(format!("{} bytes instead of {}", found.len(), expected.len()));
    }
    let pairs = expected.chunks_exact(size).zip(found.chunks_exact(size)).enumerate();
    let far = |(_, (expected, found)): &(usize, (&[u8], &[u8]))| {
        read(dtype, found).is_nan() || (place(expected) - place(found)).abs() > ulps
    };
    let (at, (expected, found)) = pairs.into_iter().find(far)?;
    Some(format!("element {at} is {} instead of {}", read(dtype, found), read(dtype, expected)))
}

/// The first element that differs in its bits from what it should be.
pub(super) fn other_bits(dtype: DType, expected: &[u8], found: &[u8]) -> Option<String> {
    let size = dtype.size();
    if expected.len() != found.len() {
        return Some(format!("{} bytes instead of {}", found.len(), expected.len()));
    }
    let pairs = expected.chunks_exact(size).zip(found.chunks_exact(size));
    let (at, (expected, found)) = pairs.enumerate().find(|(_, (expected, found))| expected != found)?;
    Some(format!("element {at} has the bytes {found:02x?} instead of {expected:02x?}"))
}

/// What is wrong with an fp8 result of rows of `hidden` numbers, which are the result in the operands' type. `scale`: the
/// one that was given; without one each row has its own, in `scales`.
pub(super) fn fp8_difference(
    values: &[f32],
    hidden: usize,
    scale: Option<f32>,
    (bytes, scales): (&[u8], &[f32]),
) -> Option<String> {
    if bytes.len() != values.len() {
        return Some(format!("{} fp8 elements instead of {}", bytes.len(), values.len()));
    }
    for (row, (values, bytes)) in values.chunks(hidden).zip(bytes.chunks(hidden)).enumerate() {
        let inverse = match scale {
            Some(scale) => 1.0 / scale,
            None => {
                let (scale, inverse) = quantize::scale(quantize::amax(values));
                if scales.get(row).map(|found| found.to_bits()) != Some(scale.to_bits()) {
                    return Some(format!(
                        "the scale of row {row} is {:?} instead of {scale}",
                        scales.get(row)
                    ));
                }
                inverse
            }
        };
        for (column, (value, &found)) in values.iter().zip(bytes).enumerate() {
            let expected = quantize::to_e4m3(value * inverse).to_bits();
            if expected != found {
                return Some(format!(
                    "the fp8 of {value} in row {row}, column {column} is {found:#04x} instead of {expected:#04x}"
                ));
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    const DATA: NormData =
        NormData { seed: 3, rank: 2, ranks: 8, hidden: 1000, bias: true, weight_offset: 1.0 };

    #[test]
    fn sums_and_squares_are_exact_in_every_type() {
        let (updated, results) = DATA.rows(0..3);
        assert_eq!((updated.len(), results.len()), (3000, 3000));
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            assert_eq!(numbers(dtype, &elements(dtype, &updated)), updated);
        }
        for row in updated.chunks(DATA.hidden) {
            assert!(row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() < f64::from(1 << 24));
        }
        let others: f32 = (0..8).filter(|rank| *rank != 2).map(|rank| DATA.partial(rank, 7)).sum();
        assert_eq!(updated[7], others + DATA.own(7) + DATA.residual(7) + DATA.biases()[7]);
        // Rows follow from their numbers, whatever is asked for with them.
        assert_eq!(DATA.rows(2..3).1, results[2000..]);
        assert!(results.iter().any(|x| x.fract() != 0.0) && updated.iter().any(|x| *x < 0.0));
    }

    #[test]
    fn results_may_be_off_by_the_tolerance_and_no_more() {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let values = [1.0, -2.5, 0.0, -0.0];
            let right = elements(dtype, &values);
            assert_eq!(difference(dtype, &values, &right, 0), None);
            for at in 0..2 {
                let mut next = right.clone();
                next[at * dtype.size()] += 1;
                assert_eq!(difference(dtype, &values, &next, 1), None);
                assert!(difference(dtype, &values, &next, 0).unwrap().contains(&format!("element {at}")));
                assert!(other_bits(dtype, &right, &next).unwrap().contains(&format!("element {at}")));
            }
            let nan = elements(dtype, &[1.0, f32::NAN, 0.0, 0.0]);
            assert!(difference(dtype, &values, &nan, i64::MAX).is_some());
            assert!(difference(dtype, &values, &right[dtype.size()..], 9).is_some());
        }
        // Across zero: the least numbers of either sign are two places apart.
        let least = f32::from_bits(1);
        let found = elements(DType::F32, &[-least]);
        assert!(difference(DType::F32, &[least], &found, 1).is_some());
        assert!(difference(DType::F32, &[least], &found, 2).is_none());
    }

    #[test]
    fn fp8_results_are_those_of_the_definition() {
        let values = [1.0, -448.0, 3.0, 0.5];
        // The first row's largest magnitude is 448, so its scale is 1; the second's is 3.
        let (second, inverse) = quantize::scale(3.0);
        let code = |value: f32| quantize::to_e4m3(value).to_bits();
        let bytes = [code(1.0), code(-448.0), code(3.0 * inverse), code(0.5 * inverse)];
        assert_eq!(fp8_difference(&values, 2, None, (&bytes, &[1.0, second])), None);
        assert!(fp8_difference(&values, 2, None, (&bytes, &[1.0, 1.0])).unwrap().contains("scale of row 1"));
        let mut wrong = bytes;
        wrong[3] ^= 1;
        assert!(fp8_difference(&values, 2, None, (&wrong, &[1.0, second])).unwrap().contains("column 1"));
        let halved = [code(2.0), code(-896.0), code(6.0), code(1.0)];
        assert_eq!(fp8_difference(&values, 2, Some(0.5), (&halved, &[])), None);
        assert!(fp8_difference(&values, 2, Some(0.5), (&bytes, &[])).is_some());
    }
}
