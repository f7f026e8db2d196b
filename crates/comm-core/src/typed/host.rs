//! Collectives on slices of host memory.

use super::host_fused::{self, HostNormQuantization, HostTransfer};
use super::{BlockShape, Fp8Bits, NormScale, TwoGroupRows, lengths};
use crate::addr::{DeviceAddr, StreamHandle};
use crate::device_comm::DeviceComm;
use crate::dtype::{Element, ReduceOp};
use crate::error::{CommError, Result};
use crate::memory::MemoryKind;

/// Collectives on slices, for communicators over host memory. The results are there when a call returns.
///
/// ```no_run
/// use comm_core::{CommError, DeviceComm, HostSliceExt, ReduceOp};
/// fn sum_gradients(comm: &dyn DeviceComm, gradients: &mut [f32]) -> Result<(), CommError> {
///     comm.all_reduce_slice_in_place(gradients, ReduceOp::Avg)
/// }
/// ```
///
/// # Errors
/// Every method returns [`CommError::InvalidArgument`] for slices of the wrong length and for a communicator over other
/// memory, and otherwise what the operation of [`DeviceComm`] returns.
#[allow(clippy::missing_errors_doc, reason = "the trait's Errors section holds for every method")]
pub trait HostSliceExt: DeviceComm {
    /// `recv = reduce over ranks of send`. Both have the same length, on all ranks.
    fn all_reduce_slice<T: Element>(&self, send: &[T], recv: &mut [T], op: ReduceOp) -> Result<()> {
        on_host(self)?;
        lengths::exact("recv", recv.len(), send.len())?;
        let (from, to) = (DeviceAddr::of_slice(send), DeviceAddr::of_slice_mut(recv));
        // SAFETY: both ranges are borrowed for the call, which completes on host memory before it returns, and the
        // exclusive borrow cannot overlap the other.
        unsafe { self.all_reduce(from, to, send.len(), T::DTYPE, op, StreamHandle::NULL) }
    }

    /// `data = reduce over ranks of data`.
    fn all_reduce_slice_in_place<T: Element>(&self, data: &mut [T], op: ReduceOp) -> Result<()> {
        on_host(self)?;
        let at = DeviceAddr::of_slice_mut(data);
        // SAFETY: the range is borrowed exclusively for the call.
        unsafe { self.all_reduce(at, at, data.len(), T::DTYPE, op, StreamHandle::NULL) }
    }

    /// `recv = sum over ranks of send`, whose operands travel as fp8: see
    /// [`all_reduce_quantized`](DeviceComm::all_reduce_quantized). Both have the same length, on all ranks.
    fn all_reduce_quantized_slice<T: Element>(&self, send: &[T], recv: &mut [T]) -> Result<()> {
        on_host(self)?;
        lengths::exact("recv", recv.len(), send.len())?;
        let (from, to) = (DeviceAddr::of_slice(send), DeviceAddr::of_slice_mut(recv));
        // SAFETY: both ranges are borrowed for the call, disjoint, and equally long.
        unsafe { self.all_reduce_quantized(from, to, send.len(), T::DTYPE, StreamHandle::NULL) }
    }

    /// `data = sum over ranks of data`, whose operands travel as fp8.
    fn all_reduce_quantized_slice_in_place<T: Element>(&self, data: &mut [T]) -> Result<()> {
        on_host(self)?;
        let at = DeviceAddr::of_slice_mut(data);
        // SAFETY: the range is borrowed exclusively for the call.
        unsafe { self.all_reduce_quantized(at, at, data.len(), T::DTYPE, StreamHandle::NULL) }
    }

    /// `recv` = all ranks' `send` end to end; `recv` is `size` times as long as `send`.
    fn all_gather_slice<T: Element>(&self, send: &[T], recv: &mut [T]) -> Result<()> {
        on_host(self)?;
        lengths::parts(self.info(), "recv", recv.len(), send.len())?;
        let (from, to) = (DeviceAddr::of_slice(send), DeviceAddr::of_slice_mut(recv));
        // SAFETY: both ranges are borrowed for the call, disjoint, and as long as the call takes them to be.
        unsafe { self.all_gather(from, to, send.len(), T::DTYPE, StreamHandle::NULL) }
    }

