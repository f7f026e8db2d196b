//! What a rank may be waiting in: every operation by every algorithm that it has, at sizes that bring out its kernels.

use comm_core::{
    Block2d, DType, DeviceAddr, NormQuantScale, NormQuantization, OpKind, P2pOp, ReduceOp, Result,
    RmsNormArgs, TwoGroupNormArgs,
};

use crate::common::Rank;

/// Scratch memory that is quickly made; several rounds for what is not small.
pub(crate) const SMALL: [(&str, &str); 6] = [
    ("p2p.packet_slots", "4096"),
    ("p2p.lamport_slots", "4096"),
    ("p2p.line_slots", "512"),
    ("p2p.staging_bytes", "1048576"),
    ("p2p.cell_ctas", "4"),
    ("p2p.pair_bytes", "65536"),
];

/// Elements of a rank, in one round and in several.
const FEW: usize = 1000;
const MANY: usize = 40_000;
/// In several tiles of steps, and more than half the staging memory.
const MOST: usize = 300_000;
/// Of the norms.
const HIDDEN: usize = 1024;
const TOKENS: usize = 4;

#[derive(Clone, Copy, Debug)]
pub(crate) enum Op {
    AllReduce(ReduceOp),
    Quantized,
    Reduce,
    AllGather,
    AllGatherV,
    AllGather2d,
    ReduceScatter(ReduceOp),
    ReduceScatterV(ReduceOp),
    Broadcast,
    AllToAll,
    /// From all ranks to the last, and back.
    Send,
    Recv,
    Group,
    Barrier,
    Norm,
    Fp8Norm,
    TwoGroupNorm,
    TwoGroupFp8Norm,
}

/// One way to wait.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Case {
    pub(crate) op: Op,
    /// Forced, where there is a choice.
    pub(crate) forced: Option<&'static str>,
    pub(crate) count: usize,
    /// What calls count as.
    pub(crate) used: &'static str,
}

/// `op` by the algorithm of that name.
const fn by(name: &'static str, op: Op, count: usize) -> Case {
    Case { op, forced: Some(name), count, used: name }
}

/// What there is no choice for.
const fn only(used: &'static str, op: Op, count: usize) -> Case {
    Case { op, forced: None, count, used }
}

const SUM: Op = Op::AllReduce(ReduceOp::Sum);
const SCATTER: Op = Op::ReduceScatter(ReduceOp::Sum);

pub(crate) const SUMS: [Case; 9] = [
    by("one_shot", SUM, FEW),
    by("lamport", SUM, FEW),
    by("two_shot", SUM, MANY),
    by("pull", SUM, MANY),
    // One barrier a chunk, and two.
    by("staged", SUM, FEW),
    by("staged", SUM, MOST),
    only("staged", Op::AllReduce(ReduceOp::Max), FEW),
    by("one_shot", Op::AllReduce(ReduceOp::Avg), FEW),
    by("two_shot", Op::AllReduce(ReduceOp::Avg), MANY),
];

pub(crate) const LARGE_SUMS: [Case; 8] = [
    by("cells", SUM, MANY),
    by("steps", SUM, MOST),
    by("composed", SUM, MANY),
    // Lines have no all-reduce of their own: both of its parts go by them.
    Case { op: SUM, forced: Some("lines"), count: MANY, used: "composed" },
    by("cells", SCATTER, MANY),
    by("lines", SCATTER, MANY),
    by("steps", SCATTER, MOST),
    only("staged", Op::Reduce, FEW),
];

pub(crate) const SCATTERS: [Case; 8] = [
    by("two_shot", SCATTER, MANY),
    by("staged", SCATTER, FEW),
    by("two_shot", Op::ReduceScatter(ReduceOp::Avg), FEW),
    by("two_shot", Op::ReduceScatterV(ReduceOp::Sum), MANY),
    by("cells", Op::ReduceScatterV(ReduceOp::Sum), MANY),
    by("staged", Op::ReduceScatterV(ReduceOp::Sum), FEW),
    by("two_shot", Op::ReduceScatterV(ReduceOp::Avg), FEW),
    only("two_shot", Op::Quantized, MANY),
];

pub(crate) const GATHERS: [Case; 10] = [
    by("packets", Op::AllGather, MANY),
    by("lines", Op::AllGather, MANY),
    by("direct", Op::AllGather, MANY),
    by("spread", Op::AllGather, MANY),
    by("steps", Op::AllGather, MANY),
    by("staged", Op::AllGather, FEW),
    by("packets", Op::AllGatherV, MANY),
    by("direct", Op::AllGatherV, MANY),
    by("staged", Op::AllGatherV, FEW),
    only("staged", Op::AllGather2d, MANY),
];

