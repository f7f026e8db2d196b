//! Memory that all ranks of a communicator can reach: allocations shared between processes, and registrations.

use std::os::fd::AsFd;
use std::sync::Arc;

use super::call::Place;
use super::core::Op;
use super::segment::Segment;
use crate::addr::DeviceAddr;
use crate::device_comm::Registration;
use crate::error::{CommError, Result};
use crate::host_comm::HostComm;

/// One allocation: this rank's memory and, between processes, its mappings of the peers'.
struct Allocation {
    id: u64,
    own: Segment,
    /// In rank order, this rank's own (empty) place included; empty within a process, where addresses serve.
    peers: Vec<Option<Segment>>,
}

/// The live allocations and registrations of one rank. Numbers are equal on all ranks, because the calls are collective.
#[derive(Default)]
pub(super) struct Allocations {
    live: Vec<Allocation>,
    registrations: Vec<Registration>,
    next: u64,
}

impl Allocations {
    pub(super) fn is_empty(&self) -> bool {
        self.live.is_empty()
    }

    fn find(&self, addr: DeviceAddr) -> Option<usize> {
        self.live.iter().position(|allocation| allocation.own.start() as u64 == addr.0)
    }

    /// The number of the allocation that starts at `addr`; equal on all ranks.
    pub(super) fn number(&self, addr: DeviceAddr) -> Option<u64> {
        self.find(addr).and_then(|at| self.live.get(at)).map(|allocation| allocation.id)
    }

    /// Gives an allocation back, and the mappings of the peers' parts.
    pub(super) fn remove(&mut self, addr: DeviceAddr) {
        if let Some(at) = self.find(addr) {
            self.live.remove(at);
        }
    }

    pub(super) fn clear(&mut self) {
        self.live.clear();
        self.registrations.clear();
    }

    pub(super) fn place(&self, addr: DeviceAddr, len: usize) -> Place {
        let inside = |allocation: &&Allocation| {
            let start = allocation.own.start() as u64;
            addr.0 >= start && addr.0 + len as u64 <= start + allocation.own.len() as u64
        };
        self.live.iter().find(inside).map_or_else(Place::default, |allocation| Place {
            space: allocation.id + 2,
            offset: addr.0 - allocation.own.start() as u64,
        })
    }

    pub(super) fn resolve(&self, rank: usize, place: Place) -> Option<usize> {
        let allocation = self.live.iter().find(|allocation| allocation.id + 2 == place.space)?;
        let segment = allocation.peers.get(rank)?.as_ref().unwrap_or(&allocation.own);
        Some(segment.start() as usize + usize::try_from(place.offset).ok()?)
    }

    pub(super) fn register(&mut self, addr: DeviceAddr, bytes: usize) -> Registration {
        let id = self.next;
        self.next += 1;
        // Numbers are never used twice, so the generation has nothing to tell apart.
        let registration = Registration { id, addr, bytes, generation: 0 };
        self.registrations.push(registration.clone());
        registration
    }

    pub(super) fn registered(&self, registration: &Registration) -> Result<()> {
        if self.registrations.contains(registration) {
            return Ok(());
        }
        Err(CommError::StaleHandle {
            handle: format!("registration {} of {:?}", registration.id, registration.addr),
            reason: "it was deregistered already, or belongs to another communicator".into(),
        })
    }

    pub(super) fn deregister(&mut self, registration: &Registration) {
        self.registrations.retain(|live| live != registration);
    }
}

/// Allocates on all ranks; between processes every rank maps every other's part. Where one rank gets no memory, no rank
/// does, and the communicator goes on without it.
pub(super) fn allocate(op: &mut Op<'_>, bytes: usize) -> Result<DeviceAddr> {
    let len = bytes
        .max(1)
        .checked_next_multiple_of(4096)
        .filter(|&len| isize::try_from(len).is_ok())
        .ok_or_else(|| CommError::invalid("bytes", format!("{bytes} bytes exceed the address space")))?;
    let (own, peers) =
        if op.core.direct { (Segment::private(len), Ok(Vec::new())) } else { shared(op, len)? };
    let outcome = own.and_then(|own| Ok((own, peers?)));
    let error = outcome.as_ref().err().cloned();
    let host = op.core.waiter.host.clone();
    let refused =
        agree(&error, |mine| op.on_host(&host, |host, deadline| host.all_gather_bytes(mine, deadline)))?;
    if let Some((rank, cause)) = refused {
        let reason = format!("rank {rank} cannot allocate {bytes} bytes, so no rank did: {cause}");
        return Err(CommError::invalid("bytes", reason));
    }
    let (own, peers) = outcome?;
    let addr = DeviceAddr(own.start() as u64);
    let allocations = &mut op.state.allocations;
    allocations.live.push(Allocation { id: allocations.next, own, peers });
    allocations.next += 1;
    Ok(addr)
}

type Mapped = (Result<Segment>, Result<Vec<Option<Segment>>>);

fn shared(op: &Op<'_>, len: usize) -> Result<Mapped> {
    let fd = Segment::shareable(len);
    let host: Arc<dyn HostComm> = op.core.waiter.host.clone();
    let mine: Vec<_> = fd.iter().map(AsFd::as_fd).collect();
    let all = op.on_host(&host, |host, deadline| host.exchange_fds(&mine, deadline))?;
    let rank = op.rank();
    let peers = all.iter().enumerate().map(|(peer, fds)| match fds.first() {
        _ if peer == rank => Ok(None),
        Some(fd) => Segment::map(fd.as_fd(), len).map(Some),
        // That rank reports its own error.
        None => Ok(None),
    });
    let peers = peers.collect();
    Ok((fd.and_then(|fd| Segment::map(fd.as_fd(), len)), peers))
}

/// Tells all ranks of this rank's error, if any. Returns the lowest rank that has one, with its error.
pub(super) fn agree(
    error: &Option<CommError>,
    gather: impl FnOnce(&[u8]) -> Result<Vec<Vec<u8>>>,
) -> Result<Option<(usize, CommError)>> {
    let encode = |error: &CommError| postcard::to_stdvec(error);
    let codec = |action: &'static str, e: postcard::Error| CommError::Serialization {
        action: action.into(),
        type_name: "CommError".into(),
        reason: e.to_string(),
    };
    let mine = error.as_ref().map_or(Ok(Vec::new()), encode).map_err(|e| codec("encode", e))?;
    for (rank, bytes) in gather(&mine)?.iter().enumerate() {
        if !bytes.is_empty() {
            let cause = postcard::from_bytes(bytes).map_err(|e| codec("decode", e))?;
            return Ok(Some((rank, cause)));
        }
    }
    Ok(None)
}
