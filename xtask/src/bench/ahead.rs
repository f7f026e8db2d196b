//! p2p's rows against a peer's of the same run: at least so many times as fast up to a size, at least as fast above.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use anyhow::{Context, Error, Result, anyhow, ensure};

use crate::bench::row::{Form, Row};
use crate::bench::sizes::{human, parse_size};
use crate::bench::versus::{Comparison, Versus, left_out};

/// How far ahead p2p has to be.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Ahead {
    /// The peer's time by ours, at least: 1 or more.
    factor: f64,
    /// Bytes of the full buffer up to which the factor is asked for; above them, 1 is.
    up_to: u64,
}

impl FromStr for Ahead {
    type Err = Error;

    /// `N@SIZE`, for example `3@64K` or `1.5@1M`; or `1`, whatever the size.
    fn from_str(text: &str) -> Result<Self> {
        let (factor, size) = match text.split_once('@') {
            Some((factor, size)) => (factor, Some(size)),
            None => (text, None),
        };
        let factor: f64 =
            factor.trim().parse().ok().filter(|n: &f64| n.is_finite() && *n >= 1.0).with_context(|| {
                format!(
                    "{factor:?} in {text:?} is no number from 1 on; write N@SIZE, for example 3@64K, or 1"
                )
            })?;
        let up_to = size.map(parse_size).transpose().map_err(|error| anyhow!("in {text:?}: {error}"))?;
        ensure!(
            up_to.is_some() || factor == 1.0,
            "{text:?} does not say up to which size; write for example {factor}@64K (only 1 needs no size)"
        );
        Ok(Self { factor, up_to: up_to.unwrap_or(0) })
    }
}

impl fmt::Display for Ahead {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.factor == 1.0 {
            return f.write_str("at least as fast");
        }
        let up_to = human(self.up_to);
        write!(f, "at least {} times as fast up to {up_to}, and at least as fast above", self.factor)
    }
}

/// A row of p2p's in one form, beside the peer's.
#[derive(Clone, PartialEq, Debug)]
pub struct Pair {
    /// Operation, size and form.
    what: String,
    /// Bytes of the full buffer.
    bytes: u64,
    /// Our microseconds; infinite where only the peer could be measured.
    ours: f64,
    /// The peer's.
    theirs: f64,
}

/// What is to be judged.
#[derive(Debug, Default)]
pub struct Pairs {
    /// The peer's name.
    peer: String,
    pairs: Vec<Pair>,
    /// Reasons, and how many rows of which operations each one left out.
    left_out: BTreeMap<String, BTreeMap<String, usize>>,
}

impl Pairs {
    /// p2p's rows beside `peer`'s, another backend of the same run.
    pub fn of_rows(rows: &[Row], peer: &str) -> Self {
        let mut pairs = Self { peer: peer.to_owned(), ..Self::default() };
        for ours in rows.iter().filter(|row| row.backend == comm_p2p::NAME) {
            let same = |row: &&Row| {
                row.backend == peer
                    && (&row.op, &row.dtype, row.world, row.bytes, row.norm)
                        == (&ours.op, &ours.dtype, ours.world, ours.bytes, ours.norm)
            };
            let Some(theirs) = rows.iter().find(same) else {
                pairs.leave_out(ours, format!("{peer} was not measured"));
                continue;
            };
            if let Some(reason) = &theirs.skipped {
                pairs.leave_out(ours, format!("{peer}: {reason}"));
            }
            pairs.pairs.extend(Form::ALL.into_iter().filter_map(|form| {
                // Who has no time at all is not ahead; who was not timed in a form of two is not judged in it.
                let ours_us = match ours.timing(form) {
                    Some(timing) => timing.us,
                    None if ours.skipped.is_some() => f64::INFINITY,
                    None => return None,
                };
                let what = format!("{}, {form}", ours.what());
                Some(Pair { what, bytes: ours.bytes, ours: ours_us, theirs: theirs.timing(form)?.us })
            }));
        }
        pairs
    }

    /// p2p's rows beside the figures of a system that was measured right after; its own table says what was left out.
    pub fn of_versus(versus: &Versus, peer: &str) -> Self {
        let ours = versus.compared.iter().filter(|c| c.backend == comm_p2p::NAME);
        let pair = |c: &Comparison| {
            let form = if c.in_place { Form::InPlace } else { Form::OutOfPlace };
            let what = format!("{} {}, {form}", c.op, human(c.bytes));
            Pair { what, bytes: c.bytes, ours: c.ours, theirs: c.theirs }
        };
        Self { peer: peer.to_owned(), pairs: ours.map(pair).collect(), left_out: BTreeMap::new() }
    }

