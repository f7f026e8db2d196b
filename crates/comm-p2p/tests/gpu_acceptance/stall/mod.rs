//! One rank's kernels sleep between their sends and their first wait, while the others go on. Double buffering keeps
//! what they send apart; without it, the same test must see wrong results.

mod barriers;
mod ops;

use std::sync::Arc;
use std::time::Duration;

use comm_core::{CommError, DeviceAddr, DeviceMemory as _, HostComm};

use self::ops::{COUNT, DTYPE, OPS, Op, Place};
use crate::common::{PATIENT, Rank, connect};
use crate::data::{Judge, SMALL, at, sums, timed};
use crate::setting::two_worlds;

const CALLS: usize = 40;
/// 200 us.
const STALL: &str = "200000";
/// Bytes of staging memory, in two halves, of which each holds less than a part for every rank.
const LEAST_STAGING: &str = "8192";
/// The least that ranks wait who have lost each other: long beside the stalls of all calls.
const LEAST: Duration = Duration::from_millis(500);

/// What a rank found: the error that ended the calls, and wrong elements.
#[derive(Debug)]
struct Found {
    error: Option<CommError>,
    wrong: u64,
}

impl Found {
    const fn is_right(&self) -> bool {
        self.error.is_none() && self.wrong == 0
    }
}

/// A rank with memory for the calls of one operation after another, each on a communicator of its own or not.
struct Bench {
    rank: Rank,
    judge: Judge,
    send: DeviceAddr,
    recv: DeviceAddr,
    constants: (DeviceAddr, DeviceAddr),
}

impl Bench {
    /// Bytes of `send` and of `recv`.
    const fn bytes(size: usize) -> usize {
        CALLS * COUNT * size * DTYPE.size()
    }

    fn new(host: Arc<dyn HostComm>) -> Self {
        let rank = connect(host, PATIENT, &SMALL).unwrap();
        let judge = Judge::new(&rank);
        let (send, recv) = (rank.space(Self::bytes(rank.size)), rank.space(Self::bytes(rank.size)));
        let constants = ops::constants(&rank);
        rank.comm.close().unwrap();
        Self { rank, judge, send, recv, constants }
    }

    /// `CALLS` calls of `op` back to back, nothing looked at before the end. Results go to `recv`.
    fn calls(&self, op: Op, seed: usize, recv: DeviceAddr) -> Found {
        let Self { rank, judge, send, constants: (zeros, ones), .. } = self;
        let whole = COUNT * rank.size;
        let data = |call: usize| sums(seed + call, rank.size);
        let place = |call: usize| Place {
            send: at(*send, call * whole, DTYPE),
            recv: at(recv, call * whole, DTYPE),
            zeros: *zeros,
            ones: *ones,
        };
        for call in 0..CALLS {
            judge.fill(rank, (place(call).send, whole, DTYPE), &data(call), rank.rank, 0).unwrap();
        }
        if op.updates() {
            rank.upload(recv, &vec![0; Self::bytes(rank.size)]);
        } else {
            judge.poison(rank, recv, Self::bytes(rank.size)).unwrap();
        }
        rank.memory.synchronize().unwrap();
        // They may not be apart by more than the stall when they begin.
        rank.meet();
        let issued = (0..CALLS).try_for_each(|call| op.issue(rank, &place(call)));
        rank.memory.synchronize().unwrap();
        let error = issued.and_then(|()| rank.comm.poll()).err();
        for call in 0..CALLS {
            for ((offset, count), expected, first) in op.result(rank) {
                let lane = (at(place(call).recv, offset, DTYPE), count, DTYPE);
                judge.expect(rank, lane, &data(call), expected, first, call << 32).unwrap();
            }
        }
        let on_host = (0..CALLS).map(|call| op.wrong_on_host(rank, &data(call), &place(call))).sum::<u64>();
        Found { error, wrong: judge.verdict(rank).wrong + on_host }
    }
}

