//! The backend itself.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use comm_core::{
    AlgorithmUsage, Block2d, CommError, CommInfo, DType, Deadline, DeviceAddr, DeviceComm, DeviceMemory,
    HostComm, HostMemory, MemoryKind, NormQuantScale, NormQuantization, OpKind, OpQuery, P2pOp, ReduceOp,
    Registration, Result, RmsNormArgs, StreamHandle, Support, TwoGroupNormArgs, check, quantize,
};

use super::arithmetic::{norm_row, reduce};

pub(crate) struct GatherBackend {
    info: CommInfo,
    host: Arc<dyn HostComm>,
    timeout: Duration,
    usage: Mutex<HashMap<OpKind, u64>>,
    memory: HostMemory,
    next_registration: AtomicU64,
    registrations: Mutex<HashSet<Registration>>,
    closed: AtomicBool,
    /// Messages to this rank that no receive has asked for yet, by sender.
    inbox: Mutex<HashMap<usize, VecDeque<Vec<u8>>>>,
    late_failure: Mutex<Option<CommError>>,
}

/// # Safety
/// The range is readable.
unsafe fn read(addr: DeviceAddr, bytes: usize) -> Vec<u8> {
    if bytes == 0 {
        return Vec::new();
    }
    // SAFETY: the caller vouches for the range.
    unsafe { std::slice::from_raw_parts(addr.0 as *const u8, bytes) }.to_vec()
}

/// # Safety
/// The range is writable.
unsafe fn write(addr: DeviceAddr, bytes: &[u8]) {
    if bytes.is_empty() {
        return;
    }
    // SAFETY: the caller vouches for the range.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), addr.0 as *mut u8, bytes.len()) };
}

/// # Safety
/// The rows are readable; the fp8 result is writable, and its scale readable or writable.
unsafe fn quantize_rows(
    rows: DeviceAddr,
    tokens: usize,
    hidden: usize,
    dtype: DType,
    quantized: &NormQuantization,
) {
    // SAFETY: the caller's promise, for all reads and writes here.
    unsafe {
        let values = super::arithmetic::widen(dtype, &read(rows, tokens * hidden * dtype.size()));
        for (token, row) in values.chunks(hidden).enumerate() {
            let to = quantized.from_row(token, hidden);
            let inverse = match to.scale {
                NormQuantScale::PerTensor(addr) => 1.0 / *(addr.0 as *const f32),
                NormQuantScale::PerToken(addr) => {
                    let (scale, inverse) = quantize::scale(quantize::amax(row));
                    write(addr, &scale.to_ne_bytes());
                    inverse
                }
            };
            let bytes: Vec<u8> = row.iter().map(|x| quantize::to_e4m3(x * inverse).to_bits()).collect();
            write(to.output, &bytes);
        }
    }
}

impl GatherBackend {
    pub(crate) fn new(name: &'static str, host: Arc<dyn HostComm>, timeout: Duration) -> Self {
        let info = CommInfo {
            name: host.name().into(),
            backend: name.into(),
            rank: host.rank(),
            size: host.size(),
            memory: MemoryKind::Host,
        };
        Self {
            info,
            host,
            timeout,
            usage: Mutex::default(),
            memory: HostMemory::new(),
            next_registration: AtomicU64::new(1),
            registrations: Mutex::default(),
            closed: AtomicBool::new(false),
            inbox: Mutex::default(),
            late_failure: Mutex::default(),
        }
    }

    /// The same for memory that only calls itself something else than the host's.
    pub(crate) fn calling_its_memory(mut self, memory: MemoryKind) -> Self {
        self.info.memory = memory;
        self
    }

    /// From now on only its poll knows of this: its calls end as if nothing had happened, as those of a device do.
    pub(crate) fn fail_late(&self, failure: CommError) {
        *self.late_failure.lock().unwrap() = Some(failure);
    }

    fn open(&self) -> Result<()> {
        if self.closed.load(Ordering::SeqCst) {
            return Err(CommError::Closed { comm: self.info.name.clone() });
        }
        Ok(())
    }

    fn gather(&self, kind: OpKind, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        let all = self.host.all_gather_bytes(bytes, Deadline::after(self.timeout))?;
        *self.usage.lock().unwrap().entry(kind).or_default() += 1;
        Ok(all)
    }

