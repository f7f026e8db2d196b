//! The operations that NCCL has, and the two lines before each that every call takes: the shared argument checks, and
//! in checked mode the comparison with the other ranks.

use comm_core::{
    CallSite, CommError, DType, Deadline, DeviceAddr, OpKind, OpQuery, ReduceOp, Result, StreamHandle,
    Support, check,
};

use super::comm::NcclComm;
use super::limits;
use super::usage::Algorithm;
use crate::sys;

impl NcclComm {
    /// In checked mode, compares this call with the other ranks'. A call that this rank is about to refuse is compared
    /// too, so that the others learn of it instead of waiting.
    pub(super) fn compare<T>(
        &self,
        kind: OpKind,
        checked: &Result<T>,
        describe: impl FnOnce() -> String,
    ) -> Result<()> {
        if !self.shared().base.checked {
            return Ok(());
        }
        self.compare_with_ranks(kind, checked.as_ref().err(), describe())
    }

    #[cold]
    fn compare_with_ranks(&self, kind: OpKind, refused: Option<&CommError>, text: String) -> Result<()> {
        let shared = self.shared();
        shared.healthy()?;
        let control = shared.hosts()?.control;
        let own = match refused {
            None => format!("{kind} of {text}"),
            Some(error) => format!("{kind} refused on that rank: {error}"),
        };
        let all = control
            .all_gather_bytes(own.as_bytes(), Deadline::after(shared.base.timeout))
            .map_err(|error| shared.fail(shared.relocate(error, Some(kind))))?;
        match all.iter().position(|other| other != own.as_bytes()) {
            Some(rank) if refused.is_none() => Err(CommError::Mismatch {
                at: CallSite::new(&shared.info.name, kind, shared.seq()),
                rank,
                expected: own,
                found: String::from_utf8_lossy(&all[rank]).into_owned(),
            }),
            _ => Ok(()),
        }
    }

    /// The refusal that `supports` announced, if it did.
    pub(super) fn supported(
        &self,
        kind: OpKind,
        dtype: DType,
        reduce: Option<ReduceOp>,
        count: usize,
    ) -> Result<()> {
        match self.shared().base.limits.supports(&OpQuery { kind, dtype, reduce, count }) {
            Support::Yes => Ok(()),
            Support::No { reason } => Err(CommError::unsupported(kind, crate::NAME, reason)),
        }
    }

    /// # Safety
    /// As `DeviceComm::all_reduce`.
    pub(super) unsafe fn native_all_reduce(
        &self,
        send: DeviceAddr,
        recv: DeviceAddr,
        count: usize,
        dtype: DType,
        op: ReduceOp,
        stream: StreamHandle,
    ) -> Result<()> {
        const KIND: OpKind = OpKind::AllReduce;
        let checked = check::same_size(send, recv, count, dtype);
        self.compare(KIND, &checked, || format!("{count} {dtype} ({op})"))?;
        let bytes = checked?;
        self.supported(KIND, dtype, Some(op), count)?;
        if count == 0 {
            return self.shared().healthy();
        }
        let call = self.shared().begin_on(KIND, bytes, stream)?;
        let (element, reduction) = (limits::element(dtype), limits::reduction(op));
        // SAFETY: the operands have been checked and the caller vouches for them.
        call.nccl(|library, comm| unsafe {
            library.all_reduce(send, recv, count, element, reduction, comm, stream)
        })?;
        call.finish(stream, Algorithm::Native)
    }

    /// # Safety
    /// As `DeviceComm::all_gather`.
    pub(super) unsafe fn native_all_gather(
        &self,
        send: DeviceAddr,
        recv: DeviceAddr,
        count: usize,
        dtype: DType,
        stream: StreamHandle,
    ) -> Result<()> {
        const KIND: OpKind = OpKind::AllGather;
        let checked = check::all_gather(&self.shared().info, send, recv, count, dtype);
        self.compare(KIND, &checked, || format!("{count} {dtype}"))?;
        let part = checked?;
        if count == 0 {
            return self.shared().healthy();
        }
        let call = self.shared().begin_on(KIND, part * self.shared().info.size, stream)?;
        let moved = limits::moved(dtype);
        // SAFETY: the operands have been checked and the caller vouches for them.
        call.nccl(|library, comm| unsafe { library.all_gather(send, recv, count, moved, comm, stream) })?;
        call.finish(stream, Algorithm::Native)
    }