    /// An all-gather of the parts that already lie in place: this rank's is the `rank`-th of `size` equal parts.
    fn all_gather_slice_in_place<T: Element>(&self, data: &mut [T]) -> Result<()> {
        on_host(self)?;
        let part = lengths::part(self.info(), "data", data.len())?;
        let to = DeviceAddr::of_slice_mut(data);
        let from = to.offset((self.rank() * part * T::DTYPE.size()) as u64);
        // SAFETY: the range is borrowed exclusively for the call and holds `size` parts, of which `from` is this rank's.
        unsafe { self.all_gather(from, to, part, T::DTYPE, StreamHandle::NULL) }
    }

    /// An all-gather to which rank `r` contributes `counts[r]` elements.
    fn all_gather_v_slice<T: Element>(&self, send: &[T], recv: &mut [T], counts: &[usize]) -> Result<()> {
        on_host(self)?;
        lengths::uneven(self.info(), counts, ("send", send.len()), ("recv", recv.len()))?;
        let (from, to) = (DeviceAddr::of_slice(send), DeviceAddr::of_slice_mut(recv));
        // SAFETY: both ranges are borrowed for the call, disjoint, and as long as `counts` says.
        unsafe { self.all_gather_v(from, to, counts, T::DTYPE, StreamHandle::NULL) }
    }

    /// An all-gather of the parts that already lie in place end to end: rank `r`'s are `counts[r]` elements.
    fn all_gather_v_slice_in_place<T: Element>(&self, data: &mut [T], counts: &[usize]) -> Result<()> {
        on_host(self)?;
        let first = lengths::uneven_in_place(self.info(), counts, "data", data.len())?;
        let to = DeviceAddr::of_slice_mut(data);
        let from = to.offset((first * T::DTYPE.size()) as u64);
        // SAFETY: the range is borrowed exclusively for the call and as long as `counts` says.
        unsafe { self.all_gather_v(from, to, counts, T::DTYPE, StreamHandle::NULL) }
    }

    /// Gathers every rank's two-dimensional block, as [`Block2d`](crate::Block2d) says. What lies between the blocks in
    /// `recv` is left as it is.
    fn all_gather_2d_slice<T: Element>(&self, send: &[T], recv: &mut [T], shape: BlockShape) -> Result<()> {
        on_host(self)?;
        lengths::blocks(self.info(), &shape, send.len(), recv.len())?;
        let (from, to) = (DeviceAddr::of_slice(send), DeviceAddr::of_slice_mut(recv));
        // SAFETY: both ranges are borrowed for the call, disjoint, and hold what the shape names.
        unsafe { self.all_gather_2d(from, to, &shape.block(T::DTYPE), StreamHandle::NULL) }
    }

    /// A two-dimensional all-gather of the blocks that already lie in place: this rank's begins `rank * rank_stride`
    /// elements into `data`, and `send_pitch` is `row_pitch`.
    fn all_gather_2d_slice_in_place<T: Element>(&self, data: &mut [T], shape: BlockShape) -> Result<()> {
        on_host(self)?;
        let first = lengths::blocks_in_place(self.info(), &shape, data.len())?;
        let to = DeviceAddr::of_slice_mut(data);
        let from = to.offset((first * T::DTYPE.size()) as u64);
        // SAFETY: the range is borrowed exclusively for the call and holds all blocks, of which `from` is this rank's.
        unsafe { self.all_gather_2d(from, to, &shape.block(T::DTYPE), StreamHandle::NULL) }
    }

