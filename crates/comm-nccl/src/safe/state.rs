//! The state that a communicator's handle and its watchdog share, and the path that every call takes.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use comm_core::{CallSite, CommError, CommInfo, DeviceAddr, HostComm, OpKind, Result, StreamHandle};
use comm_kernels::Kernels;
use comm_kernels::order::CallOrder;
use cudarc::driver::CudaContext;

use super::farewell::Farewell;
use super::limits::Limits;
use super::marks::Placement;
use super::memory::Buffers;
use super::options::Options;
use super::track::{Arrival, Issued, Replayed, Tracker};
use super::usage::{Algorithm, Usage};
use super::watchdog::INTERVAL;
use crate::driver::{self, Current};
use crate::result::{NcclLibrary, Progress};
use crate::sys;

/// What the communicators split from one another have in common.
#[derive(Clone)]
pub(crate) struct Base {
    pub(crate) library: Arc<NcclLibrary>,
    pub(crate) context: Arc<CudaContext>,
    pub(crate) limits: Limits,
    pub(crate) timeout: Duration,
    pub(crate) checked: bool,
    pub(crate) options: Arc<Options>,
    pub(crate) kernels: Option<Arc<Kernels>>,
}

impl Base {
    /// The kernels that watch captured work, if it is watched, and where they stand.
    pub(crate) fn graph_watch(&self) -> Option<(Arc<Kernels>, Placement)> {
        self.kernels.clone().filter(|_| self.limits.watches_graphs()).zip(self.options.watch_graphs)
    }
}

/// The host communicators of one communicator.
#[derive(Clone)]
pub(crate) struct Hosts {
    /// The caller's, watched only; none for a split communicator, whose own ranks are all that matter to it.
    pub(crate) parent: Option<Arc<dyn HostComm>>,
    /// This communicator's own: agreement, checked mode, and word of failures.
    pub(crate) control: Arc<dyn HostComm>,
    /// For one exchange, after a failure has made `control` useless.
    pub(crate) diagnosis: Arc<dyn HostComm>,
    /// For the end of a failed communicator.
    pub(crate) farewell: Farewell,
}

/// What is touched only under the lock.
pub(crate) struct Native {
    /// Null before creation and after the end.
    pub(crate) comm: *mut sys::Comm,
    pub(crate) tracker: Option<Tracker>,
    /// Of the calls that share the staging buffer. NCCL orders its own work on several streams; the copies into the buffer
    /// and out of it are not its own.
    pub(crate) staged: Option<CallOrder>,
    pub(crate) buffers: Buffers,
    pub(crate) last: Issued,
}

// SAFETY: the communicator may be used from any thread as long as only one is inside NCCL with it, which the lock
// around this structure ensures.
unsafe impl Send for Native {}

/// Device memory that the communicator owns for its own needs.
#[derive(Clone, Copy)]
pub(crate) struct Scratch {
    /// What a barrier reduces.
    pub(crate) barrier: DeviceAddr,
    /// Where pitched gathers are put together.
    pub(crate) staging: DeviceAddr,
    pub(crate) staging_bytes: usize,
}

const OPEN: u8 = 0;
const CLOSING: u8 = 1;
const FAILED: u8 = 2;

/// What the watchdog is asked to do, and what came of it.
#[derive(Default)]
pub(crate) struct Ending {
    pub(crate) close: bool,
    pub(crate) dropped: bool,
    /// Set when the watchdog is through with the communicator.
    pub(crate) outcome: Option<Result<()>>,
}

pub(crate) struct Shared {
    pub(crate) info: CommInfo,
    pub(crate) base: Base,
    pub(crate) scratch: Scratch,
    pub(crate) usage: Usage,
    pub(crate) native: Mutex<Native>,
    pub(crate) hosts: Mutex<Option<Hosts>>,
    /// Kept until the watchdog ends, longer than the other host communicators: an abort that comes after a drop is
    /// announced too.
    pub(crate) farewell: Mutex<Option<Farewell>>,
    pub(crate) ending: Mutex<Ending>,
    pub(crate) changed: Condvar,
    state: AtomicU8,
    failure: Mutex<Option<CommError>>,
    /// The call that is waiting for NCCL with the lock held, for those who cannot take the lock to ask.
    settling: Mutex<Option<(Issued, Instant)>>,
    seq: AtomicU64,
    collectives: AtomicU64,
    replayed: Mutex<Replayed>,
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What the locks guard is consistent between statements, so a panic elsewhere does not spoil it.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    pub(crate) fn new(
        info: CommInfo,
        base: Base,
        scratch: Scratch,
        (tracker, staged): (Tracker, CallOrder),
        hosts: Hosts,
    ) -> Self {
        let last = Issued { kind: OpKind::Create, seq: 0, arrival: None };
        let native = Native {
            comm: std::ptr::null_mut(),
            tracker: Some(tracker),
            staged: Some(staged),
            buffers: Buffers::default(),
            last,
        };
        Self {
            info,
            base,
            scratch,
            usage: Usage::default(),
            native: Mutex::new(native),
            farewell: Mutex::new(Some(hosts.farewell.clone())),
            hosts: Mutex::new(Some(hosts)),
            ending: Mutex::default(),
            changed: Condvar::new(),
            state: AtomicU8::new(OPEN),
            failure: Mutex::new(None),
            settling: Mutex::new(None),
            seq: AtomicU64::new(0),
            collectives: AtomicU64::new(0),
            replayed: Mutex::default(),
        }
    }

