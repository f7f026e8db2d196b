//! All GPUs of this machine, a thread each, add up their vectors over NVLink.
//!
//! ```text
//! cargo xtask kernels
//! cargo run --release -p comm-p2p --example sum_over_nvlink
//! ```

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use comm_core::{
    CommError, CreateContext, DType, DeviceMemory, HostComm, HostCommExt, HostReduceOp, ReduceOp,
    create_with, run_threads,
};
use comm_kernels::{CudaMemory, EventTimer, driver};
use comm_p2p::P2pFactory;

const TIMEOUT: Duration = Duration::from_secs(30);
/// Operations in a row, in one CUDA graph.
const CALLS: u32 = 20;

fn main() -> ExitCode {
    let ranks = || -> Result<(), CommError> {
        let gpus = driver::device_count()?.min(8);
        if gpus < 2 {
            return Err(CommError::invalid("machine", "it has one GPU, and a sum takes at least two"));
        }
        run_threads(gpus, TIMEOUT, run_rank)?.into_iter().collect()
    };
    match ranks() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run_rank(host: Arc<dyn HostComm>) -> Result<(), CommError> {
    let (rank, world) = (host.rank(), host.size());
    let memory = CudaMemory::new(rank)?;
    let stream = memory.stream();
    let comm = create_with(&P2pFactory, &CreateContext::new(host.clone(), memory.kind()))?;

    for count in [4 << 10, 256 << 10, 16 << 20] {
        // Memory of the communicator is mapped on all GPUs: large sums are stored straight into it.
        let (send, recv) = (comm.allocate(count * 4)?, comm.allocate(count * 4)?);
        let ones: Vec<u8> = std::iter::repeat_n(((rank + 1) as f32).to_le_bytes(), count).flatten().collect();
        let mut sums = vec![0; count * 4];
        // SAFETY: both buffers hold `count` elements; they are freed after the work on them has ended on all ranks.
        unsafe {
            memory.upload(send, &ones)?;
            let sum = || comm.all_reduce(send, recv, count, DType::F32, ReduceOp::Sum, stream);
            let mut graph = memory.capture(|| (0..CALLS).try_for_each(|_| sum()))?;
            let mut timer = EventTimer::new(memory.context(), TIMEOUT)?;
            // The first replay absorbs the ranks' different starts.
            graph.launch(stream)?;
            timer.start(stream)?;
            graph.launch(stream)?;
            timer.stop(stream)?;
            let own = timer.elapsed()?.as_secs_f64() * 1e6 / f64::from(CALLS);
            memory.download(&mut sums, recv)?;

            let expected = (world * (world + 1) / 2) as f32;
            let wrong = sums.chunks(4).filter(|bytes| *bytes != expected.to_le_bytes()).count() as u64;
            // All ranks have come here, so nobody uses the buffers any more.
            let slowest = host.all_reduce(&[own], HostReduceOp::Max)?[0];
            let wrong = host.all_reduce(&[wrong], HostReduceOp::Sum)?[0];
            if rank == 0 {
                println!("{world} GPUs, {:>8} bytes: {slowest:>6.1} us, {wrong} elements wrong", count * 4);
            }
            comm.free(send)?;
            comm.free(recv)?;
        }
    }
    if rank == 0 {
        for used in comm.usage() {
            println!("{} by {}: {} calls", used.op, used.algorithm, used.calls);
        }
    }
    comm.close()
}
