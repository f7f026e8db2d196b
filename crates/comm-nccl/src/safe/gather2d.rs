//! The two-dimensional all-gather, put together from what NCCL has.

use comm_core::{Block2d, DeviceAddr, OpKind, Result, StreamHandle, check};

use super::comm::NcclComm;
use super::limits;
use super::state::Call;
use super::usage::Algorithm;
use crate::driver;

/// Up to this many rows are gathered row by row in one group; above, their launch costs more than copying.
const ROW_GATHERS_LIMIT: usize = 8;

impl NcclComm {
    /// # Safety
    /// As `DeviceComm::all_gather_2d`.
    pub(super) unsafe fn gather_blocks(
        &self,
        send: DeviceAddr,
        recv: DeviceAddr,
        block: &Block2d,
        stream: StreamHandle,
    ) -> Result<()> {
        const KIND: OpKind = OpKind::AllGather2d;
        let shared = self.shared();
        let checked = check::all_gather_2d(&shared.info, send, recv, block);
        self.compare(KIND, &checked, || {
            // The send pitch is a rank's own business.
            let Block2d { height, width, row_pitch, rank_stride, dtype, .. } = block;
            format!("{height} x {width} {dtype}, pitch {row_pitch}, stride {rank_stride}")
        })?;
        checked?;
        if block.height == 0 || block.width == 0 {
            return shared.healthy();
        }
        // The choice uses only what all ranks share; the send pitch may differ between them.
        let row_bytes = block.width * block.dtype.size();
        let mut call = shared.begin_on(KIND, row_bytes * block.height * shared.info.size, stream)?;
        let side_by_side = block.rank_stride == block.width;
        let contiguous = block.row_pitch == block.width && block.rank_stride == block.height * block.width;
        let staged_rows = shared.scratch.staging_bytes / (row_bytes * shared.info.size);
        // SAFETY: the operands have been checked and the caller vouches for them.
        let algorithm = unsafe {
            if block.height == 1 && (side_by_side || shared.info.size == 1) {
                Self::enqueue_rows(&call, send, recv, block, stream)?;
                Algorithm::Native
            } else if contiguous && block.send_pitch == block.width {
                let (count, moved) = (block.height * block.width, limits::moved(block.dtype));
                call.nccl(|library, comm| library.all_gather(send, recv, count, moved, comm, stream))?;
                Algorithm::Native
            } else if contiguous {
                self.enqueue_packed(&call, send, recv, block, stream)?;
                Algorithm::Native
            } else if side_by_side && (block.height <= ROW_GATHERS_LIMIT || staged_rows == 0) {
                Self::enqueue_rows(&call, send, recv, block, stream)?;
                Algorithm::RowGathers
            } else if staged_rows == 0 {
                self.enqueue_row_broadcasts(&call, send, recv, block, stream)?;
                Algorithm::Broadcasts
            } else {
                self.enqueue_staged(&mut call, send, recv, block, staged_rows, stream)?;
                Algorithm::Staged
            }
        };
        call.finish(stream, algorithm)
    }

    /// One all-gather per row: with blocks side by side, that is where it puts the ranks' rows.
    ///
    /// # Safety
    /// The operands have been checked, and the caller vouches for their ranges and the stream.
    unsafe fn enqueue_rows(
        call: &Call<'_>,
        send: DeviceAddr,
        recv: DeviceAddr,
        block: &Block2d,
        stream: StreamHandle,
    ) -> Result<()> {
        let moved = limits::moved(block.dtype);
        call.nccl(|library, comm| {
            let group = library.group()?;
            for row in 0..block.height {
                let from = place(send, row * block.send_pitch, block);
                let to = place(recv, row * block.row_pitch, block);
                // SAFETY: the caller vouches for the ranges, of which these are rows.
                let _ = unsafe { library.all_gather(from, to, block.width, moved, comm, stream) }?;
            }
            group.end()
        })
    }

