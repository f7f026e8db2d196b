//! One rank's end of a communicator: its state, how a call begins and ends, and how it fails.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use super::call::{self, Call, FAR, Place};
use super::control::{Control, Standing};
use super::memory::Allocations;
use super::usage::{Algorithm, Usage};
use super::wait::{Waiter, Waiting, at_home};
use crate::addr::DeviceAddr;
use crate::device_comm::CommInfo;
use crate::error::{CommError, Result};
use crate::host_comm::{Deadline, HostComm};
use crate::op::OpKind;

/// Bytes that are processed between two looks for trouble, and handed to one thread where several help.
pub(super) const PIECE: usize = 128 << 10;
/// From here on several threads share a rank's work, if there are processors to spare.
const PARALLEL: usize = 4 << 20;

/// What does not change, or changes without a call.
pub(super) struct Core {
    pub(super) info: CommInfo,
    pub(super) waiter: Waiter,
    pub(super) timeout: Duration,
    pub(super) checked: bool,
    pub(super) options: BTreeMap<String, String>,
    /// Whether peers can use this rank's addresses as they are.
    pub(super) direct: bool,
    /// Whether each rank can read the others' memory through the kernel.
    pub(super) cross: bool,
    /// Bytes up to which operands are staged at once: where peers cannot read them in place, and where they can.
    pub(super) small: usize,
    pub(super) tiny: usize,
    pub(super) usage: Usage,
    pub(super) closed: AtomicBool,
    failure: Mutex<Option<CommError>>,
    declaring: Mutex<()>,
    /// The host communicator that a call is waiting in, so that an abort reaches it.
    waiting_in: Mutex<Option<Arc<dyn HostComm>>>,
    pool: OnceLock<Option<rayon::ThreadPool>>,
}

/// What calls change; one call at a time.
#[derive(Default)]
pub(super) struct State {
    pub(super) step: u64,
    pub(super) seq: u64,
    pub(super) allocations: Allocations,
    /// Packets sent to and received from each peer.
    pub(super) sent: Vec<u64>,
    pub(super) received: Vec<u64>,
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic cannot leave these half-changed: they are set by single assignments.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Core {
    pub(super) fn new(
        info: CommInfo,
        control: Control,
        host: Arc<dyn HostComm>,
        settings: (Duration, bool, BTreeMap<String, String>),
        (direct, cross): (bool, bool),
        (small, tiny): (usize, usize),
    ) -> Self {
        let (timeout, checked, options) = settings;
        Self {
            info,
            waiter: Waiter::new(control, host),
            timeout,
            checked,
            options,
            direct,
            cross,
            small,
            tiny,
            usage: Usage::default(),
            closed: AtomicBool::new(false),
            failure: Mutex::default(),
            declaring: Mutex::default(),
            waiting_in: Mutex::default(),
            pool: OnceLock::new(),
        }
    }

    pub(super) fn control(&self) -> &Control {
        &self.waiter.control
    }

    /// The failure that ended this communicator, or that it was closed.
    pub(super) fn usable(&self) -> Result<()> {
        if let Some(error) = self.failure() {
            return Err(error);
        }
        if self.closed.load(Ordering::Acquire) {
            return Err(CommError::Closed { comm: self.info.name.clone() });
        }
        Ok(())
    }

    /// The failure that ended this communicator.
    pub(super) fn failure(&self) -> Option<CommError> {
        lock(&self.failure).clone()
    }

    pub(super) fn declare(&self, standing: Standing, cause: Option<&CommError>) {
        let _one_at_a_time = lock(&self.declaring);
        self.control().declare(standing, cause);
    }

    /// Ends the communicator with `error`. On return no peer touches this rank's operands any more.
    fn fail(&self, error: &CommError) {
        lock(&self.failure).get_or_insert_with(|| error.clone());
        self.declare(Standing::GaveUp, Some(error));
        if self.direct {
            self.waiter.untouched();
        }
    }

    /// Ends the communicator with a failure that was noticed outside any call: no operand is in use then.
    pub(super) fn noticed(&self, error: &CommError) {
        if error.is_fatal() {
            lock(&self.failure).get_or_insert_with(|| error.clone());
            self.declare(Standing::GaveUp, Some(error));
        }
    }

    /// Lets go of the communicator. A rank that leaves because another one died says so, lest the others take its
    /// departure for the failure itself. Never blocks.
    pub(super) fn leave(&self) {
        match self.waiter.host.poll() {
            Err(cause) if cause.is_fatal() => self.declare(Standing::GaveUp, Some(&cause)),
            _ => self.declare(Standing::Departed, None),
        }
    }

    pub(super) fn abort(&self) {
        let at = crate::error::CallSite::new(&self.info.name, OpKind::Close, 0);
        self.declare(Standing::Aborted, Some(&CommError::Aborted { at }));
        if let Some(host) = &*lock(&self.waiting_in) {
            host.abort();
        }
    }

    /// Runs one call.
    pub(super) fn run<T>(
        &self,
        state: &Mutex<State>,
        kind: OpKind,
        call: impl FnOnce(&mut Op<'_>) -> Result<T>,
    ) -> Result<T> {
        let mut state = lock(state);
        self.usable()?;
        let waiting = Waiting {
            comm: &self.info.name,
            op: kind,
            seq: state.seq,
            deadline: Deadline::after(self.timeout),
        };
        state.seq += 1;
        let begun = self.waiter.may_begin(&waiting);
        let result = begun.and_then(|()| call(&mut Op { core: self, state: &mut state, waiting }));
        if let Err(error) = &result
            && error.is_fatal()
        {
            self.fail(error);
        }
        result
    }

    fn pool(&self) -> Option<&rayon::ThreadPool> {
        self.pool
            .get_or_init(|| {
                let processors = std::thread::available_parallelism().map_or(1, usize::from);
                let threads = processors / self.info.size;
                // Without helpers everything still works, so a refusal by the system is no error.
                (threads >= 2).then(|| rayon::ThreadPoolBuilder::new().num_threads(threads).build().ok())?
            })
            .as_ref()
    }
}

/// One call under way.
pub(super) struct Op<'a> {
    pub(super) core: &'a Core,
    pub(super) state: &'a mut State,
    pub(super) waiting: Waiting<'a>,
}

/// The peers' operands as this rank reaches them, in rank order; zero where they were not asked for.
pub(super) struct Peers {
    pub(super) send: Vec<usize>,
    pub(super) recv: Vec<usize>,
    pub(super) extra: Vec<u64>,
    /// Whether `send` is an address of that rank's process.
    pub(super) far: Vec<bool>,
}

/// One operand as it is published: its address and length in bytes.
pub(super) type Operand = (DeviceAddr, usize);

/// No operand.
pub(super) const NOTHING: Operand = (DeviceAddr::NULL, 0);

impl Op<'_> {
    pub(super) fn rank(&self) -> usize {
        self.core.info.rank
    }

