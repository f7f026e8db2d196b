//! Whether captured work makes progress when its graph is replayed.
//!
//! Events recorded during a capture belong to the graph, so replays cannot be watched with them. Instead tiny kernels in
//! the graph, marks, count in device memory the calls that have begun and those that are finished, and show the counts in
//! host memory. Calls that have begun but not finished, while neither count moves, are stuck. Collectives and transfers
//! are counted apart: all ranks pass the same collectives, so their counts tell how far a rank is.
//!
//! # Runs
//! A mark costs the device 2.5 us where it stands between two of NCCL's kernels, wherever it is put: the first of them
//! then has two successors. But a mark between two calls with nothing captured in between says nothing that is needed. A
//! rank that is stuck there is inside NCCL, where it waits for a rank that is late; and what makes a rank late is what it
//! does between calls or before the graph. So calls of one kind of count that follow one another directly are a *run*: one
//! mark before its first call adds all of them to those begun, one behind its last adds all to those finished. Outside of
//! runs the counts are exact, inside they say which calls it may be that the rank is in, and
//! [`laggards`](super::laggards) names those who are late by that, however differently the ranks' runs are cut.
//!
//! Which call is a run's last is not known until the capture is over, and its end tells nobody. So the graph is right after
//! each call: a call that begins exactly where the last one ended joins its run, whose finish then moves behind it
//! ([`runs`](super::runs)). "Exactly where" compares nodes of the graph, not streams: what was forked off in between does
//! not part a run, what the next call waits for does.
//!
//! A run as a whole has the timeout that a call alone has. So runs are bounded, in calls and in bytes, such that the run's
//! own work takes a small part of the timeout even on slow networks; a call too large for that is alone. What can add up to
//! more are other ranks' delays: if another rank has compute between the calls of which this rank's run consists, all of
//! that compute is waited for within one timeout. And a rank that is stuck names the first call of the run. Where that is
//! too coarse, [`Placement::Inline`] marks each call by itself.
//!
//! # Where the marks stand
//! [`Placement::Inline`]: in the stream's chain, which waits for each. [`Placement::Beside`]: as nodes that depend on the
//! same nodes of the chain, but that nothing in the graph depends on; a run's finish and the start of one that follows
//! with nothing in between are one node. What is beside the chain may run late, and marks may overtake one another.
//! `judge` is still right:
//!
//! - Each mark adds to a count, atomically, so their order does not matter, only which have run. A replay ends when all its
//!   nodes have, so between replays both counts are exact: nothing adds up.
//! - A healthy replay does not look stuck. A run that has begun and is through looks at work only as long as its finish is
//!   late. All that this depends on is complete then, so it is late by no more than what else keeps a whole device busy:
//!   one thread's place is all that it needs. Only a kernel that leaves no place on the device for as long as the timeout
//!   could make it too late; inline, such a kernel waits for the finish and not the other way round.
//! - A stuck replay does not stay hidden. What a run's start depends on is complete before its first call begins, NCCL's
//!   kernels fill no device, and the start is in the graph before that call is: executed in that order or at once, it runs
//!   while the run is stuck. That nodes which do not depend on one another run at once is the device's habit, not CUDA's
//!   promise, so a test holds it against the device (`a_rank_that_never_replays_is_named_in_time`). Finishes that are late
//!   make a stuck run look like an earlier one for a moment, long before its timeout: what is stuck has lost its last
//!   mark by then.
//! - A rank that has not begun a run does not look as if it were inside, as long as it replays on one stream. NCCL lets a
//!   communicator's calls wait for one another, also across the streams of a capture, so the start of a run waits for the
//!   run before it on whatever stream that was. But the first start of a graph waits for nothing of what NCCL also orders
//!   from outside: see [`laggards`](super::laggards), "Limits".
//! - What ranks report of their counts to find who is missing may be too low by marks that are late. It is compared after a
//!   timeout's length without progress.

use std::sync::Arc;
use std::time::{Duration, Instant};

use comm_core::{DeviceAddr, OpKind, Result, StreamHandle};
use comm_kernels::{Kernels, Mark};

use super::runs::{Bounds, Runs};
use super::track::{Arrival, Issued, Progress, Replayed};
use crate::driver::{self, HostPage};