    /// One broadcast per rank and row, for rows so long that nothing can be staged.
    ///
    /// # Safety
    /// As [`enqueue_rows`](Self::enqueue_rows).
    unsafe fn enqueue_row_broadcasts(
        &self,
        call: &Call<'_>,
        send: DeviceAddr,
        recv: DeviceAddr,
        block: &Block2d,
        stream: StreamHandle,
    ) -> Result<()> {
        let info = &self.shared().info;
        let moved = limits::moved(block.dtype);
        for row in 0..block.height {
            call.nccl(|library, comm| {
                let group = library.group()?;
                for rank in 0..info.size {
                    let to = place(recv, rank * block.rank_stride + row * block.row_pitch, block);
                    let from =
                        if rank == info.rank { place(send, row * block.send_pitch, block) } else { to };
                    // SAFETY: the caller vouches for the ranges, of which these are rows.
                    let _ = unsafe { library.broadcast(from, to, block.width, moved, rank, comm, stream) }?;
                }
                group.end()
            })?;
        }
        Ok(())
    }

    /// Copies this rank's pitched rows to their place in the contiguous result and gathers from there.
    ///
    /// # Safety
    /// As [`enqueue_rows`](Self::enqueue_rows).
    unsafe fn enqueue_packed(
        &self,
        call: &Call<'_>,
        send: DeviceAddr,
        recv: DeviceAddr,
        block: &Block2d,
        stream: StreamHandle,
    ) -> Result<()> {
        let info = &self.shared().info;
        let element = block.dtype.size();
        let own = place(recv, info.rank * block.rank_stride, block);
        let row = block.width * element;
        // SAFETY: the caller vouches for the ranges.
        call.fatal(unsafe {
            driver::copy_2d((send, block.send_pitch * element), (own, row), row, block.height, stream)
        })?;
        let (count, moved) = (block.height * block.width, limits::moved(block.dtype));
        // SAFETY: as above; in place.
        call.nccl(|library, comm| unsafe { library.all_gather(own, recv, count, moved, comm, stream) })
    }

    /// Gathers as many rows at a time as the staging buffer holds and copies each rank's to their places.
    ///
    /// # Safety
    /// As [`enqueue_rows`](Self::enqueue_rows).
    unsafe fn enqueue_staged(
        &self,
        call: &mut Call<'_>,
        send: DeviceAddr,
        recv: DeviceAddr,
        block: &Block2d,
        staged_rows: usize,
        stream: StreamHandle,
    ) -> Result<()> {
        let info = &self.shared().info;
        let element = block.dtype.size();
        let row = block.width * element;
        let moved = limits::moved(block.dtype);
        let staging = self.shared().scratch.staging;
        let Some(order) = &mut call.native.staged else { return Err(call.shared.closed()) };
        // SAFETY: the caller vouches for the stream.
        let begun = unsafe { order.begin(stream) };
        let to = call.fatal(begun)?;
        let mut first = 0;
        while first < block.height {
            let rows = staged_rows.min(block.height - first);
            let slot = |rank: usize| staging.offset((rank * rows * row) as u64);
            let from = place(send, first * block.send_pitch, block);
            // SAFETY: the caller vouches for `send`; the slots of `rows` rows fit in the staging buffer.
            call.fatal(unsafe {
                driver::copy_2d((from, block.send_pitch * element), (slot(info.rank), row), row, rows, stream)
            })?;
            let (own, count) = (slot(info.rank), rows * block.width);
            // SAFETY: the staging buffer belongs to the communicator; in place.
            call.nccl(|library, comm| unsafe {
                library.all_gather(own, staging, count, moved, comm, stream)
            })?;
            for rank in 0..info.size {
                let to = place(recv, rank * block.rank_stride + first * block.row_pitch, block);
                if rank == info.rank && to == from && block.row_pitch == block.send_pitch {
                    continue;
                }
                // SAFETY: the caller vouches for `recv`, of which these rows are part.
                call.fatal(unsafe {
                    driver::copy_2d((slot(rank), row), (to, block.row_pitch * element), row, rows, stream)
                })?;
            }
            first += rows;
        }
        let ended = call.native.staged.as_mut().map_or(Ok(()), |order| order.end(to, stream));
        call.fatal(ended)
    }
}

const fn place(base: DeviceAddr, elements: usize, block: &Block2d) -> DeviceAddr {
    base.offset((elements * block.dtype.size()) as u64)
}
