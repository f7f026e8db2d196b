//! What is run, and which mutants must be caught.

use super::super::holding;
use super::super::reordering::{Trouble, holds, is_caught};
use super::super::writer::Mutant;
use super::{Steps, steps};

const SMALL: Steps<'_> = Steps {
    world: 2,
    movers: 1,
    reducers: 1,
    kernels: &[(3, false)],
    tiles: 1,
    short: false,
    after_cells: false,
};

#[test]
fn every_interleaving_of_the_smallest() {
    holds(steps(SMALL, Mutant::None), Trouble::Nothing);
    holds(steps(Steps { kernels: &[(3, true)], ..SMALL }, Mutant::None), Trouble::Nothing);
    holds(steps(Steps { kernels: &[(1, true), (1, false)], ..SMALL }, Mutant::None), Trouble::Impatience);
    for mutant in [Mutant::OneBufferFewer, Mutant::NoAwaitFree, Mutant::RelaxedRelease, Mutant::EarlyRelease]
    {
        is_caught(steps(SMALL, mutant), Trouble::Nothing);
    }
}

#[test]
fn larger() {
    let all = Steps { kernels: &[(4, true), (1, true)], tiles: 2, reducers: 2, after_cells: true, ..SMALL };
    let three = Steps { world: 3, ..all };
    let short = Steps { short: true, ..all };
    let queue = Steps { movers: 2, ..all };
    for run in [all, short, queue, three] {
        holding::holds(steps(run, Mutant::None), Trouble::Nothing, 1);
    }
    holding::holds(
        steps(Steps { kernels: &[(3, true), (1, false)], ..short }, Mutant::None),
        Trouble::Impatience,
        1,
    );
    for mutant in [
        Mutant::OneBufferFewer,
        Mutant::NoAwaitFree,
        Mutant::WrongRound,
        Mutant::RelaxedRelease,
        Mutant::EarlyRelease,
        Mutant::NoFlush,
        Mutant::NoEntry,
        Mutant::NoExit,
    ] {
        holding::is_caught(steps(all, mutant), Trouble::Nothing, 1);
    }
    // What is counted wrong in round 2 is missed in round 4.
    for mutant in [Mutant::LateReset, Mutant::NoFence] {
        holding::is_caught(steps(Steps { kernels: &[(5, true)], ..all }, mutant), Trouble::Nothing, 1);
    }
    holding::is_caught(
        steps(Steps { kernels: &[(3, true)], ..short }, Mutant::EmptyCounted),
        Trouble::Nothing,
        1,
    );
    holding::is_caught(steps(all, Mutant::GarbageGoesOut), Trouble::Impatience, 1);
}
