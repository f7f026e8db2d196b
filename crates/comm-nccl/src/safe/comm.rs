//! The communicator's handle: [`DeviceComm`], each method delegating to the module that owns it.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use comm_core::{
    AlgorithmUsage, Block2d, CommError, CommInfo, DType, Deadline, DeviceAddr, DeviceComm, NormQuantization,
    OpKind, OpQuery, P2pOp, ReduceOp, Registration, Result, RmsNormArgs, StreamHandle, Support,
    TwoGroupNormArgs,
};

use super::state::{Shared, lock};
use super::watchdog;

/// A communicator over NCCL.
///
/// Calls make the communicator's device current for their own duration and put back what was current before. They
/// enqueue on the caller's stream and allocate nothing, so all can be captured into CUDA graphs. A captured call is
/// watched for time-outs by tiny kernels in the graph, unless the option `nccl.watch_graphs` is `off` or a rank
/// has no kernels. Graphs hold the communicator inside NCCL: drop them before [`close`](DeviceComm::close), and do not
/// launch them after.
///
/// What an operation received is right only if [`poll`](DeviceComm::poll), asked after the operation has completed, finds
/// nothing wrong: the end of a failed communicator lets kernels complete that hold garbage.
///
/// Reductions are NCCL's, and not what [`ReduceOp`] says of other backends: all ranks get the same bits, but the order and the
/// precision in which elements are combined are NCCL's own, and minima and maxima may lose a NaN.
///
/// A send to this rank itself needs its receive in the same [`group`](DeviceComm::group).
///
/// Memory from [`allocate`](DeviceComm::allocate) lives until it is freed or the communicator ends.
///
/// Where ranks share a process, what a closed or dropped communicator holds of its device, NCCL's memory and its own, is
/// given back when the last communicator of the process has ended, because giving it back may wait for other ranks' work:
/// split once and keep the groups, rather than again and again. With one rank in a process it is given back at once.
///
/// Dropping the handle returns at once: a thread of its own lets enqueued work finish, within the timeout, and ends the
/// communicator. The end of the process waits for that thread, for five seconds at most;
/// [`close`](DeviceComm::close) waits for it anyway and reports how it went.
pub struct NcclComm {
    shared: Arc<Shared>,
}

/// How much longer than its timeout a close may take: the watchdog has to notice, and to diagnose.
const CLOSE_MARGIN: Duration = Duration::from_secs(1);

/// How long a close waits for the watchdog, which a timeout of "for ever" leaves at that.
const fn close_time(timeout: Duration) -> Duration {
    timeout.saturating_add(CLOSE_MARGIN)
}

impl NcclComm {
    pub(super) const fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    pub(super) fn shared(&self) -> &Shared {
        &self.shared
    }

