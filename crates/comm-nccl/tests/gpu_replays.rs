//! Ranks that are late in replayed graphs, before them or between their calls, are named in time, whatever the others' calls
//! are watched by: one mark around many, or one around each.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::sync::Barrier;
use std::time::{Duration, Instant};

use comm_core::{CommError, DType, DeviceAddr, DeviceMemory, ReduceOp, Result, StreamHandle};
use comm_kernels::CapturedGraph;
use common::{Branch, Gate, PATIENT, Rank, SHORT, few, world, world_size, world_with};
use cudarc::driver::sys;

/// Elements of the buffer that the calls are made on.
const COUNT: usize = 8;
/// The rank that is late.
const LATE: usize = 1;

impl Rank {
    fn call(&self, at: DeviceAddr, stream: StreamHandle) -> Result<()> {
        // SAFETY: the buffer holds that many elements and outlives the graphs.
        unsafe { self.comm.all_reduce(at, at, COUNT, DType::F32, ReduceOp::Max, stream) }
    }

    /// A graph of calls, with something of its own before the call whose number `between` is told.
    fn calls(&self, count: usize, at: DeviceAddr, between: impl Fn(usize)) -> CapturedGraph {
        self.memory
            .capture(|| {
                (0..count).try_for_each(|number| {
                    between(number);
                    self.call(at, self.stream())
                })
            })
            .unwrap()
    }

    fn launch(&self, graph: &mut CapturedGraph) {
        // SAFETY: the stream is the memory's; the buffers are alive.
        unsafe { graph.launch(self.stream()).unwrap() };
    }

    /// Replays that go well, and a pause that is longer than the timeout: it is not a wait.
    fn replay_and_rest(&self, graph: &mut CapturedGraph) {
        for _ in 0..5 {
            self.launch(graph);
        }
        self.memory.synchronize().unwrap();
        std::thread::sleep(SHORT + Duration::from_millis(200));
        self.comm.poll().unwrap();
    }

    /// Replays in vain: the late rank is named in time, in the call that `call` names, and the kernel leaves its wait.
    fn replay_in_vain(&self, graph: &mut CapturedGraph, call: &str) {
        let start = Instant::now();
        self.launch(graph);
        let error = self.await_failure(SHORT + Duration::from_secs(2));
        let waited = start.elapsed();
        assert!(matches!(&error, CommError::Timeout { missing, .. } if *missing == [LATE]), "{error}");
        assert!(error.to_string().contains(call), "{error}");
        assert!(waited >= SHORT && waited < SHORT + Duration::from_millis(500), "took {waited:?}");
        let _ = self.memory.synchronize();
        assert!(start.elapsed() < SHORT + SHORT, "the kernel stayed");
    }

    /// The late rank learns of it.
    fn was_late(&self) {
        let error = self.comm.poll().unwrap_err();
        assert!(matches!(error, CommError::PeerFailed { .. }), "{error}");
    }
}

#[test]
fn a_rank_that_never_replays_is_named_in_time() {
    let Some(size) = world_size() else { return };
    let met = Barrier::new(size);
    world(size, SHORT, false, |rank| {
        rank.try_sum().unwrap();
        let buffer = rank.buffer(&[1.0_f32; COUNT]);
        let mut graph = rank.calls(5, buffer.addr, |_| {});
        rank.replay_and_rest(&mut graph);
        met.wait();
        if rank.rank == LATE {
            met.wait();
            rank.was_late();
        } else {
            // The first captured call, after the creation and the sum.
            rank.replay_in_vain(&mut graph, "all_reduce #2 ");
            met.wait();
        }
        drop(graph);
        drop(rank.comm);
    });
}

/// Replays a graph in which the late rank has a gate, first open, then closed.
fn late_behind_a_gate(rank: &Rank, met: &Barrier, gate: &Gate, graph: &mut CapturedGraph, call: &str) {
    rank.replay_and_rest(graph);
    met.wait();
    if rank.rank == LATE {
        gate.close();
        rank.launch(graph);
        met.wait();
        rank.was_late();
        gate.open();
        let _ = rank.memory.synchronize();
    } else {
        rank.replay_in_vain(graph, call);
        met.wait();
    }
}

#[test]
fn a_rank_that_is_late_between_calls_is_named_by_those_that_have_nothing_there() {
    let Some(size) = world_size() else { return };
    let met = Barrier::new(size);
    world(size, SHORT, false, |rank| late_between_calls(rank, &met, "all_reduce #2 "));
}

#[test]
fn calls_that_are_marked_one_by_one_are_named_one_by_one() {
    let Some(size) = world_size().map(few) else { return };
    let met = Barrier::new(size);
    let options = [("nccl.watch_graphs", "inline")];
    world_with(size, SHORT, false, &options, |rank| late_between_calls(rank, &met, "all_reduce #4 "));
}

