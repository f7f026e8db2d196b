//! Whether captured work makes progress when its graph is replayed.
//!
//! Events recorded during a capture belong to the graph, so replays cannot be watched with them. Instead a tiny kernel
//! where each captured call starts and one where it is finished count the passes in device memory and show the count in
//! host memory. Calls that have started but not finished, while neither count moves, are stuck. Collectives and transfers
//! are counted apart: all ranks pass the same collectives, so their count tells how far a rank is.
//!
//! # Where the marks stand
//! [`Placement::Inline`]: in the stream's chain, which waits for each. [`Placement::Beside`]: as nodes that depend on the
//! same nodes of the chain, but that nothing in the graph depends on; a call's finish and the start of a call that follows
//! with nothing in between are one node. What is beside the chain may run late, and marks may overtake one another.
//! `judge` is still right:
//!
//! - Each mark adds one to a count, atomically, so their order does not matter, only how many have run. A replay ends when
//!   all its nodes have, so between replays both counts are exact: nothing adds up.
//! - A healthy replay does not look stuck. A started call that is through looks at work only as long as its finish is late.
//!   All that this depends on is complete then, so it is late by no more than what else keeps a whole device busy: one
//!   thread's place is all that it needs. Only a kernel that leaves no place on the device for as long as the timeout
//!   could make it too late; inline, such a kernel waits for the finish and not the other way round.
//! - A stuck replay does not stay hidden. What a call's start depends on is complete before the call begins, NCCL's kernels
//!   fill no device, and the start is in the graph before the call is: executed in that order or at once, it runs while
//!   the call is stuck. That nodes which do not depend on one another run at once is the device's habit, not CUDA's
//!   promise, so a test holds it against the device (`a_rank_that_never_replays_is_named_in_time`). Finishes that are late
//!   make a stuck call look like an earlier one for a moment, long before its timeout: what is stuck has lost its last
//!   mark by then.
//! - How many collectives have begun, which ranks compare to find who is missing, may be too low by those whose start is
//!   late. It is compared after a timeout's length without progress.

use std::sync::Arc;
use std::time::{Duration, Instant};

use comm_core::{DeviceAddr, OpKind, Result, StreamHandle};
use comm_kernels::{Kernels, Mark, MarkNode};

use super::track::{Arrival, Issued, Progress};
use crate::driver::{self, HostPage};

/// More than can be on their way to the host at once.
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
    /// In the chain of what is captured.
    Inline,
    /// On nodes that the chain does not wait for.
    Beside,
}

/// A point that captured calls pass.
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
    placement: Placement,
    /// The last node beside a chain: the next mark may join it.
    last: Option<MarkNode>,
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

impl Marks {
    pub(crate) fn new(kernels: Arc<Kernels>, placement: Placement) -> Result<Self> {
        let page = HostPage::new(POINTS * POINT_WORDS)?;
        let counters = match driver::allocate(POINTS * 8) {
            Ok(counters) => counters,
            Err(error) => {
                page.free();
                return Err(error);
            }
        };
        let marks = Self { kernels, placement, last: None, counters, page, seen: [None; LANES.len()] };
        // SAFETY: the counters have just been allocated.
        match unsafe { driver::zero(counters, POINTS * 8) } {
            Ok(()) => Ok(marks),
            Err(error) => {
                marks.destroy();
                Err(error)
            }
        }
    }

    /// Marks on a capturing stream that a call begins.
    pub(crate) fn start(&mut self, issued: Issued, stream: StreamHandle) -> Result<()> {
        self.mark(issued, Point::Start, stream)
    }

    /// Marks on a capturing stream that a call is done.
    pub(crate) fn finish(&mut self, issued: Issued, stream: StreamHandle) -> Result<()> {
        self.mark(issued, Point::Finish, stream)
    }

    fn mark(&mut self, issued: Issued, point: Point, stream: StreamHandle) -> Result<()> {
        let lane = if issued.arrival.is_some() { Lane::Collectives } else { Lane::Transfers };
        let index = point_index(lane, point);
        let mark = Mark {
            counter: self.counters.offset(index as u64 * 8),
            slots: self.page.device(index * POINT_WORDS),
            slot_count: SLOTS as u32,
            tag: tag_of(issued),
        };
        match self.placement {
            // SAFETY: counters and slots live until the communicator has ended, before which its graphs must be gone; the
            // caller of the operation vouches for the stream.
            Placement::Inline => unsafe { self.kernels.mark(mark, stream) },
            Placement::Beside => {
                let last = self.last.take();
                // SAFETY: as above; the node came from the same kernels; the thread that captures is the one that calls,
                // and NCCL's own has ended its work on the graph when a call has settled.
                self.last = Some(unsafe { self.kernels.mark_beside(mark, last, stream) }?);
                Ok(())
            }
        }
    }

    /// The highest count that a point has shown.
    fn count(&self, lane: Lane, point: Point) -> u64 {
        let first = point_index(lane, point) * POINT_WORDS;
        (0..SLOTS).map(|slot| self.page.read(first + 2 * slot)).max().unwrap_or(0)
    }

    /// The call that made a count, as far as it is still in sight.
    fn call(&self, lane: Lane, count: u64) -> Issued {
        let slot = (count % SLOTS as u64) as usize;
        let tag = self.page.read(point_index(lane, Point::Start) * POINT_WORDS + 2 * slot + 1);
        call_of(tag, (lane == Lane::Collectives).then_some(Arrival::Replayed(count)))
    }

    /// Captured collectives begun in all replays so far.
    pub(crate) fn replayed(&self) -> u64 {
        self.count(Lane::Collectives, Point::Start)
    }

    /// The call in which a replay has been for longest without progress, and for how long.
    pub(crate) fn waiting(&mut self) -> Option<(Issued, Duration)> {
        let mut longest: Option<(Issued, Duration)> = None;
        for lane in LANES {
            // Finishes first: a call that ends in between then looks at work, not the other way round.
            let finished = self.count(lane, Point::Finish);
            let started = self.count(lane, Point::Start);
            if let Some(waited) = judge(&mut self.seen[lane as usize], [started, finished])
                && longest.is_none_or(|(_, other)| waited > other)
            {
                longest = Some((self.call(lane, finished + 1), waited));
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

    /// Whether a lane looks at work after each of these steps, in which marks of a point run so many times.
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
    fn points_do_not_overlap() {
        let points = LANES.map(|lane| [point_index(lane, Point::Start), point_index(lane, Point::Finish)]);
        assert_eq!(points, [[0, 1], [2, 3]]);
    }
}
