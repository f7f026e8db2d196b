//! The fused all-reduce + residual + bias + RMSNorm: close to a reference in higher precision at the shapes of models,
//! and within a unit in the last place of one that is rounded once.

use comm_core::{DType, DeviceAddr, DeviceComm, HostComm, RmsNormArgs};
use comm_kernels::pattern::{self, Pattern};

use crate::common::{PATIENT, Rank, world};
use crate::data::{Judge, decode, encode, real, sums, timed};
use crate::setting::worlds;
use crate::tokens::TOKENS as SERVED;

const HIDDENS: [usize; 6] = [1024, 2048, 2880, 4096, 7168, 8192];
const TOKENS: [usize; 4] = [1, 128, 1024, 2048];
const EPS: f32 = 1e-5;
/// Shapes begin at different elements of the operands, so that what an earlier one left cannot pass.
const STEP: usize = 4096;
const MOST: usize = 2048 * 8192 + 64 * STEP;

/// Rows that are looked at: all of a few, and of many the first, the last and some between.
pub(crate) fn sample(tokens: usize) -> impl Iterator<Item = usize> {
    let step = tokens.div_ceil(24).max(1);
    (0..tokens).filter(move |row| row % step == 0 || row + 1 == tokens)
}

/// Every rank has the same bytes.
pub(crate) fn same_everywhere(host: &dyn HostComm, bytes: &[u8], what: &str) {
    let all = host.all_gather_bytes(bytes, comm_core::Deadline::after(PATIENT)).unwrap();
    assert!(all.iter().all(|other| other == bytes), "{what}: the ranks' bits differ");
}

/// Operands of real numbers, made once for all shapes: `element(what, i)` is element `i` of each.
struct Operands {
    input: DeviceAddr,
    residual: DeviceAddr,
    weight: DeviceAddr,
    bias: DeviceAddr,
    residual_out: DeviceAddr,
    output: DeviceAddr,
}

const DTYPE: DType = DType::BF16;
const INPUT: u64 = 1;
const RESIDUAL: u64 = 2;
const WEIGHT: u64 = 3;
const BIAS: u64 = 4;

/// A number of bf16 precision.
fn element(what: u64, rank: usize, index: usize) -> f32 {
    half::bf16::from_f32(real(what, rank, index)).to_f32()
}

impl Operands {
    fn new(rank: &Rank, who: usize) -> Self {
        let filled = |what, who, count| {
            let at = rank.space(count * 2);
            rank.upload(at, &encode(DTYPE, (0..count).map(|i| real(what, who, i))));
            at
        };
        Self {
            input: filled(INPUT, who, MOST),
            residual: filled(RESIDUAL, 0, MOST),
            weight: filled(WEIGHT, 0, 8192 + 64),
            bias: filled(BIAS, 0, 8192 + 64),
            residual_out: rank.space(MOST * 2),
            output: rank.space(MOST * 2),
        }
    }

    /// Shape number `turn`.
    fn args(&self, turn: usize, tokens: usize, hidden: usize, weight_offset: f32) -> RmsNormArgs {
        let matrix = |base: DeviceAddr| base.offset((turn * STEP * 2) as u64);
        RmsNormArgs {
            input: matrix(self.input),
            residual: matrix(self.residual),
            residual_out: matrix(self.residual_out),
            bias: turn.is_multiple_of(3).then_some(self.bias),
            weight: self.weight,
            output: matrix(self.output),
            tokens,
            hidden,
            dtype: DTYPE,
            eps: EPS,
            weight_offset,
        }
    }
}

