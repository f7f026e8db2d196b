//! A process per GPU, summing over NCCL.
//!
//! Started plainly it starts itself once per GPU; started by torchrun it is one of torchrun's ranks:
//!
//! ```text
//! cargo run -p comm-nccl --example process_per_gpu
//! torchrun --nproc-per-node 8 --no-python target/debug/examples/process_per_gpu
//! ```

use std::error::Error;
use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::time::Duration;

use comm_core::{
    BackendFactory, CreateContext, DType, DeviceComm, DeviceMemory, HostComm, HostCommExt, ReduceOp,
    Rendezvous, Token, local_rank_from_env,
};
use comm_kernels::{CudaMemory, driver};
use comm_nccl::NcclFactory;

fn main() -> Result<ExitCode, Box<dyn Error>> {
    if std::env::var_os("RANK").is_some() {
        run_rank()?;
        return Ok(ExitCode::SUCCESS);
    }
    let gpus = driver::device_count()?;
    let (program, token) = (std::env::current_exe()?, Token::random()?.to_hex());
    // A socket in a directory that only this user can enter.
    let meeting = std::env::temp_dir().join(format!("process-per-gpu-{}", std::process::id()));
    DirBuilder::new().mode(0o700).create(&meeting)?;
    let mut ranks = Vec::new();
    for rank in 0..gpus {
        let child = Command::new(&program)
            .env("RANK", rank.to_string())
            .env("LOCAL_RANK", rank.to_string())
            .env("WORLD_SIZE", gpus.to_string())
            .env("COMM_RENDEZVOUS", format!("unix:{}/rendezvous", meeting.display()))
            .env("COMM_TOKEN", &token)
            .spawn()?;
        ranks.push(child);
    }
    let mut code = ExitCode::SUCCESS;
    for mut rank in ranks {
        if !rank.wait()?.success() {
            code = ExitCode::FAILURE;
        }
    }
    std::fs::remove_dir_all(&meeting)?;
    Ok(code)
}

fn run_rank() -> Result<(), Box<dyn Error>> {
    // The ranks meet on the host side...
    let host: Arc<dyn HostComm> = Arc::new(Rendezvous::from_env()?.connect()?);
    let (rank, size) = (host.rank(), host.size());
    let memory = CudaMemory::new(local_rank_from_env()?)?;
    let context = CreateContext {
        host: host.clone(),
        memory: memory.kind(),
        timeout: Duration::from_secs(60),
        checked: false,
        options: std::collections::BTreeMap::new(),
    };
    // ...exchange what they can do, and make the communicator.
    let factory = NcclFactory::new();
    let capabilities = host.all_gather(&factory.probe(&context)?)?;
    let comm: Arc<dyn DeviceComm> = factory.create(&context, &capabilities)?;

    let count = 1 << 20;
    let buffer = memory.allocate(count * 4)?;
    let values: Vec<u8> = std::iter::repeat_n(((rank + 1) as f32).to_le_bytes(), count).flatten().collect();
    let mut sums = vec![0; values.len()];
    // SAFETY: the buffer holds `count` elements, and the download waits for the sum before the buffer is freed.
    unsafe {
        memory.upload(buffer, &values)?;
        comm.all_reduce(buffer, buffer, count, DType::F32, ReduceOp::Sum, memory.stream())?;
        memory.download(&mut sums, buffer)?;
        memory.free(buffer)?;
    }
    let expected = (size * (size + 1) / 2) as f32;
    let wrong = sums.chunks(4).filter(|bytes| *bytes != expected.to_le_bytes()).count();
    println!("rank {rank} of {size}: the sum is {expected}, {wrong} elements wrong");
    comm.close()?;
    if wrong == 0 { Ok(()) } else { Err(format!("{wrong} elements wrong").into()) }
}
