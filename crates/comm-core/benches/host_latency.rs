//! Latency of the host backend's all-reduce and all-gather, measured as `bench/openmpi/latency.c` measures OpenMPI's.
//!
//! ```text
//! cargo bench -p comm-core --bench host_latency -- --world 2 --transport direct
//! ```
//!
//! Ranks are threads, which read each other's memory (`direct`) or behave as processes do (`shm`); with `--processes` they
//! are processes. `allocated` is `shm` with operands from `allocate`. Prints `op bytes microseconds` lines: bytes are those
//! of the receive buffer, the time is the median over batches of the slowest rank's mean.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use comm_core::{
    BackendFactory, CommError, CreateContext, DType, DeviceAddr, DeviceComm, DeviceMemory, HostComm,
    HostCommExt, HostFactory, HostMemory, HostReduceOp, MemoryKind, ReduceOp, Rendezvous, StreamHandle,
    Token, run_threads,
};

const S: StreamHandle = StreamHandle::NULL;
const BATCHES: usize = 9;

/// Calls per batch; `latency.c` has the same rule.
fn calls(bytes: usize) -> usize {
    ((8 << 20) / bytes).clamp(2, 200)
}

fn sizes() -> impl Iterator<Item = usize> {
    (0..9).map(|power| 1024_usize << (2 * power)).filter(|&bytes| bytes <= 64 << 20)
}

struct Options {
    world: usize,
    transport: String,
    processes: bool,
}

fn options() -> Result<Options, CommError> {
    let mut options = Options { world: 2, transport: "direct".into(), processes: false };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or_else(|| CommError::invalid(arg.clone(), "needs a value"));
        match arg.as_str() {
            "--world" => {
                let text = value()?;
                options.world = text
                    .parse()
                    .map_err(|_| CommError::invalid("--world", format!("{text:?} is no number")))?;
            }
            "--transport" => options.transport = value()?,
            "--processes" => options.processes = true,
            // What `cargo bench` and `cargo test` add of their own accord.
            "--bench" | "--test" => {}
            other => return Err(CommError::invalid(other.to_owned(), "unknown option")),
        }
    }
    Ok(options)
}

fn main() -> Result<(), CommError> {
    let options = options()?;
    let timeout = Duration::from_secs(60);
    if options.processes && std::env::var_os("RANK").is_none() {
        return start(options.world);
    }
    let first = if options.processes {
        let host = Arc::new(Rendezvous::from_env()?.connect()?);
        let rank = host.rank();
        let lines = rank_main(host.clone(), &options.transport, timeout)?;
        // Rank 0's process relays the others' calls, so nobody leaves before all are through.
        host.all_gather(&0_u8)?;
        if rank == 0 { lines } else { Vec::new() }
    } else {
        let all = run_threads(options.world, timeout, |host| rank_main(host, &options.transport, timeout))?;
        let all = all.into_iter().collect::<Result<Vec<_>, _>>()?;
        all.into_iter().next().unwrap_or_default()
    };
    for (op, bytes, time) in first {
        println!("{op} {bytes} {time:.2}");
    }
    Ok(())
}

/// Starts this program again for every rank.
fn start(world: usize) -> Result<(), CommError> {
    let io = |error: std::io::Error| CommError::io("starting the ranks", &error);
    let dir = tempfile::tempdir().map_err(io)?;
    let token = Token::random()?.to_hex();
    let program = std::env::current_exe().map_err(io)?;
    let rank = |rank: usize| {
        std::process::Command::new(&program)
            .args(std::env::args_os().skip(1))
            .env("COMM_RENDEZVOUS", format!("unix:{}", dir.path().join("meet").join("s").display()))
            .env("COMM_TOKEN", &token)
            .env("COMM_TIMEOUT_SECS", "60")
            .env("RANK", rank.to_string())
            .env("WORLD_SIZE", world.to_string())
            .spawn()
    };
    let ranks: Vec<_> = (0..world).map(rank).collect();
    for (rank, child) in ranks.into_iter().enumerate() {
        let status = child.and_then(|mut child| child.wait()).map_err(io)?;
        if !status.success() {
            return Err(CommError::Io { context: format!("rank {rank}"), message: status.to_string() });
        }
    }
    Ok(())
}

