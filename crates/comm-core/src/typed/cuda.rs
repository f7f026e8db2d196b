//! Collectives on cudarc's device slices.

use cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut, DeviceSlice};

use super::cuda_fused::{self, CudaTransfer};
use super::{NormScale, TwoGroupRows, lengths};
use crate::addr::{DeviceAddr, StreamHandle};
use crate::device_comm::DeviceComm;
use crate::dtype::{Element, ReduceOp};
use crate::error::{CommError, Result};
use crate::memory::MemoryKind;

/// Collectives on cudarc's slices and views, enqueued on a stream of the communicator's device.
///
/// What an engine writes in a tensor-parallel layer:
///
/// ```no_run
/// use std::sync::Arc;
/// use comm_core::{CommError, CudaSliceExt, CudaTransfer, DeviceComm, NormScale, ReduceOp};
/// use cudarc::driver::{CudaSlice, CudaStream};
/// use half::bf16;
///
/// struct RowParallel {
///     comm: Arc<dyn DeviceComm>,
///     weight: CudaSlice<bf16>,
///     bias: CudaSlice<bf16>,
/// }
///
/// impl RowParallel {
///     fn finish(&self, partial: &mut CudaSlice<bf16>, stream: &CudaStream) -> Result<(), CommError> {
///         self.comm.all_reduce_cuda_in_place(partial, ReduceOp::Sum, stream)
///     }
///
///     /// The same with the norm that follows it.
///     fn finish_and_norm(
///         &self,
///         partial: &mut CudaSlice<bf16>,
///         residual: &mut CudaSlice<bf16>,
///         stream: &CudaStream,
///     ) -> Result<(), CommError> {
///         let scale = NormScale { eps: 1e-6, weight_offset: 0.0 };
///         let comm = &self.comm;
///         comm.all_reduce_rmsnorm_cuda_in_place(
///             partial, residual, (&self.weight, Some(&self.bias)), scale, stream,
///         )
///     }
///
///     /// Hands activations round a ring of pipeline stages.
///     fn rotate(
///         &self,
///         out: &CudaSlice<bf16>,
///         into: &mut CudaSlice<bf16>,
///         stream: &CudaStream,
///     ) -> Result<(), CommError> {
///         let (rank, size) = (self.comm.rank(), self.comm.size());
///         let next = CudaTransfer::Send(out, (rank + 1) % size);
///         self.comm.group_cuda(&mut [next, CudaTransfer::Recv(into, (rank + size - 1) % size)], stream)
///     }
/// }
/// ```
///
/// A call returns once the work is enqueued. cudarc's events order it with other uses of the slices, and a slice that is
/// dropped is freed only after the work; a program that has switched cudarc's event tracking off has taken that on
/// itself.
///
/// # Errors
/// Every method returns [`CommError::InvalidArgument`] for slices of the wrong length, and for slices, a stream or a
/// communicator of different devices, and otherwise what the operation of [`DeviceComm`] returns.
#[allow(clippy::missing_errors_doc, reason = "the trait's Errors section holds for every method")]
pub trait CudaSliceExt: DeviceComm {
    /// `recv = reduce over ranks of send`. Both have the same length, on all ranks.
    fn all_reduce_cuda<T: Element>(
        &self,
        send: &impl DevicePtr<T>,
        recv: &mut impl DevicePtrMut<T>,
        op: ReduceOp,
        stream: &CudaStream,
    ) -> Result<()> {
        let count = send.len();
        lengths::exact("recv", recv.len(), count)?;
        let handle = handle(self, stream, [of(send), of(recv)])?;
        let (from, _read) = send.device_ptr(stream);
        let (to, _written) = recv.device_ptr_mut(stream);
        // SAFETY: see `handle`; `recv` is borrowed exclusively, so the ranges are disjoint, and both hold `count`.
        unsafe { self.all_reduce(DeviceAddr(from), DeviceAddr(to), count, T::DTYPE, op, handle) }
    }

    /// `data = reduce over ranks of data`.
    fn all_reduce_cuda_in_place<T: Element>(
        &self,
        data: &mut impl DevicePtrMut<T>,
        op: ReduceOp,
        stream: &CudaStream,
    ) -> Result<()> {
        let count = data.len();
        let handle = handle(self, stream, [of(data)])?;
        let (at, _written) = data.device_ptr_mut(stream);
        // SAFETY: see `handle`; the range is borrowed exclusively and holds `count` elements.
        unsafe { self.all_reduce(DeviceAddr(at), DeviceAddr(at), count, T::DTYPE, op, handle) }
    }

