//! cube.cuh: all-reduces and all-gather of a hybrid cube mesh, one thread.
//!
//! Besides the eight ranks of the kernels, cubes of four are checked: two quads of two ranks each. Four are enough to see what
//! is overwritten early or read too soon. Of the eight, take a rank, a neighbour in its quad, and the relays of both: whatever
//! goes from one of these four to another, directly or passed on, goes through these four alone, by the same steps in the
//! same order. So what the four do in a run of eight is a run of the cube of four, which waits for less; and a slot's
//! owner, its source and who stores it are always among four such ranks. That nobody waits for ever is not carried over; it
//! rests on the order of the steps, which is the same, and is checked with eight ranks as well.
//!
//! Four buffers are more than these kernels need: two would do, and are what most checks have here, because with four a
//! missing protection would show only after several others have failed. Left out: `forward` hands packs on in the order in
//! which they come, here in the order of the quad.

use super::holding;
use super::memory::{Instr, Order, Protocol, Round, Until, Word, packet};
use super::reordering::{ALL, FIRST, Trouble, holds, is_caught};
use super::writer::{Mutant, Writer, payload};

/// `CubeRow`
const CONTRIBUTION: u8 = 0;
const SUM: u8 = 1;
const TRANSIT: u8 = 2;

/// `CubeRoles`
struct Roles {
    quad: Vec<usize>,
    relay: usize,
    far: Vec<usize>,
}

impl Roles {
    fn of(rank: usize, world: usize) -> Self {
        let half = world / 2;
        let quad: Vec<_> = (0..world).filter(|&other| other / half == rank / half && other != rank).collect();
        let opposite = |rank: usize| (rank + half) % world;
        let far = quad.iter().map(|&other| opposite(other)).collect();
        Self { quad, relay: opposite(rank), far }
    }
}

/// `place`
fn place(w: &mut Writer, owner: usize, round: Round, kind: u8, src: usize) -> Word {
    w.slot(owner, round, kind, src, None)
}

fn send(w: &mut Writer, rank: usize, at: (usize, u8, usize), round: Round, derived: bool) {
    let (to, kind, src) = at;
    let at = place(w, to, round, kind, src);
    w.store(rank, at, packet(round, payload(round, src)), derived);
}

fn receive(w: &mut Writer, rank: usize, round: Round, kind: u8, src: usize) {
    let at = place(w, rank, round, kind, src);
    let (until, order) = (Until::Carries(round), Order::Relaxed);
    w.emit(rank, Instr::Await { at, until, order, sees: Some(packet(round, payload(round, src))) });
}

fn tell_neighbours(w: &mut Writer, rank: usize, round: Round, kind: u8) {
    let Roles { quad, relay, .. } = Roles::of(rank, w.world);
    for to in quad.into_iter().chain([relay]) {
        send(w, rank, (to, kind, rank), round, kind == SUM);
    }
}

fn pass_on(w: &mut Writer, rank: usize, round: Round, kind: u8) {
    let Roles { quad, relay, .. } = Roles::of(rank, w.world);
    if w.mutant == Mutant::WrongRound {
        // What is there is passed on, whatever round it carries.
        let at = place(w, rank, round, kind, relay);
        let sees = Some(packet(round, payload(round, relay)));
        w.emit(rank, Instr::Await { at, until: Until::Differs, order: Order::Relaxed, sees });
    } else {
        receive(w, rank, round, kind, relay);
    }
    for to in quad {
        send(w, rank, (to, kind, relay), round, true);
    }
}

fn collect(w: &mut Writer, rank: usize, round: Round, kind: u8, has: &dyn Fn(usize) -> bool) {
    let words = w
        .others(rank)
        .filter(|&src| has(src))
        .map(|src| (place(w, rank, round, kind, src), packet(round, payload(round, src))))
        .collect();
    w.emit(rank, Instr::Collect { words, until: Until::Carries(round) });
}

fn scatter(w: &mut Writer, rank: usize, round: Round, has: &dyn Fn(usize) -> bool) {
    let Roles { quad, relay, far } = Roles::of(rank, w.world);
    for &to in quad.iter().chain([&relay]).filter(|&&to| has(to)) {
        send(w, rank, (to, CONTRIBUTION, rank), round, false);
    }
    for (&to, _) in quad.iter().zip(&far).filter(|&(_, &far)| has(far)) {
        send(w, rank, (to, TRANSIT, rank), round, false);
    }
}

fn forward(w: &mut Writer, rank: usize, round: Round) {
    let Roles { quad, relay, .. } = Roles::of(rank, w.world);
    for src in quad {
        receive(w, rank, round, TRANSIT, src);
        send(w, rank, (relay, CONTRIBUTION, src), round, true);
    }
}

/// A cube of `world` ranks whose slots have `buffers` buffers.
fn cube(world: usize, buffers: u8, first: Round, mutant: Mutant) -> Writer {
    let mut w = Writer::new(world, first, mutant);
    w.buffers = if mutant == Mutant::OneBufferFewer { buffers - 1 } else { buffers };
    w
}

