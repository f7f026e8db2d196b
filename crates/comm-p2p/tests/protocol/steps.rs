//! step_sums.cuh, `reduce_in_steps`: movers and reducers of each rank, which go their own ways.
//!
//! An agent is a mover with the warp that raises its flags, or the reducers of a CTA with the warp that counts for them: what
//! a warp hands on to the next one of its CTA is done in place, at the earliest, and lands later like all stores. All CTAs of a
//! rank enter as one, and leave as one: none has anything to do with a peer's CTA of its number but that, and the kernel ends
//! with the last. A tile, and what it sums to, is one word.
//!
//! With one mover a rank, the flags of its tiles are raised where the kernel raises them at the latest: before it waits, and
//! at the end. With several, which take tiles from the rank's queue, a tile ahead of the one that they move, at once. Left
//! out: the words that end a mover's patience with a step, because nothing rests on them. Four threads that wait for one
//! another are too much for `visibility`: that flags are polled by acquiring loads is seen to with the other kernels, whose
//! `Flag` it is.

mod tests;

use super::memory::{Instr, Order, Place, Protocol, Value, Word, packet};
use super::reordering::FIRST;
use super::writer::{CHUNK, ENTER, EXIT, Mutant, Writer, payload};

/// Kinds of flags beside those of all kernels: all agents may start; credits for rounds of even and of odd numbers.
const GO: u8 = 5;
const CREDIT: u8 = 6;
/// Counters: `reduced[2]`, the queue, and agents that are through.
const TICKET: u8 = 2;
const LEFT: u8 = 3;

/// What a run of kernels is like.
#[derive(Clone, Copy, Debug)]
struct Steps<'a> {
    world: usize,
    movers: usize,
    /// CTAs with reducers.
    reducers: usize,
    /// Rounds of each kernel, and whether it is an all-reduce.
    kernels: &'a [(u8, bool)],
    /// Tiles of a round.
    tiles: u8,
    /// Whether the last rank's slice has one tile fewer.
    short: bool,
    /// Whether a reduce-scatter by cells, in the same memory, comes first: its ranks do not meet at the end.
    after_cells: bool,
}

/// One kernel of a run.
struct Kernel<'a> {
    run: Steps<'a>,
    w: &'a mut Writer,
    first: u8,
    rounds: u8,
    gathers: bool,
}

