//! Tables of algorithms: exchanged in a live communicator, refused where they differ, read from a file.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::sync::Arc;

use comm_core::tuning::{Choice, Row, Rule, Table, Tables};
use comm_core::{
    BackendFactory as _, CommError, CreateContext, DType, DeviceMemory as _, HostComm, HostCommExt as _,
    OpKind, run_threads,
};
use comm_p2p::{P2pComm, P2pFactory, TUNABLE, candidates};
use common::{PATIENT, Rank, world, world_size};

/// A rank with the backend's own methods.
fn connect(host: Arc<dyn HostComm>) -> (Rank, Arc<P2pComm>) {
    let (rank, size) = (host.rank(), host.size());
    let memory = common::memory(rank).unwrap();
    let context = CreateContext { timeout: PATIENT, ..CreateContext::new(Arc::clone(&host), memory.kind()) };
    let capabilities = host.all_gather(&P2pFactory.probe(&context).unwrap()).unwrap();
    let own = Arc::new(P2pFactory.connect(&context, &capabilities).unwrap());
    (Rank { comm: Arc::clone(&own) as _, memory, host, rank, size }, own)
}

fn only(table: &Table, op: OpKind, registered: bool, choice: &Choice) -> Table {
    let rows = vec![Row { from: 0, choice: choice.clone() }];
    table.clone().with_rule(Rule { op, registered, rows, measured: Vec::new() }).unwrap()
}

fn calls(rank: &Rank, op: OpKind, algorithm: &str) -> u64 {
    let usage = rank.comm.usage();
    usage.iter().filter(|used| used.op == op && used.algorithm == algorithm).map(|used| used.calls).sum()
}

#[test]
fn every_candidate_for_sums_and_gathers_is_right_and_is_what_is_used() {
    let Some(size) = world_size() else { return };
    run_threads(size, PATIENT, |host| {
        let (rank, own) = connect(host);
        let table = own.table();
        let most = 1 << 20;
        let send = rank.buffer(most, (rank.rank + 1) as f32);
        let allocated = rank.comm.allocate(most * 4).unwrap();
        let plain = rank.buffer(most, 0.0);
        for (op, registered) in TUNABLE {
            if !matches!(op, OpKind::AllReduce | OpKind::AllGather) {
                continue;
            }
            let recv = if registered { allocated } else { plain };
            for choice in candidates(op) {
                own.set_table(&only(&table, op, registered, &choice)).unwrap();
                for count in [24 * size, 8000 * size, most / size / 4 * 4 * size] {
                    rank.put(recv, &vec![-1.0; count]);
                    let planned = own.planned(op, count * 4, registered).unwrap();
                    let before = calls(&rank, op, &planned.algorithm);
                    let expected: Vec<f32> = if op == OpKind::AllReduce {
                        rank.sum(send, recv, count).unwrap();
                        vec![rank.triangle(); count]
                    } else {
                        let part = count / size;
                        // SAFETY: the buffers are large enough and live until the memory goes, which is last.
                        unsafe { rank.comm.all_gather(send, recv, part, DType::F32, rank.stream()) }.unwrap();
                        (0..size).flat_map(|r| vec![(r + 1) as f32; part]).collect()
                    };
                    assert!(rank.get(recv, count) == expected, "{op} of {count} by {choice} as {planned}");
                    assert_eq!(
                        calls(&rank, op, &planned.algorithm),
                        before + 1,
                        "{op} by {choice} as {planned}"
                    );
                }
            }
        }
        rank.comm.close().unwrap();
    })
    .unwrap();
}

#[test]
fn tables_that_differ_are_refused_on_all_ranks_and_the_old_one_stays() {
    let Some(size) = world_size() else { return };
    run_threads(size, PATIENT, |host| {
        let (rank, own) = connect(host);
        let table = own.table();
        let named = |name: &str| Choice::of(name.to_owned());
        let last = rank.rank + 1 == size;
        let other = only(&table, OpKind::AllReduce, false, &named("staged"));
        let refused = |table: &Table| match own.set_table(table) {
            Err(CommError::InvalidArgument { reason, .. }) => reason,
            other => panic!("{other:?}"),
        };
        let reason = refused(if last { &other } else { &table });
        assert!(reason.contains(&format!("rank {}", size - 1)), "{reason}");
        // One rank's table cannot be launched: the others learn of it.
        let unknown = only(&table, OpKind::AllReduce, false, &named("unheard_of"));
        let reason = refused(if last { &unknown } else { &table });
        assert!(reason.contains("unheard_of"), "{reason}");
        assert_eq!(own.table(), table);

        let (send, recv) = (rank.buffer(64, (rank.rank + 1) as f32), rank.buffer(64, 0.0));
        rank.sum(send, recv, 64).unwrap();
        assert_eq!(rank.get(recv, 64), vec![rank.triangle(); 64]);
        assert_eq!(calls(&rank, OpKind::AllReduce, "staged"), 0);
        own.set_table(&other).unwrap();
        rank.sum(send, recv, 64).unwrap();
        assert_eq!(rank.get(recv, 64), vec![rank.triangle(); 64]);
        assert_eq!(calls(&rank, OpKind::AllReduce, "staged"), 1);
        rank.comm.close().unwrap();
    })
    .unwrap();
}

#[test]
fn a_file_of_tables_is_what_algorithms_are_chosen_by() {
    let Some(size) = world_size() else { return };
    let rows = vec![Row { from: 0, choice: Choice::of("staged".to_owned()) }];
    let rule = Rule { op: OpKind::AllReduce, registered: false, rows, measured: Vec::new() };
    let table = Table::new("of a test", size, "a test", vec![rule]).unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), Tables::new(vec![table]).unwrap().to_string()).unwrap();
    world(size, PATIENT, &[("p2p.table", file.path().to_str().unwrap())], |rank| {
        let at = rank.buffer(64, (rank.rank + 1) as f32);
        rank.sum(at, at, 64).unwrap();
        assert_eq!(rank.get(at, 64), vec![rank.triangle(); 64]);
        assert_eq!(calls(&rank, OpKind::AllReduce, "staged"), 1);
        rank.comm.close().unwrap();
    });
}
