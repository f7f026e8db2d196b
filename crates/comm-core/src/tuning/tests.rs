//! Of the choice, the rules of a table, and its text.

use proptest::prelude::*;

use super::*;

fn row(from: u64, algorithm: &str) -> Row {
    Row { from, choice: Choice::of(algorithm.to_owned()) }
}

fn rule(op: OpKind, registered: bool, rows: Vec<Row>) -> Rule {
    Rule { op, registered, rows, measured: Vec::new() }
}

fn table(world: usize, rules: Vec<Rule>) -> Result<Table> {
    Table::new("GPU", world, "a test", rules)
}

fn two_rows(op: OpKind, registered: bool) -> Rule {
    rule(op, registered, vec![row(0, "a"), row(100, "b")])
}

#[test]
fn a_row_holds_up_to_the_next_one() {
    let table = table(4, vec![two_rows(OpKind::AllReduce, false)]).unwrap();
    let name = |registered, bytes| {
        table.choose(OpKind::AllReduce, registered, bytes).map(|choice| choice.algorithm.as_str())
    };
    assert_eq!([name(false, 0), name(false, 99), name(false, 100)], [Some("a"), Some("a"), Some("b")]);
    // Without a rule of its own, a registered result is as any other; the reverse would not be right.
    assert_eq!(name(true, u64::MAX), Some("b"));
    assert_eq!(table.choose(OpKind::AllGather, false, 1), None);
    let registered = table.with_rule(rule(OpKind::AllReduce, true, vec![row(0, "c")])).unwrap();
    assert_eq!(registered.choose(OpKind::AllReduce, true, 1).unwrap().algorithm, "c");
    assert_eq!(registered.choose(OpKind::AllReduce, false, 1).unwrap().algorithm, "a");
}

#[test]
fn a_bad_table_is_refused_with_the_reason() {
    let one = |rows| table(8, vec![rule(OpKind::Broadcast, false, rows)]);
    let zero = Row { from: 0, choice: Choice { grid: Some(0), ..Choice::of("a".to_owned()) } };
    let twice = vec![two_rows(OpKind::AllReduce, true), two_rows(OpKind::AllReduce, true)];
    let bad = [
        (table(1, Vec::new()), "fewer than 2"),
        (table(2, twice), "two rules"),
        (one(Vec::new()), "no rows"),
        (one(vec![row(1, "a")]), "from 1 on, not from 0"),
        (one(vec![row(0, "a"), row(5, "b"), row(5, "c")]), "5 on follows one from 5"),
        (one(vec![zero]), "zero"),
        (one((0..=MOST_ROWS as u64).map(|from| row(from, "a")).collect()), "at most"),
    ];
    for (table, reason) in bad {
        match table {
            Err(error @ CommError::InvalidArgument { .. }) => {
                assert!(error.to_string().contains(reason), "{error}");
            }
            other => panic!("{reason}: {other:?}"),
        }
    }
}