type Line = (&'static str, usize, f64);

fn rank_main(host: Arc<dyn HostComm>, transport: &str, timeout: Duration) -> Result<Vec<Line>, CommError> {
    let allocated = transport == "allocated";
    let transport = if allocated { "shm" } else { transport };
    let options = BTreeMap::from([("host.transport".to_owned(), transport.to_owned())]);
    let context =
        CreateContext { host: host.clone(), memory: MemoryKind::Host, timeout, checked: false, options };
    let own = HostFactory.probe(&context)?;
    let comm = HostFactory.create(&context, &vec![own; host.size()])?;
    let memory = HostMemory::new();
    let largest = 64 << 20;
    let (send, recv) = if allocated {
        (comm.allocate(largest)?, comm.allocate(largest)?)
    } else {
        (memory.allocate(largest)?, memory.allocate(largest)?)
    };
    // SAFETY: both buffers are as large, and this rank's alone between the calls.
    let (from, to) = unsafe {
        (
            std::slice::from_raw_parts_mut(send.0 as *mut f32, largest / 4),
            std::slice::from_raw_parts(recv.0 as *const f32, largest / 4),
        )
    };
    let rank = comm.rank() as f32;
    for (index, value) in from.iter_mut().enumerate() {
        *value = rank + (index % 1000) as f32;
    }
    let mut lines = Vec::new();
    for op in ["all_reduce", "all_gather"] {
        for bytes in sizes() {
            let call = || run(&*comm, op, send, recv, bytes / 4);
            let time = measure(&*comm, &*host, bytes, call)?;
            check(op, &to[..bytes / 4], comm.size())?;
            lines.push((op, bytes, time));
        }
    }
    comm.close()?;
    Ok(lines)
}

fn run(
    comm: &dyn DeviceComm,
    op: &str,
    send: DeviceAddr,
    recv: DeviceAddr,
    count: usize,
) -> Result<(), CommError> {
    // SAFETY: both buffers hold `count` elements and are nobody else's.
    unsafe {
        match op {
            "all_reduce" => comm.all_reduce(send, recv, count, DType::F32, ReduceOp::Sum, S),
            _ => comm.all_gather(send, recv, count / comm.size(), DType::F32, S),
        }
    }
}

fn measure(
    comm: &dyn DeviceComm,
    host: &dyn HostComm,
    bytes: usize,
    call: impl Fn() -> Result<(), CommError>,
) -> Result<f64, CommError> {
    let mut times = Vec::new();
    for batch in 0..=BATCHES {
        // SAFETY: a host barrier needs no stream.
        unsafe { comm.barrier(S)? };
        let start = Instant::now();
        for _ in 0..calls(bytes) {
            call()?;
        }
        // The first batch warms up.
        if batch > 0 {
            times.push(start.elapsed().as_secs_f64() * 1e6 / calls(bytes) as f64);
        }
    }
    let mut times = host.all_reduce(&times, HostReduceOp::Max)?;
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}

fn check(op: &str, found: &[f32], size: usize) -> Result<(), CommError> {
    let part = found.len() / size;
    let ranks = (size * (size - 1) / 2) as f32;
    let right = |index: usize| match op {
        "all_reduce" => ranks + size as f32 * (index % 1000) as f32,
        _ => (index / part) as f32 + (index % part % 1000) as f32,
    };
    match found.iter().enumerate().take(part * size).find(|(index, value)| **value != right(*index)) {
        None => Ok(()),
        Some((index, value)) => Err(CommError::Io {
            context: format!("checking {op}"),
            message: format!("element {index} is {value}, not {}", right(index)),
        }),
    }
}
