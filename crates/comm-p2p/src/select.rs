//! From what the table says to a launch: pure functions of what all ranks share.
//!
//! [`comm_core::tuning`] chooses by size. Here the choice is fitted to this communicator's memory and devices, and what
//! cannot be launched gives way, in this order, each for every size:
//!
//! 1. the forced algorithm (`COMM_P2P_ALGO`), in the shape that the table has for it, if the operation has it and it can
//!    be launched here: its packs fit, and the result is registered where it must be;
//! 2. the table's row for the size, under the same conditions;
//! 3. for long parts whose row is lines, where none can be sent: cells, or direct stores if the result is registered;
//! 4. what takes every size anywhere: two-shot for sums, packets for gathers, relays for broadcasts, and for a norm
//!    two-shot and else an all-reduce with a norm of its own.

use std::sync::Arc;

use comm_core::OpKind;
use comm_core::tuning::{Choice, Table};
use comm_kernels::p2p::{BURST_BYTES, BURST_PACKS, FLAG_CTAS, MAX_LINE_BLOCK, Shape, Units};

pub(crate) use self::composed::slice;
pub(crate) use self::gaps::Gaps;
use crate::room::Room;
use crate::usage::Algorithm;

mod average;
mod composed;
mod gaps;
mod uneven;

/// What the choice depends on besides the operation and its size. Equal on all ranks.
#[derive(Clone, Debug)]
pub(crate) struct Limits {
    pub(crate) world: usize,
    pub(crate) packet_slots: usize,
    pub(crate) lamport_slots: usize,
    pub(crate) line_slots: usize,
    pub(crate) cell_ctas: usize,
    pub(crate) room: Room,
    pub(crate) forced: Option<Algorithm>,
    pub(crate) gaps: Option<Gaps>,
    pub(crate) table: Arc<Table<Algorithm>>,
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
/// The longest part or slice that goes by packs where lines would be the best and cannot be sent.
const SHORT: usize = 512 << 10;

impl Limits {
    /// The plan for `bytes` bytes of the full buffer. `launch` fits a choice, or says that it cannot be launched; `last`
    /// always can.
    fn pick(
        &self,
        (op, registered, bytes): (OpKind, bool, usize),
        last: Algorithm,
        launch: impl Fn(&Choice<Algorithm>) -> Option<Plan>,
    ) -> Plan {
        let bytes = bytes as u64;
        let forced =
            self.forced.and_then(|algorithm| launch(&self.forced_choice(op, registered, bytes, algorithm)));
        let chosen = || launch(self.table.choose(op, registered, bytes)?);
        forced.or_else(chosen).or_else(|| launch(&Choice::of(last))).unwrap_or(self.staged())
    }

    /// The same with an algorithm forced.
    fn forcing(&self, algorithm: Algorithm) -> Self {
        Self { forced: Some(algorithm), ..self.clone() }
    }

    /// The shape that the table has for an algorithm nearest to a size, from below if it can be.
    fn forced_choice(
        &self,
        op: OpKind,
        registered: bool,
        bytes: u64,
        algorithm: Algorithm,
    ) -> Choice<Algorithm> {
        let rows = self.table.rule(op, registered).map_or(&[][..], |rule| &rule.rows);
        let mut of_it = rows.iter().filter(|row| row.choice.algorithm == algorithm);
        let first = of_it.clone().next();
        let below = of_it.rfind(|row| row.from <= bytes);
        below.or(first).map_or(Choice::of(algorithm), |row| row.choice)
    }

