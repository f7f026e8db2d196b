//! Asking other programs: what they print, within a time limit.

use std::io::Read;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// What a program prints on its standard output, if it ends well and in time. For answers that fit into a pipe's buffer
/// (64 KiB): nothing is read before the end.
pub fn output_of(command: &mut Command, patience: Duration) -> Option<String> {
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().ok()?;
    let give_up = Instant::now() + patience;
    loop {
        match child.try_wait() {
            Ok(Some(status)) => {
                let mut text = String::new();
                let read = child.stdout.take()?.read_to_string(&mut text);
                return (status.success() && read.is_ok()).then_some(text);
            }
            Ok(None) if Instant::now() < give_up => std::thread::sleep(Duration::from_millis(5)),
            _ => {
                let _ = child.kill();
                let _ = child.wait();
                return None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_good_and_timely_end_counts() {
        let run = |script: &str, ms| {
            output_of(Command::new("sh").args(["-c", script]), Duration::from_millis(ms))
                .as_deref()
                .map(str::to_owned)
        };
        assert_eq!(run("echo here", 20_000).as_deref(), Some("here\n"));
        assert_eq!(run("echo here; exit 1", 20_000), None);
        assert_eq!(run("exec sleep 20", 50), None);
        assert_eq!(output_of(&mut Command::new("/nonexistent"), Duration::from_secs(1)), None);
    }
}
