//! Ranks as processes: deaths, stops, launch by environment variables, and what is left behind.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, reason = "tests")]

mod host_comm_util;

use std::time::{Duration, Instant};

use comm_core::{CommError, Deadline, HostComm, HostCommExt, Rendezvous, RendezvousAddress};
use host_comm_util::process::{Job, is_rank, tell};
use host_comm_util::{Kind, within};
use rustix::process::Signal;

const LIMIT: Duration = Duration::from_secs(40);
/// Longer than any test, so that only a signal ends such a wait.
const LONG: Duration = Duration::from_secs(60);
const T: Duration = Duration::from_secs(1);

/// A death is noticed within a second on every survivor, whether it is in a call, polls, or calls in a group that the
/// hub's rank is not in; then the survivors make a new communicator.
#[test]
fn a_killed_rank_died_on_every_survivor() {
    if is_rank() {
        return survive(&Rendezvous::from_env().unwrap());
    }
    within(LIMIT, || {
        let jobs = Kind::SOCKETS.into_iter().flat_map(|kind| (0..4).map(move |victim| (kind, victim)));
        for (kind, victim) in jobs {
            let job = Job::start("a_killed_rank_died_on_every_survivor", 4, kind, LONG);
            (0..4).for_each(|rank| drop(job.report(rank, "ready", LIMIT)));
            // Long enough for those that call to be waiting.
            std::thread::sleep(Duration::from_millis(50));
            let killed = Instant::now();
            job.signal(victim, Signal::KILL);
            for rank in (0..4).filter(|rank| *rank != victim) {
                let error = job.report(rank, "error", LIMIT);
                let elapsed = killed.elapsed();
                let expected = format!("rank {victim} died");
                assert!(
                    error.contains(&expected) && error.contains("world"),
                    "{kind:?} victim {victim} rank {rank}: {error}"
                );
                assert!(elapsed < Duration::from_secs(1), "{kind:?} rank {rank} noticed after {elapsed:?}");
                assert_eq!(job.report(rank, "again", LIMIT), "3");
            }
        }
    });
}