impl Kernel<'_> {
    const fn agent(&self, rank: usize, number: usize) -> usize {
        rank * (self.run.movers + self.run.reducers) + number
    }

    /// `tiles_of`, in the slice of a rank.
    const fn tiles_of(&self, k: u8, slice: usize) -> u8 {
        let short = self.run.short && slice + 1 == self.run.world && k + 1 == self.rounds;
        if short { self.run.tiles - 1 } else { self.run.tiles }
    }

    const fn round(&self, k: u8) -> u8 {
        self.first.wrapping_add(k)
    }

    /// What rank `src` sends for round `k`, and what its slice sums to.
    const fn data(&self, k: u8, src: usize) -> Value {
        packet(1, payload(self.round(k), src))
    }
    const fn sum(&self, k: u8, slice: usize) -> Value {
        packet(2, payload(self.round(k), slice))
    }

    fn tile_flag(&mut self, owner: usize, k: u8, tile: u8, src: usize) -> Word {
        let before = packet(self.w.first.wrapping_sub(1), 0);
        self.w.protocol.word(Place::TileFlag { owner, parity: k % 2, tile, src }, before)
    }
    fn tile(&mut self, owner: usize, k: u8, tile: u8, src: usize) -> Word {
        let parity = if self.w.mutant == Mutant::OneBufferFewer { 0 } else { k % 2 };
        self.w.protocol.word(Place::Tile { owner, parity, tile, src }, 0)
    }
    fn result(&mut self, owner: usize, slice: usize, k: u8, tile: u8) -> Word {
        self.w.protocol.word(Place::Sum { owner, src: slice, round: k, tile }, 0)
    }
    fn counter(&mut self, owner: usize, which: u8) -> Word {
        self.w.protocol.word(Place::Counter { owner, which }, 0)
    }

    /// The flags of what a mover has sent.
    fn flush(&mut self, agent: usize, sent: &mut Vec<(Word, u8)>) {
        if sent.is_empty() {
            return;
        }
        if self.w.mutant != Mutant::RelaxedRelease {
            self.w.emit(agent, Instr::Fence);
        }
        for (at, round) in sent.drain(..) {
            self.w.store(agent, at, packet(round, 0), false);
        }
    }

    /// A tile of pass `k` for `peer`.
    fn scatter(&mut self, agent: usize, (k, tile): (u8, u8), peer: usize, sent: &mut Vec<(Word, u8)>) {
        let rank = self.w.protocol.homes[agent];
        if tile >= self.tiles_of(k, peer) {
            return;
        }
        let mutant = self.w.mutant;
        if k >= 2 && mutant != Mutant::NoAwaitFree {
            if mutant != Mutant::NoFlush {
                self.flush(agent, sent);
            }
            let credit = self.w.flag(rank, CREDIT + k % 2, peer);
            let awaited =
                if mutant == Mutant::WrongRound { self.round(k).wrapping_sub(4) } else { self.round(k - 2) };
            self.w.await_flag(agent, credit, awaited);
        }
        let (at, value) = (self.tile(peer, k, tile, rank), self.data(k, rank));
        self.w.store(agent, at, value, true);
        let flag = self.tile_flag(peer, k, tile, rank);
        sent.push((flag, self.round(k)));
    }

    /// A tile of the rank's own slice of round `k`, summed, for `peer`.
    fn gather(&mut self, agent: usize, (k, tile): (u8, u8), peer: usize, sent: &mut Vec<(Word, u8)>) {
        let rank = self.w.protocol.homes[agent];
        if tile >= self.tiles_of(k, rank) {
            return;
        }
        if self.w.mutant != Mutant::NoFlush {
            self.flush(agent, sent);
        }
        let summed = self.tile_flag(rank, k, tile, rank);
        self.w.await_flag(agent, summed, self.round(k));
        let (own, sees) = (self.result(rank, rank, k, tile), self.sum(k, rank));
        self.w.emit(agent, Instr::Read { at: own, sees });
        let at = self.result(peer, rank, k, tile);
        self.w.store(agent, at, sees, true);
    }

    fn mover(&mut self, rank: usize, number: usize) {
        let (agent, world) = (self.agent(rank, number), self.run.world);
        let lag = self.rounds.min(2);
        let passes = if self.gathers { self.rounds + lag } else { self.rounds };
        let mut places = Vec::new();
        for pass in 0..passes {
            for peer in (1..world).map(|step| (rank + step) % world) {
                let scattered = (0..self.run.tiles).filter(|_| pass < self.rounds);
                places.extend(scattered.map(|tile| (peer, true, pass, tile)));
                let gathered = (0..self.run.tiles).filter(|_| self.gathers && pass >= lag);
                places.extend(gathered.map(|tile| (peer, false, pass - lag, tile)));
            }
        }
        let mut sent = Vec::new();
        let enter = |kernel: &mut Self, (peer, scatters, k, tile), sent: &mut Vec<_>| match scatters {
            true => kernel.scatter(agent, (k, tile), peer, sent),
            false => kernel.gather(agent, (k, tile), peer, sent),
        };
        if self.run.movers == 1 {
            for place in places {
                enter(self, place, &mut sent);
            }
            self.flush(agent, &mut sent);
            return;
        }
        // The way from one place to the next is known when all have been written.
        let queue = self.counter(rank, TICKET);
        let begin = self.w.protocol.ranks[agent].len();
        let (take, go) = (Instr::Take { queue }, Instr::Go { to: Vec::new() });
        self.w.emit(agent, take.clone());
        self.w.emit(agent, go.clone());
        let mut starts = Vec::new();
        for place in places {
            starts.push(u16::try_from(self.w.protocol.ranks[agent].len()).unwrap_or(u16::MAX));
            self.w.emit(agent, take.clone());
            enter(self, place, &mut sent);
            self.flush(agent, &mut sent);
            self.w.emit(agent, go.clone());
        }
        starts.push(u16::try_from(self.w.protocol.ranks[agent].len()).unwrap_or(u16::MAX));
        for instr in &mut self.w.protocol.ranks[agent][begin..] {
            if let Instr::Go { to } = instr {
                to.clone_from(&starts);
            }
        }
    }

    fn reducers(&mut self, rank: usize, number: usize) {
        let agent = self.agent(rank, self.run.movers + number);
        let (mutant, Steps { tiles, reducers, .. }) = (self.w.mutant, self.run);
        for k in 0..self.rounds {
            for tile in (0..tiles).filter(|&tile| usize::from(tile) % reducers == number) {
                let empty = tile >= self.tiles_of(k, rank);
                if empty && mutant != Mutant::EmptyCounted {
                    continue;
                }
                if !empty {
                    for src in self.w.others(rank) {
                        let flag = self.tile_flag(rank, k, tile, src);
                        self.w.await_flag(agent, flag, self.round(k));
                    }
                    if mutant == Mutant::EarlyRelease {
                        self.count(agent, k, tile);
                    }
                    let sources: Vec<_> = self.w.others(rank).collect();
                    let words = sources
                        .into_iter()
                        .map(|src| (self.tile(rank, k, tile, src), self.data(k, src)))
                        .collect();
                    self.w.emit(agent, Instr::ReadAll { words });
                    let (at, value) = (self.result(rank, rank, k, tile), self.sum(k, rank));
                    self.w.store(agent, at, value, true);
                }
                if mutant != Mutant::EarlyRelease {
                    self.count(agent, k, tile);
                }
            }
        }
    }

    /// What warp 2 does about a tile that has been summed.
    fn count(&mut self, agent: usize, k: u8, tile: u8) {
        let (rank, mutant) = (self.w.protocol.homes[agent], self.w.mutant);
        self.w.emit(agent, Instr::Fence);
        if self.gathers {
            let summed = self.tile_flag(rank, k, tile, rank);
            self.w.store(agent, summed, packet(self.round(k), 0), true);
        }
        let counter = self.counter(rank, k % 2);
        let counted = if mutant == Mutant::EmptyCounted { self.run.tiles } else { self.tiles_of(k, rank) };
        let counts = self.w.protocol.ranks[agent].len();
        let total = counted.into();
        self.w.emit(agent, Instr::Count { at: counter, total, skip: 0 });
        if mutant != Mutant::LateReset {
            self.w.store(agent, counter, 0, true);
        }
        self.w.fence(agent);
        for peer in self.w.others(rank) {
            let credit = self.w.flag(peer, CREDIT + k % 2, rank);
            self.w.store(agent, credit, packet(self.round(k), 0), true);
        }
        if mutant == Mutant::LateReset {
            self.w.store(agent, counter, 0, true);
        }
        self.skip_the_rest(agent, counts);
    }

    /// Lets whoever was not the last at the count, instruction `counts`, skip what follows it.
    fn skip_the_rest(&mut self, agent: usize, counts: usize) {
        let program = &mut self.w.protocol.ranks[agent];
        let rest = program.len() - counts - 1;
        if let Some(Instr::Count { skip, .. }) = program.get_mut(counts) {
            *skip = u16::try_from(rest).unwrap_or(u16::MAX);
        }
    }

    /// cells.cuh, `reduce_scatter_cells` of one round, by the rank's first agent.
    fn cells(&mut self, rank: usize) {
        let agent = self.agent(rank, 0);
        let first = self.first;
        let value = |src: usize| packet(3, payload(first, src));
        let others: Vec<_> = self.w.others(rank).collect();
        for &peer in &others {
            let at = self.tile(peer, 0, 0, rank);
            self.w.store(agent, at, value(rank), false);
        }
        for &peer in &others {
            let at = self.w.flag(peer, CHUNK, rank);
            self.w.raise(agent, at, self.first, true);
        }
        for &peer in &others {
            let at = self.w.flag(rank, CHUNK, peer);
            self.w.await_flag(agent, at, self.first);
        }
        let words = others.iter().map(|&src| (self.tile(rank, 0, 0, src), value(src))).collect();
        self.w.emit(agent, Instr::ReadAll { words });
        for number in 0..self.run.movers + self.run.reducers {
            let agent = self.agent(rank, number);
            self.w.emit(agent, Instr::KernelEnd);
        }
    }

    fn enter(&mut self, rank: usize, number: usize) {
        let (agent, round, mutant) = (self.agent(rank, number), self.first, self.w.mutant);
        let go = self.w.flag(rank, GO, rank);
        if number > 0 {
            self.w.await_flag(agent, go, round);
            return;
        }
        for peer in self.w.others(rank) {
            let theirs = self.w.flag(peer, ENTER, rank);
            self.w.raise(agent, theirs, round, false);
        }
        for peer in self.w.others(rank).filter(|_| mutant != Mutant::NoEntry) {
            let ours = self.w.flag(rank, ENTER, peer);
            self.w.await_flag(agent, ours, round);
        }
        self.w.store(agent, go, packet(round, 0), true);
    }

    fn leave(&mut self, rank: usize, number: usize) {
        let (agent, mutant) = (self.agent(rank, number), self.w.mutant);
        let (round, left, ticket) =
            (self.round(self.rounds), self.counter(rank, LEFT), self.counter(rank, TICKET));
        let total = (self.run.movers + self.run.reducers) as Value;
        self.w.emit(agent, Instr::Fence);
        let counts = self.w.protocol.ranks[agent].len();
        self.w.emit(agent, Instr::Count { at: left, total, skip: 0 });
        // The barrier of a CTA, and the kernel's end, order what its threads did.
        self.w.emit(agent, Instr::Fence);
        for peer in self.w.others(rank).filter(|_| mutant != Mutant::NoExit) {
            let theirs = self.w.flag(peer, EXIT, rank);
            let (value, order) = (packet(round, 0), Order::Synchronising);
            self.w.emit(agent, Instr::Store { at: theirs, value, order, derived: true });
        }
        for peer in self.w.others(rank).filter(|_| mutant != Mutant::NoExit) {
            let ours = self.w.flag(rank, EXIT, peer);
            self.w.await_flag(agent, ours, round);
        }
        self.w.store(agent, left, 0, true);
        self.w.store(agent, ticket, 0, true);
        let slices = (0..self.run.world).filter(|&slice| slice == rank || self.gathers);
        let words = slices
            .flat_map(|slice| (0..self.rounds).map(move |k| (slice, k)))
            .flat_map(|(slice, k)| (0..self.tiles_of(k, slice)).map(move |tile| (slice, k, tile)))
            .collect::<Vec<_>>()
            .into_iter()
            .map(|(slice, k, tile)| (self.result(rank, slice, k, tile), self.sum(k, slice)))
            .collect();
        self.w.emit(agent, Instr::ReadAll { words });
        self.skip_the_rest(agent, counts);
        self.w.emit(agent, Instr::KernelEnd);
    }
}

