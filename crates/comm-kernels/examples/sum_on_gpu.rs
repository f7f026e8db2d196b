//! Two ranks' data, made, added up and checked on one GPU.
//!
//! ```text
//! cargo xtask kernels
//! cargo run -p comm-kernels --example sum_on_gpu
//! ```

use comm_core::{CommError, DType, DeviceMemory, ReduceOp};
use comm_kernels::pattern::{Expected, Mismatches, Pattern};
use comm_kernels::{CudaMemory, Kernels};

fn main() -> Result<(), CommError> {
    let memory = CudaMemory::new(0)?;
    let kernels = Kernels::load(memory.context())?;
    let (stream, dtype, count) = (memory.stream(), DType::BF16, 1 << 20);

    // What any rank sends follows from a seed, so the right sum is known without another copy of the data.
    let data = Pattern::new(7, Some(ReduceOp::Sum), 2);
    let ranks = [memory.allocate(count * dtype.size())?, memory.allocate(count * dtype.size())?];
    let (sum, result) = (memory.allocate(count * dtype.size())?, memory.allocate(16)?);
    let mut words = [0; 16];
    // SAFETY: every buffer holds `count` elements (`result` two words), all work is on one stream, and the download
    // waits for it before the buffers are given back.
    unsafe {
        for (rank, &buffer) in ranks.iter().enumerate() {
            kernels.fill(buffer, count, dtype, &data, rank, 0, stream)?;
        }
        kernels.reduce(&ranks, sum, count, dtype, ReduceOp::Sum, stream)?;
        kernels.verify_reset(result, stream)?;
        kernels.verify(sum, count, dtype, &data, Expected::Reduced(ReduceOp::Sum), 0, 0, result, stream)?;
        memory.download(&mut words, result)?;
    }
    let [wrong, first] = [0, 8].map(|at| words[at..at + 8].iter().rfold(0, |n, &b| n << 8 | u64::from(b)));
    println!("{count} elements, {} wrong", Mismatches::from_words([wrong, first]).wrong);
    Ok(())
}
