//! The manifest that the kernel build writes beside the compiled modules, and the fingerprint that ties compiled
//! kernels to the launchers they were built for.
//!
//! It is data only: it finds nothing, loads nothing, and is compiled into the build script as well, so it depends on
//! nothing else of this crate.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// The version of the manifest's own format.
pub const SCHEMA: u32 = 1;

/// The manifest's file name, in the same folder as the modules.
pub const FILE_NAME: &str = "manifest.json";

/// The numbers of ranks that there are peer-to-peer kernels for.
pub const WORLDS: [usize; 7] = [2, 3, 4, 5, 6, 7, 8];

fn all_worlds() -> Vec<usize> {
    WORLDS.to_vec()
}

/// What was compiled, from what, by what.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Manifest {
    /// [`SCHEMA`] at the time of writing.
    pub schema: u32,
    /// [`sources_sha256`] of the CUDA sources.
    pub sources_sha256: String,
    /// What `nvcc --version` calls its build.
    pub nvcc: String,
    /// The architectures compiled for, as given to `--arch`: `80`, `90a`, `ptx`.
    pub archs: Vec<String>,
    /// The numbers of ranks that the peer-to-peer kernels are compiled for: of [`WORLDS`], in order.
    #[serde(default = "all_worlds")]
    pub worlds: Vec<usize>,
    /// The modules by name; see [`module_name`].
    pub modules: BTreeMap<String, Module>,
}

/// One compiled `.cu` file.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Module {
    /// File name, relative to the manifest.
    pub file: String,
    /// SHA-256 of the file, in hexadecimal.
    pub sha256: String,
    /// SHA-256 over everything the compilation depended on: when it is unchanged, so is the module.
    pub inputs_sha256: String,
    /// The kernels by name, and what each uses on each architecture.
    pub kernels: BTreeMap<String, BTreeMap<String, Resources>>,
}

/// What a kernel uses on one architecture, as `ptxas` reports it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Resources {
    /// Registers per thread.
    pub registers: u32,
    /// Static shared memory, in bytes per block.
    pub shared: u32,
    /// Local memory for the stack frame, in bytes per thread.
    pub stack: u32,
    /// Bytes of register spills stored, per thread.
    pub spill_stores: u32,
    /// Bytes of register spills loaded, per thread.
    pub spill_loads: u32,
}

/// The CUDA sources and headers in `dir` and its folders, sorted by path.
///
/// # Errors
/// When a folder cannot be read.
pub fn sources(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut folders = vec![dir.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "cu" || extension == "cuh") {
                files.push(path);
            }
        }
    }
    files.sort();
    Ok(files)
}

/// The name of the module that the source at `path`, relative to the sources' folder, becomes: its stem, after the
/// names of the folders it lies in. `p2p/gather.cu` becomes `p2p_gather`.
#[must_use]
pub fn module_name(path: &Path) -> String {
    let stem = path.with_extension("");
    let parts: Vec<_> = stem.components().map(|part| part.as_os_str().to_string_lossy()).collect();
    parts.join("_")
}

/// The fingerprint of all CUDA sources and headers in `dir` and its folders: names and contents. A launcher and a compiled module fit
/// each other exactly when both were built from sources with the same fingerprint.
///
/// # Errors
/// When a source cannot be read.
pub fn sources_sha256(dir: &Path) -> io::Result<String> {
    let mut hash = Sha256::new();
    for path in sources(dir)? {
        let content = fs::read(&path)?;
        let name = path.strip_prefix(dir).unwrap_or(&path).to_string_lossy().into_owned();
        hash.update((name.len() as u64).to_le_bytes());
        hash.update(name.as_bytes());
        hash.update((content.len() as u64).to_le_bytes());
        hash.update(&content);
    }
    Ok(hex(&hash.finalize()))
}

/// SHA-256 of `bytes`, in hexadecimal.
#[must_use]
pub fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}