/// More than can be on their way to the host at once; a power of two.
const SLOTS: usize = 32;
/// Words of one point's slots.
const POINT_WORDS: usize = 2 * SLOTS;

/// What is counted apart.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Lane {
    Collectives,
    Transfers,
}

/// Where marks stand in a graph.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Placement {
    /// In the chain of what is captured, around each call.
    Inline,
    /// On nodes that the chain does not wait for, around each run of calls.
    Beside,
}

/// A point that captured calls and runs of them pass.
#[derive(Clone, Copy)]
enum Point {
    Start,
    Finish,
}

const LANES: [Lane; 2] = [Lane::Collectives, Lane::Transfers];
const POINTS: usize = LANES.len() * 2;

const fn point_index(lane: Lane, point: Point) -> usize {
    2 * lane as usize + point as usize
}

/// A lane's counts when they last moved.
#[derive(Clone, Copy, Debug)]
struct Seen {
    counts: [u64; 2],
    since: Instant,
}

/// The counters, in device memory, and what the device shows of them. Used only under the communicator's lock.
pub(crate) struct Marks {
    kernels: Arc<Kernels>,
    /// Where marks stand beside the chain.
    runs: Option<Runs>,
    counters: DeviceAddr,
    page: HostPage,
    seen: [Option<Seen>; LANES.len()],
}

/// A call in one word: 8 bits of kind, 56 of sequence number.
fn tag_of(issued: Issued) -> u64 {
    let kind = OpKind::COLLECTIVES.iter().position(|&kind| kind == issued.kind).unwrap_or(0xff);
    (kind as u64) << 56 | issued.seq & (u64::MAX >> 8)
}

fn call_of(tag: u64, arrival: Option<Arrival>) -> Issued {
    let kind = OpKind::COLLECTIVES.get((tag >> 56) as usize).copied().unwrap_or(OpKind::Poll);
    Issued { kind, seq: tag & (u64::MAX >> 8), arrival }
}

/// The tag of the run that has the call with this number: of all that a point shows, the one that counts that far by the
/// least.
fn tag_at(shown: impl Iterator<Item = [u64; 2]>, number: u64) -> u64 {
    let reaching = shown.filter(|&[count, _]| count >= number);
    reaching.min_by_key(|&[count, _]| count).map_or(u64::MAX, |[_, tag]| tag)
}

/// Whether a lane is at work, and since when its counts have not moved.
fn judge(seen: &mut Option<Seen>, counts: [u64; 2]) -> Option<Duration> {
    let [started, finished] = counts;
    if started <= finished {
        *seen = None;
        return None;
    }
    match seen {
        Some(seen) if seen.counts == counts => Some(seen.since.elapsed()),
        _ => {
            *seen = Some(Seen { counts, since: Instant::now() });
            Some(Duration::ZERO)
        }
    }
}

/// How far replays are by the counts of each lane, as [`LANES`] orders them.
const fn reached([[begun, finished], [sent, arrived]]: [[u64; 2]; LANES.len()]) -> Replayed {
    Replayed { finished, begun, transferring: sent > arrived }
}

impl Marks {
    pub(crate) fn new(kernels: Arc<Kernels>, placement: Placement, bounds: Bounds) -> Result<Self> {
        let page = HostPage::new(POINTS * POINT_WORDS)?;
        let counters = match driver::allocate(POINTS * 8) {
            Ok(counters) => counters,
            Err(error) => {
                page.free();
                return Err(error);
            }
        };
        let runs = match placement {
            Placement::Inline => None,
            Placement::Beside => Some(Runs::new(Arc::clone(&kernels), bounds)),
        };
        let marks = Self { kernels, runs, counters, page, seen: [None; LANES.len()] };
        // SAFETY: the counters have just been allocated.
        match unsafe { driver::zero(counters, POINTS * 8) } {
            Ok(()) => Ok(marks),
            Err(error) => {
                marks.destroy();
                Err(error)
            }
        }
    }

