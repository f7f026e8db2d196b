//! Which ranks have not arrived, by what all ranks report of how far they are.
//!
//! # Calls
//! A rank knows exactly how many collectives it has called, and which of its calls does not end. Who has called fewer than
//! the earliest of those takes is late.
//!
//! # Replays
//! Captured collectives are counted in runs ([`marks`](super::marks)), which the ranks may have cut differently. A rank
//! between runs is *at rest*: it has begun exactly as many collectives as its counts say. A rank inside a run is waiting in
//! one of the run's calls, and does not know in which.
//!
//! Let `J` be the earliest collective that a rank waits in. It waits because a rank has not begun `J`. That rank is at rest,
//! because those inside runs have begun `J` or more: so *late* are the ranks at rest that have begun fewer than `J`, and
//! there is one. `J` is not known, but bounded:
//!
//! - `J` is at least the lowest first call of the runs that ranks are inside of, because each waits in its run or later;
//! - `J` is at most the lowest last call of those runs, because the rank inside that one waits no later;
//! - `J` is above the lowest count of the ranks at rest, because one of them is late.
//!
//! Every `J` within these bounds may be it: the ranks inside runs can wait there or in the first call of theirs, whichever
//! is later. So the ranks at rest that have begun fewer than the least such `J` are late for certain, and of no others can
//! that be said. If there is no such `J`, no rank is late. Runs of one call have bounds that meet, and all late ranks are
//! known. If a rank says nothing, it may be the only late one, and the last of the bounds does not hold.

use super::track::Replayed;

/// How far one rank is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Report {
    /// Collectives called.
    called: u64,
    /// How many must have been called on a rank that has arrived in the call where this one waits; zero where it does not
    /// wait in a call.
    wanted: u64,
    replayed: Replayed,
}

impl Report {
    const WORDS: usize = 4;

    /// Of a rank that waits in the collective call before which it had made `stuck`, if it waits in a call.
    pub(super) fn new(called: u64, stuck: Option<u64>, replayed: Replayed) -> Self {
        Self { called, wanted: stuck.map_or(0, |before| before + 1), replayed }
    }

    pub(super) fn encode(self) -> [u8; 8 * Self::WORDS] {
        let mut bytes = [0; 8 * Self::WORDS];
        let words = [self.called, self.wanted, self.replayed.finished, self.replayed.begun];
        for (place, word) in bytes.chunks_exact_mut(8).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let (words, []) = bytes.as_chunks::<8>() else { return None };
        let &[called, wanted, finished, begun] = words else { return None };
        let number = u64::from_le_bytes;
        Some(Self {
            called: number(called),
            wanted: number(wanted),
            replayed: Replayed { finished: number(finished), begun: number(begun) },
        })
    }
}

/// The ranks that are late for certain, and those that said nothing.
pub(super) fn laggards(reports: &[Option<Report>]) -> Vec<usize> {
    let known = || reports.iter().flatten();
    let called = known().map(|report| report.wanted).filter(|&wanted| wanted > 0).min().unwrap_or(0);
    let replayed =
        replayed_by_the_punctual(known().map(|report| report.replayed), known().count() == reports.len());
    let behind = |report: &Option<Report>| {
        report.is_none_or(|Report { called: own, replayed: at, .. }| {
            own < called || at.rest().is_some_and(|begun| begun < replayed)
        })
    };
    reports.iter().enumerate().filter(|(_, report)| behind(report)).map(|(rank, _)| rank).collect()
}