/// One rank does not get from the second of four calls to the third; the others name `call`.
fn late_between_calls(rank: Rank, met: &Barrier, call: &str) {
    rank.try_sum().unwrap();
    let (buffer, other) = (rank.buffer(&[1.0_f32; COUNT]), rank.buffer(&[1_u8; 64]));
    let gate = Gate::new();
    let mut graph = rank.calls(4, buffer.addr, |number| {
        if rank.rank == LATE && number == 2 {
            clear(other.addr, 64, rank.stream());
            gate.put(rank.stream());
        }
    });
    late_behind_a_gate(&rank, met, &gate, &mut graph, call);
    drop(graph);
    drop(rank.comm);
}

/// Sets bytes to zero.
fn clear(at: DeviceAddr, bytes: usize, stream: StreamHandle) {
    // SAFETY: the buffer is that long, and the stream is live.
    let code = unsafe { sys::cuMemsetD8Async(at.0, 0, bytes, stream.0 as sys::CUstream) };
    assert_eq!(code, sys::CUresult::CUDA_SUCCESS);
}

#[test]
fn a_rank_that_is_late_on_a_forked_stream_is_named() {
    let Some(size) = world_size().map(few) else { return };
    let met = Barrier::new(size);
    world(size, SHORT, false, |rank| {
        rank.try_sum().unwrap();
        let buffer = rank.buffer(&[1.0_f32; COUNT]);
        let gate = Gate::new();
        let branch = Branch::new(&rank);
        let (at, own, other) = (buffer.addr, rank.stream(), branch.stream());
        let mut graph = if rank.rank == LATE {
            // The third call does not wait for the gate by itself, only because the second does.
            let forked = || {
                rank.call(at, own)?;
                branch.order(own, other);
                gate.put(other);
                rank.call(at, other)?;
                rank.call(at, own)?;
                branch.order(other, own);
                Ok(())
            };
            rank.memory.capture(forked).unwrap()
        } else {
            rank.calls(3, at, |_| {})
        };
        late_behind_a_gate(&rank, &met, &gate, &mut graph, "all_reduce #2 ");
        drop(graph);
        drop(rank.comm);
    });
}

#[test]
fn calls_with_nothing_in_between_have_two_marks_together() {
    const CALLS: usize = 8;
    /// As many as a run may have.
    const FULL: usize = 32;
    let Some(size) = world_size().map(few) else { return };
    world(size, PATIENT, false, |rank| {
        let (buffer, bytes) = (rank.buffer(&[rank.rank as f32; COUNT]), rank.buffer(&[1_u8; 64]));
        let mut together = rank.calls(CALLS, buffer.addr, |_| {});
        let mut apart = rank.calls(CALLS, buffer.addr, |number| {
            if number > 0 {
                clear(bytes.addr, 64, rank.stream());
            }
        });
        // What NCCL adds is the same in both; apart, there is something between calls, and each has two marks.
        let gaps = CALLS - 1;
        assert_eq!(apart.nodes().unwrap() - together.nodes().unwrap(), gaps + 2 * gaps);
        // A run that is full ends where the next begins, on one node.
        let calls = |count| rank.calls(count, buffer.addr, |_| {}).nodes().unwrap();
        let [short, full, long] = [FULL - 1, FULL, FULL + 1].map(calls);
        assert_eq!(long - full, full - short + 1);
        // On a stream that was forked off where the last call ended, nothing is in between either.
        let branch = Branch::new(&rank);
        let (at, own, other) = (buffer.addr, rank.stream(), branch.stream());
        let forked = || {
            rank.call(at, own)?;
            branch.order(own, other);
            rank.call(at, other)?;
            branch.order(other, own);
            Ok(())
        };
        let mut forked = rank.memory.capture(forked).unwrap();
        assert_eq!(forked.nodes().unwrap(), calls(2));
        // Where it was forked off before, it does not follow the last call, though NCCL lets it wait.
        let crossed = || {
            rank.call(at, own)?;
            branch.order(own, other);
            rank.call(at, own)?;
            rank.call(at, other)?;
            branch.order(other, own);
            Ok(())
        };
        let mut crossed = rank.memory.capture(crossed).unwrap();
        assert_eq!(crossed.nodes().unwrap(), calls(3) + 2);
        for graph in [&mut together, &mut apart, &mut forked, &mut crossed] {
            rank.launch(graph);
        }
        assert_eq!(buffer.read(), [(rank.size - 1) as f32; COUNT]);
        rank.memory.synchronize().unwrap();
        drop((together, apart, forked, crossed));
        rank.comm.close().unwrap();
    });
}
