//! Running ranks as threads of this process.

use std::sync::Arc;
use std::time::Duration;

use crate::error::Result;
use crate::host_comm::{HostComm, ThreadComm};

/// Runs `rank_main` on `size` threads, one per rank of a fresh [`ThreadComm`], and returns their results in rank order.
///
/// # Errors
/// Only when the communicator cannot be made; the ranks' own errors are in the results.
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
    Ok(std::thread::scope(|scope| {
        let threads: Vec<_> =
            comms.into_iter().map(|comm| scope.spawn(move || rank_main(Arc::new(comm)))).collect();
        let results: Vec<_> = threads.into_iter().map(|thread| thread.join()).collect();
        results.into_iter().map(|r| r.unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
    }))
}
