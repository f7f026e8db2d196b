//! What is run, and which mutants must be caught.

use super::super::memory::AHEAD;
use super::super::reordering::{ALL, FIRST, FIRST_OF_THREE, Trouble, check, holds, is_caught};
use super::super::writer::Mutant;
use super::{Kernel, Lines, lines};

const fn run(world: usize, kernels: &[Kernel]) -> Lines<'_> {
    Lines { world, kernels, first: FIRST, lines: 1, at_once: true }
}

/// Stores land late and out of order.
const fn late(world: usize, kernels: &[Kernel]) -> Lines<'_> {
    Lines { at_once: false, ..run(world, kernels) }
}

const fn gather(rounds: usize) -> Kernel {
    Kernel::gather(rounds)
}
const fn from(root: usize, rounds: usize) -> Kernel {
    Kernel::from(root, rounds)
}

/// Kernels of one warp, of so many rounds, with slices of every length that there can be.
fn shapes(world: usize, rounds: &[usize]) -> Vec<Kernel> {
    let mut shapes = Vec::new();
    for &rounds in rounds {
        let most_short = if rounds == 1 { world - 2 } else { 1.min(world - 2) };
        let broadcasts = (0..world).flat_map(|root| (0..=most_short).map(move |short| (root, short)));
        shapes.push(gather(rounds));
        shapes.extend(broadcasts.map(|(root, short)| from(root, rounds).short(short)));
    }
    shapes
}

/// Checks all sequences of `length` of these kernels. Ranks are alike: the first root is rank 0.
#[track_caller]
fn all_hold(world: usize, shapes: &[Kernel], length: usize, mutant: Mutant) {
    let mut sequences = vec![Vec::new()];
    for _ in 0..length {
        let longer = |sequence: &Vec<Kernel>| {
            shapes.iter().map(|&shape| [&sequence[..], &[shape]].concat()).collect::<Vec<_>>()
        };
        sequences = sequences.iter().flat_map(longer).collect();
        sequences
            .retain(|sequence| sequence.iter().find_map(|kernel| kernel.root).is_none_or(|root| root == 0));
    }
    let mut visited = 0;
    for sequence in &sequences {
        let (broken, states) = check(lines(run(world, sequence), mutant), Trouble::Nothing);
        assert_eq!(broken, Vec::<&str>::new(), "{sequence:?}, {mutant:?}");
        visited += states;
    }
    eprintln!("{} sequences of {world} ranks, {visited} states", sequences.len());
}

#[test]
fn sequences_of_three() {
    all_hold(2, &shapes(2, &[1, 2, 3, 4, 5, 6]), 3, Mutant::None);
    all_hold(3, &shapes(3, &[1, 2, 4, 5]), 3, Mutant::None);
    all_hold(3, &shapes(3, &[3, 6, 9]), 2, Mutant::None);
    all_hold(4, &shapes(4, &[1, 2, 4]), 2, Mutant::None);
}

/// Two warps, of which one is there in some of the kernels only, or has nothing in the last round, or at all.
#[test]
fn sequences_of_grids() {
    let one_warp = [gather(1), from(0, 4), from(1, 1).short(1)];
    let two_warps =
        [gather(1), gather(7), from(0, 1).short(1), from(1, 4), from(0, 9).short(1)].map(|it| it.over(2));
    let one_block = [from(0, 3), from(1, 9)].map(|it| it.over(2).blocks_of(2));
    all_hold(3, &[&one_warp[..], &two_warps, &one_block].concat(), 2, Mutant::None);
    holds(lines(run(3, &UNKNOWN_START), Mutant::None), Trouble::Nothing);
}

#[test]
fn trouble() {
    for trouble in ALL {
        for kernels in [
            &[from(0, 6)][..],
            &[from(0, 4), gather(2)],
            &[gather(3), from(1, 2), from(2, 1)],
            &[from(0, 1), from(1, 1), from(2, 1).short(1), gather(1)],
            &[gather(3).over(2), from(0, 3).over(2)],
        ] {
            holds(lines(run(3, kernels), Mutant::None), trouble);
        }
    }
    for kernels in [&[from(0, 1)][..], &[gather(1), gather(1)]] {
        is_caught(lines(run(3, kernels), Mutant::GarbageGoesOut), Trouble::Impatience);
    }
}

#[test]
fn late_stores() {
    for kernels in
        [&[gather(5)][..], &[gather(3), gather(2)], &[from(0, 2)], &[from(0, 1), from(1, 1), gather(1)]]
    {
        holds(lines(late(3, kernels), Mutant::None), Trouble::Nothing);
    }
    holds(lines(late(3, &[from(0, 1)]), Mutant::None), Trouble::Impatience);
}

