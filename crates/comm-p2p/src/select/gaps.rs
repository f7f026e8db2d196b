//! What is left of the choice in a mesh with gaps, and the launch of the all-reduce by reading.

use comm_core::tuning::Choice;
use comm_kernels::p2p::{FLAG_CTAS, Shape};

use super::{Limits, PACK, PACKET_PAYLOAD, Plan};
use crate::usage::Algorithm;

/// A mesh in which ranks may touch their neighbours' memory alone.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Gaps {
    /// A hybrid cube mesh of eight ranks.
    Cube,
    /// Another, as of some of these.
    Mesh,
}

/// In a hybrid cube mesh, sums of more bytes go in slices: where seven peers get too much in one hop elsewhere, too. Not
/// measured on such a machine.
const ONE_HOP: usize = 64 << 10;

impl Limits {
    /// With gaps: the cube's algorithm, if there is one and the ranks are a cube, or staging.
    pub(super) fn with_gaps(&self, cube: impl FnOnce() -> Option<Plan>) -> Option<Plan> {
        let gaps = self.gaps?;
        let own = if gaps == Gaps::Cube && self.forced != Some(Algorithm::Staged) { cube() } else { None };
        Some(own.unwrap_or_else(|| self.staged()))
    }

    pub(super) fn in_cube(&self, shape: Shape) -> Option<Plan> {
        Some(self.plan(Algorithm::CubeMesh, shape))
    }

    /// In a hybrid cube mesh: whether a sum all-reduce goes in slices, and its shape.
    pub(crate) fn cube_all_reduce(&self, bytes: usize) -> (bool, Shape) {
        let packs = bytes.div_ceil(PACKET_PAYLOAD);
        let slices = bytes > ONE_HOP || packs > self.packet_slots;
        let choice = Choice::of(Algorithm::CubeMesh);
        (slices, self.packets(&choice, if slices { packs.div_ceil(8) } else { packs }))
    }

    pub(super) fn cube_all_gather(&self, part: usize) -> Shape {
        self.packets(&Choice::of(Algorithm::CubeMesh), part.div_ceil(PACKET_PAYLOAD))
    }

    pub(super) fn pull(&self, choice: &Choice<Algorithm>, bytes: usize) -> Plan {
        let shape = self.spread(choice, bytes.div_ceil(PACK), 128 << 10, &[(usize::MAX, 256)]);
        self.plan(Algorithm::Pull, Shape { grid: shape.grid.min(FLAG_CTAS), ..shape })
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{limits, rooms};
    use super::*;

    #[test]
    fn meshes_with_gaps_use_what_keeps_to_neighbours() {
        for forced in [None, Some(Algorithm::OneShot), Some(Algorithm::Cells), Some(Algorithm::Pull)] {
            for gaps in [Gaps::Cube, Gaps::Mesh] {
                let cube = if gaps == Gaps::Cube { Algorithm::CubeMesh } else { Algorithm::Staged };
                let sizes = || (0..34).flat_map(|shift| [1_usize << shift, (1 << shift) + 1]);
                for (room, bytes) in
                    rooms().into_iter().flat_map(|room| sizes().map(move |bytes| (room, bytes)))
                {
                    let limits = Limits { gaps: Some(gaps), room, ..limits(8, forced) };
                    for plan in [limits.all_reduce(bytes, true), limits.all_gather(bytes, true)] {
                        assert_eq!(plan.algorithm, cube);
                        let threads = plan.shape.threads();
                        assert!(cube == Algorithm::Staged || (32..=33_792).contains(&threads), "{plan:?}");
                        assert!(plan.shape.grid <= room.blocks(2), "{plan:?} in {room:?}");
                    }
                    let (slices, shape) = limits.cube_all_reduce(bytes);
                    assert!(slices || bytes.div_ceil(12) <= 33_792 && shape.block >= 32);
                    assert_eq!(limits.broadcast(bytes, true).algorithm, Algorithm::Staged);
                    assert_eq!(limits.reduce_scatter(bytes).algorithm, Algorithm::Staged);
                    assert_eq!(limits.norm(1, bytes).algorithm, Algorithm::Composed);
                }
            }
        }
        let staged = Limits { gaps: Some(Gaps::Cube), ..limits(8, Some(Algorithm::Staged)) };
        assert_eq!(staged.all_reduce(8, false).algorithm, Algorithm::Staged);
        let pull = limits(3, Some(Algorithm::Pull)).all_reduce(1 << 30, false);
        assert!(pull.algorithm == Algorithm::Pull && pull.shape.grid <= FLAG_CTAS);
    }
}
