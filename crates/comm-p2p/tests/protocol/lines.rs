//! lines.cuh, `all_gather_lines` and `broadcast_lines`: kernels of both kinds, one after the other on one channel.
//! (`reduce_scatter_lines` sends and waits as the gather does.)
//!
//! An agent is a warp of an all-gather, and of a broadcast, whose warps meet at barriers, a CTA. A burst is a store of a round
//! and a payload. That it may be one, though it is sixteen lines and only each of them is written at once, is seen to with
//! bursts of two stores. Left out: the order in which the warps of a CTA send and receive within a round, and how the rounds
//! are claimed. What has been received is looked at where it is received, as nobody reads a slot again.
//!
//! Nobody reads here but what he has waited for, and each word has one reader. So a store that lands late cannot be told from
//! a reader that is late, unless it overwrites something, where it is the early store that does harm. It is enough, then, if
//! stores land as soon as they can be made, and every interleaving of such runs is few enough for sequences of kernels.
//! Bursts of two stores, and the smaller runs, are checked with stores that land late as well.
//!
//! Not needed, and checked to be so: tokens to other ranks than the root, or of the last three rounds, or that are later than
//! the root's burst; that relays wait for tokens at the end; that anybody waits for entry at the end of two rounds or more. Each relay
//! has the others' bursts of the last round but one, which they passed on when they were through with the round before, and
//! somebody has a burst of the second round, which the root sent when all had started.

mod tests;

use super::memory::{Instr, Order, Place, Protocol, Round, Until, Value, Word, packet};
use super::writer::{ENTER, Mutant, TOKEN, Writer, payload};

/// One kernel of a run.
#[derive(Clone, Copy, Debug)]
struct Kernel {
    /// `None`: an all-gather.
    root: Option<usize>,
    /// Warps of the grid, and of a CTA.
    warps: usize,
    block: usize,
    /// Bursts of a rank's data, or of the longest slice.
    bursts: usize,
    /// How many of the last slices lack the last burst: of several bursts one, of one any number but all.
    short: usize,
}

impl Kernel {
    /// One warp that has something in all rounds.
    const fn gather(rounds: usize) -> Self {
        Self { root: None, warps: 1, block: 1, bursts: rounds, short: 0 }
    }
    const fn from(root: usize, rounds: usize) -> Self {
        Self { root: Some(root), ..Self::gather(rounds) }
    }
    /// Bursts are dealt out over so many warps.
    const fn over(self, warps: usize) -> Self {
        Self { warps, ..self }
    }
    const fn blocks_of(self, block: usize) -> Self {
        Self { block, ..self }
    }
    const fn short(self, short: usize) -> Self {
        Self { short, ..self }
    }

    fn rounds(self) -> u8 {
        u8::try_from(self.bursts.div_ceil(self.warps)).unwrap_or(u8::MAX)
    }
    const fn agents(self) -> usize {
        if self.root.is_some() { self.warps / self.block } else { self.warps }
    }
    /// Whether a warp has a burst of a slice in iteration `k`.
    fn has(self, slice: usize, world: usize, k: u8, warp: usize) -> bool {
        let bursts = if slice + self.short + 1 >= world { self.bursts - 1 } else { self.bursts };
        warp + usize::from(k) * self.warps < bursts
    }
}

/// What a run of kernels is like.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lines<'a> {
    world: usize,
    kernels: &'a [Kernel],
    first: Round,
    /// Stores of a burst.
    lines: u8,
    /// Whether stores land as soon as they can be made.
    at_once: bool,
}

/// A broadcast and an all-gather between two ranks, with bursts of two stores.
pub(crate) const fn two_ranks(first: Round) -> Lines<'static> {
    const KERNELS: [Kernel; 2] = [Kernel::from(0, 1), Kernel::gather(1)];
    Lines { world: 2, kernels: &KERNELS, first, lines: 2, at_once: false }
}

/// What one agent does in one kernel.
struct Turn<'a> {
    kernel: Kernel,
    w: &'a mut Writer,
    lines: u8,
    agent: usize,
    /// The warp, or CTA, that it is.
    number: usize,
    first: Round,
    /// Whether what it sends may be a result of the kernels before.
    derived: bool,
}

