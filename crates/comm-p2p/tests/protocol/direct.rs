//! gather.cuh, `broadcast_direct`: the root stores slices into the relays' results, with a flag for each of a CTA's chunks, and
//! the relays pass them on. One CTA.
//!
//! `all_gather_direct`, which only enters, stores and leaves, is in `programs`.

use super::memory::{Instr, Place, Protocol, Word, packet};
use super::reordering::{ALL, FIRST, Trouble, holds, is_caught};
use super::writer::{CHUNK, ENTER, EXIT, Mutant, Writer, payload};

/// From rank 0, with so many passes in each kernel.
pub(crate) fn broadcast(world: usize, kernels: &[u8], first: u8, mutant: Mutant) -> Protocol {
    let mut w = Writer::new(world, first, mutant);
    let place = |w: &mut Writer, owner, slice, pass| -> Word {
        w.protocol.word(Place::Sum { owner, src: slice, round: pass, tile: 0 }, 0)
    };
    for &passes in kernels {
        let first = w.claim_rounds(passes + 1);
        let value = |pass: u8, slice| packet(1, payload(first.wrapping_add(pass), slice));
        for rank in 0..world {
            if mutant != Mutant::NoEntry {
                w.meet(rank, ENTER, first, false);
            }
            for pass in 0..passes {
                let round = first.wrapping_add(pass);
                if rank == 0 {
                    for relay in 1..world {
                        let at = place(&mut w, relay, relay, pass);
                        w.store(0, at, value(pass, relay), false);
                    }
                    for relay in 1..world {
                        let at = w.flag(relay, CHUNK, 0);
                        w.raise(0, at, round, true);
                    }
                } else {
                    let ours = w.flag(rank, CHUNK, 0);
                    let awaited = if mutant == Mutant::WrongRound { round.wrapping_sub(1) } else { round };
                    w.await_flag(rank, ours, awaited);
                    let own = place(&mut w, rank, rank, pass);
                    w.emit(rank, Instr::Read { at: own, sees: value(pass, rank) });
                    for to in (1..world).filter(|&to| to != rank) {
                        let at = place(&mut w, to, rank, pass);
                        w.store(rank, at, value(pass, rank), true);
                    }
                }
            }
            if mutant != Mutant::NoExit {
                w.meet(rank, EXIT, first.wrapping_add(passes), true);
            }
            // The stream's next kernel reads the result.
            let slices = (1..world).filter(|_| rank != 0);
            let words = slices
                .flat_map(|slice| (0..passes).map(move |pass| (slice, pass)))
                .map(|(slice, pass)| (place(&mut w, rank, slice, pass), value(pass, slice)))
                .collect();
            w.emit(rank, Instr::ReadAll { words });
            w.end(rank, []);
        }
    }
    w.protocol
}

#[test]
fn broadcasts() {
    for trouble in ALL {
        holds(broadcast(3, &[1, 1], FIRST, Mutant::None), trouble);
    }
    holds(broadcast(3, &[2], FIRST, Mutant::None), Trouble::Nothing);
    for mutant in [Mutant::RelaxedRelease, Mutant::NoEntry, Mutant::NoExit, Mutant::WrongRound] {
        is_caught(broadcast(3, &[2, 1], FIRST, mutant), Trouble::Nothing);
    }
    is_caught(broadcast(3, &[1], FIRST, Mutant::GarbageGoesOut), Trouble::Impatience);
}
