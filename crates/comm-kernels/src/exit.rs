//! What the end of the process waits for.
//!
//! A dropped or failed communicator is taken down by a thread of its own. Were the process to end meanwhile, the driver
//! would be torn down under that thread, which can crash. So the first such thread registers a handler that runs before
//! the driver's, because it is registered after it: it lets takedowns finish, within a bound, and sends home threads
//! whose communicators nobody is ending.

use std::ffi::c_int;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, Once, PoisonError};
use std::time::Duration;

unsafe extern "C" {
    /// C's own.
    fn atexit(handler: extern "C" fn()) -> c_int;
}

/// How long the end of the process may be held up.
const LIMIT: Duration = Duration::from_secs(5);

static LIVE: Mutex<usize> = Mutex::new(0);
static ENDED: Condvar = Condvar::new();
static EXITING: AtomicBool = AtomicBool::new(false);
static HANDLER: Once = Once::new();

/// A thread that uses the driver, counted while this lives.
#[derive(Debug)]
pub struct Live(());

impl Live {
    /// Counts the calling thread, or one that it is about to start. The driver has been initialised.
    #[must_use]
    #[allow(clippy::new_without_default, reason = "counting is an act, not a value")]
    pub fn new() -> Self {
        HANDLER.call_once(|| {
            // SAFETY: the handler takes nothing, never unwinds, and code of this program stays loaded until its end. If
            // there is no room for it, the end does not wait.
            let _ = unsafe { atexit(at_exit) };
        });
        *lock(&LIVE) += 1;
        Self(())
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        *lock(&LIVE) -= 1;
        ENDED.notify_all();
    }
}

/// Whether the process is ending.
#[must_use]
pub fn is_near() -> bool {
    EXITING.load(Ordering::Acquire)
}

fn lock(mutex: &Mutex<usize>) -> MutexGuard<'_, usize> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

extern "C" fn at_exit() {
    EXITING.store(true, Ordering::Release);
    // Late or not, the process ends. Nothing is logged: thread-local state is gone by now, and a subscriber that panics
    // for that would end the process the hard way.
    let _ = wait(LIMIT);
}

/// Waits until no thread is counted any more, and returns whether that came within the limit.
fn wait(limit: Duration) -> bool {
    let live = lock(&LIVE);
    let (live, _) =
        ENDED.wait_timeout_while(live, limit, |live| *live > 0).unwrap_or_else(PoisonError::into_inner);
    *live == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_waits_for_threads_and_not_for_ever() {
        let live = Live::new();
        assert!(!wait(Duration::from_millis(10)));
        let thread = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(20));
            drop(live);
        });
        assert!(wait(Duration::from_secs(10)));
        assert!(thread.join().is_ok());
    }
}
