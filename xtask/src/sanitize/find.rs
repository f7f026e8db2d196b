//! Where compute-sanitizer is.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::command::output_of;

const NAME: &str = "compute-sanitizer";

/// The program: the one given, or the first that answers on the PATH and in the usual places of CUDA toolkits.
///
/// # Errors
/// What was tried, and how to get it.
pub fn sanitizer(given: Option<&Path>) -> Result<PathBuf, String> {
    if let Some(path) = given {
        return answers(path)
            .then(|| path.to_owned())
            .ok_or_else(|| format!("{} does not run", path.display()));
    }
    candidates().into_iter().find(|path| path.is_file() && answers(path)).ok_or_else(|| {
        format!(
            "no {NAME} on the PATH, in CUDA_HOME or in /usr/local/cuda*; it comes with the CUDA toolkit; --sanitizer \
             names one elsewhere"
        )
    })
}

fn answers(path: &Path) -> bool {
    output_of(Command::new(path).arg("--version"), Duration::from_secs(20))
        .is_some_and(|text| text.contains("Compute Sanitizer"))
}

fn candidates() -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> =
        env::var_os("PATH").iter().flat_map(env::split_paths).map(|folder| folder.join(NAME)).collect();
    let roots = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(env::var_os).map(PathBuf::from);
    let mut toolkits: Vec<PathBuf> = (std::fs::read_dir("/usr/local").into_iter().flatten().flatten())
        .map(|entry| entry.path())
        .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("cuda")))
        .collect();
    // `cuda`, the link to the installation in use, sorts before the versioned folders.
    toolkits.sort();
    for root in roots.chain(toolkits) {
        paths.push(root.join("bin").join(NAME));
        paths.push(root.join(NAME).join(NAME));
    }
    paths
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_is_something_else_is_refused() {
        assert!(sanitizer(Some(Path::new("/bin/true"))).unwrap_err().contains("/bin/true"));
        assert!(!candidates().is_empty());
    }
}
