//! [`DeviceComm`] over host memory: each operation's arguments checked and handed to its algorithm.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, TryLockError};

use super::all_reduce::Reduction;
use super::call::Call;
use super::control::Standing;
use super::core::{Core, State, lock};
use super::gather::Gather;
use super::layout::Layout;
use super::scatter::Scatter;
use super::usage::Algorithm;
use super::wait::Waiting;
use super::{create, memory, norm, p2p, quantized};
use crate::addr::{DeviceAddr, StreamHandle};
use crate::check;
use crate::device_comm::{AlgorithmUsage, CommInfo, DeviceComm, P2pOp, Registration};
use crate::dtype::{DType, ReduceOp};
use crate::error::{CommError, Result};
use crate::fused::{Block2d, NormQuantization, RmsNormArgs, TwoGroupNormArgs};
use crate::host_comm::Deadline;
use crate::op::{OpKind, OpQuery, Support};

/// A communicator over host memory.
pub struct HostBackend {
    core: Core,
    state: Mutex<State>,
}

const NO_REGISTRATION: &str = "another process cannot reach memory that the caller allocated; take it from the communicator's allocate()";

/// Byte offsets and lengths of consecutive parts.
fn parts(counts: &[usize], dtype: DType) -> (Vec<usize>, Vec<usize>) {
    let lens: Vec<usize> = counts.iter().map(|count| count * dtype.size()).collect();
    let offsets = lens
        .iter()
        .scan(0, |end, len| {
            let start = *end;
            *end += len;
            Some(start)
        })
        .collect();
    (offsets, lens)
}

impl HostBackend {
    pub(super) fn new(core: Core) -> Self {
        let packets = vec![0; core.info.size];
        let state = State { sent: packets.clone(), received: packets, ..State::default() };
        Self { core, state: Mutex::new(state) }
    }

    /// # Safety
    /// The operands are valid and checked.
    unsafe fn gather_parts(
        &self,
        call: Call,
        send: DeviceAddr,
        recv: DeviceAddr,
        (offsets, lens): (Vec<usize>, Vec<usize>),
    ) -> Result<()> {
        let to = |rank: usize| Layout::dense(recv.0 as usize + offsets[rank]);
        let from = Layout::dense(send.0 as usize);
        let send = (send, lens[self.core.info.rank]);
        let gather = Gather { call, send, from, pitch: 0, width: 0, lens: &lens, to: &to };
        // SAFETY: as the caller vouches.
        self.core.run(&self.state, call.kind, |op| unsafe { gather.run(op) })
    }

    /// # Safety
    /// The operands are valid and checked.
    unsafe fn scatter_parts(
        &self,
        call: Call,
        send: DeviceAddr,
        recv: DeviceAddr,
        (offsets, lens): (Vec<usize>, Vec<usize>),
        combine: Option<(DType, ReduceOp)>,
    ) -> Result<()> {
        let send = (send, lens.iter().sum());
        let recv = recv.0 as usize;
        let scatter = Scatter { call, send, recv, offsets: &offsets, lens: &lens, combine };
        // SAFETY: as the caller vouches.
        self.core.run(&self.state, call.kind, |op| unsafe { scatter.run(op) })
    }

    /// # Safety
    /// The operands are valid and checked.
    unsafe fn transfers(&self, kind: OpKind, ops: &[P2pOp]) -> Result<()> {
        // SAFETY: as the caller vouches.
        self.core.run(&self.state, kind, |op| unsafe { p2p::run(op, ops) })
    }
}

// SAFETY: the algorithms touch exactly the ranges of their operands, are done when the call returns (a failed call waits
// until no peer touches them), and `supports` depends on the query and on the transport, which all ranks share.
unsafe impl DeviceComm for HostBackend {
    fn info(&self) -> &CommInfo {
        &self.core.info
    }

