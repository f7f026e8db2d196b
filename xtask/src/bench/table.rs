//! The table on standard output: nccl-tests' columns, and backend, p50 and p99 after them.

use crate::bench::row::{Row, Timing};

/// The lines above the rows. Where operands are not `registered` they say so, and there is a column for a device's own
/// copy of as many bytes.
pub fn header(registered: bool) -> String {
    let form = format!("{:>9} {:>8} {:>8} {:>7}", "time", "algbw", "busbw", "#wrong");
    let units = format!("{:>9} {:>8} {:>8} {:>7}", "(us)", "(GB/s)", "(GB/s)", "");
    let (notice, copy, copy_unit) = match registered {
        true => (String::new(), String::new(), String::new()),
        false => {
            let notice = "# operands and results are plain device memory, NOT REGISTERED with the communicator\n\
                          # copy: a copy of as many bytes within one GPU, the most that registering is to save\n";
            (notice.to_owned(), format!(" {:>9}", "copy"), format!(" {:>9}", "(us)"))
        }
    };
    format!(
        "{notice}#{:>75} {:>36}\n#{:>12} {:>13} {:>7} {:>6} {:>5}  {form}   {form}  {:>9} {:>9}{copy}  {}\n#{:>12} {:>13} {:>7} {:>6} {:>5}  {units}   {units}  {:>9} {:>9}{copy_unit}",
        "out-of-place",
        "in-place",
        "size",
        "count",
        "type",
        "redop",
        "root",
        "p50",
        "p99",
        "backend",
        "(B)",
        "(elements)",
        "",
        "",
        "",
        "(us)",
        "(us)"
    )
}

/// What stands above the rows of one operation.
pub fn section(row: &Row) -> String {
    let how = if row.graph { ", in a CUDA graph" } else { "" };
    let unregistered = if row.registered { "" } else { ", unregistered" };
    format!("# {} ({} ranks{how}{unregistered})", row.op, row.world)
}

/// One row.
pub fn line(row: &Row) -> String {
    let redop = row.redop.as_deref().unwrap_or("none");
    let root = row.root.map_or_else(|| "-1".to_owned(), |root| root.to_string());
    let head = format!(" {:>12} {:>13} {:>7} {:>6} {:>5}", row.bytes, row.count, row.dtype, redop, root);
    if let Some(reason) = &row.skipped {
        return format!("{head}  SKIP {}: {reason}", row.backend);
    }
    let first = row.out_of_place.or(row.in_place);
    let (p50, p99) = first.map_or_else(|| ("-".into(), "-".into()), |t| (number(t.p50), number(t.p99)));
    let copy = match row.registered {
        true => String::new(),
        false => format!(" {:>9}", row.copy.map_or_else(|| "-".to_owned(), number)),
    };
    let shape =
        row.norm.map_or_else(String::new, |norm| format!("  tokens {} hidden {}", norm.tokens, norm.hidden));
    format!(
        "{head}  {}   {}  {p50:>9} {p99:>9}{copy}  {}{shape}",
        form(row.out_of_place.as_ref()),
        form(row.in_place.as_ref()),
        row.backend
    )
}

fn form(timing: Option<&Timing>) -> String {
    match timing {
        Some(t) => {
            format!("{:>9} {:>8} {:>8} {:>7}", number(t.us), number(t.algbw), number(t.busbw), t.wrong)
        }
        None => format!("{:>9} {:>8} {:>8} {:>7}", "-", "-", "-", "-"),
    }
}

/// Four significant digits, which is more than any timing deserves.
fn number(value: f64) -> String {
    if value >= 1000.0 {
        format!("{value:.0}")
    } else if value >= 100.0 {
        format!("{value:.1}")
    } else {
        format!("{value:.2}")
    }
}

/// The last line: the sum of all wrong elements, and what was left out.
pub fn summary(rows: &[Row]) -> String {
    let skipped = rows.iter().filter(|row| row.skipped.is_some()).count();
    let skipped = if skipped == 0 { String::new() } else { format!(", {skipped} skipped") };
    format!("# {} rows{skipped}, total #wrong = {}", rows.len(), wrong(rows))
}

/// All wrong elements.
pub fn wrong(rows: &[Row]) -> u64 {
    rows.iter().flat_map(|row| [row.out_of_place, row.in_place]).flatten().map(|timing| timing.wrong).sum()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use comm_core::OpKind;

    pub(crate) fn row(op: OpKind, bytes: u64, us: f64) -> Row {
        let timing = Timing::new(op, 8, bytes, us, us, us * 1.5, 0);
        Row {
            op: op.name().into(),
            backend: "nccl".into(),
            dtype: "bf16".into(),
            redop: op.reduces().then(|| "sum".into()),
            root: None,
            world: 8,
            graph: true,
            bytes,
            count: bytes / 2,
            norm: None,
            registered: true,
            out_of_place: Some(timing),
            in_place: None,
            copy: None,
            skipped: None,
        }
    }

    /// Where the last occurrence of a word ends.
    fn right_edge(text: &str, word: &str) -> Option<usize> {
        text.rfind(word).map(|at| at + word.len())
    }

    #[test]
    fn columns_line_up_with_their_heads() {
        let row = row(OpKind::AllReduce, 1 << 20, 30.25);
        let (head, line) = (header(true), line(&row));
        let names = head.lines().nth(1).unwrap();
        for (name, value) in [("size", "1048576"), ("count", "524288"), ("type", "bf16"), ("p50", "30.25")] {
            assert_eq!(right_edge(names, name), right_edge(&line, value), "{name}\n{names}\n{line}");
        }
        assert!(line.contains("nccl") && line.contains("-1") && line.contains("sum"), "{line}");
        assert!(!head.contains("copy") && !section(&row).contains("registered"), "{head}");
    }

    #[test]
    fn a_table_of_unregistered_operands_says_so_and_shows_the_copy() {
        let mut row = row(OpKind::AllReduce, 1 << 20, 30.25);
        row.registered = false;
        row.copy = Some(4.75);
        let head = header(false);
        let [notice, .., names, _] = &head.lines().collect::<Vec<_>>()[..] else { panic!("{head}") };
        assert!(notice.contains("NOT REGISTERED"), "{head}");
        assert_eq!(right_edge(names, "copy"), right_edge(&line(&row), "4.75"), "{head}\n{}", line(&row));
        assert_eq!(right_edge(names, "backend").map(|edge| edge - 3), right_edge(&line(&row), "nccl"));
        assert!(section(&row).contains("unregistered"));
        row.copy = None;
        assert!(line(&row).ends_with("        -  nccl"), "{}", line(&row));
    }

    #[test]
    fn wrong_elements_of_both_forms_count() {
        let mut bad = row(OpKind::AllReduce, 1024, 3.0);
        bad.in_place = bad.out_of_place.map(|t| Timing { wrong: 5, ..t });
        let mut skipped = row(OpKind::Reduce, 1024, 3.0);
        skipped.out_of_place = None;
        skipped.skipped = Some("no such thing".into());
        assert!(line(&skipped).contains("SKIP nccl: no such thing"));
        assert_eq!(summary(&[bad, skipped]), "# 2 rows, 1 skipped, total #wrong = 5");
    }
}
