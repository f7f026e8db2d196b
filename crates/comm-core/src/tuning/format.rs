//! Tables as text: JSON, a row a line.
//!
//! ```json
//! {"schema": 1, "tables": [{"gpu": "NVIDIA H200", "world": 8, "source": "measured", "rules": [
//!   {"op": "all_reduce", "registered": false, "rows": [
//!     {"from": 0, "algorithm": "one_shot", "block": 128},
//!     {"from": 65537, "algorithm": "two_shot"}
//!   ]}
//! ]}]}
//! ```

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::{Choice, Measured, Row, Rule, Table, Tables, invalid};
use crate::error::Result;
use crate::op::OpKind;

/// Raised when older programs would misread what is written.
const SCHEMA: u32 = 1;

/// The longest text that is read.
const LONGEST: usize = 4 << 20;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileText {
    schema: u32,
    tables: Vec<TableText>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TableText {
    gpu: String,
    world: usize,
    source: String,
    rules: Vec<RuleText>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RuleText {
    op: String,
    #[serde(default)]
    registered: bool,
    rows: Vec<RowText>,
    #[serde(default)]
    measured: Vec<MeasuredText>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RowText {
    from: u64,
    algorithm: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    grid: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    block: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    chunk: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    units: Option<u32>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct MeasuredText {
    bytes: u64,
    us: f64,
    best: BTreeMap<String, f64>,
}

fn rule(text: RuleText) -> Result<Rule> {
    let Some(op) = OpKind::COLLECTIVES.into_iter().find(|op| op.name() == text.op) else {
        let known = OpKind::COLLECTIVES.map(OpKind::name).join(", ");
        return Err(invalid(format!("{:?} is no operation; known are {known}", text.op)));
    };
    let row = |RowText { from, algorithm, grid, block, chunk, units }| Row {
        from,
        choice: Choice { algorithm, grid, block, chunk, units },
    };
    let measured = |MeasuredText { bytes, us, best }| Measured { bytes, us, best };
    Ok(Rule {
        op,
        registered: text.registered,
        rows: text.rows.into_iter().map(row).collect(),
        measured: text.measured.into_iter().map(measured).collect(),
    })
}

impl Tables {
    /// Reads what [`Display`](fmt::Display) writes.
    ///
    /// # Errors
    /// [`CommError::InvalidArgument`](crate::CommError::InvalidArgument) that says what is wrong with the text, or with a
    /// table in it.
    pub fn parse(text: &str) -> Result<Self> {
        if text.len() > LONGEST {
            return Err(invalid(format!("{} bytes of text; at most {LONGEST}", text.len())));
        }
        let file: FileText = serde_json::from_str(text).map_err(|error| invalid(error.to_string()))?;
        if file.schema != SCHEMA {
            return Err(invalid(format!("schema {}; this program reads {SCHEMA}", file.schema)));
        }
        let table = |TableText { gpu, world, source, rules }| {
            Table::new(gpu, world, source, rules.into_iter().map(rule).collect::<Result<_>>()?)
        };
        Self::new(file.tables.into_iter().map(table).collect::<Result<_>>()?)
    }
}

/// A value on one line, with spaces between its parts.
struct Line<T>(T);

impl<T: Serialize> fmt::Display for Line<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&serde_json::to_string(&self.0).map_err(|_| fmt::Error)?)
    }
}

fn list<T>(
    f: &mut fmt::Formatter<'_>,
    indent: &str,
    items: &[T],
    mut item: impl FnMut(&mut fmt::Formatter<'_>, &T) -> fmt::Result,
) -> fmt::Result {
    f.write_str("[")?;
    for (index, one) in items.iter().enumerate() {
        write!(f, "{}\n{indent}  ", if index > 0 { "," } else { "" })?;
        item(f, one)?;
    }
    if items.is_empty() { f.write_str("]") } else { write!(f, "\n{indent}]") }
}

impl fmt::Display for Tables {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{{\"schema\": {SCHEMA}, \"tables\": ")?;
        list(f, "", self.all(), |f, table| {
            let (gpu, world, source) = (Line(table.gpu()), table.world(), Line(table.source()));
            write!(f, "{{\"gpu\": {gpu}, \"world\": {world}, \"source\": {source}, \"rules\": ")?;
            list(f, "  ", table.rules(), |f, rule| {
                write!(
                    f,
                    "{{\"op\": {}, \"registered\": {}, \"rows\": ",
                    Line(rule.op.name()),
                    rule.registered
                )?;
                list(f, "    ", &rule.rows, |f, Row { from, choice }| {
                    let Choice { algorithm, grid, block, chunk, units } = choice.clone();
                    let row = RowText { from: *from, algorithm, grid, block, chunk, units };
                    write!(f, "{}", Line(row))
                })?;
                if !rule.measured.is_empty() {
                    f.write_str(", \"measured\": ")?;
                    list(f, "    ", &rule.measured, |f, Measured { bytes, us, best }| {
                        write!(f, "{}", Line(MeasuredText { bytes: *bytes, us: *us, best: best.clone() }))
                    })?;
                }
                f.write_str("}")
            })?;
            f.write_str("}")
        })?;
        writeln!(f, "}}")
    }
}
