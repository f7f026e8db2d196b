//! Parts that differ from rank to rank, averages, and blocks of rows.

use anyhow::Result;
use comm_core::{Block2d, DType, DeviceAddr, DeviceComm, DeviceMemory, ReduceOp};
use comm_kernels::pattern::Expected;

use super::{Bench, FLOATS};

/// Elements of the longest part: less than a pack more than many; more than one round.
const LONGEST: [usize; 2] = [771, 3000];

impl Bench {
    /// The V forms, with parts that are empty, and averages, into memory of the communicator.
    pub(super) fn uneven(&mut self, comm: &dyn DeviceComm) -> Result<()> {
        let bytes = (LONGEST[1] * self.world + 1) * 4;
        let (send, recv) = (self.memory.allocate(bytes)?, comm.allocate(bytes)?);
        for dtype in FLOATS {
            for (turn, longest) in LONGEST.into_iter().enumerate() {
                // The first time misaligned.
                let shift = if turn == 0 { dtype.size() as u64 } else { 0 };
                let operands = (send.offset(shift), recv.offset(shift));
                let last = self.world - 1;
                // None on the first rank; all on the last.
                let rising: Vec<usize> = (0..self.world).map(|rank| rank * longest / last).collect();
                let alone: Vec<usize> =
                    (0..self.world).map(|rank| if rank == last { longest } else { 0 }).collect();
                for counts in [rising, alone] {
                    self.gather_parts(comm, operands, &counts, dtype)?;
                    for op in [ReduceOp::Sum, ReduceOp::Avg] {
                        self.scatter_parts(comm, operands, &counts, (dtype, op))?;
                    }
                }
                self.averages(comm, operands, longest, dtype)?;
            }
        }
        self.memory.synchronize()?;
        Ok(())
    }

    fn gather_parts(
        &mut self,
        comm: &dyn DeviceComm,
        (send, recv): (DeviceAddr, DeviceAddr),
        counts: &[usize],
        dtype: DType,
    ) -> Result<()> {
        let data = self.fill(send, counts[self.rank], dtype, Some(ReduceOp::Sum))?;
        self.poison(recv, counts.iter().sum::<usize>() * dtype.size())?;
        // SAFETY: here and below, both buffers hold `world` parts of the longest length behind the shift, `recv` at one
        // offset of one allocation on all ranks; they live until the end, which waits.
        unsafe { comm.all_gather_v(send, recv, counts, dtype, self.memory.stream())? };
        let mut begin = 0;
        for (from, &count) in counts.iter().enumerate() {
            let at = recv.offset((begin * dtype.size()) as u64);
            self.expect(at, count, dtype, &data, (Expected::Sent(from), 0))?;
            begin += count;
        }
        Ok(())
    }

    fn scatter_parts(
        &mut self,
        comm: &dyn DeviceComm,
        (send, recv): (DeviceAddr, DeviceAddr),
        counts: &[usize],
        (dtype, op): (DType, ReduceOp),
    ) -> Result<()> {
        let (own, begin) = (counts[self.rank], counts[..self.rank].iter().sum());
        let data = self.fill(send, counts.iter().sum(), dtype, Some(op))?;
        self.poison(recv, own * dtype.size())?;
        // SAFETY: see above.
        unsafe { comm.reduce_scatter_v(send, recv, counts, dtype, op, self.memory.stream())? };
        self.expect(recv, own, dtype, &data, (Expected::Reduced(op), begin))
    }

    fn averages(
        &mut self,
        comm: &dyn DeviceComm,
        (send, recv): (DeviceAddr, DeviceAddr),
        count: usize,
        dtype: DType,
    ) -> Result<()> {
        let (average, stream) = (ReduceOp::Avg, self.memory.stream());
        for scatter in [false, true] {
            let data = self.fill(send, count * self.world, dtype, Some(average))?;
            self.poison(recv, count * dtype.size())?;
            // SAFETY: see above.
            unsafe {
                match scatter {
                    false => comm.all_reduce(send, recv, count, dtype, average, stream)?,
                    true => comm.reduce_scatter(send, recv, count, dtype, average, stream)?,
                }
            }
            let first = if scatter { self.rank * count } else { 0 };
            self.expect(recv, count, dtype, &data, (Expected::Reduced(average), first))?;
        }
        Ok(())
    }

    /// Gathers of blocks whose rows lie apart: rows of whole 16-byte units, and of single elements.
    pub(super) fn blocks(&mut self, comm: &dyn DeviceComm) -> Result<()> {
        let (world, dtype) = (self.world, DType::F16);
        let (height, send_pitch, row_pitch) = (5, 72, 80);
        let rank_stride = height * row_pitch;
        let send = self.memory.allocate(height * send_pitch * dtype.size())?;
        let recv = self.memory.allocate(world * rank_stride * dtype.size())?;
        for width in [64, 33] {
            let block =
                Block2d { height, width, row_pitch, rank_stride, send_pitch, dtype, first: true, last: true };
            let data = self.fill(send, height * send_pitch, dtype, None)?;
            self.poison(recv, world * rank_stride * dtype.size())?;
            // SAFETY: `send` has as many rows, `recv` as many for every rank; both live until the rank's end.
            unsafe { comm.all_gather_2d(send, recv, &block, self.memory.stream())? };
            for (from, row) in (0..world).flat_map(|from| (0..height).map(move |row| (from, row))) {
                let at = recv.offset(((from * rank_stride + row * row_pitch) * dtype.size()) as u64);
                self.expect(at, width, dtype, &data, (Expected::Sent(from), row * send_pitch))?;
            }
        }
        self.memory.synchronize()?;
        Ok(())
    }
}
