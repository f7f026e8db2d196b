//! What `comm-p2p/src/ops` enqueues on staging memory: messages of a pair (`pairs.rs`, `meet.cu`), and exchanges in two
//! halves (`staged.rs`). Each step is a kernel of its own.
//!
//! The kernels that copy and sum look whether their rank has given up a wait, as the flags' do (`stop.cuh`). Left out:
//! `mesh.cu` has a pair's flags and message in a third rank's memory, by the same steps; and one warp an origin in the
//! barrier, which here follow on one another, as a mesh of three ranks in a row allows.

use super::memory::{Instr, Place, Protocol, Value, Word, packet};
use super::reordering::{ALL, FIRST, Trouble, holds, is_caught};
use super::writer::{ENTER, EXIT, Mutant, Writer, payload};
use super::{holding, memory::Round};

/// A store by `staged.rs` to memory that others read: by `Staging::copy`, and by `Staging::reduce` into a half.
fn fill(w: &mut Writer, rank: usize, at: Word, value: Value, derived: bool) {
    match w.mutant {
        Mutant::UnguardedFill => w.emit(rank, Instr::Unguarded { at, value }),
        _ => w.store(rank, at, value, derived),
    }
}

/// `p2p_pair`: rank 0 sends `messages` chunks to rank 1 through one slot.
pub(crate) fn pair(messages: u8, first: Round, mutant: Mutant) -> Protocol {
    let mut w = Writer::new(2, first, mutant);
    let (free, full) = (w.flag(0, ENTER, 1), w.flag(1, EXIT, 0));
    for number in (0..messages).map(|message| first.wrapping_add(message)) {
        let slot = w.protocol.word(Place::Result { owner: 0, src: 0 }, 0);
        let value = packet(1, payload(number, 0));
        match mutant {
            Mutant::NoAwaitFree => {}
            Mutant::WrongRound => w.await_flag(0, free, number.wrapping_sub(2)),
            _ => w.await_flag(0, free, number.wrapping_sub(1)),
        }
        fill(&mut w, 0, slot, value, false);
        w.raise(0, full, number, true);
        w.await_flag(1, full, number);
        if mutant == Mutant::EarlyRelease {
            w.raise(1, free, number, true);
        }
        w.emit(1, Instr::Read { at: slot, sees: value });
        if mutant != Mutant::EarlyRelease {
            w.raise(1, free, number, true);
        }
    }
    w.protocol
}

/// What a run of exchanges is like.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Exchanges<'a> {
    pub(crate) world: usize,
    /// Chunks of each operation.
    pub(crate) chunks: &'a [u8],
    /// `exchange_twice`: each rank sums its slice where it lies, and the others fetch it.
    pub(crate) twice: bool,
    /// Three ranks, of which the first and the last are no neighbours.
    pub(crate) gap: bool,
}

/// `Staging`: `exchange` or `exchange_twice` for each chunk, and `finish`.
pub(crate) fn exchanges(run: Exchanges<'_>, first: Round, mutant: Mutant) -> Protocol {
    let Exchanges { world, chunks, twice, gap } = run;
    let mut w = Writer::new(world, first, mutant);
    let slices = if twice { world } else { 1 };
    let barrier = |w: &mut Writer| {
        let round = w.claim_rounds(1);
        for rank in 0..world {
            if gap {
                mesh_barrier(w, rank, round);
            } else if mutant == Mutant::WrongRound {
                for peer in w.others(rank) {
                    let theirs = w.flag(peer, EXIT, rank);
                    w.raise(rank, theirs, round, true);
                }
                for peer in w.others(rank) {
                    let ours = w.flag(rank, EXIT, peer);
                    w.await_flag(rank, ours, round.wrapping_sub(1));
                }
            } else {
                w.meet(rank, EXIT, round, true);
            }
        }
    };
    let mut number = 0;
    for &chunks in chunks {
        for chunk in 0..chunks {
            let half = if mutant == Mutant::OneBufferFewer { 0 } else { chunk % 2 };
            let place = |w: &mut Writer, owner, src, slice| {
                w.protocol.word(Place::Half { owner, src, half, slice }, 0)
            };
            // Where `rank` finds the half of `of`.
            let near = |rank: usize, of: usize| if gap && rank.abs_diff(of) == 2 { 1 } else { of };
            let value = |kind: u8, src: usize| packet(kind, payload(number, src));
            for rank in 0..world {
                for slice in 0..slices {
                    let own = place(&mut w, rank, rank, slice);
                    fill(&mut w, rank, own, value(1, rank), false);
                }
            }
            let publish = |w: &mut Writer, kind: u8, slice_of: &dyn Fn(usize) -> usize| {
                barrier(w);
                if gap {
                    for of in [0, 2] {
                        let (from, to) = (place(w, of, of, slice_of(of)), place(w, 1, of, slice_of(of)));
                        w.emit(1, Instr::Read { at: from, sees: value(kind, of) });
                        fill(w, 1, to, value(kind, of), true);
                    }
                    barrier(w);
                }
            };
            publish(&mut w, 1, &|_| 0);
            if twice {
                for rank in 0..world {
                    let words = (0..world).map(|of| (place(&mut w, of, of, rank), value(1, of))).collect();
                    w.emit(rank, Instr::ReadAll { words });
                    let own = place(&mut w, rank, rank, rank);
                    fill(&mut w, rank, own, value(2, rank), true);
                }
                publish(&mut w, 2, &|of| of);
            }
            for rank in 0..world {
                let read = |w: &mut Writer, of: usize| match twice {
                    true => (place(w, near(rank, of), of, of), value(2, of)),
                    false => (place(w, near(rank, of), of, 0), value(1, of)),
                };
                let words = w.others(rank).map(|of| read(&mut w, of)).collect();
                w.emit(rank, Instr::ReadAll { words });
            }
            number += 1;
        }
        if mutant != Mutant::NoExit {
            barrier(&mut w);
        }
    }
    w.protocol
}

