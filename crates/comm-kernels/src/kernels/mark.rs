//! Marking progress on a stream: in the stream's chain, or, in a graph, beside it.

use std::ffi::c_void;

use comm_core::{CommError, DType, DeviceAddr, Result, StreamHandle, check};
use cudarc::driver::sys;

use super::{Kernels, parameters};
use crate::capture::{Position, position};
use crate::driver;
use crate::raw::check as checked;

/// What is written when a stream gets to a point: one is added to a counter, and the new count and a tag, two `u64`s,
/// go to slot `count % slot_count`. Slots are 16 bytes; host memory that the device sees makes them a way to watch the
/// progress of replayed graphs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Mark {
    /// A `u64`.
    pub counter: DeviceAddr,
    /// The first slot, aligned to 16 bytes.
    pub slots: DeviceAddr,
    /// At least one, and more than marks of this counter can be under way at once.
    pub slot_count: u32,
    /// What the slot says beside the count.
    pub tag: u64,
}

impl Mark {
    const NONE: Self = Self { counter: DeviceAddr::NULL, slots: DeviceAddr::NULL, slot_count: 1, tag: 0 };

    fn check(&self) -> Result<()> {
        check::span("counter", self.counter, 1, DType::U64)?;
        check::span("slots", self.slots, 2 * self.slot_count as usize, DType::U64)?;
        if self.slot_count == 0 || !self.slots.is_aligned_to(16) {
            return Err(CommError::invalid("slots", "there must be at least one, aligned to 16 bytes"));
        }
        Ok(())
    }
}

/// A node of one or two marks in a graph that is being captured. Inert once the capture has ended.
#[derive(Debug)]
pub struct MarkNode {
    node: sys::CUgraphNode,
    at: Position,
    first: Mark,
    second: Option<Mark>,
}

// SAFETY: the handle is used only by whoever captures into the graph at that time (`Kernels::mark_beside`).
unsafe impl Send for MarkNode {}

impl Kernels {
    /// Marks when the stream gets here; what follows on the stream waits for the mark.
    ///
    /// # Errors
    /// [`CommError::InvalidArgument`], [`CommError::Cuda`].
    ///
    /// # Safety
    /// The mark's counter and slots are valid for writes on this device until the work has completed, also in every
    /// replay of a graph that it was captured into; the device writes them with marks alone. `stream` is a live stream
    /// of this context.
    pub unsafe fn mark(&self, mark: Mark, stream: StreamHandle) -> Result<()> {
        mark.check()?;
        let Mark { counter, slots, slot_count, tag } = mark;
        let mut parameters = parameters![counter, slots, slot_count, tag];
        // SAFETY: these are `mark`'s parameters, in order; it updates the counter and one slot, for which the caller
        // vouches.
        unsafe { self.mark.launch(&self.context, 1, (1, 1), stream, &mut parameters) }
    }

    /// In a graph that is being captured: marks once all that was captured on the stream so far is complete, but nothing
    /// waits for the mark except the end of the replay, which waits for all nodes. So the mark may be late, and marks may
    /// overtake one another. If `before` stands at the same place of the same capture and is a single mark, it becomes
    /// both, and the graph gets no new node.
    ///
    /// The graph is changed through the driver's graph functions. While a graph is being captured, in whatever mode, all
    /// of those are allowed but its destruction and the removal of nodes; and a node that the stream does not depend on
    /// does not spoil the capture's end if it was added like this (CUDA Driver API, `cuStreamGetCaptureInfo`). The
    /// modes restrict what a capture would not see, such as allocations, and this is none.
    ///
    /// # Errors
    /// [`CommError::InvalidArgument`], also when the stream is not capturing; [`CommError::Cuda`].
    ///
    /// # Safety
    /// As for [`mark`](Self::mark); `before` came from this object; and no other thread works on the graph meanwhile: they
    /// are not synchronised (CUDA Driver API, "Graph object thread safety").
    pub unsafe fn mark_beside(
        &self,
        mark: Mark,
        before: Option<MarkNode>,
        stream: StreamHandle,
    ) -> Result<MarkNode> {
        mark.check()?;
        self.context.bind_to_thread().map_err(driver::failed("cuCtxSetCurrent"))?;
        // SAFETY: the caller vouches for the stream.
        let Some(at) = (unsafe { position(stream) })? else {
            return Err(CommError::invalid(
                "stream",
                "it is not capturing, so there is nothing to mark beside",
            ));
        };
        if let Some(mut joined) = before.filter(|before| before.second.is_none() && before.at == at) {
            joined.second = Some(mark);
            self.with_node(joined.first, mark, |params| {
                // SAFETY: the position is that of the capture that the node was added in, so the capture goes on, and
                // nodes stay until it ends; the parameters are the kernel's, see `with_node`.
                checked("cuGraphKernelNodeSetParams", unsafe {
                    sys::cuGraphKernelNodeSetParams_v2(joined.node, params)
                })
            })?;
            return Ok(joined);
        }
        let mut node = std::ptr::null_mut();
        self.with_node(mark, Mark::NONE, |params| {
            let after = at.after();
            // SAFETY: the graph is being captured and the nodes are in it; the driver copies them and the parameters,
            // which are the kernel's, see `with_node`. Edges without data are full dependencies, whatever the stream's
            // own are.
            checked("cuGraphAddKernelNode", unsafe {
                sys::cuGraphAddKernelNode_v2(
                    &raw mut node,
                    at.raw_graph(),
                    after.as_ptr(),
                    after.len(),
                    params,
                )
            })
        })?;
        Ok(MarkNode { node, at, first: mark, second: None })
    }

    /// Describes a node of two marks: the driver copies the parameters within `call`.
    fn with_node<T>(
        &self,
        first: Mark,
        second: Mark,
        call: impl FnOnce(*const sys::CUDA_KERNEL_NODE_PARAMS) -> T,
    ) -> T {
        let mut parameters: [*mut c_void; 8] = parameters![
            first.counter,
            first.slots,
            first.slot_count,
            first.tag,
            second.counter,
            second.slots,
            second.slot_count,
            second.tag,
        ];
        let params = sys::CUDA_KERNEL_NODE_PARAMS {
            func: self.mark_two.raw(),
            gridDimX: 1,
            gridDimY: 1,
            gridDimZ: 1,
            blockDimX: 1,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: 0,
            kernelParams: parameters.as_mut_ptr(),
            extra: std::ptr::null_mut(),
            kern: std::ptr::null_mut(),
            ctx: self.context.cu_ctx(),
        };
        call(&raw const params)
    }
}
