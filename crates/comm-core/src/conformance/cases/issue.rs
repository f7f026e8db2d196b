//! Any operation by its kind, on small operands: for cases about a communicator's life rather than about results.

use super::super::case::Case;
use crate::addr::{DeviceAddr, StreamHandle};
use crate::device_comm::{DeviceComm, P2pOp};
use crate::dtype::{DType, ReduceOp};
use crate::error::Result;
use crate::fused::{Block2d, NormQuantScale, NormQuantization, RmsNormArgs, TwoGroupNormArgs};
use crate::op::{OpKind, OpQuery};

/// Elements per rank of each call.
pub(super) const COUNT: usize = 4;

/// Two blocks of memory that every call below fits in.
#[derive(Clone, Copy)]
pub(super) struct Operands {
    pub(super) a: DeviceAddr,
    pub(super) b: DeviceAddr,
}

impl Operands {
    pub(super) fn new(case: &mut Case<'_, '_>) -> Result<Self> {
        let len = 2048 + case.world * COUNT * 8;
        let (a, b) = (case.arena.lay(0, 0, len)?, case.arena.lay(1, 0, len)?);
        case.arena.put(&a, &vec![0; len])?;
        case.arena.put(&b, &vec![0; len])?;
        Ok(Self { a: a.addr(), b: b.addr() })
    }
}

/// The query that `issue` answers to.
pub(super) fn query(kind: OpKind, dtype: DType) -> OpQuery {
    let count = match kind {
        OpKind::Barrier => 0,
        _ => COUNT,
    };
    let query = OpQuery::new(kind, dtype, count);
    if kind.reduces() { query.with_reduce(ReduceOp::Sum) } else { query }
}

/// Issues one call. Send and receive go to the rank itself and are for communicators that must refuse them.
pub(super) fn issue(
    comm: &dyn DeviceComm,
    kind: OpKind,
    dtype: DType,
    at: Operands,
    stream: StreamHandle,
) -> Result<()> {
    let Operands { a, b } = at;
    let (world, own, sum) = (comm.size(), comm.rank(), ReduceOp::Sum);
    let counts = vec![COUNT; world];
    let (next, previous) = ((own + 1) % world, (own + world - 1) % world);
    let (c, d) = (a.offset(512), a.offset(1024));
    // SAFETY: both blocks hold `world * COUNT` elements and more, and only this call uses them.
    unsafe {
        match kind {
            OpKind::AllReduce => comm.all_reduce(a, b, COUNT, dtype, sum, stream),
            OpKind::AllReduceQuantized => comm.all_reduce_quantized(a, b, COUNT, dtype, stream),
            OpKind::AllGather => comm.all_gather(a, b, COUNT, dtype, stream),
            OpKind::AllGatherV => comm.all_gather_v(a, b, &counts, dtype, stream),
            OpKind::ReduceScatter => comm.reduce_scatter(a, b, COUNT, dtype, sum, stream),
            OpKind::ReduceScatterV => comm.reduce_scatter_v(a, b, &counts, dtype, sum, stream),
            OpKind::Broadcast => comm.broadcast(a, b, COUNT, dtype, 0, stream),
            OpKind::Reduce => comm.reduce(a, b, COUNT, dtype, sum, 0, stream),
            OpKind::AllToAll => comm.all_to_all(a, b, COUNT, dtype, stream),
            OpKind::Send => comm.send(a, COUNT, dtype, own, stream),
            OpKind::Recv => comm.recv(b, COUNT, dtype, own, stream),
            OpKind::Group => {
                let ops = [
                    P2pOp::Send { addr: a, count: COUNT, dtype, peer: next },
                    P2pOp::Recv { addr: b, count: COUNT, dtype, peer: previous },
                ];
                comm.group(&ops, stream)
            }
            OpKind::Barrier => comm.barrier(stream),
            OpKind::AllGather2d => {
                let block = Block2d {
                    height: 1,
                    width: COUNT,
                    row_pitch: COUNT * world,
                    rank_stride: COUNT,
                    send_pitch: COUNT,
                    dtype,
                    first: true,
                    last: true,
                };
                comm.all_gather_2d(a, b, &block, stream)
            }
            OpKind::AllReduceRmsNorm | OpKind::AllReduceRmsNormQuantized => {
                let args = RmsNormArgs {
                    input: a,
                    residual: c,
                    residual_out: c,
                    bias: None,
                    weight: d,
                    output: b,
                    tokens: 1,
                    hidden: COUNT,
                    dtype,
                    eps: 1e-5,
                    weight_offset: 0.0,
                };
                match kind {
                    OpKind::AllReduceRmsNorm => comm.all_reduce_rmsnorm(&args, stream),
                    _ => comm.all_reduce_rmsnorm_quantized(&args, &quantized(at), stream),
                }
            }
            _ => {
                let tokens: Vec<usize> = (0..world).map(|rank| usize::from(rank == 0)).collect();
                let args = TwoGroupNormArgs {
                    hidden_states: a,
                    residual: c,
                    bias: None,
                    weight: d,
                    reduce_first_row: 0,
                    reduce_tokens: &tokens,
                    gather_first_row: 0,
                    gather_tokens: &tokens,
                    hidden: COUNT,
                    dtype,
                    eps: 1e-5,
                    weight_offset: 0.0,
                };
                match kind {
                    OpKind::AllReduceRmsNormTwoGroup => {
                        comm.all_reduce_rmsnorm_two_group(comm, &args, stream)
                    }
                    _ => comm.all_reduce_rmsnorm_two_group_quantized(comm, &args, &quantized(at), stream),
                }
            }
        }
    }
}

/// Room for the fp8 result of the norms above, and their scales.
pub(super) const fn quantized(at: Operands) -> NormQuantization {
    NormQuantization {
        output: at.b.offset(512),
        scale: NormQuantScale::PerToken(at.b.offset(1024)),
        keep_unquantized: true,
    }
}

/// The kinds that one call on every rank carries out.
pub(super) fn one_sided() -> impl Iterator<Item = OpKind> {
    OpKind::COLLECTIVES.into_iter().filter(|kind| !matches!(kind, OpKind::Send | OpKind::Recv))
}
