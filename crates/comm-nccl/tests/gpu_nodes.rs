//! Several nodes on one host: processes that NCCL takes for ranks on different hosts, so that their data goes through its
//! network transport, here sockets on the loopback device.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::process::{Child, Command};
use std::sync::Arc;
use std::time::{Duration, Instant};

use comm_core::{DType, DeviceMemory, HostComm, HostCommExt, ReduceOp, Rendezvous, Token};
use common::{PATIENT, Rank, connect, world_size};

/// Set in the processes that the test starts, in which it is one of the ranks.
const IS_RANK: &str = "COMM_TEST_NODES_RANK";
/// For all processes together.
const LIMIT: Duration = Duration::from_secs(90);

/// Ends the processes however the test ends.
struct Processes(Vec<Child>);

impl Drop for Processes {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

#[test]
fn two_nodes_compute_together_over_the_network() {
    if std::env::var_os(IS_RANK).is_some() {
        one_rank();
        return;
    }
    let Some(gpus) = world_size() else { return };
    let size = gpus.min(4) / 2 * 2;
    let folder = std::env::temp_dir().join(format!("comm-nccl-nodes-{}", std::process::id()));
    DirBuilder::new().mode(0o700).create(&folder).unwrap();
    let token = Token::random().unwrap().to_hex();
    let mut processes = Processes(Vec::new());
    for rank in 0..size {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "two_nodes_compute_together_over_the_network", "--nocapture"])
            .env(IS_RANK, "1")
            .env("RANK", rank.to_string())
            .env("LOCAL_RANK", rank.to_string())
            .env("WORLD_SIZE", size.to_string())
            .env("COMM_RENDEZVOUS", format!("unix:{}/rendezvous", folder.display()))
            .env("COMM_TOKEN", &token)
            .env("NCCL_HOSTID", if rank < size / 2 { "node-a" } else { "node-b" })
            .env("NCCL_NET", "Socket")
            .env("NCCL_SOCKET_IFNAME", "lo")
            .env("NCCL_IB_DISABLE", "1")
            .env("NCCL_MNNVL_ENABLE", "0")
            .env("NCCL_NVLS_ENABLE", "0")
            .env("NCCL_DEBUG", "INFO")
            .env("NCCL_DEBUG_FILE", folder.join(format!("nccl.{rank}.log")))
            .spawn()
            .unwrap();
        processes.0.push(child);
    }
    let start = Instant::now();
    let mut left: Vec<usize> = (0..size).collect();
    while !left.is_empty() {
        left.retain(|&rank| match processes.0[rank].try_wait().unwrap() {
            Some(status) => {
                assert!(status.success(), "rank {rank} ended with {status}");
                false
            }
            None => true,
        });
        assert!(start.elapsed() < LIMIT, "ranks {left:?} are still at work after {LIMIT:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
    for rank in [0, size - 1] {
        let log = std::fs::read_to_string(folder.join(format!("nccl.{rank}.log"))).unwrap();
        assert!(log.contains("nNodes 2"), "rank {rank} saw one node:\n{log}");
        assert!(log.contains("via NET/Socket"), "rank {rank} used no network:\n{log}");
    }
    std::fs::remove_dir_all(&folder).unwrap();
}

fn one_rank() {
    let host: Arc<dyn HostComm> = Arc::new(Rendezvous::from_env().unwrap().connect().unwrap());
    let rank = connect(host, PATIENT, false).unwrap();
    rank.try_sum().unwrap();
    collectives(&rank);
    // One group across the nodes for each place in a node, and one group for each node.
    let half = rank.size / 2;
    for color in [rank.rank % half, rank.rank / half] {
        let group = rank.comm.split(Some(color as u32), rank.rank as i32).unwrap().unwrap();
        let value = rank.buffer(&[1.0_f32; 5]);
        // SAFETY: the buffer holds 5 elements and lives until it has been read, which waits.
        unsafe {
            group.all_reduce(value.addr, value.addr, 5, DType::F32, ReduceOp::Sum, rank.stream()).unwrap();
        }
        assert_eq!(value.read(), [group.size() as f32; 5]);
        group.close().unwrap();
    }
    rank.comm.close().unwrap();
    rank.host.all_gather(&0_u8).unwrap();
}

fn collectives(rank: &Rank) {
    let (size, own, stream) = (rank.size, rank.rank, rank.stream());
    let n = 100_003;
    let ramp = |scale: usize| (0..n).map(|i| (i % 1000 * scale) as f32).collect::<Vec<_>>();
    let input = rank.buffer(&ramp(own + 1));
    let sums = rank.buffer(&vec![-1.0_f32; n]);
    // SAFETY: here and below, the buffers hold what the calls name and live until they have been read, which waits.
    unsafe {
        rank.comm.all_reduce(input.addr, sums.addr, n, DType::F32, ReduceOp::Sum, stream).unwrap();
    }
    assert!(sums.read() == ramp(size * (size + 1) / 2));
    let gathered = rank.buffer(&vec![-1.0_f32; n * size]);
    // SAFETY: as above.
    unsafe { rank.comm.all_gather(input.addr, gathered.addr, n, DType::F32, stream).unwrap() };
    assert!(gathered.read() == (1..=size).flat_map(ramp).collect::<Vec<_>>());
    // What was gathered is scattered again: this rank's part, from every rank the same.
    // SAFETY: as above.
    unsafe {
        rank.comm.reduce_scatter(gathered.addr, sums.addr, n, DType::F32, ReduceOp::Sum, stream).unwrap();
    }
    assert!(sums.read() == ramp((own + 1) * size));
    let last = size - 1;
    // SAFETY: as above.
    unsafe { rank.comm.broadcast(input.addr, sums.addr, n, DType::F32, last, stream).unwrap() };
    assert!(sums.read() == ramp(size));
    let exchanged = rank.buffer(&vec![-1.0_f32; size]);
    let parts: Vec<f32> = (0..size).map(|to| (own * 10 + to) as f32).collect();
    let parts = rank.buffer(&parts);
    // SAFETY: as above.
    unsafe { rank.comm.all_to_all(parts.addr, exchanged.addr, 1, DType::F32, stream).unwrap() };
    assert_eq!(exchanged.read(), (0..size).map(|from| (from * 10 + own) as f32).collect::<Vec<_>>());
    let mut graph = (rank.memory)
        // SAFETY: as above; the graph is replayed before they are read.
        .capture(|| unsafe {
            rank.comm.all_reduce(input.addr, sums.addr, n, DType::F32, ReduceOp::Max, stream)
        })
        .unwrap();
    for _ in 0..3 {
        // SAFETY: the captured call's operands are alive.
        unsafe { graph.launch(stream).unwrap() };
    }
    assert!(sums.read() == ramp(size));
    drop(graph);
    rank.memory.synchronize().unwrap();
}
