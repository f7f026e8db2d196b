//! Which ranks have not arrived, by what all ranks report of how far they are.
//!
//! # Calls
//! A rank knows exactly how many collectives it has called, and which of its calls does not end. Who has called fewer than
//! the earliest of those takes is late, unless a replay in which it waits keeps it from calling.
//!
//! # Replays
//! Captured collectives are counted in runs ([`marks`](super::marks)), which the ranks may have cut differently. A rank
//! between runs is *at rest*: it has begun exactly as many collectives as its counts say. A rank inside a run is waiting in
//! one of the run's calls, and does not know in which. A rank that is between runs of collectives but in one of captured
//! transfers has begun exactly as many collectives, too, but is not at rest: it waits for its peer.
//!
//! Let `J` be the earliest collective that a rank waits in. It waits because a rank has not begun `J`. That rank is at rest
//! or in a transfer, because those inside runs have begun `J` or more. *Late* are the ranks at rest that have begun fewer
//! than `J`. `J` is not known, but bounded:
//!
//! - `J` is at least the lowest first call of the runs that ranks are inside of, because each waits in its run or later;
//! - `J` is at most the lowest last call of those runs, because the rank inside that one waits no later;
//! - `J` is above the lowest count of the ranks at rest or in a transfer, because one of them has not begun it.
//!
//! Every `J` within these bounds may be it: the ranks inside runs can wait there or in the first call of theirs, whichever
//! is later. So the ranks at rest that have begun fewer than the least such `J` are late, as far as the reports say where
//! their ranks are, and of no others can that be said. If there is no such `J`, no rank is late. Runs of one call have
//! bounds that meet, and all late ranks are known. If a rank says nothing, it may be the only late one, and the last of the
//! bounds does not hold. If all that could be late are in transfers, nobody is named: whom they wait for is not reported.
//!
//! # Limits
//! A report says "inside" from when the mark before a run's first call has run. NCCL can hold that call back longer, by
//! dependencies that the mark does not have, and a mark cannot get: then the rank is taken for one that waits in the run,
//! though it has not begun. If it is late, it is not named, and a rank at rest that has begun fewer may be named in its
//! stead. This is possible
//!
//! - where a collective that was not captured is pending on one stream, and a graph is replayed on another: NCCL orders the
//!   two, but the graph's first mark waits for nothing;
//! - where two graphs with calls on one communicator are replayed on two streams at once: NCCL lets one wait for the other,
//!   while the counts take both for under way, and no longer number the calls alike on all ranks;
//! - with `nccl.split_share=1`: calls on one communicator then wait for those on others that share its resources, which
//!   this one's marks know nothing of;
//! - where several threads capture calls on one communicator at a time ([`runs`](super::runs)).
//!
//! None of this is possible with one stream for a communicator's work, resources of its own and one capture at a time.
//! Where a run is held back, that time counts towards its timeout too.

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
    const WORDS: usize = 5;

    /// Of a rank that waits in the collective call before which it had made `stuck`, if it waits in a call.
    pub(super) fn new(called: u64, stuck: Option<u64>, replayed: Replayed) -> Self {
        Self { called, wanted: stuck.map_or(0, |before| before + 1), replayed }
    }

    pub(super) fn encode(self) -> [u8; 8 * Self::WORDS] {
        let mut bytes = [0; 8 * Self::WORDS];
        let Replayed { finished, begun, transferring } = self.replayed;
        let words = [self.called, self.wanted, finished, begun, u64::from(transferring)];
        for (place, word) in bytes.chunks_exact_mut(8).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let (words, []) = bytes.as_chunks::<8>() else { return None };
        let &[called, wanted, finished, begun, transferring] = words else { return None };
        let number = u64::from_le_bytes;
        Some(Self {
            called: number(called),
            wanted: number(wanted),
            replayed: Replayed {
                finished: number(finished),
                begun: number(begun),
                transferring: number(transferring) != 0,
            },
        })
    }
}

