//! Collectives on cudarc's device slices.

use cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut};

use super::cuda_call::{apart, enqueue, in_place, of};
use super::cuda_fused::{self, CudaNormQuantization, CudaTransfer};
use super::{BlockShape, Fp8Bits, NormScale, TwoGroupRows, lengths};
use crate::device_comm::DeviceComm;
use crate::dtype::{Element, ReduceOp};
use crate::error::Result;

/// Collectives on cudarc's slices and views, enqueued on a stream of the communicator's device.
///
#[doc = include_str!("cuda.md")]
///
/// A call returns once the work is enqueued. cudarc's events order it with other uses of the slices, and a slice that is
/// dropped is freed only after the work; a program that has switched cudarc's event tracking off has taken that on
/// itself. The stream may be let go of at once.
///
/// Slices may lie anywhere on the device. Those of [`allocate_cuda`](crate::allocate_cuda) lie where the other ranks reach
/// them, so that large results need no copy.
///
/// # Errors
/// Every method returns [`InvalidArgument`](crate::CommError::InvalidArgument) for slices of the wrong length, and for slices, a stream or a
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
        // SAFETY: see `apart`; both hold `count` elements.
        apart(self, send, recv, stream, |from, to, on| unsafe {
            self.all_reduce(from, to, count, T::DTYPE, op, on)
        })
    }

    /// `data = reduce over ranks of data`.
    fn all_reduce_cuda_in_place<T: Element>(
        &self,
        data: &mut impl DevicePtrMut<T>,
        op: ReduceOp,
        stream: &CudaStream,
    ) -> Result<()> {
        let count = data.len();
        // SAFETY: see `in_place`; the range holds `count` elements.
        in_place(self, data, stream, |at, on| unsafe { self.all_reduce(at, at, count, T::DTYPE, op, on) })
    }

    /// `recv = sum over ranks of send`, whose operands travel as fp8: see
    /// [`all_reduce_quantized`](DeviceComm::all_reduce_quantized). Both have the same length, on all ranks.
    fn all_reduce_quantized_cuda<T: Element>(
        &self,
        send: &impl DevicePtr<T>,
        recv: &mut impl DevicePtrMut<T>,
        stream: &CudaStream,
    ) -> Result<()> {
        let count = send.len();
        lengths::exact("recv", recv.len(), count)?;
        // SAFETY: see `apart`; both hold `count` elements.
        apart(self, send, recv, stream, |from, to, on| unsafe {
            self.all_reduce_quantized(from, to, count, T::DTYPE, on)
        })
    }

    /// `data = sum over ranks of data`, whose operands travel as fp8.
    fn all_reduce_quantized_cuda_in_place<T: Element>(
        &self,
        data: &mut impl DevicePtrMut<T>,
        stream: &CudaStream,
    ) -> Result<()> {
        let count = data.len();
        // SAFETY: see `in_place`; the range holds `count` elements.
        in_place(self, data, stream, |at, on| unsafe {
            self.all_reduce_quantized(at, at, count, T::DTYPE, on)
        })
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
        // SAFETY: see `apart`; `recv` holds `size` parts.
        apart(self, send, recv, stream, |from, to, on| unsafe {
            self.all_gather(from, to, count, T::DTYPE, on)
        })
    }

    /// An all-gather of the parts that already lie in place: this rank's is the `rank`-th of `size` equal parts.
    fn all_gather_cuda_in_place<T: Element>(
        &self,
        data: &mut impl DevicePtrMut<T>,
        stream: &CudaStream,
    ) -> Result<()> {
        let part = lengths::part(self.info(), "data", data.len())?;
        let first = (self.rank() * part * T::DTYPE.size()) as u64;
        // SAFETY: see `in_place`; the range holds `size` parts, of which this rank's begins `first` bytes in.
        in_place(self, data, stream, |at, on| unsafe {
            self.all_gather(at.offset(first), at, part, T::DTYPE, on)
        })
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
        // SAFETY: see `apart`; the ranges are as long as `counts` says.
        apart(self, send, recv, stream, |from, to, on| unsafe {
            self.all_gather_v(from, to, counts, T::DTYPE, on)
        })
    }

    /// An all-gather of the parts that already lie in place end to end: rank `r`'s are `counts[r]` elements.
    fn all_gather_v_cuda_in_place<T: Element>(
        &self,
        data: &mut impl DevicePtrMut<T>,
        counts: &[usize],
        stream: &CudaStream,
    ) -> Result<()> {
        let first = lengths::uneven_in_place(self.info(), counts, "data", data.len())? * T::DTYPE.size();
        // SAFETY: see `in_place`; the range is as long as `counts` says, and this rank's part begins `first` bytes in.
        in_place(self, data, stream, |at, on| unsafe {
            self.all_gather_v(at.offset(first as u64), at, counts, T::DTYPE, on)
        })
    }

    /// Gathers every rank's two-dimensional block, as [`Block2d`](crate::Block2d) says. What lies between the blocks in
    /// `recv` is left as it is.
    fn all_gather_2d_cuda<T: Element>(
        &self,
        send: &impl DevicePtr<T>,
        recv: &mut impl DevicePtrMut<T>,
        shape: BlockShape,
        stream: &CudaStream,
    ) -> Result<()> {
        lengths::blocks(self.info(), &shape, send.len(), recv.len())?;
        // SAFETY: see `apart`; the ranges hold what the shape names.
        apart(self, send, recv, stream, |from, to, on| unsafe {
            self.all_gather_2d(from, to, &shape.block(T::DTYPE), on)
        })
    }

    /// A two-dimensional all-gather of the blocks that already lie in place: this rank's begins `rank * rank_stride`
    /// elements into `data`, and `send_pitch` is `row_pitch`.
    fn all_gather_2d_cuda_in_place<T: Element>(
        &self,
        data: &mut impl DevicePtrMut<T>,
        shape: BlockShape,
        stream: &CudaStream,
    ) -> Result<()> {
        let first = lengths::blocks_in_place(self.info(), &shape, data.len())? * T::DTYPE.size();
        // SAFETY: see `in_place`; the range holds all blocks, of which this rank's begins `first` bytes in.
        in_place(self, data, stream, |at, on| unsafe {
            self.all_gather_2d(at.offset(first as u64), at, &shape.block(T::DTYPE), on)
        })
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
        // SAFETY: see `apart`; `send` holds `size` parts.
        apart(self, send, recv, stream, |from, to, on| unsafe {
            self.reduce_scatter(from, to, count, T::DTYPE, op, on)
        })
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
        let first = (self.rank() * part * T::DTYPE.size()) as u64;
        // SAFETY: see `in_place`; the range holds `size` parts, of which this rank's begins `first` bytes in.
        in_place(self, data, stream, |at, on| unsafe {
            self.reduce_scatter(at, at.offset(first), part, T::DTYPE, op, on)
        })
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
        // SAFETY: see `apart`; the ranges are as long as `counts` says.
        apart(self, send, recv, stream, |from, to, on| unsafe {
            self.reduce_scatter_v(from, to, counts, T::DTYPE, op, on)
        })
    }

    /// `data` = `root`'s `data`.
    fn broadcast_cuda_in_place<T: Element>(
        &self,
        data: &mut impl DevicePtrMut<T>,
        root: usize,
        stream: &CudaStream,
    ) -> Result<()> {
        let count = data.len();
        // SAFETY: see `in_place`; the range holds `count` elements.
        in_place(self, data, stream, |at, on| unsafe { self.broadcast(at, at, count, T::DTYPE, root, on) })
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
        // SAFETY: see `in_place`; the range holds `count` elements.
        in_place(self, data, stream, |at, on| unsafe { self.reduce(at, at, count, T::DTYPE, op, root, on) })
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
        // SAFETY: see `apart`; both hold `size` parts.
        apart(self, send, recv, stream, |from, to, on| unsafe {
            self.all_to_all(from, to, part, T::DTYPE, on)
        })
    }

    /// Sends `data` to `peer`, which receives as many elements.
    fn send_cuda<T: Element>(
        &self,
        data: &impl DevicePtr<T>,
        peer: usize,
        stream: &CudaStream,
    ) -> Result<()> {
        enqueue(self, stream, [of(data)], |on| cuda_fused::send(self, data, peer, stream, on))
    }

    /// Receives as many elements from `peer` as `data` holds.
    fn recv_cuda<T: Element>(
        &self,
        data: &mut impl DevicePtrMut<T>,
        peer: usize,
        stream: &CudaStream,
    ) -> Result<()> {
        let count = data.len();
        // SAFETY: see `in_place`; the range holds `count` elements.
        in_place(self, data, stream, |at, on| unsafe { self.recv(at, count, T::DTYPE, peer, on) })
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
        // SAFETY: the stream is of the communicator's device, and lives as `enqueue` says.
        enqueue(self, stream, [], |on| unsafe { self.barrier(on) })
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
        cuda_fused::norm_apart(self, (input, output), residual, parameters, scale, stream)
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
        cuda_fused::norm_in_place(self, data, residual, parameters, scale, stream)
    }

    /// [`all_reduce_rmsnorm_cuda`](Self::all_reduce_rmsnorm_cuda) with an fp8 result, as
    /// [`NormQuantization`](crate::NormQuantization) defines it.
    fn all_reduce_rmsnorm_quantized_cuda<T: Element, Q: Fp8Bits>(
        &self,
        input: &impl DevicePtr<T>,
        residual: &mut impl DevicePtrMut<T>,
        parameters: (&dyn DevicePtr<T>, Option<&dyn DevicePtr<T>>),
        output: &mut impl DevicePtrMut<T>,
        quantized: CudaNormQuantization<'_, Q>,
        scale: NormScale,
        stream: &CudaStream,
    ) -> Result<()> {
        let slices = (input, output);
        cuda_fused::norm_quantized_apart(self, slices, residual, parameters, quantized, scale, stream)
    }

    /// [`all_reduce_rmsnorm_quantized_cuda`](Self::all_reduce_rmsnorm_quantized_cuda) whose unquantised output takes its
    /// input's place.
    fn all_reduce_rmsnorm_quantized_cuda_in_place<T: Element, Q: Fp8Bits>(
        &self,
        data: &mut impl DevicePtrMut<T>,
        residual: &mut impl DevicePtrMut<T>,
        parameters: (&dyn DevicePtr<T>, Option<&dyn DevicePtr<T>>),
        quantized: CudaNormQuantization<'_, Q>,
        scale: NormScale,
        stream: &CudaStream,
    ) -> Result<()> {
        cuda_fused::norm_quantized_in_place(self, data, residual, parameters, quantized, scale, stream)
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
        let data = (hidden_states, residual);
        cuda_fused::two_group_in_place((self, gather), data, parameters, rows, scale, stream)
    }

    /// [`all_reduce_rmsnorm_two_group_cuda_in_place`](Self::all_reduce_rmsnorm_two_group_cuda_in_place) with an fp8 result.
    fn all_reduce_rmsnorm_two_group_quantized_cuda_in_place<T: Element, Q: Fp8Bits>(
        &self,
        gather: &dyn DeviceComm,
        (hidden_states, residual): (&mut impl DevicePtrMut<T>, &mut impl DevicePtrMut<T>),
        parameters: (&dyn DevicePtr<T>, Option<&dyn DevicePtr<T>>),
        quantized: CudaNormQuantization<'_, Q>,
        rows: TwoGroupRows<'_>,
        scale: NormScale,
        stream: &CudaStream,
    ) -> Result<()> {
        let (data, result) = ((hidden_states, residual), (quantized, rows));
        cuda_fused::two_group_quantized_in_place((self, gather), data, parameters, result, scale, stream)
    }
}

impl<C: DeviceComm + ?Sized> CudaSliceExt for C {}
