//! What came out: as a table, as JSON, and whether it is right.

use std::fmt;

use anyhow::{Result, ensure};
use serde::Serialize;

/// One way of reducing, at one number of tokens.
#[derive(Clone, Debug, Serialize)]
pub struct Figure {
    /// `none`, a backend's name, or that and `_fused`.
    pub name: String,
    /// The median over the samples, on the slowest rank.
    pub us_per_layer: f64,
    /// Whether the output should be right. Without communication it is not.
    pub checked: bool,
    /// Whether all ranks have the same output, to the last bit.
    pub equal_on_all_ranks: bool,
    /// The largest relative distance of a row from what one device alone computes.
    pub error: f64,
}

/// All ways at one number of tokens.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// Tokens of a forward pass.
    pub tokens: usize,
    /// In the order of the table's columns.
    pub figures: Vec<Figure>,
}

impl Row {
    /// How many times as fast a layer is in the last way as in the first, of those whose output is right.
    pub fn gain(&self) -> f64 {
        let mut times = self.figures.iter().filter(|figure| figure.checked).map(|figure| figure.us_per_layer);
        let first = times.next().unwrap_or(1.0);
        first / times.next_back().unwrap_or(first)
    }
}

/// The whole run.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// What a rank computed on.
    pub device: String,
    /// Ranks.
    pub world: usize,
    /// Layers of the model.
    pub layers: usize,
    /// Elements of a hidden state.
    pub hidden: usize,
    /// Elements between the MLP's projections.
    pub intermediate: usize,
    /// The largest error that passes.
    pub tolerance: f64,
    /// NCCL's version, where it was measured.
    pub nccl: Option<String>,
    /// Backends that could not be used, and why.
    pub skipped: Vec<String>,
    /// The measurements.
    pub rows: Vec<Row>,
}

impl Report {
    /// Whether every output is what it should be.
    ///
    /// # Errors
    /// Names the first that is not; or that nothing was compared.
    pub fn verdict(&self) -> Result<()> {
        let mut compared = 0;
        for row in &self.rows {
            for figure in row.figures.iter().filter(|figure| figure.checked) {
                compared += 1;
                let Figure { name, error, .. } = figure;
                ensure!(
                    figure.equal_on_all_ranks,
                    "{name}, {} tokens: the ranks' outputs differ",
                    row.tokens
                );
                ensure!(
                    *error <= self.tolerance,
                    "{name}, {} tokens: the output is off by {error:.4}, more than {:.4}",
                    row.tokens,
                    self.tolerance
                );
            }
        }
        ensure!(compared > 0, "no backend could be used: {}", self.skipped.join("; "));
        Ok(())
    }

    fn largest_error(&self) -> f64 {
        let figures = self.rows.iter().flat_map(|row| &row.figures).filter(|figure| figure.checked);
        figures.map(|figure| figure.error).fold(0.0, f64::max)
    }
}

/// A column's heading.
pub fn title(name: &str) -> String {
    match name {
        "none" => "no communication".into(),
        other => match other.strip_suffix("_fused") {
            Some(backend) => format!("{backend}, fused norm"),
            None => other.into(),
        },
    }
}

impl fmt::Display for Report {
    /// The table, which is also Markdown.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} layers, hidden {}, intermediate {}, bf16, {} ranks on {}{}; microseconds per layer, median, slowest rank\n",
            self.layers,
            self.hidden,
            self.intermediate,
            self.world,
            self.device,
            self.nccl.as_ref().map_or_else(String::new, |version| format!(", NCCL {version}"))
        )?;
        let Some(first) = self.rows.first() else { return Ok(()) };
        let titles: Vec<String> = first.figures.iter().map(|figure| title(&figure.name)).collect();
        let header: Vec<String> = titles.iter().map(|title| format!(" {title} |")).collect();
        writeln!(f, "| tokens |{} gain |", header.concat())?;
        writeln!(
            f,
            "|-------:|{}-----:|",
            titles.iter().map(|title| "-".repeat(title.len() + 1) + ":|").collect::<String>()
        )?;
        for row in &self.rows {
            write!(f, "| {:>6} |", row.tokens)?;
            for (figure, title) in row.figures.iter().zip(&titles) {
                write!(f, " {:>width$.1} |", figure.us_per_layer, width = title.len())?;
            }
            writeln!(f, " {:>3.2}x |", row.gain())?;
        }
        writeln!(f)?;
        for reason in &self.skipped {
            writeln!(f, "left out: {reason}")?;
        }
        match self.verdict() {
            Ok(()) => writeln!(
                f,
                "all outputs equal on all ranks, and within {:.4} of one device's (tolerance {:.4})",
                self.largest_error(),
                self.tolerance
            ),
            Err(error) => writeln!(f, "WRONG: {error}"),
        }
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// A report of two numbers of tokens, with a right output everywhere.
    pub fn report() -> Report {
        let figure = |name: &str, us_per_layer| Figure {
            name: name.into(),
            us_per_layer,
            checked: name != "none",
            equal_on_all_ranks: name != "none",
            error: if name == "none" { 0.9 } else { 0.01 },
        };
        let row = |tokens, us: f64| Row {
            tokens,
            figures: vec![
                figure("none", us),
                figure("nccl", us + 30.0),
                figure("p2p", us + 12.0),
                figure("p2p_fused", us + 8.5),
            ],
        };
        Report {
            device: "a GPU".into(),
            world: 8,
            layers: 8,
            hidden: 8192,
            intermediate: 28_672,
            tolerance: 0.03,
            nccl: None,
            skipped: Vec::new(),
            rows: vec![row(1, 60.0), row(128, 100.0)],
        }
    }

    #[test]
    fn the_table_has_a_row_per_number_of_tokens() {
        let text = report().to_string();
        assert!(
            text.contains("| tokens | no communication | nccl | p2p | p2p, fused norm | gain |"),
            "{text}"
        );
        assert!(
            text.contains("|    128 |            100.0 | 130.0 | 112.0 |           108.5 | 1.20x |"),
            "{text}"
        );
        assert!(text.contains("all outputs equal"), "{text}");
    }

    #[test]
    fn wrong_outputs_fail() {
        let mut wrong = report();
        wrong.rows[1].figures[2].error = 0.05;
        assert!(wrong.verdict().unwrap_err().to_string().contains("p2p, 128 tokens"));
        let mut different = report();
        different.rows[0].figures[1].equal_on_all_ranks = false;
        assert!(different.to_string().contains("WRONG: nccl, 1 tokens"));
        let mut nothing = report();
        nothing.rows.iter_mut().for_each(|row| row.figures.truncate(1));
        assert!(nothing.verdict().is_err());
    }
}
