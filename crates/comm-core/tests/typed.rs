//! Collectives on slices.

#![allow(clippy::unwrap_used, reason = "these are tests, though not all of it is test functions")]

mod support;

use std::time::Duration;

use comm_core::{
    BlockShape, CommError, DeviceComm, F8E4M3, HostNormQuantization, HostQuantScale, HostSliceExt,
    HostTransfer, NormScale, ReduceOp, Result, TwoGroupRows, run_threads,
};
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
        comm.broadcast_slice_in_place(&mut data, 2).unwrap();
        assert_eq!(data, [2.0; 4]);
        let mut recv = [0_i64];
        let to = (comm.rank() == 1).then_some(&mut recv[..]);
        comm.reduce_slice(&[4], to, ReduceOp::Sum, 1).unwrap();
        assert_eq!(recv, [if comm.rank() == 1 { 12 } else { 0 }]);
    });
}

#[test]
fn in_place_forms_leave_the_results_where_the_operands_lay() {
    on_ranks(3, |comm| {
        let rank = comm.rank();
        let mut uneven = [0, 0, 0];
        uneven[..].iter_mut().skip([0, 0, 1][rank]).take(rank).for_each(|x| *x = 10 + rank as i32);
        comm.all_gather_v_slice_in_place(&mut uneven, &[0, 1, 2]).unwrap();
        assert_eq!(uneven, [11, 12, 12]);
        let mut parts = [1, 2, 3, 4, 5, 6];
        comm.reduce_scatter_slice_in_place(&mut parts, ReduceOp::Sum).unwrap();
        assert_eq!(parts[2 * rank..][..2], [[3, 6], [9, 12], [15, 18]][rank]);
        let mut data = [rank as i64, 1];
        comm.reduce_slice_in_place(&mut data, ReduceOp::Sum, 2).unwrap();
        if rank == 2 {
            assert_eq!(data, [3, 3]);
        }
        comm.barrier_host().unwrap();
    });
}

#[test]
fn groups_of_transfers() {
    on_ranks(3, |comm| {
        let (next, previous) = ((comm.rank() + 1) % 3, (comm.rank() + 2) % 3);
        let (own, mut from_previous, mut from_next) = ([comm.rank(), 7].map(|x| x as u32), [0; 2], [0; 1]);
        let mut transfers = [
            HostTransfer::Recv(&mut from_previous, previous),
            HostTransfer::Send(&own, next),
            HostTransfer::Recv(&mut from_next, next),
            HostTransfer::Send(&own[..1], previous),
        ];
        comm.group_slices(&mut transfers).unwrap();
        assert_eq!((from_previous, from_next), ([previous as u32, 7], [next as u32]));
    });
}

#[test]
fn fused_norms() {
    on_ranks(2, |comm| {
        let scale = NormScale { eps: 0.0, weight_offset: 1.0 };
        // The sums with residual and bias are 3 and -3 (mean square 9), then 5 and 5 (mean square 25).
        let (input, bias, weight) = ([0.5_f32, -2.5, 1.5, 1.5], [1.0, 1.0], [0.0, 1.0]);
        let (residual, expected) = ([1.0, 1.0, 1.0, 1.0], [1.0, -2.0, 1.0, 2.0]);
        let (mut updated, mut output) = (residual, [0.0; 4]);
        let parameters = (&weight[..], Some(&bias[..]));
        comm.all_reduce_rmsnorm_slice(&input, &mut updated, parameters, &mut output, scale).unwrap();
        assert_eq!((updated, output), ([3.0, -3.0, 5.0, 5.0], expected));
        let (mut updated, mut data) = (residual, input);
        comm.all_reduce_rmsnorm_slice_in_place(&mut data, &mut updated, parameters, scale).unwrap();
        assert_eq!((updated, data), ([3.0, -3.0, 5.0, 5.0], expected));
        let wrong = |weight: &[f32], bias: Option<&[f32]>, residual: &mut [f32]| {
            invalid(comm.all_reduce_rmsnorm_slice_in_place(&mut [0.0; 4], residual, (weight, bias), scale));
        };
        wrong(&[], None, &mut [0.0; 4]);
        wrong(&[0.0; 3], None, &mut [0.0; 4]);
        wrong(&[0.0; 2], Some(&[0.0]), &mut [0.0; 4]);
        wrong(&[0.0; 2], None, &mut [0.0; 3]);
        comm.barrier_host().unwrap();
    });
}

#[test]
fn sums_by_way_of_fp8() {
    on_ranks(3, |comm| {
        // Powers of two survive, whatever the scale of their group.
        let send = [1_f32, 2.0, 0.5, -4.0].map(|x| x * (1 << comm.rank()) as f32);
        let (mut recv, mut data) = ([0.0; 4], send);
        comm.all_reduce_quantized_slice(&send, &mut recv).unwrap();
        comm.all_reduce_quantized_slice_in_place(&mut data).unwrap();
        let expected = [7.0, 14.0, 3.5, -28.0];
        for (i, (x, y)) in recv.iter().zip(expected).enumerate() {
            assert!((x - y).abs() <= y.abs() / 16.0, "{i}: {x}, not about {y}");
        }
        assert_eq!(data, recv);
        invalid(comm.all_reduce_quantized_slice(&[1_f32; 3], &mut [0.0; 2]));
        assert!(comm.all_reduce_quantized_slice_in_place(&mut [1_u32]).is_err());
    });
}