    fn split(&self, color: Option<u32>, key: i32) -> Result<Option<Arc<dyn DeviceComm>>> {
        self.core.run(&self.state, OpKind::Split, |op| {
            op.enter(&Call::new(OpKind::Split, 0))?;
            let host = op.core.waiter.host.clone();
            let child = op.on_host(&host, |host, deadline| host.split(color, i64::from(key), deadline))?;
            let Some(child) = child else { return Ok(None) };
            let core = op.on_host(&child.clone(), |_, deadline| {
                let settings = (op.core.timeout, op.core.checked, op.core.options.clone());
                create::connect(child, settings, op.core.direct, deadline)
            })?;
            Ok(Some(Arc::new(Self::new(core)) as Arc<dyn DeviceComm>))
        })
    }

    fn allocate(&self, bytes: usize) -> Result<DeviceAddr> {
        self.core.run(&self.state, OpKind::Allocate, |op| {
            op.enter(&Call::new(OpKind::Allocate, bytes))?;
            memory::allocate(op, bytes)
        })
    }

    unsafe fn free(&self, addr: DeviceAddr) -> Result<()> {
        self.core.run(&self.state, OpKind::Free, |op| {
            let number = op.state.allocations.number(addr).ok_or_else(|| {
                let reason = format!("{addr:?} was not allocated by this communicator or was freed already");
                CommError::invalid("addr", reason)
            })?;
            op.enter(&Call::numbered(OpKind::Free, number))?;
            op.state.allocations.remove(addr);
            Ok(())
        })
    }

    unsafe fn register(&self, addr: DeviceAddr, bytes: usize) -> Result<Registration> {
        if !self.core.direct {
            return Err(CommError::unsupported(OpKind::Register, super::NAME, NO_REGISTRATION));
        }
        check::span("addr", addr, bytes, DType::U8)?;
        self.core.run(&self.state, OpKind::Register, |op| {
            op.enter(&Call::new(OpKind::Register, bytes))?;
            Ok(op.state.allocations.register(addr, bytes))
        })
    }

    unsafe fn deregister(&self, registration: &Registration) -> Result<()> {
        self.core.run(&self.state, OpKind::Deregister, |op| {
            op.state.allocations.registered(registration)?;
            op.enter(&Call::numbered(OpKind::Deregister, registration.id))?;
            op.state.allocations.deregister(registration);
            Ok(())
        })
    }

    fn supports(&self, query: &OpQuery) -> Support {
        use OpKind as K;
        match query.kind {
            kind if kind.norms() && !matches!(query.dtype, DType::F32 | DType::F16 | DType::BF16) => {
                Support::no(format!("RMSNorm takes f32, f16 and bf16, not {}", query.dtype))
            }
            K::AllReduceQuantized if !matches!(query.dtype, DType::F32 | DType::F16 | DType::BF16) => {
                Support::no(format!("a quantised all-reduce takes f32, f16 and bf16, not {}", query.dtype))
            }
            K::Register | K::Deregister if !self.core.direct => Support::no(NO_REGISTRATION),
            K::Split | K::Allocate | K::Free | K::Register | K::Deregister | K::Poll | K::Close => {
                Support::Yes
            }
            kind if K::COLLECTIVES.contains(&kind) => Support::Yes,
            kind => Support::no(format!("{kind} is not an operation of a device communicator")),
        }
    }

    fn usage(&self) -> Vec<AlgorithmUsage> {
        self.core.usage.snapshot()
    }

    unsafe fn all_reduce(
        &self,
        send: DeviceAddr,
        recv: DeviceAddr,
        count: usize,
        dtype: DType,
        op: ReduceOp,
        _stream: StreamHandle,
    ) -> Result<()> {
        let bytes = check::same_size(send, recv, count, dtype)?;
        let call = Call::of(OpKind::AllReduce, count, dtype).reducing(op);
        let (send, recv) = ((send, bytes), (recv, bytes));
        let reduction = Reduction { call, send, recv, bytes, dtype, how: op, root: None };
        // SAFETY: the caller vouches for the operands, and they were checked.
        self.core.run(&self.state, OpKind::AllReduce, |op| unsafe { reduction.run(op) })
    }

