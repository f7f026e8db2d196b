//! The choice for averages: what a sum on unregistered results would take, as far as it goes by packs. Large ones take two
//! shots, which any size does.

use super::{Limits, Plan};
use crate::usage::Algorithm;

impl Limits {
    /// An average all-reduce of `bytes` bytes of bf16, f16 or f32.
    pub(crate) fn all_reduce_average(&self, bytes: usize) -> Plan {
        self.by_packs(|limits| limits.all_reduce(bytes, false))
    }

    /// An average reduce-scatter of `part` bytes a rank, or of uneven parts of up to as many.
    pub(crate) fn reduce_scatter_average(&self, part: usize) -> Plan {
        self.by_packs(|limits| limits.reduce_scatter(part))
    }

    fn by_packs(&self, choose: impl Fn(&Self) -> Plan) -> Plan {
        if self.gaps.is_some() {
            return self.staged();
        }
        let force = |algorithm| choose(&self.forcing(algorithm));
        let by_packs = |plan: &Plan| {
            matches!(plan.algorithm, Algorithm::OneShot | Algorithm::TwoShot | Algorithm::Staged)
        };
        let plan = match choose(self) {
            plan if plan.algorithm == Algorithm::Lamport => force(Algorithm::OneShot),
            plan => plan,
        };
        if by_packs(&plan) { plan } else { force(Algorithm::TwoShot) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Gaps;
    use super::super::tests::{launchable, limits, rooms};
    use super::*;

    #[test]
    fn averages_go_by_packs() {
        use Algorithm as A;
        for (world, room) in (2..=8).flat_map(|world| rooms().map(|room| (world, room))) {
            for forced in [
                None,
                Some(A::OneShot),
                Some(A::Cells),
                Some(A::Steps),
                Some(A::Lines),
                Some(A::Lamport),
                Some(A::Composed),
                Some(A::Pull),
                Some(A::Staged),
            ] {
                let limits = Limits { room, ..limits(world, forced) };
                for bytes in (0..33).flat_map(|shift| [1_usize << shift, (1 << shift) + 1]) {
                    for plan in [limits.all_reduce_average(bytes), limits.reduce_scatter_average(bytes)] {
                        assert_eq!(plan.algorithm == A::Staged, forced == Some(A::Staged), "{plan:?}");
                        assert!(matches!(plan.algorithm, A::OneShot | A::TwoShot | A::Staged), "{plan:?}");
                        if plan.algorithm != A::Staged {
                            launchable(&limits, &plan, false);
                        }
                    }
                }
            }
        }
        let eight = limits(8, None);
        assert_eq!(eight.all_reduce_average(1 << 10).algorithm, A::OneShot);
        assert_eq!(eight.all_reduce_average(256 << 20).algorithm, A::TwoShot);
        assert_eq!(eight.reduce_scatter_average(32 << 20).algorithm, A::TwoShot);
        let gaps = Limits { gaps: Some(Gaps::Cube), ..eight };
        assert_eq!(gaps.all_reduce_average(8).algorithm, A::Staged);
    }
}
