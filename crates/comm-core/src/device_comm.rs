//! The contract between collectives and their callers.

use std::sync::Arc;

use crate::addr::{DeviceAddr, StreamHandle};
use crate::dtype::{DType, ReduceOp};
use crate::error::{CommError, Result};
use crate::fused::{Block2d, NormQuantization, RmsNormArgs, TwoGroupNormArgs};
use crate::op::{OpKind, OpQuery, Support};

pub use crate::facts::{AlgorithmUsage, CommInfo, P2pOp, Registration};

/// A communicator between the devices of `size` ranks: the interface that every backend implements and every model
/// calls, usually as `Arc<dyn DeviceComm>`.
///
/// # Calls
/// All ranks issue the same operations with equal counts, types, reductions and roots, in the same order. A call on
/// another stream than the last one waits for those before it, and what is captured on several streams of one capture
/// does likewise; a graph and other calls, or two graphs, are ordered by whoever launches them. A communicator from
/// [`split`](Self::split) has an order of its own. An operation enqueues its work on `stream` and returns; on host memory it has completed when it returns. Concurrent calls on one communicator from
/// several threads are serialised. An operation that the backend lacks returns `Err(Unsupported)` and does nothing;
/// [`supports`](Self::supports) says so beforehand. The provided methods do just that, so a backend implements what it
/// has.
///
/// # Operands
/// Addresses are aligned to the element size and need no other alignment. Counts are in elements and may be zero, and
/// then addresses may be null. `send` and `recv` are disjoint, or *in place*: for all-reduce, broadcast and reduce they
/// are equal; for an all-gather `send` is where this rank's part lies in `recv`; for a reduce-scatter `recv` is where
/// this rank's part lies in `send`. An all-to-all is never in place. Other overlaps are errors.
///
/// # Results
/// Reductions are as [`ReduceOp`] says. Every rank that receives a reduced element receives the same bits.
///
/// # Failure
/// No wait is unbounded: a rank that dies or does not arrive becomes an error, at the call itself (host memory) or at a
/// later call or [`poll`](Self::poll) (devices). After a fatal error ([`CommError::is_fatal`](crate::CommError::is_fatal))
/// all calls return it; a new communicator can be made in the same process.
///
/// # Errors
/// Every operation may return:
/// - [`Unsupported`](crate::CommError::Unsupported) and [`InvalidArgument`](crate::CommError::InvalidArgument): nothing
///   was done and the communicator is unharmed;
/// - [`Mismatch`](crate::CommError::Mismatch) in checked mode;
/// - [`PeerDied`](crate::CommError::PeerDied), [`PeerFailed`](crate::CommError::PeerFailed),
///   [`Timeout`](crate::CommError::Timeout), [`Aborted`](crate::CommError::Aborted),
///   [`NotRegistered`](crate::CommError::NotRegistered), [`Closed`](crate::CommError::Closed),
///   [`Cuda`](crate::CommError::Cuda) and [`Backend`](crate::CommError::Backend).
///
/// # Safety
/// For implementors: an operation reads and writes only the ranges that its method names, work that it leaves running
/// on the stream included, and [`supports`](Self::supports) gives equal answers on all ranks.
///
/// For callers of the `unsafe` operations: the ranges named by the arguments are valid for reads or writes on this
/// communicator's memory until the work has completed (on host memory: until the call returns), nothing else writes
/// what is read or touches what is written in that time, and `stream` is a live stream of the communicator's device. It
/// need not outlive the call.
#[allow(clippy::missing_safety_doc, reason = "the trait's Safety section holds for every method")]
#[allow(clippy::missing_errors_doc, reason = "the trait's Errors section holds for every method")]
pub unsafe trait DeviceComm: Send + Sync {
    /// What this communicator is.
    fn info(&self) -> &CommInfo;

    /// This rank.
    fn rank(&self) -> usize {
        self.info().rank
    }

    /// The number of ranks.
    fn size(&self) -> usize {
        self.info().size
    }

