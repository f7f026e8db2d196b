//! Ranks as processes: a test starts its own program again, once for each rank, and each of these makes the calls of one
//! rank of the test's body.
//!
//! What threads share by address crosses between processes by descriptor (memory of the communicator) and by legacy IPC
//! (registered memory), so a body that has passed with threads has not tried either.

use std::fs::{DirBuilder, File};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use comm_core::{HostComm, Rendezvous, RendezvousAddress, Token};

use super::{PATIENT, hold_context, skipped_where_shared, world_size};

/// Set in the processes that are ranks.
const RANK: &str = "COMM_TEST_PROCESS_RANK";
const SIZE: &str = "COMM_TEST_PROCESS_SIZE";
const FOLDER: &str = "COMM_TEST_PROCESS_FOLDER";
const TOKEN: &str = "COMM_TEST_PROCESS_TOKEN";

/// For all processes of a job together; far more than one takes.
const LIMIT: Duration = Duration::from_secs(90);
/// From the first process that fails on, for the others to say what they saw.
const LAST_WORDS: Duration = Duration::from_secs(3);
/// Lines of a process's output that are shown when one has failed.
const TAIL: usize = 30;

/// What a process that is a rank knows of its job.
pub(crate) struct Part {
    pub(crate) rank: usize,
    pub(crate) size: usize,
    folder: PathBuf,
    token: Token,
}

/// This process's part, if a test has started it to be a rank.
pub(crate) fn part() -> Option<&'static Part> {
    static PART: OnceLock<Option<Part>> = OnceLock::new();
    PART.get_or_init(|| {
        let variable = |name| std::env::var(name).unwrap();
        let rank = std::env::var(RANK).ok()?.parse().unwrap();
        Some(Part {
            rank,
            size: variable(SIZE).parse().unwrap(),
            folder: variable(FOLDER).into(),
            token: Token::from_hex(&variable(TOKEN)).unwrap(),
        })
    })
    .as_ref()
}

pub(crate) fn is_process() -> bool {
    part().is_some()
}

/// Where the sockets are. The folder of a rendezvous is closed to other users.
fn meetings(folder: &Path) -> PathBuf {
    folder.join("meetings")
}

/// What a rank leaves when it is through with its test's body.
fn sign(folder: &Path, rank: usize) -> PathBuf {
    folder.join(format!("through-{rank}"))
}

fn log(folder: &Path, rank: usize) -> PathBuf {
    folder.join(format!("log-{rank}"))
}

impl Part {
    /// Meets the other processes for the next world: all come to the same worlds in the same order.
    pub(crate) fn meet(&self, size: usize) -> Arc<dyn HostComm> {
        static WORLDS: AtomicUsize = AtomicUsize::new(0);
        assert_eq!(size, self.size, "{} processes are ranks of no other world", self.size);
        let number = WORLDS.fetch_add(1, Ordering::Relaxed);
        let meeting = Rendezvous {
            address: RendezvousAddress::Unix(meetings(&self.folder).join(number.to_string())),
            rank: self.rank,
            size,
            job: "test".into(),
            token: self.token.clone(),
            timeout: PATIENT,
        };
        Arc::new(meeting.connect().unwrap())
    }
}

/// Runs `body` in two processes, each a rank, and where there are more GPUs in as many. Its worlds are made by
/// [`ranks`](super::ranks) or [`world`](super::world), and their size is [`world_size`]. `test`: the whole name of the
/// test that calls this, and does nothing else.
pub(crate) fn as_processes(test: &str, body: impl FnOnce()) {
    if let Some(part) = part() {
        let _held = hold_context(part.rank);
        body();
        File::create(sign(&part.folder, part.rank)).unwrap();
        return;
    }
    let Some(most) = world_size() else { return };
    if skipped_where_shared("processes take turns on a device, and every wait takes a turn") {
        return;
    }
    let mut sizes = vec![2, most];
    sizes.dedup();
    for size in sizes {
        Job::start(test, size).end();
    }
}

/// The processes, which are killed when this is dropped.
struct Job {
    folder: tempfile::TempDir,
    children: Vec<Child>,
    started: Instant,
}

impl Job {
    fn start(test: &str, size: usize) -> Self {
        let folder = tempfile::tempdir().unwrap();
        DirBuilder::new().mode(0o700).create(meetings(folder.path())).unwrap();
        let token = Token::random().unwrap().to_hex();
        let mut job = Self { folder, children: Vec::new(), started: Instant::now() };
        for rank in 0..size {
            // Into a file: among this program's output their harnesses' results would count as its own.
            let output = File::create(log(job.folder.path(), rank)).unwrap();
            let child = Command::new(std::env::current_exe().unwrap())
                .args([test, "--exact", "--nocapture", "--test-threads=1"])
                .env(RANK, rank.to_string())
                .env(SIZE, size.to_string())
                .env(FOLDER, job.folder.path())
                .env(TOKEN, &token)
                .stdin(Stdio::null())
                .stdout(output.try_clone().unwrap())
                .stderr(output)
                .spawn()
                .unwrap();
            job.children.push(child);
        }
        job
    }

    /// Waits until all have ended. Fails unless all have ended well, and have been through the test's body.
    fn end(mut self) {
        let size = self.children.len();
        let mut left: Vec<usize> = (0..size).collect();
        let mut failed = Vec::new();
        let mut until = self.started + LIMIT;
        while !left.is_empty() && Instant::now() < until {
            left.retain(|&rank| {
                let Some(status) = self.children[rank].try_wait().unwrap() else { return true };
                if !status.success() {
                    failed.push((rank, status));
                    until = until.min(Instant::now() + LAST_WORDS);
                }
                false
            });
            std::thread::sleep(Duration::from_millis(10));
        }
        let folder = self.folder.path();
        let said = |rank| std::fs::read_to_string(log(folder, rank)).unwrap_or_default();
        if !failed.is_empty() || !left.is_empty() {
            for rank in 0..size {
                let said = said(rank);
                let lines: Vec<_> = said.lines().collect();
                lines[lines.len().saturating_sub(TAIL)..]
                    .iter()
                    .for_each(|line| println!("    process {rank}: {line}"));
            }
            panic!("of {size} processes failed: {failed:?}, still at work: {left:?}");
        }
        // A harness that knows no test of the name ends well, too.
        let absent: Vec<_> = (0..size).filter(|&rank| !sign(folder, rank).exists()).collect();
        assert!(absent.is_empty(), "processes {absent:?} ran no test: {}", said(absent[0]));
        said(0).lines().for_each(|line| println!("    process 0: {line}"));
        println!("    {size} processes: {:.1} s", self.started.elapsed().as_secs_f64());
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
