//! The fused norms: made of the other collectives, but compared between ranks, and named in errors, as what they are.

use std::cell::RefCell;
use std::collections::VecDeque;

use super::all_reduce::Reduction;
use super::call::Call;
use super::core::Op;
use super::gather::Gather;
use super::layout::Layout;
use super::scatter::Scatter;
use super::usage::Algorithm;
use crate::addr::{DeviceAddr, StreamHandle};
use crate::compose;
use crate::device_comm::DeviceComm;
use crate::dtype::ReduceOp;
use crate::error::Result;
use crate::fused::{NormQuantScale, NormQuantization, RmsNormArgs, TwoGroupNormArgs};
use crate::norm::{rmsnorm_host, rmsnorm_host_quantized};
use crate::op::OpKind;

/// From here on each rank normalises its share of the rows and gathers the others': the rows' arithmetic costs more than
/// moving them and the two steps that this takes.
const SHARED: usize = 64 << 10;

/// The fused norm of checked arguments, which describe `count` elements.
///
/// # Safety
/// The operands are valid as the operation's contract says.
pub(super) unsafe fn fused(
    op: &mut Op<'_>,
    args: &RmsNormArgs,
    quantized: Option<&NormQuantization>,
    count: usize,
) -> Result<()> {
    let RmsNormArgs { input, residual, residual_out, output, tokens, hidden, dtype, .. } = *args;
    let how = ReduceOp::Sum;
    let kind = match quantized {
        Some(_) => OpKind::AllReduceRmsNormQuantized,
        None => OpKind::AllReduceRmsNorm,
    };
    let shape = [tokens, hidden].into_iter().chain(numbers(args.eps, args.weight_offset, args.bias));
    let call = Call::of(kind, count, dtype).shaped(shape.chain(results(quantized)));
    op.core.usage.count(kind, Algorithm::Composed);
    let (bytes, size, me) = (count * dtype.size(), op.size(), op.rank());
    if bytes < SHARED || tokens < size {
        let (send, recv) = ((input, bytes), (output, bytes));
        // SAFETY: as the caller vouches; `output` may be `input`, which is in place.
        return unsafe {
            Reduction { call, send, recv, bytes, dtype, how, root: None }.run(op)?;
            local_norm(&RmsNormArgs { input: output, ..*args }, quantized.copied())
        };
    }
    let row = hidden * dtype.size();
    let rows = |rank: usize| tokens / size + usize::from(rank < tokens % size);
    let lens: Vec<usize> = (0..size).map(|rank| rows(rank) * row).collect();
    let offsets: Vec<usize> = (0..size).map(|rank| lens[..rank].iter().sum()).collect();
    let first = offsets[me] / row;
    let own = |base: DeviceAddr| base.offset(offsets[me] as u64);
    // Where `output` is `input`, its own part of it is where an in-place reduce-scatter wants it; elsewhere it is disjoint.
    let recv = own(output).0 as usize;
    let combine = Some((dtype, how));
    let scatter = Scatter { call, send: (input, bytes), recv, offsets: &offsets, lens: &lens, combine };
    let share = RmsNormArgs {
        input: own(output),
        residual: own(residual),
        residual_out: own(residual_out),
        output: own(output),
        tokens: rows(me),
        ..*args
    };
    // SAFETY: as the caller vouches; until the gathers below every rank writes its own rows alone.
    unsafe {
        scatter.run(op)?;
        local_norm(&share, quantized.map(|quantized| quantized.from_row(first, hidden)))?;
    }
    // What was written, and the bytes of a row of it.
    let mut written = vec![(residual_out, row)];
    if quantized.is_none_or(|quantized| quantized.keep_unquantized) {
        written.push((output, row));
    }
    if let Some(quantized) = quantized {
        written.push((quantized.output, hidden));
        if let NormQuantScale::PerToken(scales) = quantized.scale {
            written.push((scales, size_of::<f32>()));
        }
    }
    for (whole, width) in written {
        let lens: Vec<usize> = (0..size).map(|rank| rows(rank) * width).collect();
        let to = |rank: usize| Layout::dense(whole.0 as usize + offsets[rank] / row * width);
        let own = whole.offset((first * width) as u64);
        let gather =
            Gather { call, send: (own, lens[me]), from: to(me), pitch: 0, width: 0, lens: &lens, to: &to };
        // SAFETY: as above, in place. All ranks have read their peers' `input` before any enters here, so `output` may be
        // `input`.
        unsafe { gather.run(op)? };
    }
    Ok(())
}

