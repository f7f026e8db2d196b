//! The operations on cudarc's slices that have more operands than two.

use cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut, SyncOnDrop};

use super::cuda_call::{apart, enqueue, handle, in_place, of};
use super::{Fp8Bits, NormScale, TwoGroupRows, lengths};
use crate::addr::{DeviceAddr, StreamHandle};
use crate::device_comm::{DeviceComm, P2pOp};
use crate::dtype::Element;
use crate::error::Result;
use crate::fused::{NormQuantScale, NormQuantization, RmsNormArgs, TwoGroupNormArgs};

/// One transfer of [`CudaSliceExt::group_cuda`](crate::CudaSliceExt::group_cuda).
pub enum CudaTransfer<'a, T> {
    /// Send the slice to the rank, which receives as many elements. This rank itself is allowed.
    Send(&'a dyn DevicePtr<T>, usize),
    /// Receive as many elements from the rank as the slice holds. This rank itself is allowed.
    Recv(&'a mut dyn DevicePtrMut<T>, usize),
}

/// The fp8 result of [`all_reduce_rmsnorm_quantized_cuda`](crate::CudaSliceExt::all_reduce_rmsnorm_quantized_cuda) and
/// its siblings; see [`NormQuantization`].
pub struct CudaNormQuantization<'a, Q> {
    /// `[tokens, hidden]`, written; in the two-group form `[rows, hidden]`, with the rows of `hidden_states`.
    pub output: &'a mut dyn DevicePtrMut<Q>,
    /// Where the scale is, or goes.
    pub scale: CudaQuantScale<'a>,
    /// Whether the unquantised result is wanted too. If not, what would hold it is scratch memory, undefined afterwards.
    pub keep_unquantized: bool,
}

