//! Protocols that are too large for every interleaving: everything happens as soon as it can, except for a few actors, which
//! are held back from any point on until nothing else can happen.
//!
//! While nobody gives up, most protocols are deterministic: who waits for what is written down, and no order of events
//! changes what is stored, unless something is overwritten before it was read, or read before it was written. Either needs
//! an actor that is late, the reader or the store, and the others can be ahead of it at most as far as they get while it is
//! held. So one held actor is enough to see either, from whatever point on; two, or one and a rank that gives up meanwhile,
//! reach further. Where ranks decide by who came first, as in the counts of sums in steps, it is a search and no proof.

use stateright::Model as _;

use super::memory::{Protocol, Value, Word};
use super::reordering::{Action, Checked, State, Trouble};

/// Who is held back.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Actor {
    Rank(usize),
    Store(usize, Word, Value),
}

struct Search<'a> {
    model: &'a Checked,
    /// Whose actors are held.
    held_ranks: &'a dyn Fn(usize) -> bool,
    steps: usize,
}

impl Search<'_> {
    fn actor(&self, state: &State, action: Action) -> Option<Actor> {
        match action {
            Action::Step(index) => Some(Actor::Rank(index)),
            Action::Land(index, number) => {
                let store = &state.ranks[index].pending[number];
                Some(Actor::Store(index, store.at, store.value))
            }
            Action::GiveUp(_) | Action::Crash(_) => None,
        }
    }

    /// What goes wrong from here on, if `budget` more actors may be held back.
    fn run(&mut self, mut state: State, mut held: Vec<Actor>, budget: usize) -> Option<String> {
        loop {
            self.steps += 1;
            if let Some(index) = state.ranks.iter().position(|rank| rank.wrong) {
                let behind = state.ranks[index].at;
                return Some(format!("{index} took a wrong value before its step {behind}, held: {held:?}"));
            }
            let mut actions = Vec::new();
            self.model.actions(&state, &mut actions);
            // What has landed may let others go on; so stores come first.
            actions.sort_by_key(|action| !matches!(action, Action::Land(..)));
            let free = actions.iter().find_map(|&action| {
                let actor = self.actor(&state, action)?;
                (!held.contains(&actor)).then_some((action, actor))
            });
            let Some((action, actor)) = free else {
                // Once one has given up it does not matter in which order the others do.
                let unwell = self.model.unwell(&state);
                let waiting = actions.iter().copied().filter(
                    |action| matches!(*action, Action::GiveUp(index) if !held.contains(&Actor::Rank(index))),
                );
                for action in waiting.take(if unwell { 1 } else { usize::MAX }) {
                    {
                        let next = self.model.next_state(&state, action)?;
                        let found = self.run(next, held.clone(), budget);
                        if found.is_some() {
                            return found;
                        }
                    }
                }
                if held.is_empty() {
                    let stuck = actions.is_empty() && !self.model.all_ended(&state);
                    return stuck.then(|| {
                        let ranks = 0..state.ranks.len();
                        let at: Vec<_> =
                            ranks.filter_map(|rank| self.model.instr(&state, rank)).take(2).collect();
                        format!("stuck, first at {at:?}")
                    });
                }
                held.clear();
                continue;
            };
            let holder = match actor {
                Actor::Rank(index) | Actor::Store(index, ..) => index,
            };
            if budget > 0 && (self.held_ranks)(holder) {
                let mut more = held.clone();
                more.push(actor);
                let found = self.run(state.clone(), more, budget - 1);
                if found.is_some() {
                    return found;
                }
            }
            state = self.model.next_state(&state, action)?;
        }
    }
}

/// What goes wrong with up to `budget` actors of the ranks that `held_ranks` names held back.
fn search(
    protocol: Protocol,
    trouble: Trouble,
    budget: usize,
    held_ranks: &dyn Fn(usize) -> bool,
) -> (Option<String>, usize) {
    let model = Checked { protocol, trouble };
    let mut search = Search { model: &model, held_ranks, steps: 0 };
    let found = model.init_states().into_iter().find_map(|state| search.run(state, Vec::new(), budget));
    (found, search.steps)
}

#[track_caller]
pub(crate) fn holds(protocol: Protocol, trouble: Trouble, budget: usize) {
    holds_for(protocol, trouble, budget, &|_| true);
}

/// The ranks are alike: it is enough to hold back those that `held_ranks` names.
#[track_caller]
pub(crate) fn holds_for(
    protocol: Protocol,
    trouble: Trouble,
    budget: usize,
    held_ranks: &dyn Fn(usize) -> bool,
) {
    let (found, steps) = search(protocol, trouble, budget, held_ranks);
    assert_eq!(found, None, "after {steps} steps");
    eprintln!("{steps} steps with {trouble:?}, {budget} held back");
}

#[track_caller]
pub(crate) fn is_caught(protocol: Protocol, trouble: Trouble, budget: usize) {
    let (found, steps) = search(protocol, trouble, budget, &|_| true);
    assert!(found.is_some(), "not caught in {steps} steps");
    eprintln!("caught: {} after {steps} steps", found.unwrap_or_default());
}
