//! What the host backend does when ranks are late, dead, of different minds, or aborted.

#![cfg(feature = "host-backend")]
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod host_backend_support;

use std::sync::Arc;
use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use comm_core::{
    CommError, DType, DeviceAddr, DeviceComm, OpKind, P2pOp, ReduceOp, StreamHandle, run_threads,
};
use host_backend_support::{TRANSPORTS, context, create};

const S: StreamHandle = StreamHandle::NULL;
const T: Duration = Duration::from_millis(700);

fn on_ranks(size: usize, transport: &str, checked: bool, rank_main: impl Fn(Arc<dyn DeviceComm>) + Sync) {
    run_threads(size, Duration::from_secs(10), |host| {
        rank_main(create(&context(host, transport, T, checked)))
    })
    .unwrap();
}

/// An all-reduce of `count` ones.
fn sum(comm: &dyn DeviceComm, count: usize) -> Result<(), CommError> {
    let mut buffer = vec![1_f32; count];
    let place = DeviceAddr::of_slice_mut(&mut buffer);
    // SAFETY: in place in a vector of `count` elements.
    unsafe { comm.all_reduce(place, place, count, DType::F32, ReduceOp::Sum, S)? };
    assert!(buffer.iter().all(|x| *x == comm.size() as f32));
    Ok(())
}

#[test]
fn a_late_rank_is_named_and_a_new_communicator_works() {
    for transport in TRANSPORTS {
        for count in [10, 2_000_000] {
            let failed = AtomicUsize::new(0);
            run_threads(4, Duration::from_secs(10), |host| {
                let comm = create(&context(host.clone(), transport, T, false));
                sum(&*comm, count).unwrap();
                if host.rank() != 2 {
                    let start = Instant::now();
                    let error = sum(&*comm, count).unwrap_err();
                    let waited = start.elapsed();
                    failed.fetch_add(1, Ordering::SeqCst);
                    assert!(
                        matches!(&error, CommError::Timeout { missing, at, .. }
                        if *missing == [2] && at.op == OpKind::AllReduce && at.seq == 1),
                        "{error:?}"
                    );
                    assert!(waited >= T && waited < T + Duration::from_millis(500), "{waited:?}");
                    assert_eq!(sum(&*comm, 1), Err(error.clone()), "the failure stays");
                    assert_eq!(comm.poll(), Err(error.clone()));
                    assert_eq!(comm.close(), Err(error), "and a close reports it, as of any backend");
                } else {
                    // Not for a time of its own: on a busy machine the others may begin much later.
                    let start = Instant::now();
                    while failed.load(Ordering::SeqCst) < 3 && start.elapsed() < 8 * T {
                        std::thread::sleep(Duration::from_millis(5));
                    }
                    let error = sum(&*comm, count).unwrap_err();
                    assert!(
                        matches!(error, CommError::PeerFailed { .. } | CommError::PeerDied { .. }),
                        "{error:?}"
                    );
                }
                drop(comm);
                // That it works is the point, not how fast.
                let again = create(&context(host, transport, Duration::from_secs(10), false));
                sum(&*again, count).unwrap();
                again.close().unwrap();
            })
            .unwrap();
        }
    }
}

#[test]
fn a_rank_that_leaves_is_named_at_once() {
    for transport in TRANSPORTS {
        for size in [2, 4] {
            on_ranks(size, transport, false, |comm| {
                sum(&*comm, 100_000).unwrap();
                if comm.rank() == 1 {
                    std::thread::sleep(Duration::from_millis(50));
                    return;
                }
                let start = Instant::now();
                let error = sum(&*comm, 100_000).unwrap_err();
                assert!(matches!(error, CommError::PeerDied { rank: 1, .. }), "{error:?}");
                assert!(start.elapsed() < T - Duration::from_millis(100), "{:?}", start.elapsed());
                assert!(comm.poll().is_err());
            });
        }
    }
}

