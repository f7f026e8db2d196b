//! Rendezvous among strangers: taken addresses, garbage, floods, wrong tokens, missing ranks, several jobs.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, reason = "tests")]

mod host_comm_util;

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use comm_core::{CommError, Deadline, HostComm, HostCommExt, Rendezvous, RendezvousAddress, Token};
use host_comm_util::{Kind, connect_all, meeting, within};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

const T: Duration = Duration::from_secs(10);
const LIMIT: Duration = Duration::from_secs(40);

fn check(comms: Vec<comm_core::Result<comm_core::SocketComm>>) {
    let comms: Vec<_> = comms.into_iter().map(Result::unwrap).collect();
    std::thread::scope(|scope| {
        for comm in &comms {
            scope.spawn(|| {
                assert_eq!(comm.all_gather(&comm.rank()).unwrap(), (0..comm.size()).collect::<Vec<_>>());
            });
        }
    });
}

/// A connection of someone who may not be a rank.
trait Stranger: Read + Write + Send {}
impl<S: Read + Write + Send> Stranger for S {}

fn stranger(address: &RendezvousAddress) -> Option<Box<dyn Stranger>> {
    match address {
        RendezvousAddress::Unix(path) => Some(Box::new(UnixStream::connect(path).ok()?)),
        RendezvousAddress::Tcp { host, port } => {
            let target = format!("{host}:{port}").parse().unwrap();
            Some(Box::new(TcpStream::connect_timeout(&target, T).ok()?))
        }
    }
}

