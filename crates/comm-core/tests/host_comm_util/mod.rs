//! What the host communicators' tests share: running ranks as threads over each kind of communicator, and a bound on
//! every test's time.
#![allow(dead_code, clippy::missing_panics_doc, reason = "each test program uses a part of it")]

pub(crate) mod process;

use std::net::TcpListener;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use comm_core::{HostComm, Rendezvous, RendezvousAddress, ThreadComm, Token};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    Thread,
    Unix,
    Tcp,
}

impl Kind {
    pub(crate) const ALL: [Self; 3] = [Self::Thread, Self::Unix, Self::Tcp];
    pub(crate) const SOCKETS: [Self; 2] = [Self::Unix, Self::Tcp];
}

/// Fails the test when `body` takes longer than `limit`.
pub(crate) fn within<T: Send + 'static>(limit: Duration, body: impl FnOnce() -> T + Send + 'static) -> T {
    let (done, result) = channel();
    let thread = std::thread::spawn(move || {
        let value = body();
        let _ = done.send(());
        value
    });
    match result.recv_timeout(limit) {
        Ok(()) | Err(RecvTimeoutError::Disconnected) => match thread.join() {
            Ok(value) => value,
            Err(panic) => std::panic::resume_unwind(panic),
        },
        Err(RecvTimeoutError::Timeout) => panic!("still running after {limit:?}"),
    }
}

/// A port of 127.0.0.1 that nothing listened at a moment ago.
pub(crate) fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// A meeting place of its own for one job; the directory has to live as long as the rendezvous.
pub(crate) fn meeting(kind: Kind, size: usize, timeout: Duration) -> (Vec<Rendezvous>, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let address = match kind {
        Kind::Tcp => RendezvousAddress::Tcp { host: "127.0.0.1".into(), port: free_port() },
        _ => RendezvousAddress::Unix(dir.path().join("job").join("rendezvous.sock")),
    };
    let token = Token::random().unwrap();
    let rank = |rank| Rendezvous {
        address: address.clone(),
        rank,
        size,
        job: "test".into(),
        token: token.clone(),
        timeout,
    };
    ((0..size).map(rank).collect(), dir)
}

/// Runs each rendezvous on a thread of its own.
pub(crate) fn connect_all(meetings: &[Rendezvous]) -> Vec<comm_core::Result<comm_core::SocketComm>> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = meetings.iter().map(|meeting| scope.spawn(|| meeting.connect())).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// Makes a communicator of a kind: a handle for each rank.
pub(crate) fn create(kind: Kind, size: usize, timeout: Duration) -> Vec<Arc<dyn HostComm>> {
    if kind == Kind::Thread {
        let comms = ThreadComm::create(size, timeout).unwrap();
        return comms.into_iter().map(|comm| Arc::new(comm) as Arc<dyn HostComm>).collect();
    }
    let (meetings, _dir) = meeting(kind, size, timeout);
    connect_all(&meetings).into_iter().map(|comm| Arc::new(comm.unwrap()) as Arc<dyn HostComm>).collect()
}

/// Runs `rank_main` on a thread for each rank and gives the results in rank order.
pub(crate) fn run<T: Send>(
    kind: Kind,
    size: usize,
    timeout: Duration,
    rank_main: impl Fn(Arc<dyn HostComm>) -> T + Sync,
) -> Vec<T> {
    let comms = create(kind, size, timeout);
    std::thread::scope(|scope| {
        let rank_main = &rank_main;
        let threads: Vec<_> = comms.into_iter().map(|comm| scope.spawn(move || rank_main(comm))).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    })
}