    /// The communicators that this one distributes its calls among; empty for a backend of its own. An operation that
    /// takes a second communicator finds its backend's part of that one here.
    fn tiers(&self) -> &[Arc<dyn DeviceComm>] {
        &[]
    }

    /// Splits into groups of the ranks that pass the same `color`, ordered by `key` and then by rank here. Ranks that
    /// pass `None` join no group and get `None`. Collective; blocks until all ranks have called it.
    fn split(&self, color: Option<u32>, key: i32) -> Result<Option<Arc<dyn DeviceComm>>> {
        let _ = (color, key);
        Err(lacks(self.info(), OpKind::Split))
    }

    /// Allocates `bytes` bytes of memory that operations of this communicator reach without staging (and its splits
    /// may). Aligned to at least 256. Collective: all ranks call it with the same size.
    fn allocate(&self, bytes: usize) -> Result<DeviceAddr> {
        let _ = bytes;
        Err(lacks(self.info(), OpKind::Allocate))
    }

    /// Gives back memory from [`allocate`](Self::allocate). Collective.
    ///
    /// # Safety
    /// No work that uses the allocation is running, on any rank.
    unsafe fn free(&self, addr: DeviceAddr) -> Result<()> {
        let _ = addr;
        Err(lacks(self.info(), OpKind::Free))
    }

    /// Makes caller-owned memory known, so that operations on any address inside it need no staging copy. Collective:
    /// all ranks call it, with equal `bytes`.
    ///
    /// # Safety
    /// The range stays allocated until [`deregister`](Self::deregister) has returned on every rank.
    unsafe fn register(&self, addr: DeviceAddr, bytes: usize) -> Result<Registration> {
        let _ = (addr, bytes);
        Err(lacks(self.info(), OpKind::Register))
    }

    /// Takes a registration back. Collective.
    ///
    /// # Safety
    /// No work that uses the range is running, on any rank.
    unsafe fn deregister(&self, registration: &Registration) -> Result<()> {
        let _ = registration;
        Err(lacks(self.info(), OpKind::Deregister))
    }

    /// Makes the operands of calls that were captured into graphs known to the other ranks, where a backend was told to
    /// wait for that; each backend says by which option, and to which calls it applies. To be called after capturing and
    /// before replaying: a replay before it ends the communicator with [`NotRegistered`](crate::CommError::NotRegistered).
    /// Collective: all ranks have captured the same calls by then. Nothing has to be taken back: what is known goes with
    /// the graph.
    ///
    /// The provided method is for backends that need no such call: it does nothing.
    fn register_captured(&self) -> Result<()> {
        Ok(())
    }

    /// Whether a call would be carried out. The answer depends only on the query and on what all ranks share.
    fn supports(&self, query: &OpQuery) -> Support;

    /// How often each algorithm was used, for those used at least once.
    fn usage(&self) -> Vec<AlgorithmUsage>;

    /// `recv[i] = reduce over ranks of send[i]`, for `i < count`, on every rank.
    unsafe fn all_reduce(
        &self,
        send: DeviceAddr,
        recv: DeviceAddr,
        count: usize,
        dtype: DType,
        op: ReduceOp,
        stream: StreamHandle,
    ) -> Result<()> {
        let _ = (send, recv, count, dtype, op, stream);
        Err(lacks(self.info(), OpKind::AllReduce))
    }

    /// A sum all-reduce whose operands travel as fp8, with a scale for each group of elements: about half the bytes of
    /// one in 16 bits, for an error that [`quantize`](crate::quantize) bounds and defines to the last bit. `dtype` is
    /// `f32`, `f16` or `bf16`. Nothing chooses it in place of [`all_reduce`](Self::all_reduce): who calls it has decided
    /// that the model bears the error.
    unsafe fn all_reduce_quantized(
        &self,
        send: DeviceAddr,
        recv: DeviceAddr,
        count: usize,
        dtype: DType,
        stream: StreamHandle,
    ) -> Result<()> {
        let _ = (send, recv, count, dtype, stream);
        Err(lacks(self.info(), OpKind::AllReduceQuantized))
    }

