//! A communicator's state: what it owns, and how it fails.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};
use std::time::Duration;

use comm_core::topology::Topology;
use comm_core::{CallSite, CommError, CommInfo, Deadline, DeviceAddr, HostComm, OpKind, Result};
use comm_kernels::Kernels;
use comm_kernels::p2p::{ErrorRecord, Link, P2pKernels, Peers, Wire};
use cudarc::driver::CudaContext;

use crate::blame;
use crate::captured::Captured;
use crate::fitness::{Fitness, Sentinel};
use crate::ledger::Ledger;
use crate::mesh::Mesh;
use crate::options::Options;
use crate::order::Order;
use crate::room::Room;
use crate::symmetric::table::Table;
use crate::symmetric::words::Words;
use crate::symmetric::{Block, Hold};
use crate::tables::InUse;
use crate::topology::Place;
use crate::topology::links::Links;
use crate::usage::{Algorithm, Usage};

const OPEN: u8 = 0;
const CLOSING: u8 = 1;
const FAILED: u8 = 2;

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What these protect is set by single assignments, so a panic cannot leave it half-changed.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(crate) fn read<T>(shared: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    // As above.
    shared.read().unwrap_or_else(PoisonError::into_inner)
}

/// What a split shares with its parent.
#[derive(Clone)]
pub(crate) struct Base {
    pub(crate) context: Arc<CudaContext>,
    pub(crate) kernels: Arc<Kernels>,
    pub(crate) ordinal: usize,
    pub(crate) timeout: Duration,
    pub(crate) checked: bool,
    pub(crate) options: Arc<Options>,
    pub(crate) room: Room,
    /// The kind of GPU that all ranks have.
    pub(crate) gpu: String,
    pub(crate) device: Arc<Device>,
}

/// This rank's device, as the other ranks need to know it.
pub(crate) struct Device {
    pub(crate) uuid: String,
    pub(crate) driver: String,
    pub(crate) links: Links,
    pub(crate) place: Place,
}

/// The channels of a communicator of at least two ranks, and the kernels that use them.
pub(crate) struct Channels {
    pub(crate) kernels: P2pKernels,
    pub(crate) packet: Link,
    pub(crate) lamport: Link,
    pub(crate) lines: Link,
    pub(crate) cells: Link,
    pub(crate) barrier: Link,
    pub(crate) pairs: Link,
    pub(crate) pair_counters: DeviceAddr,
    /// Every rank's staging memory, `2 * half` bytes, and behind it a slot of `pair_bytes` for each receiver.
    pub(crate) staging: Peers,
    pub(crate) half: usize,
    pub(crate) pair_slots: Peers,
    pub(crate) pair_bytes: usize,
    /// If ranks may touch their neighbours' memory alone. Copies and mailboxes for others lie behind the staging memory
    /// and the slots, and the other ranks' addresses are null.
    pub(crate) mesh: Option<Mesh>,
}

impl Channels {
    /// The channel and the wire of an algorithm that sends everything to everyone.
    pub(crate) fn one_hop(&self, algorithm: Algorithm) -> (&Link, Wire) {
        match algorithm {
            Algorithm::Lamport => (&self.lamport, Wire::Lamport),
            _ => (&self.packet, Wire::Packet),
        }
    }
}

/// What is given back at the end, in this order.
pub(crate) struct Owned {
    pub(crate) table: Table<Hold>,
    /// With the option `p2p.graph_registration`, between at least two ranks.
    pub(crate) captured: Option<Captured>,
    pub(crate) order: Order,
    /// Of the calls that have been written into the ledger.
    pub(crate) chain: u64,
    #[allow(dead_code, reason = "held, not read")]
    pub(crate) scratch: Option<Block>,
    pub(crate) words: Option<Arc<Words>>,
    pub(crate) sentinel: Option<Arc<Sentinel>>,
}

/// What the handle asks of the watchdog, and what came of it.
#[derive(Default)]
pub(crate) struct Ending {
    pub(crate) close: bool,
    pub(crate) dropped: bool,
    pub(crate) outcome: Option<Result<()>>,
}

/// Shared by a communicator's handle and its watchdog.
pub(crate) struct Shared {
    pub(crate) info: CommInfo,
    pub(crate) base: Base,
    pub(crate) topology: Topology,
    /// What algorithms are chosen by; the same on all ranks.
    pub(crate) tables: RwLock<InUse>,
    /// `None` with one rank.
    pub(crate) channels: Option<Channels>,
    pub(crate) usage: Usage,
    /// Between at least two ranks.
    pub(crate) ledger: Option<Ledger>,
    pub(crate) owned: Mutex<Owned>,
    words: Mutex<Option<Arc<Words>>>,
    pub(crate) fitness: Fitness,
    pub(crate) host: Mutex<Option<Hosts>>,
    pub(crate) ending: Mutex<Ending>,
    pub(crate) changed: Condvar,
    state: AtomicU8,
    failure: Mutex<Option<CommError>>,
    pub(crate) seq: AtomicU64,
}