    /// `recv` = all ranks' `send` end to end; `recv` is `size` times as long as `send`.
    fn all_gather_cuda<T: Element>(
        &self,
        send: &impl DevicePtr<T>,
        recv: &mut impl DevicePtrMut<T>,
        stream: &CudaStream,
    ) -> Result<()> {
        let count = send.len();
        lengths::parts(self.info(), "recv", recv.len(), count)?;
        let handle = handle(self, stream, [of(send), of(recv)])?;
        let (from, _read) = send.device_ptr(stream);
        let (to, _written) = recv.device_ptr_mut(stream);
        // SAFETY: see `handle`; the ranges are disjoint and `recv` holds `size` parts.
        unsafe { self.all_gather(DeviceAddr(from), DeviceAddr(to), count, T::DTYPE, handle) }
    }

    /// An all-gather of the parts that already lie in place: this rank's is the `rank`-th of `size` equal parts.
    fn all_gather_cuda_in_place<T: Element>(
        &self,
        data: &mut impl DevicePtrMut<T>,
        stream: &CudaStream,
    ) -> Result<()> {
        let part = lengths::part(self.info(), "data", data.len())?;
        let handle = handle(self, stream, [of(data)])?;
        let (at, _written) = data.device_ptr_mut(stream);
        let own = DeviceAddr(at).offset((self.rank() * part * T::DTYPE.size()) as u64);
        // SAFETY: see `handle`; the range is borrowed exclusively and holds `size` parts, of which `own` is this rank's.
        unsafe { self.all_gather(own, DeviceAddr(at), part, T::DTYPE, handle) }
    }

    /// An all-gather to which rank `r` contributes `counts[r]` elements.
    fn all_gather_v_cuda<T: Element>(
        &self,
        send: &impl DevicePtr<T>,
        recv: &mut impl DevicePtrMut<T>,
        counts: &[usize],
        stream: &CudaStream,
    ) -> Result<()> {
        lengths::uneven(self.info(), counts, ("send", send.len()), ("recv", recv.len()))?;
        let handle = handle(self, stream, [of(send), of(recv)])?;
        let (from, _read) = send.device_ptr(stream);
        let (to, _written) = recv.device_ptr_mut(stream);
        // SAFETY: see `handle`; the ranges are disjoint and as long as `counts` says.
        unsafe { self.all_gather_v(DeviceAddr(from), DeviceAddr(to), counts, T::DTYPE, handle) }
    }

    /// An all-gather of the parts that already lie in place end to end: rank `r`'s are `counts[r]` elements.
    fn all_gather_v_cuda_in_place<T: Element>(
        &self,
        data: &mut impl DevicePtrMut<T>,
        counts: &[usize],
        stream: &CudaStream,
    ) -> Result<()> {
        let first = lengths::uneven_in_place(self.info(), counts, "data", data.len())?;
        let handle = handle(self, stream, [of(data)])?;
        let (at, _written) = data.device_ptr_mut(stream);
        let own = DeviceAddr(at).offset((first * T::DTYPE.size()) as u64);
        // SAFETY: see `handle`; the range is borrowed exclusively and as long as `counts` says.
        unsafe { self.all_gather_v(own, DeviceAddr(at), counts, T::DTYPE, handle) }
    }

    /// `recv` = this rank's part of the reduced `send`, which is `size` times as long.
    fn reduce_scatter_cuda<T: Element>(
        &self,
        send: &impl DevicePtr<T>,
        recv: &mut impl DevicePtrMut<T>,
        op: ReduceOp,
        stream: &CudaStream,
    ) -> Result<()> {
        let count = recv.len();
        lengths::parts(self.info(), "send", send.len(), count)?;
        let handle = handle(self, stream, [of(send), of(recv)])?;
        let (from, _read) = send.device_ptr(stream);
        let (to, _written) = recv.device_ptr_mut(stream);
        // SAFETY: see `handle`; the ranges are disjoint and `send` holds `size` parts.
        unsafe { self.reduce_scatter(DeviceAddr(from), DeviceAddr(to), count, T::DTYPE, op, handle) }
    }

