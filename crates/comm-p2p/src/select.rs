//! Which algorithm, in which shape: pure functions of what all ranks share, over a table measured on 8 H200.
//!
//! Thresholds scale with the number of ranks by what a rank sends: `(world - 1)` times the buffer in one hop.

use comm_kernels::p2p::{QUANTIZED_PACKS, QUANTIZED_ROW, Shape, Units};

use crate::usage::Algorithm;

/// What the choice depends on besides the operation and its size. Equal on all ranks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    pub(crate) world: usize,
    pub(crate) packet_slots: usize,
    pub(crate) lamport_slots: usize,
    pub(crate) cell_ctas: usize,
    pub(crate) multiprocessors: u32,
    pub(crate) forced: Option<Algorithm>,
}

/// A choice: the algorithm and its launch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Plan {
    pub(crate) algorithm: Algorithm,
    pub(crate) shape: Shape,
    /// Of direct gathers and broadcasts: bytes of a burst or between two flags. Of the norm: blocks of a cluster.
    pub(crate) chunk: u32,
    /// Of cells.
    pub(crate) units: Units,
}

const PACKET_PAYLOAD: usize = 12;
const PACK: usize = 16;

/// Bytes that a rank may send in one hop before two hops are faster: 64 KiB to seven peers.
const ONE_HOP: usize = (64 << 10) * 7;
/// The same for the broadcast's root.
const BROADCAST_ONE_HOP: usize = (128 << 10) * 7;
/// From here on an all-reduce goes by cells, if its results are registered.
const CELLS: usize = 12 << 20;
/// From here on an all-gather goes by direct stores, if its results are registered.
const DIRECT_GATHER: usize = 2 << 20;
const DIRECT_BROADCAST: usize = 12 << 20;

impl Limits {
    /// Blocks and threads for `packs` packs: one pack a thread until the device is full.
    fn spread(&self, packs: usize, slots: usize, table: &[(usize, u32)]) -> Shape {
        let wanted = packs.clamp(1, slots);
        let block = table.iter().find(|&&(most, _)| wanted <= most).map_or(512, |&(_, block)| block);
        // Two blocks of up to 256 threads are resident on every multiprocessor.
        let resident = if block <= 256 { 2 * self.multiprocessors } else { self.multiprocessors };
        let grid = wanted.div_ceil(block as usize).min(slots / block as usize).max(1);
        Shape { grid: u32::try_from(grid).unwrap_or(u32::MAX).min(resident), block }
    }

    fn plan(&self, algorithm: Algorithm, shape: Shape) -> Plan {
        Plan { algorithm, shape, chunk: 0, units: Units::Two }
    }

    /// Cells, in long bursts where the message is long enough to fill the pipeline with them.
    fn cells(&self, long: bool, short_block: u32) -> Plan {
        let grid = self.multiprocessors.min(self.cell_ctas as u32);
        let (block, units) = if long { (512, Units::Four) } else { (short_block, Units::Two) };
        Plan { units, ..self.plan(Algorithm::Cells, Shape { grid, block }) }
    }

    fn packets(&self, packs: usize) -> Shape {
        self.spread(packs, self.packet_slots, &[(6 << 10, 128), (64 << 10, 256)])
    }

    fn lamport(&self, packs: usize) -> Shape {
        self.spread(packs, self.lamport_slots, &[(4 << 10, 64), (8 << 10, 128), (usize::MAX, 256)])
    }

    /// A sum all-reduce of `bytes` bytes of bf16, f16 or f32.
    pub(crate) fn all_reduce(&self, bytes: usize, registered: bool) -> Plan {
        let packs = bytes.div_ceil(PACKET_PAYLOAD);
        let fits_one_hop = packs <= self.packet_slots;
        let one_shot = || self.plan(Algorithm::OneShot, self.packets(packs));
        let two_shot = || {
            let slice = bytes.div_ceil(PACK).div_ceil(self.world);
            self.plan(Algorithm::TwoShot, self.lamport(slice))
        };
        let cells = || self.cells(bytes >= 24 << 20, 256);
        match self.forced {
            Some(Algorithm::OneShot) if fits_one_hop => return one_shot(),
            Some(Algorithm::TwoShot) => return two_shot(),
            Some(Algorithm::Cells) if registered => return cells(),
            Some(Algorithm::Staged) => return self.staged(),
            _ => {}
        }
        if bytes * (self.world - 1) <= ONE_HOP && fits_one_hop {
            one_shot()
        } else if registered && bytes >= CELLS {
            cells()
        } else {
            two_shot()
        }
    }

    /// A quantised all-reduce of `count` elements: a warp for each row of a slice.
    pub(crate) fn all_reduce_quantized(&self, count: usize) -> Plan {
        let rows = count.div_ceil(QUANTIZED_ROW).div_ceil(self.world);
        let table = [(4 << 10, 64), (8 << 10, 128), (usize::MAX, 256)];
        let threads = self.lamport_slots / QUANTIZED_PACKS * 32;
        self.plan(Algorithm::TwoShot, self.spread(rows.saturating_mul(32), threads, &table))
    }

