//! Finding NVIDIA's compiler, and installing it from PyPI where there is none.
//!
//! What it installs goes into the target folder and nowhere else.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, bail};

use crate::command::output_of;
use crate::pip::{self, ANSWER};
use crate::toolkits;

/// What the compiler needs, pinned to versions that are known to work together.
const WHEELS: [&str; 5] = [
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85",
];

/// Where the wheels put the compiler.
const INSTALLED: &str = "cuda-toolchain/nvidia/cu13/bin/nvcc";

/// A compiler that answered.
#[derive(Clone, Debug)]
pub(crate) struct Nvcc {
    /// The program.
    pub(crate) path: PathBuf,
    /// Its release, as it prints it, for example `13.0.88`.
    pub(crate) version: String,
}

impl Nvcc {
    /// Asks the compiler at `path` who it is.
    fn probe(path: &Path) -> anyhow::Result<Self> {
        let text = output_of(Command::new(path).arg("--version"), ANSWER);
        let version = text.as_deref().and_then(|text| text.split(", V").nth(1)?.split_whitespace().next());
        match version {
            Some(version) => Ok(Self { path: path.to_path_buf(), version: version.to_owned() }),
            None => bail!(
                "{} is not a working nvcc: --version did not print a version within {ANSWER:?}",
                path.display()
            ),
        }
    }

    /// Whether it knows `--compress-mode`, which came with 12.8.
    pub(crate) fn compresses(&self) -> bool {
        let mut parts = self.version.split('.').map(|part| part.parse::<u32>().unwrap_or(0));
        (parts.next(), parts.next()) >= (Some(12), Some(8))
    }
}

/// The compiler to use: the one given, or the first in the usual places. `None` when there is none anywhere.
///
/// # Errors
/// When one was named, by argument or by `NVCC`, and does not work.
pub(crate) fn find(given: Option<&Path>, target: &Path) -> anyhow::Result<Option<Nvcc>> {
    if let Some(path) = given {
        return Nvcc::probe(path).map(Some);
    }
    if let Some(path) = env::var_os("NVCC").filter(|path| !path.is_empty()) {
        return Nvcc::probe(Path::new(&path)).context("NVCC is set").map(Some);
    }
    Ok(candidates(target).into_iter().filter(|path| path.is_file()).find_map(|path| Nvcc::probe(&path).ok()))
}

fn candidates(target: &Path) -> Vec<PathBuf> {
    let in_toolkit = |root: PathBuf| root.join("bin/nvcc");
    let mut paths: Vec<PathBuf> = toolkits::named().into_iter().map(in_toolkit).collect();
    paths.extend(toolkits::on_path("nvcc"));
    paths.extend(toolkits::installed().into_iter().map(in_toolkit));
    paths.push(target.join(INSTALLED));
    paths
}

/// Installs the pinned compiler into the target folder: about 270 MB.
///
/// # Errors
/// When Python, pip or a C++ compiler is missing, or pip fails.
pub(crate) fn install(target: &Path) -> anyhow::Result<Nvcc> {
    pip::require(
        &["g++", "--version"],
        "nvcc needs a C++ compiler: install g++ (Debian: `apt install g++`) and have it on PATH",
    )?;
    println!("no nvcc found; installing NVIDIA's from PyPI into {}", target.join("cuda-toolchain").display());
    let or = "python3 with pip is needed to install NVIDIA's compiler (Debian: `apt install python3-pip`); or install \
              the CUDA toolkit, or name a compiler by --nvcc";
    pip::install(&target.join("cuda-toolchain"), &WHEELS, or)?;
    Nvcc::probe(&target.join(INSTALLED)).context("the compiler that was just installed")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compression_is_known_by_version() {
        let nvcc = |version: &str| Nvcc { path: PathBuf::new(), version: version.to_owned() };
        assert!(nvcc("13.0.88").compresses() && nvcc("12.8.61").compresses());
        assert!(!nvcc("12.4.131").compresses() && !nvcc("11.8.89").compresses());
    }

    #[test]
    fn a_named_compiler_that_does_not_work_is_an_error() {
        assert!(find(Some(Path::new("/nonexistent/nvcc")), Path::new("/nonexistent")).is_err());
        assert!(find(Some(Path::new("/bin/true")), Path::new("/nonexistent")).is_err());
    }
}