    /// An operation that was made of another counts as what it is.
    fn rename(&self, from: OpKind, to: OpKind) {
        let mut usage = self.usage.lock().unwrap();
        *usage.entry(from).or_default() -= 1;
        *usage.entry(to).or_default() += 1;
    }

    fn reduced(&self, kind: OpKind, bytes: &[u8], dtype: DType, op: ReduceOp) -> Result<Vec<u8>> {
        let all = self.gather(kind, bytes)?;
        Ok(reduce(dtype, op, &all.iter().map(Vec::as_slice).collect::<Vec<_>>()))
    }
}

// SAFETY: every operation reads and writes what its method names, through the checks of `check`.
unsafe impl DeviceComm for GatherBackend {
    fn info(&self) -> &CommInfo {
        &self.info
    }

    fn split(&self, color: Option<u32>, key: i32) -> Result<Option<Arc<dyn DeviceComm>>> {
        self.open()?;
        let host = self.host.split(color, i64::from(key), Deadline::after(self.timeout))?;
        let group = |host| Self::new("gather", host, self.timeout).calling_its_memory(self.info.memory);
        Ok(host.map(|host| Arc::new(group(host)) as Arc<dyn DeviceComm>))
    }

    fn allocate(&self, bytes: usize) -> Result<DeviceAddr> {
        self.open()?;
        // All ranks have the same memory, so all fail alike; and the communicator is none the worse for it.
        self.memory.allocate(bytes).map_err(|error| CommError::invalid("bytes", error.to_string()))
    }