/// `cube_all_reduce_one_shot`
fn one_shot(world: usize, buffers: u8, kernels: u8, mutant: Mutant) -> Protocol {
    let mut w = cube(world, buffers, FIRST, mutant);
    for _ in 0..kernels {
        let round = w.claim_rounds(1);
        for rank in 0..world {
            tell_neighbours(&mut w, rank, round, CONTRIBUTION);
            pass_on(&mut w, rank, round, CONTRIBUTION);
            collect(&mut w, rank, round, CONTRIBUTION, &|_| true);
            w.end(rank, []);
        }
    }
    w.protocol
}

/// `cube_all_reduce_two_shot`; the rounds of each kernel.
fn two_shot(world: usize, buffers: u8, kernels: &[u8], mutant: Mutant) -> Protocol {
    two_shot_with_end(world, buffers, kernels, 0, mutant)
}

/// The same for a thread that has no packs of the last slice in the last `short` rounds of a kernel.
fn two_shot_with_end(world: usize, buffers: u8, kernels: &[u8], short: u8, mutant: Mutant) -> Protocol {
    let mut w = cube(world, buffers, FIRST, mutant);
    for &rounds in kernels {
        let first = w.claim_rounds(rounds);
        let has = |k: u8| move |slice: usize| slice + 1 < world || k + short < rounds;
        for rank in 0..world {
            let relay = Roles::of(rank, world).relay;
            scatter(&mut w, rank, first, &has(0));
            for k in 0..rounds {
                let round = first.wrapping_add(k);
                let next = round.wrapping_add(1);
                if k > 0 && k + 1 < rounds {
                    scatter(&mut w, rank, next, &has(k + 1));
                }
                if has(k)(relay) {
                    forward(&mut w, rank, round);
                }
                if has(k)(rank) {
                    collect(&mut w, rank, round, CONTRIBUTION, &|_| true);
                    tell_neighbours(&mut w, rank, round, SUM);
                }
                if has(k)(relay) {
                    pass_on(&mut w, rank, round, SUM);
                }
                if mutant != Mutant::NoExit {
                    collect(&mut w, rank, round, SUM, &has(k));
                }
                if k == 0 && rounds > 1 {
                    scatter(&mut w, rank, next, &has(1));
                }
            }
            w.end(rank, []);
        }
    }
    w.protocol
}

/// `cube_all_gather`; the rounds of each kernel.
fn all_gather(world: usize, buffers: u8, kernels: &[u8], mutant: Mutant) -> Protocol {
    let mut w = cube(world, buffers, FIRST, mutant);
    for &rounds in kernels {
        let first = w.claim_rounds(rounds);
        for rank in 0..world {
            for k in 0..rounds {
                let round = first.wrapping_add(k);
                tell_neighbours(&mut w, rank, round, SUM);
                pass_on(&mut w, rank, round, SUM);
                collect(&mut w, rank, round, SUM, &|_| true);
            }
            w.end(rank, []);
        }
    }
    w.protocol
}

#[test]
fn one_shot_of_four() {
    holds(one_shot(4, 4, 1, Mutant::None), Trouble::Nothing);
    holding::holds(one_shot(4, 2, 5, Mutant::None), Trouble::Impatience, 1);
    for mutant in [Mutant::OneBufferFewer, Mutant::WrongRound] {
        holding::is_caught(one_shot(4, 2, 5, mutant), Trouble::Nothing, 1);
    }
    holding::is_caught(one_shot(4, 2, 1, Mutant::GarbageGoesOut), Trouble::Impatience, 1);
}

#[test]
fn two_shot_of_four() {
    holding::holds(two_shot(4, 2, &[4, 1, 2], Mutant::None), Trouble::Impatience, 1);
    holding::holds(two_shot(4, 2, &[2, 1], Mutant::None), Trouble::Nothing, 2);
    for short in [1, 2] {
        holding::holds(two_shot_with_end(4, 2, &[3, 2, 3], short, Mutant::None), Trouble::Nothing, 1);
    }
    for mutant in [Mutant::OneBufferFewer, Mutant::NoExit, Mutant::WrongRound] {
        holding::is_caught(two_shot(4, 2, &[3, 3], mutant), Trouble::Nothing, 1);
    }
    holding::is_caught(two_shot(4, 2, &[1], Mutant::GarbageGoesOut), Trouble::Impatience, 1);
}

#[test]
fn all_gather_of_four() {
    for trouble in ALL {
        holds(all_gather(4, 2, &[1], Mutant::None), trouble);
    }
    holding::holds(all_gather(4, 2, &[4, 1, 2], Mutant::None), Trouble::Impatience, 1);
    is_caught(all_gather(4, 2, &[2], Mutant::OneBufferFewer), Trouble::Nothing);
    is_caught(all_gather(4, 2, &[1], Mutant::GarbageGoesOut), Trouble::Impatience);
}

/// All ranks of a cube are alike.
#[test]
fn eight() {
    let first = |rank| rank == 0;
    holding::holds_for(one_shot(8, 4, 6, Mutant::None), Trouble::Nothing, 1, &first);
    holding::holds_for(two_shot(8, 4, &[5, 1, 2], Mutant::None), Trouble::Nothing, 1, &first);
    holding::holds_for(all_gather(8, 4, &[5, 1], Mutant::None), Trouble::Nothing, 1, &first);
    holding::is_caught(two_shot(8, 2, &[3], Mutant::OneBufferFewer), Trouble::Nothing, 1);
}