    /// `recv` = this rank's part of the reduced `send`, which is `size` times as long.
    fn reduce_scatter_slice<T: Element>(&self, send: &[T], recv: &mut [T], op: ReduceOp) -> Result<()> {
        on_host(self)?;
        lengths::parts(self.info(), "send", send.len(), recv.len())?;
        let (from, to) = (DeviceAddr::of_slice(send), DeviceAddr::of_slice_mut(recv));
        // SAFETY: both ranges are borrowed for the call, disjoint, and as long as the call takes them to be.
        unsafe { self.reduce_scatter(from, to, recv.len(), T::DTYPE, op, StreamHandle::NULL) }
    }

    /// A reduce-scatter that leaves this rank's part where it lies in `data`, which holds `size` equal parts; the others
    /// are undefined afterwards.
    fn reduce_scatter_slice_in_place<T: Element>(&self, data: &mut [T], op: ReduceOp) -> Result<()> {
        on_host(self)?;
        let part = lengths::part(self.info(), "data", data.len())?;
        let from = DeviceAddr::of_slice_mut(data);
        let to = from.offset((self.rank() * part * T::DTYPE.size()) as u64);
        // SAFETY: the range is borrowed exclusively for the call and holds `size` parts, of which `to` is this rank's.
        unsafe { self.reduce_scatter(from, to, part, T::DTYPE, op, StreamHandle::NULL) }
    }

    /// A reduce-scatter of which rank `r` receives `counts[r]` elements.
    fn reduce_scatter_v_slice<T: Element>(
        &self,
        send: &[T],
        recv: &mut [T],
        counts: &[usize],
        op: ReduceOp,
    ) -> Result<()> {
        on_host(self)?;
        lengths::uneven(self.info(), counts, ("recv", recv.len()), ("send", send.len()))?;
        let (from, to) = (DeviceAddr::of_slice(send), DeviceAddr::of_slice_mut(recv));
        // SAFETY: both ranges are borrowed for the call, disjoint, and as long as `counts` says.
        unsafe { self.reduce_scatter_v(from, to, counts, T::DTYPE, op, StreamHandle::NULL) }
    }

    /// `data` = `root`'s `data`.
    fn broadcast_slice_in_place<T: Element>(&self, data: &mut [T], root: usize) -> Result<()> {
        on_host(self)?;
        let at = DeviceAddr::of_slice_mut(data);
        // SAFETY: the range is borrowed exclusively for the call.
        unsafe { self.broadcast(at, at, data.len(), T::DTYPE, root, StreamHandle::NULL) }
    }

    /// `recv = reduce over ranks of send` on `root`, which passes `Some`; the others may pass `None`.
    fn reduce_slice<T: Element>(
        &self,
        send: &[T],
        recv: Option<&mut [T]>,
        op: ReduceOp,
        root: usize,
    ) -> Result<()> {
        on_host(self)?;
        let to = match recv {
            Some(recv) => {
                lengths::exact("recv", recv.len(), send.len())?;
                DeviceAddr::of_slice_mut(recv)
            }
            None if self.rank() == root => {
                return Err(CommError::invalid("recv", "the root of a reduce must pass a slice"));
            }
            None => DeviceAddr::NULL,
        };
        let from = DeviceAddr::of_slice(send);
        // SAFETY: both ranges are borrowed for the call and disjoint; the null address is on a rank that does not
        // receive.
        unsafe { self.reduce(from, to, send.len(), T::DTYPE, op, root, StreamHandle::NULL) }
    }

    /// `data = reduce over ranks of data` on `root`; the other ranks' `data` is undefined afterwards.
    fn reduce_slice_in_place<T: Element>(&self, data: &mut [T], op: ReduceOp, root: usize) -> Result<()> {
        on_host(self)?;
        let at = DeviceAddr::of_slice_mut(data);
        // SAFETY: the range is borrowed exclusively for the call.
        unsafe { self.reduce(at, at, data.len(), T::DTYPE, op, root, StreamHandle::NULL) }
    }

