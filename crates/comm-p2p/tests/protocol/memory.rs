//! What a rank does to shared memory, and the memory that it does it to.

use std::collections::HashMap;

/// A word of shared memory.
pub(crate) type Word = u8;
/// What a word holds: a number in the high byte (a round, or 0), a payload in the low one.
pub(crate) type Value = u16;
/// Rounds wrap at 2^8 here, so that models see it; four buffers divide it as they divide 2^32.
pub(crate) type Round = u8;

/// The value of a word that announces a round.
pub(crate) const fn packet(round: Round, payload: u8) -> Value {
    (round as Value) << 8 | payload as Value
}

/// The round in a value.
pub(crate) const fn round_of(value: Value) -> Round {
    (value >> 8) as Round
}

/// What a Lamport slot holds while nothing has arrived.
pub(crate) const MARK: Value = Value::MAX;
/// What a rank sends that has computed with what never arrived.
pub(crate) const GARBAGE: u8 = 0xee;

/// When a load or store is performed relative to others of its rank.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Order {
    /// Not at all.
    Relaxed,
    /// A store after everything before it; a load before everything after it.
    Synchronising,
}

/// When a wait ends.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Until {
    /// `Flag::raised`: the word's round has reached this one.
    Reached(Round),
    /// The mutant of it that compares without regard to the wrap.
    AtLeast(Round),
    /// `Packet::arrived`: the word carries this round.
    Carries(Round),
    /// `Lamport::arrived`: the word is not the mark.
    Differs,
}

/// How far ahead of a wait a flag may be.
const AHEAD: Round = 16;

impl Until {
    fn holds(self, value: Value) -> bool {
        match self {
            Self::Reached(round) => round_of(value).wrapping_sub(round) < AHEAD,
            Self::AtLeast(round) => round_of(value) >= round,
            Self::Carries(round) => round_of(value) == round,
            Self::Differs => value != MARK,
        }
    }
}

/// One access, or an order between accesses.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Instr {
    /// `derived`: the value depends on what was received.
    Store { at: Word, value: Value, order: Order, derived: bool },
    /// `fence.acq_rel.sys`
    Fence,
    /// A bounded wait. If `sees`, what it has loaded must be that.
    Await { at: Word, until: Until, order: Order, sees: Option<Value> },
    /// A load of what must be there.
    Read { at: Word, sees: Value },
    /// The kernel ends and the stream's next begins: all that it stored has been performed.
    KernelEnd,
}

/// Shared memory as one rank reaches it.
pub(crate) trait Mem {
    fn store(&mut self, at: Word, value: Value, order: Order);
    fn load(&mut self, at: Word, order: Order) -> Value;
    fn fence(&mut self);
    /// Whether all that this rank stored has been performed.
    fn drained(&mut self) -> bool;
}

/// What came of trying to take a step.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Outcome {
    Done,
    /// The wait goes on.
    Waits,
    /// What was there is not what had to be there.
    Wrong,
}

/// What a rank goes on sending after it has given up a wait: nothing, and two mutants of that.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub(crate) enum Leak {
    #[default]
    Nothing,
    /// What other kernels than those that wait copy: everything but flags.
    Copies,
    Everything,
}

/// Takes one step. `silent`: the rank has given up a wait, so that it waits no more and sends nothing but what leaks.
pub(crate) fn step(instr: &Instr, mem: &mut impl Mem, silent: bool, leak: Leak) -> Outcome {
    match *instr {
        Instr::Store { at, value, order, derived } => {
            if !silent {
                mem.store(at, value, order);
            } else if leak == Leak::Everything || (leak == Leak::Copies && order == Order::Relaxed) {
                let value = if derived { value & 0xff00 | Value::from(GARBAGE) } else { value };
                mem.store(at, value, order);
            }
            Outcome::Done
        }
        Instr::Fence => {
            mem.fence();
            Outcome::Done
        }
        Instr::Await { .. } | Instr::Read { .. } if silent => Outcome::Done,
        Instr::Await { at, until, order, sees } => {
            let value = mem.load(at, order);
            match sees {
                _ if !until.holds(value) => Outcome::Waits,
                Some(sees) if sees != value => Outcome::Wrong,
                _ => Outcome::Done,
            }
        }
        Instr::Read { at, sees } => match mem.load(at, Order::Relaxed) == sees {
            true => Outcome::Done,
            false => Outcome::Wrong,
        },
        Instr::KernelEnd => match mem.drained() {
            true => Outcome::Done,
            false => Outcome::Waits,
        },
    }
}

/// A place in the memory that the ranks share.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Place {
    /// `flag(owner, kind, src)`
    Flag { owner: usize, kind: u8, src: usize },
    /// `slot(owner, round % buffers, stage, src)`, or a cell; `part`: one of the words that are atomic each by itself.
    Slot { owner: usize, buffer: usize, stage: u8, src: usize, part: u8 },
    /// Rank `src`'s part of `owner`'s result.
    Result { owner: usize, src: usize },
}

/// All ranks' programs and what memory holds before them.
#[derive(Clone, Default, Debug)]
pub(crate) struct Protocol {
    pub(crate) ranks: Vec<Vec<Instr>>,
    pub(crate) memory: Vec<Value>,
    /// The mutants of the rule that a rank which gave up falls silent.
    pub(crate) leak: Leak,
    places: HashMap<Place, Word>,
}

impl Protocol {
    pub(crate) fn new(world: usize) -> Self {
        Self { ranks: vec![Vec::new(); world], ..Self::default() }
    }

    /// The word at a place, which holds `initially` before the first use of it.
    pub(crate) fn word(&mut self, place: Place, initially: Value) -> Word {
        *self.places.entry(place).or_insert_with(|| {
            self.memory.push(initially);
            Word::try_from(self.memory.len() - 1).unwrap_or_else(|_| panic!("a model has few words"))
        })
    }
}
