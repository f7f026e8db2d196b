//! Ranks that die, stop, abort or differ: every survivor gets a typed error in time, and can start anew.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::sync::{Barrier, Mutex};
use std::time::{Duration, Instant};

use comm_core::{CommError, DType, DeviceMemory, ReduceOp, ThreadComm};
use common::{PATIENT, Rank, SHORT, connect, few, socket_world, world, world_size};

#[test]
fn a_rank_that_never_arrives_is_named_in_time() {
    let Some(size) = world_size() else { return };
    let done = Barrier::new(size);
    world(size, SHORT, false, |rank| never_arrives(rank, &done));
}

#[test]
fn a_rank_that_never_arrives_is_named_in_time_over_sockets() {
    let Some(size) = world_size().map(few) else { return };
    let done = Barrier::new(size);
    socket_world(size, SHORT, |rank| never_arrives(rank, &done));
}

fn never_arrives(rank: Rank, done: &Barrier) {
    rank.try_sum().unwrap();
    if rank.rank == 1 {
        done.wait();
        let error = rank.comm.poll().unwrap_err();
        assert!(matches!(error, CommError::PeerFailed { .. }), "{error}");
    } else {
        let start = Instant::now();
        let buffer = rank.buffer(&[1.0_f32; 8]);
        let (at, stream) = (buffer.addr, rank.stream());
        // SAFETY: the buffer holds 8 elements and lives until the stream has been waited for.
        unsafe { rank.comm.all_reduce(at, at, 8, DType::F32, ReduceOp::Sum, stream).unwrap() };
        let error = rank.await_failure(SHORT + Duration::from_secs(2));
        let waited = start.elapsed();
        assert!(matches!(&error, CommError::Timeout { missing, .. } if *missing == [1]), "{error}");
        assert!(error.to_string().contains("all_reduce"), "{error}");
        assert!(waited >= SHORT && waited < SHORT + Duration::from_millis(500), "took {waited:?}");
        // The kernel leaves its wait.
        let _ = rank.memory.synchronize();
        assert!(start.elapsed() < SHORT + SHORT, "the kernel stayed");
        done.wait();
    }
    drop(rank.comm);
}

#[test]
fn a_rank_that_dies_is_named_within_a_second_and_a_new_world_forms() {
    let Some(size) = world_size() else { return };
    let comms = ThreadComm::create(size, PATIENT).unwrap();
    let died = Mutex::new(None);
    let died = &died;
    std::thread::scope(|scope| {
        let threads: Vec<_> = comms
            .into_iter()
            .enumerate()
            .map(|(index, host)| {
                scope.spawn(move || {
                    let rank = connect(std::sync::Arc::new(host), PATIENT, false).unwrap();
                    rank.try_sum().unwrap();
                    if index == 0 {
                        *died.lock().unwrap() = Some(Instant::now());
                        std::panic::panic_any("this rank dies on purpose");
                    }
                    let buffer = rank.buffer(&[1.0_f32; 8]);
                    let (at, stream) = (buffer.addr, rank.stream());
                    // SAFETY: the buffer holds 8 elements and lives until the stream has been waited for.
                    let enqueued =
                        unsafe { rank.comm.all_reduce(at, at, 8, DType::F32, ReduceOp::Sum, stream) };
                    let error = enqueued.err().unwrap_or_else(|| rank.await_failure(Duration::from_secs(5)));
                    let noticed = Instant::now();
                    assert!(matches!(error, CommError::PeerDied { rank: 0, .. }), "{error}");
                    let _ = rank.memory.synchronize();
                    noticed
                })
            })
            .collect();
        for (index, thread) in threads.into_iter().enumerate() {
            let outcome = thread.join();
            if index > 0 {
                let noticed = outcome.unwrap();
                let took = noticed - died.lock().unwrap().unwrap();
                assert!(took < Duration::from_secs(1), "rank {index} noticed after {took:?}");
            }
        }
    });
    world(size, PATIENT, false, |rank| {
        rank.try_sum().unwrap();
        rank.comm.close().unwrap();
    });
}

#[test]
fn an_abort_ends_a_wait_here_and_elsewhere() {
    let Some(size) = world_size() else { return };
    world(size, PATIENT, false, aborts);
}

#[test]
fn an_abort_ends_a_wait_here_and_elsewhere_over_sockets() {
    let Some(size) = world_size().map(few) else { return };
    socket_world(size, PATIENT, aborts);
}

