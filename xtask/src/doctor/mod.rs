//! `cargo xtask doctor`: what this machine has, where it was found, what is missing and how to get it.
//!
//! It only looks: it changes nothing, and a machine with nothing at all is no error.

mod gpus;
mod libraries;
mod system;

/// Findings in sections, and advice for what is missing.
#[derive(Default)]
pub struct Findings {
    lines: Vec<String>,
    advice: Vec<String>,
}

impl Findings {
    fn section(&mut self, name: &str) {
        self.lines.push(format!("\n{name}"));
    }

    fn fact(&mut self, what: &str, value: impl std::fmt::Display) {
        self.lines.push(format!("  {what:<24} {value}"));
    }

    fn line(&mut self, text: impl Into<String>) {
        self.lines.push(format!("  {}", text.into()));
    }

    fn missing(&mut self, what: &str, why: impl std::fmt::Display, advice: impl Into<String>) {
        self.fact(what, format!("missing: {why}"));
        self.advice.push(advice.into());
    }
}

/// Runs the command.
pub fn run() {
    let mut findings = Findings::default();
    gpus::look(&mut findings);
    libraries::look(&mut findings);
    system::look(&mut findings);
    for line in &findings.lines {
        println!("{line}");
    }
    println!();
    if findings.advice.is_empty() {
        println!("Nothing is missing.");
    } else {
        println!("What is missing, and how to get it:");
        findings.advice.iter().for_each(|advice| println!("  - {advice}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looking_never_fails_and_every_missing_thing_comes_with_advice() {
        let mut findings = Findings::default();
        gpus::look(&mut findings);
        libraries::look(&mut findings);
        system::look(&mut findings);
        let missing = findings.lines.iter().filter(|line| line.contains("missing: ")).count();
        assert_eq!(missing, findings.advice.len(), "{:#?}", findings.lines);
        assert!(findings.lines.iter().any(|line| line.contains("shared memory")));
    }
}