impl Turn<'_> {
    fn rank(&self) -> usize {
        self.w.protocol.homes[self.agent]
    }
    const fn round(&self, k: u8) -> Round {
        self.first.wrapping_add(k)
    }
    fn others(&self) -> impl Iterator<Item = usize> + use<> {
        self.w.others(self.rank())
    }
    /// In the order in which they send to this rank.
    fn sources(&self) -> impl Iterator<Item = usize> + use<> {
        let (rank, world) = (self.rank(), self.w.world);
        (1..world).map(move |d| (rank + world - d) % world)
    }

    fn burst_slot(&mut self, owner: usize, round: Round, src: usize, warp: usize, line: u8) -> Word {
        let buffer = round % self.w.buffers;
        let place = Place::Slot { owner, buffer: buffer.into(), stage: line, src, part: warp as u8 };
        self.w.protocol.word(place, packet(!buffer, 0))
    }
    fn flag(&mut self, owner: usize, kind: u8, src: usize) -> Word {
        // As many for each CTA as there are kinds.
        self.w.flag(owner, 4 * self.number as u8 + kind, src)
    }

    /// Rank `of`'s data, or the slice that it is the relay of.
    const fn data(round: Round, of: usize) -> Value {
        packet(round, payload(round, of))
    }

    fn send(&mut self, to: usize, k: u8, warp: usize, of: usize, derived: bool) {
        let (rank, round) = (self.rank(), self.round(k));
        for line in 0..self.lines {
            let at = self.burst_slot(to, round, rank, warp, line);
            self.w.store(self.agent, at, Self::data(round, of), derived);
        }
    }

    fn receive(&mut self, src: usize, k: u8, warp: usize, of: usize) {
        let (rank, round) = (self.rank(), self.round(k));
        for line in 0..self.lines {
            let at = self.burst_slot(rank, round, src, warp, line);
            let sees = Self::data(round, of);
            let instr = if line > 0 && self.w.mutant == Mutant::OneLineSeen {
                Instr::Read { at, sees }
            } else {
                // A poll that finds the round in all lines has loaded each at a time of its own; so do waits one by one.
                let (until, order) = (Until::Carries(round), Order::Relaxed);
                Instr::Await { at, until, order, sees: Some(sees) }
            };
            self.w.emit(self.agent, instr);
        }
    }

    fn all_gather(&mut self) {
        let Kernel { warps, bursts, .. } = self.kernel;
        let (warp, rounds) = (self.number, self.kernel.rounds());
        let has = |k: u8| warp + usize::from(k) * warps < bursts;
        let push = |turn: &mut Self, k: u8| {
            let rank = turn.rank();
            for to in turn.others().filter(|_| has(k)) {
                turn.send(to, k, warp, rank, turn.derived);
            }
        };
        let early = self.w.mutant == Mutant::EarlySecondPush;
        push(self, 0);
        if early && rounds > 1 {
            push(self, 1);
        }
        for k in 0..rounds {
            if k > 0 && k + 1 < rounds {
                push(self, k + 1);
            }
            for src in self.sources().filter(|_| has(k)) {
                self.receive(src, k, warp, src);
            }
            if k == 0 && rounds > 1 && !early {
                push(self, 1);
            }
        }
    }

    fn all_started(&mut self) {
        let (rank, mutant) = (self.rank(), self.w.mutant);
        // Who is through with this kernel has raised the flag for the next one.
        let ahead = if mutant == Mutant::AheadIgnored { 0 } else { self.kernel.rounds() };
        for peer in self.others() {
            let ours = self.flag(rank, ENTER, peer);
            let until = match mutant {
                Mutant::WrapIgnored => Until::AtLeast(self.first),
                _ => Until::ReachedWithin(self.first, ahead),
            };
            self.w
                .emit(self.agent, Instr::Await { at: ours, until, order: Order::Synchronising, sees: None });
        }
    }

    fn all_through(&mut self, root: usize, k: u8) {
        let (rank, round) = (self.rank(), self.round(k));
        let awaited = if self.w.mutant == Mutant::WrongRound { round.wrapping_sub(1) } else { round };
        for peer in self.others().filter(|&peer| peer != root) {
            let ours = self.flag(rank, TOKEN, peer);
            self.w.await_flag(self.agent, ours, awaited);
        }
    }

    fn broadcast(&mut self, root: usize) {
        let (rank, mutant, rounds) = (self.rank(), self.w.mutant, self.kernel.rounds());
        let (is_root, spares) = (rank == root, mutant != Mutant::SparesLeftOut);
        for peer in self.others().filter(|&peer| spares || rounds == 1 || peer == root) {
            let theirs = self.flag(peer, ENTER, rank);
            self.w.raise(self.agent, theirs, self.first, false);
        }
        if is_root {
            self.root(root);
        } else {
            self.relay(root);
        }
        let no_entry = if is_root { Mutant::NoEntryAtRootsEnd } else { Mutant::NoEntryAtRelaysEnd };
        if mutant != no_entry && (spares || rounds == 1) {
            self.all_started();
        }
        if rounds >= 4 && !(is_root && mutant == Mutant::NoTokensAtEnd) && (spares || is_root) {
            self.all_through(root, rounds - 4);
        }
    }

    fn root(&mut self, root: usize) {
        let (mutant, world) = (self.w.mutant, self.w.world);
        for k in 0..self.kernel.rounds() {
            let enters = match mutant {
                Mutant::NoEntry => false,
                Mutant::EarlySecondPush => k == 2,
                _ => k == 1,
            };
            if enters {
                self.all_started();
            }
            if k >= 4 && mutant != Mutant::NoAwaitFree {
                self.all_through(root, k - 4);
            }
            for warp in self.warps() {
                for turn in 0..world - 1 {
                    let slice = (turn + warp + usize::from(k)) % (world - 1);
                    if self.kernel.has(slice, world, k, warp) {
                        let relay = (root + 1 + slice) % world;
                        self.send(relay, k, warp, relay, self.derived);
                    }
                }
            }
        }
    }

    fn relay(&mut self, root: usize) {
        let (rank, world, mutant) = (self.rank(), self.w.world, self.w.mutant);
        let kernel = self.kernel;
        let has = |rank: usize, k, warp| kernel.has((rank + world - root - 1) % world, world, k, warp);
        for k in 0..self.kernel.rounds() {
            if mutant == Mutant::EarlyRelease {
                self.tokens(root, k);
            }
            for warp in self.warps().filter(|&warp| has(rank, k, warp)) {
                self.receive(root, k, warp, rank);
                for to in self.others().filter(|&to| to != root) {
                    self.send(to, k, warp, rank, true);
                }
            }
            if mutant == Mutant::SparesLeftOut {
                self.tokens(root, k);
            }
            for warp in self.warps() {
                for src in self.sources().filter(|&src| src != root && has(src, k, warp)) {
                    self.receive(src, k, warp, src);
                }
            }
            if mutant != Mutant::EarlyRelease && mutant != Mutant::SparesLeftOut {
                self.tokens(root, k);
            }
        }
    }

    fn tokens(&mut self, root: usize, k: u8) {
        let (rank, rounds, spares) =
            (self.rank(), self.kernel.rounds(), self.w.mutant != Mutant::SparesLeftOut);
        for peer in self.others().filter(|&peer| spares || (peer == root && k + 4 <= rounds)) {
            let theirs = self.flag(peer, TOKEN, rank);
            self.w.raise(self.agent, theirs, self.round(k), false);
        }
    }

    /// The warps of this CTA.
    fn warps(&self) -> impl Iterator<Item = usize> + use<> {
        let block = self.kernel.block;
        self.number * block..(self.number + 1) * block
    }
}

