//! Kernels that reach other ranks' memory, called as a program calls them.

use anyhow::Result;
use comm_core::{DType, DeviceAddr, DeviceComm, DeviceMemory, OpKind, P2pOp, ReduceOp, RmsNormArgs};
use comm_kernels::pattern::Expected;

use super::{Bench, FLOATS};

/// One element; less than a pack more than many; more than one round.
const COUNTS: [usize; 3] = [1, 771, 3000];
const REDUCTIONS: [ReduceOp; 5] =
    [ReduceOp::Sum, ReduceOp::Prod, ReduceOp::Min, ReduceOp::Max, ReduceOp::Avg];

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
            self.norms(comm, dtype)?;
            // SAFETY: the stream is the memory's own.
            unsafe { comm.barrier(stream)? };
        }
        self.memory.synchronize()?;
        Ok(())
    }

    /// The fused norm: a row in one block, in a cluster, and slices that are not even. The residual is zero, so the new
    /// one is the sum.
    fn norms(&mut self, comm: &dyn DeviceComm, dtype: DType) -> Result<()> {
        let stream = self.memory.stream();
        let bytes = 16 << 10;
        let buffer = || self.memory.allocate(bytes);
        let (input, residual, updated, output, weight) =
            (buffer()?, buffer()?, buffer()?, buffer()?, buffer()?);
        for (tokens, hidden) in [(3, 264), (1, 1000), (2, 101)] {
            let count = tokens * hidden;
            let data = self.fill(input, count, dtype, Some(ReduceOp::Sum))?;
            self.fill(weight, hidden, dtype, Some(ReduceOp::Sum))?;
            self.poison(updated, bytes)?;
            self.poison(output, bytes)?;
            // SAFETY: the buffer is that long.
            unsafe { self.memory.upload(residual, &vec![0; bytes])? };
            let args = RmsNormArgs {
                input,
                residual,
                residual_out: updated,
                bias: None,
                weight,
                output,
                tokens,
                hidden,
                dtype,
                eps: 1e-5,
                weight_offset: 0.0,
            };
            // SAFETY: every buffer holds more than `tokens * hidden` elements and lives until the rank's end.
            unsafe { comm.all_reduce_rmsnorm(&args, stream)? };
            self.expect(updated, count, dtype, &data, (Expected::Reduced(ReduceOp::Sum), 0))?;
        }
        Ok(())
    }

    /// What goes by way of staging memory whatever the algorithm: all types and reductions, and transfers.
    pub(super) fn staged(&mut self, comm: &dyn DeviceComm) -> Result<()> {
        let (world, rank, stream) = (self.world, self.rank, self.memory.stream());
        let count = 1500;
        let (send, recv) =
            (self.memory.allocate(count * world * 8)?, self.memory.allocate(count * world * 8)?);
        for dtype in DType::ALL {
            for op in REDUCTIONS {
                let data = self.fill(send, count, dtype, Some(op))?;
                self.poison(recv, count * dtype.size())?;
                // SAFETY: here and below, the buffers are large enough for every type and live until the rank's end.
                unsafe { comm.all_reduce(send, recv, count, dtype, op, stream)? };
                self.expect(recv, count, dtype, &data, (Expected::Reduced(op), 0))?;
            }
        }
        let dtype = DType::U64;
        let data = self.fill(send, count * world, dtype, None)?;
        // SAFETY: see above.
        unsafe { comm.all_to_all(send, recv, count, dtype, stream)? };
        for from in 0..world {
            let at = recv.offset((from * count * 8) as u64);
            self.expect(at, count, dtype, &data, (Expected::Sent(from), rank * count))?;
        }
        let (next, previous) = ((rank + 1) % world, (rank + world - 1) % world);
        let ops = [
            P2pOp::Send { addr: send, count, dtype, peer: next },
            P2pOp::Recv { addr: recv, count, dtype, peer: previous },
        ];
        self.poison(recv, count * 8)?;
        // SAFETY: see above.
        unsafe { comm.group(&ops, stream)? };
        self.expect(recv, count, dtype, &data, (Expected::Sent(previous), 0))?;
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
