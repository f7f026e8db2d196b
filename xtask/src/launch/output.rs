//! Lines of the ranks' output, each with its rank in front, so that lines of different ranks never mix.

use std::io::{BufRead, BufReader, Read};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Where finished lines go.
pub type LineSink = Arc<dyn Fn(&str) + Send + Sync>;

/// Lines to standard error, which leaves standard output to tables and reports.
pub fn stderr_sink() -> LineSink {
    Arc::new(|line| eprintln!("{line}"))
}

/// Threads that copy ranks' output until it ends.
#[derive(Default)]
pub struct Forwarders(Vec<JoinHandle<()>>);

impl Forwarders {
    /// Copies `stream` line by line to `sink`, each line as `[label] line`.
    pub fn forward(&mut self, label: String, stream: impl Read + Send + 'static, sink: LineSink) {
        self.0.push(std::thread::spawn(move || copy_lines(&label, stream, &sink)));
    }

    /// Waits for the copying to end, at most `patience`: a process that outlived its rank may hold the pipe open.
    pub fn finish(self, patience: Duration) {
        let give_up = Instant::now() + patience;
        for thread in self.0 {
            while !thread.is_finished() && Instant::now() < give_up {
                std::thread::sleep(Duration::from_millis(2));
            }
            if thread.is_finished() {
                let _ = thread.join();
            }
        }
    }
}

fn copy_lines(label: &str, stream: impl Read, sink: &LineSink) {
    let mut reader = BufReader::new(stream);
    let mut line = Vec::new();
    // A line longer than this is cut, so that a rank that prints without end cannot fill the memory.
    const LONGEST: u64 = 64 << 10;
    loop {
        line.clear();
        match reader.by_ref().take(LONGEST).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return,
            Ok(_) => {
                let text = String::from_utf8_lossy(&line);
                sink(&format!("[{label}] {}", text.trim_end_matches(['\n', '\r'])));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[test]
    fn every_line_gets_its_rank() {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let sink: LineSink = {
            let seen = Arc::clone(&seen);
            Arc::new(move |line| seen.lock().unwrap().push(line.to_owned()))
        };
        let mut forwarders = Forwarders::default();
        forwarders.forward("2".into(), &b"first\r\nsecond\n\nno newline"[..], sink);
        forwarders.finish(Duration::from_secs(5));
        assert_eq!(*seen.lock().unwrap(), ["[2] first", "[2] second", "[2] ", "[2] no newline"]);
    }
}
