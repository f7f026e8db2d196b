//! Kernels that reach other ranks' memory, called as a program calls them.

use anyhow::Result;
use comm_core::{DType, DeviceAddr, DeviceComm, DeviceMemory, OpKind, ReduceOp};
use comm_kernels::pattern::Expected;

use super::{Bench, FLOATS};

/// One element; less than a pack more than many; more than one round, of two-byte elements too.
const COUNTS: [usize; 3] = [1, 771, 4000];

impl Bench {
    /// All collectives of the types and the sum that have kernels of their own, into memory of the communicator.
    pub(super) fn collectives(&mut self, comm: &dyn DeviceComm) -> Result<()> {
        let (world, rank, stream) = (self.world, self.rank, self.memory.stream());
        let most = COUNTS[COUNTS.len() - 1];
        let bytes = most * world * 4 + 256;
        let send = self.memory.allocate(bytes)?;
        let recv = comm.allocate(bytes)?;
        let sum = Expected::Reduced(ReduceOp::Sum);
        for dtype in FLOATS {
            for (turn, count) in COUNTS.into_iter().enumerate() {
                // The second time misaligned.
                let shift = if turn == 1 { dtype.size() as u64 } else { 0 };
                let (send, recv) = (send.offset(shift), recv.offset(shift));
                for kind in [OpKind::AllReduce, OpKind::ReduceScatter, OpKind::AllGather, OpKind::Broadcast] {
                    let data = self.fill(send, count * world, dtype, Some(ReduceOp::Sum))?;
                    self.poison(recv, count * world * dtype.size())?;
                    // SAFETY: both buffers hold `count * world` elements behind the shift, `recv` at one offset of one
                    // allocation on all ranks; they live until the end, which waits.
                    unsafe {
                        match kind {
                            OpKind::AllReduce => {
                                comm.all_reduce(send, recv, count, dtype, ReduceOp::Sum, stream)?
                            }
                            OpKind::ReduceScatter => {
                                comm.reduce_scatter(send, recv, count, dtype, ReduceOp::Sum, stream)?;
                            }
                            OpKind::AllGather => comm.all_gather(send, recv, count, dtype, stream)?,
                            _ => comm.broadcast(send, recv, count, dtype, 1, stream)?,
                        }
                    }
                    match kind {
                        OpKind::AllReduce => self.expect(recv, count, dtype, &data, (sum, 0))?,
                        OpKind::ReduceScatter => {
                            self.expect(recv, count, dtype, &data, (sum, rank * count))?;
                        }
                        OpKind::AllGather => {
                            for from in 0..world {
                                let at = recv.offset((from * count * dtype.size()) as u64);
                                self.expect(at, count, dtype, &data, (Expected::Sent(from), 0))?;
                            }
                        }
                        _ => self.expect(recv, count, dtype, &data, (Expected::Sent(1), 0))?,
                    }
                }
            }
            // SAFETY: the stream is the memory's own.
            unsafe { comm.barrier(stream)? };
        }
        self.memory.synchronize()?;
        Ok(())
    }

    /// Sums and a gather, captured on results that no other rank knows of before they are registered.
    pub(super) fn captured(&mut self, comm: &dyn DeviceComm) -> Result<()> {
        let (world, stream) = (self.world, self.memory.stream());
        let count = COUNTS[COUNTS.len() - 1];
        let place = count * 4 * world;
        let (sends, results) = (self.memory.allocate(4 * place)?, self.memory.allocate(4 * place)?);
        let at = |base: DeviceAddr, number: usize| base.offset((number * place) as u64);
        let mut graph = self.memory.capture(|| {
            for (number, dtype) in FLOATS.into_iter().enumerate() {
                // SAFETY: here and below, every place holds `count * world` elements of four bytes, and the buffers live
                // until the rank's end.
                unsafe {
                    let (send, recv) = (at(sends, number), at(results, number));
                    comm.all_reduce(send, recv, count, dtype, ReduceOp::Sum, stream)?;
                }
            }
            // SAFETY: see above.
            unsafe { comm.all_gather(at(sends, 3), at(results, 3), count, DType::F32, stream) }
        })?;
        comm.register_captured()?;
        for _ in 0..2 {
            let mut data = Vec::new();
            for (number, dtype) in FLOATS.into_iter().chain([DType::F32]).enumerate() {
                data.push(self.fill(at(sends, number), count, dtype, Some(ReduceOp::Sum))?);
                self.poison(at(results, number), place)?;
            }
            // SAFETY: the stream is the memory's own.
            unsafe { graph.launch(stream)? };
            for ((number, dtype), data) in FLOATS.into_iter().enumerate().zip(&data) {
                let sum = (Expected::Reduced(ReduceOp::Sum), 0);
                self.expect(at(results, number), count, dtype, data, sum)?;
            }
            for from in 0..world {
                let part = at(results, 3).offset((from * count * 4) as u64);
                self.expect(part, count, DType::F32, &data[3], (Expected::Sent(from), 0))?;
            }
        }
        self.memory.synchronize()?;
        Ok(())
    }
}
