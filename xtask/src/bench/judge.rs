//! What a run's rows are held against, one thing after the other: right results, a targets file, a peer, p2p's lead.
//!
//! Every table is printed, whatever the ones before it say; what is wrong is collected.

use anyhow::{Result, ensure};

use crate::bench::ahead::Pairs;
use crate::bench::row::Row;
use crate::bench::targets::Targets;
use crate::bench::versus::Versus;
use crate::bench::{BenchArgs, check, choose, table};

/// Checks that `--ahead`, if given, has two sides to compare.
///
/// # Errors
/// When one of them is not measured.
pub fn can_be_ahead(args: &BenchArgs, gpus: &Result<(), String>) -> Result<()> {
    if args.ahead.is_none() {
        return Ok(());
    }
    let measured = |backend: &str| choose::may_measure(&args.backend, gpus.is_ok(), backend);
    let reason = gpus.as_ref().err().map_or_else(String::new, |reason| format!(" ({reason})"));
    ensure!(measured(comm_p2p::NAME), "--ahead judges p2p, which is not among the backends{reason}");
    ensure!(
        args.peer.is_some() || measured(comm_nccl::NAME),
        "--ahead holds p2p against nccl in the same run: name both (--backend p2p,nccl), or another system by --peer"
    );
    Ok(())
}

/// Judges the rows as `args` ask; `versus` is the comparison with the peer, where one was measured. Prints the tables, and
/// returns what is wrong.
pub fn problems(
    args: &BenchArgs,
    rows: &[Row],
    targets: Option<&Targets>,
    versus: Option<&Versus>,
) -> Vec<String> {
    let mut problems = Vec::new();
    let wrong = table::wrong(rows);
    if wrong > 0 {
        problems.push(format!("{wrong} elements are wrong"));
    }
    let tolerance = args.tolerance.unwrap_or(0.0);
    if let Some(targets) = targets {
        match check::compare(&own(rows), targets, &args.against, tolerance) {
            Ok(verdicts) => {
                let (text, missed) = check::report(&verdicts, &args.against);
                println!("{text}");
                if missed > 0 {
                    problems.push(format!("{missed} of {} checked times are exceeded", verdicts.len()));
                }
            }
            Err(error) => problems.push(format!("{error:#}")),
        }
    }
    if let Some(versus) = versus.filter(|_| args.check_peer) {
        match (versus.compared.len(), versus.slower()) {
            (0, _) => problems.push("no row could be compared with PyTorch's".into()),
            (_, 0) => {}
            (compared, slower) => {
                problems.push(format!("{slower} of {compared} rows are slower than PyTorch's"));
            }
        }
    }
    if let Some(ahead) = &args.ahead {
        let pairs = match versus {
            Some(versus) => Pairs::of_versus(versus, "PyTorch"),
            None => Pairs::of_rows(rows, comm_nccl::NAME),
        };
        let (text, problem) = ahead.judge(&pairs, tolerance);
        println!("{text}");
        problems.extend(problem);
    }
    problems
}

/// The rows that a targets file is about: p2p's, beside which others are measured for comparison; all where p2p is not
/// measured.
fn own(rows: &[Row]) -> Vec<Row> {
    let of_p2p: Vec<Row> = rows.iter().filter(|row| row.backend == comm_p2p::NAME).cloned().collect();
    if of_p2p.is_empty() { rows.to_vec() } else { of_p2p }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::row::Timing;
    use crate::bench::table::tests::row;
    use crate::bench::targets::tests::repository_targets;
    use crate::bench::tests::parse;
    use comm_core::OpKind;

    #[test]
    fn a_lead_needs_p2p_and_something_to_be_ahead_of() {
        let (there, none) = (Ok(()), Err("no driver".to_owned()));
        let refused = |words: &[&str], gpus| {
            can_be_ahead(&parse(words), gpus).err().map_or_else(String::new, |error| error.to_string())
        };
        assert_eq!(refused(&["--ahead", "3@64K"], &there), "");
        assert!(refused(&["--ahead", "3@64K"], &none).contains("no driver"));
        assert!(refused(&["--ahead", "1", "--backend", "p2p"], &there).contains("--backend p2p,nccl"));
        assert!(refused(&["--ahead", "1", "--backend", "nccl"], &there).contains("judges p2p"));
        assert_eq!(refused(&["--ahead", "1", "--backend", "p2p", "--peer", "torch"], &there), "");
        assert_eq!(refused(&["--backend", "host"], &none), "");
    }

    #[test]
    fn one_problem_does_not_hide_another() {
        let mut ours = row(OpKind::AllReduce, 1 << 20, 13.0);
        ours.backend = "p2p".into();
        ours.in_place = ours.out_of_place.map(|timing| Timing { wrong: 7, ..timing });
        let rows = [ours, row(OpKind::AllReduce, 1 << 20, 12.5)];
        let args = parse(&["--check", "targets.json", "--ahead", "1"]);
        let found = problems(&args, &rows, Some(&repository_targets()), None);
        // NCCL's row is not held against the target of 12 us: it is there for comparison.
        let expected = ["7 elements are wrong", "2 of 2 checked times", "1 of 1 rows of p2p"];
        assert_eq!(found.len(), 3, "{found:?}");
        for (problem, part) in found.iter().zip(expected) {
            assert!(problem.contains(part), "{problem}");
        }
        assert!(problems(&parse(&[]), &rows[1..], None, None).is_empty());
        // By itself it is.
        assert_eq!(problems(&parse(&[]), &rows[1..], Some(&repository_targets()), None).len(), 1);
    }

    #[test]
    fn a_peer_that_was_measured_is_what_p2p_is_held_against() {
        let ours = Row { backend: "p2p".into(), ..row(OpKind::AllReduce, 1 << 20, 13.0) };
        let rows = [ours, row(OpKind::AllReduce, 1 << 20, 14.0)];
        let args = parse(&["--peer", "torch", "--check-peer", "--ahead", "1"]);
        let found = problems(&args, &rows, None, Some(&Versus::default()));
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[1].contains("one of PyTorch"), "{found:?}");
        assert!(problems(&parse(&["--ahead", "1"]), &rows, None, None).is_empty());
    }
}