    /// A reduce-scatter that leaves this rank's part where it lies in `data`, which holds `size` equal parts; the others
    /// are undefined afterwards.
    fn reduce_scatter_cuda_in_place<T: Element>(
        &self,
        data: &mut impl DevicePtrMut<T>,
        op: ReduceOp,
        stream: &CudaStream,
    ) -> Result<()> {
        let part = lengths::part(self.info(), "data", data.len())?;
        let handle = handle(self, stream, [of(data)])?;
        let (at, _written) = data.device_ptr_mut(stream);
        let own = DeviceAddr(at).offset((self.rank() * part * T::DTYPE.size()) as u64);
        // SAFETY: see `handle`; the range is borrowed exclusively and holds `size` parts, of which `own` is this rank's.
        unsafe { self.reduce_scatter(DeviceAddr(at), own, part, T::DTYPE, op, handle) }
    }

    /// A reduce-scatter of which rank `r` receives `counts[r]` elements.
    fn reduce_scatter_v_cuda<T: Element>(
        &self,
        send: &impl DevicePtr<T>,
        recv: &mut impl DevicePtrMut<T>,
        counts: &[usize],
        op: ReduceOp,
        stream: &CudaStream,
    ) -> Result<()> {
        lengths::uneven(self.info(), counts, ("recv", recv.len()), ("send", send.len()))?;
        let handle = handle(self, stream, [of(send), of(recv)])?;
        let (from, _read) = send.device_ptr(stream);
        let (to, _written) = recv.device_ptr_mut(stream);
        // SAFETY: see `handle`; the ranges are disjoint and as long as `counts` says.
        unsafe { self.reduce_scatter_v(DeviceAddr(from), DeviceAddr(to), counts, T::DTYPE, op, handle) }
    }

    /// `data` = `root`'s `data`.
    fn broadcast_cuda_in_place<T: Element>(
        &self,
        data: &mut impl DevicePtrMut<T>,
        root: usize,
        stream: &CudaStream,
    ) -> Result<()> {
        let count = data.len();
        let handle = handle(self, stream, [of(data)])?;
        let (at, _written) = data.device_ptr_mut(stream);
        // SAFETY: see `handle`; the range is borrowed exclusively and holds `count` elements.
        unsafe { self.broadcast(DeviceAddr(at), DeviceAddr(at), count, T::DTYPE, root, handle) }
    }

    /// `data = reduce over ranks of data` on `root`; the other ranks' `data` is undefined afterwards.
    fn reduce_cuda_in_place<T: Element>(
        &self,
        data: &mut impl DevicePtrMut<T>,
        op: ReduceOp,
        root: usize,
        stream: &CudaStream,
    ) -> Result<()> {
        let count = data.len();
        let handle = handle(self, stream, [of(data)])?;
        let (at, _written) = data.device_ptr_mut(stream);
        // SAFETY: see `handle`; the range is borrowed exclusively and holds `count` elements.
        unsafe { self.reduce(DeviceAddr(at), DeviceAddr(at), count, T::DTYPE, op, root, handle) }
    }

    /// Part `r` of `send` goes to rank `r`; part `r` of `recv` comes from rank `r`. Equal lengths, `size` equal parts.
    fn all_to_all_cuda<T: Element>(
        &self,
        send: &impl DevicePtr<T>,
        recv: &mut impl DevicePtrMut<T>,
        stream: &CudaStream,
    ) -> Result<()> {
        let part = lengths::part(self.info(), "send", send.len())?;
        lengths::exact("recv", recv.len(), send.len())?;
        let handle = handle(self, stream, [of(send), of(recv)])?;
        let (from, _read) = send.device_ptr(stream);
        let (to, _written) = recv.device_ptr_mut(stream);
        // SAFETY: see `handle`; the ranges are disjoint and hold `size` parts.
        unsafe { self.all_to_all(DeviceAddr(from), DeviceAddr(to), part, T::DTYPE, handle) }
    }

    /// Sends `data` to `peer`, which receives as many elements.
    fn send_cuda<T: Element>(
        &self,
        data: &impl DevicePtr<T>,
        peer: usize,
        stream: &CudaStream,
    ) -> Result<()> {
        let count = data.len();
        let handle = handle(self, stream, [of(data)])?;
        let (at, _read) = data.device_ptr(stream);
        // SAFETY: see `handle`; the range holds `count` elements.
        unsafe { self.send(DeviceAddr(at), count, T::DTYPE, peer, handle) }
    }

    /// Receives as many elements from `peer` as `data` holds.
    fn recv_cuda<T: Element>(
        &self,
        data: &mut impl DevicePtrMut<T>,
        peer: usize,
        stream: &CudaStream,
    ) -> Result<()> {
        let count = data.len();
        let handle = handle(self, stream, [of(data)])?;
        let (at, _written) = data.device_ptr_mut(stream);
        // SAFETY: see `handle`; the range is borrowed exclusively and holds `count` elements.
        unsafe { self.recv(DeviceAddr(at), count, T::DTYPE, peer, handle) }
    }

