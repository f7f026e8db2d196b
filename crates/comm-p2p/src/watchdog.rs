//! The thread that watches a communicator and, at its end, gives back what it owns.
//!
//! It alone unmaps memory, after it has seen the communicator's work over, so an abort, a close and a drop come down to telling it.
//! It ends itself when everything is given back.

use std::sync::{Arc, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use comm_core::{CommError, Deadline, OpKind, Result};
use comm_kernels::exit;
use comm_kernels::p2p::HUSHED;
use comm_kernels::raw::{self, Current, RelaxedCapture, check};
use cudarc::driver::sys;

use crate::captured::take_back;
use crate::order::{Left, Order};
use crate::state::{Channels, Shared, lock};
use crate::symmetric::ipc::User;
use crate::symmetric::table::Table;

/// Short enough that a death is known to kernels and callers well within a second.
const INTERVAL: Duration = Duration::from_millis(25);

/// How often flags are lifted: a small part of the time that 2^30 rounds take, at least half an hour. The first time is at
/// once, for whoever checks that all kernels run.
const LIFT_INTERVAL: Duration = Duration::from_secs(60);

/// How long work that is left at the end may take before the other ranks are looked at again.
const PATIENCE: Duration = Duration::from_millis(500);

/// How long a close lets graphs take that have been dropped: the driver tells by a thread of its own.
const GRAPHS_TIME: Duration = Duration::from_millis(200);

/// Starts the watchdog.
pub(crate) fn spawn(shared: Arc<Shared>) -> Result<()> {
    let live = exit::Live::new();
    let user = User::new(shared.base.ordinal);
    std::thread::Builder::new()
        .name(format!("p2p-watch-{}", shared.info.rank))
        .spawn(move || {
            run(&shared, user);
            // It may be what keeps the context alive, so this too is before the thread counts as ended.
            drop(shared);
            drop(live);
        })
        .map(drop)
        .map_err(|error| CommError::io("starting a communicator's watchdog thread", &error))
}

fn run(shared: &Shared, user: User) {
    raw::relax_capture_rules();
    let outcome = match Current::enter(&shared.base.context) {
        Ok(_current) => {
            let outcome = watch(shared);
            drop(user);
            outcome
        }
        // Without its context nothing can be given back; the failure is what callers learn.
        Err(error) => Err(shared.fail(error)),
    };
    lock(&shared.ending).outcome = Some(outcome);
    shared.changed.notify_all();
}

fn watch(shared: &Shared) -> Result<()> {
    let mut hushed = false;
    let mut next_lift = Instant::now();
    loop {
        let (close, dropped) = {
            let ending = lock(&shared.ending);
            let ending = if ending.close || ending.dropped {
                ending
            } else {
                shared.changed.wait_timeout(ending, INTERVAL).unwrap_or_else(PoisonError::into_inner).0
            };
            (ending.close, ending.dropped)
        };
        if shared.has_failed() && !hushed {
            hush(shared);
            hushed = true;
        }
        if close || dropped {
            return end(shared, close);
        }
        if exit::is_near() {
            // Nobody is ending the communicator, so it goes with the process.
            shared.let_go();
            std::mem::forget(take(shared));
            return Err(shared.closed());
        }
        if next_lift <= Instant::now() && !shared.has_failed() {
            next_lift = Instant::now() + LIFT_INTERVAL;
            if let Err(error) = lift(shared) {
                shared.fail(error);
            }
        }
        // A failed communicator keeps its memory until it is closed or dropped: a graph may still be replayed, whose
        // kernels then leave at once.
        if !shared.has_failed() {
            let seen = shared
                .observe()
                .and_then(|()| shared.calls_are_alike())
                .and_then(|()| device_is_fit(shared))
                .and_then(|()| take_back(shared));
            if let Err(error) = seen {
                shared.fail(error);
            }
        }
    }
}

/// Whether earlier work on the device has failed. Asks without waiting, and not while a call is under way: one may be in a
/// driver call that waits for kernels, and this thread should stay able to end those kernels' waits. One that begins in
/// between can hold it up, for no longer than those kernels' own timeouts.
fn device_is_fit(shared: &Shared) -> Result<()> {
    if matches!(shared.owned.try_lock(), Err(TryLockError::WouldBlock)) {
        return Ok(());
    }
    shared.fitness.ask()
}

/// Declares an error of the device's that the watchdog has not seen yet, while the other ranks can still be told, before
/// the handle is closed or dropped: they would take this rank for one that left, and wait for it until their timeout. Waits
/// for nothing, and asks the device whatever the watchdog is doing: that may be held up in the same question, by the fault
/// that the caller has met already. What became of the other ranks is not asked unless a wait of this one's was given up:
/// those that have dropped theirs before must not end work that is still under way here.
pub(crate) fn report_last(shared: &Shared) {
    if shared.healthy().is_err() {
        return;
    }
    let _relaxed = RelaxedCapture::new();
    let seen = Current::enter(&shared.base.context)
        .and_then(|_current| shared.given_up().map_or(Ok(()), Err).and_then(|()| shared.fitness.ask()));
    if let Err(error) = seen {
        shared.fail(error);
    }
}

/// See [`P2pKernels::lift`](comm_kernels::p2p::P2pKernels::lift).
fn lift(shared: &Shared) -> Result<()> {
    let Some(channels) = &shared.channels else { return Ok(()) };
    let Channels { packet, lamport, lines, cells, .. } = channels;
    shared.fitness.enqueue(|stream| {
        [packet, lamport, lines, cells].into_iter().try_for_each(|link| {
            // SAFETY: the channels live until the communicator is given back, which waits for the stream (`settle`).
            unsafe { channels.kernels.lift(link, stream) }
        })
    })
}

/// Has kernels that start from now on send nothing, as those do that start after a wait has been given up. The others may
/// have given up waiting for this rank, have closed, and use their buffers for something else.
fn hush(shared: &Shared) {
    let Some(channels) = &shared.channels else { return };
    let hushed = shared.fitness.enqueue(|stream| {
        // SAFETY: a word of the communicator's memory, which is not given back before the stream has been waited for.
        let code =
            unsafe { sys::cuMemsetD32Async(channels.barrier.broken.0, HUSHED, 1, raw::stream(stream)) };
        check("cuMemsetD32Async", code)
    });
    if let Err(error) = hushed {
        tracing::debug!(comm = shared.info.name, %error, "later kernels could not be hushed");
    }
}

/// Waits for the communicator's work and gives everything back.
///
/// The ranks of a collective close meet before each waits for its work, not after: some of that may be behind what another
/// rank is to enqueue after its own close, on another communicator, say. Nobody needs the others' work to be over: once
/// this rank's kernels have ended, and no wait of them was given up, no other rank's kernel has anything left to do in this
/// rank's buffers (the arguments above the kernels), and its own memory every rank keeps by its mapping. After a failure a
/// late rank's kernel may still store into buffers that callers registered (see `P2pFactory`).
fn end(shared: &Shared, collective: bool) -> Result<()> {
    let deadline = shared.deadline();
    if collective && !shared.has_failed() {
        let meet = || {
            let control = shared.control()?;
            control.barrier(deadline).map_err(|error| shared.relocate(error, OpKind::Close))
        };
        // A caller may close because it has met an error of its device. The others would not come to the meeting: they
        // wait in kernels for what has failed here, and are to learn why.
        if let Err(error) = shared.observe().and_then(|()| shared.fitness.ask()).and_then(|()| meet()) {
            shared.fail(error);
        }
    }
    let mut idle = drain(shared, collective);
    // What has been enqueued may have failed while it was waited for. The other ranks may have left by now.
    if idle.is_ok()
        && let Some(cause) = shared.given_up()
    {
        shared.fail(cause);
    }
    if let Err(error) = &idle {
        shared.fail(error.clone());
        idle = drain(shared, collective);
    }
    let outcome = if shared.has_failed() { shared.healthy() } else { Ok(()) };
    if idle.is_ok() {
        give_back(shared);
        if collective && outcome.is_ok() {
            leave_together(shared);
        }
    } else {
        // Unmapping memory under a running kernel would be worse than keeping it.
        tracing::warn!(
            comm = shared.info.name,
            "work does not end: the communicator's memory is not given back"
        );
        shared.let_go();
        std::mem::forget(take(shared));
    }
    outcome
}

/// Waits until the communicator's work is over. Its kernels' waits are bounded, so only work of others before them can make
/// this long; it is the watchdog that waits, and the caller for no longer than its own deadline. Meanwhile it goes on
/// watching: a rank whose death would be noticed here alone must still end the kernels that wait for it.
fn drain(shared: &Shared, collective: bool) -> Result<()> {
    let start = Instant::now();
    let mut next_look = start + PATIENCE;
    loop {
        let left = lock(&shared.owned).order.left()?;
        match left {
            Left::Nothing => return shared.fitness.settle(),
            // Who closes has been asked to drop graphs before, and may still wait for this.
            Left::Graphs if collective && start.elapsed() > GRAPHS_TIME => {
                return synchronize(shared.deadline());
            }
            Left::Graphs if exit::is_near() => return Err(shared.closed()),
            Left::Graphs | Left::Calls => {}
        }
        // Not at once: a rank that has left after its own close, before this one is through, has done no harm.
        if Instant::now() > next_look && !shared.has_failed() {
            next_look = Instant::now() + INTERVAL;
            if let Err(error) = shared.observe() {
                shared.fail(error);
            }
        }
        // Soon at first, for who waits for a close; what takes long is not asked about as often.
        std::thread::sleep((start.elapsed() / 8).clamp(Duration::from_micros(20), INTERVAL));
    }
}

/// Waits for all of the device's work, where nothing else will do: it breaks captures that are under way there, and is
/// refused as long as they are.
fn synchronize(deadline: Deadline) -> Result<()> {
    loop {
        // SAFETY: the context is current.
        match unsafe { sys::cuCtxSynchronize() } {
            sys::CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED
            | sys::CUresult::CUDA_ERROR_STREAM_CAPTURE_IMPLICIT
                if !deadline.has_passed() =>
            {
                std::thread::sleep(Duration::from_millis(1));
            }
            code => return check("cuCtxSynchronize", code),
        }
    }
}

/// On a shared device no rank goes on before all have given back: its next calls, on another communicator, would be among
/// the work that the others wait for here, and may themselves wait for those. What has been done stays done, so that this
/// fails is no failure of the close.
fn leave_together(shared: &Shared) {
    let met = shared.control().and_then(|control| shared.meet_if_shared(&*control));
    if let Err(error) = met {
        tracing::debug!(comm = shared.info.name, %error, "the ranks on shared devices did not leave together");
    }
}

fn take(shared: &Shared) -> crate::state::Owned {
    let mut owned = lock(&shared.owned);
    crate::state::Owned {
        table: std::mem::replace(&mut owned.table, Table::new(0)),
        captured: owned.captured.take(),
        order: std::mem::replace(&mut owned.order, Order::none()),
        chain: 0,
        scratch: owned.scratch.take(),
        words: owned.words.take(),
        sentinel: owned.sentinel.take(),
    }
}

fn give_back(shared: &Shared) {
    shared.let_go();
    drop(take(shared));
    tracing::debug!(comm = shared.info.name, rank = shared.info.rank, "gave the communicator's memory back");
}
