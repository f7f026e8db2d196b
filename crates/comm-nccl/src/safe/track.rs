//! Whether enqueued work is still making progress.
//!
//! Two events suffice: one marks the oldest call not yet seen complete, the other is recorded again after every later
//! call. When the first completes, the second takes its place. So a call costs at most one `cuEventRecord`, and a call
//! that is stuck is noticed however many are enqueued behind it. Work captured into a graph is watched by [`Marks`],
//! because an event recorded then belongs to the graph.

use std::sync::Arc;
use std::time::{Duration, Instant};

use comm_core::{OpKind, Result, StreamHandle};
use comm_kernels::Kernels;

use super::marks::{Marks, Placement};
use super::runs::Bounds;
use crate::driver::Event;

/// A call, as far as diagnosis needs it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Issued {
    pub(crate) kind: OpKind,
    /// Calls before it on this communicator, for errors.
    pub(crate) seq: u64,
    /// Which collective it is; `None` for point-to-point calls.
    pub(crate) arrival: Option<Arrival>,
}

/// Which of the collectives a call is, in numbers that are the same on all ranks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Arrival {
    /// The collectives called before it.
    Called(u64),
    /// One that a replay is in: [`Replayed`] tells which it may be.
    Replayed,
}

/// How far replays are, in captured collectives, and what else they are in.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Replayed {
    /// Those of the runs that are over.
    pub(crate) finished: u64,
    /// Those of the runs that have begun. Inside a run, all of its collectives count, though the later ones may not have
    /// begun.
    pub(crate) begun: u64,
    /// Whether a run of captured transfers is under way.
    pub(crate) transferring: bool,
}

impl Replayed {
    /// Whether a run of collectives is under way.
    pub(crate) const fn inside(self) -> bool {
        // The mark of a beginning may be late.
        self.begun > self.finished
    }

    /// How many have begun, exactly, where no run is under way, neither of collectives nor of transfers.
    pub(crate) fn rest(self) -> Option<u64> {
        (!self.inside() && !self.transferring).then_some(self.finished)
    }
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
    marks: Option<Marks>,
}

impl Tracker {
    /// With `kernels`, captured calls are watched too, in runs that fit the timeout `allowed`.
    pub(crate) fn new(kernels: Option<(Arc<Kernels>, Placement)>, allowed: Duration) -> Result<Self> {
        let first = Event::new()?;
        let second = match Event::new() {
            Ok(second) => second,
            Err(error) => {
                first.destroy();
                return Err(error);
            }
        };
        let mut tracker = Self { events: [first, second], oldest: None, newest: None, marks: None };
        let bounds = Bounds::within(allowed);
        match kernels.map(|(kernels, placement)| Marks::new(kernels, placement, bounds)).transpose() {
            Ok(marks) => {
                tracker.marks = marks;
                Ok(tracker)
            }
            Err(error) => {
                tracker.destroy();
                Err(error)
            }
        }
    }

    /// Marks that a call that moves `bytes` bytes is about to be captured.
    pub(crate) fn capture_start(&mut self, issued: Issued, bytes: usize, stream: StreamHandle) -> Result<()> {
        self.marks.as_mut().map_or(Ok(()), |marks| marks.start(issued, bytes, stream))
    }

    /// Marks that the call that was last about to be captured has been.
    pub(crate) fn capture_finish(
        &mut self,
        issued: Issued,
        bytes: usize,
        stream: StreamHandle,
    ) -> Result<()> {
        self.marks.as_mut().map_or(Ok(()), |marks| marks.finish(issued, bytes, stream))
    }

    /// How far all replays so far are.
    pub(crate) fn replayed(&self) -> Replayed {
        self.marks.as_ref().map_or_else(Replayed::default, Marks::replayed)
    }

    /// Marks a call that has just been enqueued.
    pub(crate) fn record(&mut self, issued: Issued, stream: StreamHandle) -> Result<()> {
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

    /// Looks at what is outstanding. Reports errors of earlier work on the device even when nothing is.
    pub(crate) fn check(&mut self, allowed: Duration) -> Result<Progress> {
        let called = self.check_events(allowed)?;
        let replayed = self.marks.as_mut().map_or(Progress::Idle, |marks| marks.check(allowed));
        Ok(match (called, replayed) {
            (Progress::Overdue(issued, waited), _) | (_, Progress::Overdue(issued, waited)) => {
                Progress::Overdue(issued, waited)
            }
            (Progress::Idle, Progress::Idle) => Progress::Idle,
            _ => Progress::Pending,
        })
    }

    fn check_events(&mut self, allowed: Duration) -> Result<Progress> {
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
        let called = match self.check_events(Duration::MAX) {
            Ok(Progress::Pending) => self.oldest.map(|oldest| (oldest.issued, oldest.since.elapsed())),
            _ => None,
        };
        called.or_else(|| self.marks.as_mut()?.waiting())
    }

    pub(crate) fn destroy(self) {
        if let Some(marks) = self.marks {
            marks.destroy();
        }
        self.events.into_iter().for_each(Event::destroy);
    }
}
