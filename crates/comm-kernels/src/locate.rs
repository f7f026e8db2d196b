//! Finding the compiled kernels at run time.
//!
//! Looked for in this order, the first that is there counts: the folder `COMM_KERNELS_DIR`; what was embedded when
//! this crate was built; `kernels/` beside the running program or beside its folder (a bundle); `target/kernels` of a checkout, upward from
//! the program and from the current directory. In the folders of the last two, kernels count only if their manifest
//! belongs to the user, to root or to the program's owner and not all may write it: a folder upward of the current one
//! (`/tmp`, say) could be anyone's, and kernels are code. Kernels found but built from other sources than this crate are an
//! error, never passed over.

use std::borrow::Cow;
use std::collections::HashSet;
use std::env;
use std::fmt;
use std::fs;
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use comm_core::{CommError, Result};

use crate::manifest::{self, FILE_NAME, Manifest, SCHEMA};

mod embedded {
    include!(concat!(env!("OUT_DIR"), "/embedded.rs"));
}

/// The fingerprint of the sources that this crate's launchers were written for.
pub const SOURCES_SHA256: &str = env!("COMM_KERNELS_SOURCES_SHA256");

/// The environment variable that names a folder of compiled kernels.
pub const VARIABLE: &str = "COMM_KERNELS_DIR";

/// Where kernels were found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Origin {
    /// In a folder, beside its manifest.
    Folder(PathBuf),
    /// In this program.
    Embedded,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Folder(path) => write!(f, "{}", path.display()),
            Self::Embedded => f.write_str("embedded in the program"),
        }
    }
}

/// Compiled kernels that fit this crate.
#[derive(Clone, Debug)]
pub struct KernelSet {
    origin: Origin,
    manifest: Manifest,
}

impl KernelSet {
    /// Finds the kernels.
    ///
    /// # Errors
    /// [`CommError::Library`] when there are none (it lists where they were looked for), or the first that were found
    /// do not fit.
    pub fn locate() -> Result<Self> {
        let exe = env::current_exe().ok();
        let cwd = env::current_dir().ok();
        Search {
            variable: env::var_os(VARIABLE).map(PathBuf::from),
            embedded: embedded::MANIFEST,
            exe: exe.as_deref(),
            cwd: cwd.as_deref(),
            user: rustix::process::geteuid().as_raw(),
        }
        .run()
    }

    /// Where they were found.
    #[must_use]
    pub const fn origin(&self) -> &Origin {
        &self.origin
    }

    /// What was compiled.
    #[must_use]
    pub const fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The compiled module, checked against the manifest.
    ///
    /// # Errors
    /// [`CommError::Library`] when there is no such module or its content is not what the manifest describes.
    pub fn image(&self, module: &str) -> Result<Image> {
        let entry = self.manifest.modules.get(module).ok_or_else(|| {
            unusable(format!("the kernels at {} have no module {module:?}; {WHAT_TO_DO}", self.origin))
        })?;
        let bytes: Cow<'static, [u8]> = match &self.origin {
            Origin::Folder(dir) => {
                let path = dir.join(&entry.file);
                let bytes = fs::read(&path).map_err(|error| {
                    unusable(format!("reading {}: {error}; {WHAT_TO_DO}", path.display()))
                })?;
                Cow::Owned(bytes)
            }
            Origin::Embedded => {
                let found = embedded::MODULES.iter().find(|(name, _)| *name == module);
                let (_, bytes) = found
                    .ok_or_else(|| unusable(format!("module {module:?} was not embedded; {WHAT_TO_DO}")))?;
                Cow::Borrowed(*bytes)
            }
        };
        if manifest::sha256(&bytes) != entry.sha256 {
            return Err(unusable(format!(
                "module {module:?} at {} is not the file that its manifest describes; {WHAT_TO_DO}",
                self.origin
            )));
        }
        Ok(Image::new(&bytes))
    }
}

/// A module's bytes, aligned and followed by zeros as the driver's loader wants them.
#[derive(Clone, Debug)]
pub struct Image {
    words: Vec<u64>,
    bytes: usize,
}

impl Image {
    fn new(bytes: &[u8]) -> Self {
        let mut words = Vec::with_capacity(bytes.len() / 8 + 2);
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            words.push(u64::from_ne_bytes(word));
        }
        words.push(0);
        Self { words, bytes: bytes.len() }
    }

    /// The first byte; aligned to 8.
    #[must_use]
    pub const fn as_ptr(&self) -> *const std::ffi::c_void {
        self.words.as_ptr().cast()
    }

    /// Bytes, without the zeros that follow.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.bytes
    }

    /// Whether there are no bytes.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.bytes == 0
    }
}

const WHAT_TO_DO: &str = "run `cargo xtask kernels` or set COMM_KERNELS_DIR to a folder of compiled kernels";

fn unusable(reason: String) -> CommError {
    CommError::Library { library: Cow::Borrowed("CUDA kernels"), reason }
}

