//! Operations captured into CUDA graphs and replayed, and zero-copy buffers.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use comm_core::{DType, DeviceMemory as _, P2pOp, ReduceOp};
use common::{PATIENT, as_processes, ranks, world, world_size};

#[test]
fn captured_operations_give_new_results_at_every_replay() {
    let Some(size) = world_size() else { return };
    for first_round in ["0", "4294967270"] {
        world(size, PATIENT, &[("p2p.first_round", first_round)], |rank| {
            let counts = [1_usize, 1000, 50_000, 1_000_003];
            let most = *counts.iter().max().unwrap();
            let (send, recv) = (rank.buffer(most, 0.0), rank.buffer(most, 0.0));
            let (all, one) = (rank.buffer(1000 * size, 0.0), rank.buffer(1000, 0.0));
            let ring = rank.buffer(1000, 0.0);
            let (f32s, stream) = (DType::F32, rank.stream());
            for count in counts {
                let mut graph = rank.capture(|| {
                    rank.sum(send, recv, count)?;
                    let (next, previous) = ((rank.rank + 1) % size, (rank.rank + size - 1) % size);
                    let ops = [
                        P2pOp::Send { addr: one, count: 1000, dtype: f32s, peer: next },
                        P2pOp::Recv { addr: ring, count: 1000, dtype: f32s, peer: previous },
                    ];
                    // SAFETY: the buffers are large enough and outlive the graph.
                    unsafe {
                        rank.comm.all_gather(one, all, 1000, f32s, stream)?;
                        rank.comm.all_reduce(recv, recv, count, f32s, ReduceOp::Max, stream)?;
                        rank.comm.group(&ops, stream)
                    }
                });
                for replay in 0..5 {
                    rank.put(send, &vec![(rank.rank + 1 + replay) as f32; count]);
                    rank.put(one, &vec![(rank.rank * 10 + replay) as f32; 1000]);
                    // SAFETY: as above; the stream is the memory's own.
                    unsafe { graph.launch(stream).unwrap() };
                    let expected = rank.triangle() + (replay * size) as f32;
                    assert_eq!(rank.get(recv, count), vec![expected; count]);
                    let gathered: Vec<f32> =
                        (0..size).flat_map(|r| vec![(r * 10 + replay) as f32; 1000]).collect();
                    assert_eq!(rank.get(all, 1000 * size), gathered);
                    let previous = (rank.rank + size - 1) % size;
                    assert_eq!(rank.get(ring, 1000), vec![(previous * 10 + replay) as f32; 1000]);
                }
                drop(graph);
            }
            rank.comm.close().unwrap();
        });
    }
}

#[test]
fn large_results_in_allocated_and_registered_buffers_skip_the_staging() {
    let Some(size) = world_size() else { return };
    world(size, PATIENT, &[("p2p.symmetric_operands", "on")], |rank| {
        let count = 4 << 20;
        let send = rank.buffer(count, (rank.rank + 1) as f32);
        let allocated = rank.comm.allocate(count * 4 + 64).unwrap().offset(64);
        let plain = rank.buffer(count, 0.0);
        // SAFETY: the buffer is freed with the memory, after the registration.
        let registration = unsafe { rank.comm.register(plain, count * 4).unwrap() };
        for recv in [allocated, plain] {
            rank.sum(send, recv, count).unwrap();
            assert_eq!(rank.get(recv, count), vec![rank.triangle(); count]);
            rank.put(recv, &vec![-1.0; count]);
            let part = count / size / 4 * 4;
            let stream = rank.stream();
            // SAFETY: the buffers are large enough.
            unsafe { rank.comm.all_gather(send, recv, part, DType::F32, stream).unwrap() };
            let expected: Vec<f32> = (0..size).flat_map(|r| vec![(r + 1) as f32; part]).collect();
            assert_eq!(rank.get(recv, part * size), expected);
            rank.put(recv, &vec![-1.0; count]);
            // SAFETY: as above.
            unsafe { rank.comm.broadcast(send, recv, count, DType::F32, 1, stream).unwrap() };
            assert_eq!(rank.get(recv, count), vec![2.0; count]);
        }
        let used: Vec<_> =
            rank.comm.usage().into_iter().map(|u| (u.op.name(), u.algorithm.into_owned(), u.calls)).collect();
        // Which of an operation's the table names for this size depends on the number of ranks.
        for (expected, by) in
            [("all_reduce", &["cells", "steps"][..]), ("all_gather", &["direct", "spread", "steps", "lines"])]
        {
            let stored = |(op, algorithm, calls): &(_, String, _)| {
                *op == expected && by.contains(&&**algorithm) && *calls == 2
            };
            assert!(used.iter().any(stored), "{expected} by {by:?} in {used:?}");
        }
        rank.memory.synchronize().unwrap();
        rank.host.barrier(comm_core::Deadline::after(PATIENT)).unwrap();
        // SAFETY: the calls have completed on all ranks.
        unsafe {
            rank.comm.deregister(&registration).unwrap();
            assert!(rank.comm.deregister(&registration).is_err());
            rank.comm.free(allocated.offset(64_u64.wrapping_neg())).unwrap();
        }
        rank.comm.close().unwrap();
    });
}

