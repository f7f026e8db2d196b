//! The order of calls that come on several streams, and whether all of them are over.
//!
//! All calls of a communicator share its channels: counters that go up by one call at a time, and slots that the next
//! call uses again. Two of its kernels that ran at once would take each other's places, and if on another rank they ran in
//! the other order, each would get the other's data. On one stream the driver keeps the order of the calls. This module
//! keeps it where the stream changes: the new stream waits for an event that is recorded on the old one then, and not after
//! each call, because calls mostly stay on their stream, and an event between two kernels costs more than the second
//! one's launch. So the old stream must still exist at that time (`DeviceComm`'s safety section; for calls that are safe, this
//! module holds its owner).
//!
//! What is captured runs later, and where its graph is launched: within one capture the order becomes an edge of the
//! graph, and between graphs and other calls it is the caller's: where they overlap, results are wrong.
//!
//! The end of a communicator has to know when its last kernel has ended, and may not ask for the whole device: that would
//! break any capture that is under way there, and wait for work that may itself wait for this rank. So it is the last
//! call's event that tells, and that all graphs are gone that hold calls.

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use comm_core::{CommError, Result, StreamHandle};
use comm_kernels::capture::{Position, position, when_gone};
use comm_kernels::raw::{Event, is_capturing};

/// The stream that every thread has of its own under the same handle (`CU_STREAM_PER_THREAD`).
const PER_THREAD: StreamHandle = StreamHandle(2);

/// Where the last calls were made. Without an event it orders nothing.
#[derive(Default)]
pub(crate) struct Order {
    last: Option<StreamHandle>,
    /// Of the last call that was captured: which capture, and the stream.
    captured: Option<(Position, StreamHandle)>,
    /// Keeps the stream of `last` alive.
    owner: Option<Arc<dyn Any + Send + Sync>>,
    event: Option<Event>,
    /// Whether the event marks the end of all calls that were not captured; `None` before their end.
    is_marked: Option<bool>,
    /// Captures with calls in them whose graphs are not gone.
    graphs: Arc<AtomicUsize>,
}

/// What of a communicator's work may still be running.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Left {
    Nothing,
    Calls,
    /// Graphs that hold calls, whether they run or not.
    Graphs,
    /// Calls that cannot be asked about.
    Unknown,
}

impl Order {
    /// The context is current. `switched_off`, for tests only: calls are left to overtake each other.
    pub(crate) fn new(switched_off: bool) -> Result<Self> {
        let mut order = Self::default();
        order.event = (!switched_off).then(Event::new).transpose()?;
        Ok(order)
    }

    /// Lets what will be enqueued on `stream` wait for all calls before. Whether that is captured.
    ///
    /// # Errors
    /// [`CommError::InvalidArgument`], and nothing has changed, if the last call's stream is being captured by now: what it
    /// ran before cannot be waited for then. [`CommError::Cuda`].
    pub(crate) fn follow(&mut self, stream: StreamHandle) -> Result<bool> {
        if is_capturing(stream) {
            // SAFETY: the caller of the operation vouches for the stream, and for nobody else's using it meanwhile. A capture
            // that cannot be asked is spoilt, as the launch will find.
            if let Ok(Some(now)) = unsafe { position(stream) } {
                match self.captured.take() {
                    Some((before, last)) if before.same_capture(&now) => {
                        if last != stream {
                            self.chain(last, stream)?;
                        }
                    }
                    _ => self.count(&now)?,
                }
                self.captured = Some((now, stream));
            }
            return Ok(true);
        }
        match self.last {
            // Of the streams with this handle the last may have been another thread's; see `enqueued`.
            Some(PER_THREAD) => self.wait(stream)?,
            Some(last) if last != stream => {
                if is_capturing(last) {
                    return Err(CommError::invalid(
                        "stream",
                        "the stream of the call before is being captured, so this call on another stream could \
                         overtake it; end the capture first, or make both on one stream",
                    ));
                }
                self.chain(last, stream)?;
            }
            _ => {}
        }
        if self.last != Some(stream) {
            self.last = Some(stream);
            self.owner = None;
        }
        Ok(false)
    }

    /// A call on `stream` has been enqueued, not captured.
    pub(crate) fn enqueued(&self, stream: StreamHandle) -> Result<()> {
        // Only this thread can name its own stream, so the event cannot be left to the next call.
        match &self.event {
            Some(event) if stream == PER_THREAD => event.record(stream),
            _ => Ok(()),
        }
    }

    /// `owner` keeps `stream` alive: it is held until a call has been made on another one.
    pub(crate) fn hold(&mut self, stream: StreamHandle, owner: Arc<dyn Any + Send + Sync>) {
        // The last call may be another thread's by now, and the order no longer hang on this stream.
        if self.last == Some(stream) && self.owner.is_none() {
            self.owner = Some(owner);
        }
    }

    /// Counts the graph of a capture until it is gone.
    fn count(&self, capture: &Position) -> Result<()> {
        let graphs = Arc::clone(&self.graphs);
        graphs.fetch_add(1, Ordering::Relaxed);
        when_gone(capture.graph(), move || {
            graphs.fetch_sub(1, Ordering::Release);
        })
    }

    /// Marks the end of all calls, of which none comes after this. The last one's stream must still exist, so this is for
    /// the thread that ends the communicator, before its owner goes on.
    pub(crate) fn mark(&mut self) {
        if self.is_marked.is_some() {
            return;
        }
        self.is_marked = Some(match (&self.event, self.last) {
            (_, None) | (Some(_), Some(PER_THREAD)) => true,
            (Some(event), Some(last)) => !is_capturing(last) && event.record(last).is_ok(),
            (None, Some(_)) => false,
        });
    }

    /// What is left of the calls. The context is current.
    ///
    /// # Errors
    /// [`CommError::Cuda`]: a call has failed.
    pub(crate) fn left(&self) -> Result<Left> {
        if self.is_marked != Some(true) {
            return Ok(Left::Unknown);
        }
        if let (Some(event), Some(_)) = (&self.event, self.last)
            && !event.is_done()?
        {
            return Ok(Left::Calls);
        }
        Ok(if self.graphs.load(Ordering::Acquire) > 0 { Left::Graphs } else { Left::Nothing })
    }

    fn chain(&self, last: StreamHandle, next: StreamHandle) -> Result<()> {
        let Some(event) = &self.event else { return Ok(()) };
        event.record(last)?;
        event.awaited_by(next)
    }

    fn wait(&self, next: StreamHandle) -> Result<()> {
        self.event.as_ref().map_or(Ok(()), |event| event.awaited_by(next))
    }
}

impl Drop for Order {
    fn drop(&mut self) {
        // The context is current wherever a communicator's belongings are given back.
        if let Some(event) = self.event.take() {
            event.destroy();
        }
    }
}