    unsafe fn all_reduce_quantized(
        &self,
        send: DeviceAddr,
        recv: DeviceAddr,
        count: usize,
        dtype: DType,
        _stream: StreamHandle,
    ) -> Result<()> {
        check::all_reduce_quantized(send, recv, count, dtype)?;
        let kind = OpKind::AllReduceQuantized;
        // SAFETY: the caller vouches for the operands, and they were checked.
        self.core.run(&self.state, kind, |op| unsafe { quantized::sum(op, (send, recv), count, dtype) })
    }

    unsafe fn reduce(
        &self,
        send: DeviceAddr,
        recv: DeviceAddr,
        count: usize,
        dtype: DType,
        op: ReduceOp,
        root: usize,
        _stream: StreamHandle,
    ) -> Result<()> {
        let bytes = check::reduce(self.info(), send, recv, count, dtype, root)?;
        let call = Call::of(OpKind::Reduce, count, dtype).reducing(op).rooted(root);
        let received = if self.rank() == root { bytes } else { 0 };
        let (send, recv) = ((send, bytes), (recv, received));
        let reduction = Reduction { call, send, recv, bytes, dtype, how: op, root: Some(root) };
        // SAFETY: the caller vouches for the operands, and they were checked.
        self.core.run(&self.state, OpKind::Reduce, |op| unsafe { reduction.run(op) })
    }

    unsafe fn all_gather(
        &self,
        send: DeviceAddr,
        recv: DeviceAddr,
        count: usize,
        dtype: DType,
        _stream: StreamHandle,
    ) -> Result<()> {
        check::all_gather(self.info(), send, recv, count, dtype)?;
        let call = Call::of(OpKind::AllGather, count, dtype);
        let parts = parts(&vec![count; self.size()], dtype);
        // SAFETY: the caller vouches for the operands, and they were checked.
        unsafe { self.gather_parts(call, send, recv, parts) }
    }

    unsafe fn all_gather_v(
        &self,
        send: DeviceAddr,
        recv: DeviceAddr,
        counts: &[usize],
        dtype: DType,
        _stream: StreamHandle,
    ) -> Result<()> {
        let bytes = check::all_gather_v(self.info(), send, recv, counts, dtype)?;
        let plain =
            || Call::of(OpKind::AllGatherV, bytes / dtype.size(), dtype).shaped(counts.iter().copied());
        let call = norm::part().unwrap_or_else(plain);
        // SAFETY: the caller vouches for the operands, and they were checked.
        unsafe { self.gather_parts(call, send, recv, parts(counts, dtype)) }
    }

    unsafe fn broadcast(
        &self,
        send: DeviceAddr,
        recv: DeviceAddr,
        count: usize,
        dtype: DType,
        root: usize,
        _stream: StreamHandle,
    ) -> Result<()> {
        let bytes = check::broadcast(self.info(), send, recv, count, dtype, root)?;
        let call = Call::of(OpKind::Broadcast, count, dtype).rooted(root);
        let mut lens = vec![0; self.size()];
        lens[root] = bytes;
        let parts = (vec![0; self.size()], lens);
        // SAFETY: the caller vouches for the operands, and they were checked.
        unsafe { self.gather_parts(call, send, recv, parts) }
    }

