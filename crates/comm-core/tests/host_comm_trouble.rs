//! One rank's trouble reaches exactly those that need the rank, and at once. Ranks are processes, since limits and
//! stops are a process's.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, reason = "tests")]

mod host_comm_util;

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use comm_core::{CommError, Deadline, HostComm, Rendezvous, Result};
use host_comm_util::process::{Job, is_rank, tell};
use host_comm_util::{Kind, run, within};
use rustix::process::{Resource, Rlimit, Signal, getrlimit, setrlimit};

const LIMIT: Duration = Duration::from_secs(40);
/// Longer than any test, so that only another rank's report ends such a wait.
const LONG: Duration = Duration::from_secs(60);
const T: Duration = Duration::from_secs(1);

/// An exchange of one descriptor, in a process that can have no more of them.
fn exchange_without_descriptors(comm: &dyn HostComm) -> Result<()> {
    let file = tempfile::tempfile().unwrap();
    let before = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: Some(3), ..before }).unwrap();
    let outcome = comm.exchange_fds(&[file.as_fd()], Deadline::after(LONG)).map(drop);
    setrlimit(Resource::Nofile, before).unwrap();
    outcome
}

fn check_cause(own: &CommError, other: &CommError) {
    assert!(matches!(own, CommError::Io { context, .. } if context.contains("duplicating")), "{own:?}");
    let CommError::PeerFailed { rank: 0, cause, .. } = other else { panic!("{other:?}") };
    assert_eq!(&**cause, own);
}

#[test]
fn a_rank_without_descriptors_tells_the_threads_that_wait_for_it() {
    if is_rank() {
        let errors = run(Kind::Thread, 2, LONG, |comm| {
            let outcome = match comm.rank() {
                0 => exchange_without_descriptors(&*comm),
                _ => comm.exchange_fds(&[], Deadline::after(LONG)).map(drop),
            };
            let error = outcome.unwrap_err();
            assert_eq!(comm.barrier(Deadline::after(LONG)).unwrap_err(), error);
            error
        });
        check_cause(&errors[0], &errors[1]);
        return;
    }
    within(LIMIT, || {
        let test = "a_rank_without_descriptors_tells_the_threads_that_wait_for_it";
        Job::start_with(test, 1, &[], tempfile::tempdir().unwrap()).join(0);
    });
}

#[test]
fn a_rank_without_descriptors_tells_the_processes_that_wait_for_it() {
    if is_rank() {
        let comm = Rendezvous::from_env().unwrap().connect().unwrap();
        let outcome = match comm.rank() {
            1 => exchange_without_descriptors(&comm),
            _ => comm.exchange_fds(&[], Deadline::after(LONG)).map(drop),
        };
        let error = outcome.unwrap_err();
        match error {
            CommError::Io { ref context, .. } if comm.rank() == 1 => assert!(context.contains("duplicating")),
            CommError::PeerFailed { rank: 1, ref cause, .. } => {
                assert!(matches!(&**cause, CommError::Io { context, .. } if context.contains("duplicating")));
            }
            _ => panic!("{error:?}"),
        }
        tell("error", "");
        // Rank 0's process carries the others' messages.
        std::thread::sleep(LONG);
        return;
    }
    within(LIMIT, || {
        let test = "a_rank_without_descriptors_tells_the_processes_that_wait_for_it";
        let job = Job::start(test, 3, Kind::Unix, LONG);
        (0..3).for_each(|rank| drop(job.report(rank, "error", LIMIT)));
        assert!(job.started.elapsed() < LONG / 2);
    });
}

