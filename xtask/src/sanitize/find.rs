//! Where compute-sanitizer is, and which one it is.

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::command::output_of;
use crate::pip::{self, ANSWER};
use crate::toolkits;

const NAME: &str = "compute-sanitizer";
/// The first release whose `initcheck` survives kernels that store into memory that other processes or GPUs share: by its
/// release notes, earlier ones could put a context with exported `cuMemCreate` memory into an error state.
const SURVIVES_EXPORTS: Version = Version { year: 2026, release: 4 };
/// What is installed where there is none, or only an older one: 18 MB.
const WHEEL: &str = "nvidia-cuda-sanitizer-api==13.5.25";
/// The folder it is installed to, in the target folder, and where the program is there.
const FOLDER: &str = "compute-sanitizer";
const PROGRAM: &str = "nvidia/cu13/compute-sanitizer/compute-sanitizer";

const GET: &str = "it comes with the CUDA toolkit, or from PyPI by python3 with pip";

/// A release of compute-sanitizer.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Version {
    year: u32,
    release: u32,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.year, self.release)
    }
}

/// A compute-sanitizer that answered.
#[derive(Clone, Debug)]
pub struct Sanitizer {
    /// The program.
    pub path: PathBuf,
    version: Version,
}

impl Sanitizer {
    /// Asks the program at `path` who it is.
    fn probe(path: &Path) -> Option<Self> {
        let text = output_of(Command::new(path).arg("--version"), ANSWER)?;
        Some(Self { path: path.to_owned(), version: version_in(&text)? })
    }

    /// Why its `initcheck` is of no use, if it is not.
    pub fn initcheck_problem(&self) -> Option<String> {
        (self.version < SURVIVES_EXPORTS).then(|| {
            format!(
                "initcheck of {} (release {}) ends with a CUDA error at the first kernel that stores into another \
                 rank's memory; release {SURVIVES_EXPORTS} or later is needed (`pip install {WHEEL}`, or its folder \
                 copied here and named by --sanitizer)",
                self.path.display(),
                self.version
            )
        })
    }
}

/// The release in what `--version` prints.
fn version_in(text: &str) -> Option<Version> {
    let words = text.lines().find(|line| line.starts_with("Version "))?.split_whitespace().nth(1)?;
    let mut parts = text.contains("Compute Sanitizer").then(|| words.split('.'))?;
    Some(Version { year: parts.next()?.parse().ok()?, release: parts.next()?.parse().ok()? })
}

/// The one given; or the newest on the PATH, in the usual places of CUDA toolkits and in the target folder, if there is one:
/// into which one is installed from PyPI if those are none, or too old for one of the tools.
///
/// # Errors
/// What was tried, and how to get it. That none could be installed is no error where there is an older one.
pub fn sanitizer(given: Option<&Path>, target: Option<&Path>) -> Result<Sanitizer, String> {
    if let Some(path) = given {
        return Sanitizer::probe(path).ok_or_else(|| format!("{} is no working {NAME}", path.display()));
    }
    let place = target.map(|target| target.join(FOLDER));
    let found = candidates()
        .into_iter()
        .chain(place.as_ref().map(|place| place.join(PROGRAM)))
        .filter(|path| path.is_file())
        .filter_map(|path| Sanitizer::probe(&path))
        .max_by_key(|found| found.version);
    match (found, place) {
        (Some(found), Some(place)) if found.version < SURVIVES_EXPORTS => {
            Ok(install(&place).unwrap_or_else(|why| {
                eprintln!("release {} at {} it is: {why}", found.version, found.path.display());
                found
            }))
        }
        (Some(found), _) => Ok(found),
        (None, place) => {
            let why = match place.map(|place| install(&place)) {
                Some(Ok(installed)) => return Ok(installed),
                Some(Err(why)) => format!("and none from PyPI: {why}"),
                None => format!("{GET}; --sanitizer names one elsewhere"),
            };
            Err(format!("no {NAME} on the PATH, in CUDA_HOME or in /usr/local/cuda*; {why}"))
        }
    }
}

fn install(place: &Path) -> Result<Sanitizer, String> {
    println!(
        "no {NAME} of release {SURVIVES_EXPORTS} or later; installing one from PyPI into {}",
        place.display()
    );
    pip::install(place, &[WHEEL], GET).map_err(|error| format!("{error:#}"))?;
    let program = place.join(PROGRAM);
    Sanitizer::probe(&program).ok_or_else(|| format!("{} does not work", program.display()))
}

fn candidates() -> Vec<PathBuf> {
    let mut paths = toolkits::on_path(NAME);
    for root in toolkits::named().into_iter().chain(toolkits::installed()) {
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
        assert!(sanitizer(Some(Path::new("/bin/true")), None).unwrap_err().contains("/bin/true"));
        assert!(!candidates().is_empty());
    }

    #[test]
    fn releases_are_read_and_compared() {
        let said = |version: &str| {
            version_in(&format!(
                "NVIDIA (R) Compute Sanitizer\nCopyright (c) 2020-2026 N\nVersion {version} (build 1)\n"
            ))
        };
        let old = said("2025.3.1.0").unwrap();
        let new = said("2026.4.0.0").unwrap();
        assert!(old < SURVIVES_EXPORTS && new >= SURVIVES_EXPORTS && said("2027.1.0.0").unwrap() > new);
        assert_eq!(old.to_string(), "2025.3");
        assert_eq!(version_in("cuobjdump\nVersion 2026.4"), None);
        assert_eq!(said("unknown"), None);
        let of = |version| Sanitizer { path: "/s".into(), version };
        assert!(of(new).initcheck_problem().is_none());
        assert!(
            of(old)
                .initcheck_problem()
                .is_some_and(|why| why.contains("2025.3") && why.contains("--sanitizer"))
        );
    }
}
