//! One rank's kernels sleep between their sends and their first wait, while the others go on. Double buffering keeps
//! what they send apart; without it, the same test must see wrong results.

use std::time::Duration;

use comm_core::{CommError, DType, DeviceAddr, DeviceMemory as _, ReduceOp};
use comm_kernels::pattern::Expected;

use crate::common::{PATIENT, Rank, connect};
use crate::data::{Judge, SMALL, SUM, at, sums, timed};
use crate::setting::two_worlds;

const COUNT: usize = 1000;
const CALLS: usize = 40;
const DTYPE: DType = DType::F32;
/// 200 us.
const STALL: &str = "200000";
/// Long enough to make a communicator in, short enough to wait for one whose ranks have lost each other.
const TIMEOUT: Duration = Duration::from_secs(2);

#[derive(Clone, Copy, Debug)]
enum Op {
    AllReduce,
    ReduceScatter,
    AllGather,
    Broadcast,
    ReduceScatterV,
    AllGatherV,
}

const OPS: [Op; 6] =
    [Op::AllReduce, Op::ReduceScatter, Op::AllGather, Op::Broadcast, Op::ReduceScatterV, Op::AllGatherV];

/// The first rank, which is late, has nothing, the second most, the others a little.
fn uneven(size: usize) -> Vec<usize> {
    (0..size).map(|rank| [0, COUNT, 3][rank.min(2)]).collect()
}

impl Op {
    /// Call number `call`: every call has its own data and its own place for the result.
    fn issue(self, rank: &Rank, send: DeviceAddr, recv: DeviceAddr) -> comm_core::Result<()> {
        let (comm, stream, sum) = (&rank.comm, rank.stream(), ReduceOp::Sum);
        unsafe {
            match self {
                Self::AllReduce => comm.all_reduce(send, recv, COUNT, DTYPE, sum, stream),
                Self::ReduceScatter => comm.reduce_scatter(send, recv, COUNT, DTYPE, sum, stream),
                Self::AllGather => comm.all_gather(send, recv, COUNT, DTYPE, stream),
                Self::Broadcast => comm.broadcast(send, recv, COUNT, DTYPE, 1, stream),
                Self::ReduceScatterV => {
                    comm.reduce_scatter_v(send, recv, &uneven(rank.size), DTYPE, sum, stream)
                }
                Self::AllGatherV => comm.all_gather_v(send, recv, &uneven(rank.size), DTYPE, stream),
            }
        }
    }

    /// What the result must hold: where in the call's place and how much, what, and from which element on.
    fn result(self, rank: &Rank) -> Vec<((usize, usize), Expected, usize)> {
        let counts = uneven(rank.size);
        let before = |rank: usize| counts[..rank].iter().sum::<usize>();
        let all = 0..rank.size;
        match self {
            Self::AllReduce => vec![((0, COUNT), SUM, 0)],
            Self::ReduceScatter => vec![((0, COUNT), SUM, rank.rank * COUNT)],
            Self::AllGather => all.map(|from| ((from * COUNT, COUNT), Expected::Sent(from), 0)).collect(),
            Self::Broadcast => vec![((0, COUNT), Expected::Sent(1), 0)],
            Self::ReduceScatterV => vec![((0, counts[rank.rank]), SUM, before(rank.rank))],
            Self::AllGatherV => {
                all.map(|from| ((before(from), counts[from]), Expected::Sent(from), 0)).collect()
            }
        }
    }
}

/// What a rank found: the error that ended the calls, and wrong elements.
#[derive(Debug)]
struct Found {
    error: Option<CommError>,
    wrong: u64,
}

