//! The tiered communicator's operations: pick the tier, pass the call on.

use std::sync::Arc;

use super::agreement::is_abort;
use super::{SkippedTier, TieredComm};
use crate::addr::{DeviceAddr, StreamHandle};
use crate::device_comm::{AlgorithmUsage, CommInfo, DeviceComm, P2pOp, Registration};
use crate::dtype::{DType, ReduceOp};
use crate::error::{CommError, Result};
use crate::fused::{Block2d, NormQuantization, RmsNormArgs, TwoGroupNormArgs};
use crate::op::{OpKind, OpQuery, Support};

fn largest(counts: &[usize]) -> usize {
    counts.iter().copied().max().unwrap_or(0)
}

impl TieredComm {
    /// The first tier that carries out a two-group norm of this kind and has a backend in common with `gather`, and that
    /// one's part of it.
    fn partners<'a>(
        &'a self,
        kind: OpKind,
        gather: &'a dyn DeviceComm,
        args: &TwoGroupNormArgs<'_>,
    ) -> Result<(&'a dyn DeviceComm, &'a dyn DeviceComm)> {
        let query = OpQuery::new(kind, args.dtype, args.hidden);
        self.tier(&query)?;
        for tier in self.tiers.iter().filter(|tier| tier.supports(&query).is_supported()) {
            let same_backend = |other: &&dyn DeviceComm| other.info().backend == tier.info().backend;
            let partner = if gather.tiers().is_empty() {
                Some(gather).filter(same_backend)
            } else {
                gather.tiers().iter().map(|other| &**other).find(same_backend)
            };
            if let Some(partner) = partner {
                return Ok((&**tier, partner));
            }
        }
        Err(CommError::invalid(
            "gather",
            "has no backend in common with the reduce group's that supports this",
        ))
    }
}

// SAFETY: every operation is a tier's own, with the caller's arguments unchanged; `supports` combines answers that are
// equal on all ranks by a rule that depends on nothing else.
unsafe impl DeviceComm for TieredComm {
    fn info(&self) -> &CommInfo {
        &self.info
    }

    fn tiers(&self) -> &[Arc<dyn DeviceComm>] {
        &self.tiers
    }

    fn split(&self, color: Option<u32>, key: i32) -> Result<Option<Arc<dyn DeviceComm>>> {
        self.usable()?;
        let query = OpQuery::new(OpKind::Split, DType::U8, 0);
        self.tier(&query)?;
        let agreement = self.ending(self.memory.agreement().split(color, key))?;
        let mut children = Vec::with_capacity(self.tiers.len());
        let mut skipped = self.skipped.clone();
        let mut refusal = None;
        for tier in self.tiers.iter().filter(|tier| tier.supports(&query).is_supported()) {
            // A group that cannot be made is not always the end of what it would have been split from.
            match self.perhaps_ending(&**tier, tier.split(color, key)) {
                Ok(child) => children.extend(child),
                // Some groups may be beyond a backend, all of whose ranks say so: the others are left.
                Err(error @ CommError::Unsupported { .. }) => {
                    let backend = tier.info().backend.to_string();
                    skipped.push(SkippedTier { backend, reason: error.clone() });
                    refusal = Some(error);
                }
                Err(error) => return Err(error),
            }
        }
        let Some(agreement) = agreement else { return Ok(None) };
        if let Some(error) = refusal.filter(|_| children.is_empty()) {
            return Err(error);
        }
        Ok(Some(Arc::new(Self::over(agreement, children, skipped)?)))
    }

    fn allocate(&self, bytes: usize) -> Result<DeviceAddr> {
        let refusal =
            |()| self.tier(&OpQuery::new(OpKind::Allocate, DType::U8, bytes)).map(|_| DeviceAddr::NULL);
        self.usable()?;
        self.ending(self.memory.allocate(&self.tiers, bytes))?.map_or_else(|| refusal(()), Ok)
    }

    unsafe fn free(&self, addr: DeviceAddr) -> Result<()> {
        self.usable()?;
        // SAFETY: the caller's promise is the callee's.
        self.ending(unsafe { self.memory.free(&self.tiers, addr) })
    }

    unsafe fn register(&self, addr: DeviceAddr, bytes: usize) -> Result<Registration> {
        self.usable()?;
        // SAFETY: the caller's promise is the callee's.
        let registration = self.ending(unsafe { self.memory.register(&self.tiers, addr, bytes) })?;
        registration.ok_or_else(|| {
            CommError::unsupported(OpKind::Register, self.info.backend.clone(), "no tier registers memory")
        })
    }

    unsafe fn deregister(&self, registration: &Registration) -> Result<()> {
        self.usable()?;
        // SAFETY: the caller's promise is the callee's.
        self.ending(unsafe { self.memory.deregister(&self.tiers, registration) })
    }