    pub(super) fn size(&self) -> usize {
        self.core.info.size
    }

    /// Counts the algorithm of an operation that is not made of others.
    pub(super) fn count(&self, algorithm: Algorithm) {
        if !self.waiting.op.norms() {
            self.core.usage.count(self.waiting.op, algorithm);
        }
    }

    /// Whether operands may be reachable for peers where they lie. Equal on all ranks.
    pub(super) fn may_be_direct(&self) -> bool {
        self.core.direct || !self.state.allocations.is_empty()
    }

    pub(super) fn place(&self, (addr, len): Operand) -> Place {
        if len == 0 {
            Place { space: 1, offset: 0 }
        } else if self.core.direct {
            Place { space: 1, offset: addr.0 }
        } else {
            self.state.allocations.place(addr, len)
        }
    }

    pub(super) fn resolve(&self, rank: usize, place: Place) -> Option<usize> {
        match place.space {
            0 => None,
            1 => Some(place.offset as usize),
            _ => self.state.allocations.resolve(rank, place),
        }
    }

    /// This rank's staging window for the coming step.
    pub(super) fn stage(&self) -> usize {
        self.core.control().stage(self.rank(), self.state.step + 1) as usize
    }

    /// A rank's staging window as of the last step.
    pub(super) fn staged(&self, rank: usize) -> usize {
        self.core.control().stage(rank, self.state.step) as usize
    }

    /// Arrives at the next step and waits for everyone to.
    pub(super) fn barrier(&mut self) -> Result<()> {
        self.state.step += 1;
        let step = self.state.step;
        let control = self.core.control();
        self.core.waiter.note_processor();
        control.own().step.store(step, Ordering::Release);
        control.notify();
        let behind = |rank: &usize| control.peer(*rank).step.load(Ordering::Acquire) < step;
        let mut next = 0;
        let arrived = || {
            while next < control.size() && !behind(&next) {
                next += 1;
            }
            next == control.size()
        };
        self.core.waiter.until(&self.waiting, arrived, || (0..control.size()).filter(behind).collect())
    }

    /// The first step of a call: publishes it, waits for everyone, and refuses calls that differ.
    pub(super) fn enter(&mut self, call: &Call) -> Result<()> {
        self.publish(call, Place::default(), Place::default(), 0)
    }

    fn publish(&mut self, call: &Call, send: Place, recv: Place, extra: u64) -> Result<()> {
        let step = self.state.step + 1;
        let calls = |rank: usize| &self.core.control().peer(rank).calls[(step % 2) as usize];
        call::publish(calls(self.rank()), call, send, recv, extra);
        self.barrier()?;
        let calls = |rank: usize| &self.core.control().peer(rank).calls[(step % 2) as usize];
        for rank in 0..self.size() {
            if !call::agrees(calls(rank), call) {
                let found = call::read(calls(rank)).call;
                return Err(CommError::Mismatch {
                    at: self.waiting.site(),
                    rank,
                    expected: call.to_string(),
                    found: found.map_or_else(|| "an unknown operation".into(), |call| call.to_string()),
                });
            }
        }
        Ok(())
    }

