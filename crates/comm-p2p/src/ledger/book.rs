//! One rank's record of its calls, in memory that the other ranks read while it is written.
//!
//! A ring of the latest calls. Each entry holds the call and a chain value, which depends on all calls up to it: if two
//! ranks' chain values of one call are equal, so are their calls up to there.

use std::sync::atomic::{AtomicU64, Ordering};

use comm_core::{DType, OpKind};

use crate::usage::Algorithm;

/// Calls that a ring holds; ranks that are further apart than that cannot be compared for the moment.
pub(crate) const CALLS: usize = 4096;
/// Words of a book: the number of calls, on a cache line of its own, then two for each of the latest.
pub(crate) const WORDS: usize = 8 + 2 * CALLS;

/// What is written of a call.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Note {
    pub(crate) kind: OpKind,
    pub(crate) algorithm: Algorithm,
    pub(crate) dtype: Option<DType>,
    pub(crate) count: usize,
    /// A mixture of what else must be equal: reduction, root, the place of an operand.
    pub(crate) more: u64,
}

const COUNT_BITS: u32 = 40;
const COUNT_MASK: u64 = (1 << COUNT_BITS) - 1;
const NONE: u64 = 0xff;

impl Note {
    fn word(&self) -> u64 {
        let kind =
            OpKind::COLLECTIVES.iter().position(|&kind| kind == self.kind).map_or(NONE, |at| at as u64);
        let dtype = self.dtype.and_then(|dtype| DType::ALL.iter().position(|&other| other == dtype));
        let dtype = dtype.map_or(NONE, |at| at as u64);
        kind << 56 | (self.algorithm as u64) << 48 | dtype << 40 | self.count as u64 & COUNT_MASK
    }
}

/// An entry's call in words.
pub(crate) fn describe(word: u64) -> String {
    let kind = OpKind::COLLECTIVES.get((word >> 56) as usize).map_or("something", |kind| kind.name());
    let algorithm = Algorithm::by_number((word >> 48 & NONE) as usize).map_or("?", Algorithm::name);
    match DType::ALL.get((word >> 40 & NONE) as usize) {
        Some(dtype) => format!("{kind} of {} {dtype} by {algorithm}", word & COUNT_MASK),
        None => format!("{kind} by {algorithm}"),
    }
}

/// Mixes a value into another, so that order counts. The constants are those of splitmix64 (Steele, Lea, Flood 2014).
pub(crate) const fn mix(state: u64, value: u64) -> u64 {
    let mut z = (state ^ value).wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

/// A book's words, here or in another rank's memory.
#[derive(Clone, Copy)]
pub(crate) struct Book<'a>(pub(crate) &'a [AtomicU64]);

/// A difference between two ranks' calls.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Difference {
    /// The call: how many collectives came before it.
    pub(crate) number: u64,
    pub(crate) own: u64,
    pub(crate) other: u64,
}

