//! Marking progress on a stream: in the stream's chain, or, in a graph, beside it.

use std::ffi::c_void;

use comm_core::{CommError, DType, DeviceAddr, Result, StreamHandle, check};
use cudarc::driver::sys;

use super::{Kernels, parameters};
use crate::capture::{Position, rewire};
use crate::driver;
use crate::raw::check as checked;

/// The most slots that a mark can have: passes are numbered by so many bits of the counter.
const MAX_SLOTS: u32 = 1 << 16;

/// What is written when a stream gets to a point: a counter grows, and the new count and a tag, two `u64`s, go to the
/// slot that follows the one that the counter's last mark wrote. Slots are 16 bytes; host memory that the device sees
/// makes them a way to watch the progress of replayed graphs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Mark {
    /// A `u64`, at first zero, that marks alone read and write: it holds the count in its low 48 bits.
    pub counter: DeviceAddr,
    /// The first slot, aligned to 16 bytes.
    pub slots: DeviceAddr,
    /// A power of two up to 65536, and more than marks of this counter can be under way at once.
    pub slot_count: u32,
    /// How much the count grows by.
    pub adds: u32,
    /// What the slot says beside the count.
    pub tag: u64,
}

impl Mark {
    const NONE: Self =
        Self { counter: DeviceAddr::NULL, slots: DeviceAddr::NULL, slot_count: 1, adds: 0, tag: 0 };

    fn check(&self) -> Result<()> {
        check::span("counter", self.counter, 1, DType::U64)?;
        check::span("slots", self.slots, 2 * self.slot_count as usize, DType::U64)?;
        let fits = self.slot_count.is_power_of_two() && self.slot_count <= MAX_SLOTS;
        if !fits || !self.slots.is_aligned_to(16) {
            return Err(CommError::invalid(
                "slots",
                format!(
                    "their number must be a power of two up to {MAX_SLOTS}, their address a multiple of 16"
                ),
            ));
        }
        Ok(())
    }
}

/// A node of one or two marks in a graph that is being captured, on which no other node depends. Inert once the capture
/// has ended.
#[derive(Debug)]
pub struct MarkNode {
    node: sys::CUgraphNode,
    at: Position,
    first: Mark,
    second: Option<Mark>,
}

// SAFETY: the handle is used only by whoever captures into the graph at that time (the methods of `Kernels` below).
unsafe impl Send for MarkNode {}