fn aborts(rank: Rank) {
    rank.try_sum().unwrap();
    if rank.rank == 0 {
        // Rank 0 never joins the operation that the others wait in.
        std::thread::sleep(Duration::from_millis(200));
        let start = Instant::now();
        std::thread::scope(|scope| scope.spawn(|| rank.comm.abort()).join().unwrap());
        assert!(start.elapsed() < Duration::from_millis(100));
        assert!(matches!(rank.comm.poll(), Err(CommError::Aborted { .. })));
    } else {
        let buffer = rank.buffer(&[1.0_f32; 8]);
        let (at, stream) = (buffer.addr, rank.stream());
        // SAFETY: the buffer holds 8 elements and lives until the stream has been waited for.
        unsafe { rank.comm.all_reduce(at, at, 8, DType::F32, ReduceOp::Sum, stream).unwrap() };
        let error = rank.await_failure(Duration::from_secs(2));
        assert!(matches!(error, CommError::PeerFailed { rank: 0, .. }), "{error}");
        let _ = rank.memory.synchronize();
    }
    // Closing a failed communicator reports the failure and does not hang.
    let start = Instant::now();
    assert!(rank.comm.close().is_err());
    assert!(start.elapsed() < Duration::from_secs(10));
}

#[test]
fn drops_in_any_order_return_at_once() {
    let Some(size) = world_size().map(few) else { return };
    for round in 0..3 {
        world(size, PATIENT, false, |rank| {
            let key = i32::try_from(rank.rank).unwrap();
            let group = rank.comm.split(Some(0), key).unwrap().unwrap();
            rank.try_sum().unwrap();
            std::thread::sleep(Duration::from_millis(30 * ((rank.rank + round) % size) as u64));
            let start = Instant::now();
            if (rank.rank + round).is_multiple_of(2) {
                drop(group);
                drop(rank.comm);
            } else {
                drop(rank.comm);
                drop(group);
            }
            assert!(start.elapsed() < Duration::from_millis(100), "dropping took {:?}", start.elapsed());
        });
    }
}

#[test]
fn checked_mode_refuses_what_differs_and_goes_on() {
    let Some(size) = world_size().map(few) else { return };
    world(size, PATIENT, true, |rank| {
        rank.try_sum().unwrap();
        let buffer = rank.buffer(&[1.0_f32; 8]);
        let (at, stream) = (buffer.addr, rank.stream());
        let count = if rank.rank == 1 { 7 } else { 8 };
        // SAFETY: the buffer holds 8 elements; nothing is launched.
        let outcome = unsafe { rank.comm.all_reduce(at, at, count, DType::F32, ReduceOp::Sum, stream) };
        let culprit = if rank.rank == 1 { 0 } else { 1 };
        assert!(matches!(&outcome, Err(CommError::Mismatch { rank, .. }) if *rank == culprit), "{outcome:?}");
        let root = rank.rank.min(1);
        // SAFETY: as above.
        let outcome = unsafe { rank.comm.broadcast(at, at, 8, DType::F32, root, stream) };
        assert!(matches!(&outcome, Err(CommError::Mismatch { .. })), "{outcome:?}");
        rank.try_sum().unwrap();
        rank.comm.close().unwrap();
    });
}

#[test]
fn two_threads_on_one_communicator_are_serialised() {
    let Some(size) = world_size().map(few) else { return };
    world(size, PATIENT, false, |rank| {
        let buffer = rank.buffer(&[1.0_f32; 16]);
        let (base, stream, comm) = (&buffer, rank.stream(), &rank.comm);
        std::thread::scope(|scope| {
            for half in 0..2 {
                scope.spawn(move || {
                    for _ in 0..20 {
                        let at = base.at(half * 8);
                        // SAFETY: each thread has a half of the buffer, which outlives the scope and is read, which
                        // waits, after it.
                        unsafe {
                            comm.all_reduce(at, at, 8, DType::F32, ReduceOp::Max, stream).unwrap();
                        }
                    }
                });
            }
        });
        assert_eq!(buffer.read(), [1.0; 16]);
        rank.comm.close().unwrap();
    });
}

#[test]
fn two_ranks_on_one_device_are_refused_by_name() {
    if world_size().is_none() {
        return;
    }
    use comm_core::{BackendFactory, CreateContext, HostCommExt, MemoryKind};
    let errors = comm_core::run_threads(2, PATIENT, |host| {
        let context = CreateContext {
            host: host.clone(),
            memory: MemoryKind::Cuda { ordinal: 0 },
            timeout: PATIENT,
            checked: false,
            options: std::collections::BTreeMap::new(),
        };
        let factory = comm_nccl::NcclFactory::new();
        let all = host.all_gather(&factory.probe(&context).unwrap()).unwrap();
        factory.create(&context, &all).map(drop).unwrap_err()
    })
    .unwrap();
    for error in errors {
        assert!(error.to_string().contains("ranks 0 and 1"), "{error}");
    }
}
