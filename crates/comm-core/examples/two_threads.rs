//! Two threads add up their vectors.
//!
//! ```text
//! cargo run -p comm-core --example two_threads
//! ```

use std::collections::BTreeMap;
use std::time::Duration;

use comm_core::{
    BackendFactory, CommError, CreateContext, DType, DeviceAddr, HostFactory, MemoryKind, ReduceOp,
    StreamHandle, run_threads,
};

fn main() -> Result<(), CommError> {
    let timeout = Duration::from_secs(5);
    let sums = run_threads(2, timeout, |host| -> Result<Vec<f32>, CommError> {
        let rank = host.rank() as f32;
        let context = CreateContext {
            host,
            memory: MemoryKind::Host,
            timeout,
            checked: true,
            options: BTreeMap::new(),
        };
        let own = HostFactory.probe(&context)?;
        let comm = HostFactory.create(&context, &[own.clone(), own])?;

        let send = [1.0 + rank, 10.0 * rank, -1.0];
        let mut recv = [0.0_f32; 3];
        let (from, to) = (DeviceAddr::of_slice(&send), DeviceAddr::of_slice_mut(&mut recv));
        // SAFETY: both arrays hold three f32 and outlive the call, which has completed when it returns.
        unsafe { comm.all_reduce(from, to, 3, DType::F32, ReduceOp::Sum, StreamHandle::NULL)? };
        comm.close()?;
        Ok(recv.to_vec())
    })?;
    for (rank, sum) in sums.into_iter().enumerate() {
        println!("rank {rank}: {:?}", sum?);
    }
    Ok(())
}
