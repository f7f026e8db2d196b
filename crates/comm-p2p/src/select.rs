//! From what the table says to a launch: pure functions of what all ranks share.
//!
//! [`comm_core::tuning`] chooses by size. Here the choice is fitted to this communicator's memory and devices, and what
//! cannot be launched gives way, in this order, each for every size:
//!
//! 1. the forced algorithm (`COMM_P2P_ALGO`), in the shape that the table has for it, if the operation has it and it can
//!    be launched here: its packs fit, and the result is registered where it must be;
//! 2. the table's row for the size, under the same conditions;
//! 3. what takes every size anywhere: two-shot for sums, packets for gathers, relays for broadcasts, and for a norm
//!    two-shot and else an all-reduce with a norm of its own.

use std::sync::Arc;

use comm_core::OpKind;
use comm_core::tuning::{Choice, Table};
use comm_kernels::p2p::{FLAG_CTAS, Shape, Units};

pub(crate) use self::gaps::Gaps;
use crate::usage::Algorithm;

mod average;
mod gaps;
mod uneven;

/// What the choice depends on besides the operation and its size. Equal on all ranks.
#[derive(Clone, Debug)]
pub(crate) struct Limits {
    pub(crate) world: usize,
    pub(crate) packet_slots: usize,
    pub(crate) lamport_slots: usize,
    pub(crate) cell_ctas: usize,
    pub(crate) multiprocessors: u32,
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
        let resident = if block <= 256 { 2 * self.multiprocessors } else { self.multiprocessors };
        let grid = wanted.div_ceil(block as usize).min(slots / block as usize).max(1);
        let most = choice.grid.map_or(resident, |most| most.min(resident));
        Shape { grid: u32::try_from(grid).unwrap_or(u32::MAX).min(most), block }
    }

    fn plan(&self, algorithm: Algorithm, shape: Shape) -> Plan {
        Plan { algorithm, shape, chunk: 0, units: Units::Two }
    }

    /// Blocks of a kernel that has as many as fit.
    fn full(&self, choice: &Choice<Algorithm>, most: usize) -> u32 {
        choice.grid.unwrap_or(u32::MAX).min(self.multiprocessors).min(most as u32)
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
            Algorithm::TwoShot => Some(self.plan(choice.algorithm, self.lamport(choice, slice))),
            Algorithm::Cells if registered => Some(self.cells(choice)),
            Algorithm::Steps if registered => Some(self.sum_steps(choice)),
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
            Algorithm::Direct if registered => Some(self.direct(choice)),
            Algorithm::Spread if registered => {
                let shape =
                    Shape { grid: self.full(choice, FLAG_CTAS as usize), block: choice.block.unwrap_or(64) };
                Some(self.plan(choice.algorithm, shape))
            }
            Algorithm::Steps if registered => {
                // Half the multiprocessors: with less under way a step ends more sharply.
                let half = (self.multiprocessors.div_ceil(2)).min(FLAG_CTAS);
                let grid = choice.grid.map_or(half, |grid| grid.min(self.multiprocessors));
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
            Algorithm::Direct if registered => Some(self.direct(choice)),
            Algorithm::Staged => Some(self.staged()),
            _ => None,
        };
        self.pick((OpKind::Broadcast, registered, bytes), Algorithm::Relayed, launch)
    }

    /// A fused norm of `tokens` rows of `row` bytes. `Packets` stands for one hop, with the cluster in `chunk`;
    /// `Composed` for an all-reduce and a norm of their own. A choice can only bound the blocks: their threads follow
    /// from the row.
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
        let two_hops = |choice: &Choice<Algorithm>| {
            let block = row.div_ceil(PACK).div_ceil(self.world).next_multiple_of(32);
            let per_sm = match block {
                ..=128 => 4,
                129..=256 => 2,
                _ => 1,
            };
            let most = choice.grid.map_or(usize::MAX, |most| most as usize);
            let grid = tokens.min(per_sm * sm).min(self.lamport_slots / block).min(most);
            let shape = Shape { grid: grid as u32, block: block as u32 };
            (block <= 512 && grid > 0).then_some(self.plan(Algorithm::TwoShot, shape))
        };
        let composed = self.plan(Algorithm::Composed, Shape { grid: 0, block: 0 });
        if self.gaps.is_some() {
            return composed;
        }
        let launch = |choice: &Choice<Algorithm>| match choice.algorithm {
            Algorithm::OneShot => one_hop(),
            Algorithm::TwoShot => two_hops(choice),
            Algorithm::Composed => Some(composed),
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
pub(crate) mod tests {
    use super::*;

    pub(crate) fn limits(world: usize, forced: Option<Algorithm>) -> Limits {
        Limits {
            world,
            packet_slots: 33_792,
            lamport_slots: 67_584,
            cell_ctas: 132,
            multiprocessors: 132,
            forced,
            gaps: None,
            table: crate::tables::of(None, "NVIDIA H200", world).unwrap().algorithms,
        }
    }

    /// Fails unless all blocks are resident at once and what is sent has room.
    pub(crate) fn launchable(limits: &Limits, plan: &Plan, registered: bool) {
        let Shape { grid, block } = plan.shape;
        assert!(grid >= 1 && (32..=512).contains(&block), "{plan:?}");
        assert!(grid <= limits.multiprocessors * if block <= 256 { 2 } else { 1 }, "{plan:?}");
        let slots = match plan.algorithm {
            Algorithm::Packets | Algorithm::Relayed | Algorithm::OneShot => limits.packet_slots,
            _ => limits.lamport_slots,
        };
        assert!(plan.shape.threads() <= slots as u64, "{plan:?}");
        let direct = plan.algorithm == Algorithm::Direct;
        assert!(!direct || registered && plan.chunk > 0 && plan.chunk.is_multiple_of(4096), "{plan:?}");
    }

    #[test]
    fn every_plan_can_be_launched() {
        for world in 2..=8 {
            for forced in [
                None,
                Some(Algorithm::OneShot),
                Some(Algorithm::TwoShot),
                Some(Algorithm::Direct),
                Some(Algorithm::Steps),
            ] {
                let limits = limits(world, forced);
                for bytes in (0..34).flat_map(|shift| [1_usize << shift, (1 << shift) + 1]) {
                    for registered in [false, true] {
                        let plans = [
                            limits.all_reduce(bytes, registered),
                            limits.reduce_scatter(bytes),
                            limits.all_gather(bytes, registered),
                            limits.broadcast(bytes, registered),
                        ];
                        for plan in plans {
                            launchable(&limits, &plan, registered);
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
        assert_eq!(eight.all_reduce(256 << 20, true).algorithm, Algorithm::Steps);
        assert_eq!(eight.all_reduce(256 << 20, false).algorithm, Algorithm::TwoShot);
        assert_eq!(eight.reduce_scatter(32 << 20).algorithm, Algorithm::Steps);
        assert_eq!(shape(eight.all_gather(8 << 20, true)), (Algorithm::Steps, 66, 32));
        assert_eq!(shape(eight.all_gather(2 << 20, true)), (Algorithm::Spread, 132, 64));
        assert_eq!(limits(2, None).all_reduce(256 << 20, true).algorithm, Algorithm::Cells);
        assert_eq!(limits(2, None).all_reduce(256 << 10, false).algorithm, Algorithm::OneShot);
        assert_eq!(limits(4, Some(Algorithm::Staged)).all_reduce(8, false).algorithm, Algorithm::Staged);
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