    /// Carries out several transfers at once, so that no order among them can deadlock.
    fn group_cuda<T: Element>(
        &self,
        transfers: &mut [CudaTransfer<'_, T>],
        stream: &CudaStream,
    ) -> Result<()> {
        cuda_fused::group(self, transfers, stream)
    }

    /// Work after it on any rank's stream starts after work before it on all ranks' streams has ended.
    fn barrier_cuda(&self, stream: &CudaStream) -> Result<()> {
        let handle = handle(self, stream, [])?;
        // SAFETY: the stream is borrowed for the call and of the communicator's device.
        unsafe { self.barrier(handle) }
    }

    /// All-reduce, residual, bias and RMSNorm in one, as [`RmsNormArgs`](crate::RmsNormArgs) defines them: `input`,
    /// `residual` (updated in place) and `output` are `[tokens, hidden]`, `weight` and `bias` are `[hidden]`.
    fn all_reduce_rmsnorm_cuda<T: Element>(
        &self,
        input: &impl DevicePtr<T>,
        residual: &mut impl DevicePtrMut<T>,
        parameters: (&dyn DevicePtr<T>, Option<&dyn DevicePtr<T>>),
        output: &mut impl DevicePtrMut<T>,
        scale: NormScale,
        stream: &CudaStream,
    ) -> Result<()> {
        let count = input.len();
        lengths::exact("output", output.len(), count)?;
        handle(self, stream, [of(input), of(output)])?;
        let (from, _read) = input.device_ptr(stream);
        let (to, _written) = output.device_ptr_mut(stream);
        let data = (DeviceAddr(from), DeviceAddr(to), count);
        // SAFETY: see `handle`; both are borrowed, `output` exclusively, and hold `count` elements.
        unsafe { cuda_fused::norm(self, data, residual, parameters, scale, stream) }
    }

    /// [`all_reduce_rmsnorm_cuda`](Self::all_reduce_rmsnorm_cuda) whose output takes its input's place.
    fn all_reduce_rmsnorm_cuda_in_place<T: Element>(
        &self,
        data: &mut impl DevicePtrMut<T>,
        residual: &mut impl DevicePtrMut<T>,
        parameters: (&dyn DevicePtr<T>, Option<&dyn DevicePtr<T>>),
        scale: NormScale,
        stream: &CudaStream,
    ) -> Result<()> {
        let count = data.len();
        handle(self, stream, [of(data)])?;
        let (at, _written) = data.device_ptr_mut(stream);
        let data = (DeviceAddr(at), DeviceAddr(at), count);
        // SAFETY: see `handle`; `data` is borrowed exclusively and holds `count` elements.
        unsafe { cuda_fused::norm(self, data, residual, parameters, scale, stream) }
    }

    /// The two-group form with uneven tokens, as [`TwoGroupNormArgs`](crate::TwoGroupNormArgs) defines it: this
    /// communicator is the reduce group. `hidden_states` is `[rows, hidden]` and `residual` `[own tokens, hidden]`, both
    /// updated in place; `weight` and `bias` are `[hidden]`.
    fn all_reduce_rmsnorm_two_group_cuda_in_place<T: Element>(
        &self,
        gather: &dyn DeviceComm,
        hidden_states: &mut impl DevicePtrMut<T>,
        residual: &mut impl DevicePtrMut<T>,
        parameters: (&dyn DevicePtr<T>, Option<&dyn DevicePtr<T>>),
        rows: TwoGroupRows<'_>,
        scale: NormScale,
        stream: &CudaStream,
    ) -> Result<()> {
        cuda_fused::two_group((self, gather), (hidden_states, residual), parameters, rows, scale, stream)
    }
}

impl<C: DeviceComm + ?Sized> CudaSliceExt for C {}

/// The ordinal of the device that a slice lies on.
pub(super) fn of<T>(slice: &(impl DeviceSlice<T> + ?Sized)) -> usize {
    slice.stream().context().ordinal()
}

/// The stream's handle, once the stream, the slices and the communicator are known to be of one device.
///
/// With that, what remains of the operations' safety contract is kept by cudarc: `device_ptr` makes the stream wait for
/// earlier uses, and the guard it returns, dropped after the work is enqueued, records the event that later uses and the
/// slice's own release wait for.
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
