//! A rank's memory for the calls of a plan: makes them, and has their results checked.

use std::sync::Arc;

use comm_core::{
    Block2d, DType, DeviceAddr, DeviceComm, F8E4M3, NormQuantScale, NormQuantization, P2pOp, ReduceOp,
    Result, RmsNormArgs, TwoGroupNormArgs, quantize,
};
use comm_kernels::pattern::{self, Expected, Pattern};
use comm_kernels::raw;
use cudarc::driver::sys;

use super::plan::{ARENA, Call, GROUP_ARENA, GROUP_CLASS, HIDDEN, NORM, Op, Plan, RESULTS, TYPES};
use crate::common::Rank;
use crate::data::{Judge, SUM, at, decode, encode, sums};

const EPS: f32 = 1e-5;

pub(super) struct Buffers {
    sends: [DeviceAddr; TYPES.len()],
    send_in_group: DeviceAddr,
    results: DeviceAddr,
    /// The norm's residual, which is zero, so that the new residual is the sum; and its weights.
    zeros: DeviceAddr,
    weights: [DeviceAddr; 3],
    /// Of some of the ranks where there are enough, in another order.
    pub(super) group: Arc<dyn DeviceComm>,
    color: usize,
}

impl Buffers {
    pub(super) fn new(rank: &Rank) -> Self {
        let zeros = rank.space(NORM * 4);
        rank.upload(zeros, &vec![0; NORM * 4]);
        let weights = std::array::from_fn(|class| {
            let weight = rank.space(HIDDEN * 4);
            rank.upload(weight, &encode(TYPES[class], (0..HIDDEN).map(|_| 1.0)));
            weight
        });
        let color = if rank.size < 4 { 0 } else { rank.rank % 2 };
        Self {
            sends: TYPES.map(|dtype| rank.space(ARENA * dtype.size())),
            send_in_group: rank.space(GROUP_ARENA * TYPES[GROUP_CLASS].size()),
            // The communicator's own, so that no algorithm is ruled out.
            results: rank.comm.allocate(RESULTS).unwrap(),
            zeros,
            weights,
            group: rank.comm.split(Some(color as u32), -(rank.rank as i32)).unwrap().unwrap(),
            color,
        }
    }

    fn group_data(&self, seed: usize) -> Pattern {
        sums(seed + ((1 + self.color) << 40), self.group.size())
    }

    fn send(&self, call: &Call) -> DeviceAddr {
        let arena = if matches!(call.op, Op::InGroup) { self.send_in_group } else { self.sends[call.class] };
        at(arena, call.first, call.dtype())
    }

    fn recv(&self, call: &Call) -> DeviceAddr {
        self.results.offset(call.recv as u64)
    }

    /// Of a norm, behind the new residual.
    fn normed(&self, call: &Call) -> DeviceAddr {
        at(self.recv(call), call.count, call.dtype())
    }

    fn fp8(&self, call: &Call, tokens: usize) -> NormQuantization {
        let (scales, elements) = call.scales_and_fp8(tokens);
        NormQuantization {
            output: self.results.offset(elements as u64),
            scale: NormQuantScale::PerToken(self.results.offset(scales as u64)),
            keep_unquantized: call.keeps(),
        }
    }