    /// Marks on a capturing stream that a call of `bytes` bytes begins.
    pub(crate) fn start(&mut self, issued: Issued, bytes: usize, stream: StreamHandle) -> Result<()> {
        let marks = self.marks(issued);
        // SAFETY: counters and slots live until the communicator has ended, before which its graphs must be gone; the caller
        // of the operation vouches for the stream; the thread that captures is the one that calls, and NCCL's own has ended
        // its work on the graph when a call has settled.
        unsafe {
            match &mut self.runs {
                None => self.kernels.mark(marks[Point::Start as usize], stream),
                Some(runs) => runs.start(marks, bytes as u64, stream),
            }
        }
    }

    /// Marks on a capturing stream that the call that was started last is done.
    pub(crate) fn finish(&mut self, issued: Issued, bytes: usize, stream: StreamHandle) -> Result<()> {
        let marks = self.marks(issued);
        // SAFETY: as in `start`.
        unsafe {
            match &mut self.runs {
                None => self.kernels.mark(marks[Point::Finish as usize], stream),
                Some(runs) => runs.finish(bytes as u64, stream),
            }
        }
    }

    /// The marks of a call by itself: where it starts and where it is finished.
    fn marks(&self, issued: Issued) -> [Mark; 2] {
        let lane = if issued.arrival.is_some() { Lane::Collectives } else { Lane::Transfers };
        [Point::Start, Point::Finish].map(|point| {
            let index = point_index(lane, point);
            Mark {
                counter: self.counters.offset(index as u64 * 8),
                slots: self.page.device(index * POINT_WORDS),
                slot_count: SLOTS as u32,
                adds: 1,
                tag: tag_of(issued),
            }
        })
    }

    /// The counts and the tags that a point shows, in no order.
    fn shown(&self, lane: Lane, point: Point) -> impl Iterator<Item = [u64; 2]> {
        let first = point_index(lane, point) * POINT_WORDS;
        (0..SLOTS).map(move |slot| [0, 1].map(|word| self.page.read(first + 2 * slot + word)))
    }

    /// The highest count that a point has shown.
    fn count(&self, lane: Lane, point: Point) -> u64 {
        self.shown(lane, point).map(|[count, _]| count).max().unwrap_or(0)
    }

    /// How many calls of a lane have begun and are finished.
    fn counts(&self, lane: Lane) -> [u64; 2] {
        // Finishes first: a run that ends in between then looks at work, not the other way round.
        let finished = self.count(lane, Point::Finish);
        [self.count(lane, Point::Start), finished]
    }

    /// The first call of the run that has the call with this number, as far as it is still in sight.
    fn call(&self, lane: Lane, number: u64) -> Issued {
        let arrival = (lane == Lane::Collectives).then_some(Arrival::Replayed);
        call_of(tag_at(self.shown(lane, Point::Start), number), arrival)
    }

    /// How far replays are in the captured collectives, and whether they are in a transfer.
    pub(crate) fn replayed(&self) -> Replayed {
        reached(LANES.map(|lane| self.counts(lane)))
    }

    /// The call in which a replay has been for longest without progress, and for how long.
    pub(crate) fn waiting(&mut self) -> Option<(Issued, Duration)> {
        let mut longest: Option<(Issued, Duration)> = None;
        for lane in LANES {
            let counts = self.counts(lane);
            if let Some(waited) = judge(&mut self.seen[lane as usize], counts)
                && longest.is_none_or(|(_, other)| waited > other)
            {
                longest = Some((self.call(lane, counts[1] + 1), waited));
            }
        }
        longest
    }

    /// As [`Tracker::check`](super::track::Tracker::check), for replays.
    pub(crate) fn check(&mut self, allowed: Duration) -> Progress {
        match self.waiting() {
            None => Progress::Idle,
            Some((issued, waited)) if waited >= allowed => Progress::Overdue(issued, waited),
            Some(_) => Progress::Pending,
        }
    }

