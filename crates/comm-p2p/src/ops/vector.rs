//! Gathers and scatters of uneven parts, and gathers of two-dimensional blocks.

use comm_core::{Block2d, DType, DeviceAddr, OpKind, ReduceOp, Result, StreamHandle, check};
use comm_kernels::p2p::Parts;

use super::average::is_average;
use super::is_fast;
use super::staged::Staging;
use crate::call::Call;
use crate::comm::P2pComm;
use crate::select::Plan;
use crate::state::Channels;
use crate::usage::Algorithm;

fn widened(counts: &[usize]) -> Vec<u64> {
    counts.iter().map(|&count| count as u64).collect()
}

#[allow(clippy::missing_safety_doc, reason = "`DeviceComm`'s contract holds for every method")]
impl P2pComm {
    pub(crate) unsafe fn do_all_gather_v(
        &self,
        (send, recv): (DeviceAddr, DeviceAddr),
        counts: &[usize],
        dtype: DType,
        stream: StreamHandle,
    ) -> Result<()> {
        const KIND: OpKind = OpKind::AllGatherV;
        let checked = check::all_gather_v(&self.shared().info, send, recv, counts, dtype);
        self.compare(KIND, &checked, || {
            let place = checked.as_ref().map_or_else(|_| String::new(), |&whole| self.place(recv, whole));
            format!("{counts:?} {dtype}{place}")
        })?;
        let whole = checked?;
        let mut call = self.begin(KIND, stream)?;
        call.passes(dtype, whole, &widened(counts));
        let Some(channels) = self.channels(whole) else {
            return self.local(call, send, recv, whole, stream);
        };
        let lengths: Vec<usize> = counts.iter().map(|count| count * dtype.size()).collect();
        let parts = call.fatal(Parts::new(&lengths))?;
        let found = call.owned.table.find(recv, whole);
        let Plan { algorithm, shape, chunk, .. } =
            self.limits().all_gather_v(parts.longest(), found.is_some());
        let link = call.link(&channels.packet);
        match (algorithm, found) {
            (Algorithm::Direct, Some(found)) => {
                call.reaches(&found, recv)?;
                let (kernels, peers) = (&channels.kernels, &found.peers);
                // SAFETY: the channels are live while the communicator is open, the plan is the same on all ranks,
                // `recv` lies in a region of all ranks, and the caller vouches for the operands.
                call.fatal(unsafe {
                    kernels.all_gather_v_direct(&link, send, peers, (&parts, chunk), shape, stream)
                })?;
            }
            (Algorithm::Staged, _) => {
                self.stage_all_gather(&call, channels, (send, recv), &lengths, stream)?;
            }
            _ => {
                self.share_a_buffer(&call, &link, stream)?;
                // SAFETY: as above.
                call.fatal(unsafe {
                    channels.kernels.all_gather_v_packets(&link, (send, recv), &parts, shape, stream)
                })?;
            }
        }
        call.finish(algorithm, stream);
        Ok(())
    }

    /// Rank `r`'s `parts[r]` bytes come to everyone, laid end to end.
    pub(super) fn stage_all_gather(
        &self,
        call: &Call<'_>,
        channels: &Channels,
        (send, recv): (DeviceAddr, DeviceAddr),
        parts: &[usize],
        stream: StreamHandle,
    ) -> Result<()> {
        let (rank, size) = (self.shared().info.rank, parts.len());
        let begins: Vec<usize> = parts
            .iter()
            .scan(0, |end, part| {
                let begin = *end;
                *end += part;
                Some(begin)
            })
            .collect();
        let mut staging = Staging::new(call, channels, stream);
        let room = staging.room(1, 1);
        let longest = parts.iter().copied().max().unwrap_or(0);
        let mut done = 0;
        while done < longest {
            let left = |from: usize| parts[from].saturating_sub(done).min(room);
            staging.uses(room.min(longest - done));
            let source = send.offset(done as u64);
            staging.exchange(
                |staging, own| staging.copy(source, own, left(rank)),
                |staging, halves| {
                    (0..size).map(|turn| (rank + turn) % size).try_for_each(|from| {
                        let source = if from == rank { source } else { halves[from] };
                        staging.copy(source, recv.offset((begins[from] + done) as u64), left(from))
                    })
                },
            )?;
            done += room;
        }
        staging.finish()
    }