    unsafe fn free(&self, addr: DeviceAddr) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.memory.free(addr) }
    }

    unsafe fn register(&self, addr: DeviceAddr, bytes: usize) -> Result<Registration> {
        self.open()?;
        check::span("addr", addr, bytes, DType::U8)?;
        let id = self.next_registration.fetch_add(1, Ordering::SeqCst);
        let registration = Registration { id, addr, bytes, generation: id };
        self.registrations.lock().unwrap().insert(registration.clone());
        Ok(registration)
    }

    unsafe fn deregister(&self, registration: &Registration) -> Result<()> {
        self.open()?;
        if self.registrations.lock().unwrap().remove(registration) {
            return Ok(());
        }
        Err(CommError::StaleHandle { handle: registration.id.to_string(), reason: "not registered".into() })
    }

    fn supports(&self, query: &OpQuery) -> Support {
        let norm = query.kind.norms();
        let plain = matches!(query.kind, OpKind::Send | OpKind::Recv);
        let quantized = query.kind == OpKind::AllReduceQuantized;
        match query.dtype {
            DType::F32 | DType::F16 | DType::BF16 if norm || quantized => Support::Yes,
            _ if norm => Support::no("norms are for f32, f16 and bf16"),
            _ if quantized => Support::no("quantised sums are for f32, f16 and bf16"),
            _ if plain => Support::no("only in groups"),
            _ => Support::Yes,
        }
    }

    fn usage(&self) -> Vec<AlgorithmUsage> {
        let usage = self.usage.lock().unwrap();
        usage.iter().map(|(&op, &calls)| AlgorithmUsage { op, algorithm: "gather".into(), calls }).collect()
    }

    unsafe fn all_reduce(
        &self,
        send: DeviceAddr,
        recv: DeviceAddr,
        count: usize,
        dtype: DType,
        op: ReduceOp,
        _: StreamHandle,
    ) -> Result<()> {
        self.open()?;
        let bytes = check::same_size(send, recv, count, dtype)?;
        // SAFETY: the caller's promise.
        let result = self.reduced(OpKind::AllReduce, &unsafe { read(send, bytes) }, dtype, op)?;
        // SAFETY: the caller's promise.
        unsafe { write(recv, &result) };
        Ok(())
    }

    unsafe fn all_reduce_quantized(
        &self,
        send: DeviceAddr,
        recv: DeviceAddr,
        count: usize,
        dtype: DType,
        _: StreamHandle,
    ) -> Result<()> {
        self.open()?;
        let bytes = check::all_reduce_quantized(send, recv, count, dtype)?;
        // SAFETY: the caller's promise.
        let all = self.gather(OpKind::AllReduceQuantized, &unsafe { read(send, bytes) })?;
        let sources: Vec<*const u8> = all.iter().map(|bytes| bytes.as_ptr()).collect();
        let mut sum = all[0].clone();
        if all.len() > 1 {
            // SAFETY: all hold `count` elements.
            unsafe { quantize::sum_host(sum.as_mut_ptr(), &sources, count, dtype) }?;
        }
        // SAFETY: the caller's promise.
        unsafe { write(recv, &sum) };
        Ok(())
    }

    unsafe fn all_gather(
        &self,
        send: DeviceAddr,
        recv: DeviceAddr,
        count: usize,
        dtype: DType,
        _: StreamHandle,
    ) -> Result<()> {
        self.open()?;
        let bytes = check::all_gather(&self.info, send, recv, count, dtype)?;
        // SAFETY: the caller's promise.
        let all = self.gather(OpKind::AllGather, &unsafe { read(send, bytes) })?;
        // SAFETY: the caller's promise.
        unsafe { write(recv, &all.concat()) };
        Ok(())
    }

    unsafe fn all_gather_v(
        &self,
        send: DeviceAddr,
        recv: DeviceAddr,
        counts: &[usize],
        dtype: DType,
        _: StreamHandle,
    ) -> Result<()> {
        self.open()?;
        check::all_gather_v(&self.info, send, recv, counts, dtype)?;
        let own = counts[self.info.rank] * dtype.size();
        // SAFETY: the caller's promise.
        let all = self.gather(OpKind::AllGatherV, &unsafe { read(send, own) })?;
        // SAFETY: the caller's promise.
        unsafe { write(recv, &all.concat()) };
        Ok(())
    }

    unsafe fn reduce_scatter(
        &self,
        send: DeviceAddr,
        recv: DeviceAddr,
        count: usize,
        dtype: DType,
        op: ReduceOp,
        _: StreamHandle,
    ) -> Result<()> {
        self.open()?;
        let part = check::reduce_scatter(&self.info, send, recv, count, dtype)?;
        // SAFETY: the caller's promise.
        let input = unsafe { read(send, part * self.info.size) };
        let result = self.reduced(OpKind::ReduceScatter, &input, dtype, op)?;
        // SAFETY: the caller's promise.
        unsafe { write(recv, &result[part * self.info.rank..part * (self.info.rank + 1)]) };
        Ok(())
    }

    unsafe fn reduce_scatter_v(
        &self,
        send: DeviceAddr,
        recv: DeviceAddr,
        counts: &[usize],
        dtype: DType,
        op: ReduceOp,
        _: StreamHandle,
    ) -> Result<()> {
        self.open()?;
        let whole = check::reduce_scatter_v(&self.info, send, recv, counts, dtype)?;
        // SAFETY: the caller's promise.
        let result = self.reduced(OpKind::ReduceScatterV, &unsafe { read(send, whole) }, dtype, op)?;
        let first = counts[..self.info.rank].iter().sum::<usize>() * dtype.size();
        // SAFETY: the caller's promise.
        unsafe { write(recv, &result[first..first + counts[self.info.rank] * dtype.size()]) };
        Ok(())
    }

    unsafe fn broadcast(
        &self,
        send: DeviceAddr,
        recv: DeviceAddr,
        count: usize,
        dtype: DType,
        root: usize,
        _: StreamHandle,
    ) -> Result<()> {
        self.open()?;
        let bytes = check::broadcast(&self.info, send, recv, count, dtype, root)?;
        let own = if self.info.rank == root { bytes } else { 0 };
        // SAFETY: the caller's promise.
        let all = self.gather(OpKind::Broadcast, &unsafe { read(send, own) })?;
        // SAFETY: the caller's promise.
        unsafe { write(recv, &all[root]) };
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
        _: StreamHandle,
    ) -> Result<()> {
        self.open()?;
        let bytes = check::reduce(&self.info, send, recv, count, dtype, root)?;
        // SAFETY: the caller's promise.
        let result = self.reduced(OpKind::Reduce, &unsafe { read(send, bytes) }, dtype, op)?;
        if self.info.rank == root {
            // SAFETY: the caller's promise.
            unsafe { write(recv, &result) };
        }
        Ok(())
    }

    unsafe fn all_to_all(
        &self,
        send: DeviceAddr,
        recv: DeviceAddr,
        count: usize,
        dtype: DType,
        _: StreamHandle,
    ) -> Result<()> {
        self.open()?;
        let part = check::all_to_all(&self.info, send, recv, count, dtype)?;
        // SAFETY: the caller's promise.
        let all = self.gather(OpKind::AllToAll, &unsafe { read(send, part * self.info.size) })?;
        let own = part * self.info.rank..part * (self.info.rank + 1);
        let result: Vec<u8> = all.iter().flat_map(|bytes| bytes[own.clone()].to_vec()).collect();
        // SAFETY: the caller's promise.
        unsafe { write(recv, &result) };
        Ok(())
    }

    unsafe fn group(&self, ops: &[P2pOp], _: StreamHandle) -> Result<()> {
        self.open()?;
        check::group(&self.info, ops)?;
        let sends: Vec<(usize, Vec<u8>)> = ops
            .iter()
            .filter_map(|op| match *op {
                P2pOp::Send { addr, count, dtype, peer } => {
                    // SAFETY: the caller's promise.
                    Some((peer, unsafe { read(addr, count * dtype.size()) }))
                }
                P2pOp::Recv { .. } => None,
            })
            .collect();
        let encoded = serde_free_encode(&sends);
        let all = self.gather(OpKind::Group, &encoded)?;
        let mut inbox = self.inbox.lock().unwrap();
        for (from, bytes) in all.iter().enumerate() {
            for (to, message) in serde_free_decode(bytes) {
                if to == self.info.rank {
                    inbox.entry(from).or_default().push_back(message);
                }
            }
        }
        for op in ops {
            if let P2pOp::Recv { addr, peer, .. } = *op {
                let message = inbox.get_mut(&peer).and_then(VecDeque::pop_front);
                let message = message.ok_or_else(|| CommError::invalid("ops", "no such send"))?;
                // SAFETY: the caller's promise.
                unsafe { write(addr, &message) };
            }
        }
        Ok(())
    }

    unsafe fn barrier(&self, _: StreamHandle) -> Result<()> {
        self.open()?;
        self.gather(OpKind::Barrier, &[]).map(drop)
    }

    unsafe fn all_gather_2d(
        &self,
        send: DeviceAddr,
        recv: DeviceAddr,
        block: &Block2d,
        _: StreamHandle,
    ) -> Result<()> {
        self.open()?;
        check::all_gather_2d(&self.info, send, recv, block)?;
        let size = block.dtype.size();
        let width = block.width * size;
        let row = |row: usize| send.offset((row * block.send_pitch * size) as u64);
        let mut own = Vec::new();
        for r in 0..block.height {
            // SAFETY: the caller's promise.
            own.extend(unsafe { read(row(r), width) });
        }
        let all = self.gather(OpKind::AllGather2d, &own)?;
        for (rank, bytes) in all.iter().enumerate() {
            for (r, row) in bytes.chunks(width.max(1)).enumerate() {
                let at = (rank * block.rank_stride + r * block.row_pitch) * size;
                // SAFETY: the caller's promise.
                unsafe { write(recv.offset(at as u64), row) };
            }
        }
        Ok(())
    }

    unsafe fn all_reduce_rmsnorm(&self, args: &RmsNormArgs, _: StreamHandle) -> Result<()> {
        self.open()?;
        let bytes = check::rmsnorm(args)? * args.dtype.size();
        let row = args.hidden * args.dtype.size();
        // SAFETY: the caller's promise, for all the reads and writes here.
        unsafe {
            let sum =
                self.reduced(OpKind::AllReduceRmsNorm, &read(args.input, bytes), args.dtype, ReduceOp::Sum)?;
            let residual = read(args.residual, bytes);
            let weight = read(args.weight, if bytes == 0 { 0 } else { row });
            let bias = args.bias.map(|bias| read(bias, weight.len()));
            for (t, (sum, residual)) in sum.chunks(row).zip(residual.chunks(row)).enumerate() {
                let (r, out) = norm_row(
                    args.dtype,
                    sum,
                    residual,
                    bias.as_deref(),
                    &weight,
                    args.eps,
                    args.weight_offset,
                );
                write(args.residual_out.offset((t * row) as u64), &r);
                write(args.output.offset((t * row) as u64), &out);
            }
        }
        Ok(())
    }

    unsafe fn all_reduce_rmsnorm_two_group(
        &self,
        gather: &dyn DeviceComm,
        args: &TwoGroupNormArgs<'_>,
        stream: StreamHandle,
    ) -> Result<()> {
        self.open()?;
        let own_row = check::two_group_norm(&self.info, gather.info(), args)?;
        let size = args.dtype.size();
        let row = args.hidden * size;
        let at = |r: usize| args.hidden_states.offset((r * row) as u64);
        let elements = |tokens: &[usize]| tokens.iter().map(|t| t * args.hidden).collect::<Vec<_>>();
        let own = args.reduce_tokens[self.info.rank];
        // SAFETY: the caller's promise, for all the reads and writes here.
        unsafe {
            let total = args.reduce_tokens.iter().sum::<usize>() * row;
            let kind = OpKind::AllReduceRmsNormTwoGroup;
            let sum =
                self.reduced(kind, &read(at(args.reduce_first_row), total), args.dtype, ReduceOp::Sum)?;
            let residual = read(args.residual, own * row);
            let vector = if own == 0 { 0 } else { row };
            let weight = read(args.weight, vector);
            let bias = args.bias.map(|bias| read(bias, vector));
            for t in 0..own {
                let part = (own_row - args.reduce_first_row + t) * row;
                let (r, out) = norm_row(
                    args.dtype,
                    &sum[part..part + row],
                    &residual[t * row..(t + 1) * row],
                    bias.as_deref(),
                    &weight,
                    args.eps,
                    args.weight_offset,
                );
                write(args.residual.offset((t * row) as u64), &r);
                write(at(own_row + t), &out);
            }
            let counts = elements(args.gather_tokens);
            gather.all_gather_v(at(own_row), at(args.gather_first_row), &counts, args.dtype, stream)
        }
    }

    unsafe fn all_reduce_rmsnorm_quantized(
        &self,
        args: &RmsNormArgs,
        quantized: &NormQuantization,
        stream: StreamHandle,
    ) -> Result<()> {
        self.open()?;
        let count = check::rmsnorm_quantized(args, quantized)?;
        // SAFETY: the caller's promise.
        unsafe { self.all_reduce_rmsnorm(args, stream) }?;
        self.rename(OpKind::AllReduceRmsNorm, OpKind::AllReduceRmsNormQuantized);
        if count > 0 {
            // SAFETY: the caller's promise.
            unsafe { quantize_rows(args.output, args.tokens, args.hidden, args.dtype, quantized) };
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
        self.open()?;
        check::two_group_norm_quantized(&self.info, gather.info(), args, quantized)?;
        // SAFETY: the caller's promise.
        unsafe { self.all_reduce_rmsnorm_two_group(gather, args, stream) }?;
        self.rename(OpKind::AllReduceRmsNormTwoGroup, OpKind::AllReduceRmsNormTwoGroupQuantized);
        let (first, rows) = (args.gather_first_row, args.gather_tokens.iter().sum());
        let states = args.hidden_states.offset((first * args.hidden * args.dtype.size()) as u64);
        if rows > 0 {
            let part = quantized.from_row(first, args.hidden);
            // SAFETY: the caller's promise; every rank has all rows of the gather group.
            unsafe { quantize_rows(states, rows, args.hidden, args.dtype, &part) };
        }
        Ok(())
    }

    fn poll(&self) -> Result<()> {
        if let Some(failure) = &*self.late_failure.lock().unwrap() {
            return Err(failure.clone());
        }
        self.open()?;
        self.host.poll()
    }

    fn abort(&self) {
        self.host.abort();
    }

    fn close(&self) -> Result<()> {
        self.closed.store(true, Ordering::SeqCst);
        Ok(())
    }
}

fn serde_free_encode(messages: &[(usize, Vec<u8>)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (to, message) in messages {
        bytes.extend((*to as u64).to_ne_bytes());
        bytes.extend((message.len() as u64).to_ne_bytes());
        bytes.extend(message);
    }
    bytes
}

fn serde_free_decode(mut bytes: &[u8]) -> Vec<(usize, Vec<u8>)> {
    let mut messages = Vec::new();
    while !bytes.is_empty() {
        let number = |at: usize| u64::from_ne_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
        let (to, len) = (number(0), number(8));
        messages.push((to, bytes[16..16 + len].to_vec()));
        bytes = &bytes[16 + len..];
    }
    messages
}
