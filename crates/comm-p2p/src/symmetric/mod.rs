//! Memory that all ranks of a communicator reach: made here, or the caller's.

pub(crate) mod ipc;
pub(crate) mod table;
pub(crate) mod vmm;
pub(crate) mod words;

use std::os::fd::AsFd as _;

use comm_core::{CommError, Deadline, DeviceAddr, HostComm, HostCommExt as _, Result};
use comm_kernels::p2p::Peers;

use self::ipc::Opened;
use self::vmm::{Mapping, Physical};

/// What keeps a region's memory mapped.
pub(crate) enum Hold {
    /// Memory of the communicator: this rank's mapping of every rank's part.
    Mapped(#[allow(dead_code, reason = "held, not read")] Block),
    /// The caller's memory on other ranks, and the number of its allocation on this one.
    Opened(#[allow(dead_code, reason = "held, not read")] Vec<Opened>, Option<u64>),
}

/// Equally long memory on every rank, mapped on this rank's device: its own, and that of the ranks it reaches.
///
/// Where ranks share a device, each still maps the others' memory at addresses of its own, so that a rank that unmaps takes
/// nothing from under the others. In one context memory then has several addresses, which the L1 cache may hold apart. That
/// does no harm: what a kernel stores for another rank goes to L2, and the other loads it at system scope, or behind an
/// acquiring load, or in a later kernel, none of which finds it in L1. Stores from another device ask for the same.
pub(crate) struct Block {
    own: Mapping,
    others: Vec<Option<Mapping>>,
    rank: usize,
}

impl Block {
    /// Collective over `host`: every rank allocates `bytes` bytes on its own device and maps those of the ranks in
    /// `reach` (bit by bit; its own in any case). Memory that is new is zero.
    pub(crate) fn create(
        host: &dyn HostComm,
        ordinal: usize,
        bytes: usize,
        reach: u32,
        deadline: Deadline,
    ) -> Result<Self> {
        let own = Physical::create(ordinal, bytes).and_then(|memory| Ok((memory.export()?, memory)));
        // A rank without memory must not leave the others waiting for its descriptor.
        agree(host, &own.as_ref().map(|(_, memory)| memory.bytes() as u64).map_err(Clone::clone), deadline)?;
        let (fd, memory) = own?;
        let bytes = memory.bytes();
        let fds = host.exchange_fds(&[fd.as_fd()], deadline)?;
        let map = |rank: usize| -> Result<Option<Mapping>> {
            if rank == host.rank() || reach >> rank & 1 == 0 {
                return Ok(None);
            }
            let fd = fds
                .get(rank)
                .and_then(|fds| fds.first())
                .ok_or_else(|| CommError::invalid("descriptors", format!("rank {rank} sent none")))?;
            Physical::import(fd, bytes)?.map(ordinal).map(Some)
        };
        let others: Result<Vec<_>> = (0..host.size()).map(map).collect();
        let mapped = others.and_then(|others| Ok((memory.map(ordinal)?, others)));
        agree(host, &mapped.as_ref().map(|_| bytes as u64).map_err(Clone::clone), deadline)?;
        let (own, others) = mapped?;
        Ok(Self { own, others, rank: host.rank() })
    }

    pub(crate) const fn own(&self) -> &Mapping {
        &self.own
    }

    /// Every rank's part that is mapped here.
    pub(crate) fn mapped(&self) -> impl Iterator<Item = &Mapping> {
        self.others.iter().flatten().chain([&self.own])
    }

    /// Every rank's first byte; null where this rank does not reach.
    pub(crate) fn peers(&self) -> Peers {
        let mut peers = Peers::default();
        for (peer, mapping) in peers.iter_mut().zip(&self.others) {
            *peer = mapping.as_ref().map_or(DeviceAddr::NULL, Mapping::addr);
        }
        peers[self.rank] = self.own.addr();
        peers
    }
}

/// Makes one rank's failure every rank's, and refuses values that differ.
pub(crate) fn agree(host: &dyn HostComm, own: &Result<u64>, deadline: Deadline) -> Result<()> {
    let all: Vec<Result<u64>> = host.all_gather_by(own, deadline)?;
    if let Err(error) = own {
        return Err(error.clone());
    }
    for (rank, other) in all.into_iter().enumerate() {
        let at = || comm_core::CallSite::new(host.name(), comm_core::OpKind::Allocate, 0);
        match (other, own) {
            (Err(cause), _) => {
                return Err(CommError::PeerFailed { at: at(), rank, cause: Box::new(cause) });
            }
            (Ok(found), Ok(expected)) if found != *expected => {
                return Err(CommError::Mismatch {
                    at: at(),
                    rank,
                    expected: format!("{expected} bytes"),
                    found: format!("{found} bytes"),
                });
            }
            _ => {}
        }
    }
    Ok(())
}

/// All ranks' addresses, shifted by `offset`.
pub(crate) fn shifted(peers: &Peers, offset: usize) -> Peers {
    peers.map(|peer| if peer.is_null() { DeviceAddr::NULL } else { peer.offset(offset as u64) })
}
