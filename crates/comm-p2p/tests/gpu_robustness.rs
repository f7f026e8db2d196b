//! Aborts from other threads at every stage of a communicator's life, stale handles, several communicators and threads
//! at once, and what a close waits for.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use comm_core::{
    CommError, CreateContext, DType, Deadline, DeviceComm, DeviceMemory as _, MemoryKind, ReduceOp,
    create_with, run_threads,
};
use comm_p2p::P2pFactory;
use common::{PATIENT, Rank, SHORT, as_processes, connect, shared, skipped_where_shared, world, world_size};

/// What an abort may take to reach everyone.
const PROMPT: Duration = Duration::from_secs(1);

fn is_abort(error: &CommError) -> bool {
    match error {
        CommError::Aborted { .. } => true,
        CommError::PeerFailed { cause, .. } | CommError::CreationFailed { cause, .. } => is_abort(cause),
        _ => false,
    }
}

/// Runs `call` on this thread while another makes `abort` after a while, and returns the outcome with the time that
/// passed from the abort on.
fn aborted<T>(abort: impl Fn() + Sync, call: impl FnOnce() -> T) -> (T, Duration) {
    std::thread::scope(|scope| {
        let aborter = scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(200));
            let start = Instant::now();
            abort();
            let took = start.elapsed();
            assert!(took < Duration::from_millis(100), "an abort blocked for {took:?}");
            start
        });
        let outcome = call();
        (outcome, aborter.join().unwrap().elapsed())
    })
}

#[test]
fn an_abort_from_another_thread_ends_a_creation() {
    let Some(size) = world_size() else { return };
    run_threads(size, PATIENT, |host| {
        let rank = host.rank();
        let memory = common::memory(rank).unwrap();
        let context = CreateContext { timeout: PATIENT, ..CreateContext::new(host.clone(), memory.kind()) };
        host.barrier(Deadline::after(PATIENT)).unwrap();
        // The last rank never takes part; rank 0 aborts what the others wait in.
        if rank == size - 1 {
            std::thread::sleep(Duration::from_millis(200) + PROMPT);
            return;
        }
        let abort = || {
            if rank == 0 {
                host.abort()
            }
        };
        let (outcome, took) = aborted(abort, || create_with(&P2pFactory, &context));
        let error = outcome.map(drop).unwrap_err();
        assert!(is_abort(&error), "rank {rank}: {error}");
        assert!(took < PROMPT, "rank {rank}: {took:?} after the abort");
    })
    .unwrap();
    // What was begun is given back: a new world of the same devices forms.
    world(size, PATIENT, &[], works);
}

#[test]
fn an_abort_from_another_thread_ends_an_operation() {
    let Some(size) = world_size() else { return };
    for count in [64, 300_000, 4 << 20] {
        world(size, PATIENT, &[], |rank| {
            let at = rank.buffer(count, 1.0);
            rank.host.barrier(Deadline::after(PATIENT)).unwrap();
            if rank.rank != size - 1 {
                rank.sum(at, at, count).unwrap();
            }
            let abort = || {
                if rank.rank == 0 {
                    rank.comm.abort()
                }
            };
            let (error, took) = aborted(abort, || rank.await_failure(Duration::from_secs(5)));
            assert!(is_abort(&error), "rank {}: {error}", rank.rank);
            rank.memory.synchronize().unwrap();
            assert!(took < PROMPT, "rank {}: {took:?} after the abort", rank.rank);
            assert_eq!(rank.comm.close().unwrap_err(), error);
        });
    }
}

#[test]
fn an_abort_from_another_thread_ends_a_close() {
    let Some(size) = world_size() else { return };
    world(size, PATIENT, &[], |rank| {
        let at = rank.buffer(1000, 1.0);
        rank.sum(at, at, 1000).unwrap();
        if rank.rank == size - 1 {
            // Never closes; learns of the abort, and drops.
            let error = rank.await_failure(Duration::from_secs(5));
            assert!(is_abort(&error), "{error}");
            return;
        }
        let abort = || {
            if rank.rank == 0 {
                rank.comm.abort()
            }
        };
        let (outcome, took) = aborted(abort, || rank.comm.close());
        let error = outcome.unwrap_err();
        assert!(is_abort(&error), "rank {}: {error}", rank.rank);
        assert!(took < PROMPT, "rank {}: {took:?} after the abort", rank.rank);
    });
}