    /// A sum reduce-scatter of `part` bytes a rank.
    pub(crate) fn reduce_scatter(&self, part: usize) -> Plan {
        let two_shot = || self.plan(Algorithm::TwoShot, self.lamport(part.div_ceil(PACK)));
        let cells = || self.cells(part.saturating_mul(self.world) >= 128 << 20, 512);
        match self.forced {
            Some(Algorithm::TwoShot) => two_shot(),
            Some(Algorithm::Cells) => cells(),
            Some(Algorithm::Staged) => self.staged(),
            _ if part.saturating_mul(self.world) >= CELLS => cells(),
            _ => two_shot(),
        }
    }

    /// An all-gather of `part` bytes a rank.
    pub(crate) fn all_gather(&self, part: usize, registered: bool) -> Plan {
        let packets = || {
            let packs = part.div_ceil(PACKET_PAYLOAD);
            let table = [(2 << 10, 64), (22 << 10, 256)];
            self.plan(Algorithm::Packets, self.spread(packs, self.packet_slots, &table))
        };
        let direct = || {
            let (block, chunk) = match part.saturating_mul(self.world) {
                total if total < 32 << 20 => (256, 4096),
                total if total < 128 << 20 => (256, 8192),
                _ => (512, 16_384),
            };
            let shape = Shape { grid: self.multiprocessors, block };
            Plan { chunk, ..self.plan(Algorithm::Direct, shape) }
        };
        match self.forced {
            Some(Algorithm::Packets) => packets(),
            Some(Algorithm::Direct) if registered => direct(),
            Some(Algorithm::Staged) => self.staged(),
            _ if registered && part.saturating_mul(self.world) >= DIRECT_GATHER => direct(),
            _ => packets(),
        }
    }

    /// A broadcast of `bytes` bytes.
    pub(crate) fn broadcast(&self, bytes: usize, registered: bool) -> Plan {
        let packs = bytes.div_ceil(PACKET_PAYLOAD);
        let one_hop = || self.plan(Algorithm::Packets, self.packets(packs));
        let relayed = || self.plan(Algorithm::Relayed, self.packets(packs.div_ceil(self.world - 1)));
        let direct = || {
            let (grid, chunk) = match bytes {
                total if total < 32 << 20 => (64, 4096),
                total if total < 128 << 20 => (128, 4096),
                _ => (128, 8192),
            };
            let shape = Shape { grid: self.multiprocessors.min(grid), block: 256 };
            // The table is for seven slices, one per relay: with fewer, a slice's share of a pass is as much larger.
            let chunk = (chunk * 7 / (self.world as u32 - 1)).next_multiple_of(4096);
            Plan { chunk, ..self.plan(Algorithm::Direct, shape) }
        };
        let fits_one_hop = packs <= self.packet_slots;
        match self.forced {
            Some(Algorithm::Packets) if fits_one_hop => return one_hop(),
            Some(Algorithm::Relayed) => return relayed(),
            Some(Algorithm::Direct) if registered => return direct(),
            Some(Algorithm::Staged) => return self.staged(),
            _ => {}
        }
        if fits_one_hop && (self.world == 2 || bytes.saturating_mul(self.world - 1) <= BROADCAST_ONE_HOP) {
            one_hop()
        } else if registered && bytes >= DIRECT_BROADCAST {
            direct()
        } else {
            relayed()
        }
    }

    /// A fused norm of `tokens` rows of `row` bytes. `Packets` stands for one hop, with the cluster in `chunk`;
    /// `Composed` for an all-reduce and a norm of their own.
    pub(crate) fn norm(&self, tokens: usize, row: usize) -> Plan {
        let sm = self.multiprocessors as usize;
        let one_hop = || {
            let packs = row.div_ceil(PACKET_PAYLOAD);
            let cluster = if packs <= 128 { 1 } else { 8 };
            let block = packs.div_ceil(cluster).next_multiple_of(32);
            let grid = tokens.checked_mul(cluster)?;
            let fits = block <= 512 && grid <= sm && grid * block <= self.packet_slots;
            let shape = Shape { grid: grid as u32, block: block as u32 };
            let plan = Plan { chunk: cluster as u32, ..self.plan(Algorithm::OneShot, shape) };
            fits.then_some(plan)
        };
        let two_hops = || {
            let block = row.div_ceil(PACK).div_ceil(self.world).next_multiple_of(32);
            let per_sm = if block <= 256 { 2 } else { 1 };
            let grid = tokens.min(per_sm * sm).min(self.lamport_slots / block);
            let shape = Shape { grid: grid as u32, block: block as u32 };
            (block <= 512 && grid > 0).then_some(self.plan(Algorithm::TwoShot, shape))
        };
        let composed = self.plan(Algorithm::Composed, Shape { grid: 0, block: 0 });
        let chosen = match self.forced {
            Some(Algorithm::OneShot) => one_hop().or_else(two_hops),
            Some(Algorithm::TwoShot) => two_hops(),
            Some(Algorithm::Composed) => None,
            _ if tokens.saturating_mul(row).saturating_mul(self.world - 1) <= ONE_HOP => {
                one_hop().or_else(two_hops)
            }
            _ => two_hops(),
        };
        chosen.unwrap_or(composed)
    }