    pub(crate) unsafe fn do_reduce_scatter_v(
        &self,
        (send, recv): (DeviceAddr, DeviceAddr),
        counts: &[usize],
        (dtype, op): (DType, ReduceOp),
        stream: StreamHandle,
    ) -> Result<()> {
        const KIND: OpKind = OpKind::ReduceScatterV;
        let checked = check::reduce_scatter_v(&self.shared().info, send, recv, counts, dtype);
        self.compare(KIND, &checked, || format!("{counts:?} {dtype} {op}"))?;
        let whole = checked?;
        let mut call = self.begin(KIND, stream)?;
        call.passes(dtype, whole, &[&[op as u64], &*widened(counts)].concat());
        let Some(channels) = self.channels(whole) else {
            return self.local(call, send, recv, whole, stream);
        };
        let lengths: Vec<usize> = counts.iter().map(|count| count * dtype.size()).collect();
        let parts = call.fatal(Parts::new(&lengths))?;
        if is_average(dtype, op) {
            let algorithm =
                self.average_reduce_scatter_v(&call, channels, (send, recv), &parts, dtype, stream)?;
            if algorithm != Algorithm::Staged {
                call.finish(algorithm, stream);
                return Ok(());
            }
        }
        let Plan { algorithm, shape, units, .. } = self.limits().reduce_scatter_v(parts.longest());
        if !is_fast(dtype, op) || algorithm == Algorithm::Staged {
            self.stage_reduce_scatter(&call, channels, (send, recv), counts, (dtype, op), stream)?;
            call.finish(Algorithm::Staged, stream);
            return Ok(());
        }
        let cells = (algorithm == Algorithm::Cells).then_some(units);
        let link = call.link(if cells.is_some() { &channels.cells } else { &channels.lamport });
        self.share_a_buffer(&call, &link, stream)?;
        // SAFETY: the channels are live while the communicator is open, the plan is the same on all ranks, and the
        // caller vouches for the operands.
        call.fatal(unsafe {
            channels.kernels.reduce_scatter_v(&link, cells, (send, recv), &parts, dtype, shape, stream)
        })?;
        call.finish(algorithm, stream);
        Ok(())
    }

    pub(crate) unsafe fn do_all_gather_2d(
        &self,
        (send, recv): (DeviceAddr, DeviceAddr),
        block: &Block2d,
        stream: StreamHandle,
    ) -> Result<()> {
        const KIND: OpKind = OpKind::AllGather2d;
        let info = &self.shared().info;
        let checked = check::all_gather_2d(info, send, recv, block);
        self.compare(KIND, &checked, || {
            let Block2d { height, width, row_pitch, rank_stride, dtype, .. } = block;
            format!("{height} x {width} {dtype}, row pitch {row_pitch}, rank stride {rank_stride}")
        })?;
        checked?;
        let mut call = self.begin(KIND, stream)?;
        call.passes(block.dtype, block.height, &widened(&[block.width, block.row_pitch, block.rank_stride]));
        let size = block.dtype.size();
        let (height, width) = (block.height, block.width * size);
        if height == 0 || width == 0 {
            call.finish(Algorithm::Local, stream);
            return Ok(());
        }
        let (from_pitch, to_pitch) = (block.send_pitch * size, block.row_pitch * size);
        let Some(channels) = &self.shared().channels else {
            // The only rank is the first, and its block lies at the beginning.
            if send != recv {
                let (kernels, from, to) = (&self.shared().base.kernels, (send, from_pitch), (recv, to_pitch));
                // SAFETY: the operands have been checked and the caller vouches for them; there is no word.
                call.fatal(unsafe {
                    kernels.copy_rows_unless(DeviceAddr::NULL, from, to, width, height, stream)
                })?;
            }
            call.finish(Algorithm::Local, stream);
            return Ok(());
        };
        let mut staging = Staging::new(&call, channels, stream);
        let room = staging.room(1, size);
        // Whole rows where one fits, else pieces of one row at a time.
        let (columns, rows) = (width.min(room), (room / width.min(room)).min(height));
        let rows = if columns < width { 1 } else { rows };
        staging.uses(rows * columns);
        for row in (0..height).step_by(rows) {
            let rows = rows.min(height - row);
            for column in (0..width).step_by(columns) {
                let columns = columns.min(width - column);
                let place =
                    |base: DeviceAddr, pitch: usize| (base.offset((row * pitch + column) as u64), pitch);
                staging.exchange(
                    |staging, own| staging.copy_rows(place(send, from_pitch), (own, columns), columns, rows),
                    |staging, halves| {
                        (0..info.size).map(|turn| (info.rank + turn) % info.size).try_for_each(|from| {
                            let to = recv.offset((from * block.rank_stride * size) as u64);
                            let source = match from == info.rank {
                                true => place(send, from_pitch),
                                false => (halves[from], columns),
                            };
                            staging.copy_rows(source, place(to, to_pitch), columns, rows)
                        })
                    },
                )?;
            }
        }
        staging.finish()?;
        call.finish(Algorithm::Staged, stream);
        Ok(())
    }
}
