//! The quantised all-reduce.

use comm_core::{CommError, DType, DeviceAddr, OpKind, Result, StreamHandle, check};
use comm_kernels::p2p::{QUANTIZED_PACKS, QUANTIZED_ROW, Shape};

use crate::comm::{P2pComm, QUANTIZED_NEEDS_ALL};
use crate::room::Room;
use crate::usage::Algorithm;

#[allow(clippy::missing_safety_doc, reason = "`DeviceComm`'s contract holds for every method")]
impl P2pComm {
    pub(crate) unsafe fn do_all_reduce_quantized(
        &self,
        (send, recv): (DeviceAddr, DeviceAddr),
        count: usize,
        dtype: DType,
        stream: StreamHandle,
    ) -> Result<()> {
        const KIND: OpKind = OpKind::AllReduceQuantized;
        let checked = check::all_reduce_quantized(send, recv, count, dtype);
        self.compare(KIND, &checked, || format!("{count} {dtype}"))?;
        let bytes = checked?;
        if self.shared().keeps_to_neighbours() {
            return Err(CommError::unsupported(KIND, crate::NAME, QUANTIZED_NEEDS_ALL));
        }
        let mut call = self.begin(KIND, stream)?;
        call.passes(dtype, count, &[]);
        let Some(channels) = self.channels(bytes) else {
            return self.local(call, send, recv, bytes, stream);
        };
        let base = &self.shared().base;
        let shape = shape(self.shared().info.size, base.options.lamport_slots, base.room, count);
        let link = call.link(&channels.lamport);
        // SAFETY: the channels are live while the communicator is open, the shape is the same on all ranks, and the
        // caller vouches for the operands.
        call.fatal(unsafe {
            channels.kernels.all_reduce_quantized(&link, (send, recv), count, dtype, shape, stream)
        })?;
        call.finish(Algorithm::TwoShot, stream);
        Ok(())
    }
}

/// Warps of the largest blocks: as many as there may be ranks.
const MOST_WARPS: usize = 8;
const _: () = assert!(MOST_WARPS >= comm_kernels::p2p::MAX_RANKS);

/// A warp for each row of a slice, until the device or the scratch memory is full.
fn shape(world: usize, slots: usize, room: Room, count: usize) -> Shape {
    let rows = count.div_ceil(QUANTIZED_ROW).div_ceil(world);
    let warps = rows.clamp(1, slots / QUANTIZED_PACKS);
    // Few rows are spread over many multiprocessors, many rows fill them.
    let mut per_block = match warps {
        0..=128 => 2,
        129..=256 => 4,
        _ => 8,
    };
    // Two blocks of up to 256 threads are resident on every multiprocessor.
    let most = room.blocks(2);
    // The share of a device is too small to spread them; the fewest blocks of all still have a warp for each rank.
    while room.is_shared() && per_block < MOST_WARPS && warps.div_ceil(per_block) > most as usize {
        per_block *= 2;
    }
    let grid = warps.div_ceil(per_block).min(slots / QUANTIZED_PACKS / per_block).max(1);
    Shape { grid: (grid as u32).min(most), block: per_block as u32 * 32 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_have_room_and_enough_warps() {
        let rooms = [Room::alone(132), Room::shared(132, 2), Room::shared(132, 8), Room::shared(1, 8)];
        for (world, slots) in (2..=8).flat_map(|world| [512, 67_584].map(|slots| (world, slots))) {
            for (room, shift) in rooms.into_iter().flat_map(|room| (0..33).map(move |shift| (room, shift))) {
                for count in [1_usize << shift, (1 << shift) + 1] {
                    let Shape { grid, block } = shape(world, slots, room, count);
                    let (warps, rows) = ((grid * block / 32) as usize, count.div_ceil(512).div_ceil(world));
                    assert!(block.is_multiple_of(32) && block <= 256 && grid <= room.blocks(2));
                    assert!(warps * 33 <= slots, "{count}: {grid} x {block}");
                    assert!(warps >= rows || warps >= world, "{count}: {grid} x {block}, {room:?}");
                }
            }
        }
        let alone = |count| shape(8, 67_584, Room::alone(132), count);
        assert_eq!(alone(4 << 20), Shape { grid: 128, block: 256 });
        assert_eq!(alone(1 << 28), Shape { grid: 256, block: 256 });
    }
}