    fn issue(&self, rank: &Rank, call: &Call) -> Result<()> {
        let Call { op, class, count, .. } = *call;
        let (comm, dtype, stream, size) = (&rank.comm, call.dtype(), rank.stream(), rank.size);
        let (send, recv) = (self.send(call), self.recv(call));
        let (next, previous) = ((rank.rank + 1) % size, (rank.rank + size - 1) % size);
        let reduce = |send, recv, op| unsafe { comm.all_reduce(send, recv, count, dtype, op, stream) };
        unsafe {
            match op {
                Op::Sum => reduce(send, recv, ReduceOp::Sum),
                Op::SumInPlace => reduce(send, send, ReduceOp::Sum),
                Op::Max => reduce(send, recv, ReduceOp::Max),
                Op::Min => reduce(send, recv, ReduceOp::Min),
                Op::Prod => reduce(send, recv, ReduceOp::Prod),
                Op::Average => reduce(send, recv, ReduceOp::Avg),
                Op::Reduce(root) => comm.reduce(send, recv, count, dtype, ReduceOp::Sum, root, stream),
                Op::Gather => comm.all_gather(send, recv, count, dtype, stream),
                Op::GatherV => comm.all_gather_v(send, recv, &call.parts(size), dtype, stream),
                Op::Gather2d => comm.all_gather_2d(send, recv, &block(call, size), stream),
                Op::Scatter => comm.reduce_scatter(send, recv, count, dtype, ReduceOp::Sum, stream),
                Op::ScatterV => {
                    comm.reduce_scatter_v(send, recv, &call.parts(size), dtype, ReduceOp::Sum, stream)
                }
                Op::Broadcast(root) => comm.broadcast(send, recv, count, dtype, root, stream),
                Op::AllToAll => comm.all_to_all(send, recv, count, dtype, stream),
                Op::Barrier => comm.barrier(stream),
                Op::Quantized => comm.all_reduce_quantized(send, recv, count, dtype, stream),
                Op::InGroup => rank.reduce(&*self.group, (send, recv), count, dtype),
                Op::Ring => {
                    let ops = [
                        P2pOp::Send { addr: send, count, dtype, peer: next },
                        P2pOp::Recv { addr: recv, count, dtype, peer: previous },
                    ];
                    comm.group(&ops, stream)
                }
                Op::Norm(tokens, hidden) | Op::Fp8Norm(tokens, hidden) => {
                    let args = RmsNormArgs {
                        input: send,
                        residual: self.zeros,
                        residual_out: recv,
                        bias: None,
                        weight: self.weights[class],
                        output: self.normed(call),
                        tokens,
                        hidden,
                        dtype,
                        eps: EPS,
                        weight_offset: 0.0,
                    };
                    match op {
                        Op::Norm(..) => comm.all_reduce_rmsnorm(&args, stream),
                        _ => comm.all_reduce_rmsnorm_quantized(&args, &self.fp8(call, tokens), stream),
                    }
                }
                Op::TwoGroupNorm(hidden) => {
                    let rows = call.rows(size);
                    let own = rows[rank.rank] * hidden * dtype.size();
                    // Its residual is updated where it lies.
                    if own > 0 {
                        let code = sys::cuMemsetD8Async(recv.0, 0, own, raw::stream(stream));
                        raw::check("cuMemsetD8Async", code)?;
                    }
                    let args = TwoGroupNormArgs {
                        hidden_states: send,
                        residual: if own == 0 { DeviceAddr::NULL } else { recv },
                        bias: None,
                        weight: self.weights[class],
                        reduce_first_row: 0,
                        reduce_tokens: &rows,
                        gather_first_row: 0,
                        gather_tokens: &rows,
                        hidden,
                        dtype,
                        eps: EPS,
                        weight_offset: 0.0,
                    };
                    comm.all_reduce_rmsnorm_two_group(&**comm, &args, stream)
                }
            }
        }
    }

    /// Has the device check a call's result, as far as it can.
    fn check(&self, rank: &Rank, judge: &Judge, call: &Call, seed: usize, report: usize) -> Result<()> {
        let Call { op, count, first, .. } = *call;
        let (me, size, dtype, recv) = (rank.rank, rank.size, call.dtype(), self.recv(call));
        let data = sums(seed, size);
        let some = |skipped, count, expected, first| {
            let lane = (at(recv, skipped, dtype), count, dtype);
            judge.expect(rank, lane, &data, expected, first, report)
        };
        let all = |expected| some(0, count, expected, first);
        let sent = |from: usize, skipped| some(skipped, count, Expected::Sent(from), first);
        let before = |parts: &[usize], rank: usize| parts[..rank].iter().sum::<usize>();
        match op {
            Op::Sum | Op::Norm(..) | Op::Fp8Norm(..) => all(SUM),
            Op::SumInPlace => judge.expect(rank, (self.send(call), count, dtype), &data, SUM, first, report),
            Op::Max => all(Expected::Reduced(ReduceOp::Max)),
            Op::Min => all(Expected::Reduced(ReduceOp::Min)),
            Op::Prod => all(Expected::Reduced(ReduceOp::Prod)),
            Op::Average => all(Expected::Reduced(ReduceOp::Avg)),
            Op::Reduce(root) if root == me => all(SUM),
            Op::InGroup => {
                judge.expect(rank, (recv, count, dtype), &self.group_data(seed), SUM, first, report)
            }
            Op::Scatter => some(0, count, SUM, first + me * count),
            Op::ScatterV => {
                let parts = call.parts(size);
                some(0, parts[me], SUM, first + before(&parts, me))
            }
            Op::TwoGroupNorm(hidden) => {
                let rows = call.rows(size);
                some(0, rows[me] * hidden, SUM, first + before(&rows, me) * hidden)
            }
            Op::Broadcast(root) => sent(root, 0),
            Op::Ring => sent((me + size - 1) % size, 0),
            Op::Gather => (0..size).try_for_each(|from| sent(from, from * count)),
            Op::GatherV => {
                let parts = call.parts(size);
                (0..size)
                    .try_for_each(|from| some(before(&parts, from), parts[from], Expected::Sent(from), first))
            }
            Op::Gather2d => {
                let pieces = (0..size).flat_map(|from| (0..call.height()).map(move |row| (from, row)));
                pieces.into_iter().try_for_each(|(from, row)| {
                    some((row * size + from) * count, count, Expected::Sent(from), first + row * count)
                })
            }
            Op::AllToAll => (0..size)
                .try_for_each(|from| some(from * count, count, Expected::Sent(from), first + me * count)),
            Op::Reduce(_) | Op::Quantized | Op::Barrier => Ok(()),
        }
    }