impl Book<'_> {
    fn entry(&self, number: u64) -> (&AtomicU64, &AtomicU64) {
        let at = 8 + 2 * (number as usize % CALLS);
        (&self.0[at], &self.0[at + 1])
    }

    fn count(&self) -> u64 {
        self.0[0].load(Ordering::Acquire)
    }

    /// Adds a call. One thread at a time, which passes the chain value that this returned last.
    pub(crate) fn add(&self, chain: u64, note: &Note) -> u64 {
        let (number, word) = (self.0[0].load(Ordering::Relaxed), note.word());
        let chain = mix(mix(chain, word), note.more);
        let (at, call) = self.entry(number);
        // Release on both: whoever reads one of them sees the count of before, and by that, that the entry which was here
        // is gone.
        at.store(chain, Ordering::Release);
        call.store(word, Ordering::Release);
        self.0[0].store(number + 1, Ordering::Release);
        chain
    }

    /// The chain value and the call of number `number`, if the ring still holds it.
    fn read(&self, number: u64) -> Option<(u64, u64)> {
        let (chain, call) = self.entry(number);
        let (chain, call) = (chain.load(Ordering::Acquire), call.load(Ordering::Acquire));
        // The entry is overwritten by call `number + CALLS`, while the count is just that. If what was read is of that
        // call, the count that is read next is no lower: see `add`.
        let holds = number < self.count() && self.count() < number + CALLS as u64;
        holds.then_some((chain, call))
    }

    /// The first of the calls that both have made and that differ, as far as both rings reach back.
    pub(crate) fn difference(&self, other: &Self) -> Option<Difference> {
        let common = self.count().min(other.count());
        let pair = |number| Some((self.read(number)?, other.read(number)?));
        let mut number = common.checked_sub(1)?;
        let ((own, _), (theirs, _)) = pair(number)?;
        if own == theirs {
            return None;
        }
        while number > 0
            && let Some(((own, _), (theirs, _))) = pair(number - 1)
            && own != theirs
        {
            number -= 1;
        }
        let ((_, own), (_, other)) = pair(number)?;
        Some(Difference { number, own, other })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words() -> Vec<AtomicU64> {
        (0..WORDS).map(|_| AtomicU64::new(0)).collect()
    }

    fn note(count: usize) -> Note {
        let (kind, algorithm) = (OpKind::AllReduce, Algorithm::OneShot);
        Note { kind, algorithm, dtype: Some(DType::BF16), count, more: 0 }
    }

    fn write(book: &Book<'_>, notes: &[Note]) {
        notes.iter().fold(0, |chain, note| book.add(chain, note));
    }

    #[test]
    fn equal_calls_are_equal_however_far_the_ranks_are() {
        let (a, b) = (words(), words());
        let (a, b) = (Book(&a), Book(&b));
        assert_eq!(a.difference(&b), None);
        let notes: Vec<_> = (0..3 * CALLS).map(note).collect();
        write(&a, &notes);
        assert_eq!(a.difference(&b), None, "nothing in common yet");
        write(&b, &notes[..3 * CALLS - 5]);
        assert_eq!((a.difference(&b), b.difference(&a)), (None, None));
    }

    #[test]
    fn the_first_call_that_differs_is_named_though_later_ones_are_equal() {
        let (a, b) = (words(), words());
        let (a, b) = (Book(&a), Book(&b));
        let mut notes: Vec<_> = (0..100).map(note).collect();
        write(&a, &notes);
        notes[40].count = 41_000;
        notes[41].more = 1;
        write(&b, &notes);
        let found = a.difference(&b).unwrap();
        assert_eq!(found.number, 40);
        assert_eq!(describe(found.own), "all_reduce of 40 bf16 by one_shot");
        assert_eq!(describe(found.other), "all_reduce of 41000 bf16 by one_shot");
        // What the words do not show counts as well.
        let c = words();
        let c = Book(&c);
        notes[40].count = 40;
        write(&c, &notes);
        assert_eq!(a.difference(&c).unwrap().number, 41);
    }

    #[test]
    fn a_call_left_out_and_calls_out_of_order_are_seen() {
        let (a, b, c) = (words(), words(), words());
        let (a, b, c) = (Book(&a), Book(&b), Book(&c));
        let mut notes: Vec<_> = (0..10).map(note).collect();
        write(&a, &notes);
        write(&b, &notes[1..]);
        assert_eq!(a.difference(&b).unwrap().number, 0);
        notes.swap(3, 7);
        write(&c, &notes);
        assert_eq!(c.difference(&a).unwrap().number, 3);
    }

    #[test]
    fn a_ring_that_has_gone_on_too_far_is_not_compared() {
        let (a, b) = (words(), words());
        let (a, b) = (Book(&a), Book(&b));
        write(&a, &(0..2 * CALLS).map(note).collect::<Vec<_>>());
        write(&b, &[note(7)]);
        assert_eq!(a.difference(&b), None);
    }

    #[test]
    fn a_reader_beside_the_writer_sees_no_difference_that_is_not_there() {
        let (a, b) = (words(), words());
        let notes: Vec<_> = (0..20 * CALLS).map(note).collect();
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            let writers: Vec<_> =
                [&a, &b].into_iter().map(|words| scope.spawn(|| write(&Book(words), &notes))).collect();
            let reader = scope.spawn(|| {
                let mut looks = 0_u64;
                while !done.load(Ordering::Acquire) || looks == 0 {
                    assert_eq!(Book(&a).difference(&Book(&b)), None);
                    looks += 1;
                }
            });
            writers.into_iter().for_each(|writer| writer.join().unwrap());
            done.store(true, Ordering::Release);
            reader.join().unwrap();
        });
    }
}