/// Where to look: the process's surroundings, as values.
struct Search<'a> {
    variable: Option<PathBuf>,
    embedded: Option<&'static str>,
    exe: Option<&'a Path>,
    cwd: Option<&'a Path>,
    user: u32,
}

impl Search<'_> {
    fn run(self) -> Result<KernelSet> {
        if let Some(dir) = self.variable {
            return match read(&dir, |_| Ok(()))? {
                Some(Found::Set(set)) => Ok(set),
                _ => Err(unusable(format!(
                    "{VARIABLE} is {}, where there is no {FILE_NAME}; {WHAT_TO_DO}",
                    dir.display()
                ))),
            };
        }
        if let Some(text) = self.embedded {
            return parse(text.as_bytes(), Origin::Embedded);
        }
        let mut folders = Vec::new();
        if let Some(exe) = self.exe {
            folders.extend(exe.ancestors().skip(1).take(2).map(|dir| dir.join("kernels")));
        }
        for start in [self.exe, self.cwd].into_iter().flatten() {
            // Only a checkout or the target folder of one has `target/kernels`.
            folders.extend(start.ancestors().map(|dir| dir.join("target/kernels")));
        }
        let mut seen = HashSet::new();
        folders.retain(|dir| seen.insert(dir.clone()));
        // Whoever owns the program could have put any kernels into it.
        let owner = self.exe.and_then(|exe| fs::metadata(exe).ok()).map(|meta| meta.uid());
        let trusted = |meta: &fs::Metadata| {
            let uid = meta.uid();
            if uid != self.user && uid != 0 && Some(uid) != owner {
                return Err(format!("it belongs to another user ({uid})"));
            }
            if meta.mode() & 0o002 != 0 { Err("everyone may write it".to_owned()) } else { Ok(()) }
        };
        let mut skipped = String::new();
        for dir in &folders {
            match read(dir, trusted)? {
                Some(Found::Set(set)) => return Ok(set),
                Some(Found::Untrusted(why)) => {
                    skipped += &format!("; {} was passed over: {why}", dir.join(FILE_NAME).display());
                }
                None => {}
            }
        }
        let searched: Vec<String> = folders.iter().map(|dir| dir.display().to_string()).collect();
        Err(unusable(format!(
            "none were found: {VARIABLE} is not set, none are embedded, and there is no {FILE_NAME} to \
             use in {}{skipped}; {WHAT_TO_DO}",
            searched.join(", ")
        )))
    }
}

/// A manifest that is there.
enum Found {
    Set(KernelSet),
    Untrusted(String),
}

/// Reads a folder's manifest if `trusted` accepts it. Modules need no check of their own: the manifest has their hashes.
fn read(
    dir: &Path,
    trusted: impl Fn(&fs::Metadata) -> std::result::Result<(), String>,
) -> Result<Option<Found>> {
    let path = dir.join(FILE_NAME);
    // The opened file's owner: what the path names could change between asking and reading.
    let open = || -> std::io::Result<std::result::Result<Vec<u8>, String>> {
        let mut file = fs::File::open(&path)?;
        if let Err(why) = trusted(&file.metadata()?) {
            return Ok(Err(why));
        }
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(Ok(bytes))
    };
    match open() {
        Ok(Ok(bytes)) => parse(&bytes, Origin::Folder(dir.to_path_buf())).map(|set| Some(Found::Set(set))),
        Ok(Err(why)) => Ok(Some(Found::Untrusted(why))),
        Err(error)
            if matches!(error.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory) =>
        {
            Ok(None)
        }
        Err(error) => Err(unusable(format!("reading {}: {error}", path.display()))),
    }
}

fn parse(bytes: &[u8], origin: Origin) -> Result<KernelSet> {
    let schema = serde_json::from_slice::<serde_json::Value>(bytes)
        .map_err(|error| unusable(format!("the manifest at {origin} is not JSON: {error}; {WHAT_TO_DO}")))?
        .get("schema")
        .and_then(serde_json::Value::as_u64);
    if schema != Some(u64::from(SCHEMA)) {
        let found = schema.map_or_else(|| "none".to_owned(), |schema| schema.to_string());
        return Err(unusable(format!(
            "the manifest at {origin} has format {found}, this program reads format {SCHEMA}; {WHAT_TO_DO}"
        )));
    }
    let manifest: Manifest = serde_json::from_slice(bytes)
        .map_err(|error| unusable(format!("the manifest at {origin} is malformed: {error}; {WHAT_TO_DO}")))?;
    if manifest.sources_sha256 != SOURCES_SHA256 {
        return Err(unusable(format!(
            "the kernels at {origin} were built from other sources ({:.12}) than this program ({SOURCES_SHA256:.12}); \
             {WHAT_TO_DO}",
            manifest.sources_sha256
        )));
    }
    Ok(KernelSet { origin, manifest })
}

#[cfg(test)]
mod tests;