#[test]
fn without_the_promise_registered_operands_may_lie_anywhere() {
    let Some(size) = world_size() else { return };
    world(size, PATIENT, &[], |rank| {
        let count = 4 << 20;
        let send = rank.buffer(count, (rank.rank + 1) as f32);
        let plain = rank.buffer(count + 64, 0.0);
        // SAFETY: the buffer is freed with the memory, after the registration.
        let registration = unsafe { rank.comm.register(plain, (count + 64) * 4).unwrap() };
        let recv = plain.offset(rank.rank as u64 * 16);
        rank.sum(send, recv, count).unwrap();
        assert_eq!(rank.get(recv, count), vec![rank.triangle(); count]);
        let part = count / size;
        // SAFETY: the buffers are large enough.
        unsafe { rank.comm.all_gather(send, recv, part, DType::F32, rank.stream()).unwrap() };
        let expected: Vec<f32> = (0..size).flat_map(|r| vec![(r + 1) as f32; part]).collect();
        assert_eq!(rank.get(recv, part * size), expected);
        rank.memory.synchronize().unwrap();
        rank.host.barrier(comm_core::Deadline::after(PATIENT)).unwrap();
        // SAFETY: the calls have completed on all ranks.
        unsafe { rank.comm.deregister(&registration).unwrap() };
        rank.comm.close().unwrap();
    });
}

#[test]
fn many_calls_of_changing_size_back_to_back() {
    let Some(size) = world_size() else { return };
    world(size, PATIENT, &[], |rank| {
        let most = 200_000;
        let (send, recv) = (rank.buffer(most, (rank.rank + 1) as f32), rank.buffer(most, 0.0));
        let mut count = 1;
        for turn in 0..3000_usize {
            count = (count * 7919 + turn) % most + 1;
            rank.sum(send, recv, count).unwrap();
            if turn % 500 == 499 {
                assert_eq!(rank.get(recv, count), vec![rank.triangle(); count], "turn {turn}");
            }
        }
        rank.comm.close().unwrap();
    });
}

#[test]
fn the_backend_says_how_its_gpus_are_connected_and_why_it_stages() {
    use comm_core::{BackendFactory as _, CreateContext, HostCommExt as _, MemoryKind};
    let Some(size) = world_size() else { return };
    ranks(size, |host| {
        let context = CreateContext {
            host: host.clone(),
            memory: MemoryKind::Cuda { ordinal: common::ordinal(host.rank()) },
            timeout: PATIENT,
            checked: false,
            options: [("p2p.symmetric_operands".to_owned(), "on".to_owned())].into(),
        };
        let factory = comm_p2p::P2pFactory;
        let own = factory.probe(&context).unwrap();
        let start = std::time::Instant::now();
        let comm = factory.connect(&context, &host.all_gather(&own).unwrap()).unwrap();
        println!("rank {}: {} in {:?}", host.rank(), comm.topology(), start.elapsed());
        let addr = comm_core::DeviceComm::allocate(&comm, 4096).unwrap();
        // SAFETY: the memory is freed after the registration; it cannot be exported, which is what is tried.
        unsafe {
            let registration = comm_core::DeviceComm::register(&comm, addr, 4096).unwrap();
            let reason = comm.staging_reason(&registration).unwrap().unwrap();
            assert!(reason.contains("allocate it with the communicator"), "{reason}");
            comm_core::DeviceComm::deregister(&comm, &registration).unwrap();
            assert!(comm.staging_reason(&registration).is_err());
        }
        comm_core::DeviceComm::close(&comm).unwrap();
    });
}

/// Then the communicator's memory crosses by descriptor, and registered memory by legacy IPC.
#[test]
fn zero_copy_buffers_and_graphs_between_processes() {
    as_processes("zero_copy_buffers_and_graphs_between_processes", || {
        captured_operations_give_new_results_at_every_replay();
        large_results_in_allocated_and_registered_buffers_skip_the_staging();
        without_the_promise_registered_operands_may_lie_anywhere();
        the_backend_says_how_its_gpus_are_connected_and_why_it_stages();
    });
}
