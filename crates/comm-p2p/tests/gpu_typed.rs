//! The safe calls on cudarc's slices, and slices over the communicator's memory, against the host backend's results.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::sync::Arc;

use comm_core::{
    BlockShape, CommError, CreateContext, CudaNormQuantization, CudaQuantScale, CudaSliceExt as _, Deadline,
    DeviceComm, F8E4M3, HostFactory, HostNormQuantization, HostQuantScale, HostSliceExt as _, MemoryKind,
    NormScale, ReduceOp, allocate_cuda, create_with,
};
use common::{PATIENT, Rank, skipped_where_shared, world, world_size};
use cudarc::driver::{CudaStream, DevicePtr};
use half::bf16;

/// The size of the world, where ranks have devices of their own: cudarc's slices take and give back memory at any time.
fn size() -> Option<usize> {
    world_size().filter(|_| !skipped_where_shared("slices take and give back memory while ranks are at work"))
}

fn stream(rank: &Rank) -> Arc<CudaStream> {
    rank.memory.context().new_stream().unwrap()
}

/// The same ranks on the host's memory.
fn on_host(rank: &Rank) -> Arc<dyn DeviceComm> {
    create_with(&HostFactory, &CreateContext::new(rank.host.clone(), MemoryKind::Host)).unwrap()
}

/// Values of all magnitudes, different on every rank.
fn values(rank: &Rank, count: usize) -> Vec<bf16> {
    let value = |i: usize| {
        let mixed = (i * 4 + rank.rank + 1).wrapping_mul(0x9e37_79b1) >> 8 & 0xffff;
        (mixed as f32 - 32768.0) / 4096.0 * [1.0, 0.01, 30.0][i % 3]
    };
    (0..count).map(|i| bf16::from_f32(value(i))).collect()
}

#[test]
fn sums_by_way_of_fp8_and_gathers_of_blocks_have_the_host_backends_bits() {
    let Some(size) = size() else { return };
    world(size, PATIENT, &[], |rank| {
        let (host, stream) = (on_host(&rank), stream(&rank));
        for count in [1, 130, 40_001] {
            let own = values(&rank, count);
            let mut expected = own.clone();
            host.all_reduce_quantized_slice_in_place(&mut expected).unwrap();
            let send = stream.clone_htod(&own).unwrap();
            let mut recv = stream.clone_htod(&vec![bf16::NAN; count]).unwrap();
            rank.comm.all_reduce_quantized_cuda(&send, &mut recv, &stream).unwrap();
            assert_eq!(stream.clone_dtoh(&recv).unwrap(), expected);
            let mut data = stream.clone_htod(&own).unwrap();
            rank.comm.all_reduce_quantized_cuda_in_place(&mut data, &stream).unwrap();
            assert_eq!(stream.clone_dtoh(&data).unwrap(), expected);
        }

        let shape = BlockShape::columns(size, 17, 33);
        let own = values(&rank, 17 * 33);
        let mut expected = vec![bf16::ONE; size * 17 * 33];
        host.all_gather_2d_slice(&own, &mut expected, shape).unwrap();
        let send = stream.clone_htod(&own).unwrap();
        let mut recv = stream.clone_htod(&vec![bf16::ONE; expected.len()]).unwrap();
        rank.comm.all_gather_2d_cuda(&send, &mut recv, shape, &stream).unwrap();
        assert_eq!(stream.clone_dtoh(&recv).unwrap(), expected);

        // From where the blocks come to lie, with gaps that stay as they are.
        let wide = BlockShape { row_pitch: 40 * size, rank_stride: 40, send_pitch: 40 * size, ..shape };
        let mut expected = vec![bf16::ONE; 40 * size * 17];
        for (row, values) in own.chunks(33).enumerate() {
            expected[row * 40 * size + 40 * rank.rank..][..33].copy_from_slice(values);
        }
        let mut data = stream.clone_htod(&expected).unwrap();
        host.all_gather_2d_slice_in_place(&mut expected, wide).unwrap();
        rank.comm.all_gather_2d_cuda_in_place(&mut data, wide, &stream).unwrap();
        assert_eq!(stream.clone_dtoh(&data).unwrap(), expected);
        rank.comm.close().unwrap();
    });
}

