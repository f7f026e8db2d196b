//! The loaded library.

use std::ffi::CStr;
use std::fmt;
use std::mem::ManuallyDrop;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use comm_core::{CommError, Result};
use libloading::Library;

use super::search;
use crate::sys::{self, Api};

/// A version of NCCL.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Version {
    /// Major.
    pub major: u32,
    /// Minor.
    pub minor: u32,
    /// Patch.
    pub patch: u32,
}

impl Version {
    /// From its parts.
    #[must_use]
    pub const fn new(major: u32, minor: u32, patch: u32) -> Self {
        Self { major, minor, patch }
    }

    /// From the number that `ncclGetVersion` gives, whose form changed with 2.9.
    #[must_use]
    pub const fn from_code(code: u32) -> Self {
        if code < 10_000 {
            return Self::new(code / 1000, code / 100 % 10, code % 100);
        }
        Self::new(code / 10_000, code / 100 % 100, code % 100)
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

/// NCCL, loaded. Stays loaded until the process ends: its threads may run on after the last communicator is gone.
pub struct NcclLibrary {
    api: Api,
    version: Version,
    path: PathBuf,
    _library: ManuallyDrop<Library>,
}

impl fmt::Debug for NcclLibrary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NcclLibrary").field("version", &self.version).field("path", &self.path).finish()
    }
}

impl NcclLibrary {
    /// Finds and loads the library: the file that `COMM_NCCL_LIBRARY` names, if it is set and not empty; otherwise `libnccl.so.2` on
    /// the loader's path, then NVIDIA's wheel in the active virtual or Conda environment, then wherever `python3` finds
    /// that wheel.
    ///
    /// # Errors
    /// [`CommError::Library`] that lists what was tried, or names the symbol that the library lacks.
    pub fn load() -> Result<Arc<Self>> {
        if let Some(path) = std::env::var_os(search::VARIABLE).filter(|path| !path.is_empty()) {
            return Self::open(Path::new(&path));
        }
        let mut tried = Vec::new();
        let environments = search::active_environments();
        let mut attempt = |path: &Path| match Self::open(path) {
            Ok(library) => Some(library),
            Err(error) => {
                tried.push(match error {
                    CommError::Library { reason, .. } => format!("{}: {reason}", path.display()),
                    other => format!("{}: {other}", path.display()),
                });
                None
            }
        };
        if let Some(library) = attempt(Path::new(search::SONAME)) {
            return Ok(library);
        }
        for path in search::in_environments(environments) {
            if let Some(library) = attempt(&path) {
                return Ok(library);
            }
        }
        match search::ask_python(Path::new("python3")) {
            Ok(path) => {
                if let Some(library) = attempt(&path) {
                    return Ok(library);
                }
            }
            Err(reason) => tried.push(format!("python3: {reason}")),
        }
        Err(CommError::Library {
            library: search::SONAME.into(),
            reason: format!(
                "not found. Tried {}. Install NCCL (for example `pip install nvidia-nccl-cu13`) or set {} to the \
                 path of {}",
                tried.join("; "),
                search::VARIABLE,
                search::SONAME
            ),
        })
    }

    /// Loads the library at `path`; a bare file name is looked up on the loader's path.
    ///
    /// # Errors
    /// [`CommError::Library`].
    pub fn open(path: &Path) -> Result<Arc<Self>> {
        let failed =
            |reason: String| CommError::Library { library: path.display().to_string().into(), reason };
        // SAFETY: loading NCCL runs its initialisers, which only set up tables. A file that is not NCCL is the fault of
        // whoever named it.
        let library = unsafe { Library::new(path) }.map_err(|error| failed(with_cause(&error)))?;
        let version = version(&library).map_err(failed)?;
        // SAFETY: the file has just answered NCCL's version query, so its `nccl` symbols are NCCL's.
        let api = unsafe { Api::load(&library) }.map_err(|symbol| {
            failed(format!("NCCL {version} lacks the symbol {symbol}; 2.19 or newer is needed"))
        })?;
        let path = if path.is_absolute() {
            path.to_owned()
        } else {
            search::mapped_path().unwrap_or_else(|| path.to_owned())
        };
        tracing::debug!(%version, path = %path.display(), "loaded NCCL");
        Ok(Arc::new(Self { api, version, path, _library: ManuallyDrop::new(library) }))
    }

