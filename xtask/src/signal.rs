//! Ctrl-C and SIGTERM: noted in a flag that every wait of the program looks at, so that children are ended in order.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Whether the user asked the program to stop.
pub fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}

/// Starts noting signals. A second signal ends the program at once; its children then die by their parent-death signal.
///
/// # Errors
/// When the handler cannot be installed.
pub fn watch() -> Result<()> {
    ctrlc::set_handler(|| {
        if INTERRUPTED.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
        eprintln!("interrupted: ending the ranks (press again to leave at once)");
    })
    .context("installing the Ctrl-C handler")
}
