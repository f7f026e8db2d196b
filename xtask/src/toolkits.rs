//! Where CUDA toolkits and their programs may be on this machine.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

/// The toolkits that the user has named: `CUDA_HOME` and `CUDA_PATH`.
pub(crate) fn named() -> Vec<PathBuf> {
    ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(env::var_os).map(PathBuf::from).collect()
}

/// Those in the usual place. `cuda`, the link to the one in use, comes before the folders with a version.
pub(crate) fn installed() -> Vec<PathBuf> {
    in_folder(Path::new("/usr/local"))
}

fn in_folder(folder: &Path) -> Vec<PathBuf> {
    let mut toolkits: Vec<PathBuf> = fs::read_dir(folder)
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("cuda")))
        .collect();
    toolkits.sort();
    toolkits
}

/// What the program would be called in every folder of the PATH.
pub(crate) fn on_path(program: &str) -> Vec<PathBuf> {
    env::var_os("PATH").iter().flat_map(env::split_paths).map(|folder| folder.join(program)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_toolkit_in_use_comes_first() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["cuda-13.0", "lib", "cuda-12.8", "cuda"] {
            fs::create_dir(folder.path().join(name)).unwrap();
        }
        let found = in_folder(folder.path());
        assert_eq!(found, ["cuda", "cuda-12.8", "cuda-13.0"].map(|name| folder.path().join(name)));
        assert!(in_folder(&folder.path().join("none")).is_empty());
    }
}