#[test]
fn a_rank_that_leaves_in_the_middle_of_a_transfer() {
    for transport in TRANSPORTS {
        on_ranks(2, transport, false, |comm| {
            if comm.rank() == 1 {
                return;
            }
            let buffer = vec![0_u8; 1 << 20];
            // SAFETY: the vector holds that many bytes.
            let error = unsafe {
                comm.send(DeviceAddr::of_slice(&buffer), buffer.len(), DType::U8, 1, S).unwrap_err()
            };
            assert!(matches!(error, CommError::PeerDied { rank: 1, .. }), "{error:?}");
        });
    }
}

#[test]
fn calls_that_differ_are_refused_everywhere_and_do_no_harm() {
    for transport in TRANSPORTS {
        for count in [4, 100_000] {
            on_ranks(3, transport, true, |comm| {
                let rank = comm.rank();
                let mut buffer = vec![7_f32; 3 * count + 3];
                let place = DeviceAddr::of_slice_mut(&mut buffer);
                let odd = rank == 1;
                let (f32, i32) = (DType::F32, DType::I32);
                let (min, max) = (ReduceOp::Min, ReduceOp::Max);
                // SAFETY: all operands lie in the vector.
                let results = unsafe {
                    [
                        comm.all_reduce(place, place, count + usize::from(odd), f32, max, S),
                        comm.all_reduce(place, place, count, if odd { i32 } else { f32 }, max, S),
                        comm.all_reduce(place, place, count, f32, if odd { min } else { max }, S),
                        comm.broadcast(place, place, count, f32, usize::from(odd), S),
                        if odd { comm.barrier(S) } else { comm.all_reduce(place, place, count, f32, max, S) },
                    ]
                };
                for (index, result) in results.into_iter().enumerate() {
                    let error = result.unwrap_err();
                    let culprit = if odd { 0 } else { 1 };
                    assert!(
                        matches!(&error, CommError::Mismatch { rank, expected, found, .. }
                            if *rank == culprit && expected != found),
                        "{index}: {error:?}"
                    );
                }
                assert!(buffer.iter().all(|x| *x == 7.0), "no data moved");
                sum(&*comm, count).unwrap();
                comm.close().unwrap();
            });
        }
    }
}

#[test]
fn transfers_that_differ_are_refused_on_both_sides() {
    for transport in TRANSPORTS {
        on_ranks(2, transport, true, |comm| {
            for count in [3, 100_000] {
                let mut buffer = vec![comm.rank() as f32; count];
                let addr = DeviceAddr::of_slice_mut(&mut buffer);
                // SAFETY: at most `count` elements of the vector.
                let result = unsafe {
                    match comm.rank() {
                        0 => comm.send(addr, count, DType::F32, 1, S),
                        _ => comm.recv(addr, count - 1, DType::F32, 0, S),
                    }
                };
                let other = 1 - comm.rank();
                assert!(
                    matches!(result, Err(CommError::Mismatch { rank, .. }) if rank == other),
                    "{result:?}"
                );
                assert!(buffer.iter().all(|x| *x == comm.rank() as f32), "no data moved");
                let op = match comm.rank() {
                    0 => P2pOp::Send { addr, count, dtype: DType::F32, peer: 1 },
                    _ => P2pOp::Recv { addr, count, dtype: DType::F32, peer: 0 },
                };
                // SAFETY: as above.
                unsafe { comm.group(&[op], S).unwrap() };
                assert!(buffer.iter().all(|x| *x == 0.0));
            }
            comm.close().unwrap();
        });
    }
}

#[test]
fn an_abort_ends_every_wait() {
    for transport in TRANSPORTS {
        on_ranks(3, transport, false, |comm| {
            sum(&*comm, 10).unwrap();
            let start = Instant::now();
            let error = match comm.rank() {
                0 => std::thread::scope(|scope| {
                    let waiting = scope.spawn(|| sum(&*comm, 10).unwrap_err());
                    std::thread::sleep(Duration::from_millis(100));
                    comm.abort();
                    waiting.join().unwrap()
                }),
                1 => sum(&*comm, 10).unwrap_err(),
                // Not in any call when it happens.
                _ => {
                    std::thread::sleep(Duration::from_millis(250));
                    assert!(comm.poll().is_err());
                    sum(&*comm, 10).unwrap_err()
                }
            };
            assert!(start.elapsed() < T, "{:?}", start.elapsed());
            match comm.rank() {
                0 => assert!(matches!(error, CommError::Aborted { .. }), "{error:?}"),
                _ => assert!(matches!(error, CommError::PeerFailed { rank: 0, .. }), "{error:?}"),
            }
            assert_eq!(comm.close(), Err(error));
        });
    }
}

