//! Which algorithm carries out an operation of which size, as data: a table per kind of GPU and number of ranks.
//!
//! Owns the table, its text and the choice, a pure function that is total in the size and the same on every rank that
//! holds the same table ([`Table::digest`]). Knows nothing of devices or of what the algorithms' names stand for: a
//! backend turns names into its own algorithms with [`Table::resolve`].

mod format;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::{CommError, Result};
use crate::op::OpKind;

/// An algorithm and what is fixed about its launch; what is `None` the backend decides by the size.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct Choice<A = String> {
    /// The algorithm: its name, or what a backend has made of it.
    pub algorithm: A,
    /// The most blocks; fewer where the size needs fewer or the device holds fewer.
    pub grid: Option<u32>,
    /// Threads of a block.
    pub block: Option<u32>,
    /// Bytes of a piece, for algorithms that work piece by piece.
    pub chunk: Option<u32>,
    /// Packs that a thread moves at a time, for algorithms that have several such forms.
    pub units: Option<u32>,
}

impl<A> Choice<A> {
    /// An algorithm with nothing else fixed.
    pub const fn of(algorithm: A) -> Self {
        Self { algorithm, grid: None, block: None, chunk: None, units: None }
    }

    /// The same launch of another algorithm.
    pub fn with<B>(&self, algorithm: B) -> Choice<B> {
        Choice { algorithm, grid: self.grid, block: self.block, chunk: self.chunk, units: self.units }
    }
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.algorithm)?;
        let named =
            [("grid", self.grid), ("block", self.block), ("chunk", self.chunk), ("units", self.units)];
        for (name, value) in named {
            if let Some(value) = value {
                write!(f, " {name} {value}")?;
            }
        }
        Ok(())
    }
}

/// From a size on, a choice.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Row<A = String> {
    /// The smallest size in bytes of the full buffer: what all ranks together hold of a gather's result or a scatter's
    /// input. The row holds up to the next one's.
    pub from: u64,
    /// What is chosen.
    pub choice: Choice<A>,
}

/// What was measured at one size, for a reader to see why a row is there. Has no influence on any choice.
#[derive(Clone, PartialEq, Debug)]
pub struct Measured {
    /// Bytes of the full buffer.
    pub bytes: u64,
    /// Microseconds per operation of what the table chooses.
    pub us: f64,
    /// The best figure of each algorithm, in any shape, by the algorithm's name.
    pub best: BTreeMap<String, f64>,
}

/// The rows for one operation.
#[derive(Clone, PartialEq, Debug)]
pub struct Rule<A = String> {
    /// The operation.
    pub op: OpKind,
    /// Whether it is for results that every rank can reach. Without such a rule, the one for others holds for them too.
    pub registered: bool,
    /// By size; the first is from zero on.
    pub rows: Vec<Row<A>>,
    /// Why.
    pub measured: Vec<Measured>,
}

impl<A> Rule<A> {
    /// What holds for `bytes` bytes.
    pub fn choose(&self, bytes: u64) -> Option<&Choice<A>> {
        let rows = self.rows.partition_point(|row| row.from <= bytes);
        // Checked by `Table::new`: the first row is from zero on, so there is one for every size.
        rows.checked_sub(1).map(|last| &self.rows[last].choice)
    }
}

/// The choices for one kind of GPU and number of ranks.
#[derive(Clone, PartialEq, Debug)]
pub struct Table<A = String> {
    gpu: String,
    world: usize,
    source: String,
    rules: Vec<Rule<A>>,
}

/// The most rows of a rule: beyond it, it is no rule.
const MOST_ROWS: usize = 256;

fn invalid(reason: String) -> CommError {
    CommError::invalid("table", reason)
}

impl<A> Table<A> {
    /// A table for `world` GPUs of the kind that the driver calls `gpu`; `source` says where its rows come from.
    ///
    /// # Errors
    /// [`CommError::InvalidArgument`] for fewer than two ranks, two rules for the same, and rows that are not in strict
    /// order of their sizes from zero on or have a zero for a launch parameter.
    pub fn new(
        gpu: impl Into<String>,
        world: usize,
        source: impl Into<String>,
        rules: Vec<Rule<A>>,
    ) -> Result<Self> {
        let gpu = gpu.into();
        let table = format!("of {gpu:?} for {world} ranks");
        if world < 2 {
            return Err(invalid(format!("{table}: there is nothing to choose with fewer than 2 ranks")));
        }
        for (index, rule) in rules.iter().enumerate() {
            let kind = if rule.registered { " of registered results" } else { "" };
            let fault = |reason: String| Err(invalid(format!("{table}, {}{kind}: {reason}", rule.op)));
            if rules[..index].iter().any(|other| (other.op, other.registered) == (rule.op, rule.registered)) {
                return fault("there are two rules".into());
            }
            if rule.rows.len() > MOST_ROWS {
                return fault(format!("{} rows; at most {MOST_ROWS}", rule.rows.len()));
            }
            match rule.rows.first() {
                Some(Row { from: 0, .. }) => {}
                Some(Row { from, .. }) => {
                    return fault(format!("the first row is from {from} on, not from 0"));
                }
                None => return fault("there are no rows".into()),
            }
            for pair in rule.rows.windows(2) {
                if pair[1].from <= pair[0].from {
                    return fault(format!(
                        "a row from {} on follows one from {}",
                        pair[1].from, pair[0].from
                    ));
                }
            }
            for Row { from, choice } in &rule.rows {
                let parameters = [choice.grid, choice.block, choice.chunk, choice.units];
                if parameters.contains(&Some(0)) {
                    return fault(format!("the row from {from} on has a zero for a launch parameter"));
                }
            }
        }
        Ok(Self { gpu, world, source: source.into(), rules })
    }

