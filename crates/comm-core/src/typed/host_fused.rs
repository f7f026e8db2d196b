//! The operations on host slices that have more operands than two.

use super::{Fp8Bits, NormScale, TwoGroupRows, lengths};
use crate::addr::{DeviceAddr, StreamHandle};
use crate::device_comm::{DeviceComm, P2pOp};
use crate::dtype::Element;
use crate::error::Result;
use crate::fused::{NormQuantScale, NormQuantization, RmsNormArgs, TwoGroupNormArgs};

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

/// The fp8 result of [`all_reduce_rmsnorm_quantized_slice`](crate::HostSliceExt::all_reduce_rmsnorm_quantized_slice) and
/// its siblings; see [`NormQuantization`].
#[derive(Debug)]
pub struct HostNormQuantization<'a, Q> {
    /// `[tokens, hidden]`, written; in the two-group form `[rows, hidden]`, with the rows of `hidden_states`.
    pub output: &'a mut [Q],
    /// Where the scale is, or goes.
    pub scale: HostQuantScale<'a>,
    /// Whether the unquantised result is wanted too. If not, what would hold it is scratch memory, undefined afterwards.
    pub keep_unquantized: bool,
}

/// The scale of a norm's fp8 result on host slices.
#[derive(Debug)]
pub enum HostQuantScale<'a> {
    /// One for all, read: finite, positive, and equal on all ranks.
    PerTensor(&'a f32),
    /// One for each row of the fp8 result, written.
    PerToken(&'a mut [f32]),
}

impl<Q: Fp8Bits> HostNormQuantization<'_, Q> {
    /// The operands of an fp8 result of that many rows.
    pub(super) fn of(&mut self, (rows, hidden): (usize, usize)) -> Result<NormQuantization> {
        let (scale, scales) = match &mut self.scale {
            HostQuantScale::PerTensor(scale) => {
                (NormQuantScale::PerTensor(DeviceAddr::of_slice(std::slice::from_ref(*scale))), (1, false))
            }
            HostQuantScale::PerToken(scales) => {
                (NormQuantScale::PerToken(DeviceAddr::of_slice_mut(scales)), (scales.len(), true))
            }
        };
        lengths::quantized((rows, hidden), self.output.len(), scales)?;
        let output = DeviceAddr::of_slice_mut(self.output);
        Ok(NormQuantization { output, scale, keep_unquantized: self.keep_unquantized })
    }
}

/// Has `run` carry out a norm whose operands are `data` (the input, the output, and the elements of each) and the slices.
pub(super) fn norm<T: Element>(
    (input, output, count): (DeviceAddr, DeviceAddr, usize),
    residual: &mut [T],
    (weight, bias): (&[T], Option<&[T]>),
    scale: NormScale,
    run: impl FnOnce(&RmsNormArgs) -> Result<()>,
) -> Result<()> {
    let hidden = weight.len();
    let tokens = lengths::norm_tokens((count, residual.len(), count), bias.map(<[T]>::len), hidden)?;
    let at = DeviceAddr::of_slice_mut(residual);
    run(&RmsNormArgs {
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
    })
}

/// As [`norm`], with an fp8 result.
pub(super) fn norm_quantized<T: Element, Q: Fp8Bits>(
    data: (DeviceAddr, DeviceAddr, usize),
    residual: &mut [T],
    parameters: (&[T], Option<&[T]>),
    mut quantized: HostNormQuantization<'_, Q>,
    scale: NormScale,
    run: impl FnOnce(&RmsNormArgs, &NormQuantization) -> Result<()>,
) -> Result<()> {
    norm(data, residual, parameters, scale, |args| run(args, &quantized.of((args.tokens, args.hidden))?))
}

/// Has `run` carry out a two-group norm on the slices.
pub(super) fn two_group<C: DeviceComm + ?Sized, T: Element>(
    (comm, gather): (&C, &dyn DeviceComm),
    (hidden_states, residual): (&mut [T], &mut [T]),
    (weight, bias): (&[T], Option<&[T]>),
    rows: TwoGroupRows<'_>,
    scale: NormScale,
    run: impl FnOnce(&TwoGroupNormArgs<'_>) -> Result<()>,
) -> Result<()> {
    let hidden = weight.len();
    let lens = (hidden_states.len(), residual.len());
    lengths::two_group((comm.info(), gather.info()), &rows, lens, bias.map(<[T]>::len), hidden)?;
    run(&TwoGroupNormArgs {
        hidden_states: DeviceAddr::of_slice_mut(hidden_states),
        residual: DeviceAddr::of_slice_mut(residual),
        bias: bias.map(DeviceAddr::of_slice),
        weight: DeviceAddr::of_slice(weight),
        ..rows.args(T::DTYPE, hidden, scale)
    })
}