    /// Part `r` of `send` goes to rank `r`; part `r` of `recv` comes from rank `r`. Equal lengths, `size` equal parts.
    fn all_to_all_slice<T: Element>(&self, send: &[T], recv: &mut [T]) -> Result<()> {
        on_host(self)?;
        let part = lengths::part(self.info(), "send", send.len())?;
        lengths::exact("recv", recv.len(), send.len())?;
        let (from, to) = (DeviceAddr::of_slice(send), DeviceAddr::of_slice_mut(recv));
        // SAFETY: both ranges are borrowed for the call, disjoint, and hold `size` parts.
        unsafe { self.all_to_all(from, to, part, T::DTYPE, StreamHandle::NULL) }
    }

    /// Sends `data` to `peer`, which receives as many elements.
    fn send_slice<T: Element>(&self, data: &[T], peer: usize) -> Result<()> {
        on_host(self)?;
        let at = DeviceAddr::of_slice(data);
        // SAFETY: the range is borrowed for the call.
        unsafe { self.send(at, data.len(), T::DTYPE, peer, StreamHandle::NULL) }
    }

    /// Receives as many elements from `peer` as `data` holds.
    fn recv_slice<T: Element>(&self, data: &mut [T], peer: usize) -> Result<()> {
        on_host(self)?;
        let at = DeviceAddr::of_slice_mut(data);
        // SAFETY: the range is borrowed exclusively for the call.
        unsafe { self.recv(at, data.len(), T::DTYPE, peer, StreamHandle::NULL) }
    }

