//! All-reduces in two kernels, and a third for what is less than a pack a rank: a reduce-scatter into a slice of the result,
//! and an all-gather of the slices. None asks where the result lies.

use super::{Limits, PACK, Plan};
use crate::usage::Algorithm;

impl Limits {
    /// The plans of the two, for slices of `part` bytes.
    pub(crate) fn parts_of_all_reduce(&self, part: usize) -> (Plan, Plan) {
        let sums = match self.reduce_scatter(part) {
            plan if plan.algorithm == Algorithm::Staged => {
                self.forcing(Algorithm::TwoShot).reduce_scatter(part)
            }
            plan => plan,
        };
        let copies = match self.all_gather(part, false) {
            plan if plan.algorithm == Algorithm::Staged => {
                self.forcing(Algorithm::Packets).all_gather(part, false)
            }
            plan => plan,
        };
        (sums, copies)
    }

    pub(super) fn composed(&self) -> Plan {
        self.plan(Algorithm::Composed, super::Shape { grid: 0, block: 0 })
    }
}

/// Elements of `size` bytes in each rank's slice: whole packs, so that slices are aligned as the operands are.
pub(crate) fn slice(count: usize, size: usize, world: usize) -> usize {
    let pack = PACK / size;
    count / world / pack * pack
}

#[cfg(test)]
mod tests {
    use super::super::tests::{launchable, limits, rooms};
    use super::*;

    #[test]
    fn both_parts_can_be_launched_whatever_is_forced() {
        use Algorithm as A;
        for (world, room) in (2..=8).flat_map(|world| rooms().map(|room| (world, room))) {
            for forced in [None, Some(A::Composed), Some(A::Staged), Some(A::OneShot), Some(A::Direct)] {
                let limits = Limits { room, ..limits(world, forced) };
                for part in (4..30).map(|shift| 1_usize << shift) {
                    let (sums, copies) = limits.parts_of_all_reduce(part);
                    assert!(
                        matches!(sums.algorithm, A::TwoShot | A::Cells | A::Lines | A::Steps),
                        "{sums:?}"
                    );
                    assert!(matches!(copies.algorithm, A::Packets | A::Lines), "{copies:?}");
                    launchable(&limits, &sums, false);
                    launchable(&limits, &copies, false);
                }
            }
        }
    }

    #[test]
    fn slices_are_whole_packs_and_leave_little() {
        for (count, size, world) in [(1, 2, 2), (63, 2, 8), (64, 2, 8), (1_000_003, 4, 3), (1 << 20, 2, 8)] {
            let slice = slice(count, size, world);
            assert!((slice * size).is_multiple_of(PACK) && slice * world <= count);
            assert!((count - slice * world) * size < world * PACK);
        }
    }
}
