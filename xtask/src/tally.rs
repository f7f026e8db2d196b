//! Counts of test results, and the last line that every test command prints.

use std::fmt;
use std::ops::AddAssign;

use crate::events::CaseResult;

/// Passed, failed and skipped tests.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Tally {
    /// Tests that held.
    pub passed: u64,
    /// Tests that did not.
    pub failed: u64,
    /// Tests that could not run.
    pub skipped: u64,
}

impl Tally {
    /// Counts one result.
    pub fn count(&mut self, result: &CaseResult) {
        match result {
            CaseResult::Passed => self.passed += 1,
            CaseResult::Failed(_) | CaseResult::NotRun(_) => self.failed += 1,
            CaseResult::Skipped(_) => self.skipped += 1,
        }
    }

    /// The sum of all `test result:` lines that Rust's test harness printed into `output`, plus a skip for every line
    /// by which a test says that it could not run.
    pub fn of_harness(output: &str) -> Self {
        let mut tally = Self::default();
        for line in output.lines() {
            if let Some(counts) = line.trim_start().strip_prefix("test result: ") {
                let count = |word: &str| -> u64 {
                    let before =
                        counts.split(&[';', '.'][..]).find_map(|part| part.trim().strip_suffix(word));
                    before.and_then(|number| number.trim().parse().ok()).unwrap_or(0)
                };
                tally.passed += count("passed");
                tally.failed += count("failed");
                tally.skipped += count("ignored");
            }
        }
        tally
    }
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn harness_lines_add_up() {
        let output = "running 3 tests\n\
            test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.1s\n\
            noise: 7 passed\n\
            test result: FAILED. 3 passed; 2 failed; 0 ignored; 0 measured; 4 filtered out; finished in 0.1s\n";
        let tally = Tally::of_harness(output);
        assert_eq!(tally, Tally { passed: 15, failed: 2, skipped: 1 });
        assert_eq!(tally.to_string(), "15 passed, 2 failed, 1 skipped");
    }
}