#[test]
fn bursts_of_two_stores() {
    let torn = |kernels| Lines { lines: 2, ..late(3, kernels) };
    for kernels in [&[gather(2)][..], &[from(0, 1)]] {
        holds(lines(torn(kernels), Mutant::None), Trouble::Nothing);
        is_caught(lines(torn(kernels), Mutant::OneLineSeen), Trouble::Nothing);
    }
}

#[test]
fn buffers() {
    let small = |kernels| Lines { first: FIRST_OF_THREE, ..run(3, kernels) };
    for kernels in
        [&[gather(5)][..], &[from(0, 5)], &[from(0, 3), gather(1)], &[gather(7).over(2), gather(2).over(2)]]
    {
        for mutant in [Mutant::OneBufferFewer, Mutant::OneBuffer] {
            is_caught(lines(small(kernels), mutant), Trouble::Nothing);
        }
    }
}

/// The last round but two of a kernel may not have been read everywhere when the next begins.
#[test]
fn second_push() {
    for kernels in [
        &[from(0, 3), from(0, 2)][..],
        &[from(0, 3), gather(2)],
        &[gather(7).over(2), gather(4).over(2)],
        &[gather(7).over(2), from(0, 4).over(2)],
    ] {
        is_caught(lines(run(3, kernels), Mutant::EarlySecondPush), Trouble::Nothing);
    }
    for kernels in [&[from(0, 3), from(0, 2)][..], &[gather(1), from(0, 4)]] {
        is_caught(lines(run(3, kernels), Mutant::NoEntry), Trouble::Nothing);
    }
}

#[test]
fn tokens() {
    for mutant in [Mutant::NoAwaitFree, Mutant::WrongRound, Mutant::EarlyRelease] {
        for world in [2, 3, 4] {
            is_caught(lines(run(world, &[from(0, 5)]), mutant), Trouble::Nothing);
        }
    }
    is_caught(lines(run(3, &[from(0, 4)]), Mutant::WrapIgnored), Trouble::Nothing);
    for mutant in [Mutant::NoTokensAtEnd, Mutant::WrongRound, Mutant::EarlyRelease] {
        for next in [from(0, 1), gather(1)] {
            is_caught(lines(run(3, &[from(0, 4), next]), mutant), Trouble::Nothing);
        }
    }
}

/// Of the gather, rank 2 knows for its second warp that round 0 has been read. The next kernel's relay 0 sends nothing, and
/// rank 2 has to know that it has started before it sends round 5, where round 1 was.
const UNKNOWN_START: [Kernel; 3] = [gather(7).over(2), from(1, 1).short(1), from(2, 2).over(2)];

#[test]
fn entry_at_the_end() {
    for next in [from(0, 1), gather(1)] {
        is_caught(
            lines(run(3, &[from(0, 3), from(0, 1), next]), Mutant::NoEntryAtRootsEnd),
            Trouble::Nothing,
        );
    }
    is_caught(lines(run(3, &UNKNOWN_START), Mutant::NoEntryAtRelaysEnd), Trouble::Nothing);
}

/// Whoever is through has raised the flag for the next kernel, by as much as this one has rounds, where a rank that is late
/// still waits for it.
#[test]
fn entry_after_many_rounds() {
    for world in [2, 3] {
        let [few, many] = [AHEAD - 1, AHEAD].map(|rounds| [from(0, rounds.into()), from(0, 1)]);
        holds(lines(run(world, &many), Mutant::None), Trouble::Nothing);
        holds(lines(run(world, &few), Mutant::AheadIgnored), Trouble::Nothing);
        is_caught(lines(run(world, &many), Mutant::AheadIgnored), Trouble::Nothing);
    }
}

#[test]
fn spares() {
    all_hold(2, &shapes(2, &[1, 2, 3, 4, 5]), 3, Mutant::SparesLeftOut);
    all_hold(3, &shapes(3, &[1, 4, 5]), 3, Mutant::SparesLeftOut);
    all_hold(4, &shapes(4, &[1, 2, 4]), 2, Mutant::SparesLeftOut);
    for trouble in ALL {
        holds(lines(run(3, &[from(0, 5), from(1, 1)]), Mutant::SparesLeftOut), trouble);
    }
    holds(lines(run(3, &UNKNOWN_START), Mutant::SparesLeftOut), Trouble::Nothing);
}
