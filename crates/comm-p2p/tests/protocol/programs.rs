//! What the kernels that send packets, and those with a flag per CTA, do to shared memory, in their order. Each function
//! names the CUDA source that it mirrors.

use super::memory::{Instr, MARK, Order, Protocol, Round, Until, packet};
use super::writer::{CHUNK, ENTER, EXIT, GATHER, Mutant, SCATTER, TOKEN, Writer, payload};

/// gather.cuh, `all_gather_direct`: enter, store into the peers' results, exit.
pub(crate) fn direct(world: usize, kernels: u8, first: Round, mutant: Mutant) -> Protocol {
    let mut w = Writer::new(world, first, mutant);
    for _ in 0..kernels {
        let round = w.claim_rounds(1);
        for rank in 0..world {
            if mutant != Mutant::NoEntry {
                w.meet(rank, ENTER, round, false);
            }
            for peer in w.others(rank) {
                let at = w.result(peer, rank);
                w.store(rank, at, packet(0, payload(round, rank)), true);
            }
            if mutant != Mutant::NoExit {
                w.meet(rank, EXIT, round, true);
            }
            let results: Vec<_> = w.others(rank).map(|src| (src, packet(0, payload(round, src)))).collect();
            w.end(rank, results);
        }
    }
    w.protocol
}

/// gather.cuh, `all_gather_packets`, one thread. Each kernel: its rounds, and in how many of them the thread has a pack.
///
/// The uneven form, uneven.cuh's `all_gather_packets_uneven`, is the same with packs that may be empty. Its mutant: only the
/// first rank has anything, and the others leave their packs out.
pub(crate) fn packets(world: usize, kernels: &[(u8, u8)], first: Round, mutant: Mutant) -> Protocol {
    let mut w = Writer::new(world, first, mutant);
    let sends = |rank: usize| rank == 0 || mutant != Mutant::NoEmptyPacks;
    for &(rounds, used) in kernels {
        let first = w.claim_rounds(rounds);
        for rank in 0..world {
            let push = |w: &mut Writer, k: u8| {
                let round = first.wrapping_add(k);
                for to in w.others(rank).filter(|_| k < used && sends(rank)) {
                    let at = w.slot(to, round, GATHER, rank, None);
                    w.store(rank, at, packet(round, payload(round, rank)), false);
                }
            };
            push(&mut w, 0);
            let early = mutant == Mutant::EarlySecondPush;
            if early && rounds > 1 {
                push(&mut w, 1);
            }
            for k in 0..rounds {
                if k > 0 && k + 1 < rounds {
                    push(&mut w, k + 1);
                }
                let round = first.wrapping_add(k);
                for src in w.others(rank).filter(|&src| k < used && sends(src)) {
                    let at = w.slot(rank, round, GATHER, src, None);
                    let sees = Some(packet(round, payload(round, src)));
                    let (until, order) = (Until::Carries(round), Order::Relaxed);
                    w.emit(rank, Instr::Await { at, until, order, sees });
                }
                if k == 0 && rounds > 1 && !early {
                    push(&mut w, 1);
                }
            }
            w.end(rank, []);
        }
    }
    w.protocol
}

/// What a run of two-shot kernels is like.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TwoShot<'a> {
    pub(crate) world: usize,
    /// Words of a pack.
    pub(crate) parts: u8,
    /// Rounds of each kernel.
    pub(crate) kernels: &'a [u8],
    /// Whether the first kernel is a reduce-scatter in whose last round the thread has no packs, and the last rank's slice
    /// ends before the thread's packs in the others.
    pub(crate) short: bool,
}

