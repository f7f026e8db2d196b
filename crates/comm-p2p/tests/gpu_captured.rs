//! Captured calls whose results the ranks get to know after the capture.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use comm_core::{
    BackendFactory as _, CommError, CreateContext, DType, Deadline, DeviceComm as _, DeviceMemory as _,
    HostCommExt as _, ReduceOp, create_with, run_threads,
};
use comm_kernels::CapturedGraph;
use comm_p2p::{P2pComm, P2pFactory};
use common::{PATIENT, Rank, SHORT, as_processes, context, ranks, world, world_size};

/// Gathers by stores, since those by lines have nothing to register.
const ON: [(&str, &str); 2] = [("p2p.graph_registration", "on"), ("p2p.algorithm", "direct")];
/// Elements of an all-reduce that goes by cells if its result is registered: 16 MiB, and an odd rest.
const COUNT: usize = (4 << 20) + 3;

/// A rank whose communicator is not hidden behind the trait.
fn connected<T: Send>(
    size: usize,
    timeout: Duration,
    options: &[(&str, &str)],
    body: impl Fn(Arc<P2pComm>, Rank) -> T + Sync,
) -> Vec<T> {
    ranks(size, |host| {
        let (rank, size) = (host.rank(), host.size());
        let memory = common::memory(rank).unwrap();
        let context = context(&host, memory.kind(), timeout, options);
        let all = host.all_gather(&P2pFactory.probe(&context).unwrap()).unwrap();
        let comm = Arc::new(P2pFactory.connect(&context, &all).unwrap());
        body(Arc::clone(&comm), Rank { comm, memory, host, rank, size })
    })
}

/// Two all-reduces in a row and an all-gather, all on results that nobody registered.
struct Captured {
    graph: CapturedGraph,
    send: comm_core::DeviceAddr,
    once: comm_core::DeviceAddr,
    twice: comm_core::DeviceAddr,
    gathered: comm_core::DeviceAddr,
    part: usize,
}

impl Captured {
    fn new(rank: &Rank) -> Self {
        let part = COUNT / rank.size;
        let send = rank.buffer(COUNT, 0.0);
        // Results at another place of another allocation on every rank.
        let shift = |value| rank.buffer(COUNT + 64, value).offset(rank.rank as u64 * 16);
        let (once, twice, gathered) = (shift(-1.0), shift(-2.0), shift(-3.0));
        let graph = rank.capture(|| {
            rank.sum(send, once, COUNT)?;
            rank.sum(once, twice, COUNT)?;
            // SAFETY: the buffers are large enough and outlive the graph.
            unsafe { rank.comm.all_gather(send, gathered, part, DType::F32, rank.stream()) }
        });
        Self { graph, send, once, twice, gathered, part }
    }

    fn replay(&mut self, rank: &Rank, turn: usize) {
        rank.put(self.send, &vec![(rank.rank + 1 + turn) as f32; COUNT]);
        // SAFETY: the buffers outlive the graph; the stream is the memory's own.
        unsafe { self.graph.launch(rank.stream()).unwrap() };
        let sum = rank.triangle() + (turn * rank.size) as f32;
        assert_eq!(rank.get(self.once, COUNT), vec![sum; COUNT], "turn {turn}");
        assert_eq!(rank.get(self.twice, COUNT), vec![sum * rank.size as f32; COUNT], "turn {turn}");
        let expected: Vec<f32> =
            (0..rank.size).flat_map(|r| vec![(r + 1 + turn) as f32; self.part]).collect();
        assert_eq!(rank.get(self.gathered, self.part * rank.size), expected, "turn {turn}");
    }
}

