//! Parts that differ from rank to rank: every algorithm gives the bits of copies through staging memory, whoever has how
//! much, and writes nothing else.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use comm_core::{DeviceAddr, HostCommExt as _, OpKind, ReduceOp};

use crate::common::{PATIENT, Rank, world};
use crate::data::{FLOATS, SMALL, encode, real, timed};
use crate::setting::Setting;

/// From one pack to several rounds with as little scratch memory as the tests give.
const SCALES: [usize; 4] = [1, 37, 5003, 70_001];
/// Elements behind a result that must stay as they are.
const BEHIND: usize = 64;

/// Counts of the ranks: one has everything, none at the start, falling, alternating.
fn splits(size: usize, scale: usize) -> [Vec<usize>; 5] {
    let of = |count: &dyn Fn(usize) -> usize| (0..size).map(count).collect();
    [
        of(&|rank| if rank == 0 { scale } else { 0 }),
        of(&|rank| if rank + 1 == size { scale } else { 0 }),
        of(&|rank| rank * scale / (size - 1)),
        of(&|rank| scale / (rank + 1) + rank % 3),
        of(&|rank| if rank % 2 == 0 { 1 } else { scale }),
    ]
}

fn digest(bytes: &[u8]) -> u64 {
    let mut digest = DefaultHasher::new();
    bytes.hash(&mut digest);
    digest.finish()
}

/// The digests of all results of a rank: of gathers, then of scatters.
fn results(rank: &Rank) -> (Vec<u64>, Vec<u64>) {
    let most = SCALES[3] * rank.size + BEHIND + 1;
    let (send, recv) = (rank.space(most * 4), rank.comm.allocate(most * 4).unwrap());
    let (mut gathered, mut scattered) = (Vec::new(), Vec::new());
    for dtype in FLOATS {
        rank.upload(send, &encode(dtype, (0..most).map(|index| real(7, rank.rank, index))));
        for counts in SCALES.into_iter().flat_map(|scale| splits(rank.size, scale)) {
            let (total, own) = (counts.iter().sum::<usize>(), counts[rank.rank]);
            for shift in [0, dtype.size() as u64] {
                let (from, to) = (send.offset(shift), recv.offset(shift));
                let call = |count: usize, found: &mut Vec<u64>, issue: &dyn Fn(DeviceAddr, DeviceAddr)| {
                    let bytes = (count + BEHIND) * dtype.size();
                    rank.upload(to, &vec![0xff; bytes]);
                    // The others may store into this rank's result once it has come to the call, not before.
                    issue(from, to);
                    found.push(digest(&rank.download(to, bytes)));
                };
                call(total, &mut gathered, &|from, to| unsafe {
                    rank.comm.all_gather_v(from, to, &counts, dtype, rank.stream()).unwrap()
                });
                for op in [ReduceOp::Sum, ReduceOp::Avg] {
                    call(own, &mut scattered, &|from, to| unsafe {
                        rank.comm.reduce_scatter_v(from, to, &counts, dtype, op, rank.stream()).unwrap()
                    });
                }
            }
        }
    }
    // Processes do not see each other's results but by this.
    let all: Vec<Vec<u64>> = rank.host.all_gather(&gathered).unwrap();
    for (other, theirs) in all.iter().enumerate() {
        assert!(
            *theirs == gathered,
            "rank {other} of {} gathered something else than rank {}",
            rank.size,
            rank.rank
        );
    }
    unsafe { rank.comm.free(recv).unwrap() };
    (gathered, scattered)
}

#[test]
fn uneven_parts_by_every_algorithm() {
    by_every_algorithm(&Setting::usual());
}

pub(crate) fn by_every_algorithm(setting: &Setting) {
    timed("uneven parts", || {
        for &size in &setting.sizes {
            let by = |algorithm: Option<&'static str>| {
                let mut options = setting.options(&SMALL);
                options.extend(algorithm.map(|name| ("p2p.algorithm", name)));
                let all = world(size, PATIENT, &options, |rank| {
                    let found = results(&rank);
                    let usage = rank.comm.usage();
                    rank.comm.close().unwrap();
                    (found, usage)
                });
                let used = |op: OpKind, name: &str| {
                    let of = |used: &comm_core::AlgorithmUsage| used.op == op && used.algorithm == name;
                    all.iter().all(|(_, usage)| usage.iter().any(of))
                };
                match algorithm {
                    Some(name @ ("packets" | "direct")) => assert!(used(OpKind::AllGatherV, name), "{name}"),
                    Some(name @ ("two_shot" | "cells")) => {
                        assert!(used(OpKind::ReduceScatterV, name), "{name}");
                    }
                    Some(name) => {
                        assert!(used(OpKind::AllGatherV, name) && used(OpKind::ReduceScatterV, name));
                    }
                    None => {
                        let staged = |op| used(op, "staged");
                        assert!(!staged(OpKind::AllGatherV) && !staged(OpKind::ReduceScatterV));
                    }
                }
                all.into_iter().map(|(found, _)| found).collect::<Vec<_>>()
            };
            let expected = by(Some("staged"));
            for algorithm in [None, Some("packets"), Some("direct"), Some("two_shot"), Some("cells")] {
                let found = by(algorithm);
                for (rank, (found, expected)) in found.iter().zip(&expected).enumerate() {
                    assert!(found.0 == expected.0, "gather by {algorithm:?}, rank {rank} of {size}");
                    assert!(found.1 == expected.1, "scatter by {algorithm:?}, rank {rank} of {size}");
                }
            }
        }
    });
}