    fn register_captured(&self) -> Result<()> {
        self.usable()?;
        // All are asked, whatever one says: the other ranks' tiers wait for this one's.
        self.ending(self.tiers.iter().map(|tier| tier.register_captured()).fold(Ok(()), Result::and))
    }

    fn supports(&self, query: &OpQuery) -> Support {
        match self.tier(query) {
            Ok(_) => Support::Yes,
            Err(CommError::Unsupported { reason, .. }) => Support::No { reason },
            Err(error) => Support::no(error.to_string()),
        }
    }

    fn usage(&self) -> Vec<AlgorithmUsage> {
        let of_tier = |tier: &Arc<dyn DeviceComm>| {
            let backend = tier.info().backend.to_string();
            let named = move |usage: AlgorithmUsage| AlgorithmUsage {
                algorithm: format!("{backend}:{}", usage.algorithm).into(),
                ..usage
            };
            tier.usage().into_iter().map(named)
        };
        self.tiers.iter().flat_map(of_tier).collect()
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
        let query = OpQuery::new(OpKind::AllReduce, dtype, count).with_reduce(op);
        // SAFETY: the caller's promise is the callee's.
        self.carry(&query, |tier| unsafe { tier.all_reduce(send, recv, count, dtype, op, stream) })
    }

    unsafe fn all_reduce_quantized(
        &self,
        send: DeviceAddr,
        recv: DeviceAddr,
        count: usize,
        dtype: DType,
        stream: StreamHandle,
    ) -> Result<()> {
        let query = OpQuery::new(OpKind::AllReduceQuantized, dtype, count);
        // SAFETY: the caller's promise is the callee's.
        self.carry(&query, |tier| unsafe { tier.all_reduce_quantized(send, recv, count, dtype, stream) })
    }

    unsafe fn all_gather(
        &self,
        send: DeviceAddr,
        recv: DeviceAddr,
        count: usize,
        dtype: DType,
        stream: StreamHandle,
    ) -> Result<()> {
        let query = OpQuery::new(OpKind::AllGather, dtype, count);
        // SAFETY: the caller's promise is the callee's.
        self.carry(&query, |tier| unsafe { tier.all_gather(send, recv, count, dtype, stream) })
    }

    unsafe fn all_gather_v(
        &self,
        send: DeviceAddr,
        recv: DeviceAddr,
        counts: &[usize],
        dtype: DType,
        stream: StreamHandle,
    ) -> Result<()> {
        let query = OpQuery::new(OpKind::AllGatherV, dtype, largest(counts));
        // SAFETY: the caller's promise is the callee's.
        self.carry(&query, |tier| unsafe { tier.all_gather_v(send, recv, counts, dtype, stream) })
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
        let query = OpQuery::new(OpKind::ReduceScatter, dtype, count).with_reduce(op);
        // SAFETY: the caller's promise is the callee's.
        self.carry(&query, |tier| unsafe { tier.reduce_scatter(send, recv, count, dtype, op, stream) })
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
        let query = OpQuery::new(OpKind::ReduceScatterV, dtype, largest(counts)).with_reduce(op);
        // SAFETY: the caller's promise is the callee's.
        self.carry(&query, |tier| unsafe { tier.reduce_scatter_v(send, recv, counts, dtype, op, stream) })
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
        let query = OpQuery::new(OpKind::Broadcast, dtype, count);
        // SAFETY: the caller's promise is the callee's.
        self.carry(&query, |tier| unsafe { tier.broadcast(send, recv, count, dtype, root, stream) })
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
        let query = OpQuery::new(OpKind::Reduce, dtype, count).with_reduce(op);
        // SAFETY: the caller's promise is the callee's.
        self.carry(&query, |tier| unsafe { tier.reduce(send, recv, count, dtype, op, root, stream) })
    }

    unsafe fn all_to_all(
        &self,
        send: DeviceAddr,
        recv: DeviceAddr,
        count: usize,
        dtype: DType,
        stream: StreamHandle,
    ) -> Result<()> {
        let query = OpQuery::new(OpKind::AllToAll, dtype, count);
        // SAFETY: the caller's promise is the callee's.
        self.carry(&query, |tier| unsafe { tier.all_to_all(send, recv, count, dtype, stream) })
    }

    unsafe fn send(
        &self,
        addr: DeviceAddr,
        count: usize,
        dtype: DType,
        peer: usize,
        stream: StreamHandle,
    ) -> Result<()> {
        let query = OpQuery::new(OpKind::Send, dtype, count);
        // SAFETY: the caller's promise is the callee's.
        self.carry(&query, |tier| unsafe { tier.send(addr, count, dtype, peer, stream) })
    }