fn wait_until_it_listens(address: &RendezvousAddress) {
    let start = Instant::now();
    while stranger(address).is_none() {
        assert!(start.elapsed() < T);
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn an_address_held_by_another_program_is_refused_within_a_second() {
    within(LIMIT, || {
        for kind in Kind::SOCKETS {
            // What the other program does with a connection.
            for behaviour in ["silent", "closes", "talks"] {
                let (meetings, _dir) = meeting(kind, 2, T);
                let serve = move |mut stream: Box<dyn Stranger>| match behaviour {
                    "silent" => std::mem::forget(stream),
                    "closes" => drop(stream),
                    _ => stream.write_all(&[b'x'; 4096]).unwrap_or_default(),
                };
                match &meetings[0].address {
                    RendezvousAddress::Tcp { port, .. } => {
                        let other = TcpListener::bind(("127.0.0.1", *port)).unwrap();
                        std::thread::spawn(move || {
                            other.incoming().for_each(|s| serve(Box::new(s.unwrap())))
                        });
                    }
                    RendezvousAddress::Unix(path) => {
                        std::fs::DirBuilder::new().mode(0o700).create(path.parent().unwrap()).unwrap();
                        let other = UnixListener::bind(path).unwrap();
                        std::thread::spawn(move || {
                            other.incoming().for_each(|s| serve(Box::new(s.unwrap())))
                        });
                    }
                }
                let start = Instant::now();
                let errors: Vec<CommError> =
                    connect_all(&meetings).into_iter().map(|r| r.err().expect("it connected")).collect();
                assert!(
                    start.elapsed() < Duration::from_secs(1),
                    "{kind:?} {behaviour}: {:?}",
                    start.elapsed()
                );
                assert!(matches!(errors[0], CommError::AddrInUse { .. }), "{kind:?} {behaviour}: {errors:?}");
                assert!(
                    matches!(errors[1], CommError::BadHandshake { .. }),
                    "{kind:?} {behaviour}: {errors:?}"
                );
            }
        }
    });
}

#[test]
fn strangers_are_dropped_and_the_job_still_forms() {
    within(LIMIT, || {
        for kind in Kind::SOCKETS {
            let (meetings, _dir) = meeting(kind, 3, T);
            std::thread::scope(|scope| {
                let first = scope.spawn(|| meetings[0].connect());
                wait_until_it_listens(&meetings[0].address);
                let address = &meetings[0].address;
                let silent: Vec<_> = (0..400).filter_map(|_| stranger(address)).collect();
                for bytes in
                    [&[0xff; 4096][..], &[0; 112], b"GET / HTTP/1.1\r\n\r\n", &[0xff, 0xff, 0xff, 0xff]]
                {
                    let mut garbage = stranger(address).unwrap();
                    // The hub may close before all of it is written.
                    let _ = garbage.write_all(bytes);
                    let mut answer = Vec::new();
                    if bytes.len() >= 112 {
                        let _ = garbage.read_to_end(&mut answer);
                        assert!(answer.is_empty(), "the hub answered garbage: {answer:?}");
                    }
                }
                let wrong = |change: &dyn Fn(&mut Rendezvous)| {
                    let mut wrong = meetings[1].clone();
                    change(&mut wrong);
                    match wrong.connect() {
                        Err(CommError::BadHandshake { reason, .. }) => reason,
                        other => panic!("{:?}", other.err()),
                    }
                };
                assert!(wrong(&|w| w.token = Token::random().unwrap()).contains("token"));
                assert!(wrong(&|w| w.job = "other".into()).contains("job"));
                assert!(wrong(&|w| (w.size, w.rank) = (8, 5)).contains("world size"));
                // Of two that are rank 1, one is refused at once and the other waits for rank 2.
                let twins = [(); 2].map(|()| scope.spawn(|| meetings[1].connect()));
                let start = Instant::now();
                while !twins.iter().any(|twin| twin.is_finished()) {
                    assert!(start.elapsed() < T, "neither was refused");
                    std::thread::sleep(Duration::from_millis(2));
                }
                let third = scope.spawn(|| meetings[2].connect());
                let mut twins = twins.map(|twin| twin.join().unwrap());
                twins.sort_by_key(|twin| twin.is_err());
                let [second, refused] = twins;
                match refused {
                    Err(CommError::BadHandshake { reason, .. }) => {
                        assert!(reason.contains("already"), "{reason}")
                    }
                    other => panic!("{:?}", other.err()),
                }
                check(vec![first.join().unwrap(), second, third.join().unwrap()]);
                drop(silent);
            });
        }
    });
}

#[test]
fn ten_thousand_connections_do_not_keep_the_job_from_forming() {
    // All at once where the system lets a process have that many descriptors, else as many as it does.
    let limits = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limits.maximum, maximum: limits.maximum }).unwrap();
    let most = limits.maximum.map_or(10_000, |limit| (limit as usize).saturating_sub(900).clamp(64, 10_000));
    within(LIMIT, move || {
        for kind in Kind::SOCKETS {
            let (meetings, _dir) = meeting(kind, 3, Duration::from_secs(30));
            std::thread::scope(|scope| {
                let first = scope.spawn(|| meetings[0].connect());
                let address = &meetings[0].address;
                wait_until_it_listens(address);
                let flood = scope.spawn(|| {
                    let (mut held, mut made) = (VecDeque::new(), 0);
                    for _ in 0..10_000 {
                        let stranger = stranger(address);
                        made += usize::from(stranger.is_some());
                        held.extend(stranger);
                        if held.len() > most {
                            held.pop_front();
                        }
                    }
                    (held, made)
                });
                std::thread::sleep(Duration::from_millis(20));
                let second = scope.spawn(|| meetings[1].connect());
                let (held, made) = flood.join().unwrap();
                assert_eq!(made, 10_000, "the flood was refused");
                let third = scope.spawn(|| meetings[2].connect());
                check(vec![first.join().unwrap(), second.join().unwrap(), third.join().unwrap()]);
                drop(held);
            });
        }
    });
}

#[test]
fn a_missing_rank_fails_the_rendezvous_on_all_that_arrived() {
    within(LIMIT, || {
        let wait = Duration::from_millis(500);
        for kind in Kind::SOCKETS {
            for (present, missing) in [(&[0, 2, 3][..], vec![1]), (&[1, 2], vec![0]), (&[0], vec![1, 2, 3])] {
                let (meetings, _dir) = meeting(kind, 4, wait);
                let arriving: Vec<_> = present.iter().map(|&rank| meetings[rank].clone()).collect();
                let start = Instant::now();
                for result in connect_all(&arriving) {
                    match result {
                        Err(CommError::Timeout { missing: found, .. }) => {
                            assert_eq!(found, missing, "{kind:?}")
                        }
                        other => panic!("{kind:?}: {:?}", other.err()),
                    }
                }
                let elapsed = start.elapsed();
                assert!(
                    elapsed >= wait && elapsed < wait + Duration::from_millis(500),
                    "{kind:?}: {elapsed:?}"
                );
            }
        }
    });
}

