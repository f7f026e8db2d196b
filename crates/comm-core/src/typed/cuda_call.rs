//! How a call on cudarc's slices comes to a communicator: whose device everything is of, where it lies, and how the work
//! is ordered with other uses of the slices and the stream.

use cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut, DeviceSlice};

use crate::addr::{DeviceAddr, StreamHandle};
use crate::device_comm::DeviceComm;
use crate::error::{CommError, Result};
use crate::memory::MemoryKind;

/// The ordinal of the device that a slice lies on.
pub(super) fn of<T>(slice: &(impl DeviceSlice<T> + ?Sized)) -> usize {
    slice.stream().context().ordinal()
}

/// The stream's handle, once the stream, the slices and the communicator are known to be of one device.
///
/// With that, what remains of the operations' safety contract is kept by cudarc and by [`enqueue`]: `device_ptr` makes the
/// stream wait for earlier uses, and the guard it returns, dropped after the work is enqueued, records the event that later
/// uses and the slice's own release wait for.
pub(super) fn handle<C: DeviceComm + ?Sized>(
    comm: &C,
    stream: &CudaStream,
    slices: impl IntoIterator<Item = usize>,
) -> Result<StreamHandle> {
    let info = comm.info();
    let MemoryKind::Cuda { ordinal } = info.memory else {
        return Err(CommError::invalid(
            "slice",
            format!("communicator {:?} works on the host's memory, not on a CUDA device's", info.name),
        ));
    };
    let other = |what: &str, found: usize| {
        format!("the {what} is of CUDA device {found}, communicator {:?} of device {ordinal}", info.name)
    };
    let found = stream.context().ordinal();
    if found != ordinal {
        return Err(CommError::invalid("stream", other("stream", found)));
    }
    if let Some(found) = slices.into_iter().find(|&found| found != ordinal) {
        return Err(CommError::invalid("slice", other("slice", found)));
    }
    Ok(StreamHandle(stream.cu_stream() as u64))
}

/// Makes a call on `stream`, with everything of one device as [`handle`] says. `call` gets the addresses by `device_ptr` and drops the guards when it returns.
pub(super) fn enqueue<C: DeviceComm + ?Sized>(
    comm: &C,
    stream: &CudaStream,
    slices: impl IntoIterator<Item = usize>,
    call: impl FnOnce(StreamHandle) -> Result<()>,
) -> Result<()> {
    call(handle(comm, stream, slices)?)
}

/// [`enqueue`]s a call that reads one slice and writes another, which cannot overlap: it is borrowed exclusively.
pub(super) fn apart<C: DeviceComm + ?Sized, T>(
    comm: &C,
    send: &impl DevicePtr<T>,
    recv: &mut impl DevicePtrMut<T>,
    stream: &CudaStream,
    call: impl FnOnce(DeviceAddr, DeviceAddr, StreamHandle) -> Result<()>,
) -> Result<()> {
    enqueue(comm, stream, [of(send), of(recv)], |handle| {
        let (from, _read) = send.device_ptr(stream);
        let (to, _written) = recv.device_ptr_mut(stream);
        call(DeviceAddr(from), DeviceAddr(to), handle)
    })
}

/// [`enqueue`]s a call that writes a slice, which is borrowed exclusively, and perhaps reads it.
pub(super) fn in_place<C: DeviceComm + ?Sized, T>(
    comm: &C,
    data: &mut impl DevicePtrMut<T>,
    stream: &CudaStream,
    call: impl FnOnce(DeviceAddr, StreamHandle) -> Result<()>,
) -> Result<()> {
    enqueue(comm, stream, [of(data)], |handle| {
        let (at, _written) = data.device_ptr_mut(stream);
        call(DeviceAddr(at), handle)
    })
}
