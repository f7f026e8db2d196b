//! Two ranks as threads on loom's memory, whose loads may see anything that acquires and releases allow.
//!
//! loom performs stores in program order; what a load sees is what it explores. `reordering` is its complement.

use loom::sync::Arc;
use loom::sync::atomic::{AtomicU16, Ordering, fence};

use super::direct;
use super::lines::{lines, two_ranks};
use super::memory::{Mem, Order, Outcome, Protocol, Value, Word, step};
use super::programs::{self, TwoShot};
use super::staged::{self, Exchanges};
use super::writer::Mutant;

struct Shared(Arc<Vec<AtomicU16>>);

impl Mem for Shared {
    fn store(&mut self, at: Word, value: Value, order: Order) {
        let order = if order == Order::Synchronising { Ordering::Release } else { Ordering::Relaxed };
        self.0[usize::from(at)].store(value, order);
    }

    fn load(&mut self, at: Word, order: Order) -> Value {
        let order = if order == Order::Synchronising { Ordering::Acquire } else { Ordering::Relaxed };
        self.0[usize::from(at)].load(order)
    }

    fn fence(&mut self) {
        fence(Ordering::AcqRel);
    }

    fn increment(&mut self, at: Word) -> Option<Value> {
        Some(self.0[usize::from(at)].fetch_add(1, Ordering::Relaxed))
    }

    fn drained(&mut self) -> bool {
        // The end of a kernel and the beginning of the next order everything of their stream.
        fence(Ordering::SeqCst);
        true
    }
}

/// Runs both ranks in every way that loom knows; panics at the first wrong value.
fn explore(protocol: Protocol) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(2);
    builder.check(move || {
        let words: Vec<_> = protocol.memory.iter().map(|&value| AtomicU16::new(value)).collect();
        let words = Arc::new(words);
        let threads: Vec<_> = protocol
            .ranks
            .iter()
            .cloned()
            .map(|program| {
                let mut memory = Shared(Arc::clone(&words));
                loom::thread::spawn(move || {
                    let (mut at, mut taken) = (0, 0);
                    while let Some(instr) = program.get(at) {
                        at = match step(instr, &mut memory, &mut taken, false, false) {
                            Outcome::Done => at + 1,
                            Outcome::Skips(skipped) => at + 1 + usize::from(skipped),
                            Outcome::Goes(to) => to.into(),
                            Outcome::Wrong => panic!("a wrong value at {instr:?}"),
                            Outcome::Waits => {
                                loom::thread::yield_now();
                                at
                            }
                        };
                    }
                })
            })
            .collect();
        for thread in threads {
            assert!(thread.join().is_ok());
        }
    });
}

const FIRST: u8 = 255;

#[test]
fn two_epochs_hold() {
    explore(programs::direct(2, 2, FIRST, Mutant::None));
    explore(programs::packets(2, &[(2, 2)], FIRST, Mutant::None));
    explore(programs::cells(2, &[2], FIRST, Mutant::None));
    let run = TwoShot { world: 2, parts: 1, kernels: &[2], short: false };
    explore(programs::two_shot(run, FIRST, Mutant::None));
    explore(programs::broadcast(2, 2, FIRST, Mutant::None));
    explore(staged::pair(2, FIRST, Mutant::None));
    explore(direct::broadcast(2, &[2], FIRST, Mutant::None));
}

#[test]
fn lines_hold() {
    explore(lines(two_ranks(FIRST), Mutant::None));
    assert!(is_caught(lines(two_ranks(FIRST), Mutant::OneLineSeen)));
}

#[test]
fn two_exchanges_hold() {
    explore(staged::exchanges(EXCHANGES, FIRST, Mutant::None));
}

const EXCHANGES: Exchanges<'_> = Exchanges { world: 2, chunks: &[1, 1], twice: false, gap: false };

fn is_caught(protocol: Protocol) -> bool {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| explore(protocol))).is_err()
}

#[test]
fn weakened_orders_are_caught() {
    for mutant in [Mutant::RelaxedAcquire, Mutant::RelaxedRelease] {
        assert!(is_caught(programs::direct(2, 2, FIRST, mutant)), "direct stores, {mutant:?}");
        assert!(is_caught(programs::cells(2, &[2], FIRST, mutant)), "cells, {mutant:?}");
        assert!(is_caught(staged::pair(2, FIRST, mutant)), "pairs, {mutant:?}");
        assert!(is_caught(staged::exchanges(EXCHANGES, FIRST, mutant)), "exchanges, {mutant:?}");
        assert!(is_caught(direct::broadcast(2, &[2], FIRST, mutant)), "direct broadcast, {mutant:?}");
    }
}