#[test]
fn a_close_that_a_rank_does_not_make_names_it_in_time() {
    let Some(size) = world_size() else { return };
    world(size, SHORT, &[], |rank| {
        let at = rank.buffer(1000, 1.0);
        rank.sum(at, at, 1000).unwrap();
        rank.memory.synchronize().unwrap();
        let start = Instant::now();
        if rank.rank == size - 1 {
            rank.await_failure(SHORT + PROMPT);
            return;
        }
        let error = rank.comm.close().unwrap_err();
        let took = start.elapsed();
        let missing = match &error {
            CommError::Timeout { missing, .. } => missing.clone(),
            CommError::PeerFailed { cause, .. } => match &**cause {
                CommError::Timeout { missing, .. } => missing.clone(),
                other => panic!("{other}"),
            },
            other => panic!("{other}"),
        };
        assert_eq!(missing, [size - 1], "{error}");
        assert!(
            took + Duration::from_millis(100) >= SHORT && took < SHORT + Duration::from_millis(500),
            "{took:?}"
        );
    });
}

#[test]
fn a_close_does_not_wait_for_what_another_communicator_waits_for() {
    let Some(size) = world_size() else { return };
    if skipped_where_shared("a close waits for its device, and so for the other ranks' work there") {
        return;
    }
    world(size, PATIENT, &[], |rank| {
        let other = connect(rank.host.clone(), PATIENT, &[]).unwrap();
        let at = other.buffer(1000, 1.0);
        works_on(&rank);
        let start = Instant::now();
        // Rank 0's device is busy with a call that the others make only after they have closed this communicator.
        if rank.rank == 0 {
            other.sum(at, at, 1000).unwrap();
        }
        rank.comm.close().unwrap();
        if rank.rank != 0 {
            other.sum(at, at, 1000).unwrap();
        }
        assert_eq!(other.get(at, 1000), vec![size as f32; 1000]);
        other.comm.close().unwrap();
        assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    });
}

#[test]
fn two_threads_on_one_communicator_are_serialised() {
    let Some(size) = world_size() else { return };
    world(size, PATIENT, &[], |rank| {
        // Equal calls, so that it does not matter which thread's comes first on which rank, on operands of their own.
        let places: Vec<_> = (0..2).map(|_| rank.buffer(5000, 1.0)).collect();
        let (rank, places) = (&rank, &places);
        std::thread::scope(|scope| {
            for &at in places {
                let (comm, stream) = (&rank.comm, rank.stream());
                scope.spawn(move || {
                    for _ in 0..200 {
                        // SAFETY: each thread has a buffer of its own, which is read, which waits, after the scope.
                        unsafe { comm.all_reduce(at, at, 5000, DType::F32, ReduceOp::Max, stream).unwrap() };
                    }
                });
            }
        });
        for &at in places {
            assert_eq!(rank.get(at, 5000), vec![1.0; 5000]);
        }
        rank.comm.close().unwrap();
    });
}

/// Two worlds of their own on the same devices, each over its own host communicators, their calls in no common order.
#[test]
fn two_jobs_on_the_same_devices_do_not_see_each_other() {
    let Some(size) = world_size() else { return };
    let arrived = AtomicUsize::new(0);
    // All ranks of both jobs meet, within a bound: one that has failed does not come.
    let meet = |times: usize| {
        arrived.fetch_add(1, Ordering::SeqCst);
        let deadline = Deadline::after(PATIENT);
        while arrived.load(Ordering::SeqCst) < times * 2 * size {
            assert!(!deadline.has_passed(), "a rank of a job is missing");
            std::thread::sleep(Duration::from_millis(1));
        }
    };
    let job = |seed: usize| {
        world(size, PATIENT, &[], |rank| {
            let most = 20_000;
            let at = rank.buffer(most, 0.0);
            // What waits for a whole device, as allocating and freeing do, stays clear of the other job's calls: their
            // kernels wait for each other across devices.
            meet(1);
            for turn in 0..300 {
                // Kernels of both jobs must be resident at once for the same reason, so none may fill a device.
                let count = (turn * 7919 + seed * 31) % most + 1;
                rank.put(at, &vec![(rank.rank + 1 + seed * 1000 + turn) as f32; count]);
                rank.sum(at, at, count).unwrap();
                let expected = rank.triangle() + ((seed * 1000 + turn) * size) as f32;
                assert_eq!(rank.get(at, count), vec![expected; count], "job {seed}, turn {turn}");
            }
            meet(2);
            rank.comm.close().unwrap();
        });
    };
    std::thread::scope(|scope| {
        let jobs = [0, 1].map(|seed| {
            let job = &job;
            scope.spawn(move || job(seed))
        });
        jobs.into_iter().for_each(|job| job.join().unwrap());
    });
}