    /// The kind of GPU, as the driver names it.
    pub fn gpu(&self) -> &str {
        &self.gpu
    }

    /// The number of ranks.
    pub const fn world(&self) -> usize {
        self.world
    }

    /// Where the rows come from.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// All rules.
    pub fn rules(&self) -> &[Rule<A>] {
        &self.rules
    }

    /// The rule for an operation; `registered`: every rank can reach the result.
    pub fn rule(&self, op: OpKind, registered: bool) -> Option<&Rule<A>> {
        let find = |registered| self.rules.iter().find(|rule| rule.op == op && rule.registered == registered);
        find(registered).or_else(|| if registered { find(false) } else { None })
    }

    /// What to do for an operation over `bytes` bytes of the full buffer; `None` if the table has no rule for it. Depends
    /// on nothing but the table and the arguments, and never fails.
    pub fn choose(&self, op: OpKind, registered: bool, bytes: u64) -> Option<&Choice<A>> {
        self.rule(op, registered)?.choose(bytes)
    }

    /// The same table with `rule` in the place of the rule for the same, or added.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_rule(self, rule: Rule<A>) -> Result<Self> {
        let mut rules = self.rules;
        match rules.iter_mut().find(|other| (other.op, other.registered) == (rule.op, rule.registered)) {
            Some(other) => *other = rule,
            None => rules.push(rule),
        }
        Self::new(self.gpu, self.world, self.source, rules)
    }
}

impl Table {
    /// The same table with the names turned into a backend's own algorithms. Without the measured figures.
    ///
    /// # Errors
    /// The first of `algorithm`'s.
    pub fn resolve<A>(&self, mut algorithm: impl FnMut(OpKind, &Choice) -> Result<A>) -> Result<Table<A>> {
        let mut rules = Vec::with_capacity(self.rules.len());
        for Rule { op, registered, rows, .. } in &self.rules {
            let rows = rows.iter().map(|Row { from, choice }| {
                Ok(Row { from: *from, choice: choice.with(algorithm(*op, choice)?) })
            });
            let rows = rows.collect::<Result<_>>()?;
            rules.push(Rule { op: *op, registered: *registered, rows, measured: Vec::new() });
        }
        Ok(Table { gpu: self.gpu.clone(), world: self.world, source: self.source.clone(), rules })
    }

    /// What ranks compare: equal for tables that choose alike, whatever was measured and wherever they come from.
    #[must_use]
    pub fn digest(&self) -> String {
        let mut rules: Vec<_> = self.rules.iter().collect();
        rules.sort_by_key(|rule| (rule.op.name(), rule.registered));
        let mut text = format!("{}\n", self.world);
        for rule in rules {
            let _ = writeln!(text, "{} {}", rule.op, rule.registered);
            for Row { from, choice: Choice { algorithm, grid, block, chunk, units } } in &rule.rows {
                let _ = writeln!(text, "{from} {algorithm:?} {grid:?} {block:?} {chunk:?} {units:?}");
            }
        }
        Sha256::digest(text.as_bytes())[..8].iter().fold(String::new(), |mut hex, byte| {
            let _ = write!(hex, "{byte:02x}");
            hex
        })
    }
}

/// The tables of one file: its [text](Self::parse) is what tuning writes and a backend reads.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Tables {
    tables: Vec<Table>,
}

impl Tables {
    /// A set of tables.
    ///
    /// # Errors
    /// [`CommError::InvalidArgument`] if two are for the same GPU and number of ranks.
    pub fn new(tables: Vec<Table>) -> Result<Self> {
        for (index, table) in tables.iter().enumerate() {
            let same = |other: &Table| (&other.gpu, other.world) == (&table.gpu, table.world);
            if tables[..index].iter().any(same) {
                return Err(invalid(format!("two of {:?} for {} ranks", table.gpu, table.world)));
            }
        }
        Ok(Self { tables })
    }

    /// All of them.
    #[must_use]
    pub fn all(&self) -> &[Table] {
        &self.tables
    }

    /// The table for exactly this number of ranks: for this kind of GPU, or else the first.
    #[must_use]
    pub fn of_world(&self, gpu: &str, world: usize) -> Option<&Table> {
        let mut tables = self.tables.iter().filter(|table| table.world == world);
        let first = tables.clone().next();
        tables.find(|table| table.gpu == gpu).or(first)
    }

    /// The nearest table: of this kind of GPU if there is one, or else of the first table's, for the number of ranks that
    /// is closest, the larger of two that are equally close. `None` only if there are no tables.
    #[must_use]
    pub fn nearest(&self, gpu: &str, world: usize) -> Option<&Table> {
        let known = self.tables.iter().any(|table| table.gpu == gpu);
        let gpu = if known { gpu } else { self.tables.first()?.gpu() };
        let of_gpu = self.tables.iter().filter(|table| table.gpu == gpu);
        of_gpu.min_by_key(|table| (table.world.abs_diff(world), std::cmp::Reverse(table.world)))
    }

    /// Puts `table` in the place of the one for the same GPU and number of ranks, or adds it.
    pub fn insert(&mut self, table: Table) {
        let same = |other: &&mut Table| (&other.gpu, other.world) == (&table.gpu, table.world);
        match self.tables.iter_mut().find(same) {
            Some(other) => *other = table,
            None => self.tables.push(table),
        }
    }
}
