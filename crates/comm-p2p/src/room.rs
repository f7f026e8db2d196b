//! How many blocks a kernel that waits for other ranks may have: arithmetic on a device and the ranks on it.
//!
//! Such a kernel is right only if all its blocks get to run while none of them ends. On a device of its own a rank may
//! fill the device. On a shared one, of which every rank has to know that it is ([`Room::shared`]), the kernels of all
//! the device's ranks must be resident side by side. Why they are, on a device of S multiprocessors and with R ranks on it:
//!
//! - **What counts.** Only kernels that wait for other ranks. All others (copies and reductions of staged operations, norms
//!   of known sums, data and its checks) end by themselves: they may delay a block, and never keep it out.
//! - **Kernels of a stream.** One at a time: on a shared device nothing is launched with leave to become resident early.
//!   With that leave there would be no bound. A kernel gives it at its first instruction, before it waits for the one
//!   before it; so the successor of a successor may begin as well, and a rank that is ahead could fill the device with
//!   kernels that wait for their turn, while a rank that is late finds no place for the one that all of them wait for.
//! - **Streams of a rank.** Two, [`STREAMS`]: two communicators may be in use at once.
//! - **Blocks.** Each may need a whole multiprocessor for itself: those of sums in steps and of cells have 512 threads of
//!   up to 128 registers, which is all there are, and more than 32 KB of shared memory. Two blocks of half the size do not
//!   count as one, since they need not lie on one multiprocessor.
//! - **So** with B blocks a kernel at most `2 * R * B` multiprocessors hold a block that waits. With B as below that leaves
//!   [`SPARE`] free, so every block finds a place.
//! - **Clusters.** Up to 8 blocks start together, on multiprocessors of one cluster of the chip (GPC), of which there are at
//!   most 8. If each of those had fewer than 8 free ones, no more than `8 * 7` would be free in all; but when a cluster is
//!   to be placed, its own blocks are not there yet, so more are. Hence [`SPARE`], and clusters are used where B is at
//!   least their size.
//!
//! Ranks of other processes do not count here, though B is the same for all: their contexts take turns on a device, whole.
//! A mistake here shows as a timeout, as every wait is bounded.

use comm_kernels::p2p::Overlap;

/// Streams of a rank on which calls wait at the same time.
const STREAMS: u32 = 2;
/// Multiprocessors of a shared device that hold no waiting block: 8 GPCs with 7 each.
const SPARE: u32 = 8 * 7;

/// The room that one rank's kernels have, the same on all ranks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Room {
    multiprocessors: u32,
    shared: bool,
}

impl Room {
    /// Where each rank has a device of its own, with at least so many multiprocessors.
    pub(crate) const fn alone(multiprocessors: u32) -> Self {
        Self { multiprocessors, shared: false }
    }

    /// Where up to `ranks` ranks share a device of at least so many multiprocessors. `multiprocessors` becomes a rank's
    /// share: blocks that each need one. It is at least one, without which there would be no kernel; on a device too small
    /// for that the argument above does not hold.
    pub(crate) fn shared(multiprocessors: u32, ranks: usize) -> Self {
        let ranks = u32::try_from(ranks).unwrap_or(u32::MAX).max(1);
        let share = multiprocessors.saturating_sub(SPARE) / ranks.saturating_mul(STREAMS);
        Self { multiprocessors: share.max(1), shared: true }
    }

    /// Multiprocessors to plan for: at most so many blocks, of any size, may be launched.
    pub(crate) const fn multiprocessors(self) -> u32 {
        self.multiprocessors
    }

    /// Blocks of a size of which a multiprocessor holds `per_multiprocessor`.
    pub(crate) const fn blocks(self, per_multiprocessor: u32) -> u32 {
        if self.shared {
            self.multiprocessors
        } else {
            self.multiprocessors.saturating_mul(per_multiprocessor)
        }
    }

    /// Between a kernel and the one before it on its stream.
    pub(crate) const fn overlap(self) -> Overlap {
        if self.shared { Overlap::Never } else { Overlap::Allowed }
    }

    pub(crate) const fn is_shared(self) -> bool {
        self.shared
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_of_all_ranks_fit_on_a_shared_device_and_a_cluster_still_finds_a_place() {
        // H100 PCIe, H100 and H200, B200.
        for multiprocessors in [114, 132, 148] {
            for ranks in 2..=8 {
                let room = Room::shared(multiprocessors, ranks);
                let waiting = STREAMS * ranks as u32 * room.multiprocessors();
                assert!(room.multiprocessors() >= 3 && waiting + SPARE <= multiprocessors, "{room:?}");
                // Blocks of any size count as one multiprocessor each.
                assert_eq!(
                    (room.blocks(1), room.blocks(4)),
                    (room.multiprocessors(), room.multiprocessors())
                );
                // Placing a cluster: with its own blocks not there, some GPC of 8 has 8 free multiprocessors.
                let free = multiprocessors - (waiting - 1);
                assert!(free.div_ceil(8) >= 8, "{room:?}");
            }
        }
        let shares = [2, 4, 8].map(|ranks| Room::shared(132, ranks).multiprocessors());
        assert_eq!(shares, [19, 9, 4]);
        assert_eq!(Room::shared(20, 8).multiprocessors(), 1);
    }

    #[test]
    fn alone_a_rank_may_fill_its_device() {
        let room = Room::alone(132);
        assert_eq!((room.blocks(1), room.blocks(2), room.is_shared()), (132, 264, false));
        assert_eq!((room.overlap(), Room::shared(132, 2).overlap()), (Overlap::Allowed, Overlap::Never));
    }
}
