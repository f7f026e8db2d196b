//! Sums: exact for integers at every count, in rank order for real numbers, right for signed zeros, and confined to
//! their buffers.

use comm_core::{CommError, DType, OpKind, OpQuery, ReduceOp, RmsNormArgs, Support};
use comm_kernels::pattern::Pattern;
use comm_kernels::reference;

use crate::common::{PATIENT, world};
use crate::data::{FLOATS, Judge, SMALL, SUM, encode, integer, real, timed};
use crate::setting::{Setting, worlds};

const COUNTS: [usize; 10] = [512, 2560, 4096, 5120, 7680, 32_768, 262_144, 524_288, 1_048_576, 2_097_152];

#[test]
fn integers_sum_exactly_at_every_count() {
    integers(&Setting::of_every_size());
}

pub(crate) fn integers(setting: &Setting) {
    // Without those that take the host longest where none of them is stored straight into the results.
    let counts = if setting.is_cube_mesh() { &COUNTS[..COUNTS.len() - 2] } else { &COUNTS };
    let options = setting.options(&[("p2p.symmetric_operands", "on")]);
    timed("sums of integers", || {
        for &size in &setting.sizes {
            world(size, PATIENT, &options, |rank| {
                let bytes = counts[counts.len() - 1] * 4;
                let (send, out, registered) = (rank.space(bytes), rank.space(bytes), rank.space(bytes));
                let shared = rank.comm.allocate(bytes).unwrap();
                unsafe { rank.comm.register(registered, bytes).unwrap() };
                let mut seed = 100;
                for &count in counts {
                    for dtype in FLOATS {
                        seed += 1;
                        let own = encode(dtype, (0..count).map(|i| integer(seed, rank.rank, i)));
                        let sum = |i| (0..size).map(|r| integer(seed, r, i)).sum::<f32>();
                        let sums = encode(dtype, (0..count).map(sum));
                        rank.upload(send, &own);
                        // Out of place to memory of the rank, registered and not, and of the communicator, then in
                        // place.
                        for recv in [out, registered, shared, send] {
                            rank.reduce(&*rank.comm, (send, recv), count, dtype).unwrap();
                            let found = rank.download(recv, sums.len());
                            assert!(found == sums, "{count} {dtype}, {size} ranks, rank {}", rank.rank);
                        }
                    }
                }
                rank.comm.close().unwrap();
            });
        }
    });
}

#[test]
fn guard_regions_stay_untouched() {
    guard_regions(&Setting::usual());
}

pub(crate) fn guard_regions(setting: &Setting) {
    const GUARD: usize = 256;
    const WHOLE: usize = 8196 + 2 * GUARD + 64;
    timed("guard regions", || {
        for &size in &setting.sizes {
            world(size, PATIENT, &setting.options(&[]), |rank| {
                let (sends, plain) = (rank.space(WHOLE), rank.space(WHOLE));
                let shared = rank.comm.allocate(WHOLE).unwrap();
                let mut seed = 1000;
                let cases = [4_usize, 8192, 8196].into_iter().flat_map(|bytes| {
                    [2_usize, 4, 8, 16].into_iter().flat_map(move |align| {
                        [DType::F32, DType::BF16].into_iter().map(move |dtype| (bytes, align, dtype))
                    })
                });
                for (bytes, align, dtype) in cases.filter(|(_, align, dtype)| align % dtype.size() == 0) {
                    // Exactly so aligned: the regions begin at multiples of 256.
                    let begin = GUARD + align;
                    let count = bytes / dtype.size();
                    for target in [plain, shared, sends] {
                        seed += 1;
                        let own = encode(dtype, (0..count).map(|i| integer(seed, rank.rank, i)));
                        let sum = |i| (0..size).map(|r| integer(seed, r, i)).sum::<f32>();
                        let sums = encode(dtype, (0..count).map(sum));
                        let around = |content: &[u8]| {
                            let mut whole = vec![0xA5; WHOLE];
                            whole[begin..begin + bytes].copy_from_slice(content);
                            whole
                        };
                        rank.upload(target, &around(&vec![0x5A; bytes]));
                        rank.upload(sends, &around(&own));
                        let (send, recv) = (sends.offset(begin as u64), target.offset(begin as u64));
                        rank.reduce(&*rank.comm, (send, recv), count, dtype).unwrap();
                        let case = format!("{bytes} bytes of {dtype}, alignment {align}, {size} ranks");
                        assert!(rank.download(target, WHOLE) == around(&sums), "result: {case}");
                        if target != sends {
                            assert!(rank.download(sends, WHOLE) == around(&own), "input: {case}");
                        }
                    }
                }
                rank.comm.close().unwrap();
            });
        }
    });
}

/// Scratch memory so small that nothing of any size fits.
const TINY: [(&str, &str); 5] = [
    ("p2p.packet_slots", "1024"),
    ("p2p.lamport_slots", "1024"),
    ("p2p.line_slots", "128"),
    ("p2p.staging_bytes", "65536"),
    ("p2p.cell_ctas", "2"),
];

#[test]
fn inputs_larger_than_the_scratch_are_summed_in_rank_order() {
    larger_than_the_scratch(&Setting::usual());
}

