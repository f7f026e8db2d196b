//! Device memory that is handed out without a call to the driver.
//!
//! The driver may wait for the whole device when memory is given back, and may do so when it is asked for. Where several
//! ranks of a process share a device, such a wait is also for another rank's kernel, which may itself be waiting for what
//! the calling rank is to launch next. So each rank takes a reserve before the first call, and nothing moves between it
//! and the driver while ranks are at work.
//!
//! Owns the bookkeeping of a reserve and the reserves that nobody uses at present. Never frees one: a reserve goes when
//! its context goes, and until then the next rank in that context takes it over.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use comm_core::Result;

use crate::raw;

/// Places in a reserve begin at multiples of this, as the driver's own allocations do.
const ALIGN: usize = 512;

/// One range of device memory, and which parts of it are in use.
#[derive(Debug)]
pub(crate) struct Reserve {
    start: u64,
    bytes: usize,
    /// Unused parts: where they start, counted from the first byte, and how long they are. No two touch.
    free: BTreeMap<usize, usize>,
    /// Used parts, likewise.
    used: BTreeMap<usize, usize>,
}

impl Reserve {
    fn new(start: u64, bytes: usize) -> Self {
        Self { start, bytes, free: BTreeMap::from([(0, bytes)]), used: BTreeMap::new() }
    }

    /// A reserve of at least `bytes` bytes in the context number `context`, which is current.
    ///
    /// # Errors
    /// [`CommError::Cuda`](comm_core::CommError::Cuda).
    pub(crate) fn take(context: u64, bytes: usize) -> Result<Self> {
        let bytes = bytes.next_multiple_of(ALIGN);
        let left = || IDLE.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(reserve) = find(&mut left(), context, bytes) {
            return Ok(reserve);
        }
        Ok(Self::new(raw::allocate(bytes)?.0, bytes))
    }

    /// Leaves it to whoever takes a reserve in its context next. Nothing uses it any more.
    pub(crate) fn leave(self, context: u64) {
        let idle = Self::new(self.start, self.bytes);
        IDLE.lock().unwrap_or_else(PoisonError::into_inner).push((context, idle));
    }

    /// A place of `bytes` bytes; `None` where it has no room.
    pub(crate) fn allocate(&mut self, bytes: usize) -> Option<u64> {
        let bytes = bytes.max(1).checked_next_multiple_of(ALIGN)?;
        let (&at, &room) = self.free.iter().find(|&(_, &room)| room >= bytes)?;
        self.free.remove(&at);
        if room > bytes {
            self.free.insert(at + bytes, room - bytes);
        }
        self.used.insert(at, bytes);
        Some(self.start + at as u64)
    }

    /// Takes a place back, and says whether it was one of its own.
    pub(crate) fn free(&mut self, addr: u64) -> bool {
        let at = addr.checked_sub(self.start).and_then(|at| usize::try_from(at).ok());
        let Some((at, mut bytes)) = at.and_then(|at| Some((at, self.used.remove(&at)?))) else {
            return false;
        };
        let mut begin = at;
        if let Some(after) = self.free.remove(&(at + bytes)) {
            bytes += after;
        }
        if let Some((&before, &room)) = self.free.range(..at).next_back()
            && before + room == at
        {
            begin = before;
            bytes += room;
        }
        self.free.insert(begin, bytes);
        true
    }
}

/// Reserves that nobody uses, by the number of their context. Such numbers are never used twice, so those of a context that
/// is gone are inert.
static IDLE: Mutex<Vec<(u64, Reserve)>> = Mutex::new(Vec::new());

fn find(idle: &mut Vec<(u64, Reserve)>, context: u64, bytes: usize) -> Option<Reserve> {
    let place = idle.iter().position(|(of, reserve)| *of == context && reserve.bytes >= bytes)?;
    Some(idle.swap_remove(place).1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_do_not_overlap_and_come_back_whole() {
        let mut reserve = Reserve::new(1 << 20, 4096);
        let places: Vec<u64> = [1, 513, 0, 1536].map(|bytes| reserve.allocate(bytes).unwrap()).to_vec();
        assert_eq!(places, [0, 512, 1536, 2048].map(|at| (1 << 20) + at));
        assert_eq!(reserve.allocate(513), None);
        assert_eq!(reserve.allocate(usize::MAX), None);
        assert!(reserve.free(places[1]) && !reserve.free(places[1]), "freed twice");
        assert!(!reserve.free(4096), "below it");
        assert_eq!(reserve.allocate(600), Some(places[1]));
        // In an order that has parts join on the left, on the right, and on both sides.
        for place in [0, 2, 3, 1] {
            assert!(reserve.free(places[place]));
        }
        assert_eq!((reserve.free.len(), reserve.used.len()), (1, 0));
        assert_eq!(reserve.allocate(4096), Some(1 << 20));
    }

    #[test]
    fn an_idle_reserve_is_taken_over_in_its_own_context_only() {
        let mut idle = vec![(1, Reserve::new(0, 512)), (2, Reserve::new(1024, 2048))];
        assert!(find(&mut idle, 1, 1024).is_none() && find(&mut idle, 3, 512).is_none());
        assert_eq!(find(&mut idle, 2, 1024).unwrap().start, 1024);
        assert!(find(&mut idle, 2, 1024).is_none());
    }
}
