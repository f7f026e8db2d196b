//! NVIDIA's management library, started once.

use std::sync::{Mutex, PoisonError};

use nvml_wrapper::Nvml;
use nvml_wrapper::error::NvmlError;

/// NVML, kept for as long as the process lives: each time that it is started it opens a descriptor, which its end leaves open
/// (seen with driver 580). While it is kept no GPU is put to rest and started anew either.
///
/// # Errors
/// When there is none. The next call tries again.
pub fn nvml() -> Result<&'static Nvml, NvmlError> {
    static KEPT: Mutex<Option<&'static Nvml>> = Mutex::new(None);
    // It is set by one assignment, so a panic cannot leave it half-changed.
    let mut kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
    match *kept {
        Some(nvml) => Ok(nvml),
        None => Ok(*kept.insert(Box::leak(Box::new(Nvml::init()?)))),
    }
}