#[test]
fn norms_with_fp8_results_are_near_the_host_backends() {
    const TOKENS: usize = 7;
    const HIDDEN: usize = 512;
    let Some(size) = size() else { return };
    world(size, PATIENT, &[], |rank| {
        let (host, stream) = (on_host(&rank), stream(&rank));
        let scale = NormScale { eps: 1e-5, weight_offset: 1.0 };
        let input = values(&rank, TOKENS * HIDDEN);
        let weight: Vec<bf16> = (0..HIDDEN).map(|i| bf16::from_f32((i % 5) as f32 / 4.0 - 0.5)).collect();
        let residual = vec![bf16::from_f32(0.25); TOKENS * HIDDEN];

        let (mut updated, mut normed) = (residual.clone(), vec![bf16::ZERO; input.len()]);
        let (mut bits, mut scales) = (vec![0_u8; input.len()], vec![0_f32; TOKENS]);
        let quantized = HostNormQuantization {
            output: &mut bits,
            scale: HostQuantScale::PerToken(&mut scales),
            keep_unquantized: true,
        };
        host.all_reduce_rmsnorm_quantized_slice(
            &input,
            &mut updated,
            (&weight, None),
            &mut normed,
            quantized,
            scale,
        )
        .unwrap();

        // Of a norm the last bit may differ, and with it an fp8 result by one step.
        let near = |found: &[u8], scale: &dyn Fn(usize) -> f32| {
            for (i, (&bits, y)) in found.iter().zip(&normed).enumerate() {
                let (y, one) = (y.to_f32(), scale(i / HIDDEN));
                let found = F8E4M3::from_bits(bits).to_f32() * one;
                assert!((found - y).abs() <= 0.08 * y.abs() + one / 256.0, "{i}: {found}, not about {y}");
            }
        };
        let upload = |values: &[bf16]| stream.clone_htod(values).unwrap();
        let weight = upload(&weight);
        let parameters = (&weight as &dyn DevicePtr<bf16>, None);

        let (from, mut into, mut output) = (upload(&input), upload(&residual), upload(&residual));
        let mut fp8 = stream.alloc_zeros::<u8>(input.len()).unwrap();
        let mut per_token = stream.alloc_zeros::<f32>(TOKENS).unwrap();
        let quantized = CudaNormQuantization {
            output: &mut fp8,
            scale: CudaQuantScale::PerToken(&mut per_token),
            keep_unquantized: true,
        };
        let comm = &rank.comm;
        comm.all_reduce_rmsnorm_quantized_cuda(
            &from,
            &mut into,
            parameters,
            &mut output,
            quantized,
            scale,
            &stream,
        )
        .unwrap();
        let found = stream.clone_dtoh(&per_token).unwrap();
        for (found, expected) in found.iter().zip(&scales) {
            assert!((found - expected).abs() <= expected / 64.0, "{found}, not about {expected}");
        }
        near(&stream.clone_dtoh(&fp8).unwrap(), &|token| found[token]);
        let about = |found: Vec<bf16>, all: &[bf16]| {
            for (found, expected) in found.iter().zip(all) {
                let (found, expected) = (found.to_f32(), expected.to_f32());
                let off = (found - expected).abs();
                assert!(off <= expected.abs() / 64.0 + 1e-3, "{found}, not about {expected}");
            }
        };
        about(stream.clone_dtoh(&output).unwrap(), &normed);
        about(stream.clone_dtoh(&into).unwrap(), &updated);

        let (mut data, mut into) = (upload(&input), upload(&residual));
        let one = scales.iter().fold(0_f32, |a, &b| a.max(b));
        let one_on_device = stream.clone_htod(&[one]).unwrap();
        let quantized = CudaNormQuantization {
            output: &mut fp8,
            scale: CudaQuantScale::PerTensor(&one_on_device),
            keep_unquantized: false,
        };
        comm.all_reduce_rmsnorm_quantized_cuda_in_place(
            &mut data, &mut into, parameters, quantized, scale, &stream,
        )
        .unwrap();
        near(&stream.clone_dtoh(&fp8).unwrap(), &|_| one);
        about(stream.clone_dtoh(&into).unwrap(), &updated);
        comm.close().unwrap();
    });
}

/// Every call is on a stream of its own, of which nobody but the communicator has a share when the next call comes.
#[test]
fn a_stream_may_go_as_soon_as_a_call_has_been_made_on_it() {
    let Some(size) = size() else { return };
    world(size, PATIENT, &[], |rank| {
        let keeper = stream(&rank);
        for count in [100, 300_000] {
            let turns: Vec<_> = (0..40)
                .map(|turn| keeper.clone_htod(&vec![(rank.rank + turn) as f32; count]).unwrap())
                .collect();
            let mut sums: Vec<_> = turns.iter().map(|_| keeper.alloc_zeros::<f32>(count).unwrap()).collect();
            for (send, recv) in turns.iter().zip(&mut sums) {
                rank.comm.all_reduce_cuda(send, recv, ReduceOp::Sum, &stream(&rank)).unwrap();
            }
            for (turn, sum) in sums.iter().enumerate() {
                let expected = (size * turn + size * (size - 1) / 2) as f32;
                assert_eq!(keeper.clone_dtoh(sum).unwrap(), vec![expected; count], "turn {turn} of {count}");
            }
        }
        rank.comm.close().unwrap();
    });
}