#[test]
fn handles_of_what_is_gone_are_stale() {
    let Some(size) = world_size() else { return };
    world(size, PATIENT, &[("p2p.symmetric_operands", "on")], |rank| {
        let buffer = rank.buffer(1000, 1.0);
        // SAFETY: the buffer is freed with the memory, which is last.
        let registration = unsafe { rank.comm.register(buffer, 4000).unwrap() };
        // The peer restarted: another communicator, which counts its registrations from the start as well.
        let again = connect(rank.host.clone(), PATIENT, &[("p2p.symmetric_operands", "on")]).unwrap();
        // SAFETY: as above.
        let other = unsafe { again.comm.register(buffer, 4000).unwrap() };
        assert_eq!(other.id, registration.id);
        assert_ne!(other.generation, registration.generation);
        let stale = |comm: &dyn DeviceComm, registration: &comm_core::Registration| {
            // SAFETY: no work uses it.
            let error = unsafe { comm.deregister(registration) }.unwrap_err();
            assert!(matches!(error, CommError::StaleHandle { .. }), "{error}");
        };
        stale(&*again.comm, &registration);
        stale(&*rank.comm, &other);
        let shifted = comm_core::Registration { addr: buffer.offset(4), ..registration.clone() };
        stale(&*rank.comm, &shifted);
        // SAFETY: no work uses them.
        unsafe {
            rank.comm.deregister(&registration).unwrap();
            again.comm.deregister(&other).unwrap();
        }
        stale(&*rank.comm, &registration);
        // The same memory anew: the old handle does not become good again.
        // SAFETY: as above.
        let renewed = unsafe { rank.comm.register(buffer, 4000).unwrap() };
        assert_ne!((renewed.id, renewed.generation), (registration.id, registration.generation));
        stale(&*rank.comm, &registration);
        works_on(&rank);
        again.comm.close().unwrap();
        rank.comm.close().unwrap();
    });
}

/// Not with memory that is freed while registered, as below: the driver leaves open what becomes of a process's mapping of
/// memory that its owner has freed.
#[test]
fn stale_handles_between_processes() {
    as_processes("stale_handles_between_processes", || {
        handles_of_what_is_gone_are_stale();
        operands_at_different_places_of_an_allocation_are_noticed();
    });
}

#[test]
fn memory_freed_while_registered_is_noticed_at_its_next_use() {
    let Some(size) = world_size() else { return };
    if skipped_where_shared("memory is out of a reserve, which the driver does not see freed") {
        return;
    }
    // Large enough to be stored into directly.
    let count = 4 << 20;
    world(size, SHORT, &[("p2p.symmetric_operands", "on")], |rank| {
        let send = rank.buffer(count, 1.0);
        let recv = rank.buffer(count, 0.0);
        // SAFETY: the promise is broken below, by all ranks, which is what is tried.
        unsafe { rank.comm.register(recv, count * 4).unwrap() };
        rank.sum(send, recv, count).unwrap();
        assert_eq!(rank.get(recv, count), vec![size as f32; count]);
        rank.host.barrier(Deadline::after(PATIENT)).unwrap();
        // SAFETY: nothing uses it any more, but for the call that must refuse to.
        unsafe { rank.memory.free(recv).unwrap() };
        let error = rank.sum(send, recv, count).unwrap_err();
        assert!(matches!(error, CommError::StaleHandle { .. }), "{error}");
        assert!(error.to_string().contains("freed while registered"), "{error}");
        // Nothing was enqueued anywhere, so all is well.
        rank.host.barrier(Deadline::after(PATIENT)).unwrap();
        works_on(&rank);
        rank.comm.close().unwrap();
    });
}

fn works(rank: Rank) {
    works_on(&rank);
    rank.comm.close().unwrap();
}

fn works_on(rank: &Rank) {
    let at = rank.buffer(3000, (rank.rank + 1) as f32);
    rank.sum(at, at, 3000).unwrap();
    assert_eq!(rank.get(at, 3000), vec![rank.triangle(); 3000]);
}

/// Over all devices, with what the first communicator of a process does besides: loading kernels, checking the devices.
#[test]
fn a_communicator_over_all_devices_is_made_within_two_seconds() {
    let Some(size) = world_size() else { return };
    let took = run_threads(size, PATIENT, |host| {
        // Starting on a device is the caller's, and done.
        let memory = common::memory(host.rank()).unwrap();
        let mut took = Vec::new();
        for _ in 0..3 {
            host.barrier(Deadline::after(PATIENT)).unwrap();
            let start = Instant::now();
            let kind = MemoryKind::Cuda { ordinal: common::ordinal(host.rank()) };
            let context = CreateContext::new(Arc::clone(&host), kind);
            let comm = create_with(&P2pFactory, &context).unwrap();
            took.push(start.elapsed());
            comm.close().unwrap();
        }
        drop(memory);
        took
    })
    .unwrap();
    for turn in 0..3 {
        let slowest = took.iter().map(|rank| rank[turn]).max().unwrap();
        println!("communicator {turn} over {size} GPUs: {slowest:?} on the slowest rank");
        assert!(shared() || slowest < Duration::from_secs(2), "{slowest:?}");
    }
}