#[test]
fn an_abort_ends_a_close_and_a_split() {
    for transport in TRANSPORTS {
        for splits in [false, true] {
            on_ranks(2, transport, false, |comm| {
                if comm.rank() == 1 {
                    std::thread::sleep(Duration::from_millis(300));
                    return;
                }
                std::thread::scope(|scope| {
                    let waiting = scope.spawn(|| {
                        if splits { comm.split(Some(0), 0).map(drop) } else { comm.close() }.unwrap_err()
                    });
                    std::thread::sleep(Duration::from_millis(50));
                    let start = Instant::now();
                    comm.abort();
                    let error = waiting.join().unwrap();
                    assert!(matches!(error, CommError::Aborted { .. }), "{error:?}");
                    assert!(start.elapsed() < Duration::from_millis(200));
                });
            });
        }
    }
}

#[test]
fn two_threads_on_one_communicator_take_turns() {
    for transport in TRANSPORTS {
        on_ranks(2, transport, false, |comm| {
            std::thread::scope(|scope| {
                for _ in 0..2 {
                    scope.spawn(|| {
                        for _ in 0..200 {
                            sum(&*comm, 999).unwrap();
                        }
                    });
                }
            });
            comm.close().unwrap();
        });
    }
}

#[test]
fn handles_may_be_dropped_in_any_order() {
    let gate = Barrier::new(3);
    for transport in TRANSPORTS {
        for first in 0..3 {
            on_ranks(3, transport, false, |comm| {
                let group = comm.split(Some(0), 0).unwrap().unwrap();
                sum(&*group, 50_000).unwrap();
                gate.wait();
                std::thread::sleep(Duration::from_millis(((comm.rank() + first) % 3) as u64 * 5));
                let start = Instant::now();
                if first == 1 {
                    drop(comm);
                    drop(group);
                } else {
                    drop(group);
                    drop(comm);
                }
                assert!(start.elapsed() < Duration::from_millis(500));
            });
        }
    }
}

#[test]
fn descriptors_and_mappings_are_given_back() {
    let count = |path: &str| std::fs::read_dir(path).unwrap().count();
    let mappings = || {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        maps.lines().filter(|line| line.contains("memfd:host-backend")).count()
    };
    // Other tests of this program hold communicators of their own for a while.
    let settled = |what: &dyn Fn() -> bool| {
        (0..600).any(|_| {
            std::thread::sleep(Duration::from_millis(25));
            what()
        })
    };
    on_ranks(2, "shm", false, |comm| {
        let _allocated = comm.allocate(1 << 20).unwrap();
        sum(&*comm, 10).unwrap();
    });
    assert!(settled(&|| mappings() == 0), "{} mappings left", mappings());
    assert!(settled(&|| count("/proc/self/fd") < 40), "{} descriptors left", count("/proc/self/fd"));
}

#[test]
fn a_rank_that_learns_of_a_death_by_polling_is_not_blamed_for_leaving() {
    for transport in TRANSPORTS {
        let left = Barrier::new(3);
        on_ranks(3, transport, false, |comm| {
            sum(&*comm, 10).unwrap();
            let rank = comm.rank();
            // The last rank leaves first, then the one that a search in rank order meets first.
            if rank == 2 {
                drop(comm);
                left.wait();
                return;
            }
            if rank == 0 {
                let limit = Instant::now() + Duration::from_secs(10);
                let error = loop {
                    match comm.poll() {
                        Err(error) => break error,
                        Ok(()) => assert!(Instant::now() < limit, "the departure was never noticed"),
                    }
                };
                assert!(matches!(error, CommError::PeerDied { rank: 2, .. }), "{error:?}");
                assert_eq!(sum(&*comm, 10), Err(error), "the failure stays");
                drop(comm);
                left.wait();
                return;
            }
            left.wait();
            let error = sum(&*comm, 10).unwrap_err();
            assert!(matches!(error, CommError::PeerDied { rank: 2, .. }), "{error:?}");
        });
    }
}