pub(crate) const MOVES: [Case; 10] = [
    by("packets", Op::Broadcast, FEW),
    by("relayed", Op::Broadcast, MANY),
    by("lines", Op::Broadcast, MANY),
    by("direct", Op::Broadcast, MANY),
    by("staged", Op::Broadcast, FEW),
    only("staged", Op::AllToAll, FEW),
    // A sender waits for what it sent before, so for its second chunk.
    only("staged", Op::Send, MANY),
    only("staged", Op::Recv, FEW),
    only("staged", Op::Group, FEW),
    only("flags", Op::Barrier, 0),
];

pub(crate) const NORMS: [Case; 9] = [
    // One hop, by packets and by Lamport packs, then two.
    by("one_shot", Op::Norm, TOKENS * HIDDEN),
    by("lamport", Op::Norm, TOKENS * HIDDEN),
    by("two_shot", Op::Norm, TOKENS * HIDDEN),
    by("composed", Op::Norm, TOKENS * HIDDEN),
    by("one_shot", Op::Fp8Norm, TOKENS * HIDDEN),
    by("lamport", Op::Fp8Norm, TOKENS * HIDDEN),
    by("two_shot", Op::Fp8Norm, TOKENS * HIDDEN),
    only("composed", Op::TwoGroupNorm, HIDDEN),
    only("composed", Op::TwoGroupFp8Norm, HIDDEN),
];

/// In a hybrid cube mesh, what has kernels of its own there: sums in one hop and in slices, gathers, barriers, messages.
pub(crate) const CUBE_MESH: [Case; 5] = [
    only("cube_mesh", SUM, FEW),
    only("cube_mesh", SUM, MANY),
    only("cube_mesh", Op::AllGather, MANY),
    by("staged", SUM, FEW),
    only("staged", Op::Send, MANY),
];

/// Captured on a result that nobody has registered, for which they have kernels of their own.
pub(crate) const CAPTURED: [Case; 2] = [
    Case { op: SUM, forced: Some("cells"), count: MANY, used: "captured" },
    Case { op: Op::AllGather, forced: Some("direct"), count: MANY, used: "captured" },
];

/// Captured as they are.
pub(crate) const REPLAYED: [Case; 2] = [by("lamport", SUM, FEW), by("staged", SUM, FEW)];

/// A rank's memory for all cases, which look at no result.
pub(crate) struct Operands {
    send: DeviceAddr,
    recv: DeviceAddr,
    more: DeviceAddr,
    vector: DeviceAddr,
}

impl Operands {
    pub(crate) fn new(rank: &Rank) -> Self {
        // Of a scatter, which sends the most.
        let most = MOST * rank.size;
        Self {
            send: rank.buffer(most, 1.0),
            recv: rank.buffer(most, 0.0),
            more: rank.buffer(3 * TOKENS * HIDDEN, 1.0),
            vector: rank.buffer(HIDDEN, 1.0),
        }
    }
}

/// Uneven, and nothing on the first rank where there are more than two.
fn uneven(count: usize, size: usize) -> Vec<usize> {
    (0..size).map(|rank| if rank == 0 && size > 2 { 0 } else { count - rank }).collect()
}

impl Case {
    pub(crate) fn options(&self) -> Vec<(&'static str, &'static str)> {
        let mut options = SMALL.to_vec();
        options.extend(self.forced.map(|name| ("p2p.algorithm", name)));
        options
    }

    /// What the calls of any rank but the last are.
    pub(crate) const fn kind(&self) -> OpKind {
        match self.op {
            Op::AllReduce(_) => OpKind::AllReduce,
            Op::Quantized => OpKind::AllReduceQuantized,
            Op::Reduce => OpKind::Reduce,
            Op::AllGather => OpKind::AllGather,
            Op::AllGatherV => OpKind::AllGatherV,
            Op::AllGather2d => OpKind::AllGather2d,
            Op::ReduceScatter(_) => OpKind::ReduceScatter,
            Op::ReduceScatterV(_) => OpKind::ReduceScatterV,
            Op::Broadcast => OpKind::Broadcast,
            Op::AllToAll => OpKind::AllToAll,
            Op::Send => OpKind::Send,
            Op::Recv => OpKind::Recv,
            Op::Group => OpKind::Group,
            Op::Barrier => OpKind::Barrier,
            Op::Norm => OpKind::AllReduceRmsNorm,
            Op::Fp8Norm => OpKind::AllReduceRmsNormQuantized,
            Op::TwoGroupNorm => OpKind::AllReduceRmsNormTwoGroup,
            Op::TwoGroupFp8Norm => OpKind::AllReduceRmsNormTwoGroupQuantized,
        }
    }

    /// The call that a rank waits in: that of which this one is composed, if it is.
    pub(crate) fn waits_in(&self) -> OpKind {
        match self.op {
            Op::TwoGroupNorm | Op::TwoGroupFp8Norm => OpKind::ReduceScatterV,
            Op::Norm if self.used == "composed" => OpKind::AllReduce,
            _ => self.kind(),
        }
    }

    /// Bytes of memory of the communicator for the results, if the algorithm stores into what every rank reaches.
    pub(crate) fn stores(&self, size: usize) -> Option<usize> {
        matches!(self.used, "cells" | "steps" | "direct" | "spread").then_some(4 * MOST.max(MANY * size))
    }

