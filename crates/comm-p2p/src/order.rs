//! The order of calls that come on several streams, and whether all of them are over.
//!
//! All calls of a communicator share its channels: counters that go up by one call at a time, and slots that the next
//! call uses again. Two of its kernels that ran at once would take each other's places, and if on another rank they ran in
//! the other order, each would get the other's data. [`CallOrder`] keeps them apart, but for graphs and calls beside them:
//! their order is the caller's, and where they overlap, results are wrong.
//!
//! The end of a communicator has to know when its last kernel has ended, and may not ask for the whole device: that would
//! break any capture that is under way there, and wait for work that may itself wait for this rank. So it is the last
//! call's event that tells, and that all graphs are gone that hold calls.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use comm_core::{Result, StreamHandle};
use comm_kernels::capture::{CapturingGraph, when_gone};
use comm_kernels::order::{CallOrder, Destination};

/// Where the last calls were made, and what of them may still be running.
pub(crate) struct Order {
    /// None when there are no calls and will be none.
    calls: Option<CallOrder>,
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
}

impl Order {
    /// The context is current. `unordered`, for tests only: calls are left to overtake each other.
    pub(crate) fn new(unordered: bool) -> Result<Self> {
        let calls = CallOrder::new()?;
        let calls = if unordered { calls.left_to_overtake() } else { calls };
        Ok(Self { calls: Some(calls), graphs: Arc::default() })
    }

    /// Of no calls.
    pub(crate) fn none() -> Self {
        Self { calls: None, graphs: Arc::default() }
    }

    /// Lets what will be enqueued on `stream` wait for all calls before. Where it goes.
    ///
    /// # Errors
    /// [`Cuda`](comm_core::CommError::Cuda).
    pub(crate) fn follow(&mut self, stream: StreamHandle) -> Result<Destination> {
        let Some(calls) = &mut self.calls else { return Ok(Destination::Stream) };
        // SAFETY: the caller of the operation vouches for the stream, and for nobody else's using it meanwhile.
        let to = unsafe { calls.begin(stream) }?;
        if let Destination::NewGraph(graph) = to {
            self.count(graph)?;
        }
        Ok(to)
    }

    /// A call on `stream` has been enqueued, or captured, as [`follow`](Self::follow) said.
    ///
    /// # Errors
    /// [`Cuda`](comm_core::CommError::Cuda).
    pub(crate) fn passed(&mut self, to: Destination, stream: StreamHandle) -> Result<()> {
        self.calls.as_mut().map_or(Ok(()), |calls| calls.end(to, stream))
    }

    /// Counts the graph of a capture until it is gone.
    fn count(&self, graph: CapturingGraph) -> Result<()> {
        let graphs = Arc::clone(&self.graphs);
        graphs.fetch_add(1, Ordering::Relaxed);
        when_gone(graph, move || {
            graphs.fetch_sub(1, Ordering::Release);
        })
    }

    /// What is left of the calls. The context is current.
    ///
    /// # Errors
    /// [`Cuda`](comm_core::CommError::Cuda): a call has failed.
    pub(crate) fn left(&self) -> Result<Left> {
        if let Some(calls) = &self.calls
            && !calls.is_over()?
        {
            return Ok(Left::Calls);
        }
        Ok(if self.graphs.load(Ordering::Acquire) > 0 { Left::Graphs } else { Left::Nothing })
    }
}

impl Drop for Order {
    fn drop(&mut self) {
        // The context is current wherever a communicator's belongings are given back.
        if let Some(calls) = self.calls.take() {
            calls.destroy();
        }
    }
}
