//! Every algorithm gives the bits that reading all inputs and adding them up in rank order gives.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use comm_core::{DType, DeviceMemory as _, ReduceOp};
use common::{PATIENT, world, world_size};

/// Elements, from one alone to several rounds of a two-shot.
const COUNTS: [usize; 6] = [1, 37, 4099, 100_001, 1_000_003, 3 << 20];
const DTYPES: [DType; 3] = [DType::BF16, DType::F16, DType::F32];

/// Numbers of many magnitudes and both signs, so that another order of additions gives other bits. No NaN, and no
/// infinity even in their sum.
fn operand(dtype: DType, rank: usize, count: usize) -> Vec<u8> {
    let mut state = (rank as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut bytes = Vec::with_capacity(count * dtype.size());
    for _ in 0..count {
        let random = next();
        let (sign, mantissa) = ((random >> 63) as u32, random as u32);
        // Nine exponents around that of one.
        let exponent = (random >> 32) as u32 % 9;
        match dtype {
            DType::BF16 => {
                let bits = sign << 15 | (123 + exponent) << 7 | mantissa & 0x7f;
                bytes.extend((bits as u16).to_le_bytes());
            }
            DType::F16 => {
                let bits = sign << 15 | (11 + exponent) << 10 | mantissa & 0x3ff;
                bytes.extend((bits as u16).to_le_bytes());
            }
            _ => bytes.extend((sign << 31 | (123 + exponent) << 23 | mantissa & 0x7f_ffff).to_le_bytes()),
        }
    }
    bytes
}

/// What to sum: the elements of each case, and how often in a row.
struct Cases<'a> {
    counts: &'a (dyn Fn(DType) -> Vec<usize> + Sync),
    times: usize,
    op: ReduceOp,
}

/// The digests of each case's results with these options, one where all are alike; equal on all ranks. `used` must have
/// been used.
fn results(size: usize, options: &[(&str, &str)], used: &str, cases: &Cases<'_>) -> Vec<(String, Vec<u64>)> {
    let all = world(size, PATIENT, options, |rank| {
        let longest = |dtype| (cases.counts)(dtype).into_iter().max().unwrap();
        let most = DTYPES.map(|dtype| longest(dtype) * dtype.size()).into_iter().max().unwrap() + 64;
        let send = rank.memory.allocate(most).unwrap();
        let recv = rank.comm.allocate(most).unwrap();
        let mut results = Vec::new();
        for dtype in DTYPES {
            let operand = operand(dtype, rank.rank, longest(dtype));
            for count in (cases.counts)(dtype) {
                for (shift, in_place) in [(0, false), (1, false), (0, true)] {
                    let to = recv.offset((shift * dtype.size()) as u64);
                    let from = if in_place { to } else { send };
                    let mut digests = Vec::new();
                    for _ in 0..cases.times {
                        let mut bytes = operand[..count * dtype.size()].to_vec();
                        // SAFETY: the buffers are large enough, and freed after all ranks are through.
                        unsafe {
                            rank.memory.upload(to, &vec![0xff; bytes.len()]).unwrap();
                            rank.memory.upload(from, &bytes).unwrap();
                            rank.comm.all_reduce(from, to, count, dtype, cases.op, rank.stream()).unwrap();
                            rank.memory.download(&mut bytes, to).unwrap();
                        }
                        let mut digest = DefaultHasher::new();
                        bytes.hash(&mut digest);
                        digests.push(digest.finish());
                    }
                    digests.dedup();
                    let case = format!("{count} {dtype}, shifted by {shift}, in place: {in_place}");
                    results.push((case, digests));
                }
            }
        }
        let usage = rank.comm.usage();
        assert!(usage.iter().any(|usage| usage.algorithm == used && usage.calls > 0), "{used}: {usage:?}");
        rank.host.barrier(comm_core::Deadline::after(PATIENT)).unwrap();
        // SAFETY: all ranks have their results.
        unsafe { rank.comm.free(recv).unwrap() };
        rank.comm.close().unwrap();
        results
    });
    for (rank, results) in all.iter().enumerate() {
        assert_eq!(results, &all[0], "{options:?}: rank {rank} and rank 0 differ");
    }
    all.into_iter().next().unwrap()
}