    /// This rank's part of one call. `shared`: memory of the communicator, if the case stores into that.
    pub(crate) fn issue(&self, rank: &Rank, own: &Operands, shared: Option<DeviceAddr>) -> Result<()> {
        let (comm, stream, size, count) = (&rank.comm, rank.stream(), rank.size, self.count);
        let (send, recv, f32s) = (own.send, shared.unwrap_or(own.recv), DType::F32);
        let (last, others) = (size - 1, 0..size - 1);
        // SAFETY: the buffers are large enough and live as long as the rank's memory, which goes last.
        unsafe {
            match self.op {
                Op::AllReduce(op) => comm.all_reduce(send, recv, count, f32s, op, stream),
                Op::Quantized => comm.all_reduce_quantized(send, recv, count, f32s, stream),
                Op::Reduce => comm.reduce(send, recv, count, f32s, ReduceOp::Sum, 0, stream),
                Op::AllGather => comm.all_gather(send, recv, count, f32s, stream),
                Op::AllGatherV => comm.all_gather_v(send, recv, &uneven(count, size), f32s, stream),
                Op::AllGather2d => {
                    let (height, width) = (count / 100, 100);
                    let block = Block2d {
                        height,
                        width,
                        row_pitch: width * size,
                        rank_stride: width,
                        send_pitch: width,
                        dtype: f32s,
                        first: true,
                        last: true,
                    };
                    comm.all_gather_2d(send, recv, &block, stream)
                }
                Op::ReduceScatter(op) => comm.reduce_scatter(send, recv, count, f32s, op, stream),
                Op::ReduceScatterV(op) => {
                    comm.reduce_scatter_v(send, recv, &uneven(count, size), f32s, op, stream)
                }
                Op::Broadcast => comm.broadcast(send, recv, count, f32s, 0, stream),
                Op::AllToAll => comm.all_to_all(send, recv, count, f32s, stream),
                Op::Send | Op::Recv if rank.rank < last => match self.op {
                    Op::Send => comm.send(send, count, f32s, last, stream),
                    _ => comm.recv(recv, count, f32s, last, stream),
                },
                Op::Send => others.clone().try_for_each(|peer| comm.recv(recv, count, f32s, peer, stream)),
                Op::Recv => others.clone().try_for_each(|peer| comm.send(send, count, f32s, peer, stream)),
                Op::Group => {
                    let peers = if rank.rank == last { others } else { last..size };
                    // Each peer's part has a place of its own.
                    let part = |base: DeviceAddr, peer: usize| base.offset((peer * count * 4) as u64);
                    let ops: Vec<_> = peers
                        .flat_map(|peer| {
                            let (from, to) = (part(send, peer), part(recv, peer));
                            [
                                P2pOp::Send { addr: from, count, dtype: f32s, peer },
                                P2pOp::Recv { addr: to, count, dtype: f32s, peer },
                            ]
                        })
                        .collect();
                    comm.group(&ops, stream)
                }
                Op::Barrier => comm.barrier(stream),
                Op::Norm => comm.all_reduce_rmsnorm(&own.norm(), stream),
                Op::Fp8Norm => comm.all_reduce_rmsnorm_quantized(&own.norm(), &own.fp8(false), stream),
                Op::TwoGroupNorm | Op::TwoGroupFp8Norm => {
                    let tokens = vec![2; size];
                    let args = TwoGroupNormArgs {
                        hidden_states: send,
                        residual: own.more,
                        bias: None,
                        weight: own.vector,
                        reduce_first_row: 0,
                        reduce_tokens: &tokens,
                        gather_first_row: 0,
                        gather_tokens: &tokens,
                        hidden: HIDDEN,
                        dtype: f32s,
                        eps: 1e-5,
                        weight_offset: 0.0,
                    };
                    match self.op {
                        Op::TwoGroupNorm => comm.all_reduce_rmsnorm_two_group(&**comm, &args, stream),
                        _ => {
                            let quantized = own.fp8(true);
                            comm.all_reduce_rmsnorm_two_group_quantized(&**comm, &args, &quantized, stream)
                        }
                    }
                }
            }
        }
    }
}

impl Operands {
    fn norm(&self) -> RmsNormArgs {
        let third = |part: usize| self.more.offset((part * TOKENS * HIDDEN * 4) as u64);
        RmsNormArgs {
            input: self.send,
            residual: third(0),
            residual_out: third(1),
            bias: None,
            weight: self.vector,
            output: third(2),
            tokens: TOKENS,
            hidden: HIDDEN,
            dtype: DType::F32,
            eps: 1e-5,
            weight_offset: 0.0,
        }
    }

    /// In `recv`: the scales, then the elements.
    fn fp8(&self, keep_unquantized: bool) -> NormQuantization {
        NormQuantization {
            output: self.recv.offset(4096),
            scale: NormQuantScale::PerToken(self.recv),
            keep_unquantized,
        }
    }
}
