//! This process's open file descriptors, counted by what they are of.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// Between two looks.
const LOOK: Duration = Duration::from_millis(20);
/// How long what is on its way is waited for: threads give back what a communicator had after it was closed or dropped.
const PATIENCE: Duration = Duration::from_secs(3);

/// How many there are of each thing: a file by its path, of sockets and pipes all.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Descriptors(BTreeMap<String, usize>);

impl Descriptors {
    /// Those that are open now.
    ///
    /// # Errors
    /// When the kernel does not list them.
    pub fn look() -> Result<Self> {
        let mut counts = BTreeMap::new();
        for entry in std::fs::read_dir("/proc/self/fd").context("listing /proc/self/fd")? {
            // One that another thread has closed since is not open.
            let Ok(target) = entry.and_then(|entry| std::fs::read_link(entry.path())) else { continue };
            *counts.entry(thing(&target.to_string_lossy())).or_insert(0) += 1;
        }
        Ok(Self(counts))
    }

    /// Those that are open once two looks see the same.
    ///
    /// # Errors
    /// As [`look`](Self::look).
    pub fn settled() -> Result<Self> {
        let start = Instant::now();
        let mut last = Self::look()?;
        loop {
            std::thread::sleep(LOOK);
            let now = Self::look()?;
            if now == last || start.elapsed() > PATIENCE {
                return Ok(now);
            }
            last = now;
        }
    }

    /// What there is more of now than then, in words; empty once there is nothing, which is waited for.
    ///
    /// # Errors
    /// As [`look`](Self::look).
    pub fn grown(&self) -> Result<Vec<String>> {
        let start = Instant::now();
        loop {
            let more = Self::look()?.more_than(self);
            if more.is_empty() || start.elapsed() > PATIENCE {
                return Ok(more);
            }
            std::thread::sleep(LOOK);
        }
    }

    /// What there is more of than in `before`. Fewer of one thing make up for nothing: a dead rank's socket goes whatever
    /// is left open.
    fn more_than(&self, before: &Self) -> Vec<String> {
        let then = |thing| before.0.get(thing).copied().unwrap_or(0);
        let grown = self.0.iter().filter(|(thing, count)| **count > then(*thing));
        grown.map(|(thing, count)| format!("{count} of {thing}, before {}", then(thing))).collect()
    }
}

/// What a descriptor is of, given where its link leads: without the numbers by which the kernel tells sockets and pipes
/// apart.
fn thing(target: &str) -> String {
    match target.split_once(":[") {
        Some((kind, number)) if number.trim_end_matches(']').bytes().all(|byte| byte.is_ascii_digit()) => {
            kind.to_owned()
        }
        _ => target.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(counts: &[(&str, usize)]) -> Descriptors {
        Descriptors(counts.iter().map(|(thing, count)| ((*thing).to_owned(), *count)).collect())
    }

    #[test]
    fn growth_of_one_thing_is_not_made_up_for_by_another() {
        let before = of(&[("socket", 4), ("/dev/nvidia0", 2)]);
        assert!(before.more_than(&before).is_empty());
        assert!(of(&[("socket", 3)]).more_than(&before).is_empty());
        let more = of(&[("socket", 2), ("/dev/nvidia0", 3), ("pipe", 1)]).more_than(&before);
        assert_eq!(more, ["3 of /dev/nvidia0, before 2", "1 of pipe, before 0"]);
    }

    #[test]
    fn an_open_file_is_seen_by_its_path() {
        let file = tempfile::NamedTempFile::new().unwrap();
        // Other tests of this process open and close what they like, but not this.
        let count = || Descriptors::look().unwrap().0.get(&*file.path().to_string_lossy()).copied();
        assert_eq!(count(), Some(1));
        let again = file.reopen().unwrap();
        assert_eq!(count(), Some(2));
        drop(again);
        assert_eq!(count(), Some(1));
    }

    #[test]
    fn sockets_and_pipes_have_numbers_and_files_have_names() {
        let things = ["socket:[1234]", "pipe:[7]", "anon_inode:[eventfd]", "/dev/nvidia0"].map(thing);
        assert_eq!(things, ["socket", "pipe", "anon_inode:[eventfd]", "/dev/nvidia0"]);
    }
}
