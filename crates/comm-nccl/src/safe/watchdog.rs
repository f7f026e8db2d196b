//! The thread that watches a communicator and, at its end, takes it down.
//!
//! It alone ends the native communicator, so an abort, a close and a drop come down to telling it; the caller never
//! waits inside NCCL. It ends itself when the communicator is down.

use std::sync::Arc;
use std::sync::TryLockError;
use std::time::{Duration, Instant};

use comm_core::{CommError, Deadline, OpKind, Result};
use comm_kernels::exit;

use super::diagnose::may_come_from_a_peer;
use super::remains::{self, Remains};
use super::state::{Native, Pause, Shared, lock};
use super::track::Progress;
use crate::driver::{self, Current, RelaxedCapture};
use crate::result;

/// Short enough that noticing, asking the other ranks and naming one stays within half a second.
pub(crate) const INTERVAL: Duration = Duration::from_millis(25);
/// How long a dropped communicator may take to flush before it is aborted.
const FLUSH_TIME: Duration = Duration::from_secs(2);
/// How long the ranks of a closed communicator wait for one another to have given it back.
const MEET_TIME: Duration = Duration::from_secs(1);

/// Starts the watchdog.
pub(crate) fn spawn(shared: Arc<Shared>) -> Result<()> {
    let name = format!("nccl-watch-{}", shared.info.rank);
    let live = exit::Live::new();
    remains::enter(&shared);
    let watched = shared.clone();
    std::thread::Builder::new()
        .name(name)
        .spawn(move || {
            run(&watched);
            // It may be what keeps the context alive, so this too is before the thread counts as ended.
            drop(watched);
            drop(live);
        })
        .map(drop)
        .map_err(|error| {
            remains::release(&shared);
            CommError::io("starting a communicator's watchdog thread", &error)
        })
}

fn run(shared: &Shared) {
    driver::relax_capture_rules();
    let current = match Current::enter(&shared.base.context) {
        Ok(current) => current,
        Err(error) => {
            // Without its context nothing can be given back; the failure is what callers learn.
            let cause = shared.fail(error);
            lock(&shared.native).comm = std::ptr::null_mut();
            remains::release(shared);
            finish(shared, Err(cause));
            return;
        }
    };
    let outcome = loop {
        let (close, dropped) = {
            let ending = lock(&shared.ending);
            let idle = !(ending.close || ending.dropped || shared.has_failed());
            let ending = if idle {
                shared
                    .changed
                    .wait_timeout(ending, INTERVAL)
                    .unwrap_or_else(std::sync::PoisonError::into_inner)
                    .0
            } else {
                ending
            };
            (ending.close, ending.dropped)
        };
        if dropped {
            depart(shared);
        }
        if let Err(cause) = shared.healthy()
            && shared.has_failed()
        {
            abort(shared);
            break Err(cause);
        }
        if close {
            break end(shared, true, shared.base.timeout);
        }
        if dropped {
            break end(shared, false, shared.base.timeout);
        }
        if exit::is_near() {
            // Nobody is ending the communicator, so it goes with the process.
            break Err(shared.closed());
        }
        look(shared);
    };
    drop(current);
    finish(shared, outcome);
}

fn finish(shared: &Shared, outcome: Result<()>) {
    drop(lock(&shared.farewell).take());
    lock(&shared.ending).outcome = Some(outcome);
    shared.changed.notify_all();
}

/// One look at everything that can go wrong. Declares what it finds.
fn look(shared: &Shared) {
    if let Err(error) = shared.observe() {
        let timed_out = matches!(
            &error,
            CommError::PeerFailed { cause, .. } if matches!(**cause, CommError::Timeout { .. })
        );
        if timed_out {
            shared.peer_overdue(shared.waiting(), error);
        } else {
            shared.fail(error);
        }
        return;
    }
    let found = {
        let mut native = match shared.native.try_lock() {
            Ok(native) => native,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            // A call is under way, and watches itself.
            Err(TryLockError::WouldBlock) => return,
        };
        inspect(shared, &mut native)
    };
    match found {
        Ok(Progress::Overdue(issued, waited)) => drop(shared.overdue(issued, waited)),
        Ok(_) => {}
        Err(error) => drop(shared.blame(error)),
    }
}

