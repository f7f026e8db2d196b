//! The typed calls on cudarc's slices, without a GPU: over a driver that keeps a device's memory on the host
//! (`fake_driver/`) and a backend that takes it for a device's.

#![cfg(feature = "cudarc")]
#![allow(clippy::unwrap_used, reason = "these are tests, though not all of it is test functions")]

mod fake_driver;
mod support;

use std::sync::Arc;
use std::time::Duration;

use comm_core::{
    BlockShape, CommError, CommSlice, CudaNormQuantization, CudaQuantScale, CudaSliceExt, CudaTransfer,
    DeviceAddr, DeviceComm, F8E4M3, MemoryKind, NormScale, ReduceOp, Result, TwoGroupRows, allocate_cuda,
    run_threads,
};
use cudarc::driver::{CudaContext, CudaSlice, CudaStream, DevicePtr, DeviceRepr};
use support::GatherBackend;

#[test]
fn over_a_driver_of_host_memory() {
    fake_driver::run(
        "over_a_driver_of_host_memory",
        &[
            ("collectives", collectives),
            ("sums by way of fp8 and blocks", sums_by_way_of_fp8_and_blocks),
            ("fused norms", fused_norms),
            ("two-group norms", two_group_norms),
            ("another device", slices_and_streams_of_another_device_are_refused),
            ("the communicator's memory", memory_of_the_communicator_is_a_slice_like_any_other),
            ("failed frees", a_free_that_fails_gives_nothing_back),
            ("dropped slices", a_dropped_slice_leaves_its_memory_to_the_communicator_which_it_keeps),
        ],
    );
}

/// A rank on device 0, which all ranks share.
struct Rank {
    comm: Arc<GatherBackend>,
    stream: Arc<CudaStream>,
}

fn on_ranks(size: usize, test: impl Fn(Rank) + Sync) {
    let timeout = Duration::from_secs(10);
    run_threads(size, timeout, |host| {
        let context = CudaContext::new(0).unwrap();
        let stream = context.new_stream().unwrap();
        let comm = GatherBackend::new("gather", host, timeout);
        let comm = Arc::new(comm.calling_its_memory(MemoryKind::Cuda { ordinal: 0 }));
        test(Rank { comm, stream });
        // What cudarc could not say where it happened.
        context.check_err().unwrap();
    })
    .unwrap();
}

impl Rank {
    fn up<T: DeviceRepr>(&self, values: &[T]) -> CudaSlice<T> {
        self.stream.clone_htod(values).unwrap()
    }

    fn down<T: DeviceRepr>(&self, slice: &impl DevicePtr<T>) -> Vec<T> {
        self.stream.clone_dtoh(slice).unwrap()
    }
}

fn invalid(result: Result<()>) {
    assert!(matches!(result, Err(CommError::InvalidArgument { .. })), "{result:?}");
}

fn collectives() {
    on_ranks(2, |rank| {
        let (comm, stream) = (&rank.comm, &rank.stream);
        let me = comm.rank() as i32;
        let (send, mut pair, mut four) = (rank.up(&[me, 10]), rank.up(&[0; 2]), rank.up(&[0; 4]));
        comm.all_reduce_cuda(&send, &mut pair, ReduceOp::Sum, stream).unwrap();
        assert_eq!(rank.down(&pair), [1, 20]);
        comm.all_reduce_cuda_in_place(&mut pair, ReduceOp::Sum, stream).unwrap();
        assert_eq!(rank.down(&pair), [2, 40]);
        comm.all_gather_cuda(&send, &mut four, stream).unwrap();
        assert_eq!(rank.down(&four), [0, 10, 1, 10]);
        comm.reduce_scatter_cuda(&four, &mut pair, ReduceOp::Sum, stream).unwrap();
        assert_eq!(rank.down(&pair), [[0, 20], [2, 20]][comm.rank()]);
        comm.reduce_scatter_cuda_in_place(&mut four, ReduceOp::Sum, stream).unwrap();
        assert_eq!(rank.down(&four.slice(2 * comm.rank()..).slice(..2)), [[0, 20], [2, 20]][comm.rank()]);
        comm.all_gather_cuda_in_place(&mut four, stream).unwrap();
        assert_eq!(rank.down(&four), [0, 20, 2, 20]);
        comm.all_to_all_cuda(&send, &mut pair, stream).unwrap();
        assert_eq!(rank.down(&pair), [[0, 1], [10, 10]][comm.rank()]);
        comm.broadcast_cuda_in_place(&mut pair, 1, stream).unwrap();
        comm.reduce_cuda_in_place(&mut pair, ReduceOp::Sum, 0, stream).unwrap();
        if comm.rank() == 0 {
            assert_eq!(rank.down(&pair), [20, 20]);
        }

        let mut uneven = rank.up(&[-1; 3]);
        let own = rank.up(&vec![5 + me; 1 + comm.rank()]);
        comm.all_gather_v_cuda(&own, &mut uneven, &[1, 2], stream).unwrap();
        assert_eq!(rank.down(&uneven), [5, 6, 6]);
        comm.all_gather_v_cuda_in_place(&mut uneven, &[1, 2], stream).unwrap();
        let mut parts = rank.up(&vec![0; 1 + comm.rank()]);
        comm.reduce_scatter_v_cuda(&uneven, &mut parts, &[1, 2], ReduceOp::Max, stream).unwrap();
        assert_eq!(rank.down(&parts), [&[5][..], &[6, 6]][comm.rank()]);
        let peer = 1 - comm.rank();
        let mut transfers = [CudaTransfer::Send(&send, peer), CudaTransfer::Recv(&mut pair, peer)];
        comm.group_cuda(&mut transfers, stream).unwrap();
        assert_eq!(rank.down(&pair), [1 - me, 10]);
        comm.barrier_cuda(stream).unwrap();
    });
}

