//! Which captured calls are watched together, and the marks around them in the graph.
//!
//! Owns the nodes and the bounds of a run, see [`marks`](super::marks) for what it is and why its marks suffice. It never
//! looks at a count.
//!
//! # Limits
//! A communicator has one last run, whichever capture that is in. Where several threads capture at the same time and their
//! calls on the communicator interleave, a call does not find the last run of its own capture: it begins a run of its own,
//! and if it is on another stream than that last run, its start lacks the edge that lets it wait for that. A rank that is
//! late on a stream which was forked off in such a capture can look as if it were inside the run, and is then not named.

use std::sync::Arc;
use std::time::Duration;

use comm_core::{CommError, Result, StreamHandle};
use comm_kernels::capture::{Position, position};
use comm_kernels::{Kernels, Mark, MarkNode};

/// The most calls of a run: what its two marks cost is then below a tenth of a microsecond a call.
const MAX_CALLS: u32 = 32;
/// The most bytes of a run of several calls: they take at least half a millisecond over NVLink, beside which two marks do
/// not count.
const MAX_BYTES: u64 = 256 << 20;
/// The latencies of a run of several calls take at most this part of the timeout, and so do its bytes, on a network that is
/// as slow as the two figures below.
const PART_OF_TIMEOUT: u32 = 10;
/// A call's latency over sockets between hosts that are far apart.
const SLOW_CALL: Duration = Duration::from_millis(5);
/// A byte's time at 100 MB/s, in nanoseconds: sockets over gigabit Ethernet.
const SLOW_BYTE: u128 = 10;

/// What a run may hold.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Bounds {
    calls: u32,
    bytes: u64,
}

impl Bounds {
    /// For a communicator with this timeout.
    pub(crate) fn within(timeout: Duration) -> Self {
        let part = (timeout / PART_OF_TIMEOUT).as_nanos();
        let calls = u32::try_from(part / SLOW_CALL.as_nanos()).unwrap_or(u32::MAX);
        let bytes = u64::try_from(part / SLOW_BYTE).unwrap_or(u64::MAX);
        Self { calls: calls.clamp(1, MAX_CALLS), bytes: bytes.min(MAX_BYTES) }
    }

    /// Whether a run of so many calls and bytes may go on with a call of `more` bytes.
    const fn admit(self, calls: u32, bytes: u64, more: u64) -> bool {
        calls < self.calls && bytes.saturating_add(more) <= self.bytes
    }
}

/// Calls that follow one another in a graph with nothing captured in between.
struct Run {
    /// The marks of its first call alone, whose tags are the run's.
    marks: [Mark; 2],
    start: MarkNode,
    /// Where the run ends so far; `None` while its first call is being captured.
    finish: Option<MarkNode>,
    /// Its last call's.
    stream: StreamHandle,
    calls: u32,
    bytes: u64,
}

impl Run {
    /// One of its marks, for all of its calls.
    const fn mark(&self, point: usize) -> Mark {
        Mark { adds: self.calls, ..self.marks[point] }
    }

    /// Whether a call of `bytes` bytes that begins `here` belongs to it.
    fn goes_on(&self, marks: &[Mark; 2], bytes: u64, here: &Position, bounds: Bounds) -> bool {
        self.marks[0].counter == marks[0].counter
            && self.finish.as_ref().is_some_and(|finish| finish.position() == here)
            && bounds.admit(self.calls, self.bytes, bytes)
    }
}

/// The runs of a communicator. Used only under its lock.
pub(crate) struct Runs {
    kernels: Arc<Kernels>,
    bounds: Bounds,
    /// The last one, which the next call may belong to.
    last: Option<Run>,
}

/// Where the capture on a stream has got to.
///
/// # Safety
/// The stream is live, and this thread captures on it.
unsafe fn place(stream: StreamHandle) -> Result<Position> {
    // SAFETY: the caller vouches for the stream.
    let found = unsafe { position(stream) }?;
    found.ok_or_else(|| CommError::invalid("stream", "its capture ended while a call was being captured"))
}

impl Runs {
    pub(crate) const fn new(kernels: Arc<Kernels>, bounds: Bounds) -> Self {
        Self { kernels, bounds, last: None }
    }

