//! What a library needs to know of the graph that its caller is capturing: which one it is, where the capture has got
//! to, and when the graph is gone; and how nodes of its own in it come to wait for others.
//!
//! Owns nothing: what is handed over belongs to the graph.

use std::ffi::{c_int, c_void};
use std::ptr;
use std::sync::OnceLock;

use comm_core::{CommError, Result, StreamHandle};
use cudarc::driver::sys;
use libloading::Library;

use crate::raw::{check, stream};

/// `cuStreamGetCaptureInfo_v3`. It and the functions below are in every driver whose version is high enough for this
/// crate. They are looked up here because the bindings know them under names, and some with parameters, that depend on the
/// toolkit they were made from.
type GetCaptureInfo = unsafe extern "C" fn(
    sys::CUstream,
    *mut c_int,
    *mut u64,
    *mut sys::CUgraph,
    *mut *const sys::CUgraphNode,
    *mut *const c_void,
    *mut usize,
) -> sys::CUresult;

/// `cuGraphAddDependencies_v2` and `cuGraphRemoveDependencies_v2`: from, to, what the edges carry, and how many.
type ChangeDependencies = unsafe extern "C" fn(
    sys::CUgraph,
    *const sys::CUgraphNode,
    *const sys::CUgraphNode,
    *const c_void,
    usize,
) -> sys::CUresult;

const CAPTURE_NONE: c_int = 0;
const CAPTURE_ACTIVE: c_int = 1;

struct Functions {
    capture_info: GetCaptureInfo,
    add_dependencies: ChangeDependencies,
    remove_dependencies: ChangeDependencies,
}

impl Functions {
    fn find() -> std::result::Result<Self, &'static str> {
        // SAFETY: the driver's library is loaded already, by whoever made the stream.
        let library = unsafe { Library::new("libcuda.so.1") }.map_err(|_| "all of the driver")?;
        // SAFETY: these are the functions' C signatures (CUDA Driver API, Stream Management and Graph Management).
        let found = unsafe {
            Self {
                capture_info: *library
                    .get::<GetCaptureInfo>(b"cuStreamGetCaptureInfo_v3")
                    .map_err(|_| "cuStreamGetCaptureInfo_v3")?,
                add_dependencies: *library
                    .get::<ChangeDependencies>(b"cuGraphAddDependencies_v2")
                    .map_err(|_| "cuGraphAddDependencies_v2")?,
                remove_dependencies: *library
                    .get::<ChangeDependencies>(b"cuGraphRemoveDependencies_v2")
                    .map_err(|_| "cuGraphRemoveDependencies_v2")?,
            }
        };
        // The driver stays loaded for the life of the process.
        std::mem::forget(library);
        Ok(found)
    }
}

fn functions() -> Result<&'static Functions> {
    static FOUND: OnceLock<std::result::Result<Functions, &'static str>> = OnceLock::new();
    FOUND.get_or_init(Functions::find).as_ref().map_err(|name| CommError::Library {
        library: "libcuda.so.1".into(),
        reason: format!("it lacks {name}: the driver is too old, CUDA 12.8 or later is needed"),
    })
}

/// Lets `node` wait for the nodes in `added`, and no longer for those in `removed`.
///
/// # Errors
/// [`CommError::Cuda`], [`CommError::Library`].
///
/// # Safety
/// All are nodes of the graph, which is being captured and which no other thread works on meanwhile. `node` waits for none
/// of `added` yet, and for all of `removed`, by edges that carry no data.
pub(crate) unsafe fn rewire(
    graph: sys::CUgraph,
    node: sys::CUgraphNode,
    added: &[sys::CUgraphNode],
    removed: &[sys::CUgraphNode],
) -> Result<()> {
    let Functions { add_dependencies, remove_dependencies, .. } = *functions()?;
    // First what is new: meanwhile the node waits for more than it need, and not for less.
    let changes = [
        ("cuGraphAddDependencies", add_dependencies, added),
        ("cuGraphRemoveDependencies", remove_dependencies, removed),
    ];
    for (name, change, from) in changes.into_iter().filter(|(_, _, from)| !from.is_empty()) {
        let to = vec![node; from.len()];
        // SAFETY: both arrays have that many nodes, for which the caller vouches; edges without data are full dependencies.
        check(name, unsafe { change(graph, from.as_ptr(), to.as_ptr(), ptr::null(), from.len()) })?;
    }
    Ok(())
}