fn sums_by_way_of_fp8_and_blocks() {
    on_ranks(2, |rank| {
        let (comm, stream) = (&rank.comm, &rank.stream);
        let send = rank.up(&[1_f32, -2.0, 0.5]);
        let (mut recv, mut data) = (rank.up(&[0_f32; 3]), rank.up(&[1_f32, -2.0, 0.5]));
        comm.all_reduce_quantized_cuda(&send, &mut recv, stream).unwrap();
        comm.all_reduce_quantized_cuda_in_place(&mut data, stream).unwrap();
        assert_eq!(rank.down(&data), [2.0, -4.0, 1.0]);
        assert_eq!(rank.down(&recv), [2.0, -4.0, 1.0]);

        let me = comm.rank() as u32 * 100;
        let own = rank.up(&[me, me + 1, me + 2, me + 3]);
        let mut all = rank.up(&[0; 8]);
        let shape = BlockShape::columns(2, 2, 2);
        comm.all_gather_2d_cuda(&own, &mut all, shape, stream).unwrap();
        assert_eq!(rank.down(&all), [0, 1, 100, 101, 2, 3, 102, 103]);
        let shape = BlockShape { send_pitch: 4, ..shape };
        comm.all_gather_2d_cuda_in_place(&mut all, shape, stream).unwrap();
        assert_eq!(rank.down(&all), [0, 1, 100, 101, 2, 3, 102, 103]);

        invalid(comm.all_reduce_quantized_cuda(&send, &mut recv.slice_mut(1..), stream));
        invalid(comm.all_gather_2d_cuda(&own, &mut all.slice_mut(1..), BlockShape::columns(2, 2, 2), stream));
        invalid(comm.all_gather_2d_cuda_in_place(&mut all, BlockShape::columns(2, 2, 2), stream));
        // These were refused before they came to the communicator.
    });
}

/// The sums with the residual are 3 and -3, then 5 and 5, and the weights 2 and 4: the results 2, -4, 2, 4.
const INPUT: [f32; 4] = [1.0, -2.0, 2.0, 2.0];
const RESULT: [f32; 4] = [2.0, -4.0, 2.0, 4.0];
const SCALE: NormScale = NormScale { eps: 0.0, weight_offset: 0.0 };

fn fp8(bits: &[u8]) -> Vec<f32> {
    bits.iter().map(|&bits| F8E4M3::from_bits(bits).to_f32()).collect()
}

