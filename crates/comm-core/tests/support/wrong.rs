//! A wrapper that makes a right backend wrong in one way.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use comm_core::{
    AlgorithmUsage, Block2d, CommError, CommInfo, DType, DeviceAddr, DeviceComm, NormQuantScale,
    NormQuantization, OpKind, OpQuery, P2pOp, ReduceOp, Registration, Result, RmsNormArgs, StreamHandle,
    Support, TwoGroupNormArgs, quantize,
};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Bug {
    None,
    DropsTailOfOddCounts,
    IgnoresMisalignment,
    WritesOnePastTheEnd,
    ReturnsDataOfThePreviousCall,
    SumsInAnotherOrderOnEachRank,
    SwapsTwoRanks,
    AveragesWithoutDividing,
    BroadcastsFromTheWrongRoot,
    ForgetsInPlaceCalls,
    LeavesTheResidual,
    IgnoresTheWeightOffset,
    ForgetsTheBiasOfTwoGroups,
    SplitsWithoutKeys,
    ClaimsWhatItLacks,
    RefusesWhatItClaims,
    FailsOnZeroElements,
    ModifiesTheInput,
    CountsTwice,
    CountsNothing,
    DoesNotWaitAtBarriers,
    ReversesMessages,
    DeregistersTwice,
    AllocatesMisaligned,
    DiesOfLackOfMemory,
    AcceptsOverlaps,
    ReducesUnsignedAsSigned,
    FillsTheGapsOfBlocks,
    DropsNans,
    StaysOpenAfterClose,
    CorruptsLargeCounts,
    AnswersSupportsByRank,
    ScattersTheWrongPart,
    PanicsOnOneRank,
    HangsOnOneRank,
    CorruptsReceives,
    ReducesToTheWrongRoot,
    KeepsItsSliceOfTheSumUnquantized,
    ScalesAllRowsAlike,
}

pub(crate) struct Wrong {
    inner: Arc<dyn DeviceComm>,
    bug: Bug,
    calls: AtomicU64,
    last: Mutex<Vec<u8>>,
}

impl Wrong {
    pub(crate) fn new(inner: Arc<dyn DeviceComm>, bug: Bug) -> Self {
        Self { inner, bug, calls: AtomicU64::new(0), last: Mutex::default() }
    }

    fn is(&self, bug: Bug) -> bool {
        self.bug == bug
    }

    fn unsupported(&self, op: OpKind) -> CommError {
        CommError::unsupported(op, "wrong", "not really")
    }
}

/// # Safety
/// The range is writable.
unsafe fn bytes<'a>(addr: DeviceAddr, len: usize) -> &'a mut [u8] {
    if len == 0 {
        return &mut [];
    }
    // SAFETY: the caller vouches for the range.
    unsafe { std::slice::from_raw_parts_mut(addr.0 as *mut u8, len) }
}

/// # Safety
/// The byte is writable.
unsafe fn spoil(addr: DeviceAddr, index: usize, mask: u8) {
    // SAFETY: the caller vouches for the byte.
    unsafe { *((addr.0 as *mut u8).add(index)) ^= mask };
}

// SAFETY: it is not, on purpose: it reads and writes within the guards that the suite puts around its operands.
unsafe impl DeviceComm for Wrong {
    fn info(&self) -> &CommInfo {
        self.inner.info()
    }

    fn split(&self, color: Option<u32>, key: i32) -> Result<Option<Arc<dyn DeviceComm>>> {
        self.inner.split(color, if self.is(Bug::SplitsWithoutKeys) { 0 } else { key })
    }

    fn allocate(&self, size: usize) -> Result<DeviceAddr> {
        let wrong = if self.is(Bug::AllocatesMisaligned) { 8 } else { 0 };
        let made = self.inner.allocate(size + 8).map_err(|error| match self.bug {
            Bug::DiesOfLackOfMemory => {
                CommError::Io { context: "allocating".into(), message: error.to_string() }
            }
            _ => error,
        });
        Ok(made?.offset(wrong))
    }

