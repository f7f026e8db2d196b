//! Buffers that all ranks reach: memory of the communicator, and memory that callers register.

use comm_core::{CommError, DeviceAddr, HostComm, HostCommExt as _, OpKind, Registration, Result};
use comm_kernels::p2p::Peers;

use crate::comm::P2pComm;
use crate::symmetric::ipc::{self, Export, Opened};
use crate::symmetric::table::Origin;
use crate::symmetric::{Block, Hold, agree};

impl P2pComm {
    /// An error of a collective over the host communicator. If that one is lost, so is this. Else a rank's driver
    /// refused, on all ranks alike: the communicator goes on without what was asked for.
    pub(crate) fn lost(&self, host: &dyn HostComm, op: OpKind, error: CommError) -> CommError {
        let shared = self.shared();
        if let Err(cause) = host.poll() {
            return shared.fail(shared.relocate(cause, op));
        }
        let what = if op == OpKind::Allocate { "bytes" } else { "addr" };
        let refused = |rank, cause: &CommError| {
            CommError::invalid(what, format!("rank {rank} refused, so all did: {cause}"))
        };
        match error {
            error @ CommError::Cuda { .. } => refused(shared.info.rank, &error),
            CommError::PeerFailed { rank, cause, .. } => refused(rank, &cause),
            error => shared.relocate(error, op),
        }
    }

    pub(crate) fn allocate_block(&self, bytes: usize) -> Result<DeviceAddr> {
        const KIND: OpKind = OpKind::Allocate;
        let shared = self.shared();
        let mut call = shared.begin(KIND)?;
        let host = shared.control()?;
        let block = agree(&*host, &Ok(bytes as u64), shared.deadline())
            .and_then(|()| {
                Block::create(&*host, shared.base.ordinal, bytes, shared.reach(), shared.deadline())
            })
            .map_err(|error| self.lost(&*host, KIND, error))?;
        let addr = block.own().addr();
        let peers = shared.unreached().map_or_else(|| Ok(block.peers()), Err);
        call.owned.table.insert(Origin::Allocated, (addr, bytes.max(1)), peers, Hold::Mapped(block));
        Ok(addr)
    }

    pub(crate) fn free_block(&self, addr: DeviceAddr) -> Result<()> {
        let shared = self.shared();
        let mut call = shared.begin(OpKind::Free)?;
        let Some(id) = call.owned.table.allocation(addr) else {
            let reason = format!(
                "{addr:?} was not allocated by communicator {:?}, or was freed already",
                shared.info.name
            );
            return Err(CommError::invalid("addr", reason));
        };
        // The other ranks' mappings keep their memory alive, so nobody has to wait for anybody's but on a shared device.
        let host = shared.control()?;
        let meet = || shared.meet_if_shared(&*host).map_err(|error| self.lost(&*host, OpKind::Free, error));
        meet()?;
        drop(call.owned.table.remove(id));
        meet()
    }

    pub(crate) fn register_buffer(&self, addr: DeviceAddr, bytes: usize) -> Result<Registration> {
        const KIND: OpKind = OpKind::Register;
        let shared = self.shared();
        let mut call = shared.begin(KIND)?;
        let host = shared.control()?;
        let usable = if addr.is_null() || bytes == 0 {
            Err(CommError::invalid("addr", "a registration needs an address and at least one byte"))
        } else {
            Ok(bytes as u64)
        };
        agree(&*host, &usable, shared.deadline()).map_err(|error| self.lost(&*host, KIND, error))?;
        // Without the caller's promise, the ranks cannot know at enqueueing that their operands lie alike.
        let own = match (shared.unreached(), shared.base.options.symmetric_operands) {
            (Some(reason), _) => Err(reason),
            (None, true) => ipc::export(addr, bytes, shared.base.ordinal, host.same_process()),
            (None, false) => Err("the option p2p.symmetric_operands is off".to_owned()),
        };
        let exports: Vec<Result<Export, String>> =
            host.all_gather_by(&own, shared.deadline()).map_err(|error| self.lost(&*host, KIND, error))?;
        let opened = self.open(exports, addr);
        // One rank that has to stage makes all of them: an algorithm is the same on all ranks.
        let obstacles: Vec<Option<String>> = host
            .all_gather_by(&opened.as_ref().err().cloned(), shared.deadline())
            .map_err(|error| self.lost(&*host, KIND, error))?;
        let obstacle = obstacles
            .into_iter()
            .enumerate()
            .find_map(|(rank, obstacle)| Some(format!("rank {rank}: {}", obstacle?)));
        let (peers, hold) = match (opened, obstacle) {
            (Ok((peers, opened)), None) => (Ok(peers), Hold::Opened(opened, ipc::allocation_id(addr).ok())),
            (_, obstacle) => (Err(obstacle.unwrap_or_default()), Hold::Opened(Vec::new(), None)),
        };
        if let Err(reason) = &peers {
            tracing::debug!(
                comm = shared.info.name,
                ?addr,
                bytes,
                reason,
                "results there will go by way of scratch memory"
            );
        }
        Ok(call.owned.table.insert(Origin::Registered, (addr, bytes), peers, hold))
    }

    /// Opens the other ranks' exports, or says why one cannot be used.
    pub(crate) fn open(
        &self,
        exports: Vec<Result<Export, String>>,
        own: DeviceAddr,
    ) -> Result<(Peers, Vec<Opened>), String> {
        let shared = self.shared();
        let mut peers = Peers::default();
        let mut opened = Vec::new();
        for (rank, export) in exports.into_iter().enumerate() {
            let export = export.map_err(|reason| format!("its own buffer, or rank {rank}'s: {reason}"))?;
            if rank == shared.info.rank {
                peers[rank] = own;
                continue;
            }
            let peer = ipc::open(&export, shared.base.ordinal).map_err(|error| error.to_string())?;
            peers[rank] = peer.addr;
            opened.push(peer);
        }
        Ok((peers, opened))
    }

    pub(crate) fn deregister_buffer(&self, registration: &Registration) -> Result<()> {
        let shared = self.shared();
        let mut call = shared.begin(OpKind::Deregister)?;
        call.owned.table.registered(&shared.info.name, registration)?;
        drop(call.owned.table.remove(registration.id));
        // The device is current.
        ipc::close_unused(shared.base.ordinal);
        Ok(())
    }
}
