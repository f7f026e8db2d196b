//! Every interleaving of the ranks, with stores that land late and out of order; checked by stateright.
//!
//! A rank's stores wait in a buffer and land one by one in any order, except that those to one word keep theirs, and a release
//! or a fence comes between what is before and what is after it. A rank sees its own stores at once.

use stateright::{Checker, HasDiscoveries, Model, Property};

use super::memory::{Instr, Mem, Order, Outcome, Protocol, Value, Word, step};
use super::programs::{self, TwoShot};
use super::writer::Mutant;

/// A store on its way.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Pending {
    pub(crate) at: Word,
    pub(crate) value: Value,
    /// Lands after all of smaller epochs.
    epoch: u8,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
pub(crate) struct Rank {
    pub(crate) at: u16,
    /// The place that it has taken last, of a queue.
    taken: Value,
    /// Kernels that it has ended, where it has to wait for others of its rank.
    ended: u8,
    pub(crate) pending: Vec<Pending>,
    epoch: u8,
    crashed: bool,
    gave_up: bool,
    pub(crate) wrong: bool,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(crate) struct State {
    memory: Vec<Value>,
    pub(crate) ranks: Vec<Rank>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Action {
    Step(usize),
    Land(usize, usize),
    GiveUp(usize),
    Crash(usize),
}

/// Memory as one rank reaches it.
struct View<'a> {
    memory: &'a mut [Value],
    rank: &'a mut Rank,
}

impl View<'_> {
    fn push(&mut self, at: Word, value: Value) {
        let epoch = self.rank.epoch;
        self.rank.pending.push(Pending { at, value, epoch });
    }
}

impl Mem for View<'_> {
    fn store(&mut self, at: Word, value: Value, order: Order) {
        if order == Order::Synchronising {
            self.fence();
        }
        self.push(at, value);
    }

    fn load(&mut self, at: Word, _: Order) -> Value {
        let own = self.rank.pending.iter().rev().find(|store| store.at == at);
        own.map_or(self.memory[usize::from(at)], |store| store.value)
    }

    fn fence(&mut self) {
        if self.rank.pending.iter().any(|store| store.epoch == self.rank.epoch) {
            self.rank.epoch += 1;
        }
    }

    fn increment(&mut self, at: Word) -> Option<Value> {
        // Atomics on a word come after the rank's earlier stores to it, and after all stores that a fence stands behind.
        if self.rank.pending.iter().any(|store| store.at == at || store.epoch < self.rank.epoch) {
            return None;
        }
        self.memory[usize::from(at)] += 1;
        Some(self.memory[usize::from(at)] - 1)
    }

    fn drained(&mut self) -> bool {
        self.rank.pending.is_empty()
    }
}

/// What may go wrong with the ranks themselves.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Trouble {
    Nothing,
    /// One rank may stop anywhere.
    Crash,
    /// One rank may give up a wait for ranks that are only late.
    Impatience,
}

pub(crate) struct Checked {
    pub(crate) protocol: Protocol,
    pub(crate) trouble: Trouble,
}

