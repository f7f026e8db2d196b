use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use comm_core::tuning::{Choice, Row};
use comm_core::{
    AlgorithmUsage, CommInfo, CreateContext, DeviceAddr, DeviceComm, HostFactory, MemoryKind, OpQuery,
    ReduceOp, StreamHandle, Support, create_with,
};

use super::*;
use crate::bench::plan::Case;
use crate::device::HostDevice;
use crate::rank::RankContext;

fn choice(name: &str) -> Choice {
    Choice::of(name.to_owned())
}

fn measured(world: usize, complete: &[(OpKind, bool)]) -> Measured {
    let rule = |op, registered| Rule {
        op,
        registered,
        rows: vec![Row { from: 0, choice: choice("old") }],
        measured: Vec::new(),
    };
    let rules = comm_p2p::TUNABLE.iter().map(|&(op, registered)| rule(op, registered)).collect();
    let sizes = [(1 << 10, [2.0, 3.0]), (1 << 20, [20.0, 10.0])];
    let point = |(bytes, [one, two]): (u64, [f64; 2])| Point {
        bytes,
        times: vec![(choice("one"), one), (choice("two"), two)],
    };
    Measured {
        gpu: "GPU".into(),
        in_force: Some(Table::new("another", world, "by hand", rules).unwrap()),
        points: complete.iter().flat_map(|&(op, to)| sizes.map(|size| (op, to, point(size)))).collect(),
        complete: complete.to_vec(),
        wrong: 0,
    }
}

fn names(table: &Table, op: OpKind) -> Vec<&str> {
    table.rule(op, false).unwrap().rows.iter().map(|row| row.choice.algorithm.as_str()).collect()
}

#[test]
fn measured_rules_replace_those_in_force_and_the_rest_stays() {
    let one = measured(4, &[(OpKind::AllReduce, false)]);
    let table = one.table(&Tables::default(), 4, 0.03).unwrap().unwrap();
    assert_eq!((table.gpu(), table.world()), ("GPU", 4));
    assert_eq!(names(&table, OpKind::AllReduce), ["one", "two"]);
    assert_eq!(names(&table, OpKind::Broadcast), ["old"]);
    assert!(table.source().contains("all_reduce measured") && table.source().contains("by hand"));
    assert_eq!(table.rule(OpKind::AllReduce, false).unwrap().measured.len(), 2);

    // A second run for another operation builds on the file of the first.
    let mut file = Tables::default();
    file.insert(table);
    let second = measured(4, &[(OpKind::Broadcast, false)]).table(&file, 4, 0.03).unwrap().unwrap();
    assert_eq!(names(&second, OpKind::AllReduce), ["one", "two"]);
    assert_eq!(names(&second, OpKind::Broadcast), ["one", "two"]);
    // For another number of ranks it does not.
    let other = measured(2, &[(OpKind::Broadcast, false)]).table(&file, 2, 0.03).unwrap().unwrap();
    assert_eq!(names(&other, OpKind::AllReduce), ["old"]);
}

#[test]
fn a_rule_with_no_choice_at_a_size_leaves_the_others_to_the_table() {
    let rules = [(OpKind::AllReduce, false), (OpKind::Broadcast, false)];
    let mut some = measured(4, &rules);
    assert_eq!(some.without_choice().count(), 0);
    let point = some.points.iter_mut().find(|point| point.0 == OpKind::AllReduce).unwrap();
    point.2.times.clear();
    assert_eq!(some.without_choice().collect::<Vec<_>>(), rules[..1]);
    let table = some.table(&Tables::default(), 4, 0.03).unwrap().unwrap();
    assert!(table.source().starts_with("broadcast measured"), "{}", table.source());
    some.complete.pop();
    assert_eq!(some.table(&Tables::default(), 4, 0.03).unwrap(), None);
}

#[test]
fn without_a_complete_rule_there_is_no_table() {
    assert_eq!(measured(4, &[]).table(&Tables::default(), 4, 0.03).unwrap(), None);
    let all = measured(4, &comm_p2p::TUNABLE).table(&Tables::default(), 4, 0.03).unwrap().unwrap();
    assert_eq!(all.source(), "measured by tune on 4 x GPU");
}

#[test]
fn a_file_is_written_whole_and_read_again() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("table.json");
    assert_eq!(read(&path).unwrap(), Tables::default());
    let mut tables = Tables::default();
    let all = measured(8, &comm_p2p::TUNABLE).table(&Tables::default(), 8, 0.03).unwrap().unwrap();
    tables.insert(all);
    write(&path, &tables).unwrap();
    assert_eq!(read(&path).unwrap(), tables);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    std::fs::write(&path, "precious").unwrap();
    assert!(format!("{:#}", read(&path).unwrap_err()).contains("no file of tables"));
}

#[test]
fn rules_are_named_by_their_operations() {
    assert_eq!(parse_rules("all").unwrap().len(), comm_p2p::TUNABLE.len());
    let two = parse_rules("all_reduce, reduce_scatter").unwrap();
    assert_eq!(two, [(OpKind::AllReduce, false), (OpKind::AllReduce, true), (OpKind::ReduceScatter, false)]);
    assert!(
        parse_rules("barrier").unwrap_err().to_string().contains("known are all, all_reduce, all_gather")
    );
    assert!(rank::check_backend("nccl").is_err() && rank::check_backend("p2p").is_ok());
}

