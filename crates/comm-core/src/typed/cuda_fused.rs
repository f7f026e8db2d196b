//! The operations on cudarc's slices that have more operands than two.

use cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut, SyncOnDrop};

use super::cuda::{handle, of};
use super::{NormScale, TwoGroupRows, lengths};
use crate::addr::DeviceAddr;
use crate::device_comm::{DeviceComm, P2pOp};
use crate::dtype::Element;
use crate::error::Result;
use crate::fused::{RmsNormArgs, TwoGroupNormArgs};

/// One transfer of [`CudaSliceExt::group_cuda`](crate::CudaSliceExt::group_cuda).
pub enum CudaTransfer<'a, T> {
    /// Send the slice to the rank, which receives as many elements. This rank itself is allowed.
    Send(&'a dyn DevicePtr<T>, usize),
    /// Receive as many elements from the rank as the slice holds. This rank itself is allowed.
    Recv(&'a mut dyn DevicePtrMut<T>, usize),
}

pub(super) fn group<C: DeviceComm + ?Sized, T: Element>(
    comm: &C,
    transfers: &mut [CudaTransfer<'_, T>],
    stream: &CudaStream,
) -> Result<()> {
    let devices = transfers.iter().map(|transfer| match transfer {
        CudaTransfer::Send(data, _) => of(*data),
        CudaTransfer::Recv(data, _) => of(&**data),
    });
    let handle = handle(comm, stream, devices)?;
    let dtype = T::DTYPE;
    let op = |transfer| -> (P2pOp, SyncOnDrop<'_>) {
        match transfer {
            &mut CudaTransfer::Send(data, peer) => {
                let (at, guard) = data.device_ptr(stream);
                (P2pOp::Send { addr: DeviceAddr(at), count: data.len(), dtype, peer }, guard)
            }
            CudaTransfer::Recv(data, peer) => {
                let count = data.len();
                let (at, guard) = data.device_ptr_mut(stream);
                (P2pOp::Recv { addr: DeviceAddr(at), count, dtype, peer: *peer }, guard)
            }
        }
    };
    let (ops, _guards): (Vec<P2pOp>, Vec<SyncOnDrop<'_>>) = transfers.iter_mut().map(op).unzip();
    // SAFETY: see `handle`; every slice is borrowed, those that are written exclusively, and the guards are dropped after
    // the work is enqueued.
    unsafe { comm.group(&ops, handle) }
}

/// # Safety
/// The addresses name ranges of the communicator's device, the first readable and the second writable, of as many
/// elements as the third says, the same or apart, until the work has completed; neither overlaps the slices.
pub(super) unsafe fn norm<C: DeviceComm + ?Sized, T: Element>(
    comm: &C,
    (input, output, count): (DeviceAddr, DeviceAddr, usize),
    residual: &mut impl DevicePtrMut<T>,
    (weight, bias): (&dyn DevicePtr<T>, Option<&dyn DevicePtr<T>>),
    scale: NormScale,
    stream: &CudaStream,
) -> Result<()> {
    let hidden = weight.len();
    let tokens = lengths::norm_tokens((count, residual.len(), count), bias.map(|bias| bias.len()), hidden)?;
    let handle = handle(comm, stream, [of(residual), of(weight)].into_iter().chain(bias.map(of)))?;
    let (at, _updated) = residual.device_ptr_mut(stream);
    let (weight, _weight_read) = weight.device_ptr(stream);
    let (bias, _bias_read) = bias.map(|bias| bias.device_ptr(stream)).unzip();
    let args = RmsNormArgs {
        input,
        residual: DeviceAddr(at),
        residual_out: DeviceAddr(at),
        bias: bias.map(DeviceAddr),
        weight: DeviceAddr(weight),
        output,
        tokens,
        hidden,
        dtype: T::DTYPE,
        eps: scale.eps,
        weight_offset: scale.weight_offset,
    };
    // SAFETY: the caller vouches for the input and the output; for the others see `handle`, and all are as long as the
    // arguments say.
    unsafe { comm.all_reduce_rmsnorm(&args, handle) }
}

pub(super) fn two_group<C: DeviceComm + ?Sized, T: Element>(
    (comm, gather): (&C, &dyn DeviceComm),
    (hidden_states, residual): (&mut impl DevicePtrMut<T>, &mut impl DevicePtrMut<T>),
    (weight, bias): (&dyn DevicePtr<T>, Option<&dyn DevicePtr<T>>),
    rows: TwoGroupRows<'_>,
    scale: NormScale,
    stream: &CudaStream,
) -> Result<()> {
    let hidden = weight.len();
    let lens = (hidden_states.len(), residual.len());
    lengths::two_group((comm.info(), gather.info()), &rows, lens, bias.map(|bias| bias.len()), hidden)?;
    handle(gather, stream, [])?;
    let devices = [of(hidden_states), of(residual), of(weight)];
    let handle = handle(comm, stream, devices.into_iter().chain(bias.map(of)))?;
    let (hidden_states, _written) = hidden_states.device_ptr_mut(stream);
    let (residual, _updated) = residual.device_ptr_mut(stream);
    let (weight, _weight_read) = weight.device_ptr(stream);
    let (bias, _bias_read) = bias.map(|bias| bias.device_ptr(stream)).unzip();
    let args = TwoGroupNormArgs {
        hidden_states: DeviceAddr(hidden_states),
        residual: DeviceAddr(residual),
        bias: bias.map(DeviceAddr),
        weight: DeviceAddr(weight),
        ..rows.args(T::DTYPE, hidden, scale)
    };
    // SAFETY: see `handle`; the slices are borrowed, those that are written exclusively, and hold all the rows that the
    // arguments name.
    unsafe { comm.all_reduce_rmsnorm_two_group(gather, &args, handle) }
}