    fn staged(&self) -> Plan {
        self.plan(Algorithm::Staged, Shape { grid: 0, block: 0 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(world: usize, forced: Option<Algorithm>) -> Limits {
        Limits {
            world,
            packet_slots: 33_792,
            lamport_slots: 67_584,
            cell_ctas: 132,
            multiprocessors: 132,
            forced,
        }
    }

    #[test]
    fn every_plan_can_be_launched() {
        for world in 2..=8 {
            for forced in [None, Some(Algorithm::OneShot), Some(Algorithm::TwoShot), Some(Algorithm::Direct)]
            {
                let limits = limits(world, forced);
                for bytes in (0..34).flat_map(|shift| [1_usize << shift, (1 << shift) + 1]) {
                    for registered in [false, true] {
                        let plans = [
                            (limits.all_reduce(bytes, registered), limits.lamport_slots),
                            (limits.reduce_scatter(bytes), limits.lamport_slots),
                            (limits.all_gather(bytes, registered), limits.lamport_slots),
                            (limits.broadcast(bytes, registered), limits.lamport_slots),
                        ];
                        for (plan, slots) in plans {
                            assert!(plan.shape.grid >= 1 && plan.shape.block <= 512, "{plan:?}");
                            let resident = if plan.shape.block <= 256 { 264 } else { 132 };
                            assert!(plan.shape.grid <= resident, "{plan:?}");
                            assert!(plan.shape.threads() <= slots as u64, "{plan:?}");
                            let packets = matches!(plan.algorithm, Algorithm::Packets | Algorithm::Relayed)
                                || plan.algorithm == Algorithm::OneShot;
                            assert!(!packets || plan.shape.threads() <= 33_792, "{plan:?}");
                            let direct = matches!(plan.algorithm, Algorithm::Direct);
                            assert!(!direct || registered && plan.chunk.is_multiple_of(4096), "{plan:?}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn small_goes_in_one_hop_and_large_by_cells() {
        let eight = limits(8, None);
        let shape = |plan: Plan| (plan.algorithm, plan.shape.grid, plan.shape.block);
        assert_eq!(shape(eight.all_reduce(1 << 10, false)), (Algorithm::OneShot, 1, 128));
        assert_eq!(shape(eight.all_reduce(64 << 10, false)), (Algorithm::OneShot, 43, 128));
        assert_eq!(shape(eight.all_reduce(256 << 10, false)), (Algorithm::TwoShot, 32, 64));
        assert_eq!(shape(eight.all_reduce(8 << 20, false)), (Algorithm::TwoShot, 256, 256));
        assert_eq!(shape(eight.all_reduce(64 << 20, false)), (Algorithm::TwoShot, 264, 256));
        assert_eq!(eight.all_reduce(64 << 20, true).algorithm, Algorithm::Cells);
        assert_eq!(limits(2, None).all_reduce(256 << 10, false).algorithm, Algorithm::OneShot);
        assert_eq!(limits(4, Some(Algorithm::Staged)).all_reduce(8, false).algorithm, Algorithm::Staged);
    }

    #[test]
    fn quantised_rows_have_room_and_enough_warps() {
        for (world, slots) in (2..=8).flat_map(|world| [512, 67_584].map(|slots| (world, slots))) {
            let limits = Limits { lamport_slots: slots, ..limits(world, None) };
            for count in (0..33).flat_map(|shift| [1_usize << shift, (1 << shift) + 1]) {
                let Shape { grid, block } = limits.all_reduce_quantized(count).shape;
                let (warps, rows) = ((grid * block / 32) as usize, count.div_ceil(512).div_ceil(world));
                assert!(block.is_multiple_of(32) && block <= 256 && grid <= 264 && warps * 33 <= slots);
                assert!(warps >= rows || warps >= world, "{count}: {grid} x {block}");
            }
        }
        let shape = limits(8, None).all_reduce_quantized(4 << 20).shape;
        assert_eq!((shape.grid, shape.block), (128, 256));
    }

    #[test]
    fn norms_are_fused_where_a_row_fits() {
        let eight = limits(8, None);
        assert_eq!(eight.norm(1, 16_384).algorithm, Algorithm::OneShot);
        assert_eq!(eight.norm(128, 16_384).algorithm, Algorithm::TwoShot);
        assert_eq!(limits(2, None).norm(128, 32_768).algorithm, Algorithm::Composed);
        for tokens in [1, 3, 17, 1000, 16_384] {
            for row in [2, 1024, 5760, 16_384, 28_672, 32_768] {
                for world in 2..=8 {
                    let plan = limits(world, None).norm(tokens, row);
                    let threads = plan.shape.grid as usize * plan.shape.block as usize;
                    match plan.algorithm {
                        Algorithm::OneShot => {
                            assert!(threads <= 33_792 && threads >= tokens * row.div_ceil(12), "{plan:?}");
                        }
                        Algorithm::TwoShot => assert!(threads <= 67_584, "{plan:?}"),
                        _ => {}
                    }
                }
            }
        }
    }
}