    unsafe fn free(&self, addr: DeviceAddr) -> Result<()> {
        let wrong = if self.is(Bug::AllocatesMisaligned) { 8 } else { 0 };
        // SAFETY: the caller's promise.
        unsafe { self.inner.free(DeviceAddr(addr.0 - wrong)) }
    }

    unsafe fn register(&self, addr: DeviceAddr, size: usize) -> Result<Registration> {
        // SAFETY: the caller's promise.
        unsafe { self.inner.register(addr, size) }
    }

    unsafe fn deregister(&self, registration: &Registration) -> Result<()> {
        // SAFETY: the caller's promise.
        let result = unsafe { self.inner.deregister(registration) };
        if self.is(Bug::DeregistersTwice) { Ok(()) } else { result }
    }

    fn supports(&self, query: &OpQuery) -> Support {
        match (self.bug, query.kind) {
            (Bug::RefusesWhatItClaims, OpKind::AllToAll) => Support::no("says it cannot"),
            (Bug::AnswersSupportsByRank, OpKind::Reduce) if self.rank() == 1 => Support::no("not here"),
            _ => self.inner.supports(query),
        }
    }

    fn usage(&self) -> Vec<AlgorithmUsage> {
        let mut usage = self.inner.usage();
        match self.bug {
            Bug::CountsTwice => usage.iter_mut().for_each(|usage| usage.calls *= 2),
            Bug::CountsNothing => usage.clear(),
            _ => {}
        }
        usage
    }

    unsafe fn all_reduce(
        &self,
        send: DeviceAddr,
        recv: DeviceAddr,
        mut count: usize,
        mut dtype: DType,
        mut op: ReduceOp,
        stream: StreamHandle,
    ) -> Result<()> {
        let size = dtype.size();
        match self.bug {
            Bug::DropsTailOfOddCounts if count % 2 == 1 && count > 1 => count -= 1,
            Bug::AveragesWithoutDividing if op == ReduceOp::Avg => op = ReduceOp::Sum,
            Bug::ReducesUnsignedAsSigned if dtype == DType::U32 => dtype = DType::I32,
            Bug::ForgetsInPlaceCalls if send == recv => {
                let mut scratch = vec![0_u8; count * size + 8];
                let at = DeviceAddr(scratch.as_mut_ptr() as u64);
                // SAFETY: the caller's promise; the scratch is long enough.
                return unsafe { self.inner.all_reduce(send, at, count, dtype, op, stream) };
            }
            Bug::SumsInAnotherOrderOnEachRank
                if (dtype, op) == (DType::F32, ReduceOp::Sum)
                    && (1..10_000).contains(&count)
                    && !send.is_null()
                    && !recv.is_null()
                    && recv.is_aligned_to(4) =>
            {
                let world = self.size();
                let mut all = vec![0_f32; count * world];
                let at = DeviceAddr::of_slice_mut(&mut all);
                // SAFETY: the caller's promise; `all` holds every rank's elements.
                unsafe { self.inner.all_gather(send, at, count, dtype, stream) }?;
                // SAFETY: the caller's promise.
                let recv = unsafe { bytes(recv, count * 4) };
                for (i, out) in recv.chunks_mut(4).enumerate() {
                    let sum: f32 = (0..world).map(|r| all[(r + self.rank()) % world * count + i]).sum();
                    out.copy_from_slice(&sum.to_ne_bytes());
                }
                return Ok(());
            }
            _ => {}
        }
        // SAFETY: the caller's promise.
        unsafe { self.inner.all_reduce(send, recv, count, dtype, op, stream) }?;
        if self.is(Bug::DropsNans) && matches!(op, ReduceOp::Max | ReduceOp::Min) && dtype == DType::F32 {
            // SAFETY: the caller's promise.
            for value in unsafe { bytes(recv, count * 4) }.chunks_mut(4) {
                if f32::from_ne_bytes(value.try_into().unwrap()).is_nan() {
                    value.copy_from_slice(&1_f32.to_ne_bytes());
                }
            }
        }
        if self.is(Bug::CorruptsLargeCounts) && count > 200_000 {
            // SAFETY: the caller's promise.
            unsafe { spoil(recv, count * size - size, 0x10) };
        }
        Ok(())
    }