#[test]
fn a_rank_that_gave_up_may_come_again() {
    within(LIMIT, || {
        for kind in Kind::SOCKETS {
            let (meetings, _dir) = meeting(kind, 3, T);
            std::thread::scope(|scope| {
                let first = scope.spawn(|| meetings[0].connect());
                let hasty = Rendezvous { timeout: Duration::from_millis(300), ..meetings[1].clone() };
                match hasty.connect() {
                    Err(CommError::Timeout { missing, .. }) => assert_eq!(missing, [2]),
                    other => panic!("{:?}", other.err()),
                }
                let rest: Vec<_> =
                    (1..3).map(|r| scope.spawn(move || r)).map(|t| t.join().unwrap()).collect();
                let rest: Vec<_> = rest.into_iter().map(|r| meetings[r].clone()).collect();
                let rest = connect_all(&rest);
                check(std::iter::once(first.join().unwrap()).chain(rest).collect());
            });
        }
    });
}

#[test]
fn a_second_job_at_the_same_address_is_refused_and_the_first_is_unharmed() {
    within(LIMIT, || {
        for kind in Kind::SOCKETS {
            for same_token in [false, true] {
                let (first, _dir) = meeting(kind, 3, T);
                let token = if same_token { first[0].token.clone() } else { Token::random().unwrap() };
                let intruder =
                    |rank: usize| Rendezvous { job: "b".into(), token: token.clone(), ..first[rank].clone() };
                std::thread::scope(|scope| {
                    let zero = scope.spawn(|| first[0].connect());
                    wait_until_it_listens(&first[0].address);
                    let start = Instant::now();
                    let refused = connect_all(&[intruder(0), intruder(1), intruder(2)]);
                    assert!(start.elapsed() < Duration::from_secs(1));
                    let errors: Vec<_> = refused.into_iter().map(|r| r.err().expect("jobs mixed")).collect();
                    assert!(matches!(errors[0], CommError::AddrInUse { .. }), "{errors:?}");
                    assert!(
                        errors[1..].iter().all(|e| matches!(e, CommError::BadHandshake { .. })),
                        "{errors:?}"
                    );
                    let rest = connect_all(&first[1..]);
                    check(std::iter::once(zero.join().unwrap()).chain(rest).collect());
                });
            }
        }
    });
}

#[test]
fn an_address_can_be_used_again_and_again() {
    within(LIMIT, || {
        for kind in Kind::SOCKETS {
            let (meetings, _dir) = meeting(kind, 3, T);
            for _ in 0..20 {
                check(connect_all(&meetings));
            }
        }
    });
}

#[test]
fn a_unix_socket_is_private_and_gone_once_the_job_has_formed() {
    within(LIMIT, || {
        let (meetings, dir) = meeting(Kind::Unix, 2, T);
        let RendezvousAddress::Unix(path) = meetings[0].address.clone() else { panic!() };
        std::thread::scope(|scope| {
            let first = scope.spawn(|| meetings[0].connect());
            wait_until_it_listens(&meetings[0].address);
            let mode = std::fs::metadata(path.parent().unwrap()).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o700);
            let comms = vec![meetings[1].connect(), first.join().unwrap()];
            assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "something was left behind");
            check(comms);
        });
        // A socket that a killed process left is replaced; any other file is not.
        std::fs::DirBuilder::new().mode(0o700).create(path.parent().unwrap()).unwrap();
        drop(UnixListener::bind(&path).unwrap());
        check(connect_all(&meetings));
        std::fs::write(&path, "precious").unwrap();
        assert!(matches!(meetings[0].connect(), Err(CommError::AddrInUse { .. })));
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
        std::fs::set_permissions(path.parent().unwrap(), PermissionsExt::from_mode(0o755)).unwrap();
        assert!(matches!(meetings[0].connect(), Err(CommError::InvalidArgument { .. })));
    });
}

#[test]
fn wrong_arguments_are_refused() {
    let (meetings, _dir) = meeting(Kind::Tcp, 2, T);
    let with = |change: &dyn Fn(&mut Rendezvous)| {
        let mut wrong = meetings[0].clone();
        change(&mut wrong);
        wrong.connect().err().expect("it connected")
    };
    let tcp = |host: &str, port| RendezvousAddress::Tcp { host: host.into(), port };
    for error in [
        with(&|w| w.rank = 2),
        with(&|w| w.size = 0),
        with(&|w| w.address = tcp("192.0.2.1", 5)),
        with(&|w| w.address = RendezvousAddress::Unix(format!("/tmp/{}", "x".repeat(200)).into())),
    ] {
        assert!(matches!(error, CommError::InvalidArgument { .. }), "{error:?}");
    }
    let alone = Rendezvous { size: 1, ..meetings[0].clone() };
    alone.connect().unwrap().barrier(Deadline::after(T)).unwrap();
}
