//! Whether captured work makes progress when its graph is replayed.
//!
//! Events recorded during a capture belong to the graph, so replays cannot be watched with them. Instead a tiny kernel
//! before and one after each captured call count the passes in device memory and show the count in host memory. Calls that
//! have started but not finished, while neither count moves, are stuck. Collectives and transfers are counted apart: all
//! ranks pass the same collectives, so their count tells how far a rank is.

use std::sync::Arc;
use std::time::{Duration, Instant};

use comm_core::{DeviceAddr, OpKind, Result, StreamHandle};
use comm_kernels::Kernels;

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
    pub(crate) fn new(kernels: Arc<Kernels>) -> Result<Self> {
        let page = HostPage::new(POINTS * POINT_WORDS)?;
        let counters = match driver::allocate(POINTS * 8) {
            Ok(counters) => counters,
            Err(error) => {
                page.free();
                return Err(error);
            }
        };
        let marks = Self { kernels, counters, page, seen: [None; LANES.len()] };
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
    pub(crate) fn start(&self, issued: Issued, stream: StreamHandle) -> Result<()> {
        self.mark(issued, Point::Start, stream)
    }

    /// Marks on a capturing stream that a call is done.
    pub(crate) fn finish(&self, issued: Issued, stream: StreamHandle) -> Result<()> {
        self.mark(issued, Point::Finish, stream)
    }

    fn mark(&self, issued: Issued, point: Point, stream: StreamHandle) -> Result<()> {
        let lane = if issued.arrival.is_some() { Lane::Collectives } else { Lane::Transfers };
        let index = point_index(lane, point);
        let counter = self.counters.offset(index as u64 * 8);
        let slots = self.page.device(index * POINT_WORDS);
        // SAFETY: both live until the communicator has ended, before which its graphs must be gone; the caller of the
        // operation vouches for the stream.
        unsafe { self.kernels.mark(counter, slots, SLOTS as u32, tag_of(issued), stream) }
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

    #[test]
    fn points_do_not_overlap() {
        let points = LANES.map(|lane| [point_index(lane, Point::Start), point_index(lane, Point::Finish)]);
        assert_eq!(points, [[0, 1], [2, 3]]);
    }
}
