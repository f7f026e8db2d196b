//! Slices over memory of a communicator: what results need to lie in to reach the other ranks' memory without a copy.
//!
//! Owns the slice and how it ends. The memory is the communicator's, which gives it and takes it back.

use std::fmt;
use std::mem::ManuallyDrop;
use std::ops::{Deref, RangeBounds};
use std::sync::Arc;
use std::time::Duration;

use cudarc::driver::{
    CudaSlice, CudaStream, CudaViewMut, DevicePtr, DevicePtrMut, DeviceSlice, DriverError, SyncOnDrop,
    result, sys,
};

use super::cuda::CudaSliceExt as _;
use super::cuda_call::handle;
use crate::addr::DeviceAddr;
use crate::check;
use crate::device_comm::DeviceComm;
use crate::dtype::Element;
use crate::error::{CommError, Result};

/// Between two looks at whether the ranks are done with memory that is to be given back.
const PAUSE: Duration = Duration::from_micros(50);

/// A slice of `count` elements, all zero, in memory that `comm` allocates on all ranks: a [`CudaSlice`] that the other
/// ranks reach. Operations on it need no staging copy. Uses of it are ordered as those of a slice of `stream` are.
///
/// Collective: all ranks ask for as many elements of equally long types, in the same order as their other calls.
///
/// ```no_run
/// use std::sync::Arc;
/// use comm_core::{CommError, CudaSliceExt, DeviceComm, ReduceOp, allocate_cuda};
/// use cudarc::driver::CudaStream;
/// use half::bf16;
///
/// fn sum(comm: &Arc<dyn DeviceComm>, stream: &Arc<CudaStream>) -> Result<(), CommError> {
///     // SAFETY: every rank runs this function: it sums the same part of the same slice, and gives the slice back before
///     // the communicator is closed.
///     let mut partial = unsafe { allocate_cuda::<bf16>(comm.clone(), 8192 * 128, stream) }?;
///     // ... kernels that write to `partial`, on any stream ...
///     comm.all_reduce_cuda_in_place(&mut partial.slice_mut(..8192 * 64), ReduceOp::Sum, stream)?;
///     partial.free()
/// }
/// ```
///
/// # Errors
/// [`CommError::InvalidArgument`] for a stream of another device than the communicator's and for more bytes than there are
/// addresses; what [`DeviceComm::allocate`] returns; and [`CommError::Cuda`], after which what has been allocated stays the
/// communicator's until it is closed.
///
/// # Safety
/// The caller sees to what the slice cannot:
/// - Where an operand of a call lies in the slice, it does on every rank, at the same offset of the slice that was
///   allocated together with this one. A backend may compute from this rank's operand where the others' lie, and store
///   there.
/// - The communicator is not closed before the slice is gone and all work on it has ended, replays of graphs too: closing
///   gives all memory back.
pub unsafe fn allocate_cuda<T: Element>(
    comm: Arc<dyn DeviceComm>,
    count: usize,
    stream: &Arc<CudaStream>,
) -> Result<CommSlice<T>> {
    handle(&*comm, stream, [])?;
    let bytes = check::bytes(count, T::DTYPE)?;
    let addr = comm.allocate(bytes)?;
    // SAFETY: the range is a live allocation of the stream's device, as long as `count` elements, and stays one as long as
    // the slice: the slice keeps the communicator, and the caller vouches that it is not closed. Every bit pattern is a
    // value. The slice is never dropped as its type would, which gives memory back to the driver.
    let slice = unsafe { stream.upgrade_device_ptr::<T>(addr.0, count) };
    let mut slice = CommSlice { slice: ManuallyDrop::new(slice), addr, comm };
    slice.clear(bytes)?;
    Ok(slice)
}

/// A [`CudaSlice`] in memory of a communicator, from [`allocate_cuda`]. It goes where a [`CudaSlice`] goes: to cudarc's
/// copies and launches and to [`CudaSliceExt`](crate::CudaSliceExt), whole or by its views.
///
/// It keeps the communicator. The memory is given back by [`free`](Self::free), which is collective. Dropping the slice
/// waits for nobody and gives nothing back, because this rank alone cannot: the other ranks may be at work in the memory,
/// and take part in every call that changes what the communicator has. The memory then stays the communicator's until that
/// is closed, or dropped with its last slice. So a program that holds its slices for as long as the communicator may drop
/// both, the slices first, and one that needs the memory back meanwhile frees them, on all ranks in the same order.
pub struct CommSlice<T> {
    slice: ManuallyDrop<CudaSlice<T>>,
    addr: DeviceAddr,
    comm: Arc<dyn DeviceComm>,
}

impl<T> fmt::Debug for CommSlice<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let comm = &self.comm.info().name;
        f.debug_struct("CommSlice")
            .field("addr", &self.addr)
            .field("len", &self.len())
            .field("comm", comm)
            .finish()
    }
}