impl Checked {
    pub(crate) fn instr<'a>(&'a self, state: &State, rank: usize) -> Option<&'a Instr> {
        self.protocol.ranks[rank].get(usize::from(state.ranks[rank].at))
    }

    fn ended(&self, state: &State, rank: usize) -> bool {
        state.ranks[rank].crashed || self.instr(state, rank).is_none()
    }

    pub(crate) fn unwell(&self, state: &State) -> bool {
        state.ranks.iter().any(|rank| rank.crashed || rank.gave_up)
    }

    pub(crate) fn all_ended(&self, state: &State) -> bool {
        (0..state.ranks.len()).all(|rank| self.ended(state, rank))
    }

    /// Indices of those of the same rank.
    fn siblings(&self, index: usize) -> impl Iterator<Item = usize> {
        let homes = &self.protocol.homes;
        (0..homes.len()).filter(move |&other| homes[other] == homes[index])
    }

    /// Whether something happened; if so, the state has changed.
    fn try_step(&self, state: &mut State, index: usize) -> bool {
        let Some(instr) = self.instr(state, index) else { return false };
        if *instr == Instr::KernelBegin {
            let ended = state.ranks[index].ended;
            let through = |rank: &Rank| rank.ended >= ended || rank.gave_up || rank.crashed;
            if !self.siblings(index).all(|other| through(&state.ranks[other])) {
                return false;
            }
            if self.siblings(index).any(|other| state.ranks[other].gave_up) {
                self.give_up(state, index);
                return true;
            }
        }
        let rank = &mut state.ranks[index];
        let (silent, mut taken) = (rank.gave_up, rank.taken);
        let mut view = View { memory: &mut state.memory, rank };
        let outcome = step(instr, &mut view, &mut taken, silent, self.protocol.garbage_goes_out);
        rank.taken = taken;
        rank.at = match outcome {
            Outcome::Waits => return false,
            Outcome::Done | Outcome::Wrong => rank.at + 1,
            Outcome::Skips(skipped) => rank.at + 1 + skipped,
            Outcome::Goes(to) => to,
        };
        rank.wrong |= outcome == Outcome::Wrong;
        if *instr == Instr::KernelEnd && self.protocol.has_agents() {
            rank.ended += 1;
        }
        true
    }

    fn give_up(&self, state: &mut State, index: usize) {
        let rank = &mut state.ranks[index];
        rank.gave_up = true;
        rank.at = match self.protocol.has_agents() && !self.protocol.garbage_goes_out {
            true => u16::try_from(self.protocol.ranks[index].len()).unwrap_or(u16::MAX),
            false => rank.at + 1,
        };
    }

    /// Takes the steps that nobody else can notice: a store only enters the rank's buffer.
    fn run_ahead(&self, state: &mut State, index: usize) {
        while let Some(Instr::Store { .. } | Instr::Unguarded { .. } | Instr::Fence | Instr::Go { .. }) =
            self.instr(state, index)
        {
            if !self.try_step(state, index) {
                break;
            }
        }
        let rank = &mut state.ranks[index];
        if self.protocol.at_once {
            for store in rank.pending.drain(..) {
                state.memory[usize::from(store.at)] = store.value;
            }
        }
        // Only differences of epochs matter.
        let least = rank.pending.iter().map(|store| store.epoch).min().unwrap_or(rank.epoch);
        rank.epoch -= least;
        rank.pending.iter_mut().for_each(|store| store.epoch -= least);
    }
}

impl Model for Checked {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        let mut state = State {
            memory: self.protocol.memory.clone(),
            ranks: vec![Rank::default(); self.protocol.ranks.len()],
        };
        (0..state.ranks.len()).for_each(|rank| self.run_ahead(&mut state, rank));
        vec![state]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        let unwell = self.unwell(state);
        for (index, rank) in state.ranks.iter().enumerate() {
            for (number, store) in rank.pending.iter().enumerate() {
                let first_there = !rank.pending[..number].iter().any(|earlier| earlier.at == store.at);
                if store.epoch == 0 && first_there {
                    actions.push(Action::Land(index, number));
                }
            }
            if self.ended(state, index) {
                continue;
            }
            let goes_on = self.try_step(&mut state.clone(), index);
            if goes_on {
                actions.push(Action::Step(index));
            }
            // A store that lands at once could have been late for the wait that is given up.
            if (!goes_on || self.protocol.at_once)
                && matches!(self.instr(state, index), Some(Instr::Await { .. } | Instr::Collect { .. }))
                && (unwell || self.trouble == Trouble::Impatience)
            {
                actions.push(Action::GiveUp(index));
            }
            if self.trouble == Trouble::Crash && !unwell {
                actions.push(Action::Crash(index));
            }
        }
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = last.clone();
        match action {
            Action::Step(index) => {
                self.try_step(&mut state, index);
                self.run_ahead(&mut state, index);
            }
            Action::Land(index, number) => {
                let store = state.ranks[index].pending.remove(number);
                state.memory[usize::from(store.at)] = store.value;
                self.run_ahead(&mut state, index);
            }
            Action::GiveUp(index) => {
                self.give_up(&mut state, index);
                self.run_ahead(&mut state, index);
            }
            Action::Crash(index) => {
                for other in self.siblings(index) {
                    state.ranks[other].crashed = true;
                }
            }
        }
        Some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("nobody takes a wrong value", |_, state: &State| {
                !state.ranks.iter().any(|rank| rank.wrong)
            }),
            Property::always("nobody is stuck", |model: &Self, state: &State| {
                let mut actions = Vec::new();
                model.actions(state, &mut actions);
                !actions.is_empty() || model.all_ended(state)
            }),
        ]
    }
}

/// The properties that do not hold, and the number of states that were visited.
pub(crate) fn check(protocol: Protocol, trouble: Trouble) -> (Vec<&'static str>, usize) {
    let checker = Checked { protocol, trouble }.checker().finish_when(HasDiscoveries::Any).spawn_dfs().join();
    (checker.discoveries().into_keys().collect(), checker.unique_state_count())
}

/// Rounds begin where they wrap soon.
pub(crate) const FIRST: u8 = 253;
/// Rounds begin where they do not, and where slots hold nothing that looks like one of the first: three buffers do not divide
/// 2^8, and at the wrap two rounds on end would have the same one.
pub(crate) const FIRST_OF_THREE: u8 = 4;