#[test]
fn memory_of_the_communicator_is_a_slice_like_any_other() {
    /// Enough that large algorithms find the result where the other ranks reach it.
    const COUNT: usize = 8 << 20;
    /// More than what a communicator has for itself, so that it shows when that is gone.
    const LARGE: usize = 128 << 20;
    let Some(size) = size() else { return };
    world(size, PATIENT, &[], |rank| {
        let stream = stream(&rank);
        let used = || {
            rank.host.barrier(Deadline::after(PATIENT)).unwrap();
            let (free, total) = rank.memory.context().mem_get_info().unwrap();
            rank.host.barrier(Deadline::after(PATIENT)).unwrap();
            total - free
        };
        let before = used();
        // SAFETY: all ranks run this on the same parts, and free the slice before they close the communicator.
        let mut slice = unsafe { allocate_cuda::<f32>(rank.comm.clone(), 2 * COUNT, &stream) }.unwrap();
        assert!(used() >= before + 8 * COUNT);
        assert!(stream.clone_dtoh(&slice).unwrap().iter().all(|&x| x == 0.0));

        let own: Vec<f32> = (0..COUNT).map(|i| (i % 1000 + rank.rank) as f32).collect();
        let expected = |i: usize| (size * (i % 1000) + size * (size - 1) / 2) as f32;
        let right = |found: Vec<f32>| found.iter().enumerate().all(|(i, &x)| x == expected(i));
        let (mut first, mut second) = slice.split_at_mut(COUNT).unwrap();
        stream.memcpy_htod(&own, &mut first).unwrap();
        rank.comm.all_reduce_cuda(&first, &mut second, ReduceOp::Sum, &stream).unwrap();
        assert!(right(stream.clone_dtoh(&slice.slice(COUNT..)).unwrap()));
        // On another stream, which cudarc makes wait for the first.
        let other = self::stream(&rank);
        rank.comm.all_reduce_cuda_in_place(&mut slice.slice_mut(..COUNT), ReduceOp::Sum, &other).unwrap();
        assert!(right(other.clone_dtoh(&slice.slice(..COUNT)).unwrap()));
        assert!(slice.split_at_mut(2 * COUNT + 1).is_none());
        slice.free().unwrap();
        assert!(used() < before + 4 * COUNT, "the memory has not been given back");

        // What is dropped stays the communicator's, and the communicator lives as long as its slices.
        // SAFETY: as above; this one goes before the communicator is closed.
        let slice = unsafe { allocate_cuda::<f32>(rank.comm.clone(), LARGE, &stream) }.unwrap();
        let comm = slice.comm().clone();
        drop(rank.comm);
        stream.synchronize().unwrap();
        drop(slice);
        comm.close().unwrap();
        assert!(used() < before, "a dropped slice's memory outlives the communicator");
    });
}

#[test]
fn what_does_not_fit_is_refused() {
    let Some(size) = size() else { return };
    world(size, PATIENT, &[], |rank| {
        let stream = stream(&rank);
        let elsewhere = comm_kernels::CudaMemory::new((rank.rank + 1) % size).unwrap();
        let elsewhere = elsewhere.context().new_stream().unwrap();
        let invalid = |result: Result<(), CommError>| {
            assert!(matches!(result, Err(CommError::InvalidArgument { .. })), "{result:?}");
        };
        let (mut a, mut b) = (stream.alloc_zeros::<f32>(8).unwrap(), stream.alloc_zeros::<f32>(7).unwrap());
        let mut far = elsewhere.alloc_zeros::<f32>(8).unwrap();
        let comm = &rank.comm;
        invalid(comm.all_reduce_quantized_cuda(&a, &mut b, &stream));
        invalid(comm.all_reduce_quantized_cuda(&a, &mut far, &stream));
        invalid(comm.all_reduce_quantized_cuda_in_place(&mut a, &elsewhere));
        invalid(comm.all_gather_2d_cuda(&b, &mut a, BlockShape::columns(size, 2, 4), &stream));
        // SAFETY: there is no slice.
        let none = unsafe { allocate_cuda::<f32>(comm.clone(), 8, &elsewhere) };
        invalid(none.map(drop));
        // SAFETY: as above.
        let none = unsafe { allocate_cuda::<f32>(comm.clone(), usize::MAX / 2, &stream) };
        invalid(none.map(drop));
        let mut data = stream.clone_htod(&[1_f32; 8]).unwrap();
        comm.all_reduce_cuda_in_place(&mut data, ReduceOp::Sum, &stream).unwrap();
        assert_eq!(stream.clone_dtoh(&data).unwrap(), [size as f32; 8]);
        comm.close().unwrap();
    });
}