fn cuda(call: &'static str) -> impl Fn(DriverError) -> CommError {
    move |DriverError(code)| {
        let message = format!("{code:?}");
        CommError::Cuda { call: call.into(), code: code as i32, message }
    }
}

impl<T> CommSlice<T> {
    /// The communicator that the memory is of.
    #[must_use]
    pub const fn comm(&self) -> &Arc<dyn DeviceComm> {
        &self.comm
    }

    /// All of it, to be written.
    pub fn as_view_mut(&mut self) -> CudaViewMut<'_, T> {
        self.slice.as_view_mut()
    }

    /// A part of it, to be written.
    ///
    /// # Panics
    /// As [`CudaSlice::slice_mut`], for a range that is not inside.
    pub fn slice_mut(&mut self, bounds: impl RangeBounds<usize>) -> CudaViewMut<'_, T> {
        self.slice.slice_mut(bounds)
    }

    /// Two parts of it, to be written, of which the first ends at `mid`; `None` where that is outside.
    pub fn split_at_mut(&mut self, mid: usize) -> Option<(CudaViewMut<'_, T>, CudaViewMut<'_, T>)> {
        self.slice.try_split_at_mut(mid)
    }

    /// Gives the memory back on all ranks, once their work on it has ended. Collective: all ranks free the slices that
    /// they allocated together, in the same order as their other calls. It waits, on the host, for what this rank has put
    /// on the slice's stream and for what all ranks have enqueued on the slice. Not for use while capturing, and no graph
    /// that holds the slice is launched afterwards.
    ///
    /// # Errors
    /// [`CommError::Cuda`], and what [`barrier`](DeviceComm::barrier), [`poll`](DeviceComm::poll) and
    /// [`free`](DeviceComm::free) return. Then the memory stays the communicator's until it is closed.
    pub fn free(mut self) -> Result<()> {
        let stream = Arc::clone(self.slice.stream());
        {
            // The stream waits for all uses of the slice, and the ranks' streams for each other.
            let (_, _written) = self.slice.device_ptr_mut(&stream);
            self.comm.barrier_cuda(&stream)?;
        }
        let met = stream.record_event(None).map_err(cuda("cuEventRecord"))?;
        while !met.try_is_complete().map_err(cuda("cuEventQuery"))? {
            // A dead or late rank ends the wait: the barrier, or this.
            self.comm.poll()?;
            std::thread::sleep(PAUSE);
        }
        // A barrier that a failure has ended early has not met anybody.
        self.comm.poll()?;
        // SAFETY: the address is the communicator's own. All ranks' work on the allocation was before their barrier, which
        // has ended on all of them; nobody can begin more, since every rank has given up its slice.
        unsafe { self.comm.free(self.addr) }
    }

    /// Sets all of it to zero, in the order of the slice's stream.
    fn clear(&mut self, bytes: usize) -> Result<()> {
        let stream = Arc::clone(self.slice.stream());
        stream.context().bind_to_thread().map_err(cuda("cuCtxSetCurrent"))?;
        let (at, _written) = self.slice.device_ptr_mut(&stream);
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: the range is as long, and the slice is borrowed exclusively; the guard is dropped after the work is
        // enqueued.
        unsafe { result::memset_d8_async(at, 0, bytes, stream.cu_stream()) }.map_err(cuda("cuMemsetD8Async"))
    }
}

impl<T> Drop for CommSlice<T> {
    fn drop(&mut self) {
        // SAFETY: nothing uses the field any more.
        let slice = unsafe { ManuallyDrop::take(&mut self.slice) };
        // Its events and its share in the stream go, the memory does not.
        let _ = slice.leak();
    }
}

/// Not mutably: what could be taken out by that would give the memory back to the driver.
impl<T> Deref for CommSlice<T> {
    type Target = CudaSlice<T>;

    fn deref(&self) -> &CudaSlice<T> {
        &self.slice
    }
}

impl<T> DeviceSlice<T> for CommSlice<T> {
    fn len(&self) -> usize {
        self.slice.len()
    }

    fn stream(&self) -> &Arc<CudaStream> {
        self.slice.stream()
    }
}

impl<T> DevicePtr<T> for CommSlice<T> {
    fn device_ptr<'a>(&'a self, stream: &'a CudaStream) -> (sys::CUdeviceptr, SyncOnDrop<'a>) {
        self.slice.device_ptr(stream)
    }
}

impl<T> DevicePtrMut<T> for CommSlice<T> {
    fn device_ptr_mut<'a>(&'a mut self, stream: &'a CudaStream) -> (sys::CUdeviceptr, SyncOnDrop<'a>) {
        self.slice.device_ptr_mut(stream)
    }
}