    unsafe fn all_gather_2d(
        &self,
        send: DeviceAddr,
        recv: DeviceAddr,
        block: &Block2d,
        _stream: StreamHandle,
    ) -> Result<()> {
        check::all_gather_2d(self.info(), send, recv, block)?;
        let Block2d { height, width, row_pitch, rank_stride, send_pitch, dtype, .. } = *block;
        let scale = dtype.size();
        // The pitch of `send` may differ between ranks: one may be in place and another not.
        let call = Call::of(OpKind::AllGather2d, height.wrapping_mul(width), dtype).shaped([
            height,
            width,
            row_pitch,
            rank_stride,
        ]);
        // An empty block's numbers were not checked, and need not make sense.
        let len = if height == 0 { 0 } else { height * width * scale };
        let lens = vec![len; self.size()];
        let (width, pitch) = if len == 0 { (0, 0) } else { (width * scale, send_pitch * scale) };
        let to = |rank: usize| match len {
            0 => Layout::dense(0),
            _ => Layout::rows(recv.0 as usize + rank * rank_stride * scale, width, row_pitch * scale),
        };
        let from = Layout::rows(send.0 as usize, width, pitch);
        let extent = if len == 0 { 0 } else { (height - 1) * pitch + width };
        let gather = Gather { call, send: (send, extent), from, pitch, width, lens: &lens, to: &to };
        // SAFETY: the caller vouches for the operands, and they were checked.
        self.core.run(&self.state, OpKind::AllGather2d, |op| unsafe { gather.run(op) })
    }

    unsafe fn reduce_scatter(
        &self,
        send: DeviceAddr,
        recv: DeviceAddr,
        count: usize,
        dtype: DType,
        op: ReduceOp,
        _stream: StreamHandle,
    ) -> Result<()> {
        check::reduce_scatter(self.info(), send, recv, count, dtype)?;
        let call = Call::of(OpKind::ReduceScatter, count, dtype).reducing(op);
        let parts = parts(&vec![count; self.size()], dtype);
        // SAFETY: the caller vouches for the operands, and they were checked.
        unsafe { self.scatter_parts(call, send, recv, parts, Some((dtype, op))) }
    }

    unsafe fn reduce_scatter_v(
        &self,
        send: DeviceAddr,
        recv: DeviceAddr,
        counts: &[usize],
        dtype: DType,
        op: ReduceOp,
        _stream: StreamHandle,
    ) -> Result<()> {
        let bytes = check::reduce_scatter_v(self.info(), send, recv, counts, dtype)?;
        let plain = || {
            let call = Call::of(OpKind::ReduceScatterV, bytes / dtype.size(), dtype).reducing(op);
            call.shaped(counts.iter().copied())
        };
        let call = norm::part().unwrap_or_else(plain);
        // SAFETY: the caller vouches for the operands, and they were checked.
        unsafe { self.scatter_parts(call, send, recv, parts(counts, dtype), Some((dtype, op))) }
    }

    unsafe fn all_to_all(
        &self,
        send: DeviceAddr,
        recv: DeviceAddr,
        count: usize,
        dtype: DType,
        _stream: StreamHandle,
    ) -> Result<()> {
        check::all_to_all(self.info(), send, recv, count, dtype)?;
        let call = Call::of(OpKind::AllToAll, count, dtype);
        let parts = parts(&vec![count; self.size()], dtype);
        // SAFETY: the caller vouches for the operands, and they were checked.
        unsafe { self.scatter_parts(call, send, recv, parts, None) }
    }

    unsafe fn send(
        &self,
        addr: DeviceAddr,
        count: usize,
        dtype: DType,
        peer: usize,
        _stream: StreamHandle,
    ) -> Result<()> {
        check::p2p(self.info(), addr, count, dtype, peer)?;
        // SAFETY: the caller vouches for the operand, and it was checked.
        unsafe { self.transfers(OpKind::Send, &[P2pOp::Send { addr, count, dtype, peer }]) }
    }

    unsafe fn recv(
        &self,
        addr: DeviceAddr,
        count: usize,
        dtype: DType,
        peer: usize,
        _stream: StreamHandle,
    ) -> Result<()> {
        check::p2p(self.info(), addr, count, dtype, peer)?;
        // SAFETY: the caller vouches for the operand, and it was checked.
        unsafe { self.transfers(OpKind::Recv, &[P2pOp::Recv { addr, count, dtype, peer }]) }
    }

    unsafe fn group(&self, ops: &[P2pOp], _stream: StreamHandle) -> Result<()> {
        check::group(self.info(), ops)?;
        // SAFETY: the caller vouches for the operands, and they were checked.
        unsafe { self.transfers(OpKind::Group, ops) }
    }

