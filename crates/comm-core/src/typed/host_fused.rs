//! The operations on host slices that have more operands than two.

use super::{NormScale, TwoGroupRows, lengths};
use crate::addr::{DeviceAddr, StreamHandle};
use crate::device_comm::{DeviceComm, P2pOp};
use crate::dtype::Element;
use crate::error::Result;
use crate::fused::{RmsNormArgs, TwoGroupNormArgs};

/// One transfer of [`HostSliceExt::group_slices`](crate::HostSliceExt::group_slices).
#[derive(Debug)]
pub enum HostTransfer<'a, T> {
    /// Send the slice to the rank, which receives as many elements. This rank itself is allowed.
    Send(&'a [T], usize),
    /// Receive as many elements from the rank as the slice holds. This rank itself is allowed.
    Recv(&'a mut [T], usize),
}

pub(super) fn group<C: DeviceComm + ?Sized, T: Element>(
    comm: &C,
    transfers: &mut [HostTransfer<'_, T>],
) -> Result<()> {
    let dtype = T::DTYPE;
    let op = |transfer: &mut HostTransfer<'_, T>| match transfer {
        HostTransfer::Send(data, peer) => {
            P2pOp::Send { addr: DeviceAddr::of_slice(data), count: data.len(), dtype, peer: *peer }
        }
        HostTransfer::Recv(data, peer) => {
            P2pOp::Recv { addr: DeviceAddr::of_slice_mut(data), count: data.len(), dtype, peer: *peer }
        }
    };
    let ops: Vec<P2pOp> = transfers.iter_mut().map(op).collect();
    // SAFETY: every slice is borrowed for the call, which completes before it returns, and those that are written are
    // borrowed exclusively.
    unsafe { comm.group(&ops, StreamHandle::NULL) }
}

/// # Safety
/// `input` and its length name a readable range, and `output` a writable one of that length, which is the same or apart
/// from it, for the length of the call; neither overlaps the slices.
pub(super) unsafe fn norm<C: DeviceComm + ?Sized, T: Element>(
    comm: &C,
    (input, count): (DeviceAddr, usize),
    output: DeviceAddr,
    residual: &mut [T],
    (weight, bias): (&[T], Option<&[T]>),
    scale: NormScale,
) -> Result<()> {
    let hidden = weight.len();
    let tokens = lengths::norm_tokens((count, residual.len(), count), bias.map(<[T]>::len), hidden)?;
    let at = DeviceAddr::of_slice_mut(residual);
    let args = RmsNormArgs {
        input,
        residual: at,
        residual_out: at,
        bias: bias.map(DeviceAddr::of_slice),
        weight: DeviceAddr::of_slice(weight),
        output,
        tokens,
        hidden,
        dtype: T::DTYPE,
        eps: scale.eps,
        weight_offset: scale.weight_offset,
    };
    // SAFETY: the caller vouches for the input and the output; the others are borrowed for the call, the residual
    // exclusively, and all are as long as the arguments say.
    unsafe { comm.all_reduce_rmsnorm(&args, StreamHandle::NULL) }
}

pub(super) fn two_group<C: DeviceComm + ?Sized, T: Element>(
    (comm, gather): (&C, &dyn DeviceComm),
    (hidden_states, residual): (&mut [T], &mut [T]),
    (weight, bias): (&[T], Option<&[T]>),
    rows: TwoGroupRows<'_>,
    scale: NormScale,
) -> Result<()> {
    let hidden = weight.len();
    let lens = (hidden_states.len(), residual.len());
    lengths::two_group((comm.info(), gather.info()), &rows, lens, bias.map(<[T]>::len), hidden)?;
    let args = TwoGroupNormArgs {
        hidden_states: DeviceAddr::of_slice_mut(hidden_states),
        residual: DeviceAddr::of_slice_mut(residual),
        bias: bias.map(DeviceAddr::of_slice),
        weight: DeviceAddr::of_slice(weight),
        ..rows.args(T::DTYPE, hidden, scale)
    };
    // SAFETY: the slices are borrowed for the call, those that are written exclusively, and hold all the rows that the
    // arguments name.
    unsafe { comm.all_reduce_rmsnorm_two_group(gather, &args, StreamHandle::NULL) }
}
