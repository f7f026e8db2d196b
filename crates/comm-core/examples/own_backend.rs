//! A backend of your own in 100 lines that passes the conformance suite:
//! `cargo run -p comm-core --features conformance --example own_backend`
//!
//! It has all-reduce (sums of `f32`), all-gather and barrier on host memory. What it lacks is `Unsupported` by itself.

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

use comm_core::conformance::{Config, run_threads};
use comm_core::{
    AlgorithmUsage, BackendFactory, Capability, CommError, CommInfo, CreateContext, DType, Deadline,
    DeviceAddr, DeviceComm, HostMemory, MemoryKind, OpKind, OpQuery, ReduceOp, Result, StreamHandle, Support,
    check,
};

/// Every operation is one all-gather of bytes between the ranks' host sides.
struct Mine {
    info: CommInfo,
    context: CreateContext,
    usage: Mutex<Vec<AlgorithmUsage>>,
    closed: AtomicBool,
}

impl Mine {
    fn new(context: CreateContext) -> Self {
        let (host, memory) = (&context.host, MemoryKind::Host);
        let (name, rank, size) = (host.name().into(), host.rank(), host.size());
        let info = CommInfo { name, backend: "mine".into(), rank, size, memory };
        Self { info, context, usage: Mutex::default(), closed: AtomicBool::new(false) }
    }

    /// Gives every rank the bytes at every rank's address.
    unsafe fn gather(&self, op: OpKind, from: DeviceAddr, bytes: usize) -> Result<Vec<Vec<u8>>> {
        if self.closed.load(SeqCst) {
            return Err(CommError::Closed { comm: self.info.name.clone() });
        }
        let mut own = vec![0; bytes];
        // SAFETY: the caller vouches that the range can be read; the vector is as long.
        unsafe { std::ptr::copy(from.0 as *const u8, own.as_mut_ptr(), bytes) };
        let all = self.context.host.all_gather_bytes(&own, Deadline::after(self.context.timeout))?;
        let mut usage = self.usage.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        match usage.iter_mut().find(|usage| usage.op == op) {
            Some(usage) => usage.calls += 1,
            None => usage.push(AlgorithmUsage { op, algorithm: "all_gather_bytes".into(), calls: 1 }),
        }
        Ok(all)
    }
}

unsafe fn write(to: DeviceAddr, bytes: &[u8]) {
    // SAFETY: the caller vouches that the range can be written.
    unsafe { std::ptr::copy(bytes.as_ptr(), to.0 as *mut u8, bytes.len()) };
}

// SAFETY: the checks see to it that only the operands are touched, and `supports` looks at nothing but the query.
unsafe impl DeviceComm for Mine {
    fn info(&self) -> &CommInfo {
        &self.info
    }

    fn supports(&self, query: &OpQuery) -> Support {
        match query.kind {
            OpKind::AllReduce if query.dtype == DType::F32 && query.reduce == Some(ReduceOp::Sum) => {
                Support::Yes
            }
            OpKind::AllGather | OpKind::Barrier => Support::Yes,
            _ => Support::no("not written yet"),
        }
    }

    fn usage(&self) -> Vec<AlgorithmUsage> {
        self.usage.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).clone()
    }

    #[rustfmt::skip]
    unsafe fn all_reduce(&self, send: DeviceAddr, recv: DeviceAddr, count: usize, dtype: DType, op: ReduceOp, _: StreamHandle) -> Result<()> {
        if (dtype, op) != (DType::F32, ReduceOp::Sum) {
            return Err(CommError::unsupported(OpKind::AllReduce, "mine", "only sums of f32"));
        }
        let bytes = check::same_size(send, recv, count, dtype)?;
        // SAFETY: the caller vouches for both operands, which the check found to be sound.
        unsafe {
            let all = self.gather(OpKind::AllReduce, send, bytes)?;
            let number = |rank: &Vec<u8>, at: usize| f32::from_ne_bytes([rank[at], rank[at + 1], rank[at + 2], rank[at + 3]]);
            let sum = |at| all[1..].iter().fold(number(&all[0], at), |sum, rank| sum + number(rank, at));
            write(recv, &(0..count).flat_map(|i| sum(4 * i).to_ne_bytes()).collect::<Vec<u8>>());
        }
        Ok(())
    }

    #[rustfmt::skip]
    unsafe fn all_gather(&self, send: DeviceAddr, recv: DeviceAddr, count: usize, dtype: DType, _: StreamHandle) -> Result<()> {
        let bytes = check::all_gather(&self.info, send, recv, count, dtype)?;
        // SAFETY: the caller vouches for both operands, which the check found to be sound.
        unsafe { write(recv, &self.gather(OpKind::AllGather, send, bytes)?.concat()) };
        Ok(())
    }

    unsafe fn barrier(&self, _: StreamHandle) -> Result<()> {
        // SAFETY: nothing is read.
        unsafe { self.gather(OpKind::Barrier, DeviceAddr::NULL, 0) }.map(drop)
    }

    fn poll(&self) -> Result<()> {
        self.context.host.poll()
    }

    fn abort(&self) {
        self.context.host.abort();
    }

    fn close(&self) -> Result<()> {
        self.closed.store(true, SeqCst);
        Ok(())
    }
}

struct MyFactory;

impl BackendFactory for MyFactory {
    fn name(&self) -> &str {
        "mine"
    }

    fn probe(&self, _: &CreateContext) -> Result<Capability> {
        Ok(Capability { protocol: 1, ..Capability::default() })
    }

    fn create(&self, context: &CreateContext, _: &[Capability]) -> Result<Arc<dyn DeviceComm>> {
        Ok(Arc::new(Mine::new(context.clone())))
    }
}

fn main() {
    let report = run_threads(Arc::new(MyFactory), 4, |_| Box::new(HostMemory::new()), &Config::quick());
    println!("{report}");
    assert!(report.is_success());
}