/// Rank 0's answer to a call waits until the others' have left its process. A rank that does not read holds up the
/// calls that it takes part in, and a call of another group never waits behind one of them.
#[test]
fn a_rank_that_does_not_read_holds_up_no_group_but_its_own() {
    if is_rank() {
        let comm = Rendezvous::from_env().unwrap().connect().unwrap();
        let group = |others: [usize; 2]| {
            let color = others.contains(&comm.rank()).then_some(0);
            comm.split(color, 0, Deadline::after(LONG)).unwrap()
        };
        let (stopped, healthy) = (group([0, 1]), group([0, 2]));
        let go = |name: &str| {
            let path = std::env::var("COMM_TEST_RESULTS").unwrap() + "/" + name;
            while std::fs::metadata(&path).is_err() {
                std::thread::sleep(Duration::from_millis(2));
            }
        };
        match comm.rank() {
            0 => {
                go("stopped");
                // More than the sockets' buffers hold.
                let large = vec![1; 16 << 20];
                let error = stopped.unwrap().all_gather_bytes(&large, Deadline::after(T)).unwrap_err();
                assert!(matches!(&error, CommError::Timeout { missing, .. } if *missing == [1]), "{error:?}");
                let start = Instant::now();
                healthy.unwrap().barrier(Deadline::after(LONG / 2)).unwrap();
                assert!(start.elapsed() < LONG / 4, "{:?}", start.elapsed());
                tell("done", "");
            }
            1 => {
                std::thread::scope(|scope| {
                    scope.spawn(|| stopped.unwrap().all_gather_bytes(&[1], Deadline::after(LONG)));
                    // Long enough for the part to have left.
                    std::thread::sleep(Duration::from_millis(200));
                    tell("contributed", "");
                });
            }
            _ => healthy.unwrap().barrier(Deadline::after(LONG)).unwrap(),
        }
        return;
    }
    within(LIMIT, || {
        for kind in Kind::SOCKETS {
            let mut job =
                Job::start("a_rank_that_does_not_read_holds_up_no_group_but_its_own", 3, kind, LONG);
            job.report(1, "contributed", LIMIT);
            job.signal(1, Signal::STOP);
            std::fs::write(job.results.path().join("stopped"), "").unwrap();
            job.report(0, "done", LIMIT);
            [0, 2].into_iter().for_each(|rank| job.join(rank));
            job.signal(1, Signal::KILL);
        }
    });
}

/// Leaves this process `free` descriptor numbers, and returns the limit that it had before.
fn leave_numbers(free: usize) -> Rlimit {
    let number =
        |entry: std::io::Result<std::fs::DirEntry>| entry.unwrap().file_name().to_str()?.parse().ok();
    let taken: Vec<u64> = std::fs::read_dir("/proc/self/fd").unwrap().filter_map(number).collect();
    let before = getrlimit(Resource::Nofile);
    let last = (0..).filter(|number| !taken.contains(number)).nth(free).unwrap();
    setrlimit(Resource::Nofile, Rlimit { current: Some(last), ..before }).unwrap();
    before
}

/// What a rank gets from an exchange in a group of all ranks, to which the two others bring eight descriptors each and `poor`,
/// which has numbers for twelve more, none; and then from a barrier of that group.
fn exchange_with_a_poor_rank(comm: &dyn HostComm, poor: usize) -> [Result<()>; 2] {
    let group = comm.split(Some(0), 0, Deadline::after(LONG)).unwrap().unwrap();
    let file = tempfile::tempfile().unwrap();
    let eight = [file.as_fd(); 8];
    let before = (comm.rank() == poor).then(|| leave_numbers(12));
    // No descriptor is on its way before.
    comm.barrier(Deadline::after(LONG)).unwrap();
    let mine = if comm.rank() == poor { &[][..] } else { &eight };
    let exchanged = group.exchange_fds(mine, Deadline::after(LONG)).map(drop);
    let after = group.barrier(Deadline::after(LONG));
    if let Some(before) = before {
        setrlimit(Resource::Nofile, before).unwrap();
    }
    assert_eq!(group.poll().is_err(), after.is_err());
    // Nobody has died, and what has nothing to do with that group goes on, descriptors included.
    for _ in 0..2 {
        let all = comm.exchange_fds(&eight[..comm.rank()], Deadline::after(LONG)).unwrap();
        assert_eq!(all.iter().map(Vec::len).collect::<Vec<_>>(), [0, 1, 2]);
    }
    comm.poll().unwrap();
    [exchanged, after]
}

