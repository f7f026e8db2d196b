//! The CUDA driver: whether it is there, its errors as [`CommError`], and waits that end.
//!
//! cudarc panics when the driver's library or one of its functions is missing. Everything in this crate that may be
//! the first to touch the driver calls [`probe`] before, and so should its users.

use std::borrow::Cow;
use std::error::Error as _;
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use comm_core::{CommError, Result};
use cudarc::driver::{DriverError, result, sys};
use libloading::Library;

const LIBRARIES: [&str; 2] = ["libcuda.so.1", "libcuda.so"];

/// The youngest functions that this crate calls: with these, the driver has all of them.
const YOUNGEST: [&str; 3] = ["cuCtxGetId", "cuStreamGetId", "cuEventElapsedTime_v2"];

/// How long a wait for the device spins before it starts to sleep: shorter ones are common in measurements.
const SPIN: Duration = Duration::from_millis(2);
const NAP: Duration = Duration::from_micros(50);

/// Whether the CUDA driver can be used: its library loads, has the functions needed, and initialises.
///
/// The first call's answer holds for the life of the process.
///
/// # Errors
/// [`CommError::Library`], which says what was tried and what to do.
pub fn probe() -> Result<()> {
    static ANSWER: OnceLock<Result<()>> = OnceLock::new();
    ANSWER.get_or_init(probe_once).clone()
}

fn probe_once() -> Result<()> {
    let missing = |reason: String| CommError::Library { library: Cow::Borrowed(LIBRARIES[0]), reason };
    let mut failures = Vec::new();
    let library = LIBRARIES.iter().find_map(|name| {
        // SAFETY: loading NVIDIA's driver library runs its initialisers, which have no preconditions.
        unsafe { Library::new(*name) }.map_err(|error| failures.push(loader_words(&error))).ok()
    });
    let Some(library) = library else {
        return Err(missing(format!(
            "{}; install NVIDIA's driver, or in a container make it visible (`--gpus all`)",
            failures.join("; ")
        )));
    };
    for name in YOUNGEST {
        // SAFETY: the symbol is only looked up, not called.
        if unsafe { library.get::<unsafe extern "C" fn()>(name.as_bytes()) }.is_err() {
            return Err(missing(format!(
                "it lacks {name}: the driver is too old, CUDA 12.8 or later is needed"
            )));
        }
    }
    // SAFETY: this is the function's C signature (CUDA Driver API, Initialization).
    let init = unsafe { library.get::<unsafe extern "C" fn(u32) -> i32>(b"cuInit") }
        .map_err(|error| missing(format!("it lacks cuInit: {error}")))?;
    // SAFETY: cuInit takes 0 and may be called any number of times.
    match unsafe { init(0) } {
        0 => {
            // The driver stays loaded for the life of the process, as cudarc keeps it anyway.
            std::mem::forget(library);
            Ok(())
        }
        34 => Err(missing(
            "it is the toolkit's stub library; take its folder out of LD_LIBRARY_PATH, so that the driver's own is \
             found"
                .into(),
        )),
        100 => Err(missing("the driver sees no GPU; check `nvidia-smi` and CUDA_VISIBLE_DEVICES".into())),
        code => Err(missing(format!("cuInit failed with {code}; check `nvidia-smi` and the kernel's log"))),
    }
}

/// Why the loader refused a library: its own words stand behind the error, which by itself says only that it did.
fn loader_words(error: &libloading::Error) -> String {
    error.source().map_or_else(|| error.to_string(), |cause| format!("{error}: {cause}"))
}

/// The number of GPUs that this process may use.
///
/// # Errors
/// As [`probe`], or what the driver says.
pub fn device_count() -> Result<usize> {
    probe()?;
    let count = result::device::get_count().map_err(failed("cuDeviceGetCount"))?;
    usize::try_from(count)
        .map_err(|_| CommError::invalid("device count", format!("the driver reports {count} devices")))
}

