//! Collectives on slices.

#![allow(clippy::unwrap_used, reason = "these are tests, though not all of it is test functions")]

mod support;

use std::time::Duration;

use comm_core::{CommError, DeviceComm, HostSliceExt, ReduceOp, Result, run_threads};
use half::bf16;
use support::GatherBackend;

fn on_ranks(size: usize, test: impl Fn(&dyn DeviceComm) + Sync) {
    let timeout = Duration::from_secs(3);
    run_threads(size, timeout, |host| test(&GatherBackend::new("gather", host, timeout))).unwrap();
}

fn invalid(result: Result<()>) {
    assert!(matches!(result, Err(CommError::InvalidArgument { .. })), "{result:?}");
}

#[test]
fn slices_of_any_element_type() {
    on_ranks(3, |comm| {
        let rank = comm.rank();
        let mut sum = [bf16::ZERO; 2];
        comm.all_reduce_slice(&[bf16::from_f32(rank as f32), bf16::ONE], &mut sum, ReduceOp::Sum).unwrap();
        assert_eq!(sum, [bf16::from_f32(3.0); 2]);
        let mut largest = [rank as u64];
        comm.all_reduce_slice_in_place(&mut largest, ReduceOp::Max).unwrap();
        assert_eq!(largest, [2]);
    });
}

#[test]
fn gathers_and_scatters() {
    on_ranks(3, |comm| {
        let rank = comm.rank() as i32;
        let mut all = [0; 6];
        comm.all_gather_slice(&[rank, -rank], &mut all).unwrap();
        assert_eq!(all, [0, 0, 1, -1, 2, -2]);
        let mut own = [0; 3];
        own[comm.rank()] = 5 + rank;
        comm.all_gather_slice_in_place(&mut own).unwrap();
        assert_eq!(own, [5, 6, 7]);
        let mut uneven = [0; 3];
        comm.all_gather_v_slice(&vec![rank; comm.rank()], &mut uneven, &[0, 1, 2]).unwrap();
        assert_eq!(uneven, [1, 2, 2]);
        let mut part = [0];
        comm.reduce_scatter_slice(&[1, 2, 3], &mut part, ReduceOp::Sum).unwrap();
        assert_eq!(part, [3 * (rank + 1)]);
        let mut parts = vec![0; comm.rank()];
        comm.reduce_scatter_v_slice(&[1, 2, 3], &mut parts, &[0, 1, 2], ReduceOp::Sum).unwrap();
        assert_eq!(parts, [&[][..], &[3], &[6, 9]][comm.rank()]);
        let mut transposed = [0; 3];
        comm.all_to_all_slice(&[10 * rank, 10 * rank + 1, 10 * rank + 2], &mut transposed).unwrap();
        assert_eq!(transposed, [rank, 10 + rank, 20 + rank]);
    });
}

#[test]
fn roots() {
    on_ranks(3, |comm| {
        let mut data = [comm.rank() as f64; 4];
        comm.broadcast_slice(&mut data, 2).unwrap();
        assert_eq!(data, [2.0; 4]);
        let mut recv = [0_i64];
        let to = (comm.rank() == 1).then_some(&mut recv[..]);
        comm.reduce_slice(&[4], to, ReduceOp::Sum, 1).unwrap();
        assert_eq!(recv, [if comm.rank() == 1 { 12 } else { 0 }]);
    });
}

#[test]
fn wrong_lengths_are_refused_before_anything_happens() {
    on_ranks(2, |comm| {
        invalid(comm.all_reduce_slice(&[1_f32; 3], &mut [0.0; 2], ReduceOp::Sum));
        invalid(comm.all_gather_slice(&[1_f32; 3], &mut [0.0; 5]));
        invalid(comm.all_gather_slice_in_place(&mut [1_f32; 3]));
        invalid(comm.all_gather_v_slice(&[1_f32; 2], &mut [0.0; 3], &[1, 2, 3]));
        invalid(comm.reduce_scatter_slice(&[1_f32; 3], &mut [0.0; 2], ReduceOp::Sum));
        invalid(comm.all_to_all_slice(&[1_f32; 3], &mut [0.0; 3]));
        invalid(comm.all_to_all_slice(&[1_f32; 4], &mut [0.0; 2]));
        invalid(comm.broadcast_slice(&mut [1_f32], 2));
        if comm.rank() == 0 {
            invalid(comm.reduce_slice(&[1_f32], None, ReduceOp::Sum, 0));
        }
        let mut data = [1_f32];
        comm.all_reduce_slice_in_place(&mut data, ReduceOp::Sum).unwrap();
        assert_eq!(data, [2.0]);
    });
}
