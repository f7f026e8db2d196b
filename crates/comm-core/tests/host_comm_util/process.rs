//! Ranks as processes: a test starts its own program again, once for each rank.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use comm_core::RendezvousAddress;
use rustix::process::{Pid, Signal};

use super::{Kind, free_port};

const RESULTS: &str = "COMM_TEST_RESULTS";

/// One job's rank processes, which are killed when this is dropped.
pub(crate) struct Job {
    children: Vec<Child>,
    pub(crate) results: tempfile::TempDir,
    pub(crate) started: Instant,
}

impl Job {
    /// Starts `size` processes that run the test named `test` in the role of a rank.
    pub(crate) fn start(test: &str, size: usize, kind: Kind, timeout: Duration) -> Self {
        let results = tempfile::tempdir().unwrap();
        let address = match kind {
            Kind::Tcp => RendezvousAddress::Tcp { host: "127.0.0.1".into(), port: free_port() },
            _ => RendezvousAddress::Unix(results.path().join("sock").join("s")),
        };
        let token = comm_core::Token::random().unwrap().to_hex();
        let secs = timeout.as_secs_f64().to_string();
        let vars =
            [("COMM_RENDEZVOUS", address.to_string()), ("COMM_TOKEN", token), ("COMM_TIMEOUT_SECS", secs)];
        Self::start_with(test, size, &vars, results)
    }

    /// The same with variables of the caller's; `RANK` and `WORLD_SIZE` are set.
    pub(crate) fn start_with(
        test: &str,
        size: usize,
        vars: &[(&str, String)],
        results: tempfile::TempDir,
    ) -> Self {
        let start_rank = |rank: usize| {
            let mut command = Command::new(std::env::current_exe().unwrap());
            command.args([test, "--exact", "--nocapture", "--test-threads=1"]);
            for name in ["COMM_RENDEZVOUS", "COMM_TOKEN", "COMM_TOKEN_FILE", "COMM_JOB_ID", "COMM_PORT"] {
                command.env_remove(name);
            }
            command.env("RANK", rank.to_string()).env("WORLD_SIZE", size.to_string());
            command.env(RESULTS, results.path()).envs(vars.iter().map(|(name, value)| (name, value)));
            command.stdout(Stdio::null()).spawn().unwrap()
        };
        let children = (0..size).map(start_rank).collect();
        Self { children, results, started: Instant::now() }
    }

    pub(crate) fn signal(&self, rank: usize, signal: Signal) {
        rustix::process::kill_process(Pid::from_child(&self.children[rank]), signal).unwrap();
    }

    /// Waits until a rank has reported under `name`, and gives the report.
    pub(crate) fn report(&self, rank: usize, name: &str, limit: Duration) -> String {
        let start = Instant::now();
        loop {
            if let Ok(text) = std::fs::read_to_string(self.results.path().join(format!("{name}-{rank}"))) {
                return text;
            }
            assert!(start.elapsed() < limit, "rank {rank} did not report {name} within {limit:?}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Waits until a rank's process has ended well.
    pub(crate) fn join(&mut self, rank: usize) {
        let status = self.children[rank].wait().unwrap();
        assert!(status.success(), "rank {rank}: {status}");
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

/// Whether this process was started by [`Job::start`] to be a rank.
pub(crate) fn is_rank() -> bool {
    std::env::var_os(RESULTS).is_some()
}

/// A rank's report to the test that started it.
pub(crate) fn tell(name: &str, text: &str) {
    let dir = std::env::var(RESULTS).unwrap();
    let rank = std::env::var("RANK").unwrap();
    let path = Path::new(&dir).join(format!("{name}-{rank}"));
    // The report appears whole or not at all.
    std::fs::write(path.with_extension("part"), text).unwrap();
    std::fs::rename(path.with_extension("part"), path).unwrap();
}
