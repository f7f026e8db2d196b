//! Sends and receives, alone and in groups.

use comm_core::{CommError, OpKind, P2pOp, Result, StreamHandle, check};

use super::comm::NcclComm;
use super::limits;
use super::usage::Algorithm;
use crate::result::NcclLibrary;
use crate::sys;

impl NcclComm {
    /// # Safety
    /// As `DeviceComm::send` and `DeviceComm::recv`.
    pub(super) unsafe fn transfer(&self, op: P2pOp, stream: StreamHandle) -> Result<()> {
        let kind = if matches!(op, P2pOp::Send { .. }) { OpKind::Send } else { OpKind::Recv };
        let (P2pOp::Send { addr, count, dtype, peer } | P2pOp::Recv { addr, count, dtype, peer }) = op;
        let bytes = check::p2p(&self.shared().info, addr, count, dtype, peer)?;
        if peer == self.shared().info.rank {
            return Err(CommError::invalid(
                "peer",
                format!("{kind} between rank {peer} and itself needs both ends in one group"),
            ));
        }
        if count == 0 {
            return self.shared().healthy();
        }
        let call = self.shared().begin_on(kind, bytes, stream)?;
        // SAFETY: the operands have been checked and the caller vouches for them.
        call.nccl(|library, comm| unsafe { enqueue_transfer(library, comm, op, stream) })?;
        call.finish(stream, Algorithm::Native)
    }

    /// # Safety
    /// As `DeviceComm::group`.
    pub(super) unsafe fn grouped_transfers(&self, ops: &[P2pOp], stream: StreamHandle) -> Result<()> {
        let shared = self.shared();
        check::group(&shared.info, ops)?;
        self_transfers_match(ops, shared.info.rank)?;
        if ops.iter().all(is_empty) {
            return shared.healthy();
        }
        let bytes = ops.iter().map(bytes_of).fold(0, usize::saturating_add);
        let call = shared.begin_on(OpKind::Group, bytes, stream)?;
        call.nccl(|library, comm| {
            let group = library.group()?;
            for &op in ops.iter().filter(|op| !is_empty(op)) {
                // SAFETY: the operands have been checked and the caller vouches for them.
                let _ = unsafe { enqueue_transfer(library, comm, op, stream) }?;
            }
            group.end()
        })?;
        call.finish(stream, Algorithm::Native)
    }
}

const fn is_empty(op: &P2pOp) -> bool {
    let (P2pOp::Send { count, .. } | P2pOp::Recv { count, .. }) = op;
    *count == 0
}

const fn bytes_of(op: &P2pOp) -> usize {
    let (P2pOp::Send { count, dtype, .. } | P2pOp::Recv { count, dtype, .. }) = op;
    count.saturating_mul(dtype.size())
}

/// # Safety
/// The operands have been checked, the caller vouches for them, and the communicator is locked.
unsafe fn enqueue_transfer(
    library: &NcclLibrary,
    comm: *mut sys::Comm,
    op: P2pOp,
    stream: StreamHandle,
) -> Result<crate::result::Progress> {
    match op {
        P2pOp::Send { addr, count, dtype, peer } => {
            // SAFETY: as this function.
            unsafe { library.send(addr, count, limits::moved(dtype), peer, comm, stream) }
        }
        P2pOp::Recv { addr, count, dtype, peer } => {
            // SAFETY: as this function.
            unsafe { library.recv(addr, count, limits::moved(dtype), peer, comm, stream) }
        }
    }
}

/// Refuses a group whose transfers from this rank to itself do not pair up: NCCL would lose the communicator over it.
fn self_transfers_match(ops: &[P2pOp], rank: usize) -> Result<()> {
    let sends = ops.iter().filter(|op| !is_empty(op)).filter_map(|op| match op {
        P2pOp::Send { count, dtype, peer, .. } if *peer == rank => Some(count * dtype.size()),
        _ => None,
    });
    let recvs = ops.iter().filter(|op| !is_empty(op)).filter_map(|op| match op {
        P2pOp::Recv { count, dtype, peer, .. } if *peer == rank => Some(count * dtype.size()),
        _ => None,
    });
    if sends.eq(recvs) {
        return Ok(());
    }
    Err(CommError::invalid(
        "ops",
        format!("sends and receives between rank {rank} and itself must pair up in size and order"),
    ))
}

#[cfg(test)]
mod tests {
    use comm_core::{DType, DeviceAddr};

    use super::*;

    #[test]
    fn transfers_to_oneself_must_pair_up() {
        let send = |count, peer| P2pOp::Send { addr: DeviceAddr(256), count, dtype: DType::F32, peer };
        let recv = |count, peer| P2pOp::Recv { addr: DeviceAddr(4096), count, dtype: DType::F32, peer };
        assert!(self_transfers_match(&[send(4, 1), recv(8, 0)], 2).is_ok());
        assert!(self_transfers_match(&[send(4, 2), recv(4, 2), send(0, 2)], 2).is_ok());
        assert!(self_transfers_match(&[send(4, 2)], 2).is_err());
        assert!(self_transfers_match(&[send(4, 2), recv(5, 2)], 2).is_err());
    }
}