#[test]
fn blocks_become_columns() {
    on_ranks(2, |comm| {
        let rank = comm.rank() as i32;
        let shape = BlockShape::columns(2, 2, 3);
        let own: [i32; 6] = std::array::from_fn(|i| 100 * rank + i as i32);
        let mut all = [-1; 12];
        comm.all_gather_2d_slice(&own, &mut all, shape).unwrap();
        assert_eq!(all, [0, 1, 2, 100, 101, 102, 3, 4, 5, 103, 104, 105]);
        // In a wider matrix, from where the blocks come to lie; what is between them stays.
        let shape = BlockShape { row_pitch: 8, rank_stride: 4, send_pitch: 8, ..shape };
        let mut wide = [-1; 15];
        for (row, values) in own.chunks(3).enumerate() {
            wide[8 * row + 4 * comm.rank()..][..3].copy_from_slice(values);
        }
        comm.all_gather_2d_slice_in_place(&mut wide, shape).unwrap();
        assert_eq!(wide, [0, 1, 2, -1, 100, 101, 102, -1, 3, 4, 5, -1, 103, 104, 105]);
        invalid(comm.all_gather_2d_slice_in_place(&mut wide[1..], shape));
        invalid(comm.all_gather_2d_slice_in_place(&mut wide, BlockShape { send_pitch: 3, ..shape }));
        let shape = BlockShape::columns(2, 2, 3);
        invalid(comm.all_gather_2d_slice(&own[1..], &mut all, shape));
        invalid(comm.all_gather_2d_slice(&own, &mut all[1..], shape));
        // Blocks on top of each other, and rows that begin in the one before.
        invalid(comm.all_gather_2d_slice(&own, &mut all, BlockShape { rank_stride: 1, ..shape }));
        invalid(comm.all_gather_2d_slice(&own, &mut all, BlockShape { send_pitch: 1, ..shape }));
    });
}

#[test]
fn fused_norms_with_fp8_results() {
    on_ranks(2, |comm| {
        let scale = NormScale { eps: 0.0, weight_offset: 0.0 };
        // The sums with the residual are 3 and -3, then 5 and 5, and the weights 2 and 4: the results 2, -4, 2, 4.
        let (input, parameters) = ([1_f32, -2.0, 2.0, 2.0], (&[2_f32, 4.0][..], None));
        let expected = [2.0, -4.0, 2.0, 4.0];
        let (mut residual, mut output, mut bits, mut scales) = ([1.0; 4], [0.0; 4], [0_u8; 4], [0.0; 2]);
        let quantized = HostNormQuantization {
            output: &mut bits,
            scale: HostQuantScale::PerToken(&mut scales),
            keep_unquantized: true,
        };
        comm.all_reduce_rmsnorm_quantized_slice(
            &input,
            &mut residual,
            parameters,
            &mut output,
            quantized,
            scale,
        )
        .unwrap();
        assert_eq!((residual, output), ([3.0, -3.0, 5.0, 5.0], expected));
        // The largest of a row is the largest that fp8 has.
        assert_eq!(scales, [4.0 / 448.0; 2]);
        let decoded = bits.map(|bits| F8E4M3::from_bits(bits).to_f32());
        assert_eq!(decoded, [224.0, -448.0, 224.0, 448.0]);

        let (mut residual, mut data, mut fp8) = ([1.0; 4], input, [F8E4M3::from_bits(0); 4]);
        let per_tensor = 0.5;
        let quantized = HostNormQuantization {
            output: &mut fp8,
            scale: HostQuantScale::PerTensor(&per_tensor),
            keep_unquantized: false,
        };
        comm.all_reduce_rmsnorm_quantized_slice_in_place(
            &mut data,
            &mut residual,
            parameters,
            quantized,
            scale,
        )
        .unwrap();
        assert_eq!(fp8.map(|x| x.to_f32()), expected.map(|x| x * 2.0));

        let wrong = |bits: &mut [u8], scales: &mut [f32]| {
            let (scale_to, mut data, mut residual) = (HostQuantScale::PerToken(scales), input, [1.0; 4]);
            let quantized = HostNormQuantization { output: bits, scale: scale_to, keep_unquantized: true };
            invalid(comm.all_reduce_rmsnorm_quantized_slice_in_place(
                &mut data,
                &mut residual,
                parameters,
                quantized,
                scale,
            ));
            assert_eq!((data, residual), (input, [1.0; 4]));
        };
        wrong(&mut [0; 3], &mut [0.0; 2]);
        wrong(&mut [0; 4], &mut [0.0; 1]);
        comm.barrier_host().unwrap();
    });
}

