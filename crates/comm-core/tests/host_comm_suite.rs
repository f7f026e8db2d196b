//! What every host communicator does, run on each of them: threads, unix socket, TCP.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, reason = "tests")]

mod host_comm_util;

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use comm_core::{CommError, Deadline, HostCommExt, HostReduceOp, OpKind};
use host_comm_util::{Kind, create, run, within};

const T: Duration = Duration::from_secs(10);
const LIMIT: Duration = Duration::from_secs(30);

/// A test for each kind of communicator.
macro_rules! for_each_kind {
    ($($name:ident),* $(,)?) => {
        mod threads { $(#[test] fn $name() { super::within(super::LIMIT, || super::$name(super::Kind::Thread)); })* }
        mod unix { $(#[test] fn $name() { super::within(super::LIMIT, || super::$name(super::Kind::Unix)); })* }
        mod tcp { $(#[test] fn $name() { super::within(super::LIMIT, || super::$name(super::Kind::Tcp)); })* }
    };
}

for_each_kind!(
    values_of_different_lengths_reach_all,
    large_values_reach_all,
    broadcast_takes_the_roots_value_only,
    reductions_are_in_rank_order,
    barrier_holds_all_back,
    split_groups_have_names_orders_and_calls_of_their_own,
    groups_of_32_ranks_by_4,
    nested_groups_outlive_their_parents,
    descriptors_are_exchanged_where_possible,
    different_calls_are_a_mismatch,
    different_roots_are_a_mismatch,
    a_timeout_names_the_missing_in_time,
    a_deadline_of_the_caller_s_counts_before_the_timeout,
    after_a_failure_calls_repeat_it,
    others_blame_the_missing_rank_and_not_the_first_to_notice,
    abort_from_another_thread_ends_all_waits,
    a_reported_failure_ends_all_waits_and_shows_in_poll,
    a_failure_in_one_group_leaves_others_alone,
    a_dropped_handle_is_no_failure_until_it_is_needed,
    a_panicking_rank_died,
    calls_from_several_threads_are_serialised,
    a_world_of_one,
    many_small_calls,
);

fn values_of_different_lengths_reach_all(kind: Kind) {
    let results = run(kind, 4, T, |comm| {
        let mine = vec![comm.rank() as u8; comm.rank() * 1000];
        (
            comm.all_gather_bytes(&mine, Deadline::after(T)).unwrap(),
            comm.all_gather(&format!("r{}", comm.rank())).unwrap(),
        )
    });
    for (bytes, texts) in results {
        assert_eq!(bytes, (0..4).map(|r| vec![r as u8; r * 1000]).collect::<Vec<_>>());
        assert_eq!(texts, ["r0", "r1", "r2", "r3"]);
    }
}

fn large_values_reach_all(kind: Kind) {
    let pattern =
        |rank: usize| (0..3_000_001_u32 + rank as u32).map(|i| (i as usize * 7 + rank) as u8).collect();
    let results = run(kind, 3, T, |comm| {
        let mine: Vec<u8> = pattern(comm.rank());
        comm.all_gather_bytes(&mine, Deadline::after(T)).unwrap()
    });
    let expected: Vec<Vec<u8>> = (0..3).map(pattern).collect();
    assert!(results.iter().all(|all| *all == expected));
}

fn broadcast_takes_the_roots_value_only(kind: Kind) {
    let results = run(kind, 3, T, |comm| {
        let by_root: Vec<u64> =
            (0..3).map(|root| comm.broadcast(Some(&(comm.rank() as u64 + 10)), root).unwrap()).collect();
        let refused = comm.broadcast_bytes(&[], 3, Deadline::after(T));
        assert!(matches!(refused, Err(CommError::InvalidArgument { .. })), "{refused:?}");
        comm.barrier(Deadline::after(T)).unwrap();
        by_root
    });
    assert_eq!(results, vec![vec![10, 11, 12]; 3]);
}

fn reductions_are_in_rank_order(kind: Kind) {
    let results = run(kind, 4, T, |comm| {
        let mine = [comm.rank() as f64 + 0.1, -(comm.rank() as f64)];
        let reduce = |op| comm.all_reduce(&mine, op).unwrap();
        (reduce(HostReduceOp::Sum), reduce(HostReduceOp::Min), reduce(HostReduceOp::Max))
    });
    let sum = vec![0.1 + 1.1 + 2.1 + 3.1, -6.0];
    assert_eq!(results, vec![(sum, vec![0.1, -3.0], vec![3.1, 0.0]); 4]);
}

fn barrier_holds_all_back(kind: Kind) {
    let waited = run(kind, 3, T, |comm| {
        let start = Instant::now();
        if comm.rank() == 1 {
            std::thread::sleep(Duration::from_millis(200));
        }
        comm.barrier(Deadline::after(T)).unwrap();
        start.elapsed()
    });
    assert!(waited.iter().all(|waited| *waited >= Duration::from_millis(190)), "{waited:?}");
}

fn split_groups_have_names_orders_and_calls_of_their_own(kind: Kind) {
    let results = run(kind, 5, T, |comm| {
        let color = [Some(0), Some(1), Some(0), Some(1), None][comm.rank()];
        // Keys turn the order round in group 0 and are equal in group 1.
        let key = if color == Some(0) { -(comm.rank() as i64) } else { 0 };
        let group = comm.split(color, key, Deadline::after(T)).unwrap()?;
        for call in 0..color.unwrap() * 3 + 1 {
            assert_eq!(group.all_gather(&call).unwrap(), vec![call; 2]);
        }
        Some((group.name().to_string(), group.rank(), group.size(), group.all_gather(&comm.rank()).unwrap()))
    });
    let group =
        |color, rank, members: [usize; 2]| Some((format!("world/0.{color}"), rank, 2, members.to_vec()));
    let expected = [group(0, 1, [2, 0]), group(1, 0, [1, 3]), group(0, 0, [2, 0]), group(1, 1, [1, 3]), None];
    assert_eq!(results, expected);
}

fn groups_of_32_ranks_by_4(kind: Kind) {
    let results = run(kind, 32, T, |comm| {
        let group = comm.split(Some(comm.rank() as u32 / 4), 0, Deadline::after(T)).unwrap().unwrap();
        (group.name().to_string(), group.all_reduce(&[comm.rank() as u64], HostReduceOp::Sum).unwrap()[0])
    });
    for (rank, (name, sum)) in results.into_iter().enumerate() {
        let first = rank as u64 / 4 * 4;
        assert_eq!((name, sum), (format!("world/0.{}", rank / 4), 4 * first + 6));
    }
}

fn nested_groups_outlive_their_parents(kind: Kind) {
    run(kind, 4, T, |comm| {
        let rank = comm.rank() as u32;
        let half = comm.split(Some(rank / 2), 0, Deadline::after(T)).unwrap().unwrap();
        let again = half.split(Some(7), 0, Deadline::after(T)).unwrap().unwrap();
        drop(half);
        assert_eq!(again.name(), format!("world/0.{}/0.7", rank / 2));
        assert_eq!(again.all_gather(&rank).unwrap(), [rank / 2 * 2, rank / 2 * 2 + 1]);
        // All messages pass through rank 0's process, which therefore leaves last.
        comm.barrier(Deadline::after(T)).unwrap();
    });
}

fn descriptors_are_exchanged_where_possible(kind: Kind) {
    run(kind, 3, T, |comm| {
        assert_eq!(comm.can_exchange_fds(), kind != Kind::Tcp);
        let mut file = tempfile::tempfile().unwrap();
        let fds = vec![file.as_fd(); comm.rank()];
        let exchanged = comm.exchange_fds(&fds, Deadline::after(T));
        if kind == Kind::Tcp {
            assert!(matches!(exchanged, Err(CommError::Unsupported { op: OpKind::HostExchangeFds, .. })));
            return;
        }
        let exchanged = exchanged.unwrap();
        assert_eq!(exchanged.iter().map(Vec::len).collect::<Vec<_>>(), [0, 1, 2]);
        // The descriptors name the very files: what their owner writes can be read through them.
        write!(file, "from rank {}", comm.rank()).unwrap();
        comm.barrier(Deadline::after(T)).unwrap();
        for (rank, fds) in exchanged.into_iter().enumerate() {
            for fd in fds {
                use std::os::unix::fs::FileExt;
                assert!(rustix::io::fcntl_getfd(&fd).unwrap().contains(rustix::io::FdFlags::CLOEXEC));
                let mut text = [0; 11];
                std::fs::File::from(fd).read_exact_at(&mut text, 0).unwrap();
                assert_eq!(text, *format!("from rank {rank}").as_bytes());
            }
        }
        comm.barrier(Deadline::after(T)).unwrap();
        let many: Vec<_> = std::iter::repeat_n(file.as_fd(), 64).collect();
        let exchanged = comm.exchange_fds(&many, Deadline::after(T)).unwrap();
        assert!(exchanged.iter().all(|fds| fds.len() == 64));
        let mut rest = String::new();
        file.read_to_string(&mut rest).unwrap();
    });
}

fn different_calls_are_a_mismatch(kind: Kind) {
    let errors = run(kind, 2, T, |comm| {
        if comm.rank() == 0 {
            return comm.barrier(Deadline::after(T)).unwrap_err();
        }
        std::thread::sleep(Duration::from_millis(100));
        let first = comm.all_gather(&1).unwrap_err();
        assert_eq!(comm.barrier(Deadline::after(T)).unwrap_err(), first);
        first
    });
    let CommError::Mismatch { at, rank: 0, expected, found } = &errors[1] else { panic!("{:?}", errors[1]) };
    assert_eq!((at.seq, &**expected, &**found), (0, "host_all_gather", "host_barrier"));
    let CommError::PeerFailed { rank: 1, cause, .. } = &errors[0] else { panic!("{:?}", errors[0]) };
    assert!(matches!(**cause, CommError::Mismatch { .. }), "{cause:?}");
}

fn different_roots_are_a_mismatch(kind: Kind) {
    let errors = run(kind, 2, T, |comm| comm.broadcast(Some(&1), comm.rank()).unwrap_err());
    let is_mismatch =
        |error: &CommError| matches!(error, CommError::Mismatch { found, .. } if found.contains("root"));
    assert!(errors.iter().any(is_mismatch), "{errors:?}");
}

fn a_timeout_names_the_missing_in_time(kind: Kind) {
    let wait = Duration::from_millis(500);
    let arrived = Barrier::new(4);
    let results = run(kind, 4, T, |comm| {
        comm.barrier(Deadline::after(T)).unwrap();
        let start = Instant::now();
        let error = (comm.rank() % 2 == 0).then(|| comm.barrier(Deadline::after(wait)).unwrap_err());
        let elapsed = start.elapsed();
        arrived.wait();
        error.map(|error| (error, elapsed))
    });
    for (error, elapsed) in results.into_iter().flatten() {
        let CommError::Timeout { at, missing, waited } = &error else { panic!("{error:?}") };
        assert_eq!((&*at.comm, at.op, at.seq, &**missing), ("world", OpKind::HostBarrier, 1, &[1, 3][..]));
        assert!(
            *waited >= wait && elapsed >= wait && elapsed <= wait + Duration::from_millis(500),
            "{elapsed:?}"
        );
    }
}

fn a_deadline_of_the_caller_s_counts_before_the_timeout(kind: Kind) {
    let done = Barrier::new(2);
    run(kind, 2, T, |comm| {
        assert_eq!(comm.all_gather_by(&comm.rank(), Deadline::after(T)).unwrap(), [0, 1]);
        if comm.rank() == 0 {
            let start = Instant::now();
            let error = comm.all_gather_by(&0, Deadline::after(T / 20)).unwrap_err();
            assert!(matches!(&error, CommError::Timeout { missing, .. } if *missing == [1]), "{error:?}");
            assert!(start.elapsed() < T / 2, "{:?}", start.elapsed());
        }
        done.wait();
    });
}

fn after_a_failure_calls_repeat_it(kind: Kind) {
    let done = Barrier::new(2);
    run(kind, 2, T, |comm| {
        if comm.rank() == 0 {
            let first = comm.barrier(Deadline::after(Duration::from_millis(100))).unwrap_err();
            assert_eq!(comm.all_gather(&1).unwrap_err(), first);
            assert_eq!(comm.poll().unwrap_err(), first);
        }
        done.wait();
    });
}

fn others_blame_the_missing_rank_and_not_the_first_to_notice(kind: Kind) {
    let done = Barrier::new(3);
    let errors = run(kind, 3, T, |comm| {
        let error = match comm.rank() {
            0 => Some(comm.barrier(Deadline::after(Duration::from_millis(200))).unwrap_err()),
            1 => Some(comm.barrier(Deadline::after(Duration::from_millis(500))).unwrap_err()),
            _ => None,
        };
        done.wait();
        error
    });
    for error in errors.into_iter().flatten() {
        assert!(matches!(&error, CommError::Timeout { missing, .. } if *missing == [2]), "{error:?}");
    }
}

fn abort_from_another_thread_ends_all_waits(kind: Kind) {
    let (done, start) = (Barrier::new(3), Instant::now());
    let errors = run(kind, 3, T, |comm| {
        let error = match comm.rank() {
            0 => std::thread::scope(|scope| {
                scope.spawn(|| {
                    std::thread::sleep(Duration::from_millis(100));
                    comm.abort();
                });
                Some(comm.barrier(Deadline::after(T)).unwrap_err())
            }),
            1 => Some(comm.barrier(Deadline::after(T)).unwrap_err()),
            _ => None,
        };
        done.wait();
        error
    });
    assert!(start.elapsed() < Duration::from_secs(3));
    assert!(matches!(errors[0], Some(CommError::Aborted { .. })), "{errors:?}");
    let Some(CommError::PeerFailed { rank: 0, cause, .. }) = &errors[1] else { panic!("{errors:?}") };
    assert!(matches!(**cause, CommError::Aborted { .. }), "{cause:?}");
}

fn a_reported_failure_ends_all_waits_and_shows_in_poll(kind: Kind) {
    let done = Barrier::new(3);
    let cause =
        CommError::Cuda { call: "cuLaunchKernel".into(), code: 700, message: "illegal address".into() };
    let errors = run(kind, 3, T, |comm| {
        let error = match comm.rank() {
            0 => {
                std::thread::sleep(Duration::from_millis(100));
                comm.report_failure(&cause);
                comm.barrier(Deadline::after(T)).unwrap_err()
            }
            1 => comm.barrier(Deadline::after(T)).unwrap_err(),
            _ => loop {
                if let Err(error) = comm.poll() {
                    break error;
                }
                std::thread::sleep(Duration::from_millis(5));
            },
        };
        done.wait();
        error
    });
    assert_eq!(errors[0], cause);
    for error in &errors[1..] {
        let CommError::PeerFailed { rank: 0, cause: found, .. } = error else { panic!("{error:?}") };
        assert_eq!(**found, cause);
    }
}

fn a_failure_in_one_group_leaves_others_alone(kind: Kind) {
    run(kind, 4, T, |comm| {
        let group = comm.split(Some(comm.rank() as u32 / 2), 0, Deadline::after(T)).unwrap().unwrap();
        if comm.rank() == 3 {
            group.abort();
        }
        let result = group.barrier(Deadline::after(T));
        assert_eq!(result.is_err(), comm.rank() >= 2, "{result:?}");
        comm.barrier(Deadline::after(T)).unwrap();
        comm.poll().unwrap();
    });
}

fn a_dropped_handle_is_no_failure_until_it_is_needed(kind: Kind) {
    let (dropped, polled) = (Barrier::new(3), Barrier::new(2));
    run(kind, 3, T, |comm| {
        comm.barrier(Deadline::after(T)).unwrap();
        if comm.rank() == 1 {
            drop(comm);
            dropped.wait();
            return;
        }
        dropped.wait();
        std::thread::sleep(Duration::from_millis(50));
        comm.poll().unwrap();
        polled.wait();
        let error = comm.barrier(Deadline::after(T)).unwrap_err();
        assert!(matches!(error, CommError::PeerDied { rank: 1, .. }), "{error:?}");
    });
}

fn a_panicking_rank_died(kind: Kind) {
    let mut comms = create(kind, 2, T).into_iter();
    let (first, second) = (comms.next().unwrap(), comms.next().unwrap());
    let thread = std::thread::spawn(move || {
        let _handle = second;
        std::panic::resume_unwind(Box::new("deliberate"));
    });
    assert!(thread.join().is_err());
    let start = Instant::now();
    let error = loop {
        if let Err(error) = first.poll() {
            break error;
        }
        assert!(start.elapsed() < Duration::from_secs(1), "the death was not noticed");
        std::thread::sleep(Duration::from_millis(5));
    };
    assert!(matches!(error, CommError::PeerDied { rank: 1, .. }), "{error:?}");
}

fn calls_from_several_threads_are_serialised(kind: Kind) {
    run(kind, 2, T, |comm| {
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        assert_eq!(comm.all_gather(&comm.rank()).unwrap(), [0, 1]);
                    }
                });
            }
        });
    });
}

fn a_world_of_one(kind: Kind) {
    run(kind, 1, T, |comm| {
        comm.barrier(Deadline::after(T)).unwrap();
        assert_eq!(comm.all_gather(&5).unwrap(), [5]);
        assert!(comm.split(None, 0, Deadline::after(T)).unwrap().is_none());
        assert_eq!(comm.split(Some(1), 0, Deadline::after(T)).unwrap().unwrap().name(), "world/3.1");
    });
}

fn many_small_calls(kind: Kind) {
    run(kind, 4, T, |comm| {
        for i in 0..500_usize {
            match i % 3 {
                0 => comm.barrier(Deadline::after(T)).unwrap(),
                1 => assert_eq!(comm.all_gather(&(i, comm.rank())).unwrap()[3], (i, 3)),
                _ => assert_eq!(comm.broadcast(Some(&i), i % 4).unwrap(), i),
            }
        }
    });
}