fn fused_norms() {
    on_ranks(2, |rank| {
        let (comm, stream) = (&rank.comm, &rank.stream);
        let weight = rank.up(&[2_f32, 4.0]);
        let parameters = (&weight as &dyn DevicePtr<f32>, None);
        let ones = || rank.up(&[1_f32; 4]);
        let (input, mut residual, mut output) = (rank.up(&INPUT), ones(), ones());
        comm.all_reduce_rmsnorm_cuda(&input, &mut residual, parameters, &mut output, SCALE, stream).unwrap();
        assert_eq!((rank.down(&residual), rank.down(&output)), (vec![3.0, -3.0, 5.0, 5.0], RESULT.to_vec()));
        let (mut data, mut residual) = (rank.up(&INPUT), ones());
        comm.all_reduce_rmsnorm_cuda_in_place(&mut data, &mut residual, parameters, SCALE, stream).unwrap();
        assert_eq!(rank.down(&data), RESULT);

        let (mut bits, mut scales) = (rank.up(&[0_u8; 4]), rank.up(&[0_f32; 2]));
        let (mut residual, mut output) = (ones(), ones());
        let quantized = CudaNormQuantization {
            output: &mut bits,
            scale: CudaQuantScale::PerToken(&mut scales),
            keep_unquantized: true,
        };
        comm.all_reduce_rmsnorm_quantized_cuda(
            &input,
            &mut residual,
            parameters,
            &mut output,
            quantized,
            SCALE,
            stream,
        )
        .unwrap();
        assert_eq!((rank.down(&output), rank.down(&scales)), (RESULT.to_vec(), vec![4.0 / 448.0; 2]));
        assert_eq!(fp8(&rank.down(&bits)), [224.0, -448.0, 224.0, 448.0]);

        let (mut data, mut residual, half) = (rank.up(&INPUT), ones(), rank.up(&[0.5_f32]));
        let quantized = CudaNormQuantization {
            output: &mut bits,
            scale: CudaQuantScale::PerTensor(&half),
            keep_unquantized: false,
        };
        comm.all_reduce_rmsnorm_quantized_cuda_in_place(
            &mut data,
            &mut residual,
            parameters,
            quantized,
            SCALE,
            stream,
        )
        .unwrap();
        assert_eq!(fp8(&rank.down(&bits)), RESULT.map(|x| 2.0 * x));
        // Once a call, however many slices it has.

        let quantized = CudaNormQuantization {
            output: &mut bits,
            scale: CudaQuantScale::PerTensor(&scales),
            keep_unquantized: false,
        };
        invalid(comm.all_reduce_rmsnorm_quantized_cuda_in_place(
            &mut data,
            &mut residual,
            parameters,
            quantized,
            SCALE,
            stream,
        ));
    });
}

fn two_group_norms() {
    on_ranks(2, |rank| {
        let (comm, stream) = (&rank.comm, &rank.stream);
        // The whole world is the other group too; the ranks make the calls of both in one order.
        let gather = comm.clone();
        let rows = TwoGroupRows {
            reduce_first_row: 0,
            reduce_tokens: &[0, 2],
            gather_first_row: 0,
            gather_tokens: &[0, 2],
        };
        let weight = rank.up(&[2_f32, 4.0]);
        let parameters = (&weight as &dyn DevicePtr<f32>, None);
        let own = vec![1_f32; 4 * comm.rank()];
        let (mut states, mut residual) = (rank.up(&INPUT), rank.up(&own));
        comm.all_reduce_rmsnorm_two_group_cuda_in_place(
            &*gather,
            &mut states,
            &mut residual,
            parameters,
            rows,
            SCALE,
            stream,
        )
        .unwrap();
        assert_eq!(rank.down(&states), RESULT);
        let (mut states, mut residual) = (rank.up(&INPUT), rank.up(&own));
        let (mut bits, mut scales) = (rank.up(&[0_u8; 4]), rank.up(&[0_f32; 2]));
        let quantized = CudaNormQuantization {
            output: &mut bits,
            scale: CudaQuantScale::PerToken(&mut scales),
            keep_unquantized: true,
        };
        comm.all_reduce_rmsnorm_two_group_quantized_cuda_in_place(
            &*gather,
            (&mut states, &mut residual),
            parameters,
            quantized,
            rows,
            SCALE,
            stream,
        )
        .unwrap();
        assert_eq!(rank.down(&states), RESULT);
        assert_eq!(fp8(&rank.down(&bits)), [224.0, -448.0, 224.0, 448.0]);
    });
}