/// The host communicators of this one: its own, and the one it was made from, whose failures count too.
#[derive(Clone)]
pub(crate) struct Hosts {
    pub(crate) control: Arc<dyn HostComm>,
    pub(crate) parent: Option<Arc<dyn HostComm>>,
}

impl Shared {
    pub(crate) fn new(
        info: CommInfo,
        base: Base,
        topology: Topology,
        tables: InUse,
        channels: Option<Channels>,
        ledger: Option<Ledger>,
        owned: Owned,
        hosts: Hosts,
    ) -> Self {
        Self {
            info,
            base,
            topology,
            tables: RwLock::new(tables),
            channels,
            usage: Usage::default(),
            ledger,
            words: Mutex::new(owned.words.clone()),
            fitness: Fitness::new(owned.sentinel.clone()),
            owned: Mutex::new(owned),
            host: Mutex::new(Some(hosts)),
            ending: Mutex::default(),
            changed: Condvar::new(),
            state: AtomicU8::new(OPEN),
            failure: Mutex::new(None),
            seq: AtomicU64::new(0),
        }
    }

    pub(crate) fn at(&self, kind: OpKind) -> CallSite {
        CallSite::new(&self.info.name, kind, self.seq.load(Ordering::Relaxed))
    }

    pub(crate) fn closed(&self) -> CommError {
        CommError::Closed { comm: self.info.name.clone() }
    }

    /// Whether the ranks are a mesh with gaps, in which only neighbours' memory is mapped.
    pub(crate) fn keeps_to_neighbours(&self) -> bool {
        self.channels.as_ref().is_some_and(|channels| channels.mesh.is_some())
    }

    pub(crate) fn control(&self) -> Result<Arc<dyn HostComm>> {
        lock(&self.host).as_ref().map(|hosts| Arc::clone(&hosts.control)).ok_or_else(|| self.closed())
    }

    /// All ranks meet, if any share a device; else nothing happens.
    ///
    /// What the driver does with a device's memory may wait for its kernels. On a shared device such a kernel may be
    /// another rank's, that waits for what this rank is to enqueue next. So a call that comes to it is made between two
    /// meetings: after the first all earlier calls have been enqueued everywhere, before the second no later one has.
    pub(crate) fn meet_if_shared(&self, host: &dyn HostComm) -> Result<()> {
        if self.base.room.is_shared() { host.barrier(self.deadline()) } else { Ok(()) }
    }

    pub(crate) fn deadline(&self) -> Deadline {
        Deadline::after(self.base.timeout)
    }

    /// The ranks whose memory this rank may touch, bit by bit.
    pub(crate) fn reach(&self) -> u32 {
        self.mesh().map_or(u32::MAX, |mesh| mesh.barrier.neighbours | 1 << self.info.rank)
    }

    /// Why ranks cannot reach all others' buffers, if they cannot.
    pub(crate) fn unreached(&self) -> Option<String> {
        self.mesh().map(|_| {
            format!("the GPUs are a mesh with gaps ({}); data crosses in scratch memory", self.topology)
        })
    }

    fn mesh(&self) -> Option<&Mesh> {
        self.channels.as_ref()?.mesh.as_ref()
    }

    /// The error that every call returns from now on, if there is one.
    pub(crate) fn healthy(&self) -> Result<()> {
        match self.state.load(Ordering::Acquire) {
            OPEN => Ok(()),
            CLOSING => Err(self.closed()),
            _ => Err(lock(&self.failure).clone().unwrap_or_else(|| self.closed())),
        }
    }

    pub(crate) fn has_failed(&self) -> bool {
        self.state.load(Ordering::Acquire) == FAILED
    }

    /// Refuses calls from now on, without being a failure.
    pub(crate) fn start_closing(&self) {
        let _ = self.state.compare_exchange(OPEN, CLOSING, Ordering::AcqRel, Ordering::Acquire);
    }

