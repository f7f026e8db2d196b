//! What compute-sanitizer's own lines say.

/// What its lines begin with, behind the rank's label.
const PREFIX: &str = "========= ";

/// Whether a line is the tool's, not the program's.
pub fn is_of_tool(line: &str) -> bool {
    line.contains(PREFIX)
}

/// The number of errors, or of races, that a summary line gives.
pub fn errors(line: &str) -> Option<u64> {
    let (_, said) = line.split_once(PREFIX)?;
    let counts = said.strip_prefix("ERROR SUMMARY: ").or_else(|| said.strip_prefix("RACECHECK SUMMARY: "))?;
    counts.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn summaries_are_read_and_nothing_else() {
        assert_eq!(errors("[1] ========= ERROR SUMMARY: 0 errors"), Some(0));
        assert_eq!(errors("========= ERROR SUMMARY: 1 error"), Some(1));
        assert_eq!(
            errors("[0] ========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)"),
            Some(2)
        );
        assert_eq!(errors("[0] ========= COMPUTE-SANITIZER"), None);
        assert_eq!(errors("ERROR SUMMARY: 3 errors"), None);
        assert!(is_of_tool("[0] ========= Invalid __global__ read of size 4 bytes"));
        assert!(!is_of_tool("[0] all is well"));
    }
}
