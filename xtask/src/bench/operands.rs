//! For each operation: how large its operands are, what lies in them before and after, and the call itself.

use comm_core::{Block2d, DeviceAddr, DeviceComm, OpKind, P2pOp, ReduceOp, StreamHandle};

use crate::bench::data::{Content, Segment};
use crate::bench::plan::{Case, uneven};
use crate::bench::row::NormShape;

/// The root of rooted operations.
pub const ROOT: usize = 0;

/// Rows of a two-dimensional gather's blocks.
const ROWS_2D: usize = 16;

/// One operation of one size on one rank.
#[derive(Clone, Debug)]
pub struct Operands {
    case: Case,
    rank: usize,
    world: usize,
    redop: ReduceOp,
    counts: Vec<usize>,
    /// Elements in the send buffer.
    pub send_count: usize,
    /// Elements in the receive buffer.
    pub recv_count: usize,
    /// Where both lie in one buffer, in elements: (send, receive).
    pub in_place: Option<(usize, usize)>,
}

impl Operands {
    /// The operands of a plain collective.
    pub fn new(case: Case, rank: usize, world: usize, redop: ReduceOp) -> Self {
        let Case { op, count, .. } = case;
        let counts = uneven(count, world);
        let own = counts[rank];
        let before: usize = counts[..rank].iter().sum();
        let (send_count, recv_count, in_place) = match op {
            OpKind::AllReduce | OpKind::Broadcast | OpKind::Reduce => (count, count, Some((0, 0))),
            OpKind::AllGather => (count, count * world, Some((rank * count, 0))),
            OpKind::AllGatherV => (own, count, Some((before, 0))),
            OpKind::ReduceScatter => (count * world, count, Some((0, rank * count))),
            OpKind::ReduceScatterV => (count, own, Some((0, before))),
            OpKind::AllToAll => (count * world, count * world, None),
            OpKind::AllGather2d => (count, count * world, None),
            OpKind::Barrier => (0, 0, None),
            _ => (count, count, None),
        };
        Self { case, rank, world, redop, counts, send_count, recv_count, in_place }
    }

    /// What the send buffer must hold.
    pub fn input(&self) -> Segment {
        Segment { offset: 0, count: self.send_count, content: Content::Of { rank: self.rank, first: 0 } }
    }

    /// What the receive buffer must hold afterwards.
    pub fn output(&self) -> Vec<Segment> {
        let Case { op, count, .. } = self.case;
        let (rank, world) = (self.rank, self.world);
        let reduced = |first: usize| Content::Reduced { op: self.redop, first: first as u64 };
        let of = |rank: usize, first: usize| Content::Of { rank, first: first as u64 };
        let whole = |content| vec![Segment { offset: 0, count: self.recv_count, content }];
        match op {
            OpKind::AllReduce => whole(reduced(0)),
            OpKind::Reduce if rank == ROOT => whole(reduced(0)),
            OpKind::Broadcast => whole(of(ROOT, 0)),
            OpKind::AllGather => {
                (0..world).map(|r| Segment { offset: r * count, count, content: of(r, 0) }).collect()
            }
            OpKind::AllGatherV => {
                let mut offset = 0;
                let parts = self.counts.iter().enumerate().map(|(r, &count)| {
                    let segment = Segment { offset, count, content: of(r, 0) };
                    offset += count;
                    segment
                });
                parts.collect()
            }
            OpKind::ReduceScatter => whole(reduced(rank * count)),
            OpKind::ReduceScatterV => whole(reduced(self.counts[..rank].iter().sum())),
            OpKind::AllToAll => (0..world)
                .map(|r| Segment { offset: r * count, count, content: of(r, rank * count) })
                .collect(),
            OpKind::Group => whole(of((rank + world - 1) % world, 0)),
            OpKind::Send if rank % 2 == 1 => whole(of(rank - 1, 0)),
            OpKind::AllGather2d => {
                let block = self.block(comm_core::DType::U8);
                let row = |r: usize, row: usize| Segment {
                    offset: r * block.rank_stride + row * block.row_pitch,
                    count: block.width,
                    content: of(r, row * block.send_pitch),
                };
                (0..world).flat_map(|r| (0..block.height).map(move |i| row(r, i))).collect()
            }
            _ => Vec::new(),
        }
    }

    fn block(&self, dtype: comm_core::DType) -> Block2d {
        let height = if self.case.count >= ROWS_2D { ROWS_2D } else { 1 };
        let width = self.case.count / height;
        Block2d {
            height,
            width,
            row_pitch: width * self.world,
            rank_stride: width,
            send_pitch: width,
            dtype,
            first: true,
            last: true,
        }
    }

