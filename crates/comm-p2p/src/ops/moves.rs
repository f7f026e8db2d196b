//! What only moves elements: all-gather, broadcast and all-to-all.

use comm_core::{DType, DeviceAddr, OpKind, Result, StreamHandle, check};

use super::staged::Staging;
use crate::call::Call;
use crate::comm::P2pComm;
use crate::select::Plan;
use crate::state::Channels;
use crate::usage::Algorithm;

/// What every function here asks of its caller is `DeviceComm`'s safety contract.
#[allow(clippy::missing_safety_doc, reason = "see above")]
impl P2pComm {
    pub(crate) unsafe fn do_all_gather(
        &self,
        (send, recv): (DeviceAddr, DeviceAddr),
        count: usize,
        dtype: DType,
        stream: StreamHandle,
    ) -> Result<()> {
        const KIND: OpKind = OpKind::AllGather;
        let info = &self.shared().info;
        let checked = check::all_gather(info, send, recv, count, dtype);
        self.compare(KIND, &checked, || {
            format!("{count} {dtype}{}", self.place(recv, count * dtype.size() * info.size))
        })?;
        let part = checked?;
        let mut call = self.begin(KIND, stream)?;
        call.passes(dtype, count, &[]);
        let Some(channels) = self.channels(part) else {
            return self.local(call, send, recv, part, stream);
        };
        let found = call.owned.table.find(recv, part * info.size);
        if found.is_none()
            // SAFETY: the caller vouches for the operands.
            && unsafe { self.capture_all_gather(&mut call, channels, (send, recv), part, stream) }?
        {
            call.finish(Algorithm::Captured, stream);
            return Ok(());
        }
        let plan = self.limits().all_gather(part, found.is_some());
        let Plan { algorithm, shape, .. } = plan;
        match (algorithm, found) {
            (Algorithm::Direct | Algorithm::Steps | Algorithm::Spread, Some(found)) => {
                call.reaches(&found, recv)?;
                self.store_all_gather(&call, channels, &plan, (send, &found.peers), part, stream)?;
            }
            (Algorithm::Staged, _) => {
                let parts = vec![part; info.size];
                self.stage_all_gather(&call, channels, (send, recv), &parts, stream)?;
            }
            (Algorithm::CubeMesh, _) => {
                self.cube_all_gather(&call, channels, (send, recv), part, shape, stream)?;
            }
            _ => self.launch_all_gather(&call, channels, &plan, (send, recv), part, stream)?,
        }
        call.finish(algorithm, stream);
        Ok(())
    }

    /// An all-gather of `part` bytes a rank through scratch memory: by lines, or else by packets.
    pub(super) fn launch_all_gather(
        &self,
        call: &Call<'_>,
        channels: &Channels,
        plan: &Plan,
        operands: (DeviceAddr, DeviceAddr),
        part: usize,
        stream: StreamHandle,
    ) -> Result<()> {
        let (kernels, lines) = (&channels.kernels, plan.algorithm == Algorithm::Lines);
        let link = call.link(if lines { &channels.lines } else { &channels.packet });
        self.share_a_buffer(call, &link, stream)?;
        // SAFETY: the channels are live while the communicator is open, the plan is the same on all ranks, and the
        // caller vouches for the operands.
        call.fatal(unsafe {
            match lines {
                true => kernels.all_gather_lines(&link, operands, part, plan.shape, stream),
                false => kernels.all_gather_packets(&link, operands, part, plan.shape, stream),
            }
        })
    }

