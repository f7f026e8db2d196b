//! Collectives whose ranks contribute unequal counts, put together from grouped calls.

use comm_core::{DType, DeviceAddr, ReduceOp, Result, StreamHandle};

use super::comm::NcclComm;
use super::limits;
use super::state::Call;
use super::usage::Algorithm;

/// Up to this many bytes the ranks send to each other at once, which needs one step; above, broadcasts along NCCL's
/// rings keep the links fuller, and cross the network once per node instead of once per rank.
const SEND_RECV_LIMIT: usize = 1 << 20;

/// Where rank `r`'s part of a V operation begins, in elements, and how long it is.
fn parts(size: usize, counts: &dyn Fn(usize) -> usize) -> impl Iterator<Item = (usize, usize, usize)> {
    (0..size).scan(0, move |begin, rank| {
        let (count, start) = (counts(rank), *begin);
        *begin += count;
        Some((rank, start, count))
    })
}

impl NcclComm {
    /// Enqueues an all-gather of parts laid end to end in `recv`.
    ///
    /// # Safety
    /// The operands have passed `check::all_gather_v`, and the caller vouches for their ranges and the stream.
    pub(super) unsafe fn enqueue_all_gather_v(
        &self,
        call: &Call<'_>,
        send: DeviceAddr,
        recv: DeviceAddr,
        counts: &dyn Fn(usize) -> usize,
        dtype: DType,
        stream: StreamHandle,
    ) -> Result<Algorithm> {
        let info = &self.shared().info;
        let element = dtype.size();
        let (own, total) =
            (counts(info.rank), parts(info.size, counts).map(|(_, _, count)| count).sum::<usize>());
        let moved = limits::moved(dtype);
        if own > 0 && (0..info.size).all(|rank| counts(rank) == own) {
            // SAFETY: the caller vouches for the operands.
            call.nccl(|library, comm| unsafe { library.all_gather(send, recv, own, moved, comm, stream) })?;
            return Ok(Algorithm::Native);
        }
        let place = |begin: usize| recv.offset((begin * element) as u64);
        if total * element <= SEND_RECV_LIMIT {
            call.nccl(|library, comm| {
                let group = library.group()?;
                for (rank, begin, count) in parts(info.size, counts) {
                    let in_place = rank == info.rank && place(begin) == send;
                    if own > 0 && !in_place {
                        // SAFETY: the caller vouches for the operands. An error ends the group when it is dropped.
                        let _ = unsafe { library.send(send, own, moved, rank, comm, stream) }?;
                    }
                    if count > 0 && !in_place {
                        // SAFETY: as above.
                        let _ = unsafe { library.recv(place(begin), count, moved, rank, comm, stream) }?;
                    }
                }
                group.end()
            })?;
            return Ok(Algorithm::SendRecv);
        }
        call.nccl(|library, comm| {
            let group = library.group()?;
            for (rank, begin, count) in parts(info.size, counts) {
                let from = if rank == info.rank { send } else { place(begin) };
                if count > 0 {
                    // SAFETY: the caller vouches for the operands; only the root reads `from`.
                    let _ =
                        unsafe { library.broadcast(from, place(begin), count, moved, rank, comm, stream) }?;
                }
            }
            group.end()
        })?;
        Ok(Algorithm::Broadcasts)
    }

    /// Enqueues a reduce-scatter of parts laid end to end in `send`.
    ///
    /// # Safety
    /// The operands have passed `check::reduce_scatter_v`, and the caller vouches for their ranges and the stream.
    pub(super) unsafe fn enqueue_reduce_scatter_v(
        &self,
        call: &Call<'_>,
        send: DeviceAddr,
        recv: DeviceAddr,
        counts: &dyn Fn(usize) -> usize,
        (dtype, op): (DType, ReduceOp),
        stream: StreamHandle,
    ) -> Result<Algorithm> {
        let info = &self.shared().info;
        let own = counts(info.rank);
        let (element, reduction) = (limits::element(dtype), limits::reduction(op));
        if own > 0 && (0..info.size).all(|rank| counts(rank) == own) {
            // SAFETY: the caller vouches for the operands.
            call.nccl(|library, comm| unsafe {
                library.reduce_scatter(send, recv, own, element, reduction, comm, stream)
            })?;
            return Ok(Algorithm::Native);
        }
        if (0..info.size).all(|rank| counts(rank) == 0) {
            return Ok(Algorithm::Reduces);
        }
        call.nccl(|library, comm| {
            let group = library.group()?;
            for (rank, begin, count) in parts(info.size, counts) {
                let from = send.offset((begin * dtype.size()) as u64);
                // Only the root writes; what the others pass is not used, but must not look like a range of their own.
                let to = if rank == info.rank { recv } else { from };
                if count > 0 {
                    // SAFETY: the caller vouches for the operands.
                    let _ =
                        unsafe { library.reduce(from, to, count, element, reduction, rank, comm, stream) }?;
                }
            }
            group.end()
        })?;
        Ok(Algorithm::Reduces)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_lie_end_to_end() {
        let counts = [3, 0, 2];
        let laid: Vec<_> = parts(3, &|rank| counts[rank]).collect();
        assert_eq!(laid, [(0, 0, 3), (1, 3, 0), (2, 3, 2)]);
    }
}
