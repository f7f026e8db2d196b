//! Lines of 128 bytes arrive whole, whatever crosses the links beside them. PTX does not promise it; the kernels rest on it.

use std::time::{Duration, Instant};

use comm_core::{DType, DeviceMemory as _, HostCommExt as _};
use comm_kernels::pattern::{Expected, Pattern};

use crate::common::{PATIENT, Rank, connect};
use crate::data::{Judge, at, timed};
use crate::setting::two_worlds;

const DTYPE: DType = DType::I32;
/// Elements of a rank, no whole number of bursts: several rounds in all shapes.
const COUNT: usize = (6 << 20) + 5;
/// Buffers rotate by fours: data of four calls before is what a torn line would show.
const SETS: usize = 5;
const CALLS: usize = 40;
const WORTH: Duration = Duration::from_secs(2);

fn data(call: usize) -> Pattern {
    Pattern::new(31_000 + (call % SETS) as u64, None, 1)
}

fn gathers_and_broadcasts(rank: &Rank, judge: &Judge) -> usize {
    let (comm, stream, size) = (&rank.comm, rank.stream(), rank.size);
    let (send, recv) = (rank.space(SETS * COUNT * DTYPE.size()), rank.space(size * COUNT * DTYPE.size()));
    let sent = |call: usize| at(send, call % SETS * COUNT, DTYPE);
    for call in 0..SETS {
        judge.fill(rank, (sent(call), COUNT, DTYPE), &data(call), rank.rank, 0).unwrap();
    }
    for call in 0..CALLS {
        unsafe { comm.all_gather(sent(call), recv, COUNT, DTYPE, stream).unwrap() };
        for from in 0..size {
            let part = (at(recv, from * COUNT, DTYPE), COUNT, DTYPE);
            judge.expect(rank, part, &data(call), Expected::Sent(from), 0, call << 32).unwrap();
        }
        let root = call % size;
        unsafe { comm.broadcast(sent(call), recv, COUNT, DTYPE, root, stream).unwrap() };
        judge.expect(rank, (recv, COUNT, DTYPE), &data(call), Expected::Sent(root), 0, call << 32).unwrap();
    }
    judge.all_right(rank, "lines");
    // The control: one pack of four calls before, as a torn line would leave it, is seen.
    let (whole, stale) = (rank.download(at(recv, 64, DTYPE), 16), at(send, 2 * COUNT + 64, DTYPE));
    let stale = rank.download(stale, 16);
    assert_ne!(whole, stale);
    rank.upload(at(recv, 64, DTYPE), &stale);
    let last = CALLS - 1;
    let part = (recv, COUNT, DTYPE);
    judge.expect(rank, part, &data(last), Expected::Sent(last % size), 0, 0).unwrap();
    let found = judge.verdict(rank);
    assert_eq!((found.wrong, found.first), (4, Some(64)), "of 4 stale elements");
    unsafe {
        rank.memory.free(send).unwrap();
        rank.memory.free(recv).unwrap();
    }
    CALLS * COUNT * DTYPE.size() * size
}

#[test]
fn lines_do_not_tear() {
    timed("lines", || {
        for size in two_worlds() {
            let moved = comm_core::run_threads(size, PATIENT, |host| {
                let rank = connect(host, PATIENT, &[("p2p.algorithm", "lines")]).unwrap();
                let judge = Judge::new(&rank);
                let start = Instant::now();
                let mut moved = 0;
                // All ranks stop after the same number of turns.
                let go_on = || rank.host.broadcast(Some(&(start.elapsed() < WORTH)), 0).unwrap();
                while go_on() {
                    moved += gathers_and_broadcasts(&rank, &judge);
                }
                rank.comm.close().unwrap();
                moved
            })
            .unwrap();
            println!("{size} ranks: {} lines to a rank, none torn", moved[0] / 124);
        }
    });
}

/// With one warp a broadcast takes more rounds than a flag may otherwise be ahead of a wait for it, and a rank may be in
/// the next one while another still ends this.
#[test]
fn broadcasts_of_more_rounds_than_flags_are_ahead_follow_one_another() {
    timed("many rounds", || {
        for size in two_worlds() {
            let options = [("p2p.algorithm", "lines"), ("p2p.line_slots", "128")];
            comm_core::run_threads(size, PATIENT, |host| {
                let rank = connect(host, PATIENT, &options).unwrap();
                let judge = Judge::new(&rank);
                let count = 1300 * 496 * (size - 1);
                let (send, recv) = (rank.space(count * DTYPE.size()), rank.space(count * DTYPE.size()));
                for call in 0..6 {
                    judge.fill(&rank, (send, count, DTYPE), &data(call), rank.rank, 0).unwrap();
                    let root = call % size;
                    unsafe { rank.comm.broadcast(send, recv, count, DTYPE, root, rank.stream()).unwrap() };
                    let whole = (recv, count, DTYPE);
                    judge.expect(&rank, whole, &data(call), Expected::Sent(root), 0, call << 32).unwrap();
                }
                judge.all_right(&rank, "many rounds");
                rank.comm.close().unwrap();
            })
            .unwrap();
        }
    });
}