    pub(crate) unsafe fn do_broadcast(
        &self,
        (send, recv): (DeviceAddr, DeviceAddr),
        count: usize,
        dtype: DType,
        root: usize,
        stream: StreamHandle,
    ) -> Result<()> {
        const KIND: OpKind = OpKind::Broadcast;
        let info = &self.shared().info;
        let checked = check::broadcast(info, send, recv, count, dtype, root);
        self.compare(KIND, &checked, || {
            format!("{count} {dtype} from {root}{}", self.place(recv, count * dtype.size()))
        })?;
        let bytes = checked?;
        let mut call = self.begin(KIND, stream)?;
        call.passes(dtype, count, &[root as u64]);
        let Some(channels) = self.channels(bytes) else {
            return self.local(call, send, recv, bytes, stream);
        };
        let found = call.owned.table.find(recv, bytes);
        let plan = self.limits().broadcast(bytes, found.is_some());
        let kernels = &channels.kernels;
        let link = call.link(&channels.packet);
        match (plan.algorithm, found) {
            (Algorithm::Direct, Some(found)) => {
                call.reaches(&found, recv)?;
                let operands = (send, &found.peers);
                self.store_broadcast(&call, channels, &plan, operands, (bytes, root), stream)?;
            }
            (Algorithm::Lines, _) => {
                let link = call.link(&channels.lines);
                self.share_a_buffer(&call, &link, stream)?;
                // SAFETY: as above.
                call.fatal(unsafe {
                    kernels.broadcast_lines(&link, (send, recv), bytes, root, plan.shape, stream)
                })?;
            }
            (Algorithm::Staged, _) => {
                let mut staging = Staging::new(&call, channels, stream);
                let most = staging.room(1, 1);
                let mut done = 0;
                while done < bytes {
                    let part = most.min(bytes - done);
                    let offset = done as u64;
                    staging.uses(part);
                    staging.exchange(
                        |staging, own| match info.rank == root {
                            true => staging.copy(send.offset(offset), own, part),
                            false => Ok(()),
                        },
                        |staging, halves| staging.copy(halves[root], recv.offset(offset), part),
                    )?;
                    done += part;
                }
                staging.finish()?;
            }
            _ => {
                let relayed = plan.algorithm == Algorithm::Relayed;
                self.share_a_buffer(&call, &link, stream)?;
                // Pieces of whole packs, so that all but the last keep the operands' alignment.
                let most = kernels.broadcast_limit(relayed, plan.shape) / 48 * 48;
                let most = usize::try_from(most).unwrap_or(usize::MAX).max(48);
                let mut done = 0;
                while done < bytes {
                    let part = most.min(bytes - done);
                    let operands = (send.offset(done as u64), recv.offset(done as u64));
                    // SAFETY: as above.
                    call.fatal(unsafe {
                        kernels.broadcast_packets(&link, relayed, operands, part, root, plan.shape, stream)
                    })?;
                    done += part;
                }
            }
        }
        call.finish(plan.algorithm, stream);
        Ok(())
    }

    pub(crate) unsafe fn do_all_to_all(
        &self,
        (send, recv): (DeviceAddr, DeviceAddr),
        count: usize,
        dtype: DType,
        stream: StreamHandle,
    ) -> Result<()> {
        const KIND: OpKind = OpKind::AllToAll;
        let info = &self.shared().info;
        let checked = check::all_to_all(info, send, recv, count, dtype);
        self.compare(KIND, &checked, || format!("{count} {dtype}"))?;
        let part = checked?;
        let mut call = self.begin(KIND, stream)?;
        call.passes(dtype, count, &[]);
        let Some(channels) = self.channels(part) else {
            return self.local(call, send, recv, part, stream);
        };
        let mut staging = Staging::new(&call, channels, stream);
        let room = staging.room(info.size, 1).min(part.next_multiple_of(16));
        staging.uses(info.size * room);
        let mut done = 0;
        while done < part {
            let length = room.min(part - done);
            let place = |base: DeviceAddr, rank: usize| base.offset((rank * part + done) as u64);
            staging.exchange(
                |staging, own| {
                    (0..info.size).filter(|&to| to != info.rank).try_for_each(|to| {
                        staging.copy(place(send, to), own.offset((to * room) as u64), length)
                    })
                },
                |staging, halves| {
                    // Each rank begins with its next neighbour, so that they do not all read one rank's memory at once.
                    (0..info.size).map(|turn| (info.rank + turn) % info.size).try_for_each(|from| {
                        let source = match from == info.rank {
                            true => place(send, from),
                            false => halves[from].offset((info.rank * room) as u64),
                        };
                        staging.copy(source, place(recv, from), length)
                    })
                },
            )?;
            done += length;
        }
        staging.finish()?;
        call.finish(Algorithm::Staged, stream);
        Ok(())
    }
}