    /// Blocks and threads for `packs` packs: one pack a thread until the device is full. `table`: threads of a block by
    /// packs, where the choice leaves them open.
    fn spread(
        &self,
        choice: &Choice<Algorithm>,
        packs: usize,
        slots: usize,
        table: &[(usize, u32)],
    ) -> Shape {
        let wanted = packs.clamp(1, slots);
        let by_packs = || table.iter().find(|&&(most, _)| wanted <= most).map_or(512, |&(_, block)| block);
        let block = choice.block.unwrap_or_else(by_packs);
        // Two blocks of up to 256 threads are resident on every multiprocessor.
        let resident = self.room.blocks(if block <= 256 { 2 } else { 1 });
        let grid = wanted.div_ceil(block as usize).min(slots / block as usize).max(1);
        let most = choice.grid.map_or(resident, |most| most.min(resident));
        Shape { grid: u32::try_from(grid).unwrap_or(u32::MAX).min(most), block }
    }

    fn plan(&self, algorithm: Algorithm, shape: Shape) -> Plan {
        Plan { algorithm, shape, chunk: 0, units: Units::Two }
    }

    /// Blocks of a kernel that has as many as fit.
    fn full(&self, choice: &Choice<Algorithm>, most: usize) -> u32 {
        choice.grid.unwrap_or(u32::MAX).min(self.room.multiprocessors()).min(most as u32)
    }

    fn cells(&self, choice: &Choice<Algorithm>) -> Plan {
        let shape = Shape { grid: self.full(choice, self.cell_ctas), block: choice.block.unwrap_or(512) };
        let units = if choice.units == Some(2) { Units::Two } else { Units::Four };
        Plan { units, ..self.plan(choice.algorithm, shape) }
    }

    /// Sums in steps.
    fn sum_steps(&self, choice: &Choice<Algorithm>) -> Plan {
        let grid = self.full(choice, FLAG_CTAS as usize);
        self.plan(choice.algorithm, Shape { grid, block: choice.block.unwrap_or(512) })
    }

    fn direct(&self, choice: &Choice<Algorithm>) -> Plan {
        let grid = self.full(choice, FLAG_CTAS as usize);
        let shape = Shape { grid, block: choice.block.unwrap_or(256) };
        Plan { chunk: choice.chunk.unwrap_or(4096), ..self.plan(choice.algorithm, shape) }
    }

    fn packets(&self, choice: &Choice<Algorithm>, packs: usize) -> Shape {
        self.spread(choice, packs, self.packet_slots, &[(6 << 10, 128), (64 << 10, 256)])
    }

    fn lamport(&self, choice: &Choice<Algorithm>, packs: usize) -> Shape {
        self.spread(choice, packs, self.lamport_slots, &[(4 << 10, 64), (8 << 10, 128), (usize::MAX, 256)])
    }

    /// Lines for slices of `bytes` bytes: as few rounds as the slots allow, and in these as few warps a block as the
    /// multiprocessors allow. `None` where no lines are sent.
    fn lines(&self, choice: &Choice<Algorithm>, bytes: usize) -> Option<Plan> {
        let blocks = self.full(choice, FLAG_CTAS as usize).max(1) as usize;
        let most = (self.line_slots / BURST_PACKS).min(blocks * MAX_LINE_BLOCK as usize / 32);
        let bursts = bytes.div_ceil(BURST_BYTES).max(1);
        let warps = bursts.div_ceil(bursts.div_ceil(most.max(1)));
        let a_block =
            choice.block.map_or(warps.div_ceil(blocks), |block| block.min(MAX_LINE_BLOCK) as usize / 32);
        let grid = warps.div_ceil(a_block).min(most / a_block);
        let shape = Shape {
            grid: u32::try_from(grid).unwrap_or(u32::MAX).min(blocks as u32),
            block: a_block as u32 * 32,
        };
        (grid > 0).then_some(self.plan(choice.algorithm, shape))
    }

