//! The waits of every kernel end: a rank that does not arrive is named in time, and an abort from another thread is
//! heeded.
//!
//! In each case all ranks have made a whole call before, so that nothing is for the first time when the last rank stays
//! away; and what the call counted as shows whose wait it was that ended.

use std::sync::Arc;
use std::time::{Duration, Instant};

use comm_core::{CommError, DeviceAddr, DeviceMemory as _, HostComm, Result};
use comm_kernels::{CapturedGraph, raw};
use cudarc::driver::sys;

use crate::cases::{
    CAPTURED, CUBE_MESH, Case, GATHERS, LARGE_SUMS, MOVES, NORMS, Operands, REPLAYED, SCATTERS, SMALL, SUMS,
};
use crate::common::{PATIENT, Rank, connect, ranks, shared, world_size};

/// The least timeout, which the cases wait for one after another.
const LEAST: Duration = Duration::from_millis(300);
/// From the timeout to the error in the caller's hands.
const MARGIN: Duration = Duration::from_millis(500);
/// Ranks begin so far apart, and one may learn from another that it has waited long enough.
const APART: Duration = Duration::from_millis(50);
/// Before an abort, for the ranks to be waiting.
const A_WHILE: Duration = Duration::from_millis(50);

/// How a case's call is made.
#[derive(Clone, Copy)]
struct How {
    options: &'static [(&'static str, &'static str)],
    captured: bool,
}

const EAGER: How = How { options: &[], captured: false };

enum Call {
    /// On memory of the communicator, where the case needs it.
    Eager(Option<DeviceAddr>),
    Replay(CapturedGraph),
}

/// Whom a rank has missed, or another that told it.
pub(crate) fn missed(error: &CommError) -> Vec<usize> {
    match error {
        CommError::Timeout { missing, .. } => missing.clone(),
        CommError::PeerFailed { cause, .. } if matches!(**cause, CommError::Timeout { .. }) => missed(cause),
        other => panic!("{other}"),
    }
}

fn is_abort(error: &CommError) -> bool {
    match error {
        CommError::Aborted { .. } => true,
        CommError::PeerFailed { cause, .. } => is_abort(cause),
        _ => false,
    }
}

/// One rank, whose memory serves the communicators of all cases: the next one would wait for what gives it back.
struct Bench {
    rank: Rank,
    operands: Operands,
    timeout: Duration,
}

impl Bench {
    fn new(host: Arc<dyn HostComm>, how: How) -> Self {
        let options = [&SMALL, how.options].concat();
        // Loads the kernels.
        let mut rank = connect(host, PATIENT, &options).unwrap();
        let operands = Operands::new(&rank);
        rank.comm.close().unwrap();
        let timeout = rank.short_timeout(LEAST, &options);
        Self { rank, operands, timeout }
    }

    fn last(&self) -> usize {
        self.rank.size - 1
    }

    /// Makes a communicator for a case, and with it one call that all ranks take part in.
    fn begin(&mut self, case: &Case, how: How, timeout: Duration) -> Call {
        self.rank.reconnect(timeout, &[&case.options(), how.options].concat());
        let (rank, operands) = (&self.rank, &self.operands);
        let shared = case.stores(rank.size).map(|bytes| rank.comm.allocate(bytes).unwrap());
        let mut call = if how.captured {
            let graph = rank.memory.capture(|| case.issue(rank, operands, shared)).unwrap();
            rank.comm.register_captured().unwrap();
            Call::Replay(graph)
        } else {
            Call::Eager(shared)
        };
        self.make(case, &mut call).unwrap();
        self.rank.memory.synchronize().unwrap();
        self.rank.comm.poll().unwrap();
        self.rank.meet();
        call
    }

    fn make(&self, case: &Case, call: &mut Call) -> Result<()> {
        match call {
            Call::Eager(shared) => case.issue(&self.rank, &self.operands, *shared),
            // SAFETY: the operands outlive the graph; the stream is the memory's own.
            Call::Replay(graph) => unsafe { graph.launch(self.rank.stream()) },
        }
    }

    /// The call that the last rank does not make, on the others.
    fn make_without_the_last(&self, case: &Case, call: &mut Call) {
        if self.rank.rank == self.last() {
            return;
        }
        self.make(case, call).unwrap();
        let usage = self.rank.comm.usage();
        let of_kind = || usage.iter().filter(|used| used.op == case.kind());
        let as_meant =
            of_kind().filter(|used| used.algorithm == case.used).map(|used| used.calls).sum::<u64>();
        // A captured call counts once.
        let calls = if matches!(call, Call::Eager(_)) { 2 } else { 1 };
        assert!(as_meant == calls && of_kind().count() == 1, "{case:?} went another way: {usage:?}");
    }

