//! What each kind of kernel does to shared memory, in its order. Each function names the CUDA source that it mirrors.

pub(crate) use self::copies::{pair, staged};
use super::memory::{Instr, Leak, MARK, Order, Place, Protocol, Round, Until, Value, Word, packet};

mod copies;

/// A protection taken away.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Mutant {
    None,
    /// Flags that publish data are raised by relaxed stores.
    RelaxedRelease,
    /// Flags are polled by relaxed loads.
    RelaxedAcquire,
    OneBufferFewer,
    /// The second round is sent before anything of the first has arrived.
    EarlySecondPush,
    /// Who has nothing to send sends nothing.
    NoEmptyPacks,
    /// Nothing stands between the restoring of a slot and the next push.
    NoFence,
    NoRestore,
    /// Results are written before their owner has entered.
    NoEntry,
    /// A rank leaves without waiting for the others' stores.
    NoExit,
    NoToken,
    /// A sender does not wait for its slot to be free.
    NoAwaitFree,
    /// Rounds are compared as numbers that never wrap.
    WrapIgnored,
    /// A rank that gave up goes on sending.
    GarbageGoesOut,
    /// It goes on copying, though its flags stay as they are.
    CopiesGoOut,
}

const ENTER: u8 = 0;
const EXIT: u8 = 1;
const CHUNK: u8 = 2;
const TOKEN: u8 = 3;
const SCATTER: u8 = 0;
const GATHER: u8 = 1;

/// Writes the programs of all ranks, kernel by kernel.
struct Writer {
    protocol: Protocol,
    mutant: Mutant,
    world: usize,
    buffers: u8,
    /// `Channel::round`, the same on all ranks.
    round: Round,
    first: Round,
}

impl Writer {
    fn new(world: usize, first: Round, mutant: Mutant) -> Self {
        let mut protocol = Protocol::new(world);
        protocol.leak = match mutant {
            Mutant::GarbageGoesOut => Leak::Everything,
            Mutant::CopiesGoOut => Leak::Copies,
            _ => Leak::Nothing,
        };
        let buffers = if mutant == Mutant::OneBufferFewer { 3 } else { 4 };
        Self { protocol, mutant, world, buffers, round: first, first }
    }

    fn claim_rounds(&mut self, rounds: u8) -> Round {
        let first = self.round;
        self.round = first.wrapping_add(rounds);
        first
    }

    fn others(&self, rank: usize) -> impl Iterator<Item = usize> + use<> {
        let world = self.world;
        (1..world).map(move |d| (rank + d) % world)
    }

    fn emit(&mut self, rank: usize, instr: Instr) {
        self.protocol.ranks[rank].push(instr);
    }

    fn flag(&mut self, owner: usize, kind: u8, src: usize) -> Word {
        let before = packet(self.first.wrapping_sub(1), 0);
        self.protocol.word(Place::Flag { owner, kind, src }, before)
    }

    /// A slot for packets; a word of a Lamport slot; a word of a cell.
    fn slot(&mut self, owner: usize, round: Round, stage: u8, src: usize, part: Option<u8>) -> Word {
        let buffer = round % self.buffers;
        // Packets find their buffer's complement there before the first use, Lamport packs the mark.
        let initially = if part.is_some() { MARK } else { packet(!buffer, 0) };
        let buffer = usize::from(buffer);
        self.protocol.word(Place::Slot { owner, buffer, stage, src, part: part.unwrap_or(0) }, initially)
    }

    fn result(&mut self, owner: usize, src: usize) -> Word {
        self.protocol.word(Place::Result { owner, src }, 0)
    }

    fn store(&mut self, rank: usize, at: Word, value: Value, derived: bool) {
        self.emit(rank, Instr::Store { at, value, order: Order::Relaxed, derived });
    }

    /// `Flag::raise` and `raise_after_writes`.
    fn raise(&mut self, rank: usize, at: Word, round: Round, publish: bool) {
        let order = match publish && self.mutant != Mutant::RelaxedRelease {
            true => Order::Synchronising,
            false => Order::Relaxed,
        };
        self.emit(rank, Instr::Store { at, value: packet(round, 0), order, derived: false });
    }

    /// A wait for `Flag::raised`.
    fn await_flag(&mut self, rank: usize, at: Word, round: Round) {
        let until = match self.mutant {
            Mutant::WrapIgnored => Until::AtLeast(round),
            _ => Until::Reached(round),
        };
        let order = match self.mutant {
            Mutant::RelaxedAcquire => Order::Relaxed,
            _ => Order::Synchronising,
        };
        self.emit(rank, Instr::Await { at, until, order, sees: None });
    }

    /// meet.cuh
    fn meet(&mut self, rank: usize, kind: u8, round: Round, publish: bool) {
        for peer in self.others(rank) {
            let theirs = self.flag(peer, kind, rank);
            self.raise(rank, theirs, round, publish);
        }
        for peer in self.others(rank) {
            let ours = self.flag(rank, kind, peer);
            self.await_flag(rank, ours, round);
        }
    }

    /// The stream's next kernel reads the result, then this rank's next kernel begins.
    fn end(&mut self, rank: usize, results: impl IntoIterator<Item = (usize, Value)>) {
        for (src, sees) in results {
            let at = self.result(rank, src);
            self.emit(rank, Instr::Read { at, sees });
        }
        self.emit(rank, Instr::KernelEnd);
    }

    fn fence(&mut self, rank: usize) {
        if self.mutant != Mutant::NoFence {
            self.emit(rank, Instr::Fence);
        }
    }
}

/// What rank `src` contributes in a round: never the same as four or eight rounds before, never the garbage.
const fn payload(round: Round, src: usize) -> u8 {
    (round % 16) * 8 + src as u8 + 1
}

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