    pub(crate) fn at(&self, kind: OpKind, seq: u64) -> CallSite {
        CallSite::new(&self.info.name, kind, seq)
    }

    pub(crate) fn at_last(&self) -> CallSite {
        let settling = *lock(&self.settling);
        match (settling, self.native.try_lock()) {
            (Some((issued, _)), _) => self.at(issued.kind, issued.seq),
            (None, Ok(native)) => self.at(native.last.kind, native.last.seq),
            (None, Err(_)) => self.at(OpKind::Poll, self.seq()),
        }
    }

    /// The oldest call that is not complete, and for how long it has been outstanding.
    pub(crate) fn waiting(&self) -> Option<(Issued, Duration)> {
        if let Some((issued, since)) = *lock(&self.settling) {
            return Some((issued, since.elapsed()));
        }
        let mut native = self.native.try_lock().ok()?;
        let tracker = native.tracker.as_mut()?;
        self.note_replayed(tracker);
        tracker.waiting()
    }

    /// Keeps how far replays are, for those who cannot take the lock to ask.
    pub(crate) fn note_replayed(&self, tracker: &Tracker) {
        *lock(&self.replayed) = tracker.replayed();
    }

    /// How far replays were when that was last noted, by the watchdog or by the call that keeps it from looking: not much
    /// longer ago than its interval.
    pub(crate) fn replayed(&self) -> Replayed {
        *lock(&self.replayed)
    }

    pub(crate) fn seq(&self) -> u64 {
        self.seq.load(Ordering::Relaxed)
    }

    /// Collectives begun so far.
    pub(crate) fn collectives(&self) -> u64 {
        self.collectives.load(Ordering::Relaxed)
    }

    pub(crate) fn hosts(&self) -> Result<Hosts> {
        lock(&self.hosts).clone().ok_or_else(|| self.closed())
    }

    pub(crate) fn closed(&self) -> CommError {
        CommError::Closed { comm: self.info.name.clone() }
    }

    /// The error that every call returns from now on, if there is one.
    pub(crate) fn healthy(&self) -> Result<()> {
        match self.state.load(Ordering::Acquire) {
            OPEN => Ok(()),
            CLOSING => Err(self.closed()),
            _ => Err(self.cause()),
        }
    }

    pub(crate) fn has_failed(&self) -> bool {
        self.state.load(Ordering::Acquire) == FAILED
    }

    fn cause(&self) -> CommError {
        lock(&self.failure).clone().unwrap_or_else(|| self.closed())
    }

    /// Refuses calls from now on, without being a failure.
    pub(crate) fn start_closing(&self) {
        let _ = self.state.compare_exchange(OPEN, CLOSING, Ordering::AcqRel, Ordering::Acquire);
    }

    /// Declares the communicator lost and returns the cause, which is the first one declared. Tells the other ranks if
    /// the cause arose here. Never blocks.
    pub(crate) fn fail(&self, error: CommError) -> CommError {
        // Held until the others have been told, so that a drop meanwhile cannot take the host communicators away first.
        let hosts = lock(&self.hosts);
        let cause = {
            let mut failure = lock(&self.failure);
            if let Some(first) = &*failure {
                return first.clone();
            }
            *failure = Some(error.clone());
            self.state.store(FAILED, Ordering::Release);
            error
        };
        if let Some(Hosts { control, .. }) = &*hosts {
            match &cause {
                // The others see a death, or a failure reported by its own rank, for themselves.
                CommError::PeerDied { .. } | CommError::PeerFailed { .. } | CommError::Closed { .. } => {}
                CommError::Aborted { .. } => control.abort(),
                local => control.report_failure(local),
            }
        }
        drop(hosts);
        tracing::warn!(comm = self.info.name, rank = self.info.rank, %cause, "communicator failed");
        // Under the lock, so that a watchdog between its check and its wait cannot miss it.
        drop(lock(&self.ending));
        self.changed.notify_all();
        cause
    }