#[test]
fn sizes_that_fall_together_are_measured_once() {
    let job = TuneJob {
        rules: Vec::new(),
        sizes: vec![1, 256, 257, 1024],
        tokens: vec![1, 2],
        hidden: 8192,
        dtype: DType::BF16,
        reps: 1,
        budget: 1.0,
    };
    let bytes = |op| job.cases(op, 8).iter().map(|case| case.bytes).collect::<Vec<_>>();
    assert_eq!(bytes(OpKind::AllGather), [256, 1024]);
    assert_eq!(bytes(OpKind::AllReduceRmsNorm), [16_384, 32_768]);
}

/// The host backend with algorithms: one-shot is fast for small sizes, two-shot for large ones, cells sum wrongly, and
/// shapes make no difference.
struct Fake {
    inner: Arc<dyn DeviceComm>,
    table: Mutex<Table>,
}

impl Fake {
    fn chosen(&self, bytes: u64) -> Choice {
        let table = self.table.lock().unwrap();
        choice(&table.choose(OpKind::AllReduce, false, bytes).unwrap().algorithm)
    }
}

impl rank::Tunable for Fake {
    fn gpu(&self) -> &str {
        "GPU"
    }

    fn table(&self) -> Table {
        self.table.lock().unwrap().clone()
    }

    fn set_table(&self, table: &Table) -> comm_core::Result<()> {
        *self.table.lock().unwrap() = table.clone();
        Ok(())
    }

    fn planned(&self, case: &Case, _size: usize, _registered: bool) -> Option<Choice> {
        Some(self.chosen(case.bytes))
    }
}

// SAFETY: everything is passed on to a backend that keeps the contract; only results are spoilt, within their range.
unsafe impl DeviceComm for Fake {
    fn info(&self) -> &CommInfo {
        self.inner.info()
    }

    fn supports(&self, query: &OpQuery) -> Support {
        self.inner.supports(query)
    }

    fn usage(&self) -> Vec<AlgorithmUsage> {
        Vec::new()
    }

    unsafe fn all_reduce(
        &self,
        send: DeviceAddr,
        recv: DeviceAddr,
        count: usize,
        dtype: DType,
        op: ReduceOp,
        stream: StreamHandle,
    ) -> comm_core::Result<()> {
        let bytes = (count * dtype.size()) as u64;
        let algorithm = self.chosen(bytes).algorithm;
        let fastest = if bytes < 64 << 10 { "one_shot" } else { "two_shot" };
        let slow = algorithm != fastest;
        std::thread::sleep(Duration::from_millis(if slow { 20 } else { 1 }));
        // SAFETY: the caller vouches for the operands; the backend has written the result's first byte.
        unsafe {
            self.inner.all_reduce(send, recv, count, dtype, op, stream)?;
            if algorithm == "cells" && self.rank() == 0 {
                *(recv.0 as *mut u8) ^= 0x40;
            }
        }
        Ok(())
    }

    fn poll(&self) -> comm_core::Result<()> {
        self.inner.poll()
    }

    fn abort(&self) {
        self.inner.abort();
    }

    fn close(&self) -> comm_core::Result<()> {
        self.inner.close()
    }
}

#[test]
fn ranks_measure_alike_and_wrong_algorithms_are_found() {
    let old = measured(3, &[]).in_force.unwrap();
    let rows = vec![Row { from: 0, choice: choice("two_shot") }];
    let rule = Rule { op: OpKind::AllReduce, registered: false, rows, measured: Vec::new() };
    let old = old.with_rule(rule).unwrap();
    let job = TuneJob {
        rules: vec![(OpKind::AllReduce, false)],
        sizes: vec![4 << 10, 256 << 10],
        tokens: Vec::new(),
        hidden: 1,
        dtype: DType::F32,
        reps: 3,
        budget: 60.0,
    };
    let reports = comm_core::run_threads(3, Duration::from_secs(20), |host| {
        let context = RankContext::of_test(Arc::clone(&host)).unwrap();
        let device = HostDevice::default();
        let inner = create_with(&HostFactory, &CreateContext::new(host, MemoryKind::Host)).unwrap();
        let fake = Arc::new(Fake { inner, table: Mutex::new(old.clone()) });
        let comm: Arc<dyn DeviceComm> = Arc::clone(&fake) as _;
        let mut reports = Vec::new();
        rank::measure(&job, &context, &device, (&comm, &*fake), &mut |event| reports.push(event)).unwrap();
        comm.close().unwrap();
        reports
    })
    .unwrap();
    let algorithms: BTreeSet<_> =
        comm_p2p::candidates(OpKind::AllReduce).into_iter().map(|choice| choice.algorithm).collect();
    for reports in &reports {
        let [TuneEvent::Started { gpu, tables }, rest @ ..] = &reports[..] else { panic!("{reports:?}") };
        assert_eq!((&**gpu, Tables::parse(tables).unwrap().all()), ("GPU", &[old.clone()][..]));
        let points: Vec<Point> = rest
            .iter()
            .map(|event| {
                let TuneEvent::Explored { bytes, times, wrong, measurements, cut_short, .. } = event else {
                    panic!("{event:?}");
                };
                // One of each algorithm; what was in force came first.
                assert_eq!((*measurements, *cut_short), (algorithms.len(), false));
                assert_eq!(times[0].0, choice("two_shot"));
                assert!(
                    wrong.iter().all(|(choice, count)| choice.algorithm == "cells" && *count == 2),
                    "{wrong:?}"
                );
                assert_eq!(wrong.len(), 1);
                Point { bytes: *bytes, times: times.clone() }
            })
            .collect();
        let rows = pick::pick(&points, 0.03).unwrap();
        let names: Vec<_> = rows.iter().map(|row| row.choice.algorithm.as_str()).collect();
        assert_eq!(names, ["one_shot", "two_shot"]);
    }
}