pub(crate) fn larger_than_the_scratch(setting: &Setting) {
    const COUNT: usize = 300_007;
    timed("inputs larger than the scratch", || {
        for &size in &setting.sizes {
            for algorithm in setting.algorithms(&["two_shot", "cells", "steps", "lines", "staged"]) {
                let mut options = setting.options(&TINY);
                options.extend(algorithm.map(|name| ("p2p.algorithm", name)));
                world(size, PATIENT, &options, |rank| {
                    let send = rank.space(COUNT * 4);
                    let recv = rank.comm.allocate(COUNT * 4).unwrap();
                    for (seed, dtype) in (2000..).zip(FLOATS) {
                        let of = |r| encode(dtype, (0..COUNT).map(|i| real(seed, r, i)));
                        let inputs: Vec<Vec<u8>> = (0..size).map(of).collect();
                        let operands: Vec<&[u8]> = inputs.iter().map(Vec::as_slice).collect();
                        let mut sums = vec![0; inputs[0].len()];
                        reference::reduce(&operands, &mut sums, dtype, ReduceOp::Sum).unwrap();
                        rank.upload(send, &inputs[rank.rank]);
                        rank.reduce(&*rank.comm, (send, recv), COUNT, dtype).unwrap();
                        let found = rank.download(recv, sums.len());
                        assert!(found == sums, "{dtype}, {algorithm:?}, {size} ranks");
                    }
                    rank.comm.close().unwrap();
                });
            }
        }
    });
}

#[test]
fn signed_zeros_keep_their_sign() {
    signed_zeros(&Setting::usual());
}

pub(crate) fn signed_zeros(setting: &Setting) {
    const COUNT: usize = 4099;
    let algorithms = ["one_shot", "lamport", "two_shot", "cells", "steps", "lines", "staged"];
    timed("signed zeros", || {
        for &size in &setting.sizes {
            for algorithm in setting.algorithms(&algorithms) {
                let mut options = setting.options(&SMALL);
                options.extend(algorithm.map(|name| ("p2p.algorithm", name)));
                world(size, PATIENT, &options, |rank| {
                    let send = rank.space(COUNT * 4);
                    let recv = rank.comm.allocate(COUNT * 4).unwrap();
                    // By turns: all negative; one rank positive; all positive.
                    let sent = |r: usize, i: usize| match i % 3 {
                        0 => -0.0,
                        1 if i / 3 % size != r => -0.0,
                        _ => 0.0,
                    };
                    for dtype in FLOATS {
                        rank.upload(send, &encode(dtype, (0..COUNT).map(|i| sent(rank.rank, i))));
                        let sums = encode(dtype, (0..COUNT).map(|i| if i % 3 == 0 { -0.0 } else { 0.0 }));
                        rank.reduce(&*rank.comm, (send, recv), COUNT, dtype).unwrap();
                        assert!(rank.download(recv, sums.len()) == sums, "{dtype} by {algorithm:?}");
                    }
                    rank.comm.close().unwrap();
                });
            }
        }
    });
}

#[test]
fn what_is_admitted_works_and_what_is_not_is_refused() {
    const COUNT: usize = 1000;
    timed("supports", || {
        for size in worlds() {
            world(size, PATIENT, &[], |rank| {
                let judge = Judge::new(&rank);
                let (send, recv) = (rank.space(COUNT * 8), rank.space(COUNT * 8));
                for (seed, dtype) in (3000..).zip(DType::ALL) {
                    let data = Pattern::new(seed, Some(ReduceOp::Sum), size);
                    let query = OpQuery::new(OpKind::AllReduce, dtype, COUNT).with_reduce(ReduceOp::Sum);
                    judge.fill(&rank, (send, COUNT, dtype), &data, rank.rank, 0).unwrap();
                    let outcome = rank.reduce(&*rank.comm, (send, recv), COUNT, dtype);
                    match rank.comm.supports(&query) {
                        Support::Yes => {
                            outcome.unwrap();
                            judge.expect(&rank, (recv, COUNT, dtype), &data, SUM, 0, 0).unwrap();
                        }
                        Support::No { .. } => {
                            assert!(matches!(outcome, Err(CommError::Unsupported { .. })), "{outcome:?}");
                        }
                    }
                    judge.all_right(&rank, &format!("{dtype}"));
                }
                let part = |i: u64| send.offset(512 * i);
                let args = RmsNormArgs {
                    input: part(0),
                    residual: part(1),
                    residual_out: part(1),
                    bias: None,
                    weight: part(2),
                    output: part(0),
                    tokens: 1,
                    hidden: 16,
                    dtype: DType::I8,
                    eps: 1e-6,
                    weight_offset: 0.0,
                };
                let query = OpQuery::new(OpKind::AllReduceRmsNorm, DType::I8, 16);
                assert!(matches!(rank.comm.supports(&query), Support::No { .. }));
                let refused = unsafe { rank.comm.all_reduce_rmsnorm(&args, rank.stream()) }.unwrap_err();
                assert!(!refused.is_fatal(), "{refused}");
                // Nothing was done, so the communicator goes on.
                let data = Pattern::new(3999, Some(ReduceOp::Sum), size);
                judge.fill(&rank, (send, COUNT, DType::BF16), &data, rank.rank, 0).unwrap();
                rank.reduce(&*rank.comm, (send, recv), COUNT, DType::BF16).unwrap();
                judge.expect(&rank, (recv, COUNT, DType::BF16), &data, SUM, 0, 0).unwrap();
                judge.all_right(&rank, "after a refusal");
                rank.comm.close().unwrap();
            });
        }
    });
}