/// `p2p_mesh_barrier` of three ranks in a row.
fn mesh_barrier(w: &mut Writer, rank: usize, round: Round) {
    for peer in w.others(rank).filter(|&peer| peer.abs_diff(rank) == 1) {
        let theirs = w.flag(peer, EXIT, rank);
        w.raise(rank, theirs, round, true);
    }
    for origin in w.others(rank) {
        let token = w.flag(rank, EXIT, origin);
        w.await_flag(rank, token, round);
        if rank == 1 {
            let to = w.flag(2 - origin, EXIT, origin);
            w.raise(rank, to, round, true);
        }
    }
}

#[test]
fn pairs() {
    for trouble in ALL {
        holds(pair(6, FIRST, Mutant::None), trouble);
    }
    for mutant in [Mutant::RelaxedRelease, Mutant::NoAwaitFree, Mutant::EarlyRelease, Mutant::WrongRound] {
        is_caught(pair(6, FIRST, mutant), Trouble::Nothing);
    }
    for mutant in [Mutant::UnguardedFill, Mutant::GarbageGoesOut] {
        is_caught(pair(2, FIRST, mutant), Trouble::Impatience);
    }
}

const fn once(world: usize, chunks: &[u8]) -> Exchanges<'_> {
    Exchanges { world, chunks, twice: false, gap: false }
}

#[test]
fn exchanges_in_two_halves() {
    for trouble in ALL {
        holds(exchanges(once(3, &[1, 1]), FIRST, Mutant::None), trouble);
        holds(exchanges(once(2, &[3, 1]), FIRST, Mutant::None), trouble);
    }
    for mutant in [Mutant::RelaxedRelease, Mutant::OneBufferFewer, Mutant::WrongRound] {
        is_caught(exchanges(once(2, &[3]), FIRST, mutant), Trouble::Nothing);
    }
    is_caught(exchanges(once(2, &[1, 1]), FIRST, Mutant::NoExit), Trouble::Nothing);
    // The second operation overwrites what a late rank still reads for the first, which then succeeds: whoever gave up its
    // last barrier had raised its own flags before.
    is_caught(exchanges(once(3, &[1, 1]), FIRST, Mutant::UnguardedFill), Trouble::Impatience);
}

#[test]
fn exchanges_in_two_steps() {
    let twice = |world, chunks| Exchanges { twice: true, ..once(world, chunks) };
    for trouble in ALL {
        holds(exchanges(twice(2, &[1, 1]), FIRST, Mutant::None), trouble);
    }
    holding::holds(exchanges(twice(3, &[3, 1]), FIRST, Mutant::None), Trouble::Impatience, 1);
    for mutant in [Mutant::RelaxedRelease, Mutant::OneBufferFewer, Mutant::WrongRound] {
        is_caught(exchanges(twice(2, &[3]), FIRST, mutant), Trouble::Nothing);
    }
    is_caught(exchanges(twice(3, &[1, 1]), FIRST, Mutant::UnguardedFill), Trouble::Impatience);
}

#[test]
fn exchanges_over_a_gap() {
    let gap = |chunks| Exchanges { gap: true, ..once(3, chunks) };
    holds(exchanges(gap(&[1]), FIRST, Mutant::None), Trouble::Nothing);
    holding::holds(exchanges(gap(&[3, 1]), FIRST, Mutant::None), Trouble::Impatience, 1);
    for mutant in [Mutant::RelaxedRelease, Mutant::OneBufferFewer] {
        holding::is_caught(exchanges(gap(&[3]), FIRST, mutant), Trouble::Nothing, 1);
    }
    holding::is_caught(exchanges(gap(&[1, 1]), FIRST, Mutant::UnguardedFill), Trouble::Impatience, 1);
}