/// Lets go of the host communicators that a dropped handle has left. First a last look, while the other ranks can still be
/// told what it finds: from then on they take this rank for one that left. Whoever dropped the handle may have done so for an
/// error that this thread has not seen yet, or is about to find a peer to blame for.
fn depart(shared: &Shared) {
    if lock(&shared.hosts).is_none() {
        return;
    }
    if shared.healthy().is_ok() {
        look(shared);
    }
    // In a statement of its own, so that the lock is not held while they are dropped.
    let hosts = lock(&shared.hosts).take();
    drop(hosts);
}

/// Declares an error of the device's that the watchdog has not seen yet, before a thread that panics takes the host
/// communicators with it, which is its rank's death. Waits for nothing but the lock, and briefly.
pub(crate) fn report_last(shared: &Shared) {
    if shared.healthy().is_err() {
        return;
    }
    // The caller's thread may be in the middle of a capture, which asking the device would fail in, and spoil.
    let _relaxed = RelaxedCapture::new();
    let deadline = Deadline::after(INTERVAL);
    let found = Current::enter(&shared.base.context).and_then(|_current| {
        loop {
            let mut native = match shared.native.try_lock() {
                Ok(native) => native,
                Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
                Err(TryLockError::WouldBlock) if deadline.has_passed() => return Ok(()),
                Err(TryLockError::WouldBlock) => {
                    std::thread::sleep(Duration::from_micros(50));
                    continue;
                }
            };
            return inspect(shared, &mut native).map(drop);
        }
    });
    // An error that may come from a peer is left to the watchdog, which waits for the peer's name.
    if let Err(error) = found
        && !may_come_from_a_peer(&error)
    {
        shared.fail(error);
    }
}

/// One look at NCCL and at the device. The context is current, and captures do not bind this thread.
pub(crate) fn inspect(shared: &Shared, native: &mut Native) -> Result<Progress> {
    if !native.comm.is_null() {
        // SAFETY: the communicator is live and the lock is held.
        let _ = unsafe { shared.base.library.comm_state(native.comm) }?;
    }
    native.tracker.as_mut().map_or(Ok(Progress::Idle), |tracker| {
        shared.note_replayed(tracker);
        tracker.check(shared.base.timeout)
    })
}

/// Ends a healthy communicator: lets its work finish, flushes it and gives everything back.
fn end(shared: &Shared, collective: bool, timeout: Duration) -> Result<()> {
    let deadline = Deadline::after(timeout);
    let ended = drain(shared, deadline, OpKind::Close).and_then(|()| {
        if collective {
            let control = shared.hosts()?.control;
            control.barrier(deadline).map_err(|e| shared.relocate(e, Some(OpKind::Close)))?;
            flush(shared, deadline)
        } else {
            flush(shared, Deadline::after(FLUSH_TIME.min(timeout)))
        }
    });
    if let Err(error) = ended {
        let cause = shared.fail(error);
        abort(shared);
        return Err(cause);
    }
    let left = Remains::take(shared, &mut lock(&shared.native));
    // Without the lock, so that a call that came just too late is refused and does not wait for NCCL.
    let kept = remains::keep(shared, left);
    if collective && shared.base.limits.shares_process() {
        // A rank that has died since does not make this rank's end a bad one. Neither does one that is giving memory
        // back, which may take until this rank has returned and gone on with other work.
        let deadline = Deadline::after(deadline.remaining().min(MEET_TIME));
        let waited = shared.hosts().and_then(|hosts| hosts.control.barrier(deadline));
        if let Err(error) = waited {
            tracing::debug!(comm = shared.info.name, %error, "not all ranks have seen the end");
        }
    }
    kept
}

