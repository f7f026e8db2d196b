use comm_core::tuning::{Choice, Row};

use super::*;

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
        sizes: vec![1, 16, 17, 1024],
        tokens: vec![1, 2],
        hidden: 8192,
        dtype: DType::BF16,
        reps: 1,
        budget: 1.0,
    };
    let bytes = |op| job.cases(op, 8).iter().map(|case| case.bytes).collect::<Vec<_>>();
    assert_eq!(bytes(OpKind::AllGather), [16, 1024]);
    assert_eq!(bytes(OpKind::AllReduceRmsNorm), [16_384, 32_768]);
}
