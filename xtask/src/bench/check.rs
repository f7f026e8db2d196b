//! Measured rows against targets or a peer of the targets' file: slower is a failure, out of place and in place alike. A
//! figure of the file is one of an operation, whichever way its operands lie.

use std::str::FromStr;

use anyhow::{Result, ensure};

use crate::bench::row::{Form, Row};
use crate::bench::targets::{Peers, Targets};

/// What measured times are held against.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Against {
    /// The file's targets.
    Target,
    /// A peer's figures, by its name in the file.
    Peer(String),
}

impl FromStr for Against {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(if text == "target" { Self::Target } else { Self::Peer(text.to_owned()) })
    }
}

/// The comparison of one row.
#[derive(Debug)]
pub struct Verdict {
    /// Operation, size and form.
    pub what: String,
    /// Microseconds measured.
    pub ours: f64,
    /// The fastest peer's name and microseconds.
    pub best_peer: Option<(String, f64)>,
    /// Microseconds allowed.
    pub bound: f64,
    /// Whether the measured time is within the bound.
    pub met: bool,
}

/// Compares every row that the file has a figure for, in each form that was measured. `tolerance` is the percentage by which a bound may be exceeded.
///
/// # Errors
/// When no row has a figure: a check that compares nothing must not pass.
pub fn compare(rows: &[Row], targets: &Targets, against: &Against, tolerance: f64) -> Result<Vec<Verdict>> {
    let mut verdicts = Vec::new();
    for row in rows {
        let Some((target, peers)) = targets.find(row) else { continue };
        let bound = match against {
            Against::Target => target,
            Against::Peer(name) => match peers.get(name) {
                Some(&time) => time,
                None => continue,
            },
        };
        let mut verdict = |what: String, ours: f64| {
            let met = ours <= bound * (1.0 + tolerance / 100.0);
            verdicts.push(Verdict { what, ours, best_peer: best(peers), bound, met });
        };
        for form in Form::ALL {
            if let Some(timing) = row.timing(form) {
                verdict(format!("{}, {form}", row.what()), timing.us);
            }
        }
        // A row that could not be measured is a target that was not met.
        if Form::ALL.into_iter().all(|form| row.timing(form).is_none()) {
            verdict(row.what(), f64::INFINITY);
        }
    }
    ensure!(
        !verdicts.is_empty(),
        "none of the {} measured rows has a figure in the targets file (it is for {} and its sizes)",
        rows.len(),
        targets.machine.gpus
    );
    Ok(verdicts)
}

fn best(peers: &Peers) -> Option<(String, f64)> {
    peers.iter().min_by(|a, b| a.1.total_cmp(b.1)).map(|(name, &time)| (name.clone(), time))
}

/// The comparison as a table, and how many bounds were missed.
pub fn report(verdicts: &[Verdict], against: &Against) -> (String, usize) {
    let bound = match against {
        Against::Target => "target",
        Against::Peer(name) => name,
    };
    let mut text = format!(
        "# {:<44} {:>10} {:>10} {:<24} {:>10}  verdict\n",
        "times in us", "ours", "best peer", "", bound
    );
    for v in verdicts {
        let (name, time) =
            v.best_peer.as_ref().map_or(("-", f64::NAN), |(name, time)| (name.as_str(), *time));
        let verdict = if v.met {
            format!("ok ({:.2}x)", v.bound / v.ours)
        } else if v.ours.is_finite() {
            format!("SLOWER by {:.1} %", (v.ours / v.bound - 1.0) * 100.0)
        } else {
            "NOT MEASURED".to_owned()
        };
        text += &format!(
            "  {:<44} {:>10.2} {:>10.2} {:<24} {:>10.2}  {verdict}\n",
            v.what,
            v.ours,
            time,
            format!("({name})"),
            v.bound
        );
    }
    let missed = verdicts.iter().filter(|v| !v.met).count();
    text += &format!("# {} of {} met", verdicts.len() - missed, verdicts.len());
    (text, missed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::row::Timing;
    use crate::bench::table::tests::row;
    use crate::bench::targets::tests::repository_targets;
    use comm_core::OpKind;

    #[test]
    fn a_slower_figure_fails_and_a_faster_one_passes() {
        let targets = repository_targets();
        // The target at 1 MiB is 12 us.
        let rows = [row(OpKind::AllReduce, 1 << 20, 12.01), row(OpKind::AllGather, 1 << 20, 8.9)];
        let verdicts = compare(&rows, &targets, &Against::Target, 0.0).unwrap();
        assert_eq!(verdicts.iter().map(|v| v.met).collect::<Vec<_>>(), [false, true]);
        assert_eq!(verdicts[0].best_peer, Some(("pytorch_two_shot".into(), 14.0)));
        let (text, missed) = report(&verdicts, &Against::Target);
        assert_eq!(missed, 1);
        assert!(
            text.contains("all_reduce 1M") && text.contains("SLOWER") && text.contains("1 of 2 met"),
            "{text}"
        );
    }

    #[test]
    fn each_form_that_was_measured_is_judged_and_named() {
        let targets = repository_targets();
        let mut both = row(OpKind::AllReduce, 1 << 20, 11.0);
        both.in_place = both.out_of_place.map(|timing| Timing { us: 12.5, ..timing });
        let verdicts = compare(&[both.clone()], &targets, &Against::Target, 0.0).unwrap();
        let seen: Vec<_> = verdicts.iter().map(|v| (v.what.as_str(), v.met)).collect();
        assert_eq!(seen, [("all_reduce 1M, out of place", true), ("all_reduce 1M, in place", false)]);
        let (text, missed) = report(&verdicts, &Against::Target);
        let slower: Vec<_> = text.lines().filter(|line| line.contains("SLOWER")).collect();
        assert!(missed == 1 && slower.len() == 1 && slower[0].contains("in place"), "{text}");
        // The form that was measured alone is not held against the one that was not.
        both.out_of_place = None;
        let verdicts = compare(&[both], &targets, &Against::Target, 0.0).unwrap();
        assert_eq!(verdicts.iter().map(|v| v.what.as_str()).collect::<Vec<_>>(), ["all_reduce 1M, in place"]);
    }

    #[test]
    fn a_peer_can_be_the_bound_with_a_tolerance() {
        let targets = repository_targets();
        // NCCL takes 30.2 us at 1 MiB; 3 % more is 31.1.
        let against = "nccl".parse().unwrap();
        let met =
            |us| compare(&[row(OpKind::AllReduce, 1 << 20, us)], &targets, &against, 3.0).unwrap()[0].met;
        assert!(met(31.0));
        assert!(!met(31.2));
    }

    #[test]
    fn what_was_not_measured_is_not_met() {
        let mut skipped = row(OpKind::AllReduce, 1 << 20, 1.0);
        skipped.out_of_place = None;
        skipped.skipped = Some("not here".into());
        let verdicts = compare(&[skipped], &repository_targets(), &Against::Target, 0.0).unwrap();
        assert!(!verdicts[0].met);
        assert!(report(&verdicts, &Against::Target).0.contains("NOT MEASURED"));
    }

    #[test]
    fn comparing_nothing_is_an_error() {
        let rows = [row(OpKind::AllReduce, 3, 1.0)];
        assert!(compare(&rows, &repository_targets(), &Against::Target, 0.0).is_err());
    }
}