    /// Begins a call: checks that the communicator is fit, makes its device current and takes the lock.
    pub(crate) fn begin(&self, kind: OpKind) -> Result<Call<'_>> {
        self.healthy()?;
        let current = Current::enter(&self.base.context).map_err(|error| self.fail(error))?;
        let mut native = lock(&self.native);
        // It may have failed, and been taken down, while this thread waited for the lock.
        self.healthy()?;
        let arrival = match kind {
            OpKind::Send | OpKind::Recv | OpKind::Group => None,
            kind if OpKind::COLLECTIVES.contains(&kind) => {
                Some(Arrival::Called(self.collectives.fetch_add(1, Ordering::Relaxed)))
            }
            _ => None,
        };
        let issued = Issued { kind, seq: self.seq.fetch_add(1, Ordering::Relaxed), arrival };
        native.last = issued;
        Ok(Call { shared: self, native, issued, bytes: 0, capturing: false, _current: current })
    }

    /// Begins a call that will enqueue work on `stream`, on operands of which the longest has `bytes` bytes.
    pub(crate) fn begin_on(&self, kind: OpKind, bytes: usize, stream: StreamHandle) -> Result<Call<'_>> {
        let mut call = self.begin(kind)?;
        call.bytes = bytes;
        call.capturing = driver::is_capturing(stream);
        if call.capturing
            && let Some(tracker) = &mut call.native.tracker
        {
            let marked = tracker.capture_start(call.issued, bytes, stream);
            call.fatal(marked)?;
        }
        Ok(call)
    }
}

/// A call under way, with the lock held and the device current.
pub(crate) struct Call<'a> {
    pub(crate) shared: &'a Shared,
    pub(crate) native: MutexGuard<'a, Native>,
    issued: Issued,
    bytes: usize,
    capturing: bool,
    _current: Current,
}

impl Call<'_> {
    /// Makes one call into NCCL and waits until NCCL has enqueued its work, within the communicator's timeout.
    pub(crate) fn nccl(
        &self,
        call: impl FnOnce(&NcclLibrary, *mut sys::Comm) -> Result<Progress>,
    ) -> Result<()> {
        match call(&self.shared.base.library, self.native.comm) {
            Ok(Progress::Done) => Ok(()),
            Ok(Progress::Running) => self.settle(self.native.comm),
            Err(error) => Err(self.shared.blame(error)),
        }
    }

    /// Waits until NCCL is through with what `comm` does in the background.
    pub(crate) fn settle(&self, comm: *mut sys::Comm) -> Result<()> {
        let mut pause = Pause::new();
        *lock(&self.shared.settling) = Some((self.issued, pause.start));
        let settled = self.wait(comm, &mut pause);
        *lock(&self.shared.settling) = None;
        settled
    }

    fn wait(&self, comm: *mut sys::Comm, pause: &mut Pause) -> Result<()> {
        let mut next_note = INTERVAL;
        loop {
            // SAFETY: the communicator is live while the lock is held, and this thread alone is inside NCCL with it.
            match unsafe { self.shared.base.library.comm_state(comm) } {
                Ok(Progress::Done) => return Ok(()),
                Ok(Progress::Running) => {}
                Err(error) => return Err(self.shared.blame(error)),
            }
            if self.shared.has_failed() {
                return Err(self.shared.cause());
            }
            let waited = pause.wait();
            let overdue = waited > self.shared.base.timeout;
            if overdue || waited >= next_note {
                // Nobody else can look as long as this call has the lock, and other ranks may ask at any time: a note from
                // before the replays that run meanwhile would name this rank.
                if let Some(tracker) = &self.native.tracker {
                    self.shared.note_replayed(tracker);
                }
                next_note = waited + INTERVAL;
            }
            if overdue {
                return Err(self.shared.overdue(self.issued, waited));
            }
        }
    }

    /// Turns an error of work that was enqueued beside NCCL's into the communicator's failure.
    pub(crate) fn fatal<T>(&self, result: Result<T>) -> Result<T> {
        result.map_err(|error| self.shared.fail(error))
    }

    /// Ends the call: from here on its work is watched, and it counts as used.
    pub(crate) fn finish(mut self, stream: StreamHandle, algorithm: Algorithm) -> Result<()> {
        let issued = self.issued;
        if let Some(tracker) = &mut self.native.tracker {
            let watched = if self.capturing {
                tracker.capture_finish(issued, self.bytes, stream)
            } else {
                tracker.record(issued, stream)
            };
            watched.map_err(|error| self.shared.fail(error))?;
        }
        self.shared.usage.count(issued.kind, algorithm);
        Ok(())
    }
}

/// Waits that start short, because NCCL usually needs microseconds, and grow, because the threads it waits for need
/// the processor too.
pub(crate) struct Pause {
    start: Instant,
    rounds: u32,
}

impl Pause {
    pub(crate) fn new() -> Self {
        Self { start: Instant::now(), rounds: 0 }
    }

    /// Waits a little and returns the time since the first wait.
    pub(crate) fn wait(&mut self) -> Duration {
        self.rounds = self.rounds.saturating_add(1);
        match self.rounds {
            ..64 => std::hint::spin_loop(),
            64..512 => std::thread::yield_now(),
            _ => std::thread::sleep(Duration::from_micros(50)),
        }
        self.start.elapsed()
    }
}
