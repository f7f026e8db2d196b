//! What a rank does to shared memory, and the memory that it does it to.

use std::collections::HashMap;

/// A word of shared memory.
pub(crate) type Word = u16;
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
    /// The same for a flag that may be further ahead, by so much.
    ReachedWithin(Round, Round),
    /// The mutant of it that compares without regard to the wrap.
    AtLeast(Round),
    /// `Packet::arrived`: the word carries this round.
    Carries(Round),
    /// `Lamport::arrived`: the word is not the mark.
    Differs,
}

/// How far ahead of a wait a flag may be.
pub(crate) const AHEAD: Round = 16;

impl Until {
    fn holds(self, value: Value) -> bool {
        match self {
            Self::Reached(round) => round_of(value).wrapping_sub(round) < AHEAD,
            Self::ReachedWithin(round, further) => round_of(value).wrapping_sub(round) < AHEAD + further,
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
    /// A store by a kernel that does not look whether its rank has given up a wait.
    Unguarded { at: Word, value: Value },
    /// `fence.acq_rel.sys`
    Fence,
    /// A bounded wait. If `sees`, what it has loaded must be that.
    Await { at: Word, until: Until, order: Order, sees: Option<Value> },
    /// A bounded wait by one thread for all of these words at once, `receive_all`: a poll loads all before it looks at any.
    /// When all are there, they must be these.
    Collect { words: Vec<(Word, Value)>, until: Until },
    /// A load of what must be there.
    Read { at: Word, sees: Value },
    /// Loads of what must be there.
    ReadAll { words: Vec<(Word, Value)> },
    /// A relaxed atomic increment of a counter of this rank. Whoever does not bring it to `total` skips the next `skip`.
    Count { at: Word, total: Value, skip: u16 },
    /// Takes the next place in a queue of this rank, a counter.
    Take { queue: Word },
    /// Goes on where the place that was taken last says; places behind the last one are the last one.
    Go { to: Vec<u16> },
    /// The kernel ends and the stream's next begins: all that it stored has been performed.
    KernelEnd,
    /// What comes next belongs to the rank's next kernel, for which all of its agents must have ended the one before.
    KernelBegin,
}

/// Shared memory as one rank reaches it.
pub(crate) trait Mem {
    fn store(&mut self, at: Word, value: Value, order: Order);
    fn load(&mut self, at: Word, order: Order) -> Value;
    fn fence(&mut self);
    /// Adds one and returns what was there before; `None` as long as an earlier access of this rank has to come first.
    fn increment(&mut self, at: Word) -> Option<Value>;
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
    /// Done, and so many of what follows are left out.
    Skips(u16),
    /// Done, and what follows stands here.
    Goes(u16),
}

/// Takes one step. `silent`: the rank has given up a wait, so that it waits no more and sends nothing.
/// `garbage_goes_out`: the mutant in which it does send. `taken`: the place that was taken last.
pub(crate) fn step(
    instr: &Instr,
    mem: &mut impl Mem,
    taken: &mut Value,
    silent: bool,
    garbage_goes_out: bool,
) -> Outcome {
    match *instr {
        Instr::Store { at, value, order, derived } => {
            if !silent {
                mem.store(at, value, order);
            } else if garbage_goes_out {
                let value = if derived { value & 0xff00 | Value::from(GARBAGE) } else { value };
                mem.store(at, value, order);
            }
            Outcome::Done
        }
        Instr::Unguarded { at, value } => {
            mem.store(at, value, Order::Relaxed);
            Outcome::Done
        }
        Instr::Fence => {
            mem.fence();
            Outcome::Done
        }
        Instr::Count { at, total, skip } => match mem.increment(at) {
            None => Outcome::Waits,
            Some(before) if before + 1 == total => Outcome::Done,
            Some(_) => Outcome::Skips(skip),
        },
        Instr::Take { queue } => match mem.increment(queue) {
            None => Outcome::Waits,
            Some(place) => {
                *taken = place;
                Outcome::Done
            }
        },
        Instr::Go { ref to } => Outcome::Goes(to[usize::from(*taken).min(to.len() - 1)]),
        Instr::Await { .. } | Instr::Collect { .. } | Instr::Read { .. } | Instr::ReadAll { .. }
            if silent =>
        {
            Outcome::Done
        }
        Instr::Collect { ref words, until } => {
            let loaded: Vec<_> = words.iter().map(|&(at, _)| mem.load(at, Order::Relaxed)).collect();
            if !loaded.iter().all(|&value| until.holds(value)) {
                Outcome::Waits
            } else if words.iter().zip(&loaded).all(|(&(_, sees), &value)| sees == value) {
                Outcome::Done
            } else {
                Outcome::Wrong
            }
        }
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
        Instr::ReadAll { ref words } => {
            match words.iter().all(|&(at, sees)| mem.load(at, Order::Relaxed) == sees) {
                true => Outcome::Done,
                false => Outcome::Wrong,
            }
        }
        Instr::KernelEnd => match mem.drained() {
            true => Outcome::Done,
            false => Outcome::Waits,
        },
        Instr::KernelBegin => Outcome::Done,
    }
}

/// A place in the memory that the ranks share.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Place {
    /// `flag(owner, kind, src)`
    Flag { owner: usize, kind: u8, src: usize },
    /// `slot(owner, round % buffers, stage, src)`, or a cell; `part`: one of the words that are atomic each by itself.
    Slot { owner: usize, buffer: usize, stage: u8, src: usize, part: u8 },
    /// `tile_flag(owner, parity of the round, tile, src)`
    TileFlag { owner: usize, parity: u8, tile: u8, src: usize },
    /// `tile_buffer`, likewise
    Tile { owner: usize, parity: u8, tile: u8, src: usize },
    /// A tile of rank `src`'s slice of `owner`'s result.
    Sum { owner: usize, src: usize, round: u8, tile: u8 },
    /// A counter that one rank alone uses.
    Counter { owner: usize, which: u8 },
    /// What `owner` holds for `src` and who does not reach that; `half` of it.
    Half { owner: usize, src: usize, half: u8, slice: usize },
    /// Rank `src`'s part of `owner`'s result.
    Result { owner: usize, src: usize },
}

/// All ranks' programs and what memory holds before them.
#[derive(Clone, Default, Debug)]
pub(crate) struct Protocol {
    /// The programs of the ranks or, where warps of a rank go their own ways, of those: its agents.
    pub(crate) ranks: Vec<Vec<Instr>>,
    /// The rank of each.
    pub(crate) homes: Vec<usize>,
    pub(crate) memory: Vec<Value>,
    /// The mutant of the rule that a rank which gave up falls silent.
    pub(crate) garbage_goes_out: bool,
    /// Stores land as soon as they can be made, and nobody is told by it that they did (`lines` says when that is enough).
    pub(crate) at_once: bool,
    places: HashMap<Place, Word>,
}

impl Protocol {
    pub(crate) fn new(world: usize) -> Self {
        Self::of_agents((0..world).collect())
    }

    /// Agents of these ranks. One that gives up a wait ends; the rank's next kernel does nothing then.
    pub(crate) fn of_agents(homes: Vec<usize>) -> Self {
        Self { ranks: vec![Vec::new(); homes.len()], homes, ..Self::default() }
    }

    /// Whether ranks have more than one agent.
    pub(crate) fn has_agents(&self) -> bool {
        self.homes.windows(2).any(|pair| pair[0] == pair[1])
    }

    /// The word at a place, which holds `initially` before the first use of it.
    pub(crate) fn word(&mut self, place: Place, initially: Value) -> Word {
        *self.places.entry(place).or_insert_with(|| {
            self.memory.push(initially);
            Word::try_from(self.memory.len() - 1).unwrap_or_else(|_| panic!("a model has few words"))
        })
    }
}