    /// A sum all-reduce of `bytes` bytes of bf16, f16 or f32.
    pub(crate) fn all_reduce(&self, bytes: usize, registered: bool) -> Plan {
        if let Some(plan) = self.with_gaps(|| self.in_cube(self.cube_all_reduce(bytes).1)) {
            return plan;
        }
        let packs = bytes.div_ceil(PACKET_PAYLOAD);
        let slice = bytes.div_ceil(PACK).div_ceil(self.world);
        let launch = |choice: &Choice<Algorithm>| match choice.algorithm {
            Algorithm::OneShot if packs <= self.packet_slots => {
                Some(self.plan(choice.algorithm, self.packets(choice, packs)))
            }
            Algorithm::Lamport if bytes.div_ceil(PACK) <= self.lamport_slots => {
                Some(self.plan(choice.algorithm, self.lamport(choice, bytes.div_ceil(PACK))))
            }
            Algorithm::TwoShot => Some(self.plan(choice.algorithm, self.lamport(choice, slice))),
            Algorithm::Cells if registered => Some(self.cells(choice)),
            Algorithm::Steps if registered => Some(self.sum_steps(choice)),
            // Where lines are forced, both parts go by them.
            Algorithm::Composed | Algorithm::Lines => Some(self.composed()),
            Algorithm::Pull => Some(self.pull(choice, bytes)),
            Algorithm::Staged => Some(self.staged()),
            _ => None,
        };
        self.pick((OpKind::AllReduce, registered, bytes), Algorithm::TwoShot, launch)
    }

    /// A sum reduce-scatter of `part` bytes a rank.
    pub(crate) fn reduce_scatter(&self, part: usize) -> Plan {
        if let Some(plan) = self.with_gaps(|| None) {
            return plan;
        }
        let launch = |choice: &Choice<Algorithm>| match choice.algorithm {
            Algorithm::TwoShot => {
                Some(self.plan(choice.algorithm, self.lamport(choice, part.div_ceil(PACK))))
            }
            Algorithm::Cells => Some(self.cells(choice)),
            Algorithm::Lines => {
                let cells = || (part > SHORT).then(|| self.cells(&Choice::of(Algorithm::Cells)));
                self.lines(choice, part).or_else(cells)
            }
            Algorithm::Steps => Some(self.sum_steps(choice)),
            Algorithm::Staged => Some(self.staged()),
            _ => None,
        };
        let total = part.saturating_mul(self.world);
        self.pick((OpKind::ReduceScatter, false, total), Algorithm::TwoShot, launch)
    }

    /// An all-gather of `part` bytes a rank.
    pub(crate) fn all_gather(&self, part: usize, registered: bool) -> Plan {
        if let Some(plan) = self.with_gaps(|| self.in_cube(self.cube_all_gather(part))) {
            return plan;
        }
        let packs = part.div_ceil(PACKET_PAYLOAD);
        let launch = |choice: &Choice<Algorithm>| match choice.algorithm {
            Algorithm::Packets => {
                let table = [(2 << 10, 64), (22 << 10, 256)];
                let shape = self.spread(choice, packs, self.packet_slots, &table);
                Some(self.plan(choice.algorithm, shape))
            }
            Algorithm::Lines => {
                let direct =
                    || (registered && part > SHORT).then(|| self.direct(&Choice::of(Algorithm::Direct)));
                self.lines(choice, part).or_else(direct)
            }
            Algorithm::Direct if registered => Some(self.direct(choice)),
            Algorithm::Spread if registered => {
                let shape =
                    Shape { grid: self.full(choice, FLAG_CTAS as usize), block: choice.block.unwrap_or(64) };
                Some(self.plan(choice.algorithm, shape))
            }
            Algorithm::Steps if registered => {
                // Half the multiprocessors: with less under way a step ends more sharply.
                let all = self.room.multiprocessors();
                let half = all.div_ceil(2).min(FLAG_CTAS);
                let grid = choice.grid.map_or(half, |grid| grid.min(all));
                Some(self.plan(choice.algorithm, Shape { grid, block: choice.block.unwrap_or(32) }))
            }
            Algorithm::Staged => Some(self.staged()),
            _ => None,
        };
        let total = part.saturating_mul(self.world);
        self.pick((OpKind::AllGather, registered, total), Algorithm::Packets, launch)
    }