/// The ranks that are late by what all report, and those that said nothing.
pub(super) fn laggards(reports: &[Option<Report>]) -> Vec<usize> {
    let known = || reports.iter().flatten();
    let called = known().map(|report| report.wanted).filter(|&wanted| wanted > 0).min().unwrap_or(0);
    let replayed =
        replayed_by_the_punctual(known().map(|report| report.replayed), known().count() == reports.len());
    let behind = |report: &Option<Report>| {
        report.is_none_or(|Report { called: own, replayed: at, .. }| {
            // A rank that waits in a replay cannot help it that it calls nothing.
            at.rest().is_some_and(|begun| own < called || begun < replayed)
        })
    };
    reports.iter().enumerate().filter(|(_, report)| behind(report)).map(|(rank, _)| rank).collect()
}

/// How many collectives a rank at rest must have begun not to be named; `all` ranks have reported, or not.
fn replayed_by_the_punctual(reports: impl Iterator<Item = Replayed> + Clone, all: bool) -> u64 {
    let inside = reports.clone().filter(|replayed| replayed.inside());
    let Some(first) = inside.clone().map(|replayed| replayed.finished + 1).min() else { return 0 };
    let last = inside.map(|replayed| replayed.begun).min().unwrap_or(first);
    let slowest = reports.filter(|replayed| !replayed.inside()).map(|replayed| replayed.finished).min();
    match slowest {
        Some(begun) if all && begun < last => first.max(begun + 1),
        _ => first,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    const NOWHERE: Replayed = rest(0);
    const NOBODY: [usize; 0] = [];

    const fn inside(first: u64, last: u64) -> Replayed {
        Replayed { finished: first - 1, begun: last, transferring: false }
    }

    const fn rest(begun: u64) -> Replayed {
        Replayed { finished: begun, begun, transferring: false }
    }

    const fn transfer(begun: u64) -> Replayed {
        Replayed { transferring: true, ..rest(begun) }
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
        let started_late = Replayed { begun: 40, ..rest(41) };
        assert_eq!(laggards(&[waiting, replay(started_late)]), NOBODY);
    }

    #[test]
    fn ranks_that_wait_in_a_transfer_are_not_missing() {
        let waiting = replay(inside(5, 8));
        // Rank 1 waits for rank 2's transfer, and the others for both.
        assert_eq!(laggards(&[waiting, replay(transfer(4)), replay(rest(4))]), [2]);
        // Rank 2 has begun more than rank 1: the others may wait for rank 1 in the fifth.
        assert_eq!(laggards(&[waiting, replay(transfer(4)), replay(rest(5))]), NOBODY);
        // Rank 1 has begun the fifth, so it is not there that the others wait, but for rank 2 in the sixth or later.
        assert_eq!(laggards(&[waiting, replay(transfer(6)), replay(rest(5))]), [2]);
        assert_eq!(laggards(&[waiting, replay(transfer(4)), waiting]), NOBODY);
        assert_eq!(laggards(&[replay(transfer(4)), replay(transfer(4)), replay(rest(4))]), NOBODY);
        // It waits in a collective that comes before others' too.
        let both = Replayed { transferring: true, ..inside(3, 4) };
        assert_eq!(laggards(&[waiting, replay(both), replay(rest(2))]), [2]);
    }

    #[test]
    fn ranks_that_wait_in_a_replay_are_not_missing_in_the_call_after_it() {
        let waiting = Some(Report::new(21, Some(20), rest(5)));
        // All have launched a graph; rank 0 is through with its part, and rank 1 waits in it for rank 2.
        let late = Some(Report::new(20, None, rest(4)));
        let keeping_up = |replayed| Some(Report::new(20, None, replayed));
        assert_eq!(laggards(&[waiting, keeping_up(inside(5, 5)), late]), [2]);
        assert_eq!(laggards(&[waiting, keeping_up(transfer(5)), late]), [2]);
        // Through with it, it has to call.
        assert_eq!(laggards(&[waiting, keeping_up(rest(5)), late]), [1, 2]);
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
        Transfers(u64),
        Waits(u64),
    }

    const CALLS: u64 = 4;

    /// What a rank whose graph is cut behind the calls in `cuts` can be in, and what it then reports.
    fn states(cuts: u32) -> Vec<(Truth, Replayed)> {
        let cut = |call: u64| call == 0 || call == CALLS || cuts >> call & 1 == 1;
        let rests = (0..=CALLS).filter(|&call| cut(call));
        let rests = rests
            .flat_map(|call| [(Truth::Rest(call), rest(call)), (Truth::Transfers(call), transfer(call))]);
        let waits = (1..=CALLS).map(|call| {
            let before = (0..call).rev().find(|&before| cut(before)).unwrap();
            let last = (call..=CALLS).find(|&last| cut(last)).unwrap();
            (Truth::Waits(call), inside(before + 1, last))
        });
        rests.chain(waits).collect()
    }

    /// The late ranks, or `None` where all have begun the earliest collective that a rank waits in, so that it is not for
    /// another rank that anyone waits. If those that have not are all in transfers, none is late.
    fn late(world: &[Truth]) -> Option<Vec<usize>> {
        let waits = |truth: &Truth| if let Truth::Waits(call) = truth { Some(*call) } else { None };
        let earliest = world.iter().filter_map(waits).min()?;
        let is_late = |truth: &Truth| matches!(truth, Truth::Rest(begun) if *begun < earliest);
        let is_awaited =
            |truth: &Truth| is_late(truth) || matches!(truth, Truth::Transfers(begun) if *begun < earliest);
        let late = (0..world.len()).filter(|&rank| is_late(&world[rank])).collect();
        world.iter().any(is_awaited).then_some(late)
    }

    /// What is reported where ranks are in these states, in a form that can be looked up.
    fn look(reports: [Replayed; 3]) -> [(u64, u64, bool); 3] {
        reports.map(|at| (at.finished, at.begun, at.transferring))
    }

    #[test]
    fn those_are_named_who_are_late_in_all_worlds_that_look_the_same() {
        // A rank: 8 ways to cut, each with 4 calls to wait in and 2 to 5 places to rest or be in a transfer.
        let states: Vec<_> = (0..1 << (CALLS - 1)).flat_map(|cuts| states(cuts << 1)).collect();
        let states = &states;
        let worlds = || {
            states.iter().flat_map(move |a| {
                states
                    .iter()
                    .flat_map(move |b| states.iter().map(move |c| ([a.0, b.0, c.0], [a.1, b.1, c.1])))
            })
        };
        assert_eq!(worlds().count(), 88_usize.pow(3));
        // By what is reported: who is late in every world that looks like that and has a late rank.
        let mut certain: HashMap<_, Vec<usize>> = HashMap::new();
        for (world, reports) in worlds() {
            if let Some(late) = late(&world) {
                let ranks = certain.entry(look(reports)).or_insert_with(|| late.clone());
                ranks.retain(|rank| late.contains(rank));
            }
        }
        let (mut stuck, mut nobody) = (0, 0);
        for (world, reports) in worlds() {
            let named = laggards(&reports.map(replay));
            assert_eq!(
                named,
                certain.get(&look(reports)).cloned().unwrap_or_default(),
                "{world:?} {reports:?}"
            );
            if let Some(late) = late(&world) {
                stuck += 1;
                // Nobody is named who is not late, and somebody is, unless it may be a transfer that all wait for.
                assert!(named.iter().all(|rank| late.contains(rank)), "{world:?}");
                let transferring = world.iter().any(|truth| matches!(truth, Truth::Transfers(_)));
                assert!(!named.is_empty() || transferring, "{world:?}");
                nobody += usize::from(named.is_empty());
            }
        }
        assert!(stuck > 10_000 && nobody > 1_000 && nobody < stuck, "{stuck} {nobody}");
    }

    #[test]
    fn reports_survive_the_wire() {
        for transferring in [false, true] {
            let own = Report::new(7, Some(3), Replayed { finished: 9, begun: 1 << 40, transferring });
            assert_eq!(Report::decode(&own.encode()), Some(own));
        }
        assert_eq!(Report::decode(&[0; 39]), None);
        assert_eq!(Report::decode(&[0; 48]), None);
    }
}