/// Waits until the driver has told of dropped graphs, and the watchdog has cleared their entries.
fn await_operands(comm: &P2pComm, expected: usize) {
    let deadline = Deadline::after(Duration::from_secs(2));
    while comm.captured_operands() != expected {
        assert!(!deadline.has_passed(), "{} operands are held, not {expected}", comm.captured_operands());
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn results_are_registered_after_the_capture_and_given_back_with_the_graph() {
    let Some(size) = world_size() else { return };
    connected(size, PATIENT, &ON, |comm, rank| {
        assert_eq!(comm.captured_operands(), 0);
        let mut first = Captured::new(&rank);
        assert_eq!(comm.captured_operands(), 3);
        comm.register_captured().unwrap();
        assert_eq!(comm.captured_staging_reasons(), []);
        (0..3).for_each(|turn| first.replay(&rank, turn));
        // A second graph, registered while the first lives on.
        let mut second = Captured::new(&rank);
        comm.register_captured().unwrap();
        second.replay(&rank, 3);
        first.replay(&rank, 4);
        assert_eq!(comm.captured_operands(), 6);
        drop(first.graph);
        await_operands(&comm, 3);
        second.replay(&rank, 5);
        // Entries that were used before, at once after they came back.
        let mut third = Captured::new(&rank);
        comm.register_captured().unwrap();
        third.replay(&rank, 6);
        drop((second.graph, third.graph));
        await_operands(&comm, 0);
        let used: Vec<_> =
            comm.usage().into_iter().map(|u| (u.op.name(), u.algorithm.into_owned(), u.calls)).collect();
        assert!(used.contains(&("all_reduce", "captured".to_owned(), 6)), "{used:?}");
        assert!(used.contains(&("all_gather", "captured".to_owned(), 3)), "{used:?}");
        rank.memory.synchronize().unwrap();
        comm.close().unwrap();
    });
}

#[test]
fn a_replay_before_the_registration_is_an_error_that_says_so() {
    let Some(size) = world_size() else { return };
    for early in [1, size] {
        connected(size, SHORT, &ON, |comm, rank| {
            let mut captured = Captured::new(&rank);
            let start = Instant::now();
            rank.host.barrier(Deadline::after(PATIENT)).unwrap();
            if rank.rank < early {
                // SAFETY: the buffers outlive the graph.
                unsafe { captured.graph.launch(rank.stream()).unwrap() };
            }
            let error = rank.await_failure(Duration::from_secs(1));
            match &error {
                CommError::NotRegistered { at } if rank.rank < early => {
                    assert_eq!(at.op, comm_core::OpKind::AllReduce);
                }
                // Another rank's mistake may be known before this one has made its own.
                CommError::PeerFailed { rank: other, cause, .. } if *other < early => {
                    assert!(matches!(**cause, CommError::NotRegistered { .. }), "{error}");
                }
                _ => panic!("rank {}: {error}", rank.rank),
            }
            rank.memory.synchronize().unwrap();
            assert!(start.elapsed() < Duration::from_secs(1));
            // No operand was touched.
            assert_eq!(rank.get(captured.once, COUNT), vec![-1.0; COUNT]);
            assert!(error.is_fatal());
            assert_eq!(comm.register_captured().unwrap_err(), error);
            drop(captured.graph);
            assert_eq!(comm.close().unwrap_err(), error);
        });
    }
    // And the process goes on.
    world(size, PATIENT, &[], |rank| {
        let at = rank.buffer(1000, 1.0);
        rank.sum(at, at, 1000).unwrap();
        assert_eq!(rank.get(at, 1000), vec![size as f32; 1000]);
        rank.comm.close().unwrap();
    });
}

#[test]
fn a_result_that_cannot_be_exported_keeps_to_scratch_memory_and_says_why() {
    let Some(size) = world_size() else { return };
    connected(size, PATIENT, &ON, |comm, rank| {
        // Memory of another communicator is a virtual allocation, which legacy IPC does not export.
        let other = common::connect(rank.host.clone(), PATIENT, &[]).unwrap();
        let foreign = other.comm.allocate(COUNT * 4).unwrap();
        let plain = rank.buffer(COUNT, 0.0);
        let send = rank.buffer(COUNT, 0.0);
        // One rank's is enough to keep all to scratch memory.
        let recv = if rank.rank == size - 1 { foreign } else { plain };
        let mut graph = rank.memory.capture(|| rank.sum(send, recv, COUNT)).unwrap();
        comm.register_captured().unwrap();
        let reasons = comm.captured_staging_reasons();
        assert_eq!(reasons.len(), 1);
        assert_eq!(reasons[0].0, recv);
        assert!(reasons[0].1.contains("cannot be exported"), "{reasons:?}");
        for turn in 0..3 {
            rank.put(send, &vec![(rank.rank + 1 + turn) as f32; COUNT]);
            // SAFETY: the buffers outlive the graph.
            unsafe { graph.launch(rank.stream()).unwrap() };
            let sum = rank.triangle() + (turn * rank.size) as f32;
            assert_eq!(rank.get(recv, COUNT), vec![sum; COUNT], "turn {turn}");
        }
        drop(graph);
        await_operands(&comm, 0);
        comm.close().unwrap();
        // SAFETY: nothing uses it any more.
        unsafe { other.comm.free(foreign).unwrap() };
        other.comm.close().unwrap();
    });
}

#[test]
fn what_needs_no_registration_is_captured_without_an_entry() {
    let Some(size) = world_size() else { return };
    connected(size, PATIENT, &ON, |comm, rank| {
        let allocated = comm.allocate(COUNT * 4).unwrap();
        let (send, small) = (rank.buffer(COUNT, 1.0), rank.buffer(1000, 0.0));
        let mut graph = rank.capture(|| {
            rank.sum(send, allocated, COUNT)?;
            rank.sum(send, small, 1000)?;
            let (f32s, max) = (DType::F32, ReduceOp::Max);
            // SAFETY: the buffers are large enough and outlive the graph.
            unsafe { rank.comm.all_reduce(send, small, 1000, f32s, max, rank.stream()) }
        });
        // An eager call on a large result neither.
        let eager = rank.buffer(COUNT, 0.0);
        rank.sum(send, eager, COUNT).unwrap();
        assert_eq!(rank.get(eager, COUNT), vec![size as f32; COUNT]);
        assert_eq!(comm.captured_operands(), 0);
        // SAFETY: as above.
        unsafe { graph.launch(rank.stream()).unwrap() };
        assert_eq!(rank.get(allocated, COUNT), vec![size as f32; COUNT]);
        assert_eq!(rank.get(small, 1000), vec![1.0; 1000]);
        drop(graph);
        comm.close().unwrap();
    });
}

#[test]
fn a_full_table_refuses_the_capture_and_says_what_to_do() {
    let Some(size) = world_size() else { return };
    let options = [ON[0], ("p2p.graph_entries", "1")];
    connected(size, PATIENT, &options, |comm, rank| {
        let (send, recv) = (rank.buffer(COUNT, 1.0), rank.buffer(COUNT, 0.0));
        let graph = rank.memory.capture(|| rank.sum(send, recv, COUNT)).unwrap();
        let error = rank.memory.capture(|| rank.sum(send, recv, COUNT)).unwrap_err();
        assert!(error.to_string().contains("p2p.graph_entries"), "{error}");
        drop(graph);
        await_operands(&comm, 0);
        let mut graph = rank.memory.capture(|| rank.sum(send, recv, COUNT)).unwrap();
        comm.register_captured().unwrap();
        // SAFETY: the buffers outlive the graph.
        unsafe { graph.launch(rank.stream()).unwrap() };
        assert_eq!(rank.get(recv, COUNT), vec![size as f32; COUNT]);
        drop(graph);
        comm.close().unwrap();
    });
}

#[test]
fn without_the_option_captured_calls_need_nothing() {
    let Some(size) = world_size() else { return };
    run_threads(size, PATIENT, |host| {
        let rank = {
            let memory = common::memory(host.rank()).unwrap();
            let context = CreateContext::new(host.clone(), memory.kind());
            let comm = create_with(&P2pFactory, &context).unwrap();
            Rank { comm, memory, rank: host.rank(), size: host.size(), host }
        };
        let mut captured = Captured::new(&rank);
        captured.replay(&rank, 0);
        rank.comm.register_captured().unwrap();
        captured.replay(&rank, 1);
        drop(captured.graph);
        rank.comm.close().unwrap();
    })
    .unwrap();
}

/// Then what the ranks get to know are handles of legacy IPC.
#[test]
fn captured_results_between_processes() {
    as_processes("captured_results_between_processes", || {
        results_are_registered_after_the_capture_and_given_back_with_the_graph();
        a_replay_before_the_registration_is_an_error_that_says_so();
        a_result_that_cannot_be_exported_keeps_to_scratch_memory_and_says_why();
        what_needs_no_registration_is_captured_without_an_entry();
    });
}