/// `CALLS` calls of `op` back to back, nothing looked at before the end.
fn calls(rank: &Rank, judge: &Judge, op: Op, seed: usize, recv: DeviceAddr) -> Found {
    let place = COUNT * rank.size;
    let send = rank.space(CALLS * place * DTYPE.size());
    let data = |call: usize| sums(seed + call, rank.size);
    for call in 0..CALLS {
        judge.fill(rank, (at(send, call * place, DTYPE), place, DTYPE), &data(call), rank.rank, 0).unwrap();
    }
    judge.poison(rank, recv, CALLS * place * DTYPE.size()).unwrap();
    rank.memory.synchronize().unwrap();
    // They may not be apart by more than the stall when they begin.
    rank.meet();
    let issue = |call| op.issue(rank, at(send, call * place, DTYPE), at(recv, call * place, DTYPE));
    let issued = (0..CALLS).try_for_each(issue);
    rank.memory.synchronize().unwrap();
    let error = issued.and_then(|()| rank.comm.poll()).err();
    for call in 0..CALLS {
        for ((offset, count), expected, first) in op.result(rank) {
            let lane = (at(recv, call * place + offset, DTYPE), count, DTYPE);
            judge.expect(rank, lane, &data(call), expected, first, call << 32).unwrap();
        }
    }
    Found { error, wrong: judge.verdict(rank).wrong }
}

#[test]
fn a_stalled_rank_gets_and_gives_the_right_results() {
    timed("stall", || {
        for size in two_worlds() {
            let last = (size - 1).to_string();
            let algorithms = [
                "one_shot", "two_shot", "cells", "steps", "packets", "relayed", "lamport", "lines", "direct",
                "spread", "composed", "staged",
            ]
            .map(Some);
            for (turn, algorithm) in [None, None].into_iter().chain(algorithms).enumerate() {
                let late = if turn % 2 == 0 { "0" } else { &last };
                let mut options = SMALL.to_vec();
                options.extend([("p2p.stall_ns", STALL), ("p2p.stall_rank", late)]);
                options.extend(algorithm.map(|name| ("p2p.algorithm", name)));
                comm_core::run_threads(size, PATIENT, |host| {
                    let rank = connect(host, PATIENT, &options).unwrap();
                    let judge = Judge::new(&rank);
                    // Reachable by all ranks, so that stores into the peers' results are tried too.
                    let recv = rank.comm.allocate(CALLS * COUNT * size * DTYPE.size()).unwrap();
                    for (seed, op) in (0..).step_by(100).zip(OPS) {
                        let found = calls(&rank, &judge, op, seed, recv);
                        assert!(
                            found.error.is_none() && found.wrong == 0,
                            "{op:?} by {algorithm:?}, rank {late} late: rank {}: {found:?}",
                            rank.rank
                        );
                    }
                    rank.comm.close().unwrap();
                })
                .unwrap();
            }
        }
    });
}

/// Ranks that are ahead overwrite what the late one has not read: the calls must fail, or this test could not have
/// seen a missing buffer. (Two-hop all-reduces are not among them: there a rank that is ahead has the late one's sums,
/// so it cannot be a call ahead.)
#[test]
fn without_double_buffering_a_stall_is_noticed() {
    timed("stall, negative control", || {
        for size in two_worlds() {
            for (op, algorithm) in [
                (Op::AllReduce, "one_shot"),
                (Op::ReduceScatter, "two_shot"),
                (Op::AllGather, "packets"),
                (Op::AllGather, "lines"),
                (Op::AllReduce, "lamport"),
                (Op::ReduceScatterV, "two_shot"),
                (Op::AllGatherV, "packets"),
            ] {
                for control in ["off", "on"] {
                    let mut options = SMALL.to_vec();
                    options.extend([
                        ("p2p.stall_ns", STALL),
                        ("p2p.stall_rank", "0"),
                        ("p2p.algorithm", algorithm),
                        ("p2p.test_single_buffer", control),
                    ]);
                    let found = comm_core::run_threads(size, PATIENT, |host| {
                        let rank = connect(host, TIMEOUT, &options).unwrap();
                        let judge = Judge::new(&rank);
                        let recv = rank.space(CALLS * COUNT * size * DTYPE.size());
                        let found = calls(&rank, &judge, op, 7000, recv);
                        let closed = rank.comm.close();
                        // A communicator that failed says so again.
                        assert!(control == "on" || closed.is_ok(), "{closed:?}");
                        found
                    })
                    .unwrap();
                    let noticed = found.iter().filter(|rank| rank.error.is_some() || rank.wrong > 0).count();
                    if control == "off" {
                        assert_eq!(noticed, 0, "{op:?}, {size} ranks: {found:?}");
                    } else {
                        println!("{op:?}, {size} ranks, one buffer: {noticed} ranks noticed");
                        assert!(noticed > 0, "{op:?} passed with one buffer: {found:?}");
                    }
                }
            }
        }
    });
}
