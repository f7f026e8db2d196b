//! Our rows beside the peer's figures of the same run: a table with a verdict per row.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::bench::peer::{Figure, cannot_measure};
use crate::bench::row::{Form, Row};
use crate::bench::sizes::human;

/// One row compared.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Comparison {
    /// The operation's name.
    pub op: String,
    /// Our backend's name.
    pub backend: String,
    /// Bytes of the full buffer.
    pub bytes: u64,
    /// Whether the operands coincide.
    pub in_place: bool,
    /// Our microseconds, in the form that the peer was measured in.
    pub ours: f64,
    /// The peer's.
    pub theirs: f64,
    /// Ours by theirs: below 1, we are faster.
    pub ratio: f64,
    /// Whether we are within the tolerance.
    pub met: bool,
}

/// Every row is either compared or left out with a reason.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Versus {
    /// Rows that both measured.
    pub compared: Vec<Comparison>,
    /// Reasons, and how many rows of which operations each one left out.
    pub left_out: BTreeMap<String, BTreeMap<String, usize>>,
}

/// Compares. `tolerance` is the percentage by which we may be slower; `bad_end` is why the peer measured no more.
pub fn compare(rows: &[Row], figures: &[Figure], bad_end: Option<&str>, tolerance: f64) -> Versus {
    let mut versus = Versus::default();
    for row in rows {
        match compare_row(row, figures, bad_end, tolerance) {
            Ok(comparison) => versus.compared.push(comparison),
            Err(reason) => {
                *versus.left_out.entry(reason).or_default().entry(row.op.clone()).or_default() += 1;
            }
        }
    }
    versus
}

fn compare_row(
    row: &Row,
    figures: &[Figure],
    bad_end: Option<&str>,
    tolerance: f64,
) -> Result<Comparison, String> {
    if let Some(reason) = cannot_measure(row) {
        return Err(reason);
    }
    let same = |figure: &&Figure| {
        (&figure.op, &figure.dtype, figure.bytes, figure.world) == (&row.op, &row.dtype, row.bytes, row.world)
    };
    let figure = figures.iter().find(same).ok_or_else(|| {
        bad_end.map_or_else(
            || "PyTorch printed no figure".to_owned(),
            |why| format!("PyTorch's script failed: {why}"),
        )
    })?;
    let theirs =
        figure.us.ok_or_else(|| figure.reason.clone().unwrap_or_else(|| "PyTorch gave no time".into()))?;
    let form = if figure.in_place { Form::InPlace } else { Form::OutOfPlace };
    let ours = row.timing(form).ok_or("the two were not measured in the same form (in place or not)")?.us;
    Ok(Comparison {
        op: row.op.clone(),
        backend: row.backend.clone(),
        bytes: row.bytes,
        in_place: figure.in_place,
        ours,
        theirs,
        ratio: ours / theirs,
        met: ours <= theirs * (1.0 + tolerance / 100.0),
    })
}

impl Versus {
    /// How many rows are slower than the tolerance allows.
    pub fn slower(&self) -> usize {
        self.compared.iter().filter(|comparison| !comparison.met).count()
    }

    /// The comparison as a table.
    pub fn table(&self, peer: &str, tolerance: f64) -> String {
        let mut text = format!(
            "# against {peer}: us per operation in CUDA graphs, in place where there is such a form, tolerance {tolerance} %\n"
        );
        text += &format!(
            "# {:<16} {:>8} {:>8} {:>10} {:>10} {:>7}  verdict\n",
            "op", "bytes", "backend", "ours", "PyTorch", "ratio"
        );
        for c in &self.compared {
            let verdict = if c.met { "ok" } else { "SLOWER" };
            text += &format!(
                "  {:<16} {:>8} {:>8} {:>10.2} {:>10.2} {:>7.3}  {verdict}\n",
                c.op,
                human(c.bytes),
                c.backend,
                c.ours,
                c.theirs,
                c.ratio
            );
        }
        text += &left_out(&self.left_out);
        text + &format!(
            "# {} of {} within {tolerance} % of PyTorch",
            self.compared.len() - self.slower(),
            self.compared.len()
        )
    }
}

/// Lines for rows that were not compared: for each reason, how many of which operations.
pub fn left_out(reasons: &BTreeMap<String, BTreeMap<String, usize>>) -> String {
    let line = |(reason, ops): (&String, &BTreeMap<String, usize>)| {
        let ops: Vec<_> = ops.iter().map(|(op, rows)| format!("{op} ({rows})")).collect();
        format!("# left out: {}: {reason}\n", ops.join(", "))
    };
    reasons.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::table::tests::row;
    use comm_core::OpKind;

    fn figure(op: OpKind, bytes: u64, us: f64) -> Figure {
        Figure {
            op: op.name().into(),
            dtype: "bf16".into(),
            bytes,
            world: 8,
            in_place: false,
            us: Some(us),
            reason: None,
        }
    }

    #[test]
    fn slower_than_the_tolerance_is_slower() {
        let rows = [row(OpKind::AllReduce, 1024, 10.2), row(OpKind::AllReduce, 2048, 10.4)];
        let figures = [1024, 2048].map(|bytes| figure(OpKind::AllReduce, bytes, 10.0));
        let versus = compare(&rows, &figures, None, 3.0);
        assert_eq!(versus.compared.iter().map(|c| c.met).collect::<Vec<_>>(), [true, false]);
        assert_eq!(versus.slower(), 1);
        let table = versus.table("PyTorch 2", 3.0);
        assert!(
            table.contains("SLOWER")
                && table.contains("1.020")
                && table.ends_with("1 of 2 within 3 % of PyTorch")
        );
    }

    #[test]
    fn only_equal_forms_are_compared() {
        let mut row = row(OpKind::AllReduce, 1024, 10.0);
        let mut theirs = figure(OpKind::AllReduce, 1024, 10.0);
        theirs.in_place = true;
        assert!(compare(&[row.clone()], &[theirs.clone()], None, 3.0).compared.is_empty());
        row.in_place = row.out_of_place.map(|mut timing| {
            timing.us = 20.0;
            timing
        });
        assert_eq!(compare(&[row], &[theirs], None, 3.0).compared[0].ours, 20.0);
    }

    #[test]
    fn what_is_missing_is_left_out_with_the_reason() {
        let rows =
            [row(OpKind::AllReduce, 1024, 1.0), row(OpKind::Barrier, 0, 1.0), row(OpKind::AllGather, 2, 1.0)];
        let mut odd = figure(OpKind::AllGather, 2, 1.0);
        (odd.us, odd.reason) = (None, Some("odd".into()));
        let versus = compare(&rows, &[odd], Some("its rank 1 died"), 3.0);
        assert!(versus.compared.is_empty());
        let table = versus.table("PyTorch 2", 3.0);
        for part in
            ["all_reduce (1): PyTorch's script failed: its rank 1 died", "barrier (1)", "all_gather (1): odd"]
        {
            assert!(table.contains(part), "{part:?} is not in {table}");
        }
    }
}