fn steps(run: Steps<'_>, mutant: Mutant) -> Protocol {
    let Steps { world, movers, reducers, kernels, .. } = run;
    let mut w = Writer::new(world, FIRST, mutant);
    let garbage_goes_out = w.protocol.garbage_goes_out;
    w.protocol = Protocol::of_agents((0..world).flat_map(|rank| vec![rank; movers + reducers]).collect());
    w.protocol.garbage_goes_out = garbage_goes_out;
    if run.after_cells {
        let first = w.claim_rounds(1);
        let mut kernel = Kernel { run, w: &mut w, first, rounds: 1, gathers: false };
        (0..world).for_each(|rank| kernel.cells(rank));
    }
    for (turn, &(rounds, gathers)) in kernels.iter().enumerate() {
        let first = w.claim_rounds((rounds + 2) * (world as u8 - 1) + 1);
        let mut kernel = Kernel { run, w: &mut w, first, rounds, gathers };
        for rank in 0..world {
            for number in 0..movers + reducers {
                if turn > 0 || run.after_cells {
                    let agent = kernel.agent(rank, number);
                    kernel.w.emit(agent, Instr::KernelBegin);
                }
                kernel.enter(rank, number);
                match number.checked_sub(movers) {
                    None => kernel.mover(rank, number),
                    Some(number) => kernel.reducers(rank, number),
                }
                kernel.leave(rank, number);
            }
        }
    }
    w.protocol
}
