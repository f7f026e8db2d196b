//! The communicator's handle: [`DeviceComm`], each method delegating to the module that owns it.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use comm_core::topology::Topology;
use comm_core::{
    AlgorithmUsage, Block2d, CommError, CommInfo, DType, Deadline, DeviceAddr, DeviceComm, NormQuantization,
    OpKind, OpQuery, P2pOp, ReduceOp, Registration, Result, RmsNormArgs, StreamHandle, Support,
    TwoGroupNormArgs,
};

use crate::create::{self, sibling};
use crate::state::{Hosts, Shared, lock};
use crate::watchdog;

/// A communicator over peer-to-peer memory.
///
/// Calls make the communicator's device current and enqueue kernels on the caller's stream; they allocate nothing and
/// wait for nothing, so all can be captured into CUDA graphs. Drop graphs before [`close`](DeviceComm::close), and do
/// not launch them after.
///
/// Calls may come on several streams: a call on another stream than the last one waits for all before it. What is
/// captured has its order in its graph; graphs, and calls beside them, are ordered by whoever launches them, for the
/// communicator does not see that.
///
/// A transfer of a rank to itself needs its other end in the same [`group`](DeviceComm::group).
///
/// Dropping the handle returns at once: a thread of its own waits for enqueued work and gives the memory back. Before
/// the process exits, [`close`](DeviceComm::close) is the better end, because it waits for that.
pub struct P2pComm {
    shared: Arc<Shared>,
}

/// How much longer than its timeout a close may take: it waits for the ranks, and then for the device.
const CLOSE_MARGIN: Duration = Duration::from_secs(1);

impl P2pComm {
    pub(crate) const fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    pub(crate) fn shared(&self) -> &Shared {
        &self.shared
    }

    /// Why operations on a registered buffer go through staging memory, if they do; `None` if the ranks reach it.
    ///
    /// # Errors
    /// [`CommError::StaleHandle`].
    pub fn staging_reason(&self, registration: &Registration) -> Result<Option<String>> {
        let owned = lock(&self.shared.owned);
        let region = owned.table.registered(&self.shared.info.name, registration)?;
        Ok(region.peers.as_ref().err().cloned())
    }

    /// How the ranks' GPUs are connected, as all ranks agreed.
    #[must_use]
    pub fn topology(&self) -> &Topology {
        &self.shared.topology
    }