    /// # Safety
    /// As `DeviceComm::all_gather_v`.
    pub(super) unsafe fn grouped_all_gather_v(
        &self,
        send: DeviceAddr,
        recv: DeviceAddr,
        counts: &[usize],
        dtype: DType,
        stream: StreamHandle,
    ) -> Result<()> {
        const KIND: OpKind = OpKind::AllGatherV;
        let checked = check::all_gather_v(&self.shared().info, send, recv, counts, dtype);
        self.compare(KIND, &checked, || format!("{counts:?} {dtype}"))?;
        let bytes = checked?;
        if bytes == 0 {
            return self.shared().healthy();
        }
        let call = self.shared().begin_on(KIND, bytes, stream)?;
        // SAFETY: the operands have been checked and the caller vouches for them.
        let algorithm =
            unsafe { self.enqueue_all_gather_v(&call, send, recv, &|rank| counts[rank], dtype, stream) }?;
        call.finish(stream, algorithm)
    }

    /// # Safety
    /// As `DeviceComm::reduce_scatter`.
    pub(super) unsafe fn native_reduce_scatter(
        &self,
        send: DeviceAddr,
        recv: DeviceAddr,
        count: usize,
        dtype: DType,
        op: ReduceOp,
        stream: StreamHandle,
    ) -> Result<()> {
        const KIND: OpKind = OpKind::ReduceScatter;
        let checked = check::reduce_scatter(&self.shared().info, send, recv, count, dtype);
        self.compare(KIND, &checked, || format!("{count} {dtype} ({op})"))?;
        let part = checked?;
        self.supported(KIND, dtype, Some(op), count)?;
        if count == 0 {
            return self.shared().healthy();
        }
        let call = self.shared().begin_on(KIND, part * self.shared().info.size, stream)?;
        let (element, reduction) = (limits::element(dtype), limits::reduction(op));
        // SAFETY: the operands have been checked and the caller vouches for them.
        call.nccl(|library, comm| unsafe {
            library.reduce_scatter(send, recv, count, element, reduction, comm, stream)
        })?;
        call.finish(stream, Algorithm::Native)
    }

    /// # Safety
    /// As `DeviceComm::reduce_scatter_v`.
    pub(super) unsafe fn grouped_reduce_scatter_v(
        &self,
        send: DeviceAddr,
        recv: DeviceAddr,
        counts: &[usize],
        dtype: DType,
        op: ReduceOp,
        stream: StreamHandle,
    ) -> Result<()> {
        const KIND: OpKind = OpKind::ReduceScatterV;
        let checked = check::reduce_scatter_v(&self.shared().info, send, recv, counts, dtype);
        self.compare(KIND, &checked, || format!("{counts:?} {dtype} ({op})"))?;
        let bytes = checked?;
        self.supported(KIND, dtype, Some(op), counts.iter().copied().max().unwrap_or(0))?;
        if bytes == 0 {
            return self.shared().healthy();
        }
        let call = self.shared().begin_on(KIND, bytes, stream)?;
        // SAFETY: the operands have been checked and the caller vouches for them.
        let algorithm = unsafe {
            self.enqueue_reduce_scatter_v(&call, send, recv, &|rank| counts[rank], (dtype, op), stream)
        }?;
        call.finish(stream, algorithm)
    }

    /// # Safety
    /// As `DeviceComm::broadcast`.
    pub(super) unsafe fn native_broadcast(
        &self,
        send: DeviceAddr,
        recv: DeviceAddr,
        count: usize,
        dtype: DType,
        root: usize,
        stream: StreamHandle,
    ) -> Result<()> {
        const KIND: OpKind = OpKind::Broadcast;
        let info = &self.shared().info;
        let checked = check::broadcast(info, send, recv, count, dtype, root);
        self.compare(KIND, &checked, || format!("{count} {dtype} from rank {root}"))?;
        let bytes = checked?;
        if count == 0 {
            return self.shared().healthy();
        }
        let call = self.shared().begin_on(KIND, bytes, stream)?;
        let moved = limits::moved(dtype);
        // `send` means nothing on the other ranks, so NCCL does not get to see it.
        let from = if info.rank == root { send } else { recv };
        // SAFETY: the operands have been checked and the caller vouches for them.
        call.nccl(|library, comm| unsafe {
            library.broadcast(from, recv, count, moved, root, comm, stream)
        })?;
        call.finish(stream, Algorithm::Native)
    }

