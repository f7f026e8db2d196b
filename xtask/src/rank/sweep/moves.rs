//! What goes by way of staging memory whatever the algorithm: other types and reductions than sums of floats, and transfers
//! between pairs.

use anyhow::Result;
use comm_core::{DType, DeviceAddr, DeviceComm, DeviceMemory, P2pOp, ReduceOp};
use comm_kernels::pattern::Expected;

use super::Bench;

const REDUCTIONS: [ReduceOp; 5] =
    [ReduceOp::Sum, ReduceOp::Prod, ReduceOp::Min, ReduceOp::Max, ReduceOp::Avg];
/// Elements of a message: several chunks of a transfer, and of staging memory.
const COUNT: usize = 1500;

impl Bench {
    /// All types and reductions, for everyone and for one.
    pub(super) fn reductions(&mut self, comm: &dyn DeviceComm) -> Result<()> {
        let (root, stream) = (1, self.memory.stream());
        let (send, recv) = (self.memory.allocate(COUNT * 8)?, self.memory.allocate(COUNT * 8)?);
        for dtype in DType::ALL {
            for op in REDUCTIONS {
                for to_one in [false, true] {
                    let data = self.fill(send, COUNT, dtype, Some(op))?;
                    self.poison(recv, COUNT * dtype.size())?;
                    // SAFETY: the buffers are large enough for every type and live until the rank's end.
                    unsafe {
                        match to_one {
                            true => comm.reduce(send, recv, COUNT, dtype, op, root, stream)?,
                            false => comm.all_reduce(send, recv, COUNT, dtype, op, stream)?,
                        }
                    }
                    if !to_one || self.rank == root {
                        self.expect(recv, COUNT, dtype, &data, (Expected::Reduced(op), 0))?;
                    }
                }
            }
        }
        self.memory.synchronize()?;
        Ok(())
    }

    /// Everyone's parts to everyone, at once and as pairs of transfers, and single transfers.
    pub(super) fn transfers(&mut self, comm: &dyn DeviceComm) -> Result<()> {
        let (world, rank, stream, dtype) = (self.world, self.rank, self.memory.stream(), DType::U64);
        let bytes = COUNT * world * dtype.size();
        let (send, recv) = (self.memory.allocate(bytes)?, self.memory.allocate(bytes)?);
        let place = |base: DeviceAddr, of: usize| base.offset((of * COUNT * dtype.size()) as u64);
        for grouped in [false, true] {
            let data = self.fill(send, COUNT * world, dtype, None)?;
            self.poison(recv, bytes)?;
            let ops: Vec<P2pOp> = (0..world)
                .flat_map(|peer| {
                    let count = COUNT;
                    let (from, to) = (place(send, peer), place(recv, peer));
                    [
                        P2pOp::Send { addr: from, count, dtype, peer },
                        P2pOp::Recv { addr: to, count, dtype, peer },
                    ]
                })
                .collect();
            // SAFETY: here and below, both buffers hold a part for every rank and live until the rank's end.
            unsafe {
                match grouped {
                    false => comm.all_to_all(send, recv, COUNT, dtype, stream)?,
                    true => comm.group(&ops, stream)?,
                }
            }
            for from in 0..world {
                self.expect(place(recv, from), COUNT, dtype, &data, (Expected::Sent(from), rank * COUNT))?;
            }
        }
        // Pairs of ranks, of which the first sends first: a message has more chunks than may be under way. An odd rank out is
        // the first one's.
        for (first, second) in (0..world).step_by(2).map(|first| (first, (first + 1) % world)) {
            // By all ranks, so that they go on with the same numbers.
            let data = self.fill(send, COUNT, dtype, None)?;
            if rank != first && rank != second {
                continue;
            }
            let peer = if rank == first { second } else { first };
            self.poison(recv, COUNT * dtype.size())?;
            // SAFETY: see above.
            unsafe {
                if rank == first {
                    comm.send(send, COUNT, dtype, peer, stream)?;
                    comm.recv(recv, COUNT, dtype, peer, stream)?;
                } else {
                    comm.recv(recv, COUNT, dtype, peer, stream)?;
                    comm.send(send, COUNT, dtype, peer, stream)?;
                }
            }
            self.expect(recv, COUNT, dtype, &data, (Expected::Sent(peer), 0))?;
        }
        self.memory.synchronize()?;
        Ok(())
    }
}
