//! Whom the survivors of a death blame, whatever the order in which they learn of it.

#![cfg(feature = "host-backend")]
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod host_backend_support;

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use comm_core::{
    CallSite, CommError, Deadline, DeviceComm, HostComm, OpKind, Result, StreamHandle, run_threads,
};
use host_backend_support::{TRANSPORTS, context, create};

const S: StreamHandle = StreamHandle::NULL;
const T: Duration = Duration::from_secs(5);

/// A host communicator that learns of rank 1's death when the test says so.
struct Told {
    inner: Arc<dyn HostComm>,
    knows: AtomicBool,
}

impl HostComm for Told {
    fn name(&self) -> &str {
        self.inner.name()
    }
    fn rank(&self) -> usize {
        self.inner.rank()
    }
    fn size(&self) -> usize {
        self.inner.size()
    }
    fn timeout(&self) -> Duration {
        self.inner.timeout()
    }
    fn same_process(&self) -> bool {
        self.inner.same_process()
    }
    fn split(&self, color: Option<u32>, key: i64, deadline: Deadline) -> Result<Option<Arc<dyn HostComm>>> {
        self.inner.split(color, key, deadline)
    }
    fn barrier(&self, deadline: Deadline) -> Result<()> {
        self.inner.barrier(deadline)
    }
    fn broadcast_bytes(&self, bytes: &[u8], root: usize, deadline: Deadline) -> Result<Vec<u8>> {
        self.inner.broadcast_bytes(bytes, root, deadline)
    }
    fn all_gather_bytes(&self, bytes: &[u8], deadline: Deadline) -> Result<Vec<Vec<u8>>> {
        self.inner.all_gather_bytes(bytes, deadline)
    }
    fn can_exchange_fds(&self) -> bool {
        self.inner.can_exchange_fds()
    }
    fn exchange_fds(&self, fds: &[BorrowedFd<'_>], deadline: Deadline) -> Result<Vec<Vec<OwnedFd>>> {
        self.inner.exchange_fds(fds, deadline)
    }
    fn poll(&self) -> Result<()> {
        if self.knows.load(Ordering::SeqCst) {
            let at = CallSite::new(self.name(), OpKind::Poll, 0);
            return Err(CommError::PeerDied { at, rank: 1 });
        }
        self.inner.poll()
    }
    fn report_failure(&self, cause: &CommError) {
        self.inner.report_failure(cause);
    }
    fn abort(&self) {
        self.inner.abort();
    }
}

/// Runs three ranks of which 1 stays silent, and gives what rank 2's barrier returned and how long it took. Rank 0 is
/// given its communicator and means to make its own host communicator know of the death; rank 2 learns of it after
/// `delay`, if at all.
fn blamed(
    transport: &str,
    rank_0: impl Fn(Arc<dyn DeviceComm>, &AtomicBool) + Sync,
    delay: Option<Duration>,
) -> (CommError, Duration) {
    let over = AtomicBool::new(false);
    let left = AtomicBool::new(false);
    let results = run_threads(3, Duration::from_secs(20), |host| {
        let rank = host.rank();
        let told = Arc::new(Told { inner: host, knows: AtomicBool::new(false) });
        let comm = create(&context(told.clone(), transport, T, false));
        // SAFETY: host memory needs no stream.
        unsafe { comm.barrier(S).unwrap() };
        let wait_for = |flag: &AtomicBool| {
            let start = Instant::now();
            while !flag.load(Ordering::SeqCst) && start.elapsed() < 2 * T {
                std::thread::sleep(Duration::from_millis(1));
            }
        };
        match rank {
            0 => {
                rank_0(comm, &told.knows);
                left.store(true, Ordering::SeqCst);
                wait_for(&over);
                None
            }
            1 => {
                wait_for(&over);
                None
            }
            _ => {
                let result = std::thread::scope(|scope| {
                    scope.spawn(|| {
                        wait_for(&left);
                        if let Some(delay) = delay {
                            std::thread::sleep(delay);
                            told.knows.store(true, Ordering::SeqCst);
                        }
                    });
                    let start = Instant::now();
                    // SAFETY: as above.
                    let error = unsafe { comm.barrier(S) }.unwrap_err();
                    (error, start.elapsed())
                });
                over.store(true, Ordering::SeqCst);
                Some(result)
            }
        }
    })
    .unwrap();
    results.into_iter().flatten().next().unwrap()
}

#[test]
fn a_survivor_that_polls_and_leaves_is_not_to_blame() {
    for transport in TRANSPORTS {
        let poll = |comm: Arc<dyn DeviceComm>, knows: &AtomicBool| {
            knows.store(true, Ordering::SeqCst);
            let error = comm.poll().unwrap_err();
            assert!(matches!(error, CommError::PeerDied { rank: 1, .. }), "{error:?}");
            knows.store(false, Ordering::SeqCst);
            assert_eq!(comm.poll(), Err(error), "what was noticed once stays");
        };
        let (error, waited) = blamed(transport, poll, None);
        assert!(matches!(error, CommError::PeerDied { rank: 1, .. }), "{error:?}");
        assert!(waited < Duration::from_secs(1), "{waited:?}");
    }
}

#[test]
fn a_survivor_that_leaves_without_a_call_says_why() {
    for transport in TRANSPORTS {
        let leave = |comm: Arc<dyn DeviceComm>, knows: &AtomicBool| {
            knows.store(true, Ordering::SeqCst);
            drop(comm);
        };
        let (error, waited) = blamed(transport, leave, None);
        assert!(matches!(error, CommError::PeerDied { rank: 1, .. }), "{error:?}");
        assert!(waited < Duration::from_secs(1), "{waited:?}");
    }
}

#[test]
fn a_departure_is_held_against_a_rank_only_when_no_death_explains_it() {
    for transport in TRANSPORTS {
        let leave = |comm: Arc<dyn DeviceComm>, _: &AtomicBool| drop(comm);
        let (error, _) = blamed(transport, leave, Some(Duration::from_millis(10)));
        assert!(matches!(error, CommError::PeerDied { rank: 1, .. }), "{error:?}");
        let (error, waited) = blamed(transport, leave, None);
        assert!(matches!(error, CommError::PeerDied { rank: 0, .. }), "{error:?}");
        assert!(waited < Duration::from_secs(1), "{waited:?}");
    }
}
