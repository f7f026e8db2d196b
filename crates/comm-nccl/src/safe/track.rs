//! Whether enqueued work is still making progress.
//!
//! Two events suffice: one marks the oldest call not yet seen complete, the other is recorded again after every later
//! call. When the first completes, the second takes its place. So a call costs at most one `cuEventRecord`, and a call
//! that is stuck is noticed however many are enqueued behind it. Work captured into a graph is not tracked: an event
//! recorded then belongs to the graph.

use std::time::{Duration, Instant};

use comm_core::{OpKind, Result, StreamHandle};

use crate::driver::{self, Event};

/// A call, as far as diagnosis needs it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Issued {
    pub(crate) kind: OpKind,
    /// Calls before it on this communicator, for errors.
    pub(crate) seq: u64,
    /// Collectives before it, which all ranks count alike; `None` for point-to-point calls.
    pub(crate) collective: Option<u64>,
}

#[derive(Clone, Copy)]
struct Watched {
    issued: Issued,
    slot: usize,
    since: Instant,
}

/// What a look at the events showed.
pub(crate) enum Progress {
    /// Nothing is outstanding.
    Idle,
    /// Work is outstanding, within its time.
    Pending,
    /// This call has made no progress for longer than allowed.
    Overdue(Issued, Duration),
}

/// The two events. Used only under the communicator's lock.
pub(crate) struct Tracker {
    events: [Event; 2],
    oldest: Option<Watched>,
    newest: Option<Watched>,
}

impl Tracker {
    pub(crate) fn new() -> Result<Self> {
        let first = Event::new()?;
        match Event::new() {
            Ok(second) => Ok(Self { events: [first, second], oldest: None, newest: None }),
            Err(error) => {
                first.destroy();
                Err(error)
            }
        }
    }

    /// Marks a call that has just been enqueued.
    pub(crate) fn record(&mut self, issued: Issued, stream: StreamHandle) -> Result<()> {
        if driver::is_capturing(stream) {
            return Ok(());
        }
        let slot = self.oldest.map_or(0, |oldest| 1 - oldest.slot);
        self.events[slot].record(stream)?;
        let watched = Some(Watched { issued, slot, since: Instant::now() });
        if self.oldest.is_none() {
            self.oldest = watched;
        } else {
            self.newest = watched;
        }
        Ok(())
    }

    /// Looks at the events. Reports errors of earlier work on the device even when nothing is outstanding.
    pub(crate) fn check(&mut self, allowed: Duration) -> Result<Progress> {
        let Some(oldest) = self.oldest else {
            self.events[0].is_done()?;
            return Ok(Progress::Idle);
        };
        if !self.events[oldest.slot].is_done()? {
            let waited = oldest.since.elapsed();
            return Ok(if waited >= allowed {
                Progress::Overdue(oldest.issued, waited)
            } else {
                Progress::Pending
            });
        }
        // Progress was made, so the time of what is outstanding starts again.
        self.oldest = self.newest.take().map(|newest| Watched { since: Instant::now(), ..newest });
        match self.oldest {
            Some(next) if !self.events[next.slot].is_done()? => Ok(Progress::Pending),
            _ => {
                self.oldest = None;
                Ok(Progress::Idle)
            }
        }
    }

    /// The oldest call that is not complete, and for how long it has been outstanding.
    pub(crate) fn waiting(&mut self) -> Option<(Issued, Duration)> {
        match self.check(Duration::MAX) {
            Ok(Progress::Pending) => self.oldest.map(|oldest| (oldest.issued, oldest.since.elapsed())),
            _ => None,
        }
    }

    pub(crate) fn destroy(self) {
        self.events.into_iter().for_each(Event::destroy);
    }
}
