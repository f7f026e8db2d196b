//! Where the library may lie: a variable, the loader's path, Python environments.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Names the library by path; nothing else is tried when it is set.
pub(crate) const VARIABLE: &str = "COMM_NCCL_LIBRARY";
/// The name under which the loader finds it.
pub(crate) const SONAME: &str = "libnccl.so.2";
/// Where NVIDIA's wheels put it below `site-packages`.
const IN_SITE_PACKAGES: &str = "nvidia/nccl/lib/libnccl.so.2";
/// Starting an interpreter on a cold file system takes seconds; more means that it hangs.
const PYTHON_TIMEOUT: Duration = Duration::from_secs(10);

/// The file below the `site-packages` of the environments that `roots` name.
pub(crate) fn in_environments(roots: impl IntoIterator<Item = PathBuf>) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for root in roots {
        for lib in ["lib", "lib64"] {
            let Ok(entries) = std::fs::read_dir(root.join(lib)) else { continue };
            let mut versions: Vec<PathBuf> = entries
                .flatten()
                .filter(|entry| entry.file_name().to_string_lossy().starts_with("python"))
                .map(|entry| entry.path())
                .collect();
            versions.sort();
            for version in versions {
                found.extend(
                    ["site-packages", "dist-packages"]
                        .map(|packages| version.join(packages).join(IN_SITE_PACKAGES))
                        .into_iter()
                        .filter(|path| path.is_file()),
                );
            }
        }
    }
    found
}

/// The active environments' roots.
pub(crate) fn active_environments() -> Vec<PathBuf> {
    ["VIRTUAL_ENV", "CONDA_PREFIX"].into_iter().filter_map(std::env::var_os).map(PathBuf::from).collect()
}

/// Asks the interpreter where its `nvidia.nccl` package lies.
pub(crate) fn ask_python(interpreter: &Path) -> Result<PathBuf, String> {
    const SCRIPT: &str = "import importlib.util as u\n\
                          s = u.find_spec('nvidia.nccl')\n\
                          print(list(s.submodule_search_locations)[0] if s else '')";
    let mut child = Command::new(interpreter)
        .args(["-c", SCRIPT])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|error| format!("cannot start it: {error}"))?;
    let deadline = Instant::now() + PYTHON_TIMEOUT;
    loop {
        match child.try_wait() {
            Ok(Some(_)) => break,
            Ok(None) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(5)),
            Ok(None) => {
                // Its answer no longer matters; failing to end it changes nothing for the caller.
                let _ = child.kill();
                let _ = child.wait();
                return Err(format!("no answer within {PYTHON_TIMEOUT:?}"));
            }
            Err(error) => return Err(format!("cannot wait for it: {error}")),
        }
    }
    let output = child.wait_with_output().map_err(|error| format!("cannot read its answer: {error}"))?;
    let folder = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    if folder.is_empty() {
        return Err("it has no package nvidia.nccl".into());
    }
    let path = Path::new(&folder).join("lib").join(SONAME);
    if path.is_file() { Ok(path) } else { Err(format!("{} does not exist", path.display())) }
}

/// The file that the loader mapped for a library opened by name.
pub(crate) fn mapped_path() -> Option<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    maps.lines()
        .filter_map(|line| line.find('/').map(|at| &line[at..]))
        .find(|path| {
            Path::new(path).file_name().is_some_and(|n| n.to_string_lossy().starts_with("libnccl.so"))
        })
        .map(PathBuf::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_environment_is_searched_and_absence_is_no_error() {
        let root = std::env::temp_dir().join(format!("comm-nccl-search-{}", std::process::id()));
        let file = root.join("lib/python3.99/site-packages").join(IN_SITE_PACKAGES);
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        assert!(in_environments([root.clone()]).is_empty());
        std::fs::write(&file, b"").unwrap();
        assert_eq!(in_environments([root.join("nowhere"), root.clone()]), [file]);
        std::fs::remove_dir_all(&root).unwrap();
    }

    #[test]
    fn an_interpreter_that_is_missing_or_knows_nothing_is_an_error() {
        assert!(ask_python(Path::new("/nonexistent/python")).unwrap_err().contains("cannot start"));
        assert!(ask_python(Path::new("true")).unwrap_err().contains("no package"));
    }
}
