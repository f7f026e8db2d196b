//! The order of calls that share something on the device, on whatever streams they come.
//!
//! On one stream the driver keeps the order of the calls. Where the stream changes, the new one waits for an event that
//! every call records behind itself. It is not left to the next call to record it: the last call's stream may be gone by
//! then, or belong to another thread, or be under capture.
//!
//! # Limits
//! What is captured runs later, and where its graph is launched. Within one capture the order becomes an edge of the graph;
//! replays beside each other, or beside other calls, are for whoever launches them to put in order.

use comm_core::{Result, StreamHandle};

use crate::capture::{CapturingGraph, Position, position};
use crate::raw::{Event, is_capturing, stream_id};

/// Where a call's work goes.
#[derive(Clone, Copy, Debug)]
pub enum Destination {
    /// To the stream: it is run.
    Stream,
    /// Into the graph that the last captured call went into, or into one that cannot be told.
    Graph,
    /// Into this graph, into which the last captured call that ended did not go.
    NewGraph(CapturingGraph),
}

/// Who is next among calls that must not overlap. Used by one thread at a time; destroyed explicitly, because that needs
/// the context to be current.
pub struct CallOrder {
    /// Behind the last call that was enqueued to be run, and its stream's number.
    run: Event,
    stream: Option<u64>,
    /// Behind the last one that was captured: an event of its own, as a record in a capture is of no use outside.
    captured: Event,
    /// Where that was, and on which stream: by its handle, as the driver does not number streams under capture, nor can one
    /// go meanwhile.
    capture: Option<(Position, StreamHandle)>,
    /// Where the captured call is that has begun. One that never ends has recorded nothing, and nobody may wait for it.
    begun: Option<Position>,
    ordered: bool,
}

impl CallOrder {
    /// Of no calls yet. The context is current.
    ///
    /// # Errors
    /// [`Cuda`](comm_core::CommError::Cuda).
    pub fn new() -> Result<Self> {
        let run = Event::new()?;
        match Event::new() {
            Ok(captured) => {
                Ok(Self { run, captured, stream: None, capture: None, begun: None, ordered: true })
            }
            Err(error) => {
                run.destroy();
                Err(error)
            }
        }
    }

    /// Calls are left to overtake each other: a negative control, for tests that are to notice it.
    #[must_use]
    pub fn left_to_overtake(self) -> Self {
        Self { ordered: false, ..self }
    }

    /// Before a call's first work on `stream`: lets it wait for all calls before.
    ///
    /// # Errors
    /// [`Cuda`](comm_core::CommError::Cuda).
    ///
    /// # Safety
    /// The stream is live and, if it is capturing, no other thread captures on it meanwhile.
    pub unsafe fn begin(&mut self, stream: StreamHandle) -> Result<Destination> {
        if !is_capturing(stream) {
            // A stream that the driver does not number is taken for another one. Before the first call there is nothing to
            // wait for.
            let id = stream_id(stream).ok();
            let changed = id.is_none() || id != self.stream;
            self.stream = id;
            self.wait(&self.run, stream, changed)?;
            return Ok(Destination::Stream);
        }
        // SAFETY: the caller vouches for the stream. A capture that cannot be asked is spoilt, as the call's work will find.
        let Ok(Some(now)) = (unsafe { position(stream) }) else { return Ok(Destination::Graph) };
        let graph = now.graph();
        let same = self.capture.as_ref().filter(|(last, _)| last.same_capture(&now)).map(|(_, last)| *last);
        self.begun = Some(now);
        let Some(last) = same else { return Ok(Destination::NewGraph(graph)) };
        self.wait(&self.captured, stream, stream != last)?;
        Ok(Destination::Graph)
    }

    fn wait(&self, event: &Event, stream: StreamHandle, changed: bool) -> Result<()> {
        if changed && self.ordered { event.hold(stream) } else { Ok(()) }
    }

    /// After the last work of the call that began on `stream` and goes `to` there.
    ///
    /// # Errors
    /// [`Cuda`](comm_core::CommError::Cuda).
    pub fn end(&mut self, to: Destination, stream: StreamHandle) -> Result<()> {
        match to {
            Destination::Stream => self.run.record(stream),
            Destination::Graph | Destination::NewGraph(_) => {
                self.capture = self.begun.take().map(|at| (at, stream));
                self.captured.record(stream)
            }
        }
    }

    /// Whether all calls that were enqueued to be run are over; what was captured is not asked for.
    ///
    /// # Errors
    /// [`Cuda`](comm_core::CommError::Cuda): one has failed.
    pub fn is_over(&self) -> Result<bool> {
        self.run.is_done()
    }

    /// Gives the events back; the context is current.
    pub fn destroy(self) {
        self.run.destroy();
        self.captured.destroy();
    }
}