#[test]
fn a_stalled_rank_gets_and_gives_the_right_results() {
    let forced = [
        "one_shot", "two_shot", "cells", "steps", "packets", "relayed", "lamport", "lines", "direct",
        "spread", "composed", "staged",
    ]
    .map(Some);
    timed("stall", || {
        for size in two_worlds() {
            let last = (size - 1).to_string();
            comm_core::run_threads(size, PATIENT, |host| {
                let mut bench = Bench::new(host);
                for (turn, algorithm) in [None, None].into_iter().chain(forced).enumerate() {
                    let late = if turn % 2 == 0 { "0" } else { &last };
                    let mut options = SMALL.to_vec();
                    options.extend([("p2p.stall_ns", STALL), ("p2p.stall_rank", late)]);
                    options.extend(algorithm.map(|name| ("p2p.algorithm", name)));
                    bench.rank.reconnect(PATIENT, &options);
                    let rank = &bench.rank;
                    // Reachable by all ranks, so that stores into the peers' results are tried too.
                    let recv = rank.comm.allocate(Bench::bytes(size)).unwrap();
                    for (seed, op) in (0..).step_by(100).zip(OPS).filter(|(_, op)| op.has(algorithm)) {
                        let found = bench.calls(op, seed, recv);
                        assert!(
                            found.is_right(),
                            "{op:?} by {algorithm:?}, rank {late} late: rank {}: {found:?}",
                            rank.rank
                        );
                        if let Some((kind, name)) = op.counted(algorithm) {
                            let usage = rank.comm.usage();
                            let as_meant = usage.iter().any(|u| u.op == kind && u.algorithm == name);
                            assert!(as_meant, "{op:?} by {algorithm:?} went another way: {usage:?}");
                        }
                    }
                    rank.comm.close().unwrap();
                }
            })
            .unwrap();
        }
    });
}

/// With one buffer instead of four, ranks that are ahead overwrite what the late one has not read: the calls must fail, or
/// the test above could not have seen a missing buffer. The same calls with all buffers must not.
///
/// (Two-hop all-reduces are not among them: there a rank that is ahead has the late one's sums, so it cannot be a call
/// ahead. Nor is what goes by steps, and what is stored straight into results, which has no buffers.)
fn is_noticed(controls: &[(Op, &'static str)]) {
    // Staged calls then take several chunks each.
    let small =
        SMALL.map(|(name, value)| (name, if name == "p2p.staging_bytes" { LEAST_STAGING } else { value }));
    for size in two_worlds() {
        let by_rank = comm_core::run_threads(size, PATIENT, |host| {
            let mut bench = Bench::new(host);
            let timeout = bench.rank.short_timeout(LEAST, &small);
            let mut found = Vec::new();
            for &(op, algorithm) in controls {
                for control in ["off", "on"] {
                    let mut options = small.to_vec();
                    options.extend([
                        ("p2p.stall_ns", STALL),
                        ("p2p.stall_rank", "0"),
                        ("p2p.algorithm", algorithm),
                        ("p2p.test_single_buffer", control),
                    ]);
                    bench.rank.reconnect(timeout, &options);
                    found.push(bench.calls(op, 7000, bench.recv));
                    let closed = bench.rank.comm.close();
                    // A communicator that failed says so again.
                    assert!(control == "on" || closed.is_ok(), "{op:?} by {algorithm}: {closed:?}");
                }
            }
            found
        })
        .unwrap();
        for (turn, (op, algorithm)) in controls.iter().enumerate() {
            let noticed = |run: usize| by_rank.iter().filter(|found| !found[run].is_right()).count();
            let (off, on) = (noticed(2 * turn), noticed(2 * turn + 1));
            println!("{op:?} by {algorithm}, {size} ranks: {on} notice that there is one buffer");
            let found: Vec<_> = by_rank.iter().map(|found| &found[2 * turn..][..2]).collect();
            assert!(off == 0 && on > 0, "{op:?} by {algorithm}, {size} ranks: {found:?}");
        }
    }
}

#[test]
fn without_double_buffering_a_stall_is_noticed_in_sums() {
    timed("stall, negative control of sums", || {
        is_noticed(&[
            (Op::AllReduce, "one_shot"),
            (Op::AllReduce, "lamport"),
            (Op::ReduceScatter, "two_shot"),
            (Op::ReduceScatter, "lines"),
            (Op::ReduceScatter, "cells"),
            (Op::ReduceScatterV, "two_shot"),
            (Op::ReduceScatter, "staged"),
        ]);
    });
}

#[test]
fn without_double_buffering_a_stall_is_noticed_in_averages_and_moves() {
    timed("stall, negative control of averages and moves", || {
        is_noticed(&[
            (Op::Average, "one_shot"),
            (Op::ScatteredAverage, "two_shot"),
            (Op::ScatteredAverageV, "two_shot"),
            (Op::AllGather, "packets"),
            (Op::AllGather, "lines"),
            (Op::AllGatherV, "packets"),
            (Op::Broadcast, "packets"),
            (Op::Broadcast, "relayed"),
            (Op::Broadcast, "lines"),
            (Op::AllToAll, "staged"),
        ]);
    });
}

#[test]
fn without_double_buffering_a_stall_is_noticed_in_norms() {
    timed("stall, negative control of norms", || {
        is_noticed(&[(Op::Norm, "one_shot"), (Op::Norm, "lamport"), (Op::Fp8Norm, "lamport")]);
    });
}
