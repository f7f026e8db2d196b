//! Running ranks as threads of this process.

use std::sync::Arc;
use std::time::Duration;

use crate::error::{CommError, Result};
use crate::host_comm::{HostComm, ThreadComm};

/// Runs `rank_main` on `size` threads, one per rank of a fresh [`ThreadComm`], and returns their results in rank order.
///
/// # Errors
/// [`CommError::InvalidArgument`] when there can be no communicator of `size` ranks, and [`CommError::Io`] when the system
/// has no threads for them: the ranks that had started see the others as gone. The ranks' own errors are in the results.
///
/// # Panics
/// When a rank's thread panics, after all of them have ended.
pub fn run_threads<T: Send>(
    size: usize,
    timeout: Duration,
    rank_main: impl Fn(Arc<dyn HostComm>) -> T + Sync,
) -> Result<Vec<T>> {
    let comms = ThreadComm::create(size, timeout)?;
    let rank_main = &rank_main;
    std::thread::scope(|scope| {
        let start = |comm: ThreadComm| {
            let builder = std::thread::Builder::new().name(format!("rank {}", comm.rank()));
            builder
                .spawn_scoped(scope, move || rank_main(Arc::new(comm)))
                .map_err(|error| CommError::io("starting a rank's thread", &error))
        };
        // The first failure drops the handles of the ranks that have no thread, which ends the waits of those that have.
        let threads = comms.into_iter().map(start).collect::<Result<Vec<_>>>()?;
        let results: Vec<_> = threads.into_iter().map(|thread| thread.join()).collect();
        Ok(results.into_iter().map(|r| r.unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect())
    })
}