#[test]
fn pushing_gives_the_bits_of_reading() {
    let Some(most) = world_size() else { return };
    let cases = Cases { counts: &|_| COUNTS.to_vec(), times: 1, op: ReduceOp::Sum };
    for size in [2, 3, most] {
        if size > most {
            continue;
        }
        let expected = results(size, &[("p2p.algorithm", "pull")], "pull", &cases);
        // By lines an all-reduce is composed of its parts.
        let alike =
            ["one_shot", "lamport", "two_shot", "cells", "staged", "composed"].map(|name| (name, name));
        for (algorithm, used) in alike.into_iter().chain([("lines", "composed")]) {
            let found = results(size, &[("p2p.algorithm", algorithm)], used, &cases);
            assert_eq!(found, expected, "{algorithm} of {size} ranks gives other bits than reading");
        }
        if size == 8 {
            let found = results(size, &[("p2p.topology", "hybrid_cube_mesh")], "cube_mesh", &cases);
            assert_eq!(found, expected, "the cube mesh gives other bits than reading");
        }
    }
}

/// Staging divides by the kernel that is held to the host's arithmetic by a test of its own (comm-kernels, `gpu_reduce`).
#[test]
fn averages_have_the_bits_of_staging() {
    let Some(most) = world_size() else { return };
    let cases = Cases { counts: &|_| COUNTS.to_vec(), times: 1, op: ReduceOp::Avg };
    for size in 2..=most {
        let expected = results(size, &[("p2p.algorithm", "staged")], "staged", &cases);
        for algorithm in ["one_shot", "two_shot"] {
            let found = results(size, &[("p2p.algorithm", algorithm)], algorithm, &cases);
            assert_eq!(found, expected, "{algorithm} of {size} ranks gives other bits than staging");
        }
    }
}

/// Rounds of few tiles whose last tile exists in all slices but the shortest, the last rank's: nobody sends that rank the
/// tile, so nothing but its own bookkeeping keeps it from being mistaken for one of two rounds before. The mistake, once
/// made, would spoil all later sums as well.
#[test]
fn steps_with_a_tile_that_is_empty_on_the_last_rank() {
    const TILE: usize = comm_kernels::p2p::TILE_BYTES as usize;
    const PACK: usize = 16;
    let Some(most) = world_size() else { return };
    for size in 2..=most {
        // With one block's cells a round has two tiles of a slice. Slices are a pack longer than whole tiles, the last
        // one at most these tiles.
        let counts = |dtype: DType| {
            let of_tiles = |tiles: usize| {
                [dtype.size(), PACK * (size - 1)].map(|more| (size * tiles * TILE + more) / dtype.size())
            };
            [4, 5, 8].into_iter().flat_map(of_tiles).collect()
        };
        let cases = |times| Cases { counts: &counts, times, op: ReduceOp::Sum };
        let expected = results(size, &[("p2p.algorithm", "pull")], "pull", &cases(1));
        let steps = [("p2p.algorithm", "steps"), ("p2p.cell_ctas", "1")];
        let found = results(size, &steps, "steps", &cases(8));
        assert_eq!(found, expected, "steps of {size} ranks give other bits than reading");
    }
}

/// That the data of the tests above tells orders of addition apart: it does so on the host.
#[test]
fn another_order_gives_other_bits() {
    let ranks: Vec<Vec<f32>> = (0..8)
        .map(|rank| {
            let bytes = operand(DType::F32, rank, 100);
            bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
        })
        .collect();
    let sum =
        |order: &[usize], i: usize| order.iter().skip(1).fold(ranks[order[0]][i], |a, &r| a + ranks[r][i]);
    let quads = |i: usize| sum(&[0, 1, 2, 3], i) + sum(&[4, 5, 6, 7], i);
    let straight = |i: usize| sum(&[0, 1, 2, 3, 4, 5, 6, 7], i);
    assert!((0..100).any(|i| quads(i).to_bits() != straight(i).to_bits()));
}
