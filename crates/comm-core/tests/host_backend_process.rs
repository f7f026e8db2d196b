//! The host backend between processes: the conformance suite, a killed rank, a stopped rank, and what is left behind.

#![cfg(feature = "host-backend")]
#![allow(missing_docs, clippy::unwrap_used, clippy::panic, reason = "tests")]

mod host_backend_support;
mod host_comm_util;

use std::sync::Arc;
use std::time::{Duration, Instant};

use comm_core::{CommError, DType, DeviceAddr, DeviceComm, HostComm, ReduceOp, Rendezvous, StreamHandle};
use host_backend_support::{context, create};
use host_comm_util::process::{Job, is_rank, tell};
use host_comm_util::{Kind, within};
use rustix::process::Signal;

const LIMIT: Duration = Duration::from_secs(50);
/// The meeting's timeout, and longer than any test.
const LONG: Duration = Duration::from_secs(60);
const T: Duration = Duration::from_secs(1);
const WORLD: usize = 3;

fn meet() -> Arc<dyn HostComm> {
    Arc::new(Rendezvous::from_env().unwrap().connect().unwrap())
}

/// How many descriptors this process has, and how many mappings of shared memory.
fn held() -> (usize, usize) {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    assert!(!maps.contains("/dev/shm/"), "shared memory has a name that outlives a killed process:\n{maps}");
    let mappings = maps.lines().filter(|line| line.contains("memfd:host-backend")).count();
    (std::fs::read_dir("/proc/self/fd").unwrap().count(), mappings)
}

/// Sums and gathers of a megabyte, small sums and transfers by turns, until one fails: the error, and how long the call
/// that failed took.
fn until_failure(comm: &dyn DeviceComm) -> (CommError, Duration) {
    const COUNT: usize = 1 << 18;
    let (rank, size, stream) = (comm.rank(), comm.size(), StreamHandle::NULL);
    let mut send = vec![1_f32; COUNT];
    let mut recv = vec![0_f32; COUNT * size];
    let (from, to) = (DeviceAddr::of_slice_mut(&mut send), DeviceAddr::of_slice_mut(&mut recv));
    for turn in 0_usize.. {
        let start = Instant::now();
        // SAFETY: `send` holds COUNT elements and `recv` that many for each rank.
        let result = unsafe {
            match turn % 3 {
                0 => comm.all_reduce(from, to, COUNT, DType::F32, ReduceOp::Sum, stream),
                1 => comm.all_gather(from, to, COUNT, DType::F32, stream),
                _ => comm.all_reduce(from, to, 10, DType::F32, ReduceOp::Max, stream),
            }
        };
        if let Err(error) = result {
            return (error, start.elapsed());
        }
        if turn == 5 {
            tell("ready", &rank.to_string());
        }
    }
    unreachable!("the loop ends by returning");
}

#[cfg(feature = "conformance")]
#[test]
fn the_quick_suite_passes_between_processes() {
    use comm_core::HostMemory;
    use comm_core::conformance::{Config, run_rank};
    if is_rank() {
        let (host, config) = (meet(), Config::quick());
        let comm = create(&context(host.clone(), "auto", config.timeout, false));
        let report = run_rank(&comm, &HostMemory::new(), &*host, &config);
        tell("report", &report.to_string());
        assert!(report.is_success(), "{report}");
        assert!(report.calls() > 100, "{report}");
        // Rank 0's process relays the others' calls, so nobody leaves before all are through.
        host.barrier(comm_core::Deadline::after(LONG)).unwrap();
        return;
    }
    within(LIMIT, || {
        let mut job = Job::start("the_quick_suite_passes_between_processes", WORLD, Kind::Unix, LONG);
        (0..WORLD).for_each(|rank| job.join(rank));
    });
}

#[test]
fn a_killed_rank_is_blamed_by_every_survivor_and_leaves_nothing_behind() {
    if is_rank() {
        let meeting = Rendezvous::from_env().unwrap();
        let host: Arc<dyn HostComm> = Arc::new(meeting.connect().unwrap());
        let before = held();
        // Longer than the test, so that only the death can end a call.
        let comm = create(&context(host.clone(), "auto", LONG, false));
        let _shared = comm.allocate(1 << 20).unwrap();
        let (error, _) = until_failure(&*comm);
        tell("error", &error.to_string());
        drop(comm);
        // Fewer descriptors on rank 0, whose process had a connection to the dead rank.
        let after = held();
        assert!(after.0 <= before.0 && after.1 == before.1, "descriptors, mappings: {before:?}, {after:?}");
        let CommError::PeerDied { rank: dead, .. } = error else { panic!("{error}") };
        drop(host);
        let comm_core::RendezvousAddress::Unix(path) = &meeting.address else { panic!("not a unix socket") };
        let address = comm_core::RendezvousAddress::Unix(path.with_file_name("again"));
        let rank = meeting.rank - usize::from(meeting.rank > dead);
        let again = Rendezvous { address, rank, size: meeting.size - 1, ..meeting.clone() };
        let comm = create(&context(Arc::new(again.connect().unwrap()), "auto", LONG, false));
        let mut sum = [1_i32];
        let place = DeviceAddr::of_slice_mut(&mut sum);
        // SAFETY: in place in an array of one element.
        unsafe { comm.all_reduce(place, place, 1, DType::I32, ReduceOp::Sum, StreamHandle::NULL).unwrap() };
        tell("again", &sum[0].to_string());
        comm.close().unwrap();
        return;
    }
    within(LIMIT, || {
        let test = "a_killed_rank_is_blamed_by_every_survivor_and_leaves_nothing_behind";
        for victim in 0..WORLD {
            let mut job = Job::start(test, WORLD, Kind::Unix, LONG);
            (0..WORLD).for_each(|rank| drop(job.report(rank, "ready", LIMIT)));
            let killed = Instant::now();
            job.signal(victim, Signal::KILL);
            let survivors = || (0..WORLD).filter(|rank| *rank != victim);
            for rank in survivors() {
                let error = job.report(rank, "error", LIMIT);
                assert!(killed.elapsed() < Duration::from_secs(1), "{:?}: {error}", killed.elapsed());
                assert!(error.ends_with(&format!("rank {victim} died")), "rank {rank}: {error}");
            }
            for rank in survivors() {
                assert_eq!(job.report(rank, "again", LIMIT), (WORLD - 1).to_string());
                job.join(rank);
            }
        }
    });
}

#[test]
fn a_stopped_rank_is_missing_after_the_timeout() {
    if is_rank() {
        let comm = create(&context(meet(), "auto", T, false));
        let (error, waited) = until_failure(&*comm);
        tell("error", &format!("{} {error}", waited.as_millis()));
        // Rank 0's process relays the host communicator's messages, so it must not end before the others time out.
        std::thread::sleep(LONG);
        return;
    }
    within(LIMIT, || {
        for victim in [0, WORLD - 1] {
            let job = Job::start("a_stopped_rank_is_missing_after_the_timeout", WORLD, Kind::Unix, LONG);
            (0..WORLD).for_each(|rank| drop(job.report(rank, "ready", LIMIT)));
            job.signal(victim, Signal::STOP);
            for rank in (0..WORLD).filter(|rank| *rank != victim) {
                let report = job.report(rank, "error", LIMIT);
                let (millis, error) = report.split_once(' ').unwrap();
                assert!(error.contains(&format!("no sign of rank(s) [{victim}]")), "rank {rank}: {error}");
                assert!((1000..1500).contains(&millis.parse::<u64>().unwrap()), "rank {rank}: {report}");
            }
            job.signal(victim, Signal::KILL);
        }
    });
}
