//! The two-group norm: the ranks reduce in one grouping and gather in another, with uneven tokens.

use std::ops::Range;

use comm_core::{DType, DeviceAddr, DeviceComm, TwoGroupNormArgs};

use crate::common::{PATIENT, Rank, world};
use crate::data::{Judge, encode, sums, timed};
use crate::norm::{rounded_once, sent, ulps, weights};
use crate::setting::worlds;

const HIDDEN: usize = 2048;
const DTYPE: DType = DType::F16;

/// The ranks of the group of `rank` in `parts` groups of equal size.
fn members(rank: usize, size: usize, parts: usize) -> Range<usize> {
    let each = size / parts;
    rank / each * each..(rank / each + 1) * each
}

fn run(rank: &Rank, reduce: &dyn DeviceComm, gather: &dyn DeviceComm, parts: [usize; 2], tokens: &[usize]) {
    let judge = Judge::new(rank);
    let begin = |r: usize| tokens[..r].iter().sum::<usize>();
    let (reducers, gatherers) =
        (members(rank.rank, rank.size, parts[0]), members(rank.rank, rank.size, parts[1]));
    let rows = begin(rank.size);
    let own = begin(rank.rank)..begin(rank.rank) + tokens[rank.rank];
    let (data, before) = (sums(400 + rows, reduce.size()), sums(500 + rows, 1));
    let states = rank.space((rows * HIDDEN * 2).max(1));
    let residual = rank.space((own.len() * HIDDEN * 2).max(1));
    let (weight, bias) = (rank.space(HIDDEN * 2), rank.space(HIDDEN * 2));
    let gains = weights(HIDDEN);
    rank.upload(weight, &encode(DTYPE, gains.iter().copied()));
    judge.fill(rank, (states, rows * HIDDEN, DTYPE), &data, reduce.rank(), 0).unwrap();
    judge.fill(rank, (residual, own.len() * HIDDEN, DTYPE), &before, 0, own.start * HIDDEN).unwrap();
    judge.fill(rank, (bias, HIDDEN, DTYPE), &before, 1, 0).unwrap();
    let args = TwoGroupNormArgs {
        hidden_states: states,
        residual: if own.is_empty() { DeviceAddr::NULL } else { residual },
        bias: Some(bias),
        weight,
        reduce_first_row: begin(reducers.start),
        reduce_tokens: &tokens[reducers],
        gather_first_row: begin(gatherers.start),
        gather_tokens: &tokens[gatherers.clone()],
        hidden: HIDDEN,
        dtype: DTYPE,
        eps: 1e-5,
        weight_offset: 1.0,
    };
    unsafe { reduce.all_reduce_rmsnorm_two_group(gather, &args, rank.stream()).unwrap() };
    let biases = sent(&before, 1, 0, HIDDEN);
    for row in begin(gatherers.start)..begin(gatherers.end) {
        let first = row * HIDDEN;
        let mut wanted = sent(&before, 0, first, HIDDEN);
        for who in 0..reduce.size() {
            let part = sent(&data, who, first, HIDDEN);
            wanted.iter_mut().zip(part).for_each(|(sum, x)| *sum += x);
        }
        wanted.iter_mut().zip(&biases).for_each(|(sum, x)| *sum += x);
        let case =
            format!("rank {} of {}, row {row}, tokens {tokens:?}, {parts:?} groups", rank.rank, rank.size);
        if own.contains(&row) {
            let place = residual.offset(((row - own.start) * HIDDEN * 2) as u64);
            let updated = rank.download(place, HIDDEN * 2);
            assert!(updated == encode(DTYPE, wanted.iter().copied()), "residual: {case}");
        }
        let normed = rank.download(states.offset((first * 2) as u64), HIDDEN * 2);
        for (raw, right) in normed.chunks_exact(2).zip(rounded_once(&wanted, &gains, 1.0)) {
            let found = half::f16::from_le_bytes([raw[0], raw[1]]);
            assert!(ulps(found, right) <= 1, "{found}, not {right}: {case}");
        }
    }
}

#[test]
fn two_groupings_of_the_ranks() {
    timed("two-group norm", || {
        for size in worlds() {
            world(size, PATIENT, &[], |rank| {
                // Uneven, none on some ranks, and all on one.
                let uneven: Vec<usize> = (0..size).map(|r| (r * 7 + 3) % 11).collect();
                let some: Vec<usize> = (0..size).map(|r| if r % 2 == 0 { 0 } else { 5 }).collect();
                let one: Vec<usize> = (0..size).map(|r| if r == size - 1 { 17 } else { 0 }).collect();
                let whole = &*rank.comm;
                for tokens in [&uneven, &some, &one] {
                    run(&rank, whole, whole, [1, 1], tokens);
                }
                if size % 2 == 0 {
                    let color = (rank.rank * 2 / size) as u32;
                    let half = rank.comm.split(Some(color), rank.rank as i32).unwrap().unwrap();
                    for tokens in [&uneven, &some, &one] {
                        run(&rank, &*half, whole, [2, 1], tokens);
                        run(&rank, whole, &*half, [1, 2], tokens);
                    }
                    half.close().unwrap();
                }
                rank.comm.close().unwrap();
            });
        }
    });
}