/// A graph that is being captured: a name, valid until the capture ends.
#[derive(Clone, Copy, Debug)]
pub struct CapturingGraph(sys::CUgraph);

/// Where a capture has got to on a stream. Equal to another if the next work would wait for the same nodes, in whatever
/// order they are named.
#[derive(Clone, Debug)]
pub struct Position {
    graph: sys::CUgraph,
    /// Of the capture, never used twice in a process. As long as it goes on, its graph and the nodes in it live.
    id: u64,
    /// What the next work on the stream would wait for, in the order in which the driver names it. A node that is added here
    /// gets its dependencies in that order, and an update of an executable graph pairs nodes by it: in the order of the
    /// handles, which are addresses, two captures of one program would differ.
    after: Vec<sys::CUgraphNode>,
}

impl PartialEq for Position {
    fn eq(&self, other: &Self) -> bool {
        let within =
            |some: &[sys::CUgraphNode], all: &[sys::CUgraphNode]| some.iter().all(|node| all.contains(node));
        self.same_capture(other) && within(&self.after, &other.after) && within(&other.after, &self.after)
    }
}

impl Eq for Position {}

// SAFETY: the handles are used only by whoever captures into the graph at that time (`Kernels::mark_beside` and others).
unsafe impl Send for Position {}

impl Position {
    /// The graph that is being captured.
    #[must_use]
    pub const fn graph(&self) -> CapturingGraph {
        CapturingGraph(self.graph)
    }

    pub(crate) const fn raw_graph(&self) -> sys::CUgraph {
        self.graph
    }

    pub(crate) fn after(&self) -> &[sys::CUgraphNode] {
        &self.after
    }

    /// Whether both are in one capture. Then, while it goes on for one, the other's nodes live too.
    #[must_use]
    pub fn same_capture(&self, other: &Self) -> bool {
        (self.graph, self.id) == (other.graph, other.id)
    }

    /// What waits for both: for what this one does and then for what the other adds. A position of another capture adds
    /// nothing.
    #[must_use]
    pub fn and(mut self, other: &Self) -> Self {
        if self.same_capture(other) {
            for node in &other.after {
                if !self.after.contains(node) {
                    self.after.push(*node);
                }
            }
        }
        self
    }
}

/// The graph that work on the stream goes into, or `None` while it is run at once.
///
/// # Errors
/// [`CommError::Cuda`]: with `CUDA_ERROR_STREAM_CAPTURE_INVALIDATED` if the capture has been spoilt.
/// [`CommError::Library`].
///
/// # Safety
/// The stream is live.
pub unsafe fn capturing_graph(handle: StreamHandle) -> Result<Option<CapturingGraph>> {
    // SAFETY: the caller vouches for the stream.
    Ok(unsafe { position(handle) }?.map(|position| position.graph()))
}

/// Where the stream's capture has got to, or `None` while its work is run at once.
///
/// # Errors
/// As for [`capturing_graph`].
///
/// # Safety
/// The stream is live, and no other thread captures on it meanwhile.
pub unsafe fn position(handle: StreamHandle) -> Result<Option<Position>> {
    let get = functions()?.capture_info;
    let (mut status, mut id, mut graph) = (0, 0, ptr::null_mut());
    let (mut nodes, mut edges, mut count) = (ptr::null(), ptr::null(), 0);
    // SAFETY: the caller vouches for the stream; the pointers are valid for the writes.
    let code = unsafe {
        get(
            stream(handle),
            &raw mut status,
            &raw mut id,
            &raw mut graph,
            &raw mut nodes,
            &raw mut edges,
            &raw mut count,
        )
    };
    check("cuStreamGetCaptureInfo", code)?;
    match status {
        CAPTURE_NONE => return Ok(None),
        CAPTURE_ACTIVE => {}
        // Such a capture has no graph.
        _ => check("cuStreamGetCaptureInfo", sys::CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED)?,
    }
    let mut after = Vec::new();
    if count > 0 && !nodes.is_null() {
        // SAFETY: the driver names that many nodes, and the array stands until the stream is next used.
        after.extend_from_slice(unsafe { std::slice::from_raw_parts(nodes, count) });
    }
    Ok(Some(Position { graph, id, after }))
}