fn survive(meeting: &Rendezvous) {
    let comm = meeting.connect().unwrap();
    comm.barrier(Deadline::after(LONG)).unwrap();
    tell("ready", "");
    let error = if comm.rank().is_multiple_of(2) {
        loop {
            if let Err(error) = comm.poll() {
                break error;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    } else {
        comm.barrier(Deadline::after(LONG)).unwrap_err()
    };
    tell("error", &error.to_string());
    let comm_core::CommError::PeerDied { rank: dead, .. } = error else { panic!("{error}") };
    drop(comm);
    let address = match &meeting.address {
        RendezvousAddress::Unix(path) => RendezvousAddress::Unix(path.with_file_name("again")),
        RendezvousAddress::Tcp { host, port } => RendezvousAddress::Tcp { host: host.clone(), port: *port },
    };
    let rank = meeting.rank - usize::from(meeting.rank > dead);
    let again = Rendezvous { address, rank, size: meeting.size - 1, ..meeting.clone() };
    let comm = again.connect().unwrap();
    let ranks = comm.all_gather(&rank).unwrap();
    tell("again", &ranks.len().to_string());
}

#[test]
fn a_death_is_known_in_groups_that_rank_0_is_not_in() {
    if is_rank() {
        let comm = Rendezvous::from_env().unwrap().connect().unwrap();
        let group = comm.split(Some(u32::from(comm.rank() > 0)), 0, Deadline::after(LONG)).unwrap().unwrap();
        tell("ready", "");
        if comm.rank() == 0 {
            std::thread::sleep(LONG);
        }
        group.barrier(Deadline::after(LONG)).unwrap();
        let own = group.all_gather_bytes(&[], Deadline::after(LONG)).and_then(|_| {
            if comm.rank() == 1 {
                std::thread::sleep(LONG)
            }
            group.barrier(Deadline::after(LONG))
        });
        tell("error", &own.unwrap_err().to_string());
        return;
    }
    within(LIMIT, || {
        for (victim, expected) in [(0, ["\"world\"", "rank 0 died"]), (1, ["\"world/0.1\"", "rank 0 died"])] {
            let job = Job::start("a_death_is_known_in_groups_that_rank_0_is_not_in", 4, Kind::Unix, LONG);
            (0..4).for_each(|rank| drop(job.report(rank, "ready", LIMIT)));
            std::thread::sleep(Duration::from_millis(100));
            let killed = Instant::now();
            job.signal(victim, Signal::KILL);
            for rank in 2..4 {
                let error = job.report(rank, "error", LIMIT);
                assert!(expected.iter().all(|part| error.contains(part)), "{error}");
                assert!(killed.elapsed() < Duration::from_secs(1));
            }
        }
    });
}

#[test]
fn a_stopped_rank_is_missing_after_the_timeout() {
    if is_rank() {
        let comm = Rendezvous::from_env().unwrap().connect().unwrap();
        comm.barrier(Deadline::after(LONG)).unwrap();
        tell("ready", "");
        // The parent stops one rank in this pause; large contributions then fill the sockets' buffers.
        while std::fs::metadata(std::env::var("COMM_TEST_RESULTS").unwrap() + "/go").is_err() {
            std::thread::sleep(Duration::from_millis(2));
        }
        let start = Instant::now();
        let bytes = vec![1; 4 << 20];
        let error = comm.all_gather_bytes(&bytes, Deadline::after(T)).unwrap_err();
        tell("error", &format!("{} {error}", start.elapsed().as_millis()));
        // All messages pass through rank 0's process, so it must not end before the others have timed out too.
        std::thread::sleep(LONG);
        return;
    }
    within(LIMIT, || {
        let start = |kind| {
            move |victim| {
                (kind, victim, Job::start("a_stopped_rank_is_missing_after_the_timeout", 3, kind, LONG))
            }
        };
        for (kind, victim, job) in Kind::SOCKETS.into_iter().flat_map(|kind| (0..3).map(start(kind))) {
            (0..3).for_each(|rank| drop(job.report(rank, "ready", LIMIT)));
            job.signal(victim, Signal::STOP);
            std::fs::write(job.results.path().join("go"), "").unwrap();
            for rank in (0..3).filter(|rank| *rank != victim) {
                let report = job.report(rank, "error", LIMIT);
                let (millis, error) = report.split_once(' ').unwrap();
                assert!(
                    error.contains(&format!("no sign of rank(s) [{victim}]")),
                    "{kind:?} {rank}: {error}"
                );
                assert!((1000..1500).contains(&millis.parse::<u64>().unwrap()), "{kind:?} {rank}: {report}");
            }
            job.signal(victim, Signal::KILL);
        }
    });
}

/// Rank 0's process carries everyone's messages and yet may end as soon as its own last call has returned.
#[test]
fn rank_0_has_its_answer_only_once_the_others_have_theirs() {
    if is_rank() {
        let comm = Rendezvous::from_env().unwrap().connect().unwrap();
        // More than the sockets' buffers hold, to readers that are slower than rank 0.
        let bytes = vec![comm.rank() as u8; 8 << 20];
        let all = comm.all_gather_bytes(&bytes, Deadline::after(LONG));
        if comm.rank() == 0 {
            // Not even dropping the handle.
            std::process::exit(i32::from(all.is_err()));
        }
        let all = all.unwrap();
        assert!(all.iter().enumerate().all(|(rank, bytes)| bytes.iter().all(|byte| *byte == rank as u8)));
        return;
    }
    within(LIMIT, || {
        for kind in Kind::SOCKETS {
            let test = "rank_0_has_its_answer_only_once_the_others_have_theirs";
            let mut job = Job::start(test, 4, kind, LONG);
            (0..4).for_each(|rank| job.join(rank));
        }
    });
}

/// Two jobs launched as torchrun would, with the same address and port and no token: told apart by their ids.
#[test]
fn jobs_with_torchruns_variables_meet_and_do_not_mix() {
    if is_rank() {
        let meeting = Rendezvous::from_env().unwrap();
        assert!(!format!("{meeting:?}").contains(&meeting.token.to_hex()));
        let comm = meeting.connect().unwrap();
        assert!(comm.can_exchange_fds(), "ranks of one host did not meet at a unix socket");
        for _ in 0..50 {
            let jobs = comm.all_gather(&std::env::var("COMM_JOB_ID").unwrap()).unwrap();
            assert_eq!(jobs, vec![meeting.job.clone(); 3]);
        }
        assert_eq!(comm_core::local_rank_from_env().unwrap(), 5);
        tell("done", "");
        return;
    }
    within(LIMIT, || {
        let runtime = tempfile::tempdir().unwrap();
        let start = |id: &str| {
            let vars = [
                ("MASTER_ADDR", "127.0.0.1".to_string()),
                ("MASTER_PORT", "29500".into()),
                ("LOCAL_RANK", "5".into()),
                ("COMM_JOB_ID", id.into()),
                ("COMM_TIMEOUT_SECS", "20".into()),
                ("XDG_RUNTIME_DIR", runtime.path().display().to_string()),
            ];
            let test = "jobs_with_torchruns_variables_meet_and_do_not_mix";
            Job::start_with(test, 3, &vars, tempfile::tempdir().unwrap())
        };
        for mut job in [start("a"), start("b")] {
            (0..3).for_each(|rank| job.join(rank));
            (0..3).for_each(|rank| drop(job.report(rank, "done", LIMIT)));
        }
        let left: Vec<_> = std::fs::read_dir(runtime.path().join("comm")).unwrap().collect();
        assert!(left.is_empty(), "left behind: {left:?}");
    });
}

/// A token file that a killed rank 0 has left is not taken for the new job's.
#[test]
fn a_token_left_by_a_dead_process_is_not_used() {
    if is_rank() {
        if std::env::var("RANK").unwrap() == "0" {
            std::thread::sleep(Duration::from_millis(300));
        }
        let meeting = Rendezvous::from_env().unwrap();
        if std::env::var("COMM_TEST_DIE").is_ok() {
            tell("ready", "");
            std::thread::sleep(LONG);
        }
        meeting.connect().unwrap().barrier(Deadline::after(LONG)).unwrap();
        return;
    }
    within(LIMIT, || {
        let runtime = tempfile::tempdir().unwrap();
        let vars = [
            ("MASTER_ADDR", "localhost".to_string()),
            ("MASTER_PORT", "29500".into()),
            ("COMM_TIMEOUT_SECS", "20".into()),
            ("XDG_RUNTIME_DIR", runtime.path().display().to_string()),
        ];
        let test = "a_token_left_by_a_dead_process_is_not_used";
        let die = [&vars[..], &[("COMM_TEST_DIE", "1".to_string())]].concat();
        let dead = Job::start_with(test, 1, &die, tempfile::tempdir().unwrap());
        dead.report(0, "ready", LIMIT);
        drop(dead);
        assert_eq!(
            std::fs::read_dir(runtime.path().join("comm")).unwrap().count(),
            1,
            "nothing was left behind"
        );
        let mut job = Job::start_with(test, 2, &vars, tempfile::tempdir().unwrap());
        (0..2).for_each(|rank| job.join(rank));
    });
}

/// Making, using and dropping communicators leaves no descriptor and no thread behind. In a process of its own, where
/// no other test opens any.
#[test]
fn nothing_is_left_behind() {
    if is_rank() {
        let count = |what: &str| std::fs::read_dir(format!("/proc/self/{what}")).unwrap().count();
        let settle = |what: &str, expected: usize| {
            let start = Instant::now();
            while count(what) > expected && start.elapsed() < Duration::from_secs(5) {
                std::thread::sleep(Duration::from_millis(5));
            }
            assert_eq!(count(what), expected, "{what}");
        };
        let (fds, threads) = (count("fd"), count("task"));
        for round in 0..20 {
            let kind = Kind::SOCKETS[round % 2];
            host_comm_util::run(kind, 4, T * 10, |comm| {
                let group = comm.split(Some(comm.rank() as u32 % 2), 0, Deadline::after(T * 10)).unwrap();
                if kind == Kind::Unix {
                    let file = tempfile::tempfile().unwrap();
                    comm.exchange_fds(&[std::os::fd::AsFd::as_fd(&file)], Deadline::after(T * 10)).unwrap();
                }
                comm.barrier(Deadline::after(T * 10)).unwrap();
                if round % 3 == 0 {
                    comm.abort();
                }
                drop(group);
            });
        }
        settle("task", threads);
        settle("fd", fds);
        return;
    }
    within(LIMIT, || {
        let results = tempfile::tempdir().unwrap();
        Job::start_with("nothing_is_left_behind", 1, &[], results).join(0);
    });
}

/// Bytes of a thread's stack.
const STACK: u64 = 64 << 20;

/// Where the system refuses a rank its thread, the caller gets an error and the ranks that did start get theirs.
#[test]
fn a_system_without_threads_is_an_error() {
    if is_rank() {
        use rustix::process::{Resource, Rlimit, setrlimit};
        let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
        let used: u64 = pages.split(' ').next().unwrap().parse::<u64>().unwrap() * 4096;
        // Half a stack is left when there is no room for another one: a process that runs out altogether aborts.
        let limit = Some(used + 10 * STACK + STACK / 2);
        setrlimit(Resource::As, Rlimit { current: limit, maximum: limit }).unwrap();
        let started = std::sync::atomic::AtomicUsize::new(0);
        let outcome = comm_core::run_threads(2000, LONG, |comm| {
            started.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            assert!(matches!(comm.barrier(Deadline::after(LONG)), Err(CommError::PeerDied { .. })));
        });
        assert!(matches!(outcome, Err(CommError::Io { .. })), "{outcome:?}");
        assert!(started.into_inner() > 0);
        return;
    }
    within(LIMIT, || {
        let results = tempfile::tempdir().unwrap();
        // The allocator would take as much as a stack for the sake of each thread.
        let vars = [("RUST_MIN_STACK", STACK.to_string()), ("MALLOC_ARENA_MAX", "1".to_owned())];
        Job::start_with("a_system_without_threads_is_an_error", 1, &vars, results).join(0);
    });
}