    /// Declares the communicator lost and returns the cause, which is the first one declared: ends all waits of this
    /// rank's kernels, and tells the other ranks if the cause arose here. Never blocks.
    pub(crate) fn fail(&self, error: CommError) -> CommError {
        // Held until the others have been told, so that a drop meanwhile cannot take the host communicators away first.
        let hosts = lock(&self.host);
        let cause = {
            let mut failure = lock(&self.failure);
            if let Some(first) = &*failure {
                return first.clone();
            }
            *failure = Some(error.clone());
            self.state.store(FAILED, Ordering::Release);
            error
        };
        if let Some(words) = &*lock(&self.words) {
            words.abort();
        }
        if let Some(Hosts { control, .. }) = &*hosts {
            match &cause {
                // Calls that differ were found by this rank: the others may not know, and would wait for it.
                found @ CommError::PeerFailed { cause, .. }
                    if matches!(**cause, CommError::Mismatch { .. }) =>
                {
                    control.report_failure(found);
                }
                // The others see a death, or a failure reported by its own rank, for themselves.
                CommError::PeerDied { .. } | CommError::PeerFailed { .. } | CommError::Closed { .. } => {}
                CommError::Aborted { .. } => control.abort(),
                local => control.report_failure(local),
            }
        }
        let connected = hosts.is_some();
        drop(hosts);
        tracing::warn!(comm = self.info.name, rank = self.info.rank, %cause, connected, "communicator failed");
        // Under the lock, so that a watchdog between its check and its wait cannot miss it.
        drop(lock(&self.ending));
        self.changed.notify_all();
        cause
    }

    /// A host communicator's error as one of this communicator.
    pub(crate) fn relocate(&self, error: CommError, op: OpKind) -> CommError {
        let site = || self.at(op);
        match error {
            CommError::PeerDied { rank, .. } => CommError::PeerDied { at: site(), rank },
            CommError::PeerFailed { rank, cause, .. } => CommError::PeerFailed { at: site(), rank, cause },
            CommError::Timeout { missing, waited, .. } => CommError::Timeout { at: site(), missing, waited },
            CommError::Aborted { .. } => CommError::Aborted { at: site() },
            other => other,
        }
    }

    /// What the other ranks' host sides and this rank's kernels have to say, and their calls. Never blocks.
    pub(crate) fn observe(&self) -> Result<()> {
        // Calls that differ are behind whatever else is found: waits that end, ranks that leave for it.
        self.observe_ends().map_err(|found| self.calls_are_alike().err().unwrap_or(found))
    }

    fn observe_ends(&self) -> Result<()> {
        // Read before the hosts are asked: of a rank that was missed, all that is known by then counts.
        let record = lock(&self.words).as_ref().and_then(|words| words.error());
        let op = record.map_or(OpKind::Poll, |record| blame::call(&self.info, &record).op);
        // Held while polling, so that the last reference cannot end up being dropped by the watchdog: a host
        // communicator may tell a death from a departure by the thread that drops it.
        let hosts = lock(&self.host);
        if let Some(hosts) = &*hosts {
            let mut said = hosts.parent.iter().chain([&hosts.control]).filter_map(|host| host.poll().err());
            if let Some(error) = said.find(|said| blame::explains(said, record.as_ref())) {
                return Err(self.relocate(error, op));
            }
        }
        record.map_or(Ok(()), |record| Err(blame::gave_up(&self.info, &record)))
    }

    /// Whether the ranks' calls are alike, as far as they have come. Never blocks.
    pub(crate) fn calls_are_alike(&self) -> Result<()> {
        let Some(found) = self.ledger.as_ref().and_then(Ledger::compare) else { return Ok(()) };
        let at = || CallSite::new(&self.info.name, OpKind::Poll, found.number);
        let (expected, other) = (found.own.clone(), found.other.clone());
        let cause = CommError::Mismatch { at: at(), rank: found.rank, expected, found: other };
        // What differs has been carried out, or waits: unlike in checked mode, the communicator is lost.
        Err(CommError::PeerFailed { at: at(), rank: found.rank, cause: Box::new(cause) })
    }

    /// Why this rank's kernels gave up a wait, if they did. The other ranks' host sides are asked only then.
    pub(crate) fn given_up(&self) -> Option<CommError> {
        let record = lock(&self.words).as_ref().and_then(|words| words.error())?;
        Some(self.why(&record))
    }

    pub(crate) fn why(&self, record: &ErrorRecord) -> CommError {
        self.observe().err().unwrap_or_else(|| blame::gave_up(&self.info, record))
    }

    /// What can be said about this rank's failure, if there is one.
    pub(crate) fn poll(&self) -> Result<()> {
        self.healthy()?;
        self.observe().map_err(|error| self.fail(error))
    }

    /// Words and sentinel are given up, so that nobody touches them any more.
    pub(crate) fn let_go(&self) {
        lock(&self.words).take();
        self.fitness.forget();
    }
}