    fn close_and_wait(&self) -> Result<()> {
        let shared = &self.shared;
        let deadline = Deadline::after(shared.base.timeout.saturating_mul(2).saturating_add(CLOSE_MARGIN));
        // By this thread too: the watchdog, which does the rest, may be held up by what this rank closes for.
        watchdog::report_last(shared);
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
                return Err(CommError::Timeout {
                    at: shared.at(OpKind::Close),
                    missing: Vec::new(),
                    waited: deadline.elapsed(),
                });
            }
            ending = shared.changed.wait_timeout(ending, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Drop for P2pComm {
    fn drop(&mut self) {
        // The caller may have met an error of its device, and drop for that, before the watchdog has seen it.
        watchdog::report_last(&self.shared);
        lock(&self.shared.ending).dropped = true;
        self.shared.changed.notify_all();
        // On this thread, because a host communicator may tell a death from a departure by the thread that drops it.
        let hosts = lock(&self.shared.host).take();
        drop(hosts);
    }
}

/// Why there is no quantised all-reduce in a mesh with gaps.
pub(crate) const QUANTIZED_NEEDS_ALL: &str =
    "a quantised all-reduce needs every rank to reach every other's memory";

// SAFETY: each operation launches kernels that touch the ranges its method names, after checking them, and memory of
// the communicator. `supports` gives one answer whatever the rank.
unsafe impl DeviceComm for P2pComm {
    fn info(&self) -> &CommInfo {
        &self.shared.info
    }

    fn split(&self, color: Option<u32>, key: i32) -> Result<Option<Arc<dyn DeviceComm>>> {
        let shared = &self.shared;
        shared.healthy()?;
        let deadline = shared.deadline();
        let lost = |error| shared.fail(shared.relocate(error, OpKind::Split));
        let control = shared.control()?;
        let group = control.split(color, key.into(), deadline).map_err(lost)?;
        let made = group.map(|group| {
            let hosts = Hosts { control: group, parent: None };
            // In a mesh with gaps only neighbours were checked, and a part of it may have none.
            create::create(hosts, Ok(shared.base.clone()), !shared.keeps_to_neighbours())
        });
        // Groups may be made at different speeds, and one must not be at work on a device where another is being made.
        let met = shared.meet_if_shared(&*control).map_err(lost);
        let Some(made) = made else { return met.map(|()| None) };
        let comm = made?;
        met?;
        Ok(Some(Arc::new(comm)))
    }

    fn allocate(&self, bytes: usize) -> Result<DeviceAddr> {
        self.allocate_block(bytes)
    }

    unsafe fn free(&self, addr: DeviceAddr) -> Result<()> {
        self.free_block(addr)
    }

    unsafe fn register(&self, addr: DeviceAddr, bytes: usize) -> Result<Registration> {
        self.register_buffer(addr, bytes)
    }

    unsafe fn deregister(&self, registration: &Registration) -> Result<()> {
        self.deregister_buffer(registration)
    }

    fn register_captured(&self) -> Result<()> {
        self.register_captured_operands()
    }

    fn supports(&self, query: &OpQuery) -> Support {
        if query.kind.norms() && !matches!(query.dtype, DType::F32 | DType::F16 | DType::BF16) {
            return Support::no(format!("RMSNorm takes f32, f16 and bf16, not {}", query.dtype));
        }
        if query.kind == OpKind::AllReduceQuantized
            && !matches!(query.dtype, DType::F32 | DType::F16 | DType::BF16)
        {
            return Support::no(format!(
                "a quantised all-reduce takes f32, f16 and bf16, not {}",
                query.dtype
            ));
        }
        if query.kind == OpKind::AllReduceQuantized && self.shared.keeps_to_neighbours() {
            return Support::no(QUANTIZED_NEEDS_ALL);
        }
        Support::Yes
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
        // SAFETY: here and below, the caller vouches for the same.
        unsafe { self.do_all_reduce((send, recv), count, dtype, op, stream) }
    }

    unsafe fn all_reduce_quantized(
        &self,
        send: DeviceAddr,
        recv: DeviceAddr,
        count: usize,
        dtype: DType,
        stream: StreamHandle,
    ) -> Result<()> {
        // SAFETY: see above.
        unsafe { self.do_all_reduce_quantized((send, recv), count, dtype, stream) }
    }

    unsafe fn all_gather(
        &self,
        send: DeviceAddr,
        recv: DeviceAddr,
        count: usize,
        dtype: DType,
        stream: StreamHandle,
    ) -> Result<()> {
        // SAFETY: see above.
        unsafe { self.do_all_gather((send, recv), count, dtype, stream) }
    }

    unsafe fn all_gather_v(
        &self,
        send: DeviceAddr,
        recv: DeviceAddr,
        counts: &[usize],
        dtype: DType,
        stream: StreamHandle,
    ) -> Result<()> {
        // SAFETY: see above.
        unsafe { self.do_all_gather_v((send, recv), counts, dtype, stream) }
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
        // SAFETY: see above.
        unsafe { self.do_reduce_scatter((send, recv), count, (dtype, op), stream) }
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
        // SAFETY: see above.
        unsafe { self.do_reduce_scatter_v((send, recv), counts, (dtype, op), stream) }
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
        // SAFETY: see above.
        unsafe { self.do_broadcast((send, recv), count, dtype, root, stream) }
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
        // SAFETY: see above.
        unsafe { self.do_reduce((send, recv), count, (dtype, op), root, stream) }
    }

    unsafe fn all_to_all(
        &self,
        send: DeviceAddr,
        recv: DeviceAddr,
        count: usize,
        dtype: DType,
        stream: StreamHandle,
    ) -> Result<()> {
        // SAFETY: see above.
        unsafe { self.do_all_to_all((send, recv), count, dtype, stream) }
    }

    unsafe fn send(
        &self,
        addr: DeviceAddr,
        count: usize,
        dtype: DType,
        peer: usize,
        stream: StreamHandle,
    ) -> Result<()> {
        // SAFETY: see above.
        unsafe { self.do_transfer(OpKind::Send, addr, count, dtype, peer, stream) }
    }

    unsafe fn recv(
        &self,
        addr: DeviceAddr,
        count: usize,
        dtype: DType,
        peer: usize,
        stream: StreamHandle,
    ) -> Result<()> {
        // SAFETY: see above.
        unsafe { self.do_transfer(OpKind::Recv, addr, count, dtype, peer, stream) }
    }

    unsafe fn group(&self, ops: &[P2pOp], stream: StreamHandle) -> Result<()> {
        // SAFETY: see above.
        unsafe { self.do_group(ops, stream) }
    }

    unsafe fn barrier(&self, stream: StreamHandle) -> Result<()> {
        // SAFETY: see above.
        unsafe { self.do_barrier(stream) }
    }

    unsafe fn all_gather_2d(
        &self,
        send: DeviceAddr,
        recv: DeviceAddr,
        block: &Block2d,
        stream: StreamHandle,
    ) -> Result<()> {
        // SAFETY: see above.
        unsafe { self.do_all_gather_2d((send, recv), block, stream) }
    }

    unsafe fn all_reduce_rmsnorm(&self, args: &RmsNormArgs, stream: StreamHandle) -> Result<()> {
        // SAFETY: see above.
        unsafe { self.do_norm(args, None, stream) }
    }

    unsafe fn all_reduce_rmsnorm_two_group(
        &self,
        gather: &dyn DeviceComm,
        args: &TwoGroupNormArgs<'_>,
        stream: StreamHandle,
    ) -> Result<()> {
        // SAFETY: see above.
        unsafe { self.do_two_group_norm(gather, args, None, stream) }
    }

    unsafe fn all_reduce_rmsnorm_quantized(
        &self,
        args: &RmsNormArgs,
        quantized: &NormQuantization,
        stream: StreamHandle,
    ) -> Result<()> {
        // SAFETY: see above.
        unsafe { self.do_norm(args, Some(quantized), stream) }
    }

    unsafe fn all_reduce_rmsnorm_two_group_quantized(
        &self,
        gather: &dyn DeviceComm,
        args: &TwoGroupNormArgs<'_>,
        quantized: &NormQuantization,
        stream: StreamHandle,
    ) -> Result<()> {
        // SAFETY: see above.
        unsafe { self.do_two_group_norm(gather, args, Some(quantized), stream) }
    }

    fn poll(&self) -> Result<()> {
        self.shared.poll()
    }

    fn abort(&self) {
        self.shared.fail(CommError::Aborted { at: self.shared.at(OpKind::Poll) });
    }

    fn close(&self) -> Result<()> {
        self.close_and_wait()
    }
}

/// The host communicators of a new communicator, made from the caller's.
pub(crate) fn hosts(host: &Arc<dyn comm_core::HostComm>, deadline: Deadline) -> Result<Hosts> {
    Ok(Hosts { control: sibling(&**host, deadline)?, parent: Some(Arc::clone(host)) })
}