    /// Whether all that was enqueued has ended.
    fn is_idle(&self) -> bool {
        // SAFETY: the stream is live.
        match unsafe { sys::cuStreamQuery(raw::stream(self.rank.stream())) } {
            sys::CUresult::CUDA_ERROR_NOT_READY => false,
            code => raw::check("cuStreamQuery", code).map(|()| true).unwrap(),
        }
    }

    fn await_idle(&self, case: &Case, within: Duration) {
        let start = Instant::now();
        while !self.is_idle() {
            assert!(start.elapsed() < within, "{case:?}: rank {} is still at work", self.rank.rank);
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// After a failure.
    fn end(&self, call: Call, error: &CommError) {
        drop(call);
        assert_eq!(self.rank.comm.close().unwrap_err(), *error);
    }

    fn a_rank_does_not_arrive(&mut self, case: &Case, how: How) {
        let timeout = self.timeout;
        let margin = if shared() { 3 * MARGIN } else { MARGIN };
        let mut call = self.begin(case, how, timeout);
        let (me, last) = (self.rank.rank, self.last());
        let start = Instant::now();
        self.make_without_the_last(case, &mut call);
        let error = self.rank.await_failure(timeout + margin + Duration::from_secs(1));
        let took = start.elapsed();
        assert_eq!(missed(&error), [last], "{case:?}, rank {me}: {error}");
        if let CommError::Timeout { at, waited, .. } = &error {
            assert_eq!(at.op, case.waits_in(), "{case:?}, rank {me}: {error}");
            assert!(*waited >= timeout, "{case:?}, rank {me}: {error}");
        }
        assert!(
            took + APART >= timeout && took < timeout + margin,
            "{case:?}, rank {me}: after {took:?}, not {timeout:?}: {error}"
        );
        self.await_idle(case, MARGIN);
        self.end(call, &error);
    }

    fn another_thread_aborts(&mut self, case: &Case, how: How) {
        // A wait that did not heed the abort would go on for so long.
        let mut call = self.begin(case, how, PATIENT);
        let me = self.rank.rank;
        self.make_without_the_last(case, &mut call);
        std::thread::sleep(A_WHILE);
        if me == 0 {
            assert!(!self.is_idle(), "{case:?} has not waited");
            std::thread::scope(|scope| scope.spawn(|| self.rank.comm.abort()).join()).unwrap();
        }
        let start = Instant::now();
        let error = self.rank.await_failure(self.timeout);
        assert!(is_abort(&error), "{case:?}, rank {me}: {error}");
        self.await_idle(case, self.timeout.saturating_sub(start.elapsed()));
        self.end(call, &error);
    }
}

fn every_wait_ends(cases: &[Case], how: How) {
    let Some(size) = world_size() else { return };
    every_wait_ends_among(size, cases, how);
}

fn every_wait_ends_among(size: usize, cases: &[Case], how: How) {
    let start = Instant::now();
    let timeouts = ranks(size, |host| {
        let mut bench = Bench::new(host, how);
        for case in cases {
            bench.a_rank_does_not_arrive(case, how);
            bench.another_thread_aborts(case, how);
        }
        bench.timeout
    });
    let (number, took) = (cases.len(), start.elapsed().as_secs_f64());
    println!(
        "{number} ways to wait among {size} ranks, each for {:?} and until an abort: {took:.1} s",
        timeouts[0]
    );
}

#[test]
fn in_all_reduces() {
    every_wait_ends(&SUMS, EAGER);
}

#[test]
fn in_large_sums() {
    every_wait_ends(&LARGE_SUMS, EAGER);
}

#[test]
fn in_reduce_scatters_and_quantised_sums() {
    every_wait_ends(&SCATTERS, EAGER);
}

#[test]
fn in_all_gathers() {
    every_wait_ends(&GATHERS, EAGER);
}

#[test]
fn in_broadcasts_messages_and_barriers() {
    every_wait_ends(&MOVES, EAGER);
}

#[test]
fn in_fused_norms() {
    every_wait_ends(&NORMS, EAGER);
}

#[test]
fn in_replayed_graphs() {
    every_wait_ends(&REPLAYED, How { captured: true, ..EAGER });
    // A slot for each thread of the captured gather, or it is none.
    let options = &[("p2p.graph_registration", "on"), ("p2p.packet_slots", "33792")];
    every_wait_ends(&CAPTURED, How { options, captured: true });
}

#[test]
fn in_a_cube_mesh() {
    let Some(size) = world_size() else { return };
    if size < 8 {
        println!("SKIP: {size} ranks are not the whole mesh: 8 GPUs, or COMM_P2P_SHARE_DEVICES=on");
        return;
    }
    every_wait_ends_among(8, &CUBE_MESH, How { options: &[("p2p.topology", "hybrid_cube_mesh")], ..EAGER });
}
