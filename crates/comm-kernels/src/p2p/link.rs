//! What host and kernels share: parameter blocks and the layout of the memory behind them.
//!
//! Mirrors `cuda/p2p/link.cuh` and `cells.cuh`; owns no memory.

use comm_core::DeviceAddr;

/// The most ranks of one communicator.
pub const MAX_RANKS: usize = 8;
/// Blocks that have flags of their own; the most that a kernel without packs may be launched with.
pub const FLAG_CTAS: u32 = 512;
/// Bytes of an area's flags.
pub const FLAG_BYTES: usize = 512 * 4 * MAX_RANKS * 4;
/// Bytes of a pack, the unit of the self-announcing formats.
pub const PACK_BYTES: usize = 16;
/// Buffers that rounds rotate through.
pub const BUFFERS: usize = 4;
/// A flag is fewer rounds than this ahead of a wait for it, unless a kernel says otherwise.
pub const AHEAD: u32 = 1024;
const STAGES: usize = 2;
const CELL_BYTES: usize = 512 * 4 * PACK_BYTES;

/// Bytes of the scratch area of a pack channel, `slot_packs` packs a source, between `world` ranks.
#[must_use]
pub const fn scratch_bytes(world: usize, slot_packs: usize) -> usize {
    FLAG_BYTES + BUFFERS * buffer_bytes(world, slot_packs)
}

/// Bytes of the scratch area of a channel of lines, `slot_packs` packs a source, between `world` ranks.
#[must_use]
pub const fn lines_bytes(world: usize, slot_packs: usize) -> usize {
    FLAG_BYTES + BUFFERS * world * slot_packs * PACK_BYTES
}

/// Bytes of one of the four buffers of a pack channel's area; they follow its flags.
#[must_use]
pub const fn buffer_bytes(world: usize, slot_packs: usize) -> usize {
    STAGES * world * slot_packs * PACK_BYTES
}

/// Bytes of a tile of sums in steps: a mover's shared memory.
pub const TILE_BYTES: u32 = 32 << 10;
/// The most tiles of a round and slice: each has two flags.
const MOST_TILES: usize = FLAG_CTAS as usize / 2;

/// Tiles of a round and slice of sums in steps, on the cells' channel for kernels of up to `ctas` blocks: two rounds fit.
#[must_use]
pub const fn tiles(ctas: usize) -> u32 {
    let fit = ctas * BUFFERS * CELL_BYTES / (2 * TILE_BYTES as usize);
    if fit < MOST_TILES { fit as u32 } else { MOST_TILES as u32 }
}

/// Bytes of the scratch area of the cells' channel for kernels of up to `ctas` blocks.
#[must_use]
pub const fn cells_bytes(world: usize, ctas: usize) -> usize {
    FLAG_BYTES + ctas * BUFFERS * world * CELL_BYTES
}

/// A channel's counters, in device memory, touched by its own rank's kernels alone. Zero at first, except `round`.
#[repr(C)]
#[derive(Clone, Copy, Default, Debug)]
pub struct Channel {
    /// The next round to use.
    pub round: u32,
    arrived: u32,
    unused: u32,
    looked: u32,
    ticket: u32,
    left: u32,
    reduced: [u32; 2],
}

/// What the host stores at [`Link::broken`] when the communicator has failed.
pub const HUSHED: u32 = 2;

/// Bytes of a pair channel's counters, in device memory, zero at first.
pub const PAIR_COUNTERS_BYTES: usize = 2 * MAX_RANKS * 4;

/// A wait that was given up: written once by the kernels, in host-mapped memory that is zero at first.
#[repr(C)]
#[derive(Clone, Copy, Default, Debug)]
pub struct ErrorRecord {
    /// 0 while all is well; 1 when the wait took too long, 2 when the abort word ended it; 3 when a graph was replayed
    /// before its operands were registered.
    pub cause: u32,
    /// [`Link::op`] of the kernel.
    pub op: u32,
    /// The round that did not complete.
    pub round: u32,
    /// Bit `r` is set if data of rank `r` had not arrived.
    pub missing: u32,
    /// How long the wait lasted.
    pub waited_ns: u64,
}

/// The parameter block of every peer-to-peer kernel: one rank's view of one channel.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Link {
    /// Every rank's scratch area as mapped on this device; unused entries are null.
    pub scratch: [DeviceAddr; MAX_RANKS],
    /// This rank's [`Channel`].
    pub channel: DeviceAddr,
    /// A 32-bit word in device memory, zero at first, that all channels of a communicator share: 1 once this rank has given
    /// up a wait, or [`HUSHED`] from the host. From then on its kernels send nothing.
    pub broken: DeviceAddr,
    /// The device's address of a host-mapped 32-bit word; nonzero ends all waits.
    pub abort: DeviceAddr,
    /// The device's address of the [`ErrorRecord`].
    pub error: DeviceAddr,
    /// The longest single wait.
    pub timeout_ns: u64,
    /// For tests: how long each block sleeps between its sends and its first wait, or behind that if it sends nothing.
    pub stall_ns: u64,
    /// This rank.
    pub rank: u32,
    /// Packs that one source may have in flight in one buffer and stage.
    pub slot_packs: u32,
    /// The call's number, for the error record.
    pub op: u32,
    #[doc(hidden)]
    pub reserved: u32,
}

/// Every rank's result buffer as mapped on this device.
pub type Peers = [DeviceAddr; MAX_RANKS];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_are_those_of_the_kernels() {
        assert_eq!(size_of::<Link>(), 8 * MAX_RANKS + 32 + 16 + 16);
        assert_eq!(size_of::<ErrorRecord>(), 24);
        assert_eq!(size_of::<Channel>(), 32);
        assert_eq!(scratch_bytes(2, 1), 65_536 + 4 * 2 * 2 * 16);
        assert_eq!(cells_bytes(8, 1), 65_536 + 4 * 8 * 32_768);
        for ctas in [1, 2, 100, 132] {
            for world in 2..=MAX_RANKS {
                let rounds = 2 * world * tiles(ctas) as usize * TILE_BYTES as usize;
                assert!(tiles(ctas) > 0 && FLAG_BYTES + rounds <= cells_bytes(world, ctas));
            }
        }
    }
}