/// One row against the sums in `f32` and the norm in `f64`.
fn check_row(rank: &Rank, size: usize, turn: usize, args: &RmsNormArgs, row: usize) -> Vec<u8> {
    let hidden = args.hidden;
    let place = |base: DeviceAddr| base.offset((row * hidden * 2) as u64);
    let first = turn * STEP + row * hidden;
    let sums: Vec<f64> = (0..hidden)
        .map(|h| {
            let sum: f32 = (0..size).map(|r| element(INPUT, r, first + h)).sum();
            let bias = if args.bias.is_some() { element(BIAS, 0, h) } else { 0.0 };
            f64::from(sum) + f64::from(element(RESIDUAL, 0, first + h)) + f64::from(bias)
        })
        .collect();
    let square = sums.iter().map(|r| r * r).sum::<f64>() / hidden as f64;
    let factor = 1.0 / (square + f64::from(EPS)).sqrt();
    let raw =
        (rank.download(place(args.residual_out), hidden * 2), rank.download(place(args.output), hidden * 2));
    let (updated, normed) = (decode(DTYPE, &raw.0), decode(DTYPE, &raw.1));
    for h in 0..hidden {
        let weight = f64::from(element(WEIGHT, 0, h)) + f64::from(args.weight_offset);
        for (name, found, wanted) in
            [("residual", updated[h], sums[h]), ("output", normed[h], sums[h] * factor * weight)]
        {
            let error = (f64::from(found) - wanted).abs();
            assert!(
                error <= 1e-2 + 2e-2 * wanted.abs(),
                "{name}, row {row} column {h}: {found}, not {wanted}; {size} ranks, {args:?}"
            );
        }
    }
    [raw.0, raw.1].concat()
}

fn shapes(rank: &Rank, comm: &dyn DeviceComm, host: Option<&dyn HostComm>, hiddens: &[usize]) {
    let judge = Judge::new(rank);
    let operands = Operands::new(rank, comm.rank());
    let mut turn = 0;
    for &hidden in hiddens {
        for tokens in TOKENS {
            for weight_offset in [0.0, 1.0] {
                let args = operands.args(turn, tokens, hidden, weight_offset);
                for blank in [args.residual_out, args.output] {
                    judge.poison(rank, blank, tokens * hidden * 2).unwrap();
                }
                unsafe { comm.all_reduce_rmsnorm(&args, rank.stream()).unwrap() };
                let rows = |row| check_row(rank, comm.size(), turn, &args, row);
                let seen: Vec<u8> = sample(tokens).flat_map(rows).collect();
                if let Some(host) = host {
                    same_everywhere(host, &seen, "norm");
                }
                turn += 1;
            }
        }
    }
}

#[test]
fn the_fused_norm_is_close_to_a_reference() {
    timed("fused norm", || {
        for size in worlds() {
            world(size, PATIENT, &[], |rank| {
                shapes(&rank, &*rank.comm, Some(&*rank.host), &HIDDENS);
                rank.comm.close().unwrap();
            });
        }
    });
}

#[test]
fn the_fused_norm_works_in_groups_of_two() {
    timed("fused norm in groups", || {
        for size in worlds().into_iter().filter(|&size| size >= 4) {
            world(size, PATIENT, &[], |rank| {
                // An odd rank is alone in its group.
                let group = rank.comm.split(Some(rank.rank as u32 / 2), rank.rank as i32).unwrap().unwrap();
                shapes(&rank, &*group, None, &[2048, 7168]);
                group.close().unwrap();
                rank.comm.close().unwrap();
            });
        }
    });
}

/// How many numbers of the type lie between two of equal sign or around zero.
pub(crate) fn ulps(a: half::f16, b: half::f16) -> i32 {
    let key = |x: half::f16| {
        let bits = i32::from(x.to_bits() & 0x7fff);
        if x.is_sign_negative() { -bits } else { bits }
    };
    (key(a) - key(b)).abs()
}

/// Element `h` of a weight vector of halves.
pub(crate) fn weights(hidden: usize) -> Vec<f32> {
    (0..hidden).map(|h| half::f16::from_f32(real(WEIGHT, 9, h)).to_f32()).collect()
}

/// `r`, the row after residual and bias, in the type; returns the row's norm rounded once.
pub(crate) fn rounded_once(r: &[f32], weights: &[f32], weight_offset: f32) -> Vec<half::f16> {
    let square = r.iter().map(|&r| f64::from(r).powi(2)).sum::<f64>() / r.len() as f64;
    let factor = 1.0 / (square + f64::from(EPS)).sqrt();
    let gain = |w: f32| f64::from(w) + f64::from(weight_offset);
    r.iter().zip(weights).map(|(&r, &w)| half::f16::from_f64(f64::from(r) * factor * gain(w))).collect()
}

