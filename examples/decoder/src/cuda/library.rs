//! Finding cuBLASLt at run time.
//!
//! cudarc opens the library by name, and panics when there is none. So it is looked for here before, also where NVIDIA's
//! wheels put it; once a file is loaded, the loader takes it for the name that cudarc asks for.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use comm_core::{CommError, Result};
use libloading::Library;

/// Names the file; nothing else is tried when it is set.
const VARIABLE: &str = "COMM_CUBLASLT_LIBRARY";
/// Below a Python environment's packages, by wheel, and below a toolkit.
const FOLDERS: [&str; 5] =
    ["nvidia/cu13/lib", "nvidia/cublas/lib", "lib64", "lib", "targets/x86_64-linux/lib"];
const FILES: [&str; 2] = ["libcublasLt.so.13", "libcublasLt.so.12"];
/// Starting an interpreter on a cold file system takes seconds; more means that it hangs.
const PYTHON_TIMEOUT: Duration = Duration::from_secs(10);

/// Makes cuBLASLt available to cudarc. The first call's answer holds for the life of the process.
///
/// # Errors
/// [`CommError::Library`] that says what was tried and what to do.
pub fn ensure() -> Result<()> {
    static ANSWER: OnceLock<Result<()>> = OnceLock::new();
    ANSWER.get_or_init(find).clone()
}

fn find() -> Result<()> {
    let named = std::env::var_os(VARIABLE).filter(|path| !path.is_empty()).map(PathBuf::from);
    let mut tried = Vec::new();
    let mut load = |path: &Path| match open(path) {
        Ok(()) => true,
        Err(reason) => {
            tried.push(format!("{}: {reason}", path.display()));
            false
        }
    };
    let loaded = match &named {
        Some(path) => load(path),
        None => by_name() || folders().iter().any(|folder| in_folder(folder).iter().any(|path| load(path))),
    };
    // cudarc asks by name; only what it finds counts.
    if loaded && by_name() {
        return Ok(());
    }
    let tried = if tried.is_empty() { String::new() } else { format!(" ({})", tried.join("; ")) };
    Err(CommError::Library {
        library: FILES[0].into(),
        reason: format!(
            "not found on the loader's path, in a CUDA toolkit or in a Python environment{tried}. Install it, for example \
             by `pip install nvidia-cublas`, or set {VARIABLE} to the file, or LD_LIBRARY_PATH to its folder"
        ),
    })
}

/// Whether the loader knows one of the names that cudarc tries. What it finds stays loaded.
fn by_name() -> bool {
    cudarc::get_lib_name_candidates("cublasLt").iter().any(|name| open(Path::new(name)).is_ok())
}

fn open(path: &Path) -> Result<(), String> {
    // SAFETY: loading cuBLASLt runs its initialisers, which have no preconditions.
    match unsafe { Library::new(path) } {
        Ok(library) => {
            // For the life of the process, as cudarc keeps it.
            std::mem::forget(library);
            Ok(())
        }
        Err(error) => Err(error.to_string()),
    }
}

/// The library's files below a folder.
fn in_folder(folder: &Path) -> Vec<PathBuf> {
    let files = FOLDERS.iter().flat_map(|below| FILES.map(|file| folder.join(below).join(file)));
    files.filter(|path| path.is_file()).collect()
}

/// Where toolkits and Python packages lie.
fn folders() -> Vec<PathBuf> {
    let mut folders: Vec<PathBuf> =
        ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(std::env::var_os).map(PathBuf::from).collect();
    folders.extend(ask_python("python3"));
    folders.push("/usr/local/cuda".into());
    folders
}

/// The folders in which an interpreter looks for packages; none if it does not answer.
fn ask_python(interpreter: &str) -> Vec<PathBuf> {
    let child = Command::new(interpreter)
        .args(["-c", "import sys; print('\\n'.join(sys.path))"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn();
    let Ok(mut child) = child else { return Vec::new() };
    let deadline = Instant::now() + PYTHON_TIMEOUT;
    while matches!(child.try_wait(), Ok(None)) {
        if Instant::now() > deadline {
            // Its answer no longer matters; failing to end it changes nothing here.
            let _ = child.kill();
            let _ = child.wait();
            return Vec::new();
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let Ok(output) = child.wait_with_output() else { return Vec::new() };
    let text = String::from_utf8_lossy(&output.stdout);
    text.lines().filter(|line| !line.is_empty()).map(PathBuf::from).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wheels_and_toolkits_are_searched() {
        let dir = tempfile::tempdir().unwrap();
        assert!(in_folder(dir.path()).is_empty());
        for below in ["nvidia/cu13/lib", "lib64"] {
            std::fs::create_dir_all(dir.path().join(below)).unwrap();
            std::fs::write(dir.path().join(below).join(FILES[0]), "").unwrap();
        }
        let found = in_folder(dir.path());
        assert_eq!(found, ["nvidia/cu13/lib", "lib64"].map(|below| dir.path().join(below).join(FILES[0])));
        assert!(open(&found[0]).is_err(), "an empty file is no library");
    }

    #[test]
    fn an_interpreter_that_is_missing_or_says_nothing_is_passed_over() {
        assert!(ask_python("/nonexistent/python").is_empty());
        assert!(ask_python("true").is_empty());
    }

    #[test]
    fn a_missing_library_is_an_error_that_says_what_to_do() {
        match ensure() {
            Ok(()) => println!("SKIP: cuBLASLt is here"),
            Err(error) => {
                let text = error.to_string();
                assert!(text.contains("libcublasLt") && text.contains(VARIABLE), "{text}");
            }
        }
    }
}