    /// Before a call is captured, with the marks that it would have alone: where it starts and where it is finished.
    ///
    /// # Safety
    /// The marks' memory is valid for writes as long as the graph can be replayed. The stream is live and capturing, and no
    /// other thread works on its graph until the call has been captured.
    pub(crate) unsafe fn start(&mut self, marks: [Mark; 2], bytes: u64, stream: StreamHandle) -> Result<()> {
        // SAFETY: the caller vouches for the stream.
        let here = unsafe { place(stream) }?;
        let (before, at) = match self.last.take() {
            // The graph says so when the call has been captured.
            Some(run) if run.goes_on(&marks, bytes, &here, self.bounds) => {
                self.last = Some(run);
                return Ok(());
            }
            // NCCL lets a communicator's calls wait for one another, on whatever streams of a capture they are: this one
            // does not begin before the last run is over. On one stream the position says that.
            Some(Run { finish: Some(finish), stream: other, .. }) if other != stream => {
                let at = here.and(finish.position());
                (Some(finish), at)
            }
            Some(run) => (run.finish, here),
            None => (None, here),
        };
        // SAFETY: the caller vouches for the memory and the stream, whose position this is; the node came from the same
        // kernels.
        let start = unsafe { self.kernels.mark_beside(marks[0], before, at) }?;
        self.last = Some(Run { marks, start, finish: None, stream, calls: 0, bytes: 0 });
        Ok(())
    }

    /// After the call that was last started has been captured.
    ///
    /// # Safety
    /// As for [`start`](Self::start).
    pub(crate) unsafe fn finish(&mut self, bytes: u64, stream: StreamHandle) -> Result<()> {
        // SAFETY: the caller vouches for the stream.
        let here = unsafe { place(stream) }?;
        let Some(mut run) = self.last.take() else {
            return Err(CommError::invalid("stream", "a call that was not started was captured on it"));
        };
        run.calls += 1;
        run.bytes = run.bytes.saturating_add(bytes);
        run.stream = stream;
        let (start, finish) = (run.mark(0), run.mark(1));
        run.finish = Some(match run.finish.take() {
            // SAFETY: the caller vouches for the memory and the stream.
            None => unsafe { self.kernels.mark_beside(finish, None, here) }?,
            Some(mut node) => {
                // SAFETY: as above. The node is in the capture of `here`, or is refused, and the start is where it is.
                unsafe {
                    self.kernels.move_mark(&mut node, here)?;
                    self.kernels.change_mark(&mut node, finish)?;
                    self.kernels.change_mark(&mut run.start, start)?;
                }
                node
            }
        });
        self.last = Some(run);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_stay_well_below_the_timeout() {
        let within = |timeout| Bounds::within(Duration::from_millis(timeout));
        // Room for both in a tenth of the timeout: for 32 calls from 1.6 s on, for the bytes from 27 s on.
        for long in [Bounds::within(Duration::MAX), within(60_000), within(30_000)] {
            assert_eq!(long, Bounds { calls: 32, bytes: 256 << 20 });
        }
        assert_eq!(within(2_000), Bounds { calls: 32, bytes: 20_000_000 });
        assert_eq!(within(1_599), Bounds { calls: 31, bytes: 15_990_000 });
        assert_eq!(within(100), Bounds { calls: 2, bytes: 1_000_000 });
        assert_eq!(within(99).calls, 1);
        // A call by itself is a run, however short the timeout.
        assert_eq!(within(0), Bounds { calls: 1, bytes: 0 });
    }

    #[test]
    fn large_calls_share_runs_where_there_is_time() {
        let (bounds, call) = (Bounds::within(Duration::from_secs(30)), 16 << 20);
        let shared = (1..=32).find(|&calls| !bounds.admit(calls, u64::from(calls) * call, call));
        assert_eq!(shared, Some(16));
    }

    #[test]
    fn a_run_is_full_of_calls_or_of_bytes() {
        let bounds = Bounds { calls: 3, bytes: 100 };
        // The second and the third call; a fourth begins a run of its own.
        assert!(bounds.admit(1, 10, 10) && bounds.admit(2, 20, 80));
        assert!(!bounds.admit(3, 30, 0) && !bounds.admit(1, 50, 51) && !bounds.admit(1, 50, u64::MAX));
        // A call that is larger than a run may be has one to itself.
        assert!(!bounds.admit(1, 101, 1));
    }
}