/// reduce.cuh, `all_reduce_two_shot` with `Lamport`, one thread.
pub(crate) fn two_shot(run: TwoShot<'_>, first: Round, mutant: Mutant) -> Protocol {
    let TwoShot { world, parts, kernels, short } = run;
    let mut w = Writer::new(world, first, mutant);
    for (number, &rounds) in kernels.iter().enumerate() {
        let first = w.claim_rounds(rounds);
        let scatters_only = short && number == 0;
        let used = if scatters_only { rounds - 1 } else { rounds };
        let has_slice = |rank: usize| !(short && number > 0 && rank + 1 == world);
        for rank in 0..world {
            let value = |round, stage: u8, src, part: u8| packet(stage + 2 * part, payload(round, src));
            let send = |w: &mut Writer, k: u8, stage| {
                let round = first.wrapping_add(k);
                // Packs of a slice go to whoever sums it, sums to everybody.
                for to in w.others(rank).filter(|&to| k < used && (stage == GATHER || has_slice(to))) {
                    for part in 0..parts {
                        let at = w.slot(to, round, stage, rank, Some(part));
                        w.store(rank, at, value(round, stage, rank, part), stage == GATHER);
                    }
                }
            };
            let collect = |w: &mut Writer, k: u8, stage| {
                let round = first.wrapping_add(k);
                let slots: Vec<_> = w
                    .others(rank)
                    .filter(|&src| k < used && (stage == SCATTER || has_slice(src)))
                    .flat_map(|src| (0..parts).map(move |part| (src, part)))
                    .collect();
                for &(src, part) in &slots {
                    let at = w.slot(rank, round, stage, src, Some(part));
                    let sees = Some(value(round, stage, src, part));
                    let (until, order) = (Until::Differs, Order::Relaxed);
                    w.emit(rank, Instr::Await { at, until, order, sees });
                }
                for &(src, part) in slots.iter().filter(|_| mutant != Mutant::NoRestore) {
                    let at = w.slot(rank, round, stage, src, Some(part));
                    w.store(rank, at, MARK, false);
                }
            };
            let (sums, early) = (has_slice(rank), mutant == Mutant::EarlySecondPush);
            send(&mut w, 0, SCATTER);
            for k in 0..rounds {
                if k > 0 {
                    w.fence(rank);
                }
                if k > 0 && k + 1 < rounds {
                    send(&mut w, k + 1, SCATTER);
                }
                if sums {
                    collect(&mut w, k, SCATTER);
                    if !scatters_only {
                        send(&mut w, k, GATHER);
                    }
                }
                if k == 0 && rounds > 1 {
                    if !sums && !early {
                        collect(&mut w, 0, GATHER);
                    }
                    send(&mut w, 1, SCATTER);
                }
                if !scatters_only && (k > 1 || (k == 1 && (sums || early))) {
                    collect(&mut w, k - 1, GATHER);
                }
            }
            if !scatters_only {
                collect(&mut w, rounds - 1, GATHER);
            }
            w.end(rank, []);
        }
    }
    w.protocol
}

/// cells.cuh, `reduce_by_cells` of an all-reduce, one CTA.
pub(crate) fn cells(world: usize, kernels: &[u8], first: Round, mutant: Mutant) -> Protocol {
    let mut w = Writer::new(world, first, mutant);
    for &rounds in kernels {
        let first = w.claim_rounds(rounds + 1);
        for rank in 0..world {
            let push = |w: &mut Writer, k: u8| {
                let round = first.wrapping_add(k);
                for to in w.others(rank) {
                    let at = w.slot(to, round, SCATTER, rank, None);
                    w.store(rank, at, packet(1, payload(round, rank)), false);
                }
                for to in w.others(rank) {
                    let at = w.flag(to, CHUNK, rank);
                    w.raise(rank, at, round, true);
                }
            };
            push(&mut w, 0);
            for k in 0..rounds {
                if k + 1 < rounds {
                    push(&mut w, k + 1);
                }
                let round = first.wrapping_add(k);
                for src in w.others(rank) {
                    let at = w.flag(rank, CHUNK, src);
                    w.await_flag(rank, at, round);
                }
                for src in w.others(rank) {
                    let at = w.slot(rank, round, SCATTER, src, None);
                    w.emit(rank, Instr::Read { at, sees: packet(1, payload(round, src)) });
                }
                for to in w.others(rank) {
                    let at = w.result(to, rank);
                    w.store(rank, at, packet(2, payload(round, rank)), true);
                }
            }
            if mutant != Mutant::NoExit {
                w.meet(rank, EXIT, first.wrapping_add(rounds), true);
            }
            let last = first.wrapping_add(rounds - 1);
            let results: Vec<_> = w.others(rank).map(|src| (src, packet(2, payload(last, src)))).collect();
            w.end(rank, results);
        }
    }
    w.protocol
}

/// gather.cuh, `broadcast_packets` with relays from rank 0, one thread, one round a kernel.
pub(crate) fn broadcast(world: usize, kernels: u8, first: Round, mutant: Mutant) -> Protocol {
    let mut w = Writer::new(world, first, mutant);
    for _ in 0..kernels {
        let round = w.claim_rounds(1);
        for rank in 0..world {
            let tokens = mutant != Mutant::NoToken;
            for peer in w.others(rank).filter(|_| tokens) {
                let at = w.flag(peer, TOKEN, rank);
                w.raise(rank, at, round, false);
            }
            if rank == 0 {
                for relay in 1..world {
                    let at = w.slot(relay, round, SCATTER, 0, None);
                    w.store(0, at, packet(round, payload(round, relay)), false);
                }
            } else {
                let wait = |w: &mut Writer, stage, src, slice| {
                    let at = w.slot(rank, round, stage, src, None);
                    let sees = Some(packet(round, payload(round, slice)));
                    let (until, order) = (Until::Carries(round), Order::Relaxed);
                    w.emit(rank, Instr::Await { at, until, order, sees });
                };
                wait(&mut w, SCATTER, 0, rank);
                for to in w.others(rank).filter(|&to| to != 0) {
                    let at = w.slot(to, round, GATHER, rank, None);
                    w.store(rank, at, packet(round, payload(round, rank)), true);
                }
                for src in w.others(rank).filter(|&src| src != 0) {
                    wait(&mut w, GATHER, src, src);
                }
            }
            for peer in w.others(rank).filter(|_| tokens) {
                let at = w.flag(rank, TOKEN, peer);
                w.await_flag(rank, at, round);
            }
            w.end(rank, []);
        }
    }
    w.protocol
}
