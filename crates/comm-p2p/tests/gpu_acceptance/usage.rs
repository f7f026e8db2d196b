//! Usage counters: one per call, under the algorithm that carried it out, and nothing for calls that were refused.

use comm_core::{DType, DeviceAddr, DeviceMemory as _, OpKind, ReduceOp};

use crate::common::{PATIENT, Rank, world};
use crate::data::timed;
use crate::setting::worlds;

/// Algorithms that store into the other ranks' memory themselves.
const DIRECT: [&str; 5] = ["one_shot", "lamport", "two_shot", "cells", "composed"];

/// Calls of all-reduce by those algorithms.
fn direct(rank: &Rank) -> u64 {
    let usage = rank.comm.usage();
    let of = |kind, name: &str| kind == OpKind::AllReduce && DIRECT.contains(&name);
    usage.iter().filter(|used| of(used.op, &used.algorithm)).map(|used| used.calls).sum()
}

fn all(rank: &Rank) -> u64 {
    rank.comm.usage().iter().map(|used| used.calls).sum()
}

#[test]
fn every_call_counts_once_under_its_algorithm() {
    timed("usage", || {
        for size in worlds() {
            world(size, PATIENT, &[], |rank| {
                let bytes = 10 << 20;
                let (send, recv) = (rank.space(bytes), rank.space(bytes));
                rank.upload(send, &vec![0; bytes]);
                let call = |send: DeviceAddr, count, dtype, op| unsafe {
                    rank.comm.all_reduce(send, recv, count, dtype, op, rank.stream())
                };
                assert_eq!(all(&rank), 0);
                // What those algorithms do not take leaves them alone.
                call(send, 1000, DType::I64, ReduceOp::Prod).unwrap();
                call(send, 1000, DType::F8E4M3, ReduceOp::Prod).unwrap();
                call(send, 1000, DType::BF16, ReduceOp::Prod).unwrap();
                call(send, 0, DType::BF16, ReduceOp::Sum).unwrap();
                assert_eq!((direct(&rank), all(&rank)), (0, 4), "{:?}", rank.comm.usage());
                // What is refused leaves all of them alone.
                call(DeviceAddr::NULL, 8, DType::BF16, ReduceOp::Sum).unwrap_err();
                call(send.offset(1), 8, DType::BF16, ReduceOp::Sum).unwrap_err();
                assert_eq!((direct(&rank), all(&rank)), (0, 4), "{:?}", rank.comm.usage());
                let sizes = [4 << 10, 512 << 10, 10 << 20];
                let each =
                    [ReduceOp::Sum, ReduceOp::Avg].into_iter().flat_map(|op| sizes.map(|bytes| (op, bytes)));
                for (calls, (op, bytes)) in (1..).zip(each) {
                    call(send, bytes / 2, DType::BF16, op).unwrap();
                    assert_eq!((direct(&rank), all(&rank)), (calls, 4 + calls), "{op} of {bytes} bytes");
                }
                rank.memory.synchronize().unwrap();
                rank.comm.close().unwrap();
            });
        }
    });
}

/// The algorithms that calls of `op` were counted under, each with its calls.
fn used(rank: &Rank, op: OpKind) -> Vec<(String, u64)> {
    let usage = rank.comm.usage();
    usage
        .into_iter()
        .filter(|used| used.op == op)
        .map(|used| (used.algorithm.into_owned(), used.calls))
        .collect()
}

#[test]
fn uneven_parts_leave_staging_to_what_nothing_else_takes() {
    timed("usage, uneven", || {
        for size in worlds() {
            world(size, PATIENT, &[], |rank| {
                let most = 32 << 20;
                let (send, recv) = (rank.space(most), rank.comm.allocate(most).unwrap());
                rank.upload(send, &vec![0; most]);
                // One rank has nothing.
                let counts = |bytes: usize| -> Vec<usize> {
                    (0..size).map(|rank| if rank == 1 { 0 } else { bytes / size / 2 + rank }).collect()
                };
                let gather = |bytes, dtype| unsafe {
                    rank.comm.all_gather_v(send, recv, &counts(bytes), dtype, rank.stream()).unwrap();
                };
                let scatter = |bytes, dtype, op| unsafe {
                    rank.comm.reduce_scatter_v(send, recv, &counts(bytes), dtype, op, rank.stream()).unwrap();
                };
                let count = |name: &str, calls: u64| (name.to_owned(), calls);
                gather(4 << 10, DType::BF16);
                assert_eq!(used(&rank, OpKind::AllGatherV), [count("packets", 1)]);
                gather(24 << 20, DType::BF16);
                assert_eq!(used(&rank, OpKind::AllGatherV), [count("packets", 1), count("direct", 1)]);
                scatter(4 << 10, DType::BF16, ReduceOp::Sum);
                assert_eq!(used(&rank, OpKind::ReduceScatterV), [count("two_shot", 1)]);
                scatter(24 << 20, DType::BF16, ReduceOp::Sum);
                assert_eq!(used(&rank, OpKind::ReduceScatterV), [count("two_shot", 1), count("cells", 1)]);
                scatter(4 << 10, DType::F16, ReduceOp::Avg);
                scatter(4 << 10, DType::I32, ReduceOp::Sum);
                scatter(4 << 10, DType::BF16, ReduceOp::Max);
                assert_eq!(
                    used(&rank, OpKind::ReduceScatterV),
                    [count("two_shot", 2), count("cells", 1), count("staged", 2)]
                );
                rank.memory.synchronize().unwrap();
                rank.meet();
                unsafe { rank.comm.free(recv).unwrap() };
                rank.comm.close().unwrap();
            });
        }
    });
}