#[test]
fn a_bad_text_is_refused_with_the_reason() {
    let with = |rules: &str| {
        format!(
            r#"{{"schema": 1, "tables": [{{"gpu": "G", "world": 2, "source": "s", "rules": [{rules}]}}]}}"#
        )
    };
    let rows = r#""rows": [{"from": 0, "algorithm": "a"}]"#;
    for (text, reason) in [
        (String::new(), "EOF"),
        (r#"{"schema": 2, "tables": []}"#.to_owned(), "schema 2"),
        (with(&format!(r#"{{"op": "all_to_most", {rows}}}"#)), "all_to_most"),
        (with(&format!(r#"{{"op": "all_reduce", {rows}, "colour": 1}}"#)), "colour"),
        (with(r#"{"op": "all_reduce", "rows": [{"from": -1, "algorithm": "a"}]}"#), "-1"),
        (with(r#"{"op": "all_reduce", "rows": []}"#), "no rows"),
        (" ".repeat((4 << 20) + 1), "at most"),
    ] {
        let error = Tables::parse(&text).unwrap_err().to_string();
        assert!(error.contains("table") && error.contains(reason), "{error}");
    }
    assert!(Tables::parse(&with(&format!(r#"{{"op": "all_reduce", {rows}}}"#))).is_ok());
    let same = table(2, Vec::new()).unwrap();
    assert!(Tables::new(vec![same.clone(), same]).is_err());
}

#[test]
fn the_nearest_table_is_of_the_gpu_then_of_the_world() {
    let of = |gpu: &str, world| Table::new(gpu, world, "a test", Vec::new()).unwrap();
    let tables = Tables::new(vec![of("A", 2), of("A", 4), of("A", 8), of("B", 8)]).unwrap();
    let nearest = |gpu, world| tables.nearest(gpu, world).map(|table| (table.gpu(), table.world()));
    assert_eq!(nearest("A", 4), Some(("A", 4)));
    assert_eq!(nearest("A", 3), Some(("A", 4)));
    assert_eq!(nearest("A", 6), Some(("A", 8)));
    assert_eq!(nearest("B", 2), Some(("B", 8)));
    assert_eq!(nearest("C", 2), Some(("A", 2)));
    assert_eq!(Tables::default().nearest("A", 2), None);
    let exact = |gpu, world| tables.of_world(gpu, world).map(Table::gpu);
    assert_eq!([exact("B", 8), exact("C", 8), exact("A", 5)], [Some("B"), Some("A"), None]);
}

#[test]
fn digests_tell_choices_apart_and_nothing_else() {
    let base =
        table(4, vec![two_rows(OpKind::AllReduce, false), two_rows(OpKind::AllGather, false)]).unwrap();
    let mut same = base.clone();
    same.rules.reverse();
    same.source = "elsewhere".into();
    same.rules[0].measured.push(Measured { bytes: 1, us: 2.0, best: BTreeMap::new() });
    assert_eq!(base.digest(), same.digest());
    assert_eq!(base.digest().len(), 16);
    let mut others = vec![base.clone(); 4];
    others[0].rules[0].rows[1].from += 1;
    others[1].rules[0].rows[1].choice.block = Some(64);
    others[2].rules[0].rows[1].choice.algorithm = "c".into();
    others[3].rules[0].registered = true;
    for other in others {
        assert_ne!(base.digest(), other.digest(), "{other:?}");
    }
}

#[test]
fn names_become_algorithms_or_an_error() {
    let table = table(4, vec![two_rows(OpKind::AllReduce, false)]).unwrap();
    let known = table.resolve(|_, choice| Ok(choice.algorithm.len())).unwrap();
    assert_eq!(known.choose(OpKind::AllReduce, false, 7).unwrap().algorithm, 1);
    let only_a = |_, choice: &Choice| match choice.algorithm.as_str() {
        "a" => Ok(()),
        other => Err(invalid(format!("{other} is unknown"))),
    };
    assert!(table.resolve(only_a).unwrap_err().to_string().contains("b is unknown"));
}

fn any_rule() -> impl Strategy<Value = Rule> {
    let parameter = || proptest::option::of(1..u32::MAX);
    let choice = ("[a-z_\"é]{1,8}", parameter(), parameter(), parameter(), parameter())
        .prop_map(|(algorithm, grid, block, chunk, units)| Choice { algorithm, grid, block, chunk, units });
    let rows = (choice.clone(), proptest::collection::btree_map(1..u64::MAX, choice, 0..8)).prop_map(
        |(first, rest)| {
            let rest = rest.into_iter().map(|(from, choice)| Row { from, choice });
            std::iter::once(Row { from: 0, choice: first }).chain(rest).collect::<Vec<_>>()
        },
    );
    // To a hundredth, as tuning writes it: JSON's numbers do not carry the last bits of any.
    let us = || (0_u32..100_000_000).prop_map(|hundredths| f64::from(hundredths) / 100.0);
    let best = proptest::collection::btree_map("[a-z]{1,4}", us(), 0..3);
    let measured = (any::<u64>(), us(), best).prop_map(|(bytes, us, best)| Measured { bytes, us, best });
    let op = proptest::sample::select(OpKind::COLLECTIVES.to_vec());
    (op, any::<bool>(), rows, proptest::collection::vec(measured, 0..3))
        .prop_map(|(op, registered, rows, measured)| Rule { op, registered, rows, measured })
}

proptest! {
    #[test]
    fn every_size_has_the_last_row_that_begins_at_or_below_it(rule in any_rule(), bytes in any::<u64>()) {
        let table = table(2, vec![rule.clone()]).unwrap();
        for bytes in [0, bytes, u64::MAX].into_iter().chain(rule.rows.iter().map(|row| row.from)) {
            let expected = rule.rows.iter().rev().find(|row| row.from <= bytes).map(|row| &row.choice);
            prop_assert_eq!(table.choose(rule.op, true, bytes), expected);
            prop_assert!(expected.is_some());
        }
    }

    #[test]
    fn text_is_read_as_it_was_written(rule in any_rule(), world in 2_usize..100, source in ".{0,20}") {
        let tables = Tables::new(vec![
            Table::new("a \"GPU\"", world, source, vec![rule]).unwrap(),
            Table::new("none", world, "", Vec::new()).unwrap(),
        ]).unwrap();
        let read = Tables::parse(&tables.to_string()).unwrap();
        prop_assert_eq!(&read.to_string(), &tables.to_string());
        for (read, written) in read.all().iter().zip(tables.all()) {
            prop_assert_eq!(read.digest(), written.digest());
        }
        prop_assert_eq!(read, tables);
    }
}