    /// A further step of a call: whether `mine` holds on all ranks.
    pub(super) fn unanimous(&mut self, call: &Call, mine: bool) -> Result<bool> {
        self.publish(call, Place::default(), Place::default(), u64::from(!mine))?;
        let published = |rank: usize| &self.core.control().peer(rank).calls[(self.state.step % 2) as usize];
        Ok((0..self.size()).all(|rank| call::read(published(rank)).extra == 0))
    }

    /// [`enter`](Self::enter) with operands. `None` when some rank's operand among those that `needed` asks for (send,
    /// recv) cannot be reached where it lies; equal on all ranks. With `cross`, equal on all ranks too, a send operand
    /// that is not shared is reachable through the kernel.
    pub(super) fn enter_with(
        &mut self,
        call: &Call,
        send: Operand,
        recv: Operand,
        extra: u64,
        cross: bool,
        needed: impl Fn(usize) -> (bool, bool),
    ) -> Result<Option<Peers>> {
        let mut place = self.place(send);
        if cross && place.space == 0 {
            place = Place { space: FAR, offset: send.0.0 };
        }
        self.publish(call, place, self.place(recv), extra)?;
        let size = self.size();
        let zeros = || vec![0; size];
        let mut peers = Peers { send: zeros(), recv: zeros(), extra: vec![0; size], far: vec![false; size] };
        for rank in 0..size {
            let published = call::read(&self.core.control().peer(rank).calls[(self.state.step % 2) as usize]);
            let (needs_send, needs_recv) = needed(rank);
            let far = published.send.space == FAR;
            let send = match needs_send {
                true if far => Some(published.send.offset as usize),
                true => self.resolve(rank, published.send),
                false => Some(0),
            };
            peers.far[rank] = far && needs_send;
            let recv = if needs_recv { self.resolve(rank, published.recv) } else { Some(0) };
            let (Some(send), Some(recv)) = (send, recv) else { return Ok(None) };
            (peers.send[rank], peers.recv[rank], peers.extra[rank]) = (send, recv, published.extra);
        }
        Ok(Some(peers))
    }

    /// Runs `work`, which uses peers' operands. A rank whose call fails waits for this to end before it returns.
    pub(super) fn touch(&self, work: impl FnOnce() -> Result<()>) -> Result<()> {
        struct Touching<'c>(&'c Control);
        impl Drop for Touching<'_> {
            fn drop(&mut self) {
                self.0.own().touching.store(0, Ordering::Release);
            }
        }
        // A failing rank declares itself and then looks at `touching`; this rank does the opposite, both sequentially
        // consistent, so at least one of the two sees the other.
        self.core.control().own().touching.store(1, Ordering::SeqCst);
        let _touching = Touching(self.core.control());
        self.core.waiter.failure(&self.waiting)?;
        work()
    }

    /// Calls `work` on consecutive ranges that make up `0..len`, looking for trouble between them.
    pub(super) fn pieces(&self, len: usize, work: impl Fn(usize, usize) + Sync) -> Result<()> {
        let piece = |index: usize| work(index * PIECE, ((index + 1) * PIECE).min(len));
        let count = len.div_ceil(PIECE);
        if len >= PARALLEL
            && let Some(pool) = self.core.pool()
        {
            use rayon::iter::{IntoParallelIterator, ParallelIterator};
            let control = self.core.control();
            pool.install(|| {
                (0..count).into_par_iter().for_each(|index| {
                    if !control.alarmed() {
                        piece(index);
                    }
                })
            });
            return self.core.waiter.failure(&self.waiting);
        }
        for index in 0..count {
            piece(index);
            if self.core.control().alarmed() {
                self.core.waiter.failure(&self.waiting)?;
            }
        }
        Ok(())
    }

    /// Runs `call` on a host communicator, where an abort of this communicator finds it.
    pub(super) fn on_host<T>(
        &self,
        host: &Arc<dyn HostComm>,
        call: impl FnOnce(&dyn HostComm, Deadline) -> Result<T>,
    ) -> Result<T> {
        *lock(&self.core.waiting_in) = Some(host.clone());
        // An abort either came before, and is seen here, or finds the host communicator.
        let own = self.core.control().standing(self.rank()).0;
        let result = if own == Standing::Aborted {
            Err(CommError::Aborted { at: self.waiting.site() })
        } else {
            call(&**host, self.waiting.deadline)
        };
        *lock(&self.core.waiting_in) = None;
        result.map_err(|error| at_home(&self.waiting, error))
    }
}