/// What a rank that failed because of another's failure was told.
fn root(error: &CommError) -> &CommError {
    match error {
        CommError::PeerFailed { cause, .. } => root(cause),
        other => other,
    }
}

#[test]
fn calls_that_differ_are_noticed_though_their_traffic_is_alike() {
    let Some(size) = world_size() else { return };
    let last = size - 1;
    // What the last rank calls instead of a sum of 1000 f16: of the same length, so that its packs fit the others'.
    type Calls = fn(&Rank, comm_core::DeviceAddr, bool) -> comm_core::Result<()>;
    let differing: [(&str, Calls); 3] = [
        ("bf16", |rank, at, last| {
            let dtype = if last { DType::BF16 } else { DType::F16 };
            // SAFETY: the buffer holds 4000 bytes and is freed with the memory.
            unsafe { rank.comm.all_reduce(at, at, 1000, dtype, ReduceOp::Sum, rank.stream()) }
        }),
        ("another reduction", |rank, at, last| {
            let op = if last { ReduceOp::Min } else { ReduceOp::Max };
            // SAFETY: as above.
            unsafe { rank.comm.all_reduce(at, at, 1000, DType::F32, op, rank.stream()) }
        }),
        ("all_gather", |rank, at, last| {
            let part = 1000 / rank.size * 4;
            let from = at.offset((rank.rank * part) as u64);
            let (dtype, count) = if last { (DType::U8, part) } else { (DType::F32, part / 4) };
            // SAFETY: as above.
            unsafe { rank.comm.all_gather(from, at, count, dtype, rank.stream()) }
        }),
    ];
    for (what, call) in differing {
        world(size, PATIENT, &[], |rank| {
            let at = rank.buffer(1000, 1.0);
            rank.sum(at, at, 1000).unwrap();
            // Enqueued calls are compared however far the ranks are apart.
            (0..200).for_each(|_| rank.sum(at, at, 8).unwrap());
            rank.memory.synchronize().unwrap();
            rank.host.barrier(Deadline::after(PATIENT)).unwrap();
            rank.comm.poll().unwrap();
            rank.host.barrier(Deadline::after(PATIENT)).unwrap();
            let start = Instant::now();
            // Fails only if others have found out before this rank came to it.
            let _ = call(&rank, at, rank.rank == last);
            let error = rank.await_failure(PROMPT);
            println!("{what}: rank {} after {:?}: {error}", rank.rank, start.elapsed());
            let expected = if rank.rank == last { 0 } else { last };
            let CommError::PeerFailed { rank: other, cause, .. } = &error else { panic!("{error}") };
            let CommError::Mismatch { found, .. } = root(cause) else { panic!("{error}") };
            // Else it was another rank that found out, and told.
            if matches!(**cause, CommError::Mismatch { .. }) {
                assert_eq!(*other, expected, "{error}");
                assert!(rank.rank == last || found.contains(what), "{error}");
            }
            assert!(error.is_fatal());
            assert_eq!(rank.comm.close().unwrap_err(), error);
        });
    }
}

#[test]
fn operands_at_different_places_of_an_allocation_are_noticed() {
    let Some(size) = world_size() else { return };
    world(size, PATIENT, &[], |rank| {
        let count = 4 << 20;
        let send = rank.buffer(count, 1.0);
        let allocated = rank.comm.allocate(count * 4 + 256).unwrap();
        // Small results may lie anywhere in it, large ones must lie alike.
        let small = allocated.offset(16 * rank.rank as u64);
        rank.sum(send, small, 4).unwrap();
        assert_eq!(rank.get(small, 4), vec![size as f32; 4]);
        rank.host.barrier(Deadline::after(PATIENT)).unwrap();
        // Fails only if others have found out before this rank came to it.
        let _ = rank.sum(send, small, count);
        let error = rank.await_failure(PROMPT);
        let CommError::PeerFailed { cause, .. } = &error else { panic!("{error}") };
        assert!(matches!(root(cause), CommError::Mismatch { .. }), "{error}");
        assert!(error.to_string().contains("place of an operand"), "{error}");
        let _ = rank.memory.synchronize();
        assert_eq!(rank.comm.close().unwrap_err(), error);
    });
}
