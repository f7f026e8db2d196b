//! What ranks tell the program that started them: one JSON line per event, appended to a file per process.
//!
//! A file rather than a pipe: a rank never blocks on a reader, a library's own prints cannot mix with the events, and
//! what a killed rank said last survives it.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};
use comm_core::CommError;
use serde::{Deserialize, Serialize};

use crate::bench::row::Row;
use crate::tune::TuneEvent;

/// The environment variable that names the file which this process appends its events to.
pub const EVENTS_ENV: &str = "COMM_XTASK_EVENTS";

/// Something a rank reports.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Event {
    /// What the rank is doing from now on; shown when it hangs, waited for by fault injection.
    Phase(String),
    /// The library that the rank's backend works with.
    Library(String),
    /// The machine is not one for the backend's communicator; why. Sent by rank 0; the ranks have nothing else to do then.
    NotMade(String),
    /// A finished row of the benchmark table. Sent by rank 0.
    Row(Box<Row>),
    /// Tuning got ahead. Sent by rank 0.
    Tune(Box<TuneEvent>),
    /// A finished test case.
    Case {
        /// The case.
        name: String,
        /// How it ended.
        result: CaseResult,
    },
    /// A collective failed, as a fault test wants it to.
    Failed {
        /// The error.
        error: CommError,
        /// `CLOCK_MONOTONIC` at which the call that failed began, in nanoseconds.
        began: u64,
        /// `CLOCK_MONOTONIC` at which it returned, in nanoseconds.
        returned: u64,
        /// The call before it, which was reported to be good.
        before: Option<GoodCall>,
    },
    /// A rank of a fault test has dropped its communicator after the call that failed.
    Dropped {
        /// `CLOCK_MONOTONIC` at which the drop returned, in nanoseconds.
        at: u64,
    },
    /// The rank is done. A process that exits without it did not finish its work.
    Done,
}

/// A call that a rank took for good.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct GoodCall {
    /// Calls before it.
    pub index: u64,
    /// `CLOCK_MONOTONIC` at which it began, in nanoseconds.
    pub began: u64,
    /// `CLOCK_MONOTONIC` at which it returned, in nanoseconds.
    pub returned: u64,
}

/// How a test case ended.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum CaseResult {
    /// It held.
    Passed,
    /// It did not; why.
    Failed(String),
    /// It could not run here; why.
    Skipped(String),
    /// An earlier failure kept it from running; which.
    NotRun(String),
}

/// An event and the rank it came from.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Message {
    /// The rank.
    pub rank: usize,
    /// What it said.
    pub event: Event,
}

/// Where one rank's events go.
#[derive(Clone)]
pub struct EventSink {
    rank: usize,
    file: Option<Arc<Mutex<File>>>,
}

impl EventSink {
    /// The file that the launcher named, or nowhere when this process was not started by it.
    ///
    /// # Errors
    /// When the file cannot be opened.
    pub fn from_env(rank: usize) -> Result<Self> {
        let Some(path) = std::env::var_os(EVENTS_ENV).map(PathBuf::from) else {
            return Ok(Self { rank, file: None });
        };
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&path)
            .with_context(|| format!("opening the events file {}", path.display()))?;
        Ok(Self { rank, file: Some(Arc::new(Mutex::new(file))) })
    }

    /// The same file for another rank of this process.
    pub fn for_rank(&self, rank: usize) -> Self {
        Self { rank, file: self.file.clone() }
    }

    /// Reports an event. A lost event must not fail the rank's work: whoever waits for it notices its absence.
    pub fn emit(&self, event: Event) {
        let Some(file) = &self.file else { return };
        if let Ok(mut line) = serde_json::to_vec(&Message { rank: self.rank, event }) {
            line.push(b'\n');
            // One write of a whole line in append mode, so lines of several threads do not mix.
            let _ = file.lock().unwrap_or_else(PoisonError::into_inner).write_all(&line);
        }
    }

    /// Reports what the rank is doing from now on.
    pub fn phase(&self, text: impl Into<String>) {
        self.emit(Event::Phase(text.into()));
    }
}

/// The reading end of an events file that is still being written.
pub struct EventTail {
    file: File,
    read: u64,
    partial: Vec<u8>,
}

impl EventTail {
    /// Makes the file and starts reading it.
    ///
    /// # Errors
    /// When the file cannot be made.
    pub fn create(path: &Path) -> Result<Self> {
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .append(true)
            .open(path)
            .with_context(|| format!("creating the events file {}", path.display()))?;
        Ok(Self { file, read: 0, partial: Vec::new() })
    }

    /// The events since the last call. Lines that are no events are left out: a rank may die in the middle of one.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn drain(&mut self) -> Result<Vec<Message>> {
        self.file.seek(SeekFrom::Start(self.read))?;
        self.read += self.file.read_to_end(&mut self.partial)? as u64;
        let Some(end) = self.partial.iter().rposition(|&byte| byte == b'\n') else {
            return Ok(Vec::new());
        };
        let rest = self.partial.split_off(end + 1);
        let lines = std::mem::replace(&mut self.partial, rest);
        Ok(lines.split(|&byte| byte == b'\n').filter_map(|line| serde_json::from_slice(line).ok()).collect())
    }
}

/// `CLOCK_MONOTONIC` in nanoseconds: the one clock that all processes of a machine share.
pub fn monotonic_nanos() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tail_sees_whole_lines_only_and_each_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("events");
        let mut tail = EventTail::create(&path).unwrap();
        let file = OpenOptions::new().append(true).open(&path).unwrap();
        let sink = EventSink { rank: 3, file: Some(Arc::new(Mutex::new(file))) };
        sink.phase("one");
        let seen = tail.drain().unwrap();
        assert!(matches!(&seen[..], [Message { rank: 3, event: Event::Phase(text) }] if text == "one"));
        let whole = serde_json::to_string(&Message { rank: 0, event: Event::Done }).unwrap();
        let (head, rest) = whole.split_at(5);
        let mut raw = OpenOptions::new().append(true).open(&path).unwrap();
        raw.write_all(head.as_bytes()).unwrap();
        assert!(tail.drain().unwrap().is_empty());
        raw.write_all(rest.as_bytes()).unwrap();
        raw.write_all(b"\nno event\n").unwrap();
        assert!(matches!(&tail.drain().unwrap()[..], [Message { event: Event::Done, .. }]));
    }
}