/// The scale of a norm's fp8 result on cudarc's slices.
pub enum CudaQuantScale<'a> {
    /// One for all, read: finite, positive, and equal on all ranks.
    PerTensor(&'a dyn DevicePtr<f32>),
    /// One for each row of the fp8 result, written.
    PerToken(&'a mut dyn DevicePtrMut<f32>),
}

/// Weight and bias.
type Parameters<'a, T> = (&'a dyn DevicePtr<T>, Option<&'a dyn DevicePtr<T>>);

pub(super) fn send<C: DeviceComm + ?Sized, T: Element>(
    comm: &C,
    data: &impl DevicePtr<T>,
    peer: usize,
    stream: &CudaStream,
    on: StreamHandle,
) -> Result<()> {
    let (at, _read) = data.device_ptr(stream);
    // SAFETY: this is called by `enqueue`; the range holds as many elements.
    unsafe { comm.send(DeviceAddr(at), data.len(), T::DTYPE, peer, on) }
}

pub(super) fn group<C: DeviceComm + ?Sized, T: Element>(
    comm: &C,
    transfers: &mut [CudaTransfer<'_, T>],
    stream: &CudaStream,
) -> Result<()> {
    let device = |transfer: &CudaTransfer<'_, T>| match transfer {
        CudaTransfer::Send(data, _) => of(*data),
        CudaTransfer::Recv(data, _) => of(&**data),
    };
    let devices: Vec<usize> = transfers.iter().map(device).collect();
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
    enqueue(comm, stream, devices, |on| {
        let (ops, _guards): (Vec<P2pOp>, Vec<SyncOnDrop<'_>>) = transfers.iter_mut().map(op).unzip();
        // SAFETY: see `enqueue`; every slice is borrowed, those that are written exclusively, and the guards are dropped
        // after the work is enqueued.
        unsafe { comm.group(&ops, on) }
    })
}

/// Within an [`enqueue`]d call, has `run` enqueue a norm whose operands are `data` (the input, the output, and the elements
/// of each) and the slices.
fn norm<C: DeviceComm + ?Sized, T: Element>(
    comm: &C,
    (input, output, count): (DeviceAddr, DeviceAddr, usize),
    residual: &mut impl DevicePtrMut<T>,
    (weight, bias): Parameters<'_, T>,
    scale: NormScale,
    stream: &CudaStream,
    run: impl FnOnce(&RmsNormArgs) -> Result<()>,
) -> Result<()> {
    let hidden = weight.len();
    let tokens = lengths::norm_tokens((count, residual.len(), count), bias.map(|bias| bias.len()), hidden)?;
    handle(comm, stream, [of(residual), of(weight)].into_iter().chain(bias.map(of)))?;
    let (at, _updated) = residual.device_ptr_mut(stream);
    let (weight, _weight_read) = weight.device_ptr(stream);
    let (bias, _bias_read) = bias.map(|bias| bias.device_ptr(stream)).unzip();
    run(&RmsNormArgs {
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
    })
}

/// Within an [`enqueue`]d call, has `run` enqueue what has this fp8 result, of that many rows.
fn quantized<C: DeviceComm + ?Sized, Q: Fp8Bits>(
    comm: &C,
    CudaNormQuantization { output, scale, keep_unquantized }: CudaNormQuantization<'_, Q>,
    (rows, hidden): (usize, usize),
    stream: &CudaStream,
    run: impl FnOnce(&NormQuantization) -> Result<()>,
) -> Result<()> {
    let (scales, of_scales) = match &scale {
        CudaQuantScale::PerTensor(scale) => ((scale.len(), false), of(*scale)),
        CudaQuantScale::PerToken(scales) => ((scales.len(), true), of(&**scales)),
    };
    lengths::quantized((rows, hidden), output.len(), scales)?;
    handle(comm, stream, [of(&*output), of_scales])?;
    let (at, _written) = output.device_ptr_mut(stream);
    let (scale, _used) = match scale {
        CudaQuantScale::PerTensor(scale) => {
            let (at, read) = scale.device_ptr(stream);
            (NormQuantScale::PerTensor(DeviceAddr(at)), read)
        }
        CudaQuantScale::PerToken(scales) => {
            let (at, written) = scales.device_ptr_mut(stream);
            (NormQuantScale::PerToken(DeviceAddr(at)), written)
        }
    };
    run(&NormQuantization { output: DeviceAddr(at), scale, keep_unquantized })
}

pub(super) fn norm_apart<C: DeviceComm + ?Sized, T: Element>(
    comm: &C,
    (input, output): (&impl DevicePtr<T>, &mut impl DevicePtrMut<T>),
    residual: &mut impl DevicePtrMut<T>,
    parameters: Parameters<'_, T>,
    scale: NormScale,
    stream: &CudaStream,
) -> Result<()> {
    let count = input.len();
    lengths::exact("output", output.len(), count)?;
    apart(comm, input, output, stream, |from, to, on| {
        norm(comm, (from, to, count), residual, parameters, scale, stream, |args| {
            // SAFETY: see `apart`; every slice is borrowed, those that are written exclusively, and as long as `args` says.
            unsafe { comm.all_reduce_rmsnorm(args, on) }
        })
    })
}

pub(super) fn norm_in_place<C: DeviceComm + ?Sized, T: Element>(
    comm: &C,
    data: &mut impl DevicePtrMut<T>,
    residual: &mut impl DevicePtrMut<T>,
    parameters: Parameters<'_, T>,
    scale: NormScale,
    stream: &CudaStream,
) -> Result<()> {
    let count = data.len();
    in_place(comm, data, stream, |at, on| {
        norm(comm, (at, at, count), residual, parameters, scale, stream, |args| {
            // SAFETY: see `in_place`, and as above.
            unsafe { comm.all_reduce_rmsnorm(args, on) }
        })
    })
}

pub(super) fn norm_quantized_apart<C: DeviceComm + ?Sized, T: Element, Q: Fp8Bits>(
    comm: &C,
    (input, output): (&impl DevicePtr<T>, &mut impl DevicePtrMut<T>),
    residual: &mut impl DevicePtrMut<T>,
    parameters: Parameters<'_, T>,
    result: CudaNormQuantization<'_, Q>,
    scale: NormScale,
    stream: &CudaStream,
) -> Result<()> {
    let count = input.len();
    lengths::exact("output", output.len(), count)?;
    apart(comm, input, output, stream, |from, to, on| {
        norm(comm, (from, to, count), residual, parameters, scale, stream, |args| {
            quantized(comm, result, (args.tokens, args.hidden), stream, |quantized| {
                // SAFETY: see `apart`, and as above.
                unsafe { comm.all_reduce_rmsnorm_quantized(args, quantized, on) }
            })
        })
    })
}

pub(super) fn norm_quantized_in_place<C: DeviceComm + ?Sized, T: Element, Q: Fp8Bits>(
    comm: &C,
    data: &mut impl DevicePtrMut<T>,
    residual: &mut impl DevicePtrMut<T>,
    parameters: Parameters<'_, T>,
    result: CudaNormQuantization<'_, Q>,
    scale: NormScale,
    stream: &CudaStream,
) -> Result<()> {
    let count = data.len();
    in_place(comm, data, stream, |at, on| {
        norm(comm, (at, at, count), residual, parameters, scale, stream, |args| {
            quantized(comm, result, (args.tokens, args.hidden), stream, |quantized| {
                // SAFETY: see `in_place`, and as above.
                unsafe { comm.all_reduce_rmsnorm_quantized(args, quantized, on) }
            })
        })
    })
}

pub(super) fn two_group<C: DeviceComm + ?Sized, T: Element>(
    (comm, gather): (&C, &dyn DeviceComm),
    (hidden_states, residual): (&mut impl DevicePtrMut<T>, &mut impl DevicePtrMut<T>),
    (weight, bias): Parameters<'_, T>,
    rows: TwoGroupRows<'_>,
    scale: NormScale,
    stream: &CudaStream,
    run: impl FnOnce(&TwoGroupNormArgs<'_>, StreamHandle) -> Result<()>,
) -> Result<()> {
    let hidden = weight.len();
    let lens = (hidden_states.len(), residual.len());
    lengths::two_group((comm.info(), gather.info()), &rows, lens, bias.map(|bias| bias.len()), hidden)?;
    let devices = [of(hidden_states), of(residual), of(weight)].into_iter().chain(bias.map(of));
    // Both groups' calls are on the stream, and either's backend may look back at it.
    enqueue(gather, stream, [], |_| {
        enqueue(comm, stream, devices, |on| {
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
            run(&args, on)
        })
    })
}

pub(super) fn two_group_in_place<C: DeviceComm + ?Sized, T: Element>(
    (comm, gather): (&C, &dyn DeviceComm),
    data: (&mut impl DevicePtrMut<T>, &mut impl DevicePtrMut<T>),
    parameters: Parameters<'_, T>,
    rows: TwoGroupRows<'_>,
    scale: NormScale,
    stream: &CudaStream,
) -> Result<()> {
    two_group((comm, gather), data, parameters, rows, scale, stream, |args, on| {
        // SAFETY: see `enqueue`; the slices are borrowed, those that are written exclusively, and hold all the rows that
        // the arguments name.
        unsafe { comm.all_reduce_rmsnorm_two_group(gather, args, on) }
    })
}

pub(super) fn two_group_quantized_in_place<C: DeviceComm + ?Sized, T: Element, Q: Fp8Bits>(
    (comm, gather): (&C, &dyn DeviceComm),
    data: (&mut impl DevicePtrMut<T>, &mut impl DevicePtrMut<T>),
    parameters: Parameters<'_, T>,
    (result, rows): (CudaNormQuantization<'_, Q>, TwoGroupRows<'_>),
    scale: NormScale,
    stream: &CudaStream,
) -> Result<()> {
    let elements = data.0.len();
    two_group((comm, gather), data, parameters, rows, scale, stream, |args, on| {
        let all_rows = (elements.checked_div(args.hidden).unwrap_or(0), args.hidden);
        quantized(comm, result, all_rows, stream, |quantized| {
            // SAFETY: as above; the fp8 result and its scales have a row for each whole one of `hidden_states`.
            unsafe { comm.all_reduce_rmsnorm_two_group_quantized(gather, args, quantized, on) }
        })
    })
}