    /// Carries out several transfers at once, so that no order among them can deadlock.
    fn group_slices<T: Element>(&self, transfers: &mut [HostTransfer<'_, T>]) -> Result<()> {
        on_host(self)?;
        host_fused::group(self, transfers)
    }

    /// Returns once every rank has called it.
    fn barrier_host(&self) -> Result<()> {
        on_host(self)?;
        // SAFETY: host memory has no streams, for which the null handle stands.
        unsafe { self.barrier(StreamHandle::NULL) }
    }

    /// All-reduce, residual, bias and RMSNorm in one, as [`RmsNormArgs`](crate::RmsNormArgs) defines them: `input`,
    /// `residual` (updated in place) and `output` are `[tokens, hidden]`, `weight` and `bias` are `[hidden]`.
    fn all_reduce_rmsnorm_slice<T: Element>(
        &self,
        input: &[T],
        residual: &mut [T],
        parameters: (&[T], Option<&[T]>),
        output: &mut [T],
        scale: NormScale,
    ) -> Result<()> {
        on_host(self)?;
        lengths::exact("output", output.len(), input.len())?;
        let data = (DeviceAddr::of_slice(input), DeviceAddr::of_slice_mut(output), input.len());
        host_fused::norm(data, residual, parameters, scale, |args| {
            // SAFETY: all operands are borrowed for the call, those that are written exclusively, and as long as `args` says.
            unsafe { self.all_reduce_rmsnorm(args, StreamHandle::NULL) }
        })
    }

    /// [`all_reduce_rmsnorm_slice`](Self::all_reduce_rmsnorm_slice) whose output takes its input's place.
    fn all_reduce_rmsnorm_slice_in_place<T: Element>(
        &self,
        data: &mut [T],
        residual: &mut [T],
        parameters: (&[T], Option<&[T]>),
        scale: NormScale,
    ) -> Result<()> {
        on_host(self)?;
        let at = DeviceAddr::of_slice_mut(data);
        host_fused::norm((at, at, data.len()), residual, parameters, scale, |args| {
            // SAFETY: as above; `data` is borrowed exclusively.
            unsafe { self.all_reduce_rmsnorm(args, StreamHandle::NULL) }
        })
    }

    /// [`all_reduce_rmsnorm_slice`](Self::all_reduce_rmsnorm_slice) with an fp8 result, as
    /// [`NormQuantization`](crate::NormQuantization) defines it.
    fn all_reduce_rmsnorm_quantized_slice<T: Element, Q: Fp8Bits>(
        &self,
        input: &[T],
        residual: &mut [T],
        parameters: (&[T], Option<&[T]>),
        output: &mut [T],
        quantized: HostNormQuantization<'_, Q>,
        scale: NormScale,
    ) -> Result<()> {
        on_host(self)?;
        lengths::exact("output", output.len(), input.len())?;
        let data = (DeviceAddr::of_slice(input), DeviceAddr::of_slice_mut(output), input.len());
        host_fused::norm_quantized(data, residual, parameters, quantized, scale, |args, quantized| {
            // SAFETY: as above; so are the fp8 result and its scales.
            unsafe { self.all_reduce_rmsnorm_quantized(args, quantized, StreamHandle::NULL) }
        })
    }

    /// [`all_reduce_rmsnorm_quantized_slice`](Self::all_reduce_rmsnorm_quantized_slice) whose unquantised output takes its
    /// input's place.
    fn all_reduce_rmsnorm_quantized_slice_in_place<T: Element, Q: Fp8Bits>(
        &self,
        data: &mut [T],
        residual: &mut [T],
        parameters: (&[T], Option<&[T]>),
        quantized: HostNormQuantization<'_, Q>,
        scale: NormScale,
    ) -> Result<()> {
        on_host(self)?;
        let at = DeviceAddr::of_slice_mut(data);
        let data = (at, at, data.len());
        host_fused::norm_quantized(data, residual, parameters, quantized, scale, |args, quantized| {
            // SAFETY: as above.
            unsafe { self.all_reduce_rmsnorm_quantized(args, quantized, StreamHandle::NULL) }
        })
    }

    /// The two-group form with uneven tokens, as [`TwoGroupNormArgs`](crate::TwoGroupNormArgs) defines it: this
    /// communicator is the reduce group. `hidden_states` is `[rows, hidden]` and `residual` `[own tokens, hidden]`, both
    /// updated in place; `weight` and `bias` are `[hidden]`.
    fn all_reduce_rmsnorm_two_group_slice_in_place<T: Element>(
        &self,
        gather: &dyn DeviceComm,
        hidden_states: &mut [T],
        residual: &mut [T],
        parameters: (&[T], Option<&[T]>),
        rows: TwoGroupRows<'_>,
        scale: NormScale,
    ) -> Result<()> {
        on_host(self)?;
        on_host(gather)?;
        let data = (hidden_states, residual);
        host_fused::two_group((self, gather), data, parameters, rows, scale, |args| {
            // SAFETY: the slices are borrowed for the call, those that are written exclusively, and hold all the rows that
            // the arguments name.
            unsafe { self.all_reduce_rmsnorm_two_group(gather, args, StreamHandle::NULL) }
        })
    }

    /// [`all_reduce_rmsnorm_two_group_slice_in_place`](Self::all_reduce_rmsnorm_two_group_slice_in_place) with an fp8 result.
    fn all_reduce_rmsnorm_two_group_quantized_slice_in_place<T: Element, Q: Fp8Bits>(
        &self,
        gather: &dyn DeviceComm,
        (hidden_states, residual): (&mut [T], &mut [T]),
        parameters: (&[T], Option<&[T]>),
        mut quantized: HostNormQuantization<'_, Q>,
        rows: TwoGroupRows<'_>,
        scale: NormScale,
    ) -> Result<()> {
        on_host(self)?;
        on_host(gather)?;
        let (elements, data) = (hidden_states.len(), (hidden_states, residual));
        host_fused::two_group((self, gather), data, parameters, rows, scale, |args| {
            let quantized = quantized.of((elements.checked_div(args.hidden).unwrap_or(0), args.hidden))?;
            // SAFETY: as above; the fp8 result and its scales have a row for each whole one of `hidden_states`.
            unsafe {
                self.all_reduce_rmsnorm_two_group_quantized(gather, args, &quantized, StreamHandle::NULL)
            }
        })
    }
}

impl<C: DeviceComm + ?Sized> HostSliceExt for C {}

fn on_host<C: DeviceComm + ?Sized>(comm: &C) -> Result<()> {
    match comm.info().memory {
        MemoryKind::Host => Ok(()),
        other => Err(CommError::invalid(
            "slice",
            format!("communicator {:?} works on {other:?} memory, not on the host's", comm.info().name),
        )),
    }
}