    unsafe fn barrier(&self, _stream: StreamHandle) -> Result<()> {
        let call = norm::part().unwrap_or_else(|| Call::new(OpKind::Barrier, 0));
        self.core.run(&self.state, call.kind, |op| {
            op.count(Algorithm::Flags);
            op.enter(&call)
        })
    }

    unsafe fn all_reduce_rmsnorm(&self, args: &RmsNormArgs, _stream: StreamHandle) -> Result<()> {
        let count = check::rmsnorm(args)?;
        // SAFETY: the caller vouches for the operands, and they were checked.
        self.core
            .run(&self.state, OpKind::AllReduceRmsNorm, |op| unsafe { norm::fused(op, args, None, count) })
    }

    unsafe fn all_reduce_rmsnorm_two_group(
        &self,
        gather: &dyn DeviceComm,
        args: &TwoGroupNormArgs<'_>,
        stream: StreamHandle,
    ) -> Result<()> {
        check::two_group_norm(self.info(), gather.info(), args)?;
        self.core.usage.count(OpKind::AllReduceRmsNormTwoGroup, Algorithm::Composed);
        // SAFETY: the caller vouches for the operands, and they were checked.
        unsafe { norm::two_group(self, self.core.checked, gather, args, None, stream) }
    }

    unsafe fn all_reduce_rmsnorm_quantized(
        &self,
        args: &RmsNormArgs,
        quantized: &NormQuantization,
        _stream: StreamHandle,
    ) -> Result<()> {
        const KIND: OpKind = OpKind::AllReduceRmsNormQuantized;
        let count = check::rmsnorm_quantized(args, quantized)?;
        // SAFETY: the caller vouches for the operands, and they were checked.
        self.core.run(&self.state, KIND, |op| unsafe { norm::fused(op, args, Some(quantized), count) })
    }

    unsafe fn all_reduce_rmsnorm_two_group_quantized(
        &self,
        gather: &dyn DeviceComm,
        args: &TwoGroupNormArgs<'_>,
        quantized: &NormQuantization,
        stream: StreamHandle,
    ) -> Result<()> {
        check::two_group_norm_quantized(self.info(), gather.info(), args, quantized)?;
        self.core.usage.count(OpKind::AllReduceRmsNormTwoGroupQuantized, Algorithm::Composed);
        // SAFETY: the caller vouches for the operands, and they were checked.
        unsafe { norm::two_group(self, self.core.checked, gather, args, Some(quantized), stream) }
    }

    fn poll(&self) -> Result<()> {
        self.core.usable()?;
        let waiting = Waiting {
            comm: &self.core.info.name,
            op: OpKind::Poll,
            seq: match self.state.try_lock() {
                Ok(state) => state.seq,
                Err(TryLockError::Poisoned(state)) => state.into_inner().seq,
                // A call is under way on another thread; its number is not worth waiting for.
                Err(TryLockError::WouldBlock) => 0,
            },
            deadline: Deadline::after(self.core.timeout),
        };
        self.core.waiter.check(&waiting).inspect_err(|error| self.core.noticed(error))
    }

    fn abort(&self) {
        self.core.abort();
    }

    fn close(&self) -> Result<()> {
        if let Some(cause) = self.core.failure() {
            lock(&self.state).allocations.clear();
            return Err(cause);
        }
        let result = self.core.run(&self.state, OpKind::Close, |op| {
            op.enter(&Call::new(OpKind::Close, 0))?;
            op.core.closed.store(true, Ordering::Release);
            op.core.declare(Standing::Departed, None);
            Ok(())
        });
        // A refused close leaves the communicator as it was.
        if result.as_ref().err().is_none_or(CommError::is_fatal) {
            lock(&self.state).allocations.clear();
        }
        result
    }
}

impl Drop for HostBackend {
    fn drop(&mut self) {
        self.core.leave();
    }
}
