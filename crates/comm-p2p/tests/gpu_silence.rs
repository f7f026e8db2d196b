//! A rank that has given up a wait copies nothing more: a rank that is only late still finds what it was sent.
//!
//! The last rank is late between seeing that data is there and reading it. The others run out of patience meanwhile, with
//! their next call enqueued already. The same with the guard taken away must be noticed, or this could not have been.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::time::Duration;

use comm_core::{Block2d, DType, Deadline, DeviceAddr, DeviceMemory as _, OpKind, P2pOp, ReduceOp, Result};
use common::{PATIENT, Rank, SHORT, world, world_size};

/// Longer than the others' patience, by a margin; 3 s.
const LATE: &str = "3000000000";
const COUNT: usize = 5000;

/// Runs `body` on two ranks of which the second is late, and returns what it says of the two; `guarded`: with the rule in
/// force.
fn late<T: Send>(algorithm: &str, guarded: bool, body: impl Fn(&Rank) -> T + Sync) -> Vec<T> {
    let options = [
        ("p2p.stall_ns", LATE),
        ("p2p.stall_rank", "1"),
        ("p2p.algorithm", algorithm),
        ("p2p.test_copies_when_broken", if guarded { "off" } else { "on" }),
    ];
    world(2, SHORT, &options, |rank| {
        rank.host.barrier(Deadline::after(PATIENT)).unwrap();
        let found = body(&rank);
        // Both learn that somebody gave up; that alone says nothing of what had been delivered before.
        let error = rank.await_failure(SHORT + Duration::from_secs(1));
        assert!(error.is_fatal(), "{error}");
        // The memory of both stays until both have read.
        rank.memory.synchronize().unwrap();
        rank.host.barrier(Deadline::after(PATIENT)).unwrap();
        rank.comm.close().unwrap_err();
        found
    })
}

/// Whether what the late rank found was right, with the rule and without it.
fn verdicts(algorithm: &str, body: impl Fn(&Rank) -> bool + Sync) -> [bool; 2] {
    [true, false].map(|guarded| late(algorithm, guarded, &body)[1])
}

#[test]
fn a_message_is_whole_though_its_sender_gave_up_on_the_next() {
    if world_size().is_none() {
        return;
    }
    // Alone, and in groups.
    for grouped in [false, true] {
        let found = verdicts("staged", |rank| {
            let peer = 1 - rank.rank;
            let transfer = |addr: DeviceAddr| {
                let (count, dtype, stream) = (COUNT, DType::F32, rank.stream());
                // SAFETY: the buffers hold as many elements and live until the memory goes, which is last.
                unsafe {
                    match (rank.rank, grouped) {
                        (0, false) => rank.comm.send(addr, count, dtype, peer, stream),
                        (0, true) => rank.comm.group(&[P2pOp::Send { addr, count, dtype, peer }], stream),
                        (_, false) => rank.comm.recv(addr, count, dtype, peer, stream),
                        (_, true) => rank.comm.group(&[P2pOp::Recv { addr, count, dtype, peer }], stream),
                    }
                }
            };
            if rank.rank == 0 {
                let messages = [1.0, 2.0].map(|value| rank.buffer(COUNT, value));
                messages.into_iter().try_for_each(transfer).unwrap();
                return true;
            }
            let to = rank.buffer(COUNT, -1.0);
            transfer(to).unwrap();
            rank.get(to, COUNT) == vec![1.0; COUNT]
        });
        assert_eq!(found, [true, false], "grouped: {grouped}");
    }
}

/// Calls in a row of the others; the late rank makes the first alone. `call` gets operands of `2 * COUNT` elements.
fn whole(kind: OpKind, call: impl Fn(&Rank, DeviceAddr, DeviceAddr) -> Result<()> + Sync, expected: &[f32]) {
    if world_size().is_none() {
        return;
    }
    let found = verdicts("staged", |rank| {
        let operand = |call: usize| rank.buffer(2 * COUNT, (10 * call + rank.rank) as f32);
        let (first, next) = (operand(1), operand(2));
        let (to, other) = (rank.buffer(2 * COUNT, -1.0), rank.buffer(2 * COUNT, -1.0));
        call(rank, first, to).unwrap();
        if rank.rank == 0 {
            call(rank, next, other).unwrap();
            return true;
        }
        let got = rank.get(to, 2 * COUNT);
        (got.chunks(COUNT).zip(expected)).all(|(part, &value)| part.iter().all(|&got| got == value))
    });
    assert_eq!(found, [true, false], "{kind}");
}

#[test]
fn staged_results_are_whole_though_a_rank_gave_up_at_the_end_of_the_call() {
    whole(
        OpKind::AllGather,
        // SAFETY: the operands are large enough and live until the memory goes, which is last.
        |rank, send, recv| unsafe { rank.comm.all_gather(send, recv, COUNT, DType::F32, rank.stream()) },
        &[10.0, 11.0],
    );
    whole(
        OpKind::ReduceScatter,
        // SAFETY: as above.
        |rank, send, recv| unsafe {
            rank.comm.reduce_scatter(send, recv, COUNT, DType::F32, ReduceOp::Min, rank.stream())
        },
        &[10.0, -1.0],
    );
    // Rows with as much between them again.
    whole(
        OpKind::AllGather2d,
        |rank, send, recv| {
            let (height, width) = (COUNT / 100, 100);
            let block = Block2d {
                height,
                width,
                row_pitch: width,
                rank_stride: COUNT,
                send_pitch: 2 * width,
                dtype: DType::F32,
                first: true,
                last: true,
            };
            // SAFETY: as above.
            unsafe { rank.comm.all_gather_2d(send, recv, &block, rank.stream()) }
        },
        &[10.0, 11.0],
    );
}

/// The late rank makes one call, the other more than there are buffers: all but the first find nobody, and none but the
/// second, which had not given up yet, may send anything.
#[test]
fn lines_are_whole_though_a_rank_gave_up_in_a_later_call() {
    if world_size().is_none() {
        return;
    }
    let found = late("lines", true, |rank| {
        let (f32s, stream) = (DType::F32, rank.stream());
        let own = |call: usize| rank.buffer(2 * COUNT, (10 * call + rank.rank) as f32);
        let calls = if rank.rank == 0 { 8 } else { 1 };
        let sends: Vec<_> = (1..=calls).map(own).collect();
        let results: Vec<_> = (0..calls).map(|_| rank.buffer(2 * COUNT, -1.0)).collect();
        for (&send, &to) in sends.iter().zip(&results) {
            // SAFETY: the operands are large enough and live until the memory goes, which is last.
            let call = unsafe { rank.comm.all_gather(send, to, COUNT, f32s, stream) };
            // It may be known by then that a wait was given up.
            if rank.rank == 1 {
                call.unwrap();
            }
        }
        let got = rank.get(results[0], 2 * COUNT);
        got.chunks(COUNT).zip([10.0, 11.0]).all(|(part, value)| part.iter().all(|&got| got == value))
    });
    assert_eq!(found, [true, true]);
}
