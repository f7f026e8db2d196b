//! Large results that the other ranks cannot reach: how a piece of one is stored into staging memory.

use super::{Limits, Plan};
use crate::usage::Algorithm;

impl Limits {
    /// The plan for each piece of a sum all-reduce of `bytes` bytes. Stores only if the call's plan is to bounce.
    pub(crate) fn bounced_all_reduce(&self, bytes: usize) -> Plan {
        self.storing(Algorithm::Cells).all_reduce(bytes.min(self.staging), true)
    }

    /// The same for an all-gather of `part` bytes a rank.
    pub(crate) fn bounced_all_gather(&self, part: usize) -> Plan {
        self.storing(Algorithm::Direct).all_gather(part.min(self.staging / self.world), true)
    }

    /// The same for a broadcast of `bytes` bytes.
    pub(crate) fn bounced_broadcast(&self, bytes: usize) -> Plan {
        self.storing(Algorithm::Direct).broadcast(bytes.min(self.staging), true)
    }

    /// Where bouncing is forced, `algorithm` is what stores at every size.
    fn storing(&self, algorithm: Algorithm) -> Self {
        let forced = self.forced.map(|forced| if forced == Algorithm::Bounce { algorithm } else { forced });
        Self { forced, ..self.clone() }
    }

    /// The plan of a call, given its pieces': it bounces only where they are large enough to be stored.
    pub(super) fn bounce(&self, piece: Plan) -> Option<Plan> {
        use Algorithm as A;
        let stores = matches!(piece.algorithm, A::Cells | A::Steps | A::Direct | A::Spread);
        stores.then_some(Plan { algorithm: A::Bounce, ..piece })
    }
}

/// `total` in pieces of equal length, up to 16 bytes, of at most `room`: where each begins, and its length.
pub(crate) fn pieces(total: usize, room: usize) -> impl Iterator<Item = (usize, usize)> {
    let room = (room / 16 * 16).max(16);
    let piece = total.div_ceil(total.div_ceil(room).max(1)).next_multiple_of(16).max(16);
    (0..total).step_by(piece).map(move |begin| (begin, piece.min(total - begin)))
}

/// The same for parts that lie behind one another in staging memory: what is left over of whole 16 bytes is a piece of its
/// own, so that all others are aligned there.
pub(crate) fn pieces_of_parts(part: usize, room: usize) -> impl Iterator<Item = (usize, usize)> {
    let whole = part / 16 * 16;
    pieces(whole, room).chain((whole < part).then_some((whole, part - whole)))
}

#[cfg(test)]
mod tests {
    use super::super::tests::limits;
    use super::*;

    #[test]
    fn pieces_cover_everything_once_and_fit() {
        let check = |all: &[(usize, usize)], total: usize, room: usize| {
            let mut end = 0;
            for &(begin, bytes) in all {
                assert!(begin == end && begin % 16 == 0 && bytes > 0, "{all:?}");
                assert!(bytes <= (room / 16 * 16).max(16), "{total} by {room}: {all:?}");
                end = begin + bytes;
            }
            assert_eq!(end, total);
        };
        for room in [1, 16, 100, 4096, 1 << 20] {
            for total in [1_usize, 15, 16, 17, 4095, 4096, 4097, 100_000] {
                check(&pieces(total, room).collect::<Vec<_>>(), total, room);
                let of_parts: Vec<_> = pieces_of_parts(total, room).collect();
                check(&of_parts, total, room);
                assert!(of_parts.iter().all(|&(_, bytes)| bytes % 16 == 0 || bytes < 16), "{of_parts:?}");
            }
        }
        // As many as needed, and no short one at the end that would be slow.
        assert_eq!(pieces(100, 96).collect::<Vec<_>>(), [(0, 64), (64, 36)]);
    }

    #[test]
    fn only_pieces_worth_storing_bounce() {
        use Algorithm as A;
        let four = limits(4, None);
        let bytes = 64 << 20;
        assert_eq!(four.all_reduce(bytes, false).algorithm, A::Bounce);
        assert_eq!(four.bounced_all_reduce(bytes).algorithm, A::Cells);
        assert_eq!(four.all_reduce(bytes, true).algorithm, A::Cells);
        // With little staging memory there would be many pieces, each too short for it.
        let little = Limits { staging: 64 << 10, ..limits(4, None) };
        assert_eq!(little.all_reduce(bytes, false).algorithm, A::TwoShot);
        assert_eq!(little.all_gather(bytes / 4, false).algorithm, A::Packets);
        assert_eq!(little.broadcast(bytes, false).algorithm, A::Relayed);
        // Unless it is forced.
        let forced = Limits { forced: Some(A::Bounce), ..little };
        assert_eq!(forced.all_reduce(64, false).algorithm, A::Bounce);
        assert_eq!(forced.bounced_all_reduce(64).algorithm, A::Cells);
        assert_eq!(forced.bounced_all_gather(64).algorithm, A::Direct);
        assert_eq!(forced.bounced_broadcast(64).algorithm, A::Direct);
    }
}