impl MarkNode {
    /// What the node waits for.
    #[must_use]
    pub const fn position(&self) -> &Position {
        &self.at
    }
}

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
        let Mark { counter, slots, slot_count, adds, tag } = mark;
        let mut parameters = parameters![counter, slots, slot_count, adds, tag];
        // SAFETY: these are `mark`'s parameters, in order; it updates the counter and one slot, for which the caller
        // vouches.
        unsafe { self.mark.launch(&self.context, 1, (1, 1), stream, &mut parameters) }
    }

    /// In a graph that is being captured: marks once all that `at` waits for is complete, but nothing waits for the mark
    /// except the end of the replay, which waits for all nodes. So the mark may be late, and marks may overtake one
    /// another. If `before` waits for the same and is a single mark, it becomes both, and the graph gets no new node.
    ///
    /// The graph is changed through the driver's graph functions. While a graph is being captured, in whatever mode, all
    /// of those are allowed but its destruction and the removal of nodes, so dependencies may be removed; and a node that
    /// the stream does not depend on does not spoil the capture's end if it was added like this (CUDA Driver API,
    /// `cuStreamGetCaptureInfo`). The modes restrict what a capture would not see, such as allocations, and this is none.
    ///
    /// # Errors
    /// [`CommError::InvalidArgument`], [`CommError::Cuda`].
    ///
    /// # Safety
    /// As for [`mark`](Self::mark); the capture of `at` goes on; `before` came from this object; and no other thread works
    /// on the graph meanwhile: they are not synchronised (CUDA Driver API, "Graph object thread safety").
    pub unsafe fn mark_beside(&self, mark: Mark, before: Option<MarkNode>, at: Position) -> Result<MarkNode> {
        mark.check()?;
        self.context.bind_to_thread().map_err(driver::failed("cuCtxSetCurrent"))?;
        if let Some(mut joined) = before.filter(|before| before.second.is_none() && before.at == at) {
            joined.second = Some(mark);
            // SAFETY: the node is in the capture of `at`, which goes on.
            unsafe { self.describe(&joined) }?;
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

    /// In a graph that is being captured: gives one of the node's marks, the one with `mark`'s counter, another number to
    /// add or another tag.
    ///
    /// # Errors
    /// [`CommError::InvalidArgument`] when the node has no such mark; [`CommError::Cuda`].
    ///
    /// # Safety
    /// As for [`mark_beside`](Self::mark_beside), of the node and its capture.
    pub unsafe fn change_mark(&self, node: &mut MarkNode, mark: Mark) -> Result<()> {
        mark.check()?;
        let MarkNode { first, second, .. } = node;
        let mut places = std::iter::once(first).chain(second);
        let Some(place) = places.find(|place| place.counter == mark.counter) else {
            return Err(CommError::invalid("mark", "the node marks nothing with this counter"));
        };
        *place = mark;
        self.context.bind_to_thread().map_err(driver::failed("cuCtxSetCurrent"))?;
        // SAFETY: the caller vouches for the node.
        unsafe { self.describe(node) }
    }

    /// In a graph that is being captured: lets a node of one mark wait for what `at` waits for, and for nothing else.
    ///
    /// # Errors
    /// [`CommError::InvalidArgument`] when it has two marks, or `at` is a position of another capture;
    /// [`CommError::Cuda`]; [`CommError::Library`].
    ///
    /// # Safety
    /// As for [`mark_beside`](Self::mark_beside), of the node and its capture.
    pub unsafe fn move_mark(&self, node: &mut MarkNode, at: Position) -> Result<()> {
        if node.second.is_some() {
            return Err(CommError::invalid("node", "it has two marks, one of which would move along"));
        }
        if !node.at.same_capture(&at) {
            return Err(CommError::invalid("at", "the mark is in another capture"));
        }
        self.context.bind_to_thread().map_err(driver::failed("cuCtxSetCurrent"))?;
        let (old, new) = (node.at.after(), at.after());
        let added: Vec<_> = new.iter().copied().filter(|tail| !old.contains(tail)).collect();
        let removed: Vec<_> = old.iter().copied().filter(|tail| !new.contains(tail)).collect();
        // SAFETY: the nodes are in the graph, whose capture goes on; the node waits for what was at its position, by edges
        // without data. Nothing waits for it, so no edge to it closes a circle.
        unsafe { rewire(at.raw_graph(), node.node, &added, &removed) }?;
        node.at = at;
        Ok(())
    }

    /// Lets the node do what its description says.
    ///
    /// # Safety
    /// The node is in a graph whose capture goes on.
    unsafe fn describe(&self, node: &MarkNode) -> Result<()> {
        self.with_node(node.first, node.second.unwrap_or(Mark::NONE), |params| {
            // SAFETY: nodes stay until the capture ends, which the caller says it has not; the parameters are the
            // kernel's, see `with_node`.
            checked("cuGraphKernelNodeSetParams", unsafe {
                sys::cuGraphKernelNodeSetParams_v2(node.node, params)
            })
        })
    }

    /// Describes a node of two marks: the driver copies the parameters within `call`.
    fn with_node<T>(
        &self,
        first: Mark,
        second: Mark,
        call: impl FnOnce(*const sys::CUDA_KERNEL_NODE_PARAMS) -> T,
    ) -> T {
        let mut parameters: [*mut c_void; 10] = parameters![
            first.counter,
            first.slots,
            first.slot_count,
            first.adds,
            first.tag,
            second.counter,
            second.slots,
            second.slot_count,
            second.adds,
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