/// How many collectives a rank at rest must have begun not to be late for certain; `all` ranks have reported, or not.
fn replayed_by_the_punctual(reports: impl Iterator<Item = Replayed> + Clone, all: bool) -> u64 {
    let inside = reports.clone().filter(|replayed| replayed.rest().is_none());
    let Some(first) = inside.clone().map(|replayed| replayed.finished + 1).min() else { return 0 };
    let last = inside.map(|replayed| replayed.begun).min().unwrap_or(first);
    let slowest = reports.filter_map(Replayed::rest).min();
    match slowest {
        Some(begun) if all && begun < last => first.max(begun + 1),
        _ => first,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    const NOWHERE: Replayed = Replayed { finished: 0, begun: 0 };
    const NOBODY: [usize; 0] = [];

    const fn inside(first: u64, last: u64) -> Replayed {
        Replayed { finished: first - 1, begun: last }
    }

    const fn rest(begun: u64) -> Replayed {
        Replayed { finished: begun, begun }
    }

    /// Of a rank that waits in no call.
    fn replay(replayed: Replayed) -> Option<Report> {
        Some(Report::new(20, None, replayed))
    }

    #[test]
    fn silent_and_late_ranks_are_missing() {
        let at = |called, stuck| Some(Report::new(called, stuck, NOWHERE));
        let waiting = at(5, Some(4));
        assert_eq!(laggards(&[waiting, at(4, None), waiting]), [1]);
        assert_eq!(laggards(&[waiting, None, waiting]), [1]);
        assert_eq!(laggards(&[waiting, at(6, None), at(9, Some(8))]), NOBODY);
        assert_eq!(laggards(&[at(5, None), at(1, None)]), NOBODY);
    }

    #[test]
    fn ranks_late_in_a_replay_are_missing() {
        let waiting = replay(inside(41, 41));
        assert_eq!(laggards(&[waiting, replay(rest(40)), waiting]), [1]);
        // The rank in the later call has passed the earlier one, and is not to blame.
        assert_eq!(laggards(&[waiting, replay(inside(42, 42)), replay(rest(20))]), [2]);
        // Never replayed at all, but further in calls.
        assert_eq!(laggards(&[waiting, Some(Report::new(21, None, NOWHERE))]), [1]);
        // A start that is late does not make its rank late.
        assert_eq!(laggards(&[waiting, replay(Replayed { finished: 41, begun: 40 })]), NOBODY);
    }

    #[test]
    fn ranks_late_between_the_calls_of_others_runs_are_missing() {
        // Rank 1 has compute between calls 2 and 3.
        let waiting = replay(inside(1, 4));
        assert_eq!(laggards(&[waiting, replay(rest(2)), waiting]), [1]);
        // Whether rank 2, which has begun one more, is late too, nobody can say.
        assert_eq!(laggards(&[waiting, replay(rest(2)), replay(rest(3))]), [1]);
        // Unless the run that a rank is inside of begins later.
        assert_eq!(laggards(&[replay(inside(4, 7)), replay(rest(2)), replay(rest(3))]), [1, 2]);
        // A rank that is further than the end of the run is not awaited there.
        assert_eq!(laggards(&[waiting, replay(rest(4)), waiting]), NOBODY);
        // Where one rank is silent, it may be all that the others wait for.
        assert_eq!(laggards(&[waiting, replay(rest(2)), None]), [2]);
        assert_eq!(laggards(&[replay(inside(3, 4)), replay(rest(2)), None]), [1, 2]);
    }

    /// Where a rank is in truth.
    #[derive(Clone, Copy, Debug)]
    enum Truth {
        Rest(u64),
        Waits(u64),
    }

    const CALLS: u64 = 4;

    /// What a rank whose graph is cut behind the calls in `cuts` can be in, and what it then reports.
    fn states(cuts: u32) -> Vec<(Truth, Replayed)> {
        let cut = |call: u64| call == 0 || call == CALLS || cuts >> call & 1 == 1;
        let rests = (0..=CALLS).filter(|&call| cut(call)).map(|call| (Truth::Rest(call), rest(call)));
        let waits = (1..=CALLS).map(|call| {
            let before = (0..call).rev().find(|&before| cut(before)).unwrap();
            let last = (call..=CALLS).find(|&last| cut(last)).unwrap();
            (Truth::Waits(call), inside(before + 1, last))
        });
        rests.chain(waits).collect()
    }

    /// The late ranks, or `None` where nobody is, so that it is not for another rank that anyone waits.
    fn late(world: &[Truth]) -> Option<Vec<usize>> {
        let waits = |truth: &Truth| if let Truth::Waits(call) = truth { Some(*call) } else { None };
        let earliest = world.iter().filter_map(waits).min()?;
        let is_late = |truth: &Truth| matches!(truth, Truth::Rest(begun) if *begun < earliest);
        let ranks: Vec<usize> = (0..world.len()).filter(|&rank| is_late(&world[rank])).collect();
        (!ranks.is_empty()).then_some(ranks)
    }

    /// What is reported where ranks are in these states, in a form that can be looked up.
    fn look(reports: [Replayed; 3]) -> [[u64; 2]; 3] {
        reports.map(|at| [at.finished, at.begun])
    }

    #[test]
    fn those_are_named_who_are_late_in_all_worlds_that_look_the_same() {
        // A rank: 8 ways to cut, each with 4 calls to wait in and 2 to 5 places to rest.
        let states: Vec<_> = (0..1 << (CALLS - 1)).flat_map(|cuts| states(cuts << 1)).collect();
        let states = &states;
        let worlds = || {
            states.iter().flat_map(move |a| {
                states
                    .iter()
                    .flat_map(move |b| states.iter().map(move |c| ([a.0, b.0, c.0], [a.1, b.1, c.1])))
            })
        };
        assert_eq!(worlds().count(), 60_usize.pow(3));
        // By what is reported: who is late in every world that looks like that and has a late rank.
        let mut certain: HashMap<_, Vec<usize>> = HashMap::new();
        for (world, reports) in worlds() {
            if let Some(late) = late(&world) {
                let ranks = certain.entry(look(reports)).or_insert_with(|| late.clone());
                ranks.retain(|rank| late.contains(rank));
            }
        }
        let mut stuck = 0;
        for (world, reports) in worlds() {
            let named = laggards(&reports.map(replay));
            assert_eq!(
                named,
                certain.get(&look(reports)).cloned().unwrap_or_default(),
                "{world:?} {reports:?}"
            );
            if let Some(late) = late(&world) {
                stuck += 1;
                // Nobody is named who is not late, and somebody is.
                assert!(!named.is_empty() && named.iter().all(|rank| late.contains(rank)), "{world:?}");
            }
        }
        assert!(stuck > 10_000, "{stuck}");
    }

    #[test]
    fn reports_survive_the_wire() {
        let own = Report::new(7, Some(3), Replayed { finished: 9, begun: 1 << 40 });
        assert_eq!(Report::decode(&own.encode()), Some(own));
        assert_eq!(Report::decode(&[0; 31]), None);
        assert_eq!(Report::decode(&[0; 40]), None);
    }
}
