//! What is worth measuring when a table is made: each algorithm in the shapes that have ever been the fastest somewhere.

use comm_core::OpKind;
use comm_core::tuning::Choice;

use crate::tables::of_op;
use crate::usage::Algorithm;

/// The operations that are chosen for by size, and for which results: of those that have a rule of their own for results
/// that every rank can reach, once for these and once for others.
pub const TUNABLE: [(OpKind, bool); 8] = [
    (OpKind::AllReduce, false),
    (OpKind::AllReduce, true),
    (OpKind::AllGather, false),
    (OpKind::AllGather, true),
    (OpKind::ReduceScatter, false),
    (OpKind::Broadcast, false),
    (OpKind::Broadcast, true),
    (OpKind::AllReduceRmsNorm, false),
];

/// The choices to measure for an operation: first every algorithm by itself, then its shapes. Which of them can be
/// launched depends on the size and the communicator: see [`P2pComm::planned`](crate::P2pComm::planned).
#[must_use]
pub fn candidates(op: OpKind) -> Vec<Choice> {
    let algorithms = of_op(op).iter().filter(|&&algorithm| may_be_fastest(algorithm));
    let mut plain = Vec::new();
    let mut shaped = Vec::new();
    for &algorithm in algorithms {
        let choice = Choice::of(algorithm.name().to_owned());
        shaped.extend(shapes(op, algorithm, &choice));
        plain.push(choice);
    }
    plain.extend(shaped);
    plain
}

/// Staging is what remains where nothing else can be used, and reading is a check of the others.
const fn may_be_fastest(algorithm: Algorithm) -> bool {
    !matches!(algorithm, Algorithm::Staged | Algorithm::Pull)
}

/// An algorithm without shapes here is measured by itself alone.
fn shapes(op: OpKind, algorithm: Algorithm, plain: &Choice) -> Vec<Choice> {
    use Algorithm as A;
    let mut shapes = Vec::new();
    let mut add = |grid: Option<u32>, block: Option<u32>, chunk: Option<u32>, units: Option<u32>| {
        shapes.push(Choice { grid, block, chunk, units, ..plain.clone() });
    };
    match (op, algorithm) {
        // The threads of a norm's blocks follow from its rows.
        (OpKind::AllReduceRmsNorm, A::TwoShot) => {
            for grid in [32, 64, 132, 264] {
                add(Some(grid), None, None, None);
            }
        }
        (OpKind::AllReduceRmsNorm, _) => {}
        (_, A::OneShot | A::Lamport | A::Packets | A::Relayed) => {
            for block in [64, 128, 256, 512] {
                add(None, Some(block), None, None);
            }
        }
        (_, A::Lines) => {
            for block in [64, 128, 160] {
                for grid in [None, Some(66)] {
                    add(grid, Some(block), None, None);
                }
            }
        }
        (_, A::TwoShot) => {
            for block in [64, 128, 256, 512] {
                for grid in [None, Some(64), Some(132)] {
                    add(grid, Some(block), None, None);
                }
            }
        }
        (_, A::Cells) => {
            for (block, units) in [(512, 4), (512, 2), (256, 2), (256, 4)] {
                for grid in [None, Some(96), Some(64), Some(32)] {
                    add(grid, Some(block), None, Some(units));
                }
            }
        }
        (_, A::Steps) => {
            for grid in [132, 96, 66, 44] {
                add(Some(grid), None, None, None);
            }
        }
        (_, A::Spread) => add(Some(66), None, None, None),
        (_, A::Direct) => {
            for (block, chunk) in
                [(256, 4096), (256, 8192), (256, 16_384), (512, 8192), (512, 16_384), (512, 32_768)]
            {
                for grid in [None, Some(128), Some(96), Some(64), Some(32)] {
                    add(grid, Some(block), Some(chunk), None);
                }
            }
        }
        _ => {}
    }
    shapes
}

#[cfg(test)]
mod tests {
    use comm_core::tuning::{Row, Rule, Table};

    use super::*;
    use crate::select::Limits;
    use crate::select::tests::{launchable, limits, rooms};
    use crate::tables::InUse;

    /// Limits whose table has nothing but one choice.
    fn only(world: usize, op: OpKind, choice: Choice) -> Limits {
        let rule = Rule { op, registered: false, rows: vec![Row { from: 0, choice }], measured: Vec::new() };
        let table = Table::new("NVIDIA H200", world, "a test", vec![rule]).unwrap();
        Limits { table: InUse::new(&table).unwrap().algorithms, ..limits(world, None) }
    }

    #[test]
    fn every_candidate_can_be_launched_or_gives_way_at_every_size() {
        for (op, registered) in TUNABLE {
            for choice in candidates(op) {
                let mut used = 0;
                for (world, room) in (2..=8).flat_map(|world| rooms().map(|room| (world, room))) {
                    let limits = Limits { room, ..only(world, op, choice.clone()) };
                    for bytes in (4..34).flat_map(|shift| [1_usize << shift, (1 << shift) + 4]) {
                        let plan = match op {
                            OpKind::AllReduce => limits.all_reduce(bytes, registered),
                            OpKind::AllGather => limits.all_gather(bytes / world, registered),
                            OpKind::ReduceScatter => limits.reduce_scatter(bytes / world),
                            OpKind::Broadcast => limits.broadcast(bytes, registered),
                            _ => {
                                let plan = limits.norm(bytes.div_ceil(16_384), 16_384);
                                used += usize::from(plan.algorithm.name() == choice.algorithm);
                                continue;
                            }
                        };
                        launchable(&limits, &plan, registered);
                        used += usize::from(plan.algorithm.name() == choice.algorithm);
                        if plan.algorithm.name() == choice.algorithm {
                            assert!(choice.block.is_none_or(|block| plan.shape.block == block), "{plan:?}");
                            assert!(choice.grid.is_none_or(|grid| plan.shape.grid <= grid), "{plan:?}");
                        }
                    }
                }
                // Cells, steps and direct stores need a result that every rank can reach.
                let needs = matches!(choice.algorithm.as_str(), "cells" | "direct" | "steps" | "spread")
                    && op != OpKind::ReduceScatter;
                assert!(used > 0 || needs && !registered, "{op} never takes {choice:?}");
            }
        }
    }

    #[test]
    fn candidates_differ_and_begin_with_the_plain_ones() {
        for (op, _) in TUNABLE {
            let all = candidates(op);
            for (index, choice) in all.iter().enumerate() {
                assert!(!all[..index].contains(choice), "{op}: {choice:?} twice");
            }
            let plain = of_op(op).iter().filter(|&&algorithm| may_be_fastest(algorithm)).count();
            assert!(all[..plain].iter().all(|choice| *choice == Choice::of(choice.algorithm.clone())));
            assert!(all.iter().all(|choice| choice.algorithm != "staged" && choice.algorithm != "pull"));
        }
    }
}
