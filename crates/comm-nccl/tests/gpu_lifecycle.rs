//! Graphs, groups and registered buffers.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use comm_core::{CommError, DType, DeviceAddr, DeviceMemory, ReduceOp};
use common::{PATIENT, world, world_size};

#[test]
fn captured_calls_replay() {
    let Some(size) = world_size() else { return };
    world(size, PATIENT, false, |rank| {
        // Once outside, so that connections exist before the capture.
        rank.try_sum().unwrap();
        let n = 1000;
        let input = rank.buffer(&vec![1.0_f32; n]);
        let sums = rank.buffer(&vec![0.0_f32; n]);
        let counts: Vec<usize> = (0..size).map(|r| r + 1).collect();
        let own = rank.buffer(&vec![rank.rank as f32; rank.rank + 1]);
        let gathered = rank.buffer(&vec![-1.0_f32; counts.iter().sum()]);
        let stream = rank.stream();
        let mut graph = rank
            .memory
            .capture(|| {
                for _ in 0..3 {
                    // SAFETY: the buffers hold what the calls name and outlive the graph's replays.
                    unsafe {
                        rank.comm.all_reduce(input.addr, sums.addr, n, DType::F32, ReduceOp::Sum, stream)?;
                        rank.comm.all_reduce(sums.addr, sums.addr, n, DType::F32, ReduceOp::Max, stream)?;
                        rank.comm.all_gather_v(own.addr, gathered.addr, &counts, DType::F32, stream)?;
                        rank.comm.barrier(stream)?;
                    }
                }
                Ok(())
            })
            .unwrap();
        for step in 1..=5 {
            let values = vec![step as f32; n];
            // SAFETY: the buffer holds as many elements; the graph's operands are alive.
            unsafe {
                rank.memory.upload(input.addr, common::bytes_of(&values)).unwrap();
                graph.launch(stream).unwrap();
            }
            assert_eq!(sums.read(), vec![(step * size) as f32; n]);
        }
        let expected: Vec<f32> = (0..size).flat_map(|r| vec![r as f32; r + 1]).collect();
        assert_eq!(gathered.read(), expected);
        drop(graph);
        rank.comm.close().unwrap();
    });
}

#[test]
fn groups_run_on_their_own_and_order_by_key() {
    let Some(size) = world_size() else { return };
    world(size, PATIENT, false, |rank| {
        let color = (rank.rank % 2) as u32 * (u32::MAX / 2 + 7);
        let key = -i32::try_from(rank.rank).unwrap();
        let group = rank.comm.split(Some(color), key).unwrap().unwrap();
        let members: Vec<usize> = (0..size).rev().filter(|r| r % 2 == rank.rank % 2).collect();
        assert_eq!((group.size(), members[group.rank()]), (members.len(), rank.rank));
        assert_ne!(group.info().name, rank.comm.info().name);
        let own = rank.buffer(&[rank.rank as f32]);
        let all = rank.buffer(&vec![-1.0_f32; group.size()]);
        // The groups issue different numbers of calls.
        for _ in 0..=color % 3 {
            // SAFETY: the buffers hold what the call names and live until they are read, which waits.
            unsafe { group.all_gather(own.addr, all.addr, 1, DType::F32, rank.stream()).unwrap() };
        }
        assert_eq!(all.read(), members.iter().map(|&r| r as f32).collect::<Vec<_>>());
        let alone = rank.comm.split((rank.rank == 0).then_some(5), 0).unwrap();
        assert_eq!(alone.is_some(), rank.rank == 0);
        rank.try_sum().unwrap();
        group.close().unwrap();
        rank.try_sum().unwrap();
        if let Some(alone) = alone {
            alone.close().unwrap();
        }
        rank.comm.close().unwrap();
    });
}

#[test]
fn registered_and_allocated_buffers_work_and_go_stale() {
    let Some(size) = world_size() else { return };
    world(size, PATIENT, false, |rank| {
        let n = 1 << 20;
        let at = rank.comm.allocate(n * 4).unwrap();
        assert!(at.is_aligned_to(256));
        let ones = vec![1.0_f32; n];
        let mut back = vec![0_u8; n * 4];
        // SAFETY: the allocation holds `n` elements; the download waits.
        unsafe {
            rank.memory.upload(at, common::bytes_of(&ones)).unwrap();
            rank.comm.all_reduce(at, at, n, DType::F32, ReduceOp::Sum, rank.stream()).unwrap();
            rank.memory.download(&mut back, at).unwrap();
        }
        assert!(back.chunks(4).all(|b| b == (size as f32).to_le_bytes()));
        // SAFETY: the work has been waited for on every rank whose data it needed; the second call is refused.
        unsafe {
            rank.comm.barrier(rank.stream()).unwrap();
            rank.memory.synchronize().unwrap();
            rank.comm.free(at).unwrap();
            assert!(matches!(rank.comm.free(at), Err(CommError::InvalidArgument { .. })));
        }
        let buffer = rank.buffer(&[1.0_f32; 4096]);
        // SAFETY: the buffer outlives the registration, and no work uses it when it ends.
        unsafe {
            let first = rank.comm.register(buffer.addr, 4096 * 4).unwrap();
            rank.comm
                .all_reduce(buffer.addr, buffer.addr, 4096, DType::F32, ReduceOp::Sum, rank.stream())
                .unwrap();
            assert_eq!(buffer.read(), [size as f32; 4096]);
            rank.comm.barrier(rank.stream()).unwrap();
            rank.memory.synchronize().unwrap();
            rank.comm.deregister(&first).unwrap();
            let second = rank.comm.register(buffer.addr, 4096 * 4).unwrap();
            let stale = rank.comm.deregister(&first).unwrap_err();
            assert!(matches!(stale, CommError::StaleHandle { .. }), "{stale}");
            rank.comm.deregister(&second).unwrap();
            let uneven = rank.comm.register(buffer.addr, 64 + rank.rank.min(1)).unwrap_err();
            assert!(matches!(uneven, CommError::Mismatch { .. }), "{uneven}");
        }
        rank.try_sum().unwrap();
        rank.comm.close().unwrap();
    });
}

#[test]
fn what_one_rank_cannot_have_is_refused_on_all_and_no_more() {
    let Some(size) = world_size() else { return };
    world(size, PATIENT, false, |rank| {
        let buffer = rank.buffer(&[1.0_f32; 64]);
        for _ in 0..2 {
            let refused = rank.comm.allocate(1 << 50).unwrap_err();
            assert!(matches!(refused, CommError::InvalidArgument { .. }), "{refused}");
            let addr = if rank.rank == 1 { DeviceAddr::NULL } else { buffer.addr };
            // SAFETY: the buffer lives on; the other ranks take their registrations back.
            let refused = unsafe { rank.comm.register(addr, 256) }.unwrap_err();
            assert!(matches!(refused, CommError::InvalidArgument { .. }), "{refused}");
            assert!(refused.to_string().contains("rank 1"), "{refused}");
            rank.comm.poll().unwrap();
            rank.try_sum().unwrap();
        }
        let addr = rank.comm.allocate(1 << 20).unwrap();
        // SAFETY: no work has used it, on any rank.
        unsafe { rank.comm.free(addr).unwrap() };
        rank.comm.close().unwrap();
    });
}