/// The newest CUDA version that the driver supports: major and minor.
///
/// # Errors
/// As [`probe`], or what the driver says.
pub fn version() -> Result<(u32, u32)> {
    probe()?;
    let mut version = 0;
    // SAFETY: the argument is a valid place for an int.
    unsafe { sys::cuDriverGetVersion(&raw mut version) }.result().map_err(failed("cuDriverGetVersion"))?;
    let version = u32::try_from(version).unwrap_or(0);
    Ok((version / 1000, version % 1000 / 10))
}

/// A driver call's failure as an error.
#[must_use]
pub fn error(call: impl Into<Cow<'static, str>>, code: sys::CUresult) -> CommError {
    let error = DriverError(code);
    // Asking for the name needs the library; without it there is still the binding's name for the code.
    let name = if probe().is_ok() { error.error_name().ok() } else { None };
    let message = name.map_or_else(|| format!("{code:?}"), |name| name.to_string_lossy().into_owned());
    CommError::Cuda { call: call.into(), code: code as i32, message }
}

/// For `map_err`: turns the failure of `call` into an error.
pub(crate) fn failed(call: &'static str) -> impl Fn(DriverError) -> CommError {
    move |failure| error(call, failure.0)
}

/// Asks again and again until `query` no longer says "not ready", for `timeout` at most.
///
/// # Errors
/// What `query` says; after `timeout`, [`CommError::Cuda`] with `CUDA_ERROR_NOT_READY`.
pub(crate) fn wait_until_ready(
    call: &'static str,
    timeout: Duration,
    mut query: impl FnMut() -> Result<(), DriverError>,
) -> Result<()> {
    let begin = Instant::now();
    loop {
        match query() {
            Err(DriverError(sys::CUresult::CUDA_ERROR_NOT_READY)) => {}
            other => return other.map_err(failed(call)),
        }
        let waited = begin.elapsed();
        if waited >= timeout {
            return Err(CommError::Cuda {
                call: call.into(),
                code: sys::CUresult::CUDA_ERROR_NOT_READY as i32,
                message: format!("the work on the stream is not complete after {waited:?}"),
            });
        }
        if waited < SPIN {
            thread::yield_now();
        } else {
            thread::sleep(NAP);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_end() {
        let never = || Err(DriverError(sys::CUresult::CUDA_ERROR_NOT_READY));
        let begin = Instant::now();
        let error = wait_until_ready("cuStreamQuery", Duration::from_millis(20), never).unwrap_err();
        assert!(matches!(error, CommError::Cuda { code: 600, .. }), "{error}");
        assert!(begin.elapsed() < Duration::from_secs(5));
        let mut calls = 0;
        let third_time = || {
            calls += 1;
            if calls < 3 { never() } else { Ok(()) }
        };
        wait_until_ready("cuStreamQuery", Duration::from_secs(5), third_time).unwrap();
    }

    #[test]
    fn a_library_that_does_not_load_is_named_in_the_loader_s_words() {
        // SAFETY: there is no such file, so nothing is loaded.
        let error = unsafe { Library::new("libnowhere.so.7") }.err().unwrap();
        assert!(loader_words(&error).contains("libnowhere.so.7"), "{}", loader_words(&error));
    }

    #[test]
    fn without_a_driver_everything_is_an_error_that_says_what_to_do() {
        match probe() {
            Ok(()) => println!("SKIP: there is a driver here"),
            Err(error) => {
                assert!(matches!(error, CommError::Library { .. }));
                assert!(error.to_string().contains("driver"), "{error}");
                assert_eq!(device_count().unwrap_err(), error);
                let text = super::error("cuInit", sys::CUresult::CUDA_ERROR_NO_DEVICE).to_string();
                assert!(text.contains("CUDA_ERROR_NO_DEVICE") && text.contains("100"), "{text}");
            }
        }
    }
}