    /// Gives the memory back. Waits for what is still running on the device.
    pub(crate) fn destroy(self) {
        // SAFETY: no work that marks is enqueued any more, and freeing waits for what is.
        unsafe { driver::free(self.counters) };
        self.page.free();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_survive_their_tags() {
        for (index, kind) in OpKind::COLLECTIVES.into_iter().enumerate() {
            let issued = Issued { kind, seq: 1 << (3 * index), arrival: None };
            assert_eq!(call_of(tag_of(issued), None), issued);
        }
        assert_eq!(call_of(u64::MAX, None).kind, OpKind::Poll);
    }

    #[test]
    fn the_run_of_a_call_is_found_by_what_is_in_sight() {
        // Runs of 3, 1 and 4 calls, the oldest and the newest in any slots.
        let shown = [[8, 30], [0, 0], [3, 10], [4, 20]];
        let found = [1, 3, 4, 5, 8, 9].map(|number| tag_at(shown.into_iter(), number));
        assert_eq!(found, [10, 10, 20, 30, 30, u64::MAX]);
    }

    #[test]
    fn only_a_count_that_stands_still_in_a_call_is_waiting() {
        let mut seen = None;
        assert_eq!(judge(&mut seen, [0, 0]), None);
        assert_eq!(judge(&mut seen, [1, 0]), Some(Duration::ZERO));
        std::thread::sleep(Duration::from_millis(2));
        assert!(judge(&mut seen, [1, 0]).unwrap() >= Duration::from_millis(2));
        // The next call of the same replay.
        assert_eq!(judge(&mut seen, [2, 1]), Some(Duration::ZERO));
        assert_eq!(judge(&mut seen, [2, 2]), None);
        assert!(seen.is_none());
        // A start that reaches the host late.
        assert_eq!(judge(&mut seen, [2, 3]), None);
    }

    /// Whether a lane looks at work after each of these steps, in which marks of a point add so many.
    fn at_work(order: &[(Point, u64)]) -> Vec<bool> {
        let (mut seen, mut counts) = (None, [0, 0]);
        let step = |&(point, times): &(Point, u64)| {
            counts[point as usize] += times;
            judge(&mut seen, counts).is_some()
        };
        order.iter().map(step).collect()
    }

    #[test]
    fn marks_beside_a_chain_may_be_late_but_add_up() {
        use Point::{Finish, Start};
        // Two calls; the second's start overtakes the first's finish.
        assert_eq!(at_work(&[(Start, 1), (Start, 1), (Finish, 1), (Finish, 1)]), [true, true, true, false]);
        // A start that runs after its call is through: at rest throughout, and again when the replay has ended.
        assert_eq!(at_work(&[(Finish, 1), (Start, 1)]), [false, false]);
        // After replays in any order, a call that is stuck is seen: nothing of the disorder is left.
        assert_eq!(at_work(&[(Finish, 3), (Start, 3), (Start, 1)]), [false, false, true]);
        // A run of 5 calls whose start is late, and one of 2 that is stuck: hidden until then, and seen from then on.
        assert_eq!(at_work(&[(Finish, 5), (Start, 2), (Start, 5)]), [false, false, true]);
    }

    #[test]
    fn late_marks_restart_the_clock_of_what_is_stuck_and_no_more() {
        let mut seen = None;
        judge(&mut seen, [5, 2]);
        std::thread::sleep(Duration::from_millis(2));
        // Two finishes were late; the call that is stuck is the fifth from then on.
        assert_eq!(judge(&mut seen, [5, 4]), Some(Duration::ZERO));
        std::thread::sleep(Duration::from_millis(2));
        assert!(judge(&mut seen, [5, 4]).unwrap() >= Duration::from_millis(2));
    }

    #[test]
    fn a_transfer_keeps_a_rank_from_rest_and_out_of_collectives() {
        let at = |collectives, transfers| {
            let replayed = reached([collectives, transfers]);
            (replayed.rest(), replayed.inside())
        };
        assert_eq!(at([5, 5], [3, 3]), (Some(5), false));
        assert_eq!(at([5, 5], [4, 3]), (None, false));
        assert_eq!(at([7, 5], [3, 3]), (None, true));
        assert_eq!(at([7, 5], [4, 3]), (None, true));
        // Starts that reach the host late.
        assert_eq!(at([4, 5], [2, 3]), (Some(5), false));
    }

    #[test]
    fn points_do_not_overlap() {
        let points = LANES.map(|lane| [point_index(lane, Point::Start), point_index(lane, Point::Finish)]);
        assert_eq!(points, [[0, 1], [2, 3]]);
    }
}