    /// New data, the calls one behind the other, and then all checks.
    pub(super) fn run(&self, rank: &Rank, judge: &Judge, plan: &Plan, seed: usize) -> Result<()> {
        let data = sums(seed, rank.size);
        for ((&send, dtype), used) in self.sends.iter().zip(TYPES).zip(plan.used) {
            judge.fill(rank, (send, used, dtype), &data, rank.rank, 0)?;
        }
        let in_group = (self.send_in_group, plan.used_in_group, TYPES[GROUP_CLASS]);
        judge.fill(rank, in_group, &self.group_data(seed), self.group.rank(), 0)?;
        judge.poison(rank, self.results, plan.results)?;
        plan.calls.iter().try_for_each(|call| self.issue(rank, call))?;
        (plan.calls.iter().enumerate())
            .try_for_each(|(number, call)| self.check(rank, judge, call, seed, number << 32))
    }

    /// Checks what takes the host to check, of the plan that ran last. Waits for the stream.
    pub(super) fn check_on_host(&self, rank: &Rank, plan: &Plan, seed: usize) {
        let data = sums(seed, rank.size);
        for (number, call) in plan.calls.iter().enumerate() {
            let right = match call.op {
                // Of moderate size: what the host takes for it is resident memory, which must not grow.
                Op::Quantized if call.count <= 1 << 14 => self.quantized_is_right(rank, call, &data),
                Op::Fp8Norm(tokens, hidden) if call.keeps() => {
                    self.fp8_is_right(rank, call, (tokens, hidden))
                }
                Op::TwoGroupNorm(hidden) => {
                    let dtype = call.dtype();
                    let normed = decode(dtype, &rank.download(self.send(call), call.count * dtype.size()));
                    rows_are_right(&normed, &summed(call, &data, rank.size), hidden)
                }
                _ => true,
            };
            assert!(right, "call {number} of seed {seed}, rank {} of {}: {call:?}", rank.rank, rank.size);
        }
    }

    fn quantized_is_right(&self, rank: &Rank, call: &Call, data: &Pattern) -> bool {
        let inputs: Vec<_> = (0..rank.size).map(|who| sent(call, data, who)).collect();
        let sources: Vec<_> = inputs.iter().map(Vec::as_ptr).collect();
        let mut wanted = vec![0; inputs[0].len()];
        unsafe { quantize::sum_host(wanted.as_mut_ptr(), &sources, call.count, call.dtype()).unwrap() };
        rank.download(self.recv(call), wanted.len()) == wanted
    }

    /// By definition the fp8 result is what the unquantised one says, to the last bit.
    fn fp8_is_right(&self, rank: &Rank, call: &Call, (tokens, hidden): (usize, usize)) -> bool {
        let (dtype, fp8) = (call.dtype(), self.fp8(call, tokens));
        let normed = decode(dtype, &rank.download(self.normed(call), call.count * dtype.size()));
        let elements = rank.download(fp8.output, call.count);
        let scales = decode(DType::F32, &rank.download(fp8.scale.addr(), tokens * 4));
        let mut rows = normed.chunks(hidden).zip(elements.chunks(hidden)).zip(scales);
        rows.all(|((normed, elements), found)| {
            let (scale, inverse) = quantize::scale(quantize::amax(normed));
            let right = |(&x, &q): (&f32, &u8)| quantize::to_e4m3(x * inverse) == F8E4M3::from_bits(q);
            scale.to_bits() == found.to_bits() && normed.iter().zip(elements).all(right)
        })
    }
}

/// Row by row, the ranks' blocks side by side.
fn block(call: &Call, size: usize) -> Block2d {
    Block2d {
        height: call.height(),
        width: call.count,
        row_pitch: call.count * size,
        rank_stride: call.count,
        send_pitch: call.count,
        dtype: call.dtype(),
        first: true,
        last: true,
    }
}

/// What a rank sends in a call, on the host.
fn sent(call: &Call, data: &Pattern, who: usize) -> Vec<u8> {
    let mut bytes = vec![0; call.count * call.dtype().size()];
    pattern::fill(&mut bytes, call.dtype(), data, who, call.first as u64).unwrap();
    bytes
}

/// The sums of that, which every type holds.
fn summed(call: &Call, data: &Pattern, size: usize) -> Vec<f64> {
    let mut sums = vec![0.0; call.count];
    for who in 0..size {
        let sent = decode(call.dtype(), &sent(call, data, who));
        sums.iter_mut().zip(sent).for_each(|(sum, x)| *sum += f64::from(x));
    }
    sums
}

/// Rows of a norm, close to those of the sums in higher precision.
fn rows_are_right(normed: &[f32], sums: &[f64], hidden: usize) -> bool {
    normed.chunks(hidden).zip(sums.chunks(hidden)).all(|(normed, sums)| {
        let square = sums.iter().map(|sum| sum * sum).sum::<f64>() / hidden as f64;
        let factor = 1.0 / (square + f64::from(EPS)).sqrt();
        // Which no NaN is.
        let is_close = |(&found, &sum): (&f32, &f64)| {
            let right = sum * factor;
            (f64::from(found) - right).abs() <= 1e-2 + 2e-2 * right.abs()
        };
        normed.iter().zip(sums).all(is_close)
    })
}