/// Called when a graph is gone: the object that was given to it.
type Gone = Box<dyn FnOnce() + Send>;

unsafe extern "C" fn gone(data: *mut c_void) {
    // SAFETY: the pointer is the one that `when_gone` made, and the driver calls this once.
    let call = unsafe { Box::from_raw(data.cast::<Gone>()) };
    call();
}

/// Has `call` made once neither the graph, nor what was instantiated or cloned from it, nor a launch of that exists any
/// more. It is made on a thread of the driver's or on one that is inside the driver: it must not panic, wait, or use CUDA.
///
/// If this fails, `call` has been made.
///
/// # Errors
/// [`CommError::Cuda`].
pub fn when_gone(graph: CapturingGraph, call: impl FnOnce() + Send + 'static) -> Result<()> {
    let call: Box<Gone> = Box::new(Box::new(call));
    let data = Box::into_raw(call).cast::<c_void>();
    let mut object = ptr::null_mut();
    let flags = sys::CUuserObject_flags::CU_USER_OBJECT_NO_DESTRUCTOR_SYNC as u32;
    // SAFETY: the pointer is valid for the write; the callback matches the data, which is its own from here on.
    let created = check("cuUserObjectCreate", unsafe {
        sys::cuUserObjectCreate(&raw mut object, data, Some(gone), 1, flags)
    });
    if let Err(error) = created {
        // SAFETY: the driver has not taken it.
        unsafe { gone(data) };
        return Err(error);
    }
    let moved = sys::CUuserObjectRetain_flags::CU_GRAPH_USER_OBJECT_MOVE as u32;
    // SAFETY: the graph is being captured, during which user objects may be given to it; the one reference moves to it.
    let retained =
        check("cuGraphRetainUserObject", unsafe { sys::cuGraphRetainUserObject(graph.0, object, 1, moved) });
    retained.inspect_err(|_| {
        // SAFETY: the reference is still this function's; releasing it makes the call.
        let _ = unsafe { sys::cuUserObjectRelease(object, 1) };
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A position behind nodes with these handles, which nothing here follows.
    fn behind(id: u64, handles: &[usize]) -> Position {
        let after = handles.iter().map(|&handle| ptr::without_provenance_mut(handle)).collect();
        Position { graph: ptr::without_provenance_mut(64), id, after }
    }

    fn handles(position: &Position) -> Vec<usize> {
        position.after().iter().map(|node| node.addr()).collect()
    }

    #[test]
    fn positions_are_sets_of_nodes_in_one_capture() {
        assert_eq!(behind(1, &[3, 1, 2]), behind(1, &[1, 2, 3]));
        assert_eq!(behind(1, &[]), behind(1, &[]));
        // Another capture may have a graph and nodes at the same addresses.
        assert_ne!(behind(1, &[1]), behind(2, &[1]));
        // Neither contains the other, or only one does.
        for (one, other) in [([1, 2].as_slice(), [1, 3].as_slice()), (&[1, 2], &[1]), (&[], &[1])] {
            assert_ne!(behind(1, one), behind(1, other));
            assert_ne!(behind(1, other), behind(1, one));
        }
    }

    #[test]
    fn nodes_stay_in_the_order_of_the_driver() {
        let both = behind(1, &[9, 4]).and(&behind(1, &[7, 9, 2]));
        assert_eq!(handles(&both), [9, 4, 7, 2]);
        assert_eq!(handles(&behind(1, &[9, 4]).and(&behind(2, &[7]))), [9, 4]);
    }
}