/// What remains of a norm where the sums are known.
///
/// # Safety
/// As [`rmsnorm_host`] and [`rmsnorm_host_quantized`].
unsafe fn local_norm(args: &RmsNormArgs, quantized: Option<NormQuantization>) -> Result<()> {
    // SAFETY: as the caller vouches.
    unsafe {
        match quantized {
            Some(quantized) => rmsnorm_host_quantized(args, &quantized),
            None => rmsnorm_host(args),
        }
    }
}

/// Which results a norm has.
fn results(quantized: Option<&NormQuantization>) -> impl Iterator<Item = usize> {
    let numbers = quantized.map(|quantized| {
        [usize::from(quantized.keep_unquantized), usize::from(quantized.scale.is_per_token())]
    });
    numbers.into_iter().flatten()
}

/// What makes two norms of one shape different.
fn numbers(eps: f32, weight_offset: f32, bias: Option<DeviceAddr>) -> [usize; 3] {
    [eps.to_bits() as usize, weight_offset.to_bits() as usize, usize::from(bias.is_some())]
}

thread_local! {
    /// What the next operations that this thread begins are parts of. The gather group is known as a [`DeviceComm`]
    /// only, whose operations have no argument for this.
    static PARTS: RefCell<VecDeque<Call>> = const { RefCell::new(VecDeque::new()) };
}

/// The operation that the one which this thread begins is a part of, if it is.
pub(super) fn part() -> Option<Call> {
    PARTS.with_borrow_mut(VecDeque::pop_front)
}

/// Lets the operations that `work` begins be parts of `calls`, in turn.
fn parts_of<T>(calls: impl IntoIterator<Item = Call>, work: impl FnOnce() -> T) -> T {
    struct Cleared;
    impl Drop for Cleared {
        fn drop(&mut self) {
            PARTS.with_borrow_mut(VecDeque::clear);
        }
    }
    PARTS.with_borrow_mut(|parts| *parts = calls.into_iter().collect());
    let _cleared = Cleared;
    work()
}

/// The two-group norm of checked arguments. `checked` compares the calls in the gather group too before anything is
/// written.
///
/// # Safety
/// The operands are valid as the operation's contract says.
pub(super) unsafe fn two_group(
    reduce: &dyn DeviceComm,
    checked: bool,
    gather: &dyn DeviceComm,
    args: &TwoGroupNormArgs<'_>,
    quantized: Option<&NormQuantization>,
    stream: StreamHandle,
) -> Result<()> {
    let TwoGroupNormArgs { hidden, dtype, .. } = *args;
    let kind = match quantized {
        Some(_) => OpKind::AllReduceRmsNormTwoGroupQuantized,
        None => OpKind::AllReduceRmsNormTwoGroup,
    };
    // The ranks of a group know the tokens of that group alone.
    let call = |tokens: &[usize]| {
        let shape = [hidden].into_iter().chain(numbers(args.eps, args.weight_offset, args.bias));
        let rows: usize = tokens.iter().sum();
        Call::of(kind, rows * hidden, dtype)
            .shaped(shape.chain(results(quantized)).chain(tokens.iter().copied()))
    };
    let (reduced, gathered) = (call(args.reduce_tokens), call(args.gather_tokens));
    if checked {
        // SAFETY: a barrier on host memory needs no stream.
        parts_of([gathered], || unsafe { gather.barrier(stream) })?;
    }
    // What is gathered: the result, or the fp8 result, perhaps its scales, perhaps the unquantised result too.
    let gathers = quantized.map_or(1, |quantized| {
        1 + usize::from(quantized.scale.is_per_token()) + usize::from(quantized.keep_unquantized)
    });
    let calls = std::iter::once(reduced).chain(std::iter::repeat_n(gathered, gathers));
    // SAFETY: as the caller vouches; the rows that the norm is given are this rank's own, and no other rank uses them
    // between the two operations.
    parts_of(calls, || unsafe {
        match quantized {
            None => compose::two_group_norm(reduce, gather, args, stream, |args| rmsnorm_host(args)),
            Some(quantized) => {
                let local = |args: &RmsNormArgs, rows: &NormQuantization| rmsnorm_host_quantized(args, rows);
                compose::two_group_norm_quantized(reduce, gather, args, quantized, stream, local)
            }
        }
    })
}