pub(crate) fn lines(run: Lines<'_>, mutant: Mutant) -> Protocol {
    let Lines { world, kernels, first, lines, at_once } = run;
    let agents = kernels.iter().map(|kernel| kernel.agents()).max().unwrap_or(1);
    let mut w = Writer::new(world, first, mutant);
    let garbage_goes_out = w.protocol.garbage_goes_out;
    w.protocol = Protocol::of_agents((0..world).flat_map(|rank| vec![rank; agents]).collect());
    (w.protocol.garbage_goes_out, w.protocol.at_once) = (garbage_goes_out, at_once);
    if mutant == Mutant::OneBuffer {
        w.buffers = 1;
    }
    for (turn, &kernel) in kernels.iter().enumerate() {
        let first = w.claim_rounds(kernel.rounds());
        for agent in 0..world * agents {
            if turn > 0 && agents > 1 {
                w.emit(agent, Instr::KernelBegin);
            }
            let number = agent % agents;
            if number < kernel.agents() {
                let mut turn = Turn { kernel, w: &mut w, lines, agent, number, first, derived: turn > 0 };
                match kernel.root {
                    Some(root) => turn.broadcast(root),
                    None => turn.all_gather(),
                }
            }
            w.end(agent, []);
        }
    }
    w.protocol
}