    /// `recv[r * count + i] = send of rank r [i]`, for `i < count`, on every rank. `count` is the elements each rank
    /// sends.
    unsafe fn all_gather(
        &self,
        send: DeviceAddr,
        recv: DeviceAddr,
        count: usize,
        dtype: DType,
        stream: StreamHandle,
    ) -> Result<()> {
        let _ = (send, recv, count, dtype, stream);
        Err(lacks(self.info(), OpKind::AllGather))
    }

    /// An all-gather to which rank `r` contributes `counts[r]` elements, laid end to end in `recv`.
    unsafe fn all_gather_v(
        &self,
        send: DeviceAddr,
        recv: DeviceAddr,
        counts: &[usize],
        dtype: DType,
        stream: StreamHandle,
    ) -> Result<()> {
        let _ = (send, recv, counts, dtype, stream);
        Err(lacks(self.info(), OpKind::AllGatherV))
    }

    /// On rank `r`, `recv[i] = reduce over ranks of send[r * count + i]`, for `i < count`. `count` is the elements each
    /// rank receives.
    unsafe fn reduce_scatter(
        &self,
        send: DeviceAddr,
        recv: DeviceAddr,
        count: usize,
        dtype: DType,
        op: ReduceOp,
        stream: StreamHandle,
    ) -> Result<()> {
        let _ = (send, recv, count, dtype, op, stream);
        Err(lacks(self.info(), OpKind::ReduceScatter))
    }

    /// A reduce-scatter of which rank `r` receives `counts[r]` elements, from parts laid end to end in `send`.
    unsafe fn reduce_scatter_v(
        &self,
        send: DeviceAddr,
        recv: DeviceAddr,
        counts: &[usize],
        dtype: DType,
        op: ReduceOp,
        stream: StreamHandle,
    ) -> Result<()> {
        let _ = (send, recv, counts, dtype, op, stream);
        Err(lacks(self.info(), OpKind::ReduceScatterV))
    }

    /// `recv[i] = send of root [i]`, for `i < count`, on every rank. `send` is ignored on the others.
    unsafe fn broadcast(
        &self,
        send: DeviceAddr,
        recv: DeviceAddr,
        count: usize,
        dtype: DType,
        root: usize,
        stream: StreamHandle,
    ) -> Result<()> {
        let _ = (send, recv, count, dtype, root, stream);
        Err(lacks(self.info(), OpKind::Broadcast))
    }

