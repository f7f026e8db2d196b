//! Ranks that are late, missing or aborted: every wait ends, with an error that says why. Here what holds around such an
//! end; that it holds for the waits of every kernel is for `waits`.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "../common/mod.rs"]
mod common;

mod cases;
mod waits;

use std::ffi::c_void;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use comm_core::{CommError, DType, DeviceMemory as _};
use common::{PATIENT, SHORT, connect, shared, world, world_size};
use cudarc::driver::result::stream::launch_host_function;
use cudarc::driver::sys::CUstream;

#[test]
fn a_rank_that_does_not_arrive_is_named_and_a_new_communicator_works() {
    let Some(size) = world_size() else { return };
    // One-shot and two-shot, over all links, over those of a hybrid cube mesh, and staged in one.
    let cube = ("p2p.topology", "hybrid_cube_mesh");
    let all: [&[(&str, &str)]; 3] = [&[], &[cube], &[cube, ("p2p.algorithm", "staged")]];
    for (count, options) in [64, 300_000].into_iter().flat_map(|count| all.map(|options| (count, options))) {
        comm_core::run_threads(size, PATIENT, |host| {
            let rank = connect(host.clone(), SHORT, options).unwrap();
            let at = rank.buffer(count, 1.0);
            host.barrier(comm_core::Deadline::after(PATIENT)).unwrap();
            let start = Instant::now();
            if rank.rank != size - 1 {
                rank.sum(at, at, count).unwrap();
            }
            let error = rank.await_failure(SHORT + Duration::from_secs(1));
            let took = start.elapsed();
            assert_eq!(waits::missed(&error), [size - 1], "rank {}: {error}", rank.rank);
            assert!(took >= SHORT && took < SHORT + Duration::from_millis(600), "{took:?}");
            assert_eq!(rank.sum(at, at, count).unwrap_err(), error);
            assert_eq!(rank.comm.close().unwrap_err(), error);
            assert!(rank.comm.poll().is_err());

            // The world's own host communicator saw none of it.
            let again = connect(host.clone(), PATIENT, &[]).unwrap();
            let at = again.buffer(count, 1.0);
            again.sum(at, at, count).unwrap();
            assert_eq!(again.get(at, count), vec![size as f32; count]);
            again.comm.close().unwrap();
        })
        .unwrap();
    }
}

/// Keeps a stream from going on until `done` is set.
fn hold(rank: &common::Rank, done: &'static AtomicBool) {
    unsafe extern "C" fn wait(done: *mut c_void) {
        // SAFETY: it is the static that was passed below.
        let done = unsafe { &*done.cast::<AtomicBool>() };
        let start = Instant::now();
        while !done.load(Ordering::Acquire) && start.elapsed() < PATIENT {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    let (stream, done) = (rank.stream().0 as usize as CUstream, std::ptr::from_ref(done).cast_mut().cast());
    // SAFETY: the stream is live, and the word for ever.
    unsafe { launch_host_function(stream, wait, done).unwrap() };
}

/// The receiver is only late: what the first message brought must not give way to the second, which the sender had no
/// leave to put in its place.
#[test]
fn a_sender_that_gave_up_leaves_the_last_message_alone() {
    const COUNT: usize = 1000;
    static DONE: AtomicBool = AtomicBool::new(false);
    if world_size().is_none() {
        return;
    }
    world(2, SHORT, &[], |rank| {
        let (first, second) = (rank.buffer(COUNT, 1.0), rank.buffer(COUNT, 2.0));
        let everybody = || rank.host.barrier(comm_core::Deadline::after(PATIENT)).unwrap();
        if rank.rank == 0 {
            // SAFETY: the buffers are as large and outlive the work.
            let send = |addr| unsafe { rank.comm.send(addr, COUNT, DType::F32, 1, rank.stream()) };
            everybody();
            send(first).unwrap();
            send(second).unwrap();
            let error = rank.await_failure(SHORT + Duration::from_secs(1));
            assert!(matches!(error, CommError::Timeout { .. }), "{error}");
            // The copy of the second message stands behind the wait that was given up.
            rank.memory.synchronize().unwrap();
            everybody();
        } else {
            let at = rank.buffer(COUNT, -1.0);
            hold(&rank, &DONE);
            // SAFETY: as above.
            unsafe { rank.comm.recv(at, COUNT, DType::F32, 0, rank.stream()).unwrap() };
            everybody();
            everybody();
            DONE.store(true, Ordering::Release);
            assert_eq!(rank.get(at, COUNT), vec![1.0; COUNT]);
        }
        everybody();
    });
}

#[test]
fn an_abort_ends_waits_at_once_on_all_ranks() {
    let Some(size) = world_size() else { return };
    world(size, PATIENT, &[], |rank| {
        let at = rank.buffer(64, 1.0);
        if rank.rank != 0 {
            rank.sum(at, at, 64).unwrap();
        }
        std::thread::sleep(Duration::from_millis(100));
        let start = Instant::now();
        if rank.rank == 0 {
            rank.comm.abort();
        }
        let error = rank.await_failure(Duration::from_secs(1));
        assert!(matches!(error, CommError::Aborted { .. } | CommError::PeerFailed { .. }), "{error}");
        rank.memory.synchronize().unwrap();
        assert!(start.elapsed() < Duration::from_secs(1));
        assert_eq!(rank.comm.close().unwrap_err(), error);
    });
}

#[test]
fn late_ranks_do_no_harm() {
    late_ranks(&[]);
    late_ranks(&[("p2p.topology", "hybrid_cube_mesh")]);
    late_ranks(&[("p2p.algorithm", "pull")]);
}

fn late_ranks(more: &[(&str, &str)]) {
    let Some(size) = world_size() else { return };
    // Every kernel sleeps between its sends and its first wait.
    let options = [&[("p2p.stall_ns", "200000")], more].concat();
    world(size, PATIENT, &options, |rank| {
        for count in [1, 1000, 40_000, 700_001] {
            let (send, recv) = (rank.buffer(count, 0.0), rank.buffer(count, -1.0));
            for turn in 0..8 {
                rank.put(send, &vec![(rank.rank + 1 + turn) as f32; count]);
                rank.sum(send, recv, count).unwrap();
                let expected = rank.triangle() + (turn * rank.size) as f32;
                assert_eq!(rank.get(recv, count), vec![expected; count], "{count} in turn {turn}");
            }
        }
        rank.comm.close().unwrap();
    });
}

#[test]
fn dropping_in_any_order_returns_at_once() {
    let Some(size) = world_size() else { return };
    for _ in 0..2 {
        world(size, PATIENT, &[], |rank| {
            let at = rank.buffer(64, 1.0);
            rank.sum(at, at, 64).unwrap();
            let group = rank.comm.split(Some(0), -(rank.rank as i32)).unwrap().unwrap();
            assert_eq!(group.rank(), size - 1 - rank.rank);
            let start = Instant::now();
            if rank.rank % 2 == 0 {
                drop(rank.comm);
                drop(group);
            } else {
                drop(group);
                drop(rank.comm);
            }
            // A shared device's context is locked while another rank's communicator is given back.
            assert!(shared() || start.elapsed() < Duration::from_millis(100));
            rank.memory.synchronize().unwrap();
        });
    }
}
