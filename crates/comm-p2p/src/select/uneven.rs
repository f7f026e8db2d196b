//! The choice for parts that differ from rank to rank: what even parts as long as the longest would take, because the rank
//! that has it takes as long; and of that, what there is for uneven parts.

use super::{Limits, Plan, SHORT};
use crate::usage::Algorithm;

impl Limits {
    /// An all-gather of parts of up to `longest` bytes.
    pub(crate) fn all_gather_v(&self, longest: usize, registered: bool) -> Plan {
        self.uneven([Algorithm::Packets, Algorithm::Direct], longest, |limits| {
            limits.all_gather(longest, registered)
        })
    }

    /// A sum reduce-scatter of parts of up to `longest` bytes.
    pub(crate) fn reduce_scatter_v(&self, longest: usize) -> Plan {
        self.uneven([Algorithm::TwoShot, Algorithm::Cells], longest, |limits| limits.reduce_scatter(longest))
    }

    /// Steps, spreading and lines are for even parts. Instead of these go `short` parts, or `long` ones if that can be.
    fn uneven(&self, [short, long]: [Algorithm; 2], longest: usize, choose: impl Fn(&Self) -> Plan) -> Plan {
        if self.gaps.is_some() {
            return self.staged();
        }
        let plan = choose(self);
        if !matches!(plan.algorithm, Algorithm::Steps | Algorithm::Spread | Algorithm::Lines) {
            return plan;
        }
        let force = |algorithm| choose(&self.forcing(algorithm));
        let stored = (longest > SHORT || plan.algorithm != Algorithm::Lines).then(|| force(long));
        stored.filter(|plan| plan.algorithm == long).unwrap_or_else(|| force(short))
    }
}

#[cfg(test)]
mod tests {
    use super::super::Gaps;
    use super::super::tests::{launchable, limits, rooms};
    use super::*;

    #[test]
    fn uneven_parts_go_by_what_there_is_for_them() {
        use Algorithm as A;
        let forced = [
            None,
            Some(A::Steps),
            Some(A::Spread),
            Some(A::Lines),
            Some(A::Staged),
            Some(A::Packets),
            Some(A::OneShot),
        ];
        for (world, room) in (2..=8).flat_map(|world| rooms().map(|room| (world, room))) {
            for forced in forced {
                let limits = Limits { room, ..limits(world, forced) };
                let right = |plan: &Plan, taken: bool, registered: bool| {
                    assert!(taken, "{plan:?}");
                    assert_eq!(plan.algorithm == A::Staged, forced == Some(A::Staged));
                    if plan.algorithm != A::Staged {
                        launchable(&limits, plan, registered);
                    }
                };
                for longest in (0..33).flat_map(|shift| [1_usize << shift, (1 << shift) + 1]) {
                    let plan = limits.reduce_scatter_v(longest);
                    right(&plan, matches!(plan.algorithm, A::TwoShot | A::Cells | A::Staged), false);
                    for registered in [false, true] {
                        let plan = limits.all_gather_v(longest, registered);
                        let taken = matches!(plan.algorithm, A::Packets | A::Direct | A::Staged);
                        right(&plan, taken, registered);
                    }
                }
            }
        }
        let eight = limits(8, None);
        assert_eq!(eight.all_gather_v(1 << 10, true).algorithm, A::Packets);
        assert_eq!(eight.all_gather_v(8 << 20, true).algorithm, A::Direct);
        assert_eq!(eight.all_gather_v(8 << 20, false).algorithm, A::Packets);
        assert_eq!(eight.reduce_scatter_v(1 << 10).algorithm, A::TwoShot);
        assert_eq!(eight.reduce_scatter_v(32 << 20).algorithm, A::Cells);
        let gaps = Limits { gaps: Some(Gaps::Cube), ..eight };
        assert_eq!(gaps.all_gather_v(8, true).algorithm, A::Staged);
        assert_eq!(gaps.reduce_scatter_v(8).algorithm, A::Staged);
    }
}