fn slices_and_streams_of_another_device_are_refused() {
    on_ranks(1, |rank| {
        let (comm, stream) = (&rank.comm, &rank.stream);
        let elsewhere = CudaContext::new(1).unwrap().new_stream().unwrap();
        let mut far = elsewhere.clone_htod(&[1_f32; 4]).unwrap();
        let mut near = rank.up(&[1_f32; 4]);
        invalid(comm.all_reduce_quantized_cuda(&near, &mut far, stream));
        invalid(comm.all_reduce_quantized_cuda_in_place(&mut far, stream));
        invalid(comm.all_reduce_quantized_cuda_in_place(&mut near, &elsewhere));
        invalid(comm.all_gather_2d_cuda(&far, &mut near, BlockShape::columns(1, 1, 4), stream));
        invalid(comm.barrier_cuda(&elsewhere));
        let (weight, scale) = (rank.up(&[1_f32; 4]), rank.up(&[1_f32]));
        let far_scale = elsewhere.clone_htod(&[1_f32]).unwrap();
        let mut far_bits = elsewhere.clone_htod(&[0_u8; 4]).unwrap();
        let mut bits = rank.up(&[0_u8; 4]);
        for (output, scale) in [(&mut far_bits, &scale), (&mut bits, &far_scale)] {
            let (mut data, mut residual) = (rank.up(&[1_f32; 4]), rank.up(&[1_f32; 4]));
            let scale = CudaQuantScale::PerTensor(scale);
            let quantized = CudaNormQuantization { output, scale, keep_unquantized: true };
            let parameters = (&weight as &dyn DevicePtr<f32>, None);
            invalid(comm.all_reduce_rmsnorm_quantized_cuda_in_place(
                &mut data,
                &mut residual,
                parameters,
                quantized,
                SCALE,
                stream,
            ));
            assert_eq!(rank.down(&data), [1.0; 4]);
        }
        // SAFETY: there is no slice.
        invalid(unsafe { allocate_cuda::<f32>(comm.clone(), 4, &elsewhere) }.map(drop));
        // SAFETY: as above.
        invalid(unsafe { allocate_cuda::<f32>(comm.clone(), usize::MAX / 2, stream) }.map(drop));
    });
}

/// A slice of the communicator's memory, and where it lies.
fn allocate(rank: &Rank, count: usize) -> (CommSlice<f32>, DeviceAddr) {
    // SAFETY: the ranks use it alike, and none closes its communicator.
    let slice = unsafe { allocate_cuda::<f32>(rank.comm.clone(), count, &rank.stream) }.unwrap();
    let addr = DeviceAddr(slice.device_ptr(&rank.stream).0);
    (slice, addr)
}

/// Whether the communicator still has the memory; it has not afterwards.
fn has(comm: &GatherBackend, addr: DeviceAddr) -> bool {
    // SAFETY: nothing uses it.
    unsafe { comm.free(addr) }.is_ok()
}

fn memory_of_the_communicator_is_a_slice_like_any_other() {
    on_ranks(2, |rank| {
        let (mut slice, addr) = allocate(&rank, 6);
        assert_eq!((slice.len(), rank.down(&slice)), (6, vec![0.0; 6]));
        let (mut low, mut high) = slice.split_at_mut(3).unwrap();
        rank.stream.memcpy_htod(&[1_f32, 2.0, 3.0], &mut low).unwrap();
        rank.comm.all_reduce_cuda(&low, &mut high, ReduceOp::Sum, &rank.stream).unwrap();
        assert_eq!(rank.down(&slice), [1.0, 2.0, 3.0, 2.0, 4.0, 6.0]);
        rank.comm.all_reduce_cuda_in_place(&mut slice.slice_mut(1..3), ReduceOp::Sum, &rank.stream).unwrap();
        rank.comm.all_reduce_cuda_in_place(&mut slice, ReduceOp::Sum, &rank.stream).unwrap();
        assert_eq!(rank.down(&slice.slice(..4)), [2.0, 8.0, 12.0, 4.0]);
        assert!(slice.split_at_mut(7).is_none());
        slice.free().unwrap();
        assert!(!has(&rank.comm, addr), "free gives the memory back");
        let (empty, _) = allocate(&rank, 0);
        empty.free().unwrap();
    });
}

fn a_dropped_slice_leaves_its_memory_to_the_communicator_which_it_keeps() {
    on_ranks(2, |rank| {
        let (slice, addr) = allocate(&rank, 6);
        let comm = slice.comm().clone();
        assert_eq!(Arc::strong_count(&rank.comm), 3);
        drop(comm);
        drop(slice);
        assert_eq!(Arc::strong_count(&rank.comm), 1);
        assert!(has(&rank.comm, addr), "a drop gives nothing back");
    });
}

/// Other ranks may still be at work in memory that the ranks did not meet for.
fn a_free_that_fails_gives_nothing_back() {
    on_ranks(2, |rank| {
        let (slice, addr) = allocate(&rank, 6);
        // As where a failure has ended the barrier.
        let failure = CommError::Closed { comm: "another rank's".into() };
        rank.comm.fail_late(failure.clone());
        assert_eq!(slice.free().unwrap_err(), failure);
        assert!(has(&rank.comm, addr));
    });
    on_ranks(2, |rank| {
        let (slice, addr) = allocate(&rank, 6);
        rank.comm.abort();
        assert!(slice.free().unwrap_err().is_fatal());
        assert!(has(&rank.comm, addr));
    });
}
