//! Calls of one communicator on several streams: none overtakes another, although nobody but the communicator orders them.
//! And what the end of a communicator does to streams that are not its own: nothing.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::ffi::c_void;
use std::sync::Arc;
use std::time::Duration;

use comm_core::{DType, Deadline, DeviceAddr, DeviceMemory as _, ReduceOp, StreamHandle};
use common::{PATIENT, Rank, connect, skipped_where_shared, world, world_size};
use cudarc::driver::{CudaStream, sys};

const COUNT: usize = 3000;
/// How long a stream is held up: longer than the other ranks need for both calls.
const HELD: Duration = Duration::from_millis(30);
const UNORDERED: [(&str, &str); 1] = [("p2p.test_unordered_streams", "on")];

/// As `world_size`; host functions of ranks that share a device run one after another, and so hold each other up.
fn ranks() -> Option<usize> {
    world_size().filter(|_| !skipped_where_shared("their streams cannot be held up apart"))
}

fn handle(stream: &CudaStream) -> StreamHandle {
    StreamHandle(stream.cu_stream() as u64)
}

/// Holds a stream up from here on, also in every replay of a graph.
fn hold_up(stream: StreamHandle) {
    unsafe extern "C" fn sleep(_: *mut c_void) {
        std::thread::sleep(HELD);
    }
    // SAFETY: the stream is live; the function needs no data, and calls nothing of CUDA.
    let code = unsafe { sys::cuLaunchHostFunc(stream.0 as sys::CUstream, Some(sleep), std::ptr::null_mut()) };
    assert_eq!(code, sys::CUresult::CUDA_SUCCESS);
}

fn sum_on(rank: &Rank, at: DeviceAddr, stream: StreamHandle) {
    // SAFETY: the buffer lives as long as the rank's memory, and the test waits for the streams before it reads.
    unsafe { rank.comm.all_reduce(at, at, COUNT, DType::F32, ReduceOp::Sum, stream) }.unwrap();
}

/// Two buffers whose sums tell which call met which.
fn operands(rank: &Rank) -> [DeviceAddr; 2] {
    let own = (rank.rank + 1) as f32;
    [rank.buffer(COUNT, own), rank.buffer(COUNT, 1000.0 * own)]
}

fn are_right(rank: &Rank, [first, second]: [DeviceAddr; 2]) -> bool {
    let sum = rank.triangle();
    rank.get(first, COUNT) == vec![sum; COUNT] && rank.get(second, COUNT) == vec![1000.0 * sum; COUNT]
}

/// The first call on one stream and the second on another; on even ranks the first stream is held up, on odd ones the second.
fn two_calls(rank: &Rank, streams: &[Arc<CudaStream>; 2]) -> bool {
    let operands = operands(rank);
    hold_up(handle(&streams[rank.rank % 2]));
    for (at, stream) in operands.into_iter().zip(streams) {
        sum_on(rank, at, handle(stream));
    }
    streams.iter().for_each(|stream| stream.synchronize().unwrap());
    are_right(rank, operands)
}

fn streams(rank: &Rank) -> [Arc<CudaStream>; 2] {
    [(); 2].map(|()| rank.memory.context().new_stream().unwrap())
}

#[test]
fn calls_on_two_streams_keep_their_order() {
    let Some(size) = ranks() else { return };
    for algorithm in ["packets", "lamport", "staged", "one_shot"] {
        world(size, PATIENT, &[("p2p.algorithm", algorithm)], |rank| {
            let streams = streams(&rank);
            for turn in 0..10 {
                assert!(two_calls(&rank, &streams), "{algorithm}, turn {turn}");
            }
            rank.comm.close().unwrap();
        });
    }
}

#[test]
fn without_the_order_calls_take_each_others_places() {
    let Some(size) = ranks() else { return };
    let right = world(size, PATIENT, &UNORDERED, |rank| {
        let right = two_calls(&rank, &streams(&rank));
        rank.comm.close().unwrap();
        right
    });
    assert!(right.contains(&false), "the test does not see what the order is for");
}

/// The same within a capture, where the order has to become an edge of the graph.
fn captured_calls(rank: &Rank, replays: usize) -> bool {
    let operands = operands(rank);
    let context = rank.memory.context();
    let other = context.new_stream().unwrap();
    let mut graph = rank
        .memory
        .capture(|| {
            // Both streams are in the capture from here on, and nothing orders them.
            let own = rank.stream().0 as sys::CUstream;
            let fork = context.new_event(None).unwrap();
            let join = context.new_event(None).unwrap();
            // SAFETY: streams and events are live.
            let code = unsafe {
                [
                    sys::cuEventRecord(fork.cu_event(), own),
                    sys::cuStreamWaitEvent(other.cu_stream(), fork.cu_event(), 0),
                ]
            };
            assert_eq!(code, [sys::CUresult::CUDA_SUCCESS; 2]);
            let streams = [rank.stream(), handle(&other)];
            hold_up(streams[rank.rank % 2]);
            for (at, stream) in operands.into_iter().zip(streams) {
                sum_on(rank, at, stream);
            }
            // SAFETY: as above.
            let code = unsafe {
                [
                    sys::cuEventRecord(join.cu_event(), other.cu_stream()),
                    sys::cuStreamWaitEvent(own, join.cu_event(), 0),
                ]
            };
            assert_eq!(code, [sys::CUresult::CUDA_SUCCESS; 2]);
            Ok(())
        })
        .unwrap();
    let mut right = true;
    for _ in 0..replays {
        let own = (rank.rank + 1) as f32;
        rank.put(operands[0], &vec![own; COUNT]);
        rank.put(operands[1], &vec![1000.0 * own; COUNT]);
        // SAFETY: the operands outlive the graph; the stream is the memory's own.
        unsafe { graph.launch(rank.stream()).unwrap() };
        right &= are_right(rank, operands);
    }
    right
}

