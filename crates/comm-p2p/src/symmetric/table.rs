//! Which addresses all ranks can reach: lookup by range, with generations against stale handles.
//!
//! Pure bookkeeping; what a region keeps alive is its `hold`.

use std::collections::BTreeMap;

use comm_core::{CommError, DeviceAddr, Registration, Result};
use comm_kernels::p2p::Peers;

/// What a region is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Origin {
    /// Memory of the communicator.
    Allocated,
    /// The caller's memory.
    Registered,
}

/// A range of this rank's addresses that corresponds to equally long ranges of the others'.
pub(crate) struct Region<H> {
    pub(crate) origin: Origin,
    pub(crate) start: DeviceAddr,
    pub(crate) bytes: usize,
    pub(crate) generation: u64,
    /// Where each rank's range starts, as mapped here; or why it cannot be reached, and operands go by way of scratch memory.
    pub(crate) peers: Result<Peers, String>,
    /// Keeps mappings alive.
    pub(crate) hold: H,
}

/// A region's place in the table: the same on all ranks.
pub(crate) type Id = u64;

/// The regions by id, and by where they start.
pub(crate) struct Table<H> {
    regions: BTreeMap<Id, Region<H>>,
    starts: BTreeMap<(u64, Id), u64>,
    /// The length of the longest region that there has been: none that starts further off can hold an operand.
    longest: u64,
    issued: Id,
    generations: u64,
}

/// An operand inside a region.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Found {
    pub(crate) id: Id,
    pub(crate) offset: u64,
    /// The operand's address on every rank, if it lies at the same offset there.
    pub(crate) peers: Peers,
}

impl<H> Table<H> {
    /// An empty table whose generations begin at `generations`, which differs from communicator to communicator.
    pub(crate) const fn new(generations: u64) -> Self {
        Self { regions: BTreeMap::new(), starts: BTreeMap::new(), longest: 0, issued: 0, generations }
    }

    /// Adds a region and returns its id. All ranks add in the same order, so ids agree.
    pub(crate) fn insert(
        &mut self,
        origin: Origin,
        (start, bytes): (DeviceAddr, usize),
        peers: Result<Peers, String>,
        hold: H,
    ) -> Registration {
        let id = self.issued;
        self.issued += 1;
        let generation = self.generations.wrapping_add(self.issued);
        if peers.is_ok() {
            self.starts.insert((start.0, id), start.0 + bytes as u64);
            self.longest = self.longest.max(bytes as u64);
        }
        self.regions.insert(id, Region { origin, start, bytes, generation, peers, hold });
        Registration { id, addr: start, bytes, generation }
    }

    /// The region that holds `bytes` bytes at `addr`.
    pub(crate) fn find(&self, addr: DeviceAddr, bytes: usize) -> Option<Found> {
        let end = addr.0.checked_add(bytes as u64)?;
        let least = end.saturating_sub(self.longest);
        if least > addr.0 {
            // Longer than any region; a map refuses such a range.
            return None;
        }
        let nearby = self.starts.range((least, 0)..=(addr.0, Id::MAX)).rev();
        let (&(start, id), _) = nearby.into_iter().find(|&(_, &region_end)| end <= region_end)?;
        let mut peers = *self.regions.get(&id)?.peers.as_ref().ok()?;
        let offset = addr.0 - start;
        for peer in peers.iter_mut().filter(|peer| !peer.is_null()) {
            *peer = peer.offset(offset);
        }
        Some(Found { id, offset, peers })
    }

    /// What the region holds.
    pub(crate) fn hold(&self, id: Id) -> Option<&H> {
        self.regions.get(&id).map(|region| &region.hold)
    }

    /// The id of the allocation that starts at `addr`.
    pub(crate) fn allocation(&self, addr: DeviceAddr) -> Option<Id> {
        let is_it = |region: &Region<H>| region.origin == Origin::Allocated && region.start == addr;
        self.regions.iter().find(|(_, region)| is_it(region)).map(|(&id, _)| id)
    }

    /// The live region of a registration.
    pub(crate) fn registered(&self, comm: &str, registration: &Registration) -> Result<&Region<H>> {
        let stale = |reason: String| CommError::StaleHandle {
            handle: format!("registration {} of {:?}", registration.id, registration.addr),
            reason,
        };
        let region = self.regions.get(&registration.id).filter(|region| region.origin == Origin::Registered);
        let Some(region) = region else {
            return Err(stale(format!("communicator {comm:?} has deregistered it, or never made it")));
        };
        if region.generation != registration.generation {
            return Err(stale(format!("it is another communicator's, of an earlier {comm:?}")));
        }
        if region.start != registration.addr || region.bytes != registration.bytes {
            return Err(stale("its address or length was changed".into()));
        }
        Ok(region)
    }

    /// Takes a region out.
    pub(crate) fn remove(&mut self, id: Id) -> Option<Region<H>> {
        let region = self.regions.remove(&id)?;
        self.starts.remove(&(region.start.0, id));
        Some(region)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peers(first: u64) -> Result<Peers, String> {
        let mut peers = Peers::default();
        (peers[0], peers[1]) = (DeviceAddr(first), DeviceAddr(first + 0x1_0000));
        Ok(peers)
    }

    #[test]
    fn interior_addresses_are_found_and_overhanging_ones_are_not() {
        let mut table = Table::new(0);
        let at = DeviceAddr;
        let outer = table.insert(Origin::Registered, (at(4096), 4096), peers(4096), ());
        table.insert(Origin::Registered, (at(5000), 100), peers(5000), ());
        assert_eq!(table.find(at(4096), 4096).unwrap().id, outer.id);
        let inner = table.find(at(5050), 1000).unwrap();
        assert_eq!((inner.id, inner.offset), (outer.id, 954));
        assert_eq!(inner.peers[1], at(4096 + 0x1_0000 + 954));
        assert_eq!(inner.peers[2], DeviceAddr::NULL);
        assert_eq!(table.find(at(5050), 10).unwrap().id, outer.id + 1);
        assert!(table.find(at(8000), 200).is_none() && table.find(at(4095), 1).is_none());
        assert!(table.find(at(5000), 5000).is_none(), "longer than every region");
        assert_eq!(table.find(at(8191), 1).unwrap().offset, 4095);
        table.remove(outer.id);
        assert!(table.find(at(4096), 1).is_none());
    }

    #[test]
    fn stale_handles_are_told_from_live_ones() {
        let (mut table, mut other) = (Table::new(0), Table::new(1 << 32));
        let at = (DeviceAddr(4096), 64);
        let live = table.insert(Origin::Registered, at, Err("staged".into()), ());
        let foreign = other.insert(Origin::Registered, at, Err("staged".into()), ());
        assert!(table.registered("w", &live).is_ok());
        assert!(matches!(table.registered("w", &foreign), Err(CommError::StaleHandle { .. })));
        assert!(table.find(at.0, 1).is_none(), "staged regions are not reachable");
        table.remove(live.id);
        assert!(matches!(table.registered("w", &live), Err(CommError::StaleHandle { .. })));
    }

    #[test]
    fn allocations_are_no_registrations() {
        let mut table = Table::new(0);
        let region = table.insert(Origin::Allocated, (DeviceAddr(4096), 64), peers(1), ());
        assert_eq!(table.allocation(DeviceAddr(4096)), Some(region.id));
        assert!(table.registered("w", &region).is_err());
    }
}