    fn leave_out(&mut self, row: &Row, reason: String) {
        *self.left_out.entry(reason).or_default().entry(row.op.clone()).or_default() += 1;
    }
}

impl Ahead {
    const fn needed(&self, bytes: u64) -> f64 {
        if bytes <= self.up_to { self.factor } else { 1.0 }
    }

    /// The failing rows with both figures, and what is wrong as a whole, if anything is. `tolerance` is the percentage by
    /// which the time that is asked for may be exceeded.
    pub fn judge(&self, pairs: &Pairs, tolerance: f64) -> (String, Option<String>) {
        let Pairs { peer, pairs, left_out: reasons } = pairs;
        let mut text = format!("# p2p against {peer}, which it is to be ahead of: {self}\n");
        let mut behind = 0;
        for Pair { what, bytes, ours, theirs } in pairs {
            let needed = self.needed(*bytes);
            // Written so that a time that is no number does not pass.
            let met = *ours * needed <= *theirs * (1.0 + tolerance / 100.0);
            if met {
                continue;
            }
            behind += 1;
            let figures = match ours.is_finite() {
                true => {
                    format!("p2p {ours:.2} us, {peer} {theirs:.2} us: {:.2} times as fast", theirs / ours)
                }
                false => format!("p2p not measured, {peer} {theirs:.2} us"),
            };
            text += &format!("  BEHIND {what}: {figures}, {needed} asked for\n");
        }
        text += &left_out(reasons);
        text += &format!("# {} of {} ahead as asked for", pairs.len() - behind, pairs.len());
        let problem = match (pairs.is_empty(), behind) {
            (true, _) => Some(format!("no row of p2p could be compared with one of {peer}")),
            (_, 0) => None,
            (_, behind) => Some(format!(
                "{behind} of {} rows of p2p are not as far ahead of {peer} as asked for",
                pairs.len()
            )),
        };
        (text, problem)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::row::Timing;
    use crate::bench::table::tests::row;
    use comm_core::OpKind;

    fn p2p(op: OpKind, bytes: u64, us: f64) -> Row {
        Row { backend: "p2p".into(), ..row(op, bytes, us) }
    }

    fn in_place(row: Row, us: f64) -> Row {
        Row { in_place: row.out_of_place.map(|timing| Timing { us, ..timing }), ..row }
    }

    fn judge(ahead: &str, rows: &[Row], tolerance: f64) -> (String, Option<String>) {
        ahead.parse::<Ahead>().unwrap().judge(&Pairs::of_rows(rows, "nccl"), tolerance)
    }

    #[test]
    fn the_value_says_how_many_times_and_up_to_which_size() {
        let parsed = |text: &str| text.parse::<Ahead>().unwrap();
        assert_eq!(parsed("3@64K"), Ahead { factor: 3.0, up_to: 64 << 10 });
        assert_eq!(parsed(" 1.5 @ 1MiB"), Ahead { factor: 1.5, up_to: 1 << 20 });
        assert_eq!(parsed("1").needed(0), 1.0);
        assert_eq!(parsed("1@64K").needed(1), 1.0);
        let ahead = parsed("3@64K");
        assert_eq!([0, 65536, 65537].map(|bytes| ahead.needed(bytes)), [3.0, 3.0, 1.0]);
        assert!(ahead.to_string().contains("3 times as fast up to 64K"));
        assert_eq!(parsed("1").to_string(), "at least as fast");
    }

    #[test]
    fn what_is_no_such_value_is_named_with_what_to_write() {
        for (text, part) in [
            ("3", "3@64K"),
            ("", "N@SIZE"),
            ("@64K", "N@SIZE"),
            ("0.9@64K", "from 1 on"),
            ("-3@64K", "from 1 on"),
            ("NaN@64K", "from 1 on"),
            ("inf@64K", "from 1 on"),
            ("3x@64K", "N@SIZE"),
            ("3@", "is not a size"),
            ("3@64Q", "64Q"),
        ] {
            // In one line, which is all that clap shows.
            let error = text.parse::<Ahead>().unwrap_err().to_string();
            assert!(error.contains(part) && error.contains(text), "{text:?}: {error}");
        }
    }

    #[test]
    fn rows_that_are_not_far_enough_ahead_are_listed_with_both_figures() {
        let rows = [
            p2p(OpKind::AllReduce, 65536, 4.0),
            p2p(OpKind::AllReduce, 65538, 12.0),
            p2p(OpKind::AllGather, 1024, 4.1),
            p2p(OpKind::Broadcast, 1 << 20, 12.1),
            row(OpKind::AllReduce, 65536, 12.0),
            row(OpKind::AllReduce, 65538, 12.0),
            row(OpKind::AllGather, 1024, 12.0),
            row(OpKind::Broadcast, 1 << 20, 12.0),
        ];
        let (text, problem) = judge("3@64K", &rows, 0.0);
        assert!(
            text.contains("BEHIND all_gather 1K, out of place: p2p 4.10 us, nccl 12.00 us: 2.93 times"),
            "{text}"
        );
        assert!(
            text.contains("BEHIND broadcast 1M, out of place: p2p 12.10 us, nccl 12.00 us: 0.99 times"),
            "{text}"
        );
        assert!(!text.contains("BEHIND all_reduce") && text.ends_with("2 of 4 ahead as asked for"), "{text}");
        assert!(problem.unwrap().contains("2 of 4 rows"));
        // Within 3 %, all are.
        assert_eq!(judge("3@64K", &rows, 3.0).1, None);
        assert!(judge("1", &rows, 0.0).0.ends_with("3 of 4 ahead as asked for"));
    }

    #[test]
    fn each_form_is_judged_by_its_own() {
        let ours = in_place(p2p(OpKind::AllReduce, 1024, 3.0), 5.0);
        let rows = [ours.clone(), in_place(row(OpKind::AllReduce, 1024, 12.0), 12.0)];
        let (text, problem) = judge("3@64K", &rows, 0.0);
        assert!(
            text.contains("all_reduce 1K, in place: p2p 5.00 us") && !text.contains("out of place"),
            "{text}"
        );
        assert!(problem.is_some());
        // The peer has no such form.
        assert_eq!(judge("3@64K", &[ours, row(OpKind::AllReduce, 1024, 12.0)], 0.0).1, None);
    }

    #[test]
    fn what_only_the_peer_can_do_is_behind_and_what_neither_can_is_left_out() {
        let none = |row: Row| Row { out_of_place: None, skipped: Some("no such thing".into()), ..row };
        let rows = [
            none(p2p(OpKind::AllReduce, 1024, 1.0)),
            none(p2p(OpKind::Reduce, 1024, 1.0)),
            p2p(OpKind::AllGather, 1024, 1.0),
            row(OpKind::AllReduce, 1024, 12.0),
            none(row(OpKind::Reduce, 1024, 12.0)),
        ];
        let (text, problem) = judge("3@64K", &rows, 0.0);
        assert!(
            text.contains("BEHIND all_reduce 1K, out of place: p2p not measured, nccl 12.00 us"),
            "{text}"
        );
        assert!(text.contains("reduce (1): nccl: no such thing"), "{text}");
        assert!(text.contains("all_gather (1): nccl was not measured"), "{text}");
        assert!(problem.unwrap().contains("1 of 1"));
        let broken = [p2p(OpKind::AllReduce, 1024, f64::NAN), row(OpKind::AllReduce, 1024, 12.0)];
        assert!(judge("1", &broken, 0.0).1.is_some());
    }

    #[test]
    fn comparing_nothing_does_not_pass() {
        let problem = |rows: &[Row]| judge("1", rows, 0.0).1.unwrap();
        assert!(problem(&[row(OpKind::AllReduce, 1024, 1.0)]).contains("no row of p2p"));
        assert!(problem(&[p2p(OpKind::AllReduce, 1024, 1.0)]).contains("no row of p2p"));
    }

    #[test]
    fn of_a_peer_measured_after_us_only_p2p_s_rows_count() {
        let compared = |backend: &str, theirs: f64| Comparison {
            op: "all_reduce".into(),
            backend: backend.into(),
            bytes: 1024,
            in_place: true,
            ours: 4.0,
            theirs,
            ratio: 4.0 / theirs,
            met: true,
        };
        let versus =
            Versus { compared: vec![compared("p2p", 11.0), compared("nccl", 1.0)], ..Versus::default() };
        let ahead: Ahead = "3@64K".parse().unwrap();
        let (text, problem) = ahead.judge(&Pairs::of_versus(&versus, "PyTorch"), 0.0);
        assert!(
            text.contains("all_reduce 1K, in place: p2p 4.00 us, PyTorch 11.00 us: 2.75 times"),
            "{text}"
        );
        assert!(problem.unwrap().contains("1 of 1 rows of p2p"));
    }
}