fn is_out_of_numbers(error: &CommError) -> bool {
    matches!(error, CommError::Io { context, message } if context.starts_with("receiving descriptors") && message.contains("ulimit -n"))
}

/// Descriptors that do not arrive because the process can have no more fail its own call, and the others blame no death
/// for it.
#[test]
fn a_rank_out_of_descriptor_numbers_is_named_and_lives() {
    const POOR: usize = 1;
    if is_rank() {
        let comm = Rendezvous::from_env().unwrap().connect().unwrap();
        let [exchanged, after] = exchange_with_a_poor_rank(&comm, POOR);
        let after = after.unwrap_err();
        if comm.rank() == POOR {
            assert_eq!(exchanged.unwrap_err(), after);
            assert!(is_out_of_numbers(&after), "{after:?}");
        } else {
            // They have theirs, and learn of it when they need that rank.
            exchanged.unwrap();
            let CommError::PeerFailed { rank: POOR, cause, .. } = &after else { panic!("{after:?}") };
            assert!(is_out_of_numbers(cause), "{after:?}");
        }
        comm.barrier(Deadline::after(LONG)).unwrap();
        return;
    }
    within(LIMIT, || {
        let test = "a_rank_out_of_descriptor_numbers_is_named_and_lives";
        let mut job = Job::start(test, 3, Kind::Unix, LONG);
        (0..3).for_each(|rank| job.join(rank));
        assert!(job.started.elapsed() < LONG / 2);
    });
}

/// Rank 0's process, which passes all descriptors on, needs numbers for them too: when it has none, that is rank 0's
/// failure and not the death of whoever sent them.
#[test]
fn a_hub_out_of_descriptor_numbers_blames_no_rank_for_dying() {
    if is_rank() {
        let comm = Rendezvous::from_env().unwrap().connect().unwrap();
        for error in exchange_with_a_poor_rank(&comm, 0) {
            let error = error.unwrap_err();
            let CommError::PeerFailed { rank: 0, cause, .. } = &error else { panic!("{error:?}") };
            assert!(is_out_of_numbers(cause) && cause.to_string().contains("rank 0"), "{error:?}");
        }
        comm.barrier(Deadline::after(LONG)).unwrap();
        return;
    }
    within(LIMIT, || {
        let test = "a_hub_out_of_descriptor_numbers_blames_no_rank_for_dying";
        let mut job = Job::start(test, 3, Kind::Unix, LONG);
        (0..3).for_each(|rank| job.join(rank));
        assert!(job.started.elapsed() < LONG / 2);
    });
}

/// A part that no frame can carry is a call that failed and not one that was never made: the others learn of it at once,
/// and no later call of this rank is taken for the one that they are in.
#[test]
fn a_part_that_is_too_long_fails_the_call_on_all_ranks() {
    within(LIMIT, || {
        for kind in Kind::SOCKETS {
            let errors = run(kind, 2, LONG, |comm| {
                // Zeros that nobody looks at take no memory.
                let bytes = if comm.rank() == 1 { vec![0; (1 << 30) + 1] } else { Vec::new() };
                let error = comm.all_gather_bytes(&bytes, Deadline::after(LONG)).unwrap_err();
                assert_eq!(comm.barrier(Deadline::after(LONG)).unwrap_err(), error);
                error
            });
            assert!(matches!(&errors[1], CommError::InvalidArgument { .. }), "{:?}", errors[1]);
            let CommError::PeerFailed { rank: 1, cause, .. } = &errors[0] else { panic!("{:?}", errors[0]) };
            assert_eq!(**cause, errors[1]);
        }
    });
}