    fn close_and_wait(&self) -> Result<()> {
        let shared = &self.shared;
        let deadline = Deadline::after(close_time(shared.base.timeout));
        let mut ending = lock(&shared.ending);
        if ending.close {
            return Err(shared.closed());
        }
        ending.close = true;
        shared.start_closing();
        shared.changed.notify_all();
        loop {
            if let Some(outcome) = &ending.outcome {
                return outcome.clone();
            }
            let left = deadline.remaining();
            if left.is_zero() {
                return Err(CommError::Backend {
                    backend: crate::NAME.into(),
                    call: "ncclCommDestroy".into(),
                    code: crate::sys::IN_PROGRESS.into(),
                    message: format!(
                        "communicator {:?} is still being taken down after {:?}; graphs that were captured on it must \
                         be dropped first",
                        shared.info.name,
                        deadline.elapsed()
                    ),
                });
            }
            ending = shared.changed.wait_timeout(ending, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Drop for NcclComm {
    fn drop(&mut self) {
        let shared = &self.shared;
        let dies = std::thread::panicking();
        if dies {
            watchdog::report_last(shared);
        }
        lock(&shared.ending).dropped = true;
        shared.changed.notify_all();
        // An open communicator's are left to the watchdog, which tells the other ranks of what this one drops it for, or is
        // busy telling. Otherwise there is nothing left to tell, and the watchdog may be held up by what it takes down. And a
        // host communicator may tell a death from a departure by the thread that drops it.
        if dies || shared.healthy().is_err() {
            let hosts = lock(&shared.hosts).take();
            drop(hosts);
        }
    }
}

// SAFETY: each operation hands NCCL exactly the ranges that its method names, after checking them. `supports` answers
// from `Limits`, which all ranks derived from the same capabilities.
unsafe impl DeviceComm for NcclComm {
    fn info(&self) -> &CommInfo {
        &self.shared.info
    }

    fn split(&self, color: Option<u32>, key: i32) -> Result<Option<Arc<dyn DeviceComm>>> {
        Ok(self.split_native(color, key)?.map(|comm| Arc::new(comm) as Arc<dyn DeviceComm>))
    }

    fn allocate(&self, bytes: usize) -> Result<DeviceAddr> {
        self.allocate_buffer(bytes)
    }

    unsafe fn free(&self, addr: DeviceAddr) -> Result<()> {
        // SAFETY: the caller vouches for the same.
        unsafe { self.free_buffer(addr) }
    }

    unsafe fn register(&self, addr: DeviceAddr, bytes: usize) -> Result<Registration> {
        // SAFETY: the caller vouches for the same.
        unsafe { self.register_buffer(addr, bytes) }
    }

    unsafe fn deregister(&self, registration: &Registration) -> Result<()> {
        // SAFETY: the caller vouches for the same.
        unsafe { self.deregister_buffer(registration) }
    }

    fn supports(&self, query: &OpQuery) -> Support {
        self.shared.base.limits.supports(query)
    }

    fn usage(&self) -> Vec<AlgorithmUsage> {
        self.shared.usage.snapshot()
    }

    unsafe fn all_reduce(
        &self,
        send: DeviceAddr,
        recv: DeviceAddr,
        count: usize,
        dtype: DType,
        op: ReduceOp,
        stream: StreamHandle,
    ) -> Result<()> {
        // SAFETY: the caller vouches for the same.
        unsafe { self.native_all_reduce(send, recv, count, dtype, op, stream) }
    }

    unsafe fn all_gather(
        &self,
        send: DeviceAddr,
        recv: DeviceAddr,
        count: usize,
        dtype: DType,
        stream: StreamHandle,
    ) -> Result<()> {
        // SAFETY: the caller vouches for the same.
        unsafe { self.native_all_gather(send, recv, count, dtype, stream) }
    }

    unsafe fn all_gather_v(
        &self,
        send: DeviceAddr,
        recv: DeviceAddr,
        counts: &[usize],
        dtype: DType,
        stream: StreamHandle,
    ) -> Result<()> {
        // SAFETY: the caller vouches for the same.
        unsafe { self.grouped_all_gather_v(send, recv, counts, dtype, stream) }
    }

    unsafe fn reduce_scatter(
        &self,
        send: DeviceAddr,
        recv: DeviceAddr,
        count: usize,
        dtype: DType,
        op: ReduceOp,
        stream: StreamHandle,
    ) -> Result<()> {
        // SAFETY: the caller vouches for the same.
        unsafe { self.native_reduce_scatter(send, recv, count, dtype, op, stream) }
    }

    unsafe fn reduce_scatter_v(
        &self,
        send: DeviceAddr,
        recv: DeviceAddr,
        counts: &[usize],
        dtype: DType,
        op: ReduceOp,
        stream: StreamHandle,
    ) -> Result<()> {
        // SAFETY: the caller vouches for the same.
        unsafe { self.grouped_reduce_scatter_v(send, recv, counts, dtype, op, stream) }
    }

    unsafe fn broadcast(
        &self,
        send: DeviceAddr,
        recv: DeviceAddr,
        count: usize,
        dtype: DType,
        root: usize,
        stream: StreamHandle,
    ) -> Result<()> {
        // SAFETY: the caller vouches for the same.
        unsafe { self.native_broadcast(send, recv, count, dtype, root, stream) }
    }

    unsafe fn reduce(
        &self,
        send: DeviceAddr,
        recv: DeviceAddr,
        count: usize,
        dtype: DType,
        op: ReduceOp,
        root: usize,
        stream: StreamHandle,
    ) -> Result<()> {
        // SAFETY: the caller vouches for the same.
        unsafe { self.native_reduce(send, recv, count, dtype, op, root, stream) }
    }

    unsafe fn all_to_all(
        &self,
        send: DeviceAddr,
        recv: DeviceAddr,
        count: usize,
        dtype: DType,
        stream: StreamHandle,
    ) -> Result<()> {
        // SAFETY: the caller vouches for the same.
        unsafe { self.native_all_to_all(send, recv, count, dtype, stream) }
    }

    unsafe fn send(
        &self,
        addr: DeviceAddr,
        count: usize,
        dtype: DType,
        peer: usize,
        stream: StreamHandle,
    ) -> Result<()> {
        // SAFETY: the caller vouches for the same.
        unsafe { self.transfer(P2pOp::Send { addr, count, dtype, peer }, stream) }
    }

    unsafe fn recv(
        &self,
        addr: DeviceAddr,
        count: usize,
        dtype: DType,
        peer: usize,
        stream: StreamHandle,
    ) -> Result<()> {
        // SAFETY: the caller vouches for the same.
        unsafe { self.transfer(P2pOp::Recv { addr, count, dtype, peer }, stream) }
    }

    unsafe fn group(&self, ops: &[P2pOp], stream: StreamHandle) -> Result<()> {
        // SAFETY: the caller vouches for the same.
        unsafe { self.grouped_transfers(ops, stream) }
    }

    unsafe fn barrier(&self, stream: StreamHandle) -> Result<()> {
        // SAFETY: the caller vouches for the same.
        unsafe { self.reduced_barrier(stream) }
    }

    unsafe fn all_gather_2d(
        &self,
        send: DeviceAddr,
        recv: DeviceAddr,
        block: &Block2d,
        stream: StreamHandle,
    ) -> Result<()> {
        // SAFETY: the caller vouches for the same.
        unsafe { self.gather_blocks(send, recv, block, stream) }
    }

    unsafe fn all_reduce_rmsnorm(&self, args: &RmsNormArgs, stream: StreamHandle) -> Result<()> {
        // SAFETY: the caller vouches for the same.
        unsafe { self.fused_norm(args, None, stream) }
    }

    unsafe fn all_reduce_rmsnorm_two_group(
        &self,
        gather: &dyn DeviceComm,
        args: &TwoGroupNormArgs<'_>,
        stream: StreamHandle,
    ) -> Result<()> {
        // SAFETY: the caller vouches for the same.
        unsafe { self.fused_norm_two_group(gather, args, None, stream) }
    }

    unsafe fn all_reduce_rmsnorm_quantized(
        &self,
        args: &RmsNormArgs,
        quantized: &NormQuantization,
        stream: StreamHandle,
    ) -> Result<()> {
        // SAFETY: the caller vouches for the same.
        unsafe { self.fused_norm(args, Some(quantized), stream) }
    }

    unsafe fn all_reduce_rmsnorm_two_group_quantized(
        &self,
        gather: &dyn DeviceComm,
        args: &TwoGroupNormArgs<'_>,
        quantized: &NormQuantization,
        stream: StreamHandle,
    ) -> Result<()> {
        // SAFETY: the caller vouches for the same.
        unsafe { self.fused_norm_two_group(gather, args, Some(quantized), stream) }
    }

    fn poll(&self) -> Result<()> {
        self.shared.healthy()?;
        self.shared.overtaken()
    }

    fn abort(&self) {
        let shared = &self.shared;
        let at = shared.at(OpKind::Close, shared.seq());
        shared.fail(CommError::Aborted { at });
    }

    fn close(&self) -> Result<()> {
        self.close_and_wait()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_close_may_wait_for_ever() {
        assert_eq!(close_time(Duration::from_secs(2)), Duration::from_secs(3));
        assert!(!Deadline::after(close_time(Duration::MAX)).has_passed());
    }
}