#[test]
fn two_group_norms_with_fp8_results() {
    on_ranks(2, |comm| {
        let gather = comm.split(Some(0), 0).unwrap().unwrap();
        let scale = NormScale { eps: 0.0, weight_offset: 0.0 };
        let rows = TwoGroupRows {
            reduce_first_row: 1,
            reduce_tokens: &[0, 2],
            gather_first_row: 1,
            gather_tokens: &[0, 2],
        };
        let own = comm.rank() * 4;
        let norm = |bits: &mut [u8], scales: &mut [f32]| {
            let (mut states, mut residual) = ([9.0, 9.0, 1.0, -2.0, 2.0, 2.0], vec![1.0; own]);
            comm.all_reduce_rmsnorm_two_group_quantized_slice_in_place(
                &*gather,
                (&mut states, &mut residual),
                (&[2_f32, 4.0], None),
                HostNormQuantization {
                    output: bits,
                    scale: HostQuantScale::PerToken(scales),
                    keep_unquantized: true,
                },
                rows,
                scale,
            )?;
            assert_eq!(states, [9.0, 9.0, 2.0, -4.0, 2.0, 4.0]);
            Ok(())
        };
        let (mut bits, mut scales) = ([0xff; 6], [-1.0; 3]);
        norm(&mut bits, &mut scales).unwrap();
        // Row 0 belongs to neither group.
        assert_eq!((&bits[..2], scales), (&[0xff; 2][..], [-1.0, 4.0 / 448.0, 4.0 / 448.0]));
        let decoded: Vec<f32> = bits[2..].iter().map(|&bits| F8E4M3::from_bits(bits).to_f32()).collect();
        assert_eq!(decoded, [224.0, -448.0, 224.0, 448.0]);
        invalid(norm(&mut bits[..5], &mut scales));
        invalid(norm(&mut bits, &mut scales[..2]));
    });
}

#[test]
fn two_group_norms() {
    on_ranks(2, |comm| {
        let gather = comm.split(Some(0), 0).unwrap().unwrap();
        let scale = NormScale { eps: 0.0, weight_offset: 0.0 };
        let own = comm.rank() * 2;
        let rows = TwoGroupRows {
            reduce_first_row: 1,
            reduce_tokens: &[0, 2],
            gather_first_row: 1,
            gather_tokens: &[0, 2],
        };
        let norm = |states: &mut [f32], residual: &mut [f32], bias: Option<&[f32]>, rows| {
            comm.all_reduce_rmsnorm_two_group_slice_in_place(
                &*gather,
                states,
                residual,
                (&[1.0, 2.0], bias),
                rows,
                scale,
            )
        };
        // Row 0 belongs to neither group. The sums with the residual are 3 and -3, then 5 and 5.
        let mut states = [9.0, 9.0, 1.0, -2.0, 2.0, 2.0];
        let mut residual = vec![1.0; own * 2];
        norm(&mut states, &mut residual, None, rows).unwrap();
        assert_eq!(states[..2], [9.0, 9.0]);
        assert_eq!(states[2..], [1.0, -2.0, 1.0, 2.0]);
        assert_eq!(residual, [3.0, -3.0, 5.0, 5.0][..own * 2]);
        invalid(norm(&mut states[1..], &mut residual, None, rows));
        invalid(norm(&mut states, &mut vec![0.0; own * 2 + 1], None, rows));
        invalid(norm(&mut states, &mut residual, Some(&[0.0]), rows));
        invalid(norm(&mut states, &mut residual, None, TwoGroupRows { gather_tokens: &[2], ..rows }));
        let far = TwoGroupRows { reduce_first_row: usize::MAX, ..rows };
        invalid(norm(&mut states, &mut residual, None, far));
    });
}

#[test]
fn wrong_lengths_are_refused_before_anything_happens() {
    on_ranks(2, |comm| {
        invalid(comm.all_reduce_slice(&[1_f32; 3], &mut [0.0; 2], ReduceOp::Sum));
        invalid(comm.all_gather_slice(&[1_f32; 3], &mut [0.0; 5]));
        invalid(comm.all_gather_slice_in_place(&mut [1_f32; 3]));
        invalid(comm.reduce_scatter_slice_in_place(&mut [1_f32; 3], ReduceOp::Sum));
        invalid(comm.all_gather_v_slice_in_place(&mut [1_f32; 4], &[1, 2]));
        invalid(comm.all_gather_v_slice_in_place(&mut [1_f32; 3], &[1, 2, 3]));
        invalid(comm.all_gather_v_slice(&[1_f32; 2], &mut [0.0; 3], &[1, 2, 3]));
        invalid(comm.reduce_scatter_slice(&[1_f32; 3], &mut [0.0; 2], ReduceOp::Sum));
        invalid(comm.all_to_all_slice(&[1_f32; 3], &mut [0.0; 3]));
        invalid(comm.all_to_all_slice(&[1_f32; 4], &mut [0.0; 2]));
        invalid(comm.broadcast_slice_in_place(&mut [1_f32], 2));
        if comm.rank() == 0 {
            invalid(comm.reduce_slice(&[1_f32], None, ReduceOp::Sum, 0));
        }
        let mut data = [1_f32];
        comm.all_reduce_slice_in_place(&mut data, ReduceOp::Sum).unwrap();
        assert_eq!(data, [2.0]);
    });
}
