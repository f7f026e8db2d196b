//! The order of the calls that share the staging buffer.
//!
//! NCCL lets a communicator's own work wait for one another, on whatever streams it is. The copies into the staging buffer
//! and out of it are not NCCL's, so the calls they belong to are ordered here: each begins once the last one's copies are
//! done. Owns the events that say so, and never the buffer.
//!
//! # Limits
//! A captured call runs when its graph is replayed, and is ordered behind the calls of the same capture alone. Replays that
//! are to run beside other calls, or beside each other, are for the caller to put in order, which a communicator's calls need
//! in any case.

use comm_core::{Result, StreamHandle};
use comm_kernels::capture::{Position, position};

use crate::driver::Event;

/// Who is next. Used only under the communicator's lock.
pub(crate) struct Turns {
    /// Behind the copies of the last call that was enqueued to be run.
    run: Event,
    /// Behind those of the last call that was captured. An event of its own: a record in a capture is of no use outside.
    captured: Event,
    /// Where that was, and on which stream.
    place: Option<(Position, StreamHandle)>,
}

impl Turns {
    /// The context is current.
    pub(crate) fn new() -> Result<Self> {
        let run = Event::new()?;
        match Event::new() {
            Ok(captured) => Ok(Self { run, captured, place: None }),
            Err(error) => {
                run.destroy();
                Err(error)
            }
        }
    }

    /// Before a call's first copy.
    ///
    /// # Safety
    /// The stream is live and, if it is capturing, no other thread captures on it meanwhile.
    pub(crate) unsafe fn begin(&mut self, capturing: bool, stream: StreamHandle) -> Result<()> {
        if !capturing {
            // On the same stream too, where it costs next to nothing: one handle can stand for several streams, one after
            // the other or one for each thread.
            return self.run.hold(stream);
        }
        // SAFETY: the caller vouches for the stream.
        let here = unsafe { place(stream) };
        match (&self.place, here) {
            // On one stream the graph says it anyway.
            (Some((before, other)), Some(here)) if *other != stream && before.same_capture(&here) => {
                self.captured.hold(stream)
            }
            _ => Ok(()),
        }
    }

    /// After a call's last copy.
    ///
    /// # Safety
    /// As for [`begin`](Self::begin).
    pub(crate) unsafe fn end(&mut self, capturing: bool, stream: StreamHandle) -> Result<()> {
        if !capturing {
            return self.run.record(stream);
        }
        // SAFETY: the caller vouches for the stream.
        self.place = unsafe { place(stream) }.map(|here| (here, stream));
        self.captured.record(stream)
    }

    /// The context is current.
    pub(crate) fn destroy(self) {
        self.run.destroy();
        self.captured.destroy();
    }
}

/// Where the stream's capture has got to, where the driver can tell. If it cannot, the calls of a capture are ordered as far
/// as the streams are.
///
/// # Safety
/// As for [`Turns::begin`].
unsafe fn place(stream: StreamHandle) -> Option<Position> {
    // SAFETY: the caller vouches for the stream.
    unsafe { position(stream) }.ok().flatten()
}