    /// Issues the operation.
    ///
    /// # Errors
    /// The operation's.
    ///
    /// # Safety
    /// As [`DeviceComm`] asks: `send` and `recv` have the sizes that this says, and stay alive until the work is done.
    pub unsafe fn issue(
        &self,
        comm: &dyn DeviceComm,
        send: DeviceAddr,
        recv: DeviceAddr,
        dtype: comm_core::DType,
        stream: StreamHandle,
    ) -> comm_core::Result<()> {
        let Case { op, count, .. } = self.case;
        let (rank, world, redop) = (self.rank, self.world, self.redop);
        // SAFETY: every arm names exactly the ranges that `new` sized the buffers for; the caller vouches for the rest.
        unsafe {
            match op {
                OpKind::AllReduce => comm.all_reduce(send, recv, count, dtype, redop, stream),
                OpKind::AllGather => comm.all_gather(send, recv, count, dtype, stream),
                OpKind::AllGatherV => comm.all_gather_v(send, recv, &self.counts, dtype, stream),
                OpKind::ReduceScatter => comm.reduce_scatter(send, recv, count, dtype, redop, stream),
                OpKind::ReduceScatterV => {
                    comm.reduce_scatter_v(send, recv, &self.counts, dtype, redop, stream)
                }
                OpKind::Broadcast => comm.broadcast(send, recv, count, dtype, ROOT, stream),
                OpKind::Reduce => comm.reduce(send, recv, count, dtype, redop, ROOT, stream),
                OpKind::AllToAll => comm.all_to_all(send, recv, count, dtype, stream),
                OpKind::AllGather2d => comm.all_gather_2d(send, recv, &self.block(dtype), stream),
                OpKind::Barrier => comm.barrier(stream),
                OpKind::Group => {
                    let (next, previous) = ((rank + 1) % world, (rank + world - 1) % world);
                    let ops = [
                        P2pOp::Send { addr: send, count, dtype, peer: next },
                        P2pOp::Recv { addr: recv, count, dtype, peer: previous },
                    ];
                    comm.group(&ops, stream)
                }
                OpKind::Send if rank % 2 == 1 => comm.recv(recv, count, dtype, rank - 1, stream),
                OpKind::Send if rank + 1 < world => comm.send(send, count, dtype, rank + 1, stream),
                OpKind::Send => Ok(()),
                other => {
                    Err(comm_core::CommError::unsupported(other, "bench", "it has no benchmark of its own"))
                }
            }
        }
    }
}

/// What a query about a case asks for.
pub fn query(case: &Case, world: usize, dtype: comm_core::DType, redop: ReduceOp) -> comm_core::OpQuery {
    let count = match case.op {
        OpKind::AllGatherV | OpKind::ReduceScatterV => {
            uneven(case.count, world).into_iter().max().unwrap_or(0)
        }
        _ => case.norm.map_or(case.count, |NormShape { tokens, hidden }| tokens * hidden),
    };
    let query = comm_core::OpQuery::new(case.op, dtype, count);
    if case.op.reduces() { query.with_reduce(redop) } else { query }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn operands(op: OpKind, rank: usize) -> Operands {
        Operands::new(Case { op, count: 100, bytes: 0, norm: None }, rank, 4, ReduceOp::Sum)
    }

    #[test]
    fn outputs_cover_the_receive_buffer_exactly_once() {
        use OpKind as O;
        for op in [
            O::AllReduce,
            O::AllGather,
            O::AllGatherV,
            O::ReduceScatter,
            O::ReduceScatterV,
            O::Broadcast,
            O::AllToAll,
            O::Group,
        ] {
            for rank in 0..4 {
                let operands = operands(op, rank);
                let mut end = 0;
                for segment in operands.output() {
                    assert_eq!(segment.offset, end, "{op} rank {rank}");
                    end += segment.count;
                }
                assert_eq!(end, operands.recv_count, "{op} rank {rank}");
            }
        }
    }

    #[test]
    fn in_place_forms_lie_where_the_interface_says() {
        assert_eq!(operands(OpKind::AllGather, 2).in_place, Some((200, 0)));
        assert_eq!(operands(OpKind::ReduceScatterV, 2).in_place, Some((0, 30)));
        assert_eq!(operands(OpKind::AllToAll, 2).in_place, None);
        assert!(operands(OpKind::Reduce, 1).output().is_empty());
    }
}