#[test]
fn captured_calls_on_two_streams_keep_their_order() {
    let Some(size) = ranks() else { return };
    world(size, PATIENT, &[], |rank| {
        assert!(captured_calls(&rank, 5));
        // The capture's streams are as good as any afterwards.
        assert!(two_calls(&rank, &streams(&rank)));
        rank.comm.close().unwrap();
    });
    let right = world(size, PATIENT, &UNORDERED, |rank| {
        let right = captured_calls(&rank, 1);
        rank.comm.close().unwrap();
        right
    });
    assert!(right.contains(&false), "the test does not see what the order is for");
}

/// One handle names a stream of each thread's own.
#[test]
fn calls_on_two_threads_default_streams_keep_their_order() {
    let Some(size) = ranks() else { return };
    let turn = |rank: Rank| {
        let operands = operands(&rank);
        let per_thread = StreamHandle(2);
        for (call, at) in operands.into_iter().enumerate() {
            let rank = &rank;
            // A thread's own stream outlives it: what is on it runs on.
            std::thread::scope(|scope| {
                scope.spawn(move || {
                    rank.memory.context().bind_to_thread().unwrap();
                    if call == rank.rank % 2 {
                        hold_up(per_thread);
                    }
                    sum_on(rank, at, per_thread);
                });
            });
        }
        rank.memory.context().synchronize().unwrap();
        let right = are_right(&rank, operands);
        rank.comm.close().unwrap();
        right
    };
    assert!(world(size, PATIENT, &[], turn).into_iter().all(|right| right));
    assert!(
        world(size, PATIENT, &UNORDERED, turn).contains(&false),
        "the test does not see what the order is for"
    );
}

/// Streams need not outlive their calls, and a call may come beside a capture that has the last call's stream.
#[test]
fn the_last_calls_stream_may_be_gone_or_under_capture() {
    let Some(size) = ranks() else { return };
    world(size, PATIENT, &[], |rank| {
        for _ in 0..20 {
            let operands = operands(&rank);
            let streams = streams(&rank);
            hold_up(handle(&streams[0]));
            for (at, stream) in operands.into_iter().zip(streams) {
                sum_on(&rank, at, handle(&stream));
            }
            sum_on(&rank, operands[0], rank.stream());
            let expected = vec![rank.triangle() * rank.size as f32; COUNT];
            assert_eq!(rank.get(operands[0], COUNT), expected);
        }
        let operands = operands(&rank);
        let other = rank.memory.context().new_stream().unwrap();
        hold_up(rank.stream());
        sum_on(&rank, operands[0], rank.stream());
        let graph = rank.memory.capture(|| {
            sum_on(&rank, operands[1], handle(&other));
            Ok(())
        });
        drop(graph.unwrap());
        other.synchronize().unwrap();
        assert!(are_right(&rank, operands));
        rank.comm.close().unwrap();
    });
}

/// The thread that gives a communicator back must not ask for the whole device: that breaks every capture there.
#[test]
fn a_capture_survives_the_end_of_another_communicator() {
    let Some(size) = ranks() else { return };
    for closed in [false, true] {
        world(size, PATIENT, &[], |rank| {
            let operands = operands(&rank);
            let other = connect(rank.host.clone(), PATIENT, &[]).unwrap();
            let at = other.buffer(COUNT, 1.0);
            other.sum(at, at, COUNT).unwrap();
            let Rank { comm, memory, .. } = other;
            let mut graph = rank
                .memory
                .capture(|| {
                    if closed {
                        comm.close().unwrap();
                    }
                    drop(comm);
                    // Its thread has all the time it needs.
                    std::thread::sleep(Duration::from_millis(200));
                    operands.into_iter().for_each(|at| sum_on(&rank, at, rank.stream()));
                    Ok(())
                })
                .unwrap();
            // SAFETY: the operands outlive the graph; the stream is the memory's own.
            unsafe { graph.launch(rank.stream()).unwrap() };
            assert!(are_right(&rank, operands));
            drop((graph, memory));
            rank.comm.close().unwrap();
        });
    }
}

/// Memory is given back when the last graph is gone, and not before: a replay that is under way still uses it.
#[test]
fn a_communicator_outlives_its_handle_while_graphs_hold_its_calls() {
    let Some(size) = ranks() else { return };
    world(size, PATIENT, &[], |rank| {
        let operands = operands(&rank);
        let mut graph = rank
            .memory
            .capture(|| {
                operands.into_iter().for_each(|at| sum_on(&rank, at, rank.stream()));
                hold_up(rank.stream());
                operands.into_iter().for_each(|at| sum_on(&rank, at, rank.stream()));
                Ok(())
            })
            .unwrap();
        // SAFETY: the operands outlive the graph; the stream is the memory's own.
        unsafe { graph.launch(rank.stream()).unwrap() };
        drop(graph);
        // All ranks have launched, so that no rank's departure can end another's.
        rank.host.barrier(Deadline::after(PATIENT)).unwrap();
        let Rank { comm, memory, .. } = rank;
        drop(comm);
        let mut bytes = vec![0; COUNT * 4];
        // SAFETY: the buffer is that large; the download waits for the stream.
        unsafe { memory.download(&mut bytes, operands[0]).unwrap() };
        let sum = (size * (size + 1) / 2 * size) as f32;
        assert!(bytes.chunks_exact(4).all(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]) == sum));
    });
}