/// Waits for enqueued work on behalf of a call, within the communicator's timeout. The context is current.
pub(crate) fn quiesce(shared: &Shared, op: OpKind) -> Result<()> {
    drain(shared, Deadline::after(shared.base.timeout), op).map_err(|error| match error {
        error @ (CommError::Cuda { .. } | CommError::Backend { .. }) => shared.blame(error),
        // Work that does not end means that the communicator is lost, whoever finds out.
        error @ CommError::Timeout { .. } => shared.fail(error),
        other => other,
    })
}

/// Waits for enqueued work.
fn drain(shared: &Shared, deadline: Deadline, op: OpKind) -> Result<()> {
    loop {
        shared.observe()?;
        if shared.has_failed() {
            return shared.healthy();
        }
        let waiting = match shared.native.try_lock() {
            Ok(mut native) => inspect(shared, &mut native)?,
            Err(TryLockError::Poisoned(poisoned)) => inspect(shared, &mut poisoned.into_inner())?,
            // A call is under way, and may be for as long as NCCL likes: waiting for it here would be without bound.
            Err(TryLockError::WouldBlock) => Progress::Pending,
        };
        match waiting {
            // Asked after the completion, which an abort elsewhere may have brought about.
            Progress::Idle => return shared.overtaken(),
            Progress::Overdue(issued, waited) => return Err(shared.overdue(issued, waited)),
            Progress::Pending if deadline.has_passed() => {
                return Err(CommError::Timeout {
                    at: shared.at(op, shared.seq()),
                    missing: Vec::new(),
                    waited: deadline.elapsed(),
                });
            }
            Progress::Pending => std::thread::sleep(Duration::from_millis(1)),
        }
    }
}

fn flush(shared: &Shared, deadline: Deadline) -> Result<()> {
    let native = lock(&shared.native);
    if native.comm.is_null() {
        return Ok(());
    }
    // SAFETY: the communicator is live and the lock is held; it takes no other calls any more.
    let mut progress = unsafe { shared.base.library.comm_finalize(native.comm) }?;
    let mut pause = Pause::new();
    while progress == result::Progress::Running {
        let waited = pause.wait();
        if deadline.has_passed() {
            let at = shared.at(OpKind::Close, shared.seq());
            return Err(CommError::Timeout { at, missing: Vec::new(), waited });
        }
        if shared.has_failed() {
            return shared.healthy();
        }
        // SAFETY: as above.
        progress = unsafe { shared.base.library.comm_state(native.comm) }?;
    }
    Ok(())
}

/// Ends a failed communicator: its kernels leave their waits, after the other ranks know.
fn abort(shared: &Shared) {
    let start = Instant::now();
    // Whoever declared the failure holds this until the others have been told, which comes before any kernel leaves.
    drop(lock(&shared.hosts));
    // Calls see the failure between two looks at NCCL, so the lock is free within microseconds.
    let comm = std::mem::replace(&mut lock(&shared.native).comm, std::ptr::null_mut());
    // Without the lock, so that a call that came just too late is refused and does not wait for NCCL.
    if !comm.is_null() {
        let farewell = lock(&shared.farewell).clone();
        if let Some(farewell) = farewell {
            farewell.leave();
        }
        // SAFETY: it was taken out under the lock, so no other thread is inside NCCL with it, nor can be again.
        if let Err(error) = unsafe { shared.base.library.comm_abort(comm) }.map(drop) {
            tracing::warn!(comm = shared.info.name, %error, "aborting a communicator");
        }
    }
    // Registrations went with the communicator; the rest did not.
    let left = Remains::take(shared, &mut lock(&shared.native));
    if let Err(error) = remains::keep(shared, left) {
        tracing::warn!(comm = shared.info.name, %error, "giving back what an aborted communicator held");
    }
    tracing::debug!(comm = shared.info.name, took = ?start.elapsed(), "communicator taken down");
}