/// Elements `first..` of what `who` sends, on the host.
pub(crate) fn sent(data: &Pattern, who: usize, first: usize, count: usize) -> Vec<f32> {
    let mut bytes = vec![0; count * 2];
    pattern::fill(&mut bytes, DType::F16, data, who, first as u64).unwrap();
    decode(DType::F16, &bytes)
}

#[test]
fn the_residual_is_exact_and_the_output_within_a_unit_in_the_last_place() {
    const HIDDEN: usize = 2048;
    let dtype = DType::F16;
    timed("exact residual", || {
        for size in worlds() {
            world(size, PATIENT, &[], |rank| {
                let judge = Judge::new(&rank);
                let bytes = SERVED[SERVED.len() - 1] * HIDDEN * 2;
                let (input, residual) = (rank.space(bytes), rank.space(bytes));
                let (residual_out, output) = (rank.space(bytes), rank.space(bytes));
                let (weight, bias) = (rank.space(HIDDEN * 2), rank.space(HIDDEN * 2));
                let gains = weights(HIDDEN);
                rank.upload(weight, &encode(dtype, gains.iter().copied()));
                for (turn, tokens) in SERVED.into_iter().enumerate() {
                    let count = tokens * HIDDEN;
                    // Integers, so that there is one right residual whatever rounds the sum first.
                    let (data, before) = (sums(200 + turn, size), sums(300 + turn, 1));
                    judge.fill(&rank, (input, count, dtype), &data, rank.rank, 0).unwrap();
                    judge.fill(&rank, (residual, count, dtype), &before, 0, 0).unwrap();
                    judge.fill(&rank, (bias, HIDDEN, dtype), &before, 1, 0).unwrap();
                    judge.poison(&rank, residual_out, count * 2).unwrap();
                    judge.poison(&rank, output, count * 2).unwrap();
                    let in_place = turn % 2 == 1;
                    let args = RmsNormArgs {
                        input,
                        residual,
                        residual_out: if in_place { residual } else { residual_out },
                        bias: Some(bias),
                        weight,
                        output: if in_place { input } else { output },
                        tokens,
                        hidden: HIDDEN,
                        dtype,
                        eps: EPS,
                        weight_offset: (turn % 3) as f32 / 2.0,
                    };
                    unsafe { rank.comm.all_reduce_rmsnorm(&args, rank.stream()).unwrap() };
                    let mut seen = Vec::new();
                    let biases = sent(&before, 1, 0, HIDDEN);
                    for row in sample(tokens) {
                        let first = row * HIDDEN;
                        let mut wanted = sent(&before, 0, first, HIDDEN);
                        for who in 0..size {
                            let part = sent(&data, who, first, HIDDEN);
                            wanted.iter_mut().zip(part).for_each(|(sum, x)| *sum += x);
                        }
                        wanted.iter_mut().zip(&biases).for_each(|(sum, x)| *sum += x);
                        let place = |base: DeviceAddr| base.offset((first * 2) as u64);
                        let case = format!("{tokens} tokens, row {row}, {size} ranks");
                        let updated = rank.download(place(args.residual_out), HIDDEN * 2);
                        assert!(updated == encode(dtype, wanted.iter().copied()), "residual: {case}");
                        let normed = rank.download(place(args.output), HIDDEN * 2);
                        let right = rounded_once(&wanted, &gains, args.weight_offset);
                        for (h, (raw, right)) in normed.chunks_exact(2).zip(right).enumerate() {
                            let found = half::f16::from_le_bytes([raw[0], raw[1]]);
                            assert!(ulps(found, right) <= 1, "column {h}: {found}, not {right}: {case}");
                        }
                        seen.extend(updated);
                        seen.extend(normed);
                    }
                    same_everywhere(&*rank.host, &seen, "exact residual");
                }
                rank.comm.close().unwrap();
            });
        }
    });
}