    unsafe fn all_reduce_quantized(
        &self,
        send: DeviceAddr,
        recv: DeviceAddr,
        count: usize,
        dtype: DType,
        stream: StreamHandle,
    ) -> Result<()> {
        let world = self.size();
        let tried = dtype == DType::F32 && count > 128 * world && count < 1 << 20 && send.is_aligned_to(4);
        if !(self.is(Bug::KeepsItsSliceOfTheSumUnquantized) && tried) {
            // SAFETY: the caller's promise.
            return unsafe { self.inner.all_reduce_quantized(send, recv, count, dtype, stream) };
        }
        let mut all = vec![0_f32; count * world];
        let at = DeviceAddr::of_slice_mut(&mut all);
        // SAFETY: the caller's promise; `all` holds every rank's elements.
        unsafe { self.inner.all_gather(send, at, count, dtype, stream) }?;
        // SAFETY: as above.
        unsafe { self.inner.all_reduce_quantized(send, recv, count, dtype, stream) }?;
        let own = self.rank() * 128..(self.rank() + 1) * 128;
        let mut sum = vec![0_f32; 128];
        for part in all.chunks_mut(count) {
            let part = &mut part[own.clone()];
            quantize::through_fp8(part);
            sum.iter_mut().zip(part).for_each(|(sum, part)| *sum += *part);
        }
        // SAFETY: the caller's promise; the vector has a group for every rank.
        let recv = unsafe { bytes(recv.offset(own.start as u64 * 4), 128 * 4) };
        for (bytes, sum) in recv.chunks_mut(4).zip(sum) {
            bytes.copy_from_slice(&sum.to_ne_bytes());
        }
        Ok(())
    }

    unsafe fn all_gather(
        &self,
        send: DeviceAddr,
        recv: DeviceAddr,
        count: usize,
        dtype: DType,
        stream: StreamHandle,
    ) -> Result<()> {
        let (part, world) = (count.saturating_mul(dtype.size()), self.size());
        let call = self.calls.fetch_add(1, Ordering::SeqCst);
        if call == 20 && self.rank() == 1 {
            assert!(!self.is(Bug::PanicsOnOneRank), "on purpose");
            if self.is(Bug::HangsOnOneRank) {
                std::thread::sleep(Duration::from_secs(600));
            }
        }
        let mut to = recv;
        if self.is(Bug::IgnoresMisalignment) && send.0.abs_diff(recv.0) > 1 << 12 {
            to = DeviceAddr(recv.0 & !15);
        }
        // SAFETY: the caller's promise; at most 15 bytes of the guard before are written.
        unsafe { self.inner.all_gather(send, to, count, dtype, stream) }?;
        if part == 0 {
            return Ok(());
        }
        // SAFETY: the caller's promise.
        let all = unsafe { bytes(recv, part * world) };
        match self.bug {
            Bug::SwapsTwoRanks if world > 1 => {
                let (a, b) = all.split_at_mut(part);
                a.swap_with_slice(&mut b[..part]);
            }
            Bug::ReturnsDataOfThePreviousCall => {
                let mut last = self.last.lock().unwrap();
                let fresh = all.to_vec();
                if call % 2 == 1 && last.len() == all.len() {
                    all.copy_from_slice(&last);
                }
                *last = fresh;
            }
            _ => {}
        }
        Ok(())
    }