    /// The library's version.
    #[must_use]
    pub const fn version(&self) -> Version {
        self.version
    }

    /// The file it was loaded from.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The raw functions.
    #[must_use]
    pub const fn api(&self) -> &Api {
        &self.api
    }

    /// An optional function that is needed now.
    ///
    /// # Errors
    /// [`CommError::Library`] that names the symbol and the version found.
    pub fn need<F>(&self, function: Option<F>, symbol: &'static str) -> Result<F> {
        function.ok_or_else(|| CommError::Library {
            library: self.path.display().to_string().into(),
            reason: format!("NCCL {} lacks the symbol {symbol}; a newer version has it", self.version),
        })
    }

    /// The error for a status other than success, with the library's words.
    #[must_use]
    pub fn error(&self, call: &'static str, status: sys::Status) -> CommError {
        // SAFETY: the function takes any number and returns a static string.
        let summary = unsafe { text((self.api.get_error_string)(status)) };
        let detail = self.api.get_last_error.map(|last| {
            // SAFETY: the header documents the communicator as unused; the string belongs to the library and is copied
            // before anything else is called.
            unsafe { text(last(std::ptr::null_mut())) }
        });
        let message = match detail {
            Some(detail) if !detail.is_empty() => format!("{summary}: {detail}"),
            _ => summary,
        };
        CommError::Backend { backend: crate::NAME.into(), call: call.into(), code: status.into(), message }
    }
}

/// An error's words and its cause's: the loader's own words are the cause of what the wrapper says.
fn with_cause(error: &dyn std::error::Error) -> String {
    let words = error.to_string();
    match error.source().map(ToString::to_string) {
        Some(cause) if !words.contains(&cause) => format!("{words}: {cause}"),
        _ => words,
    }
}

/// Copies a C string that may be null.
///
/// # Safety
/// `chars` is null or a C string.
unsafe fn text(chars: *const std::ffi::c_char) -> String {
    if chars.is_null() {
        return String::new();
    }
    // SAFETY: the caller vouches for it.
    unsafe { CStr::from_ptr(chars) }.to_string_lossy().trim().to_owned()
}

fn version(library: &Library) -> Result<Version, String> {
    type GetVersion = unsafe extern "C" fn(*mut std::ffi::c_int) -> sys::Status;
    // SAFETY: NCCL declares it so; the name is not used by other libraries.
    let get = unsafe { library.get::<GetVersion>("ncclGetVersion\0") }
        .map_err(|_| "it lacks the symbol ncclGetVersion, so it is not NCCL".to_owned())?;
    let mut code = 0;
    // SAFETY: the pointer is valid for the write.
    let status = unsafe { get(&raw mut code) };
    match u32::try_from(code) {
        Ok(code) if status == sys::SUCCESS => Ok(Version::from_code(code)),
        _ => Err(format!("ncclGetVersion returned status {status}, version {code}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_in_both_forms() {
        assert_eq!(Version::from_code(22809), Version::new(2, 28, 9));
        assert_eq!(Version::from_code(2804), Version::new(2, 8, 4));
        assert!(Version::new(2, 19, 0) < Version::from_code(22403));
        assert_eq!(Version::from_code(22809).to_string(), "2.28.9");
    }

    #[test]
    fn a_file_that_is_missing_or_not_nccl_says_so() {
        let missing = NcclLibrary::open(Path::new("/nonexistent/libnccl.so.2")).unwrap_err().to_string();
        assert!(missing.contains("/nonexistent/libnccl.so.2"), "{missing}");
        assert!(missing.contains("No such file"), "{missing}");
        let other = NcclLibrary::open(Path::new("libc.so.6")).unwrap_err().to_string();
        assert!(other.contains("ncclGetVersion"), "{other}");
    }
}
