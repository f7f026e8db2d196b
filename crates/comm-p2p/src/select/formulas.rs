//! What the shipped tables were made from: thresholds measured on 8 H200, scaled by what a rank sends. Tables with
//! those rows must choose, with every launch parameter, what these formulas say.

use comm_kernels::p2p::{Shape, Units};

use super::Plan;
use super::tests::limits;
use crate::usage::Algorithm;

struct Formulas {
    world: usize,
    packet_slots: usize,
    lamport_slots: usize,
    cell_ctas: usize,
    multiprocessors: u32,
    forced: Option<Algorithm>,
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
/// From here on it reads once and stores to all, and from there on it goes in steps. Not between two ranks, which have
/// nobody to stay out of the way of.
const SPREAD_GATHER: usize = 12 << 20;
const STEPS_GATHER: usize = 24 << 20;
/// From here on sums go in steps, if their results are registered, where they must be. Not between two ranks.
const STEPS: usize = 192 << 20;
const DIRECT_BROADCAST: usize = 12 << 20;

impl Formulas {
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

    fn in_steps(&self, bytes: usize) -> bool {
        self.world > 2 && bytes >= STEPS
    }

    fn sum_steps(&self) -> Plan {
        self.plan(Algorithm::Steps, Shape { grid: self.multiprocessors, block: 512 })
    }

    fn packets(&self, packs: usize) -> Shape {
        self.spread(packs, self.packet_slots, &[(6 << 10, 128), (64 << 10, 256)])
    }

    fn lamport(&self, packs: usize) -> Shape {
        self.spread(packs, self.lamport_slots, &[(4 << 10, 64), (8 << 10, 128), (usize::MAX, 256)])
    }

    /// A sum all-reduce of `bytes` bytes of bf16, f16 or f32.
    fn all_reduce(&self, bytes: usize, registered: bool) -> Plan {
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
        } else if registered && self.in_steps(bytes) {
            self.sum_steps()
        } else if registered && bytes >= CELLS {
            cells()
        } else {
            two_shot()
        }
    }

    /// A sum reduce-scatter of `part` bytes a rank.
    fn reduce_scatter(&self, part: usize) -> Plan {
        let two_shot = || self.plan(Algorithm::TwoShot, self.lamport(part.div_ceil(PACK)));
        let cells = || self.cells(part.saturating_mul(self.world) >= 128 << 20, 512);
        match self.forced {
            Some(Algorithm::TwoShot) => two_shot(),
            Some(Algorithm::Cells) => cells(),
            Some(Algorithm::Staged) => self.staged(),
            _ if self.in_steps(part.saturating_mul(self.world)) => self.sum_steps(),
            _ if part.saturating_mul(self.world) >= CELLS => cells(),
            _ => two_shot(),
        }
    }

    /// An all-gather of `part` bytes a rank.
    fn all_gather(&self, part: usize, registered: bool) -> Plan {
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
        let total = part.saturating_mul(self.world);
        let block_of = |algorithm, grid, block| self.plan(algorithm, Shape { grid, block });
        match self.forced {
            Some(Algorithm::Packets) => packets(),
            Some(Algorithm::Direct) if registered => direct(),
            Some(Algorithm::Staged) => self.staged(),
            _ if registered && self.world > 2 && total >= STEPS_GATHER => {
                block_of(Algorithm::Steps, self.multiprocessors / 2, 32)
            }
            _ if registered && self.world > 2 && total >= SPREAD_GATHER => {
                block_of(Algorithm::Spread, self.multiprocessors, 64)
            }
            _ if registered && part.saturating_mul(self.world) >= DIRECT_GATHER => direct(),
            _ => packets(),
        }
    }

    /// A broadcast of `bytes` bytes.
    fn broadcast(&self, bytes: usize, registered: bool) -> Plan {
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
    fn norm(&self, tokens: usize, row: usize) -> Plan {
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
            let per_sm = match block {
                ..=128 => 4,
                129..=256 => 2,
                _ => 1,
            };
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

#[test]
fn shipped_rows_from_formulas_choose_what_those_say() {
    for world in 2..=8 {
        let tabled = limits(world, None);
        if !tabled.table.source().starts_with("thresholds measured on 8 H200") {
            continue;
        }
        let formulas = Formulas {
            world,
            packet_slots: tabled.packet_slots,
            lamport_slots: tabled.lamport_slots,
            cell_ctas: tabled.cell_ctas,
            multiprocessors: tabled.multiprocessors,
            forced: None,
        };
        let rows = tabled.table.rules().iter().flat_map(|rule| &rule.rows);
        let thresholds = rows.flat_map(|row| [row.from as usize, row.from as usize / world]);
        let powers = (0..36).flat_map(|shift| [1_usize << shift, 3 << shift, 5 << shift]);
        let sizes = thresholds.chain(powers).chain([6144 * 12, 65_536 * world, 131_072 * world]);
        for bytes in sizes.flat_map(|at| at.saturating_sub(13)..=at + 13).filter(|&bytes| bytes > 0) {
            for registered in [false, true] {
                let at = format!("{bytes} bytes, {world} ranks, registered: {registered}");
                assert_eq!(
                    tabled.all_reduce(bytes, registered),
                    formulas.all_reduce(bytes, registered),
                    "{at}"
                );
                assert_eq!(
                    tabled.all_gather(bytes, registered),
                    formulas.all_gather(bytes, registered),
                    "{at}"
                );
                assert_eq!(
                    tabled.broadcast(bytes, registered),
                    formulas.broadcast(bytes, registered),
                    "{at}"
                );
            }
            assert_eq!(
                tabled.reduce_scatter(bytes),
                formulas.reduce_scatter(bytes),
                "{bytes}, {world} ranks"
            );
        }
        for tokens in (1..200).chain([512, 1024, 4096, 16_384]) {
            for row in [2, 1024, 3000, 5760, 8192, 16_384, 28_672, 32_768, 100_000] {
                assert_eq!(
                    tabled.norm(tokens, row),
                    formulas.norm(tokens, row),
                    "{tokens} x {row}, {world} ranks"
                );
            }
        }
    }
}