    unsafe fn all_gather_v(
        &self,
        send: DeviceAddr,
        recv: DeviceAddr,
        counts: &[usize],
        dtype: DType,
        stream: StreamHandle,
    ) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.inner.all_gather_v(send, recv, counts, dtype, stream) }
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
        if self.is(Bug::FailsOnZeroElements) && count == 0 {
            return Err(CommError::Backend {
                backend: "wrong".into(),
                call: "launch".into(),
                code: 1,
                message: "invalid configuration".into(),
            });
        }
        // SAFETY: the caller's promise.
        unsafe { self.inner.reduce_scatter(send, recv, count, dtype, op, stream) }
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
        // SAFETY: the caller's promise.
        let result = unsafe { self.inner.reduce_scatter_v(send, recv, counts, dtype, op, stream) };
        if self.is(Bug::AcceptsOverlaps) && matches!(result, Err(CommError::InvalidArgument { .. })) {
            return Ok(());
        }
        if self.is(Bug::ScattersTheWrongPart) && result.is_ok() && self.rank() == 1 {
            let own = counts[1] * dtype.size();
            if own > 0 && counts[0] >= counts[1] && send != recv {
                // SAFETY: the caller's promise; the first part is at least as long as this rank's.
                unsafe { std::ptr::copy(send.0 as *const u8, recv.0 as *mut u8, own) };
            }
        }
        result
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
        let world = self.size();
        // SAFETY: the caller's promise; the suite's operands are followed by guards.
        unsafe {
            if self.is(Bug::BroadcastsFromTheWrongRoot) && root < world {
                let from = if send.is_null() { recv } else { send };
                return self.inner.broadcast(from, recv, count, dtype, (root + 1) % world, stream);
            }
            self.inner.broadcast(send, recv, count, dtype, root, stream)?;
            if self.is(Bug::WritesOnePastTheEnd) && count > 0 {
                bytes(recv, count * dtype.size() + 1)[count * dtype.size()] ^= 0xff;
            }
        }
        Ok(())
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
        let world = self.size();
        if self.is(Bug::ReducesToTheWrongRoot) && root < world && count > 0 && !send.is_null() {
            let mut scratch = vec![0_u64; count];
            let at = DeviceAddr::of_slice_mut(&mut scratch);
            // SAFETY: the caller's promise; the scratch is long enough.
            return unsafe { self.inner.reduce(send, at, count, dtype, op, (root + 1) % world, stream) };
        }
        // SAFETY: the caller's promise.
        unsafe { self.inner.reduce(send, recv, count, dtype, op, root, stream) }
    }

    unsafe fn all_to_all(
        &self,
        send: DeviceAddr,
        recv: DeviceAddr,
        count: usize,
        dtype: DType,
        stream: StreamHandle,
    ) -> Result<()> {
        if self.is(Bug::ClaimsWhatItLacks) {
            return Err(self.unsupported(OpKind::AllToAll));
        }
        // SAFETY: the caller's promise.
        unsafe { self.inner.all_to_all(send, recv, count, dtype, stream) }?;
        if self.is(Bug::ModifiesTheInput) && count > 0 {
            // SAFETY: the caller's promise.
            unsafe { spoil(send, 0, 1) };
        }
        Ok(())
    }

    unsafe fn send(
        &self,
        addr: DeviceAddr,
        count: usize,
        dtype: DType,
        peer: usize,
        stream: StreamHandle,
    ) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.inner.send(addr, count, dtype, peer, stream) }
    }

    unsafe fn recv(
        &self,
        addr: DeviceAddr,
        count: usize,
        dtype: DType,
        peer: usize,
        stream: StreamHandle,
    ) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.inner.recv(addr, count, dtype, peer, stream) }?;
        if self.is(Bug::CorruptsReceives) && count > 0 {
            // SAFETY: the caller's promise.
            unsafe { spoil(addr, 0, 1) };
        }
        Ok(())
    }

    unsafe fn group(&self, ops: &[P2pOp], stream: StreamHandle) -> Result<()> {
        // The first receive from each peer takes the second message and the other way round, as far as they fit.
        let mut ops = ops.to_vec();
        if self.is(Bug::ReversesMessages) && ops.len() >= 4 {
            for chunk in ops.chunks_mut(4) {
                if let [P2pOp::Send { addr: a, count: n, .. }, _, P2pOp::Send { addr: b, .. }, _] = chunk {
                    // The longer message starts with what the shorter one ought to hold.
                    *a = b.offset(0);
                    debug_assert!(*n > 0);
                }
            }
        }
        // SAFETY: the caller's promise.
        unsafe { self.inner.group(&ops, stream) }
    }

    unsafe fn barrier(&self, stream: StreamHandle) -> Result<()> {
        if self.is(Bug::DoesNotWaitAtBarriers) {
            return Ok(());
        }
        // SAFETY: the caller's promise.
        unsafe { self.inner.barrier(stream) }
    }

    unsafe fn all_gather_2d(
        &self,
        send: DeviceAddr,
        recv: DeviceAddr,
        block: &Block2d,
        stream: StreamHandle,
    ) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.inner.all_gather_2d(send, recv, block, stream) }?;
        if self.is(Bug::FillsTheGapsOfBlocks) && block.rank_stride > block.width && block.height == 3 {
            // SAFETY: the gap after the first block's first row lies before the second rank's block.
            unsafe { spoil(recv, block.width * block.dtype.size(), 1) };
        }
        Ok(())
    }

    unsafe fn all_reduce_rmsnorm(&self, args: &RmsNormArgs, stream: StreamHandle) -> Result<()> {
        let mut args = *args;
        let mut scratch = vec![0_u32; args.tokens.saturating_mul(args.hidden).min(1 << 20)];
        match self.bug {
            Bug::LeavesTheResidual if args.tokens < 1000 => {
                args.residual_out = DeviceAddr::of_slice_mut(&mut scratch);
            }
            Bug::IgnoresTheWeightOffset => args.weight_offset = 0.0,
            _ => {}
        }
        // SAFETY: the caller's promise; the scratch is as long as the residual.
        unsafe { self.inner.all_reduce_rmsnorm(&args, stream) }
    }

    unsafe fn all_reduce_rmsnorm_two_group(
        &self,
        gather: &dyn DeviceComm,
        args: &TwoGroupNormArgs<'_>,
        stream: StreamHandle,
    ) -> Result<()> {
        let mut args = *args;
        if self.is(Bug::ForgetsTheBiasOfTwoGroups) {
            args.bias = None;
        }
        // SAFETY: the caller's promise.
        unsafe { self.inner.all_reduce_rmsnorm_two_group(gather, &args, stream) }
    }

    unsafe fn all_reduce_rmsnorm_quantized(
        &self,
        args: &RmsNormArgs,
        quantized: &NormQuantization,
        stream: StreamHandle,
    ) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.inner.all_reduce_rmsnorm_quantized(args, quantized, stream) }?;
        if let (Bug::ScalesAllRowsAlike, NormQuantScale::PerToken(scales)) = (self.bug, quantized.scale) {
            // SAFETY: the caller's promise.
            let scales = unsafe { bytes(scales, 4 * args.tokens) };
            if let Some((first, others)) = scales.split_at_mut_checked(4) {
                others.chunks_mut(4).for_each(|scale| scale.copy_from_slice(first));
            }
        }
        Ok(())
    }

    unsafe fn all_reduce_rmsnorm_two_group_quantized(
        &self,
        gather: &dyn DeviceComm,
        args: &TwoGroupNormArgs<'_>,
        quantized: &NormQuantization,
        stream: StreamHandle,
    ) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.inner.all_reduce_rmsnorm_two_group_quantized(gather, args, quantized, stream) }
    }

    fn poll(&self) -> Result<()> {
        self.inner.poll()
    }

    fn abort(&self) {
        self.inner.abort();
    }

    fn close(&self) -> Result<()> {
        if self.is(Bug::StaysOpenAfterClose) { Ok(()) } else { self.inner.close() }
    }
}
