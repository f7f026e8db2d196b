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

    /// What Rust's test harness printed, counted: see [`Harness`].
    pub fn of_harness(output: &str) -> Self {
        let mut harness = Harness::default();
        for line in output.lines() {
            let _ = harness.read(line);
        }
        harness.tally
    }
}

/// Reads what Rust's test harness prints: adds up its `test result:` lines, in which a test that says `SKIP` because it
/// could not run counts as passed, and counts that test as skipped.
///
/// The harness shows what passing tests say with `--show-output` or `--nocapture`.
#[derive(Debug, Default)]
pub struct Harness {
    /// The counts so far.
    pub tally: Tally,
    section: Section,
    /// Whether the test whose output is read has said that it could not run.
    said: bool,
    /// Tests that said so since the last `test result:`.
    skips: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum Section {
    #[default]
    Plain,
    Successes,
    Failures,
}

impl Harness {
    /// Takes the next line, and says whether it is worth showing: of what passing tests say, only why they could not run
    /// is.
    pub fn read(&mut self, line: &str) -> bool {
        if let Some(counts) = line.trim_start().strip_prefix("test result: ") {
            let count = |word: &str| -> u64 {
                let before = counts.split(&[';', '.'][..]).find_map(|part| part.trim().strip_suffix(word));
                before.and_then(|number| number.trim().parse().ok()).unwrap_or(0)
            };
            self.tally.passed += count("passed").saturating_sub(self.skips);
            self.tally.failed += count("failed");
            self.tally.skipped += count("ignored") + self.skips;
            (self.section, self.skips, self.said) = (Section::Plain, 0, false);
            return true;
        }
        match line {
            "successes:" => self.section = Section::Successes,
            "failures:" => self.section = Section::Failures,
            // Another test's output begins.
            _ if line.starts_with("test ") || (line.starts_with("---- ") && line.ends_with(" ----")) => {
                self.said = false;
            }
            _ => {}
        }
        let skip = line.trim_start().starts_with("SKIP") || line.contains(" ... SKIP");
        if skip && !self.said && self.section != Section::Failures {
            self.said = true;
            self.skips += 1;
        }
        skip || self.section != Section::Successes
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

    #[test]
    fn tests_that_could_not_run_have_not_passed() {
        let captured = "running 4 tests\n\
            test a ... ok\ntest b ... ok\ntest c ... ok\ntest d ... FAILED\n\
            \nsuccesses:\n\n---- a stdout ----\nSKIP: no GPU\nSKIP: still none\n\n---- b stdout ----\nwords\n\n\
            successes:\n    a\n    b\n    c\n\n\
            failures:\n\n---- d stdout ----\nSKIP: half of it\n\nfailures:\n    d\n\n\
            test result: FAILED. 3 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out\n";
        assert_eq!(Tally::of_harness(captured), Tally { passed: 2, failed: 1, skipped: 1 });
        let direct = "running 2 tests\ntest a ... SKIP: no GPU\nok\ntest b ... ok\n\
            test result: ok. 2 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out\n";
        assert_eq!(Tally::of_harness(direct), Tally { passed: 1, failed: 0, skipped: 1 });
    }

    #[test]
    fn of_passing_tests_only_skips_are_shown() {
        let mut harness = Harness::default();
        let lines = [
            "test a ... ok",
            "successes:",
            "---- a stdout ----",
            "words",
            "SKIP: no GPU",
            "successes:",
            "    a",
        ];
        let shown: Vec<&str> = lines.into_iter().filter(|line| harness.read(line)).collect();
        assert_eq!(shown, ["test a ... ok", "SKIP: no GPU"]);
        assert!(harness.read("test result: ok. 1 passed; 0 failed; 0 ignored"));
        assert!(harness.read("words of cargo"));
    }
}