    /// A broadcast of `bytes` bytes.
    pub(crate) fn broadcast(&self, bytes: usize, registered: bool) -> Plan {
        if let Some(plan) = self.with_gaps(|| None) {
            return plan;
        }
        let packs = bytes.div_ceil(PACKET_PAYLOAD);
        let launch = |choice: &Choice<Algorithm>| match choice.algorithm {
            Algorithm::Packets if packs <= self.packet_slots => {
                Some(self.plan(choice.algorithm, self.packets(choice, packs)))
            }
            Algorithm::Relayed => {
                let slice = packs.div_ceil(self.world - 1);
                Some(self.plan(choice.algorithm, self.packets(choice, slice)))
            }
            Algorithm::Lines => {
                let slice = bytes.div_ceil(self.world - 1);
                let direct =
                    || (registered && slice > SHORT).then(|| self.direct(&Choice::of(Algorithm::Direct)));
                self.lines(choice, slice).or_else(direct)
            }
            Algorithm::Direct if registered => Some(self.direct(choice)),
            Algorithm::Staged => Some(self.staged()),
            _ => None,
        };
        self.pick((OpKind::Broadcast, registered, bytes), Algorithm::Relayed, launch)
    }

    /// A fused norm of `tokens` rows of `row` bytes. `OneShot` and `Lamport` take one hop, with the cluster in `chunk`;
    /// `Composed` for an all-reduce and a norm of their own. A choice can only bound the blocks: their threads follow
    /// from the row.
    pub(crate) fn norm(&self, tokens: usize, row: usize) -> Plan {
        let one_hop = |algorithm: Algorithm| {
            let (payload, slots) = match algorithm {
                Algorithm::Lamport => (PACK, self.lamport_slots),
                _ => (PACKET_PAYLOAD, self.packet_slots),
            };
            let packs = row.div_ceil(payload);
            let of_clusters = |cluster: usize| {
                let block = packs.div_ceil(cluster).next_multiple_of(32);
                let grid = tokens.checked_mul(cluster)?;
                let most = self.room.multiprocessors() as usize;
                let fits = block <= 512 && grid <= most && grid * block <= slots;
                let shape = Shape { grid: grid as u32, block: block as u32 };
                let plan = Plan { chunk: cluster as u32, ..self.plan(algorithm, shape) };
                fits.then_some(plan)
            };
            let clusters: &[usize] = match packs {
                ..=128 => &[1],
                // The share of a device may have no room for the best.
                _ if self.room.is_shared() => &[8, 4, 2, 1],
                _ => &[8],
            };
            clusters.iter().find_map(|&cluster| of_clusters(cluster))
        };
        let two_hops = |choice: &Choice<Algorithm>| {
            let block = row.div_ceil(PACK).div_ceil(self.world).next_multiple_of(32);
            let per_sm = match block {
                ..=128 => 4,
                129..=256 => 2,
                _ => 1,
            };
            let most = choice.grid.map_or(usize::MAX, |most| most as usize);
            let resident = self.room.blocks(per_sm) as usize;
            let grid = tokens.min(resident).min(self.lamport_slots / block).min(most);
            let shape = Shape { grid: grid as u32, block: block as u32 };
            (block <= 512 && grid > 0).then_some(self.plan(Algorithm::TwoShot, shape))
        };
        if self.gaps.is_some() {
            return self.composed();
        }
        let launch = |choice: &Choice<Algorithm>| match choice.algorithm {
            Algorithm::OneShot | Algorithm::Lamport => one_hop(choice.algorithm),
            Algorithm::TwoShot => two_hops(choice),
            Algorithm::Composed => Some(self.composed()),
            _ => None,
        };
        let last = if two_hops(&Choice::of(Algorithm::TwoShot)).is_some() {
            Algorithm::TwoShot
        } else {
            Algorithm::Composed
        };
        self.pick((OpKind::AllReduceRmsNorm, false, tokens.saturating_mul(row)), last, launch)
    }

    fn staged(&self) -> Plan {
        self.plan(Algorithm::Staged, Shape { grid: 0, block: 0 })
    }
}

#[cfg(test)]
pub(crate) mod tests;