    /// # Safety
    /// As `DeviceComm::reduce`.
    pub(super) unsafe fn native_reduce(
        &self,
        send: DeviceAddr,
        recv: DeviceAddr,
        count: usize,
        dtype: DType,
        op: ReduceOp,
        root: usize,
        stream: StreamHandle,
    ) -> Result<()> {
        const KIND: OpKind = OpKind::Reduce;
        let info = &self.shared().info;
        let checked = check::reduce(info, send, recv, count, dtype, root);
        self.compare(KIND, &checked, || format!("{count} {dtype} ({op}) to rank {root}"))?;
        let bytes = checked?;
        self.supported(KIND, dtype, Some(op), count)?;
        if count == 0 {
            return self.shared().healthy();
        }
        let call = self.shared().begin_on(KIND, bytes, stream)?;
        let (element, reduction) = (limits::element(dtype), limits::reduction(op));
        // `recv` means nothing on the other ranks, so NCCL does not get to see it.
        let to = if info.rank == root { recv } else { send };
        // SAFETY: the operands have been checked and the caller vouches for them.
        call.nccl(|library, comm| unsafe {
            library.reduce(send, to, count, element, reduction, root, comm, stream)
        })?;
        call.finish(stream, Algorithm::Native)
    }

    /// # Safety
    /// As `DeviceComm::all_to_all`.
    pub(super) unsafe fn native_all_to_all(
        &self,
        send: DeviceAddr,
        recv: DeviceAddr,
        count: usize,
        dtype: DType,
        stream: StreamHandle,
    ) -> Result<()> {
        const KIND: OpKind = OpKind::AllToAll;
        let shared = self.shared();
        let checked = check::all_to_all(&shared.info, send, recv, count, dtype);
        self.compare(KIND, &checked, || format!("{count} {dtype}"))?;
        let part = checked?;
        if count == 0 {
            return shared.healthy();
        }
        let call = shared.begin_on(KIND, part * shared.info.size, stream)?;
        let moved = limits::moved(dtype);
        if shared.base.limits.has_all_to_all() {
            // SAFETY: the operands have been checked and the caller vouches for them.
            call.nccl(|library, comm| unsafe { library.all_to_all(send, recv, count, moved, comm, stream) })?;
            return call.finish(stream, Algorithm::Native);
        }
        call.nccl(|library, comm| {
            let group = library.group()?;
            for rank in 0..shared.info.size {
                let at = (rank * part) as u64;
                // SAFETY: the operands have been checked and the caller vouches for them.
                let _ = unsafe { library.send(send.offset(at), count, moved, rank, comm, stream) }?;
                // SAFETY: as above.
                let _ = unsafe { library.recv(recv.offset(at), count, moved, rank, comm, stream) }?;
            }
            group.end()
        })?;
        call.finish(stream, Algorithm::SendRecv)
    }

    /// # Safety
    /// As `DeviceComm::barrier`.
    pub(super) unsafe fn reduced_barrier(&self, stream: StreamHandle) -> Result<()> {
        const KIND: OpKind = OpKind::Barrier;
        let shared = self.shared();
        self.compare(KIND, &Ok(()), String::new)?;
        let call = shared.begin_on(KIND, 4, stream)?;
        let word = shared.scratch.barrier;
        // SAFETY: the word belongs to the communicator and lives as long as it; no one reads its value.
        call.nccl(|library, comm| unsafe {
            library.all_reduce(word, word, 1, sys::UINT32, sys::MAX, comm, stream)
        })?;
        call.finish(stream, Algorithm::Native)
    }
}
