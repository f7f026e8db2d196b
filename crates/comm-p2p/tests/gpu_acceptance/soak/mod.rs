//! A million calls of mixed size, type and operation, most of them in replayed graphs, with rounds that begin just
//! below the wrap: no wrong value, and nothing grows.

mod calls;
mod plan;

use std::time::{Duration, Instant};

use comm_core::DeviceMemory as _;

use self::calls::Buffers;
use self::plan::{Plan, Random};
use crate::common::{PATIENT, Rank, shared, world};
use crate::data::{Judge, timed};
use crate::setting::two_worlds;

const CALLS: usize = 1_000_000;
/// Where ranks share devices, and every call takes much longer.
const CALLS_WHERE_SHARED: usize = 100_000;
const GRAPHS: usize = 8;
const CALLS_OF_A_GRAPH: usize = 250;
const EAGER_CALLS: usize = 20;
/// Replays between two looks at the results.
const STRETCH: usize = 40;
/// Far more than it takes.
const LIMIT: Duration = Duration::from_secs(150);

/// What must not grow: descriptors, threads and resident pages of the process, which rank 0 counts, and used memory of
/// the rank's device.
fn possessions(rank: &Rank) -> [usize; 4] {
    rank.memory.synchronize().unwrap();
    rank.meet();
    let (free, total) = cudarc::driver::result::mem_get_info().unwrap();
    let mut found = [0, 0, 0, total - free];
    if rank.rank == 0 {
        let entries = |path| std::fs::read_dir(path).unwrap().count();
        let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
        let pages = statm.split(' ').nth(1).and_then(|pages| pages.parse().ok());
        found = [entries("/proc/self/fd"), entries("/proc/self/task"), pages.unwrap(), found[3]];
    }
    rank.meet();
    found
}

fn soak(rank: &Rank) {
    let start = Instant::now();
    let most = if shared() { CALLS_WHERE_SHARED } else { CALLS };
    let judge = Judge::new(rank);
    let buffers = Buffers::new(rank);
    let plans: Vec<Plan> =
        (0..GRAPHS).map(|graph| Plan::new(1 + graph as u64, CALLS_OF_A_GRAPH, rank.size)).collect();
    // A graph's data is captured with it.
    let seed_of = |graph: usize| 1 + graph;
    let mut graphs: Vec<_> = (plans.iter().enumerate())
        .map(|(graph, plan)| rank.capture(|| buffers.run(rank, &judge, plan, seed_of(graph))))
        .collect();
    let mut random = Random { seed: 4242, drawn: 0 };
    let (mut done, mut last, mut before) = (0, 0, None);
    for stretch in 0.. {
        for replay in 0..STRETCH {
            // Never the graph of the replay before, so that what that one left is wrong now.
            last = if stretch == 0 && replay < GRAPHS {
                replay
            } else {
                (last + 1 + random.below(GRAPHS - 1)) % GRAPHS
            };
            unsafe { graphs[last].launch(rank.stream()).unwrap() };
            done += plans[last].calls.len();
        }
        buffers.check_on_host(rank, &plans[last], seed_of(last));
        let (plan, seed) = (Plan::new(1000 + stretch, EAGER_CALLS, rank.size), 1_000_000 + stretch as usize);
        buffers.run(rank, &judge, &plan, seed).unwrap();
        done += plan.calls.len();
        judge.all_right(rank, &format!("after {done} calls"));
        buffers.check_on_host(rank, &plan, seed);
        before = before.or_else(|| Some(possessions(rank)));
        assert!(start.elapsed() < LIMIT, "{done} calls took {:?}", start.elapsed());
        if done >= most {
            break;
        }
    }
    let (before, after) = (before.unwrap(), possessions(rank));
    if rank.rank == 0 {
        println!(
            "{} ranks: {done} calls in {:.1} s; descriptors, threads, pages, device bytes: {before:?}, then {after:?}",
            rank.size,
            start.elapsed().as_secs_f64()
        );
    }
    assert_eq!(after[..2], before[..2], "descriptors and threads");
    assert!(after[2] <= before[2] + (32 << 20) / 4096, "resident pages: {before:?}, then {after:?}");
    assert!(after[3] <= before[3] + (2 << 20), "device memory: {before:?}, then {after:?}");
    drop(graphs);
    buffers.group.close().unwrap();
}

#[test]
fn a_million_mixed_calls() {
    timed("a million calls", || {
        for size in two_worlds() {
            // 2^32 - 100
            world(size, PATIENT, &[("p2p.first_round", "4294967196")], |rank| {
                soak(&rank);
                rank.comm.close().unwrap();
            });
        }
    });
}