    unsafe fn recv(
        &self,
        addr: DeviceAddr,
        count: usize,
        dtype: DType,
        peer: usize,
        stream: StreamHandle,
    ) -> Result<()> {
        let query = OpQuery::new(OpKind::Recv, dtype, count);
        // SAFETY: the caller's promise is the callee's.
        self.carry(&query, |tier| unsafe { tier.recv(addr, count, dtype, peer, stream) })
    }

    unsafe fn group(&self, ops: &[P2pOp], stream: StreamHandle) -> Result<()> {
        // The ranks' transfers differ, so the choice must not look at them.
        let query = OpQuery::new(OpKind::Group, DType::U8, 1);
        // SAFETY: the caller's promise is the callee's.
        self.carry(&query, |tier| unsafe { tier.group(ops, stream) })
    }

    unsafe fn barrier(&self, stream: StreamHandle) -> Result<()> {
        let query = OpQuery::new(OpKind::Barrier, DType::U8, 0);
        // SAFETY: the caller's promise is the callee's.
        self.carry(&query, |tier| unsafe { tier.barrier(stream) })
    }

    unsafe fn all_gather_2d(
        &self,
        send: DeviceAddr,
        recv: DeviceAddr,
        block: &Block2d,
        stream: StreamHandle,
    ) -> Result<()> {
        let count = block.height.saturating_mul(block.width);
        let query = OpQuery::new(OpKind::AllGather2d, block.dtype, count);
        // SAFETY: the caller's promise is the callee's.
        self.carry(&query, |tier| unsafe { tier.all_gather_2d(send, recv, block, stream) })
    }

    unsafe fn all_reduce_rmsnorm(&self, args: &RmsNormArgs, stream: StreamHandle) -> Result<()> {
        let count = args.tokens.saturating_mul(args.hidden);
        let query = OpQuery::new(OpKind::AllReduceRmsNorm, args.dtype, count);
        // SAFETY: the caller's promise is the callee's.
        self.carry(&query, |tier| unsafe { tier.all_reduce_rmsnorm(args, stream) })
    }

    unsafe fn all_reduce_rmsnorm_two_group(
        &self,
        gather: &dyn DeviceComm,
        args: &TwoGroupNormArgs<'_>,
        stream: StreamHandle,
    ) -> Result<()> {
        self.usable()?;
        let (tier, partner) = self.partners(OpKind::AllReduceRmsNormTwoGroup, gather, args)?;
        // SAFETY: the caller's promise is the callee's.
        self.perhaps_ending(tier, unsafe { tier.all_reduce_rmsnorm_two_group(partner, args, stream) })
    }

    unsafe fn all_reduce_rmsnorm_quantized(
        &self,
        args: &RmsNormArgs,
        quantized: &NormQuantization,
        stream: StreamHandle,
    ) -> Result<()> {
        let count = args.tokens.saturating_mul(args.hidden);
        let query = OpQuery::new(OpKind::AllReduceRmsNormQuantized, args.dtype, count);
        // SAFETY: the caller's promise is the callee's.
        self.carry(&query, |tier| unsafe { tier.all_reduce_rmsnorm_quantized(args, quantized, stream) })
    }

    unsafe fn all_reduce_rmsnorm_two_group_quantized(
        &self,
        gather: &dyn DeviceComm,
        args: &TwoGroupNormArgs<'_>,
        quantized: &NormQuantization,
        stream: StreamHandle,
    ) -> Result<()> {
        self.usable()?;
        let (tier, partner) = self.partners(OpKind::AllReduceRmsNormTwoGroupQuantized, gather, args)?;
        // SAFETY: the caller's promise is the callee's.
        self.perhaps_ending(tier, unsafe {
            tier.all_reduce_rmsnorm_two_group_quantized(partner, args, quantized, stream)
        })
    }

    fn poll(&self) -> Result<()> {
        self.usable()?;
        // That another rank has aborted says less than what a tier of this rank has seen for itself.
        let found = self.tiers.iter().filter_map(|tier| tier.poll().err()).min_by_key(is_abort);
        self.ending(found.map_or(Ok(()), Err))
    }

    fn abort(&self) {
        self.tiers.iter().for_each(|tier| tier.abort());
        self.memory.agreement().abort();
    }

    fn close(&self) -> Result<()> {
        let ended = self.ended.get().cloned();
        if let Some(closed @ CommError::Closed { .. }) = ended {
            return Err(closed);
        }
        // All tiers are closed, whatever becomes of the first.
        let outcome = self.tiers.iter().map(|tier| tier.close()).fold(Ok(()), Result::and);
        let outcome = ended.map_or(outcome, Err);
        // A refused close leaves the communicator as it was.
        let end = outcome.as_ref().err().cloned();
        let end = end.unwrap_or_else(|| CommError::Closed { comm: self.info.name.clone() });
        if end.is_fatal() {
            // Unless it has ended before. The tiers have ended all the same, so there is nothing to abort.
            let _ = self.ended.set(end);
        }
        outcome
    }
}
