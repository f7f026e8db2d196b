//! The queue by which one thread of a CTA hands on to another in shared memory what is to be announced
//! (`comm-kernels/cuda/p2p/step_sums.cuh`, `Handoff`), on loom's memory. Its entries are plain memory here too, so that an
//! access that nothing orders is an error by itself.
//!
//! compute-sanitizer's racecheck knows barriers alone, and takes every such access for a race: this is checked instead.

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicU32, Ordering};

const ROOM: u32 = 2;
const POSTED: u32 = 3;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Mutant {
    None,
    /// What was posted is not ordered before the word that says so.
    PublishRelaxed,
    /// What was read is not ordered before the word that gives its place back.
    TakenRelaxed,
    /// Places are given back before they are read.
    TakenTooEarly,
    /// The poster does not look whether there is room.
    NoRoomAsked,
    /// The queue is seen empty, and then closed: what was posted in between is lost.
    ClosedSeenLast,
}

struct Handoff {
    entries: [UnsafeCell<u32>; ROOM as usize],
    published: AtomicU32,
    taken: AtomicU32,
    closed: AtomicU32,
    mutant: Mutant,
}

// SAFETY: loom looks at every access to the entries and fails the test at the first that races.
unsafe impl Sync for Handoff {}

fn release(unless: bool) -> Ordering {
    if unless { Ordering::Relaxed } else { Ordering::Release }
}

impl Handoff {
    fn new(mutant: Mutant) -> Self {
        Self {
            entries: [UnsafeCell::new(0), UnsafeCell::new(0)],
            published: AtomicU32::new(0),
            taken: AtomicU32::new(0),
            closed: AtomicU32::new(0),
            mutant,
        }
    }

    fn entry(&self, number: u32) -> &UnsafeCell<u32> {
        &self.entries[(number % ROOM) as usize]
    }

    fn publish(&self, added: u32) {
        self.published.store(added, release(self.mutant == Mutant::PublishRelaxed));
    }

    /// The poster: publishes when it must, and at the end.
    fn post(&self) {
        for added in 0..POSTED {
            let full =
                || self.mutant != Mutant::NoRoomAsked && added - self.taken.load(Ordering::Acquire) == ROOM;
            if full() {
                self.publish(added);
                while full() {
                    loom::thread::yield_now();
                }
            }
            // SAFETY: loom fails if anything else is at the entry.
            self.entry(added).with_mut(|entry| unsafe { *entry = added + 1 });
        }
        self.publish(POSTED);
        self.closed.store(1, Ordering::Release);
    }

    fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire) != 0
    }

    /// The server; what it was handed.
    fn serve(&self) -> Vec<u32> {
        let mut handed = Vec::new();
        let mut next = 0;
        loop {
            let last = self.mutant != Mutant::ClosedSeenLast && self.is_closed();
            let end = self.published.load(Ordering::Acquire);
            if next != end {
                if self.mutant == Mutant::TakenTooEarly {
                    self.taken.store(end, Ordering::Release);
                }
                while next != end {
                    // SAFETY: as above.
                    handed.push(self.entry(next).with(|entry| unsafe { *entry }));
                    next += 1;
                }
                self.taken.store(next, release(self.mutant == Mutant::TakenRelaxed));
            } else if last || self.mutant == Mutant::ClosedSeenLast && self.is_closed() {
                return handed;
            } else {
                loom::thread::yield_now();
            }
        }
    }
}

/// Both threads in every way that loom knows.
fn explore(mutant: Mutant) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(move || {
        let queue = Arc::new(Handoff::new(mutant));
        let poster = Arc::clone(&queue);
        let poster = loom::thread::spawn(move || poster.post());
        let handed = queue.serve();
        assert!(poster.join().is_ok());
        assert_eq!(handed, [1, 2, 3]);
    });
}

#[test]
fn everything_is_handed_on_once_and_in_order() {
    explore(Mutant::None);
}

#[test]
fn every_protection_of_the_queue_is_needed() {
    use Mutant as M;
    for mutant in [M::PublishRelaxed, M::TakenRelaxed, M::TakenTooEarly, M::NoRoomAsked, M::ClosedSeenLast] {
        let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| explore(mutant))).is_err();
        assert!(caught, "{mutant:?}");
    }
}
