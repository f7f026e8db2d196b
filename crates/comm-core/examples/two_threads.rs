//! Two threads add up their vectors.
//!
//! ```text
//! cargo run -p comm-core --example two_threads
//! ```

use std::time::Duration;

use comm_core::{
    CommError, CreateContext, HostFactory, HostSliceExt, MemoryKind, ReduceOp, create_with, run_threads,
};

fn main() -> Result<(), CommError> {
    let sums = run_threads(2, Duration::from_secs(5), |host| -> Result<[f32; 3], CommError> {
        let rank = host.rank() as f32;
        let comm = create_with(&HostFactory, &CreateContext::new(host, MemoryKind::Host))?;

        let mut vector = [1.0 + rank, 10.0 * rank, -1.0];
        comm.all_reduce_slice_in_place(&mut vector, ReduceOp::Sum)?;
        comm.close()?;
        Ok(vector)
    })?;
    for (rank, sum) in sums.into_iter().enumerate() {
        println!("rank {rank}: {:?}", sum?);
    }
    Ok(())
}