    /// `recv[i] = reduce over ranks of send[i]`, for `i < count`, on `root`. `recv` is ignored on the others.
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
        let _ = (send, recv, count, dtype, op, root, stream);
        Err(lacks(self.info(), OpKind::Reduce))
    }

    /// `recv[r * count + i] = send of rank r [rank * count + i]`, for `i < count`. Never in place.
    unsafe fn all_to_all(
        &self,
        send: DeviceAddr,
        recv: DeviceAddr,
        count: usize,
        dtype: DType,
        stream: StreamHandle,
    ) -> Result<()> {
        let _ = (send, recv, count, dtype, stream);
        Err(lacks(self.info(), OpKind::AllToAll))
    }

    /// Sends to `peer`, which must call [`recv`](Self::recv) with this rank as peer. Transfers between a pair match in
    /// the order they are issued. May wait until the peer receives.
    unsafe fn send(
        &self,
        addr: DeviceAddr,
        count: usize,
        dtype: DType,
        peer: usize,
        stream: StreamHandle,
    ) -> Result<()> {
        let _ = (addr, count, dtype, peer, stream);
        Err(lacks(self.info(), OpKind::Send))
    }

    /// Receives from `peer`, which must call [`send`](Self::send) with this rank as peer.
    unsafe fn recv(
        &self,
        addr: DeviceAddr,
        count: usize,
        dtype: DType,
        peer: usize,
        stream: StreamHandle,
    ) -> Result<()> {
        let _ = (addr, count, dtype, peer, stream);
        Err(lacks(self.info(), OpKind::Recv))
    }

    /// Carries out several transfers at once, so that no order among them can deadlock.
    unsafe fn group(&self, ops: &[P2pOp], stream: StreamHandle) -> Result<()> {
        let _ = (ops, stream);
        Err(lacks(self.info(), OpKind::Group))
    }

    /// Work after it on any rank's stream starts after work before it on all ranks' streams has ended.
    ///
    /// # Safety
    /// `stream` is a stream of this communicator's device, and lives as long as the trait's Safety section says.
    unsafe fn barrier(&self, stream: StreamHandle) -> Result<()> {
        let _ = stream;
        Err(lacks(self.info(), OpKind::Barrier))
    }

    /// Gathers every rank's two-dimensional block; see [`Block2d`].
    unsafe fn all_gather_2d(
        &self,
        send: DeviceAddr,
        recv: DeviceAddr,
        block: &Block2d,
        stream: StreamHandle,
    ) -> Result<()> {
        let _ = (send, recv, block, stream);
        Err(lacks(self.info(), OpKind::AllGather2d))
    }

    /// All-reduce, residual, bias and RMSNorm in one operation; see [`RmsNormArgs`].
    unsafe fn all_reduce_rmsnorm(&self, args: &RmsNormArgs, stream: StreamHandle) -> Result<()> {
        let _ = (args, stream);
        Err(lacks(self.info(), OpKind::AllReduceRmsNorm))
    }

    /// The two-group form with uneven tokens; see [`TwoGroupNormArgs`]. This communicator is the reduce group,
    /// `gather` the gather group; both are of the same backend and device.
    unsafe fn all_reduce_rmsnorm_two_group(
        &self,
        gather: &dyn DeviceComm,
        args: &TwoGroupNormArgs<'_>,
        stream: StreamHandle,
    ) -> Result<()> {
        let _ = (gather, args, stream);
        Err(lacks(self.info(), OpKind::AllReduceRmsNormTwoGroup))
    }

    /// [`all_reduce_rmsnorm`](Self::all_reduce_rmsnorm) with an fp8 result; see [`NormQuantization`].
    unsafe fn all_reduce_rmsnorm_quantized(
        &self,
        args: &RmsNormArgs,
        quantized: &NormQuantization,
        stream: StreamHandle,
    ) -> Result<()> {
        let _ = (args, quantized, stream);
        Err(lacks(self.info(), OpKind::AllReduceRmsNormQuantized))
    }

    /// [`all_reduce_rmsnorm_two_group`](Self::all_reduce_rmsnorm_two_group) with an fp8 result, of which the gather
    /// group's rows are written, and their scales with it; see [`NormQuantization`]. Where the unquantised result is not
    /// kept, half the bytes are gathered.
    unsafe fn all_reduce_rmsnorm_two_group_quantized(
        &self,
        gather: &dyn DeviceComm,
        args: &TwoGroupNormArgs<'_>,
        quantized: &NormQuantization,
        stream: StreamHandle,
    ) -> Result<()> {
        let _ = (gather, args, quantized, stream);
        Err(lacks(self.info(), OpKind::AllReduceRmsNormTwoGroupQuantized))
    }

    /// The failure known so far, if any. Never blocks.
    ///
    /// What an operation received counts only if this, asked after the operation has completed, finds nothing wrong: a
    /// failure may end operations early.
    fn poll(&self) -> Result<()>;

    /// Ends every wait of this communicator, on this rank and (as soon as they notice) on the others. Never blocks; may
    /// be called from any thread, during any other call.
    fn abort(&self);

    /// Waits for enqueued work, within the communicator's timeout, and gives everything back. Later calls return
    /// [`Closed`](crate::CommError::Closed). Collective. Dropping an unclosed communicator gives back what can be
    /// given back without waiting.
    fn close(&self) -> Result<()>;
}

fn lacks(info: &CommInfo, op: OpKind) -> CommError {
    CommError::unsupported(op, info.backend.clone(), "the backend does not implement it")
}
