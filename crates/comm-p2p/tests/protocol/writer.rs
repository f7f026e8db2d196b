//! How programs are written down: rounds, flags, slots and meetings, as `link.cuh`, `wire.cuh` and `meet.cuh` have them.

use super::memory::{Instr, MARK, Order, Place, Protocol, Round, Until, Value, Word, packet};

/// A protection taken away.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Mutant {
    None,
    /// Flags that publish data are raised by relaxed stores.
    RelaxedRelease,
    /// Flags are polled by relaxed loads.
    RelaxedAcquire,
    OneBufferFewer,
    OneBuffer,
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
    /// What fills memory that others read does not look whether its rank has given up a wait.
    UnguardedFill,
    /// A buffer is given back before its last read.
    EarlyRelease,
    /// A wait is for the round before.
    WrongRound,
    /// Shared counters are set back after the others have been told.
    LateReset,
    /// A wait begins before the flags of what was sent have been handed on.
    NoFlush,
    /// Tiles past the end of a slice are counted as well.
    EmptyCounted,
    /// Of a burst, one line's round is looked at.
    OneLineSeen,
    /// A broadcast ends without knowing that all ranks have started it: at its root, or at its relays.
    NoEntryAtRootsEnd,
    NoEntryAtRelaysEnd,
    /// The root of a broadcast ends without knowing that the relays are through.
    NoTokensAtEnd,
    /// A flag that has been raised for the next kernel counts only if this one has few rounds.
    AheadIgnored,
    /// No mutant: what is not needed, as `lines` says, is left out.
    SparesLeftOut,
}

pub(crate) const ENTER: u8 = 0;
pub(crate) const EXIT: u8 = 1;
pub(crate) const CHUNK: u8 = 2;
pub(crate) const TOKEN: u8 = 3;
pub(crate) const SCATTER: u8 = 0;
pub(crate) const GATHER: u8 = 1;

/// Writes the programs of all ranks, kernel by kernel.
pub(crate) struct Writer {
    pub(crate) protocol: Protocol,
    pub(crate) mutant: Mutant,
    pub(crate) world: usize,
    pub(crate) buffers: u8,
    /// `Channel::round`, the same on all ranks.
    pub(crate) round: Round,
    pub(crate) first: Round,
}

impl Writer {
    pub(crate) fn new(world: usize, first: Round, mutant: Mutant) -> Self {
        let mut protocol = Protocol::new(world);
        protocol.garbage_goes_out = mutant == Mutant::GarbageGoesOut;
        let buffers = if mutant == Mutant::OneBufferFewer { 3 } else { 4 };
        Self { protocol, mutant, world, buffers, round: first, first }
    }

    pub(crate) fn claim_rounds(&mut self, rounds: u8) -> Round {
        let first = self.round;
        self.round = first.wrapping_add(rounds);
        first
    }

    pub(crate) fn others(&self, rank: usize) -> impl Iterator<Item = usize> + use<> {
        let world = self.world;
        (1..world).map(move |d| (rank + d) % world)
    }

    pub(crate) fn emit(&mut self, rank: usize, instr: Instr) {
        self.protocol.ranks[rank].push(instr);
    }

    pub(crate) fn flag(&mut self, owner: usize, kind: u8, src: usize) -> Word {
        let before = packet(self.first.wrapping_sub(1), 0);
        self.protocol.word(Place::Flag { owner, kind, src }, before)
    }

    /// A slot for packets; a word of a Lamport slot; a word of a cell.
    pub(crate) fn slot(
        &mut self,
        owner: usize,
        round: Round,
        stage: u8,
        src: usize,
        part: Option<u8>,
    ) -> Word {
        let buffer = round % self.buffers;
        // Packets find their buffer's complement there before the first use, Lamport packs the mark.
        let initially = if part.is_some() { MARK } else { packet(!buffer, 0) };
        let buffer = usize::from(buffer);
        self.protocol.word(Place::Slot { owner, buffer, stage, src, part: part.unwrap_or(0) }, initially)
    }

    pub(crate) fn result(&mut self, owner: usize, src: usize) -> Word {
        self.protocol.word(Place::Result { owner, src }, 0)
    }

    pub(crate) fn store(&mut self, rank: usize, at: Word, value: Value, derived: bool) {
        self.emit(rank, Instr::Store { at, value, order: Order::Relaxed, derived });
    }

    /// `Flag::raise` and `raise_after_writes`.
    pub(crate) fn raise(&mut self, rank: usize, at: Word, round: Round, publish: bool) {
        let order = match publish && self.mutant != Mutant::RelaxedRelease {
            true => Order::Synchronising,
            false => Order::Relaxed,
        };
        self.emit(rank, Instr::Store { at, value: packet(round, 0), order, derived: false });
    }

    /// A wait for `Flag::raised`.
    pub(crate) fn await_flag(&mut self, rank: usize, at: Word, round: Round) {
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
    pub(crate) fn meet(&mut self, rank: usize, kind: u8, round: Round, publish: bool) {
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
    pub(crate) fn end(&mut self, rank: usize, results: impl IntoIterator<Item = (usize, Value)>) {
        for (src, sees) in results {
            let at = self.result(rank, src);
            self.emit(rank, Instr::Read { at, sees });
        }
        self.emit(rank, Instr::KernelEnd);
    }

    pub(crate) fn fence(&mut self, rank: usize) {
        if self.mutant != Mutant::NoFence {
            self.emit(rank, Instr::Fence);
        }
    }
}

/// What rank `src` contributes in a round: never the same as four or eight rounds before, never the garbage.
pub(crate) const fn payload(round: Round, src: usize) -> u8 {
    (round % 16) * 8 + src as u8 + 1
}
