//! The order of calls that come on several streams, and whether all of them are over.
//!
//! All calls of a communicator share its channels: counters that go up by one call at a time, and slots that the next
//! call uses again. Two of its kernels that ran at once would take each other's places, and if on another rank they ran in
//! the other order, each would get the other's data. On one stream the driver keeps the order of the calls. Where the
//! stream changes, the new one waits for an event that every call records behind itself. It is not left to the next call
//! to record it: the last call's stream may be gone by then, or belong to another thread, or be under capture.
//!
//! What is captured runs later, and where its graph is launched: within one capture the order becomes an edge of the
//! graph, and between graphs and other calls it is the caller's: where they overlap, results are wrong.
//!
//! The end of a communicator has to know when its last kernel has ended, and may not ask for the whole device: that would
//! break any capture that is under way there, and wait for work that may itself wait for this rank. So it is the last
//! call's event that tells, and that all graphs are gone that hold calls.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use comm_core::{Result, StreamHandle};
use comm_kernels::capture::{Position, position, when_gone};
use comm_kernels::raw::{Event, is_capturing, stream_id};

/// Where the last calls were made.
pub(crate) struct Order {
    /// Behind the last call that was not captured, and its stream's number.
    call: Option<Event>,
    stream: Option<u64>,
    /// Behind the last call that was captured, in which capture, and the stream: by its handle, as the driver does not number
    /// streams under capture, nor can one go meanwhile.
    captured: Option<Event>,
    capture: Option<(Position, StreamHandle)>,
    /// Captures with calls in them whose graphs are not gone.
    graphs: Arc<AtomicUsize>,
    /// Tests only: calls are left to overtake each other.
    unordered: bool,
}

/// What of a communicator's work may still be running.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Left {
    Nothing,
    Calls,
    /// Graphs that hold calls, whether they run or not.
    Graphs,
}

impl Order {
    /// The context is current. `unordered`, for tests only: calls are left to overtake each other.
    pub(crate) fn new(unordered: bool) -> Result<Self> {
        let mut order = Self::none();
        order.call = Some(Event::new()?);
        order.captured = Some(Event::new()?);
        order.unordered = unordered;
        Ok(order)
    }

    /// Of no calls.
    pub(crate) fn none() -> Self {
        Self {
            call: None,
            stream: None,
            captured: None,
            capture: None,
            graphs: Arc::default(),
            unordered: false,
        }
    }

    /// Lets what will be enqueued on `stream` wait for all calls before. Whether that is captured.
    ///
    /// # Errors
    /// [`Cuda`](comm_core::CommError::Cuda).
    pub(crate) fn follow(&mut self, stream: StreamHandle) -> Result<bool> {
        if is_capturing(stream) {
            // SAFETY: the caller of the operation vouches for the stream, and for nobody else's using it meanwhile. A capture
            // that cannot be asked is spoilt, as the launch will find.
            if let Ok(Some(now)) = unsafe { position(stream) } {
                match self.capture.take() {
                    Some((before, last)) if before.same_capture(&now) => {
                        self.wait(&self.captured, stream, stream != last)?;
                    }
                    _ => self.count(&now)?,
                }
                self.capture = Some((now, stream));
            }
            return Ok(true);
        }
        // A stream that the driver does not number is taken for another one. Before the first call there is nothing to wait for.
        let id = stream_id(stream).ok();
        let changed = id.is_none() || id != self.stream;
        self.stream = id;
        self.wait(&self.call, stream, changed)?;
        Ok(false)
    }

    fn wait(&self, event: &Option<Event>, stream: StreamHandle, changed: bool) -> Result<()> {
        event.as_ref().filter(|_| changed && !self.unordered).map_or(Ok(()), |event| event.hold(stream))
    }

    /// A call on `stream` has been enqueued, or captured.
    ///
    /// # Errors
    /// [`Cuda`](comm_core::CommError::Cuda).
    pub(crate) fn passed(&self, stream: StreamHandle, captured: bool) -> Result<()> {
        let event = if captured { &self.captured } else { &self.call };
        event.as_ref().map_or(Ok(()), |event| event.record(stream))
    }

    /// Counts the graph of a capture until it is gone.
    fn count(&self, capture: &Position) -> Result<()> {
        let graphs = Arc::clone(&self.graphs);
        graphs.fetch_add(1, Ordering::Relaxed);
        when_gone(capture.graph(), move || {
            graphs.fetch_sub(1, Ordering::Release);
        })
    }

    /// What is left of the calls. The context is current.
    ///
    /// # Errors
    /// [`Cuda`](comm_core::CommError::Cuda): a call has failed.
    pub(crate) fn left(&self) -> Result<Left> {
        if let Some(event) = &self.call
            && !event.is_done()?
        {
            return Ok(Left::Calls);
        }
        Ok(if self.graphs.load(Ordering::Acquire) > 0 { Left::Graphs } else { Left::Nothing })
    }
}

impl Drop for Order {
    fn drop(&mut self) {
        // The context is current wherever a communicator's belongings are given back.
        for event in [self.call.take(), self.captured.take()].into_iter().flatten() {
            event.destroy();
        }
    }
}
