//! Which captured operands there are, and which of the table's slots each has: pure bookkeeping.
//!
//! A slot goes from free to awaiting when a call is captured, to registered when the ranks have met over it, and back to
//! free when the graph is gone and the slot's memory has been cleared. What a registered one keeps alive is its `H`.

use std::collections::BTreeMap;

use comm_core::DeviceAddr;

/// How many operands were captured before this one: the same on all ranks, as all capture the same calls.
pub(crate) type Number = u64;

/// An operand that a graph holds.
#[derive(PartialEq, Eq, Debug)]
pub(crate) struct Entry<H> {
    pub(crate) slot: u32,
    pub(crate) addr: DeviceAddr,
    pub(crate) bytes: usize,
    state: State<H>,
}

#[derive(PartialEq, Eq, Debug)]
enum State<H> {
    /// Not registered.
    Awaiting,
    /// Known to all ranks.
    Mapped(#[allow(dead_code, reason = "held, not read")] H),
    /// Known to be out of reach of some rank.
    Scratch(String),
}

/// The operands by number.
pub(crate) struct Entries<H> {
    live: BTreeMap<Number, Entry<H>>,
    /// Slots that were used before, and those from `unused` on that were not.
    free: Vec<u32>,
    unused: u32,
    capacity: u32,
    issued: Number,
}

impl<H> Entries<H> {
    pub(crate) const fn new(capacity: u32) -> Self {
        Self { live: BTreeMap::new(), free: Vec::new(), unused: 0, capacity, issued: 0 }
    }

    /// Takes a slot for the next operand; `None` if all are taken. The operand counts either way: the other ranks may
    /// have a slot for theirs.
    pub(crate) fn reserve(&mut self, addr: DeviceAddr, bytes: usize) -> Option<(Number, u32)> {
        let number = self.issued;
        self.issued += 1;
        let slot = self.free.pop().or_else(|| {
            let next = self.unused;
            (next < self.capacity).then(|| self.unused = next + 1)?;
            Some(next)
        })?;
        self.live.insert(number, Entry { slot, addr, bytes, state: State::Awaiting });
        Some((number, slot))
    }

    /// Whether [`reserve`](Self::reserve) would find no slot.
    pub(crate) const fn is_full(&self) -> bool {
        self.free.is_empty() && self.unused == self.capacity
    }

    /// The operands that are not registered, in order.
    pub(crate) fn awaiting(&self) -> impl Iterator<Item = (Number, &Entry<H>)> {
        let entries = self.live.iter().filter(|(_, entry)| matches!(entry.state, State::Awaiting));
        entries.map(|(&number, entry)| (number, entry))
    }

    /// Registers an operand: with what keeps the other ranks' memory mapped, or with the reason why it is not.
    pub(crate) fn settle(&mut self, number: Number, outcome: Result<H, String>) {
        if let Some(entry) = self.live.get_mut(&number) {
            entry.state = outcome.map_or_else(State::Scratch, State::Mapped);
        }
    }

    /// Takes an operand out whose graph is gone. Its slot stays taken until it is [`recycle`](Self::recycle)d.
    pub(crate) fn remove(&mut self, number: Number) -> Option<Entry<H>> {
        self.live.remove(&number)
    }

    /// A slot of a removed operand may be used again: its memory is clear.
    pub(crate) fn recycle(&mut self, slot: u32) {
        self.free.push(slot);
    }

    /// Operands that graphs hold.
    pub(crate) fn len(&self) -> usize {
        self.live.len()
    }

    /// Why registered operands are not reached by all ranks, for those that are not.
    pub(crate) fn obstacles(&self) -> impl Iterator<Item = (DeviceAddr, &str)> {
        self.live.values().filter_map(|entry| match &entry.state {
            State::Scratch(reason) => Some((entry.addr, reason.as_str())),
            State::Awaiting | State::Mapped(_) => None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT: DeviceAddr = DeviceAddr(4096);

    #[test]
    fn slots_come_back_when_their_graph_is_gone_and_not_before() {
        let mut entries = Entries::<()>::new(2);
        assert_eq!(entries.reserve(AT, 64), Some((0, 0)));
        assert!(!entries.is_full());
        assert_eq!(entries.reserve(AT, 64), Some((1, 1)));
        assert!(entries.is_full());
        assert_eq!(entries.reserve(AT, 64), None);
        let gone = entries.remove(0).unwrap();
        assert_eq!(entries.reserve(AT, 64), None, "its memory has not been cleared");
        entries.recycle(gone.slot);
        assert!(!entries.is_full());
        // The numbers of the refused ones are used up, as the other ranks may have had room.
        assert_eq!(entries.reserve(AT, 64), Some((4, 0)));
        assert!(entries.remove(0).is_none());
        assert_eq!(entries.len(), 2);
    }

    #[test]
    fn only_what_is_not_registered_awaits() {
        let mut entries = Entries::new(8);
        for _ in 0..4 {
            entries.reserve(AT, 64);
        }
        entries.settle(1, Ok("mapping"));
        entries.settle(2, Err("of a pool".into()));
        entries.settle(7, Ok("nobody's"));
        let numbers = |entries: &Entries<_>| entries.awaiting().map(|(number, _)| number).collect::<Vec<_>>();
        assert_eq!(numbers(&entries), [0, 3]);
        assert_eq!(entries.obstacles().collect::<Vec<_>>(), [(AT, "of a pool")]);
        entries.remove(2);
        entries.remove(3);
        assert_eq!(numbers(&entries), [0]);
        assert_eq!(entries.obstacles().count(), 0);
    }
}