#[track_caller]
pub(crate) fn holds(protocol: Protocol, trouble: Trouble) {
    let (broken, states) = check(protocol, trouble);
    assert_eq!(broken, Vec::<&str>::new(), "after {states} states");
    eprintln!("{states} states with {trouble:?}");
}

#[track_caller]
pub(crate) fn is_caught(protocol: Protocol, trouble: Trouble) {
    let (broken, states) = check(protocol, trouble);
    assert!(!broken.is_empty(), "not caught in {states} states");
    eprintln!("caught: {broken:?} after {states} states");
}

pub(crate) const ALL: [Trouble; 3] = [Trouble::Nothing, Trouble::Crash, Trouble::Impatience];

#[test]
fn direct_stores() {
    for trouble in ALL {
        holds(programs::direct(3, 2, FIRST, Mutant::None), trouble);
    }
    holds(programs::direct(4, 1, FIRST, Mutant::None), Trouble::Nothing);
    for mutant in [Mutant::RelaxedRelease, Mutant::NoEntry, Mutant::NoExit] {
        is_caught(programs::direct(3, 2, FIRST, mutant), Trouble::Nothing);
    }
    is_caught(programs::direct(3, 5, FIRST, Mutant::WrapIgnored), Trouble::Nothing);
    is_caught(programs::direct(3, 2, FIRST, Mutant::GarbageGoesOut), Trouble::Impatience);
}

#[test]
fn packets() {
    // The thread has no pack in the last round of the first kernel.
    let kernels = [(3, 2), (2, 2)];
    for trouble in ALL {
        holds(programs::packets(3, &kernels, FIRST, Mutant::None), trouble);
    }
    holds(programs::packets(4, &[(2, 2)], FIRST, Mutant::None), Trouble::Nothing);
    is_caught(programs::packets(3, &[(5, 5)], FIRST_OF_THREE, Mutant::OneBufferFewer), Trouble::Nothing);
    is_caught(programs::packets(3, &[(3, 2), (3, 3)], FIRST, Mutant::EarlySecondPush), Trouble::Nothing);
    // Within one kernel, and between kernels.
    for kernels in [&[(5, 5)][..], &[(1, 1); 5]] {
        is_caught(programs::packets(3, kernels, FIRST, Mutant::NoEmptyPacks), Trouble::Nothing);
    }
}

#[test]
fn lamport_two_shot() {
    let run = |world, parts, kernels| TwoShot { world, parts, kernels, short: false };
    holds(programs::two_shot(run(2, 2, &[3, 2]), FIRST, Mutant::None), Trouble::Nothing);
    holds(programs::two_shot(run(3, 1, &[1]), FIRST, Mutant::None), Trouble::Impatience);
    let three = Mutant::OneBufferFewer;
    is_caught(programs::two_shot(run(2, 1, &[6]), FIRST_OF_THREE, three), Trouble::Nothing);
    for mutant in [Mutant::NoFence, Mutant::NoRestore] {
        is_caught(programs::two_shot(run(2, 1, &[6]), FIRST, mutant), Trouble::Nothing);
    }
    is_caught(programs::two_shot(run(3, 1, &[1]), FIRST, Mutant::GarbageGoesOut), Trouble::Impatience);
}

#[test]
fn lamport_two_shot_with_a_short_slice() {
    let run = TwoShot { world: 2, parts: 1, kernels: &[3, 2], short: true };
    holds(programs::two_shot(run, FIRST, Mutant::None), Trouble::Nothing);
    is_caught(programs::two_shot(run, FIRST, Mutant::EarlySecondPush), Trouble::Nothing);
}

#[test]
fn cells() {
    for trouble in ALL {
        holds(programs::cells(2, &[4, 2], FIRST, Mutant::None), trouble);
    }
    holds(programs::cells(3, &[2], FIRST, Mutant::None), Trouble::Nothing);
    is_caught(programs::cells(2, &[4, 2], FIRST_OF_THREE, Mutant::OneBufferFewer), Trouble::Nothing);
    for mutant in [Mutant::RelaxedRelease, Mutant::NoExit] {
        is_caught(programs::cells(2, &[4, 2], FIRST, mutant), Trouble::Nothing);
    }
    is_caught(programs::cells(3, &[1], FIRST, Mutant::GarbageGoesOut), Trouble::Impatience);
}

#[test]
fn broadcast_tokens() {
    for trouble in ALL {
        holds(programs::broadcast(3, 2, FIRST, Mutant::None), trouble);
    }
    holds(programs::broadcast(3, 6, FIRST, Mutant::None), Trouble::Nothing);
    is_caught(programs::broadcast(3, 6, FIRST, Mutant::NoToken), Trouble::Nothing);
    is_caught(programs::broadcast(3, 1, FIRST, Mutant::GarbageGoesOut), Trouble::Impatience);
}
