//! The build with a stand-in for the compiler: what is compiled when, and what stops it.

use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;

use clap::Parser;
use tempfile::TempDir;

use super::*;

/// Copies the source to the output, names the headers it includes in the dependency file, notes each call in a log,
/// reports resources, and fails or warns where the source says so.
const COMPILER: &str = r#"#!/bin/sh
if [ "$1" = --version ]; then echo "Cuda compilation tools, release 13.0, V13.0.88"; exit 0; fi
while [ $# -gt 1 ]; do
    case "$1" in -o) out="$2" ;; -MF) deps="$2" ;; -D*X*) echo "$1" > "$(dirname "$0")/worlds" ;; esac
    shift
done
echo "$1" >> "$(dirname "$0")/log"
if grep -q BROKEN "$1"; then echo "error: no such thing" >&2; exit 2; fi
if grep -q SERIALISED "$1"; then echo "ptxas info : (C7510) wgmma serialised" >&2; fi
cp "$1" "$out"
echo "module.fatbin : $1 $(sed -n 's/#include "\(.*\)"/\1/p' "$1")" > "$deps"
echo "ptxas info    : Compiling entry function 'k' for 'sm_90a'"
echo "ptxas info    : Used 7 registers, used 0 barriers"
"#;

#[derive(Parser)]
struct Line {
    #[command(flatten)]
    args: KernelsArgs,
}

struct Project {
    dir: TempDir,
}

impl Project {
    fn new() -> Self {
        let project = Self { dir: tempfile::tempdir().unwrap() };
        fs::create_dir(project.path("cuda")).unwrap();
        // Copied into place by another process: were it written from here, a process that another test forks at that
        // moment would hold the file open for writing, and running it would fail as "text file busy".
        fs::write(project.path("nvcc.sh"), COMPILER).unwrap();
        let copied = Command::new("cp").arg(project.path("nvcc.sh")).arg(project.path("nvcc")).status();
        assert!(copied.unwrap().success());
        fs::set_permissions(project.path("nvcc"), fs::Permissions::from_mode(0o755)).unwrap();
        project.write("a.cu", "#include \"shared.cuh\"\n");
        project.write("b.cu", "// alone\n");
        project.write("shared.cuh", "// one\n");
        project
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn write(&self, name: &str, content: &str) {
        fs::write(self.path("cuda").join(name), content).unwrap();
    }

    fn run(&self, options: &[&str]) -> anyhow::Result<()> {
        let nvcc = self.path("nvcc");
        let line = ["kernels", "--nvcc", nvcc.to_str().unwrap()].into_iter().chain(options.iter().copied());
        let Line { args } = Line::try_parse_from(line).unwrap();
        build(&args, &self.path("cuda"), &self.path("target"))
    }

    /// What was compiled since the last time, in order of name.
    fn compiled(&self) -> Vec<String> {
        let text = fs::read_to_string(self.path("log")).unwrap_or_default();
        let _ = fs::remove_file(self.path("log"));
        let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
        lines.sort();
        lines
    }

    fn manifest(&self) -> Manifest {
        read_manifest(&self.path("target/kernels")).unwrap()
    }
}

#[test]
fn only_what_changed_is_compiled() {
    let project = Project::new();
    project.run(&[]).unwrap();
    assert_eq!(project.compiled(), ["a.cu", "b.cu"]);
    project.run(&[]).unwrap();
    assert!(project.compiled().is_empty());
    project.write("shared.cuh", "// two\n");
    project.run(&[]).unwrap();
    assert_eq!(project.compiled(), ["a.cu"], "the header's includer");
    project.run(&["--force"]).unwrap();
    assert_eq!(project.compiled(), ["a.cu", "b.cu"]);
    project.run(&["--arch", "90a"]).unwrap();
    assert_eq!(project.compiled(), ["a.cu", "b.cu"], "other flags");
    fs::write(project.path("target/kernels/b.fatbin"), "altered").unwrap();
    project.run(&["--arch", "90a"]).unwrap();
    assert_eq!(project.compiled(), ["b.cu"]);
}

#[test]
fn the_manifest_says_what_was_built() {
    let project = Project::new();
    project.run(&["--arch", "90a,ptx,90a"]).unwrap();
    let manifest = project.manifest();
    assert_eq!(manifest.archs, ["90a", "ptx"]);
    assert_eq!(manifest.nvcc, "13.0.88");
    assert_eq!(manifest.modules["a"].kernels["k"]["sm_90a"].registers, 7);
    assert_eq!(manifest.sources_sha256, manifest::sources_sha256(&project.path("cuda")).unwrap());
    fs::remove_file(project.path("cuda/b.cu")).unwrap();
    project.run(&["--arch", "90a"]).unwrap();
    assert!(!project.manifest().modules.contains_key("b"));
    assert!(!project.path("target/kernels/b.fatbin").exists());
}

#[test]
fn kernels_of_p2p_are_for_the_worlds_asked_for() {
    let project = Project::new();
    fs::create_dir(project.path("cuda/p2p")).unwrap();
    project.write("p2p/c.cu", "// as many entry points as worlds\n");
    project.run(&["--world", "8,2"]).unwrap();
    assert_eq!(project.manifest().worlds, [2, 8]);
    assert_eq!(fs::read_to_string(project.path("worlds")).unwrap(), "-DP2P_WORLDS(X)=X(2)X(8)\n");
    project.compiled();
    project.run(&["--check", "--world", "8"]).unwrap();
    let lacks = project.run(&["--check"]).unwrap_err().to_string();
    assert!(lacks.contains("not for 3 ranks"), "{lacks}");
    fs::remove_file(project.path("worlds")).unwrap();
    project.run(&[]).unwrap();
    assert_eq!(project.compiled(), ["p2p/c.cu"], "the others have no worlds");
    assert_eq!(project.manifest().worlds, manifest::WORLDS);
    assert!(!project.path("worlds").exists(), "the sources' own list is of all");
    assert!(Line::try_parse_from(["kernels", "--world", "9"]).is_err());
}

#[test]
fn check_compiles_nothing_and_notices_everything() {
    let project = Project::new();
    assert!(project.run(&["--check"]).is_err(), "nothing was built");
    project.run(&[]).unwrap();
    project.compiled();
    project.run(&["--check"]).unwrap();
    assert!(project.run(&["--check", "--arch", "100"]).is_err(), "an architecture is missing");
    project.write("shared.cuh", "// three\n");
    assert!(project.run(&["--check"]).is_err(), "a header changed");
    project.write("shared.cuh", "// one\n");
    fs::write(project.path("target/kernels/a.fatbin"), "altered").unwrap();
    assert!(project.run(&["--check"]).is_err(), "a module was altered");
    assert!(project.compiled().is_empty());
}

#[test]
fn failures_and_fatal_warnings_stop_the_build() {
    for (content, words) in [("BROKEN", "no such thing"), ("SERIALISED", "C7510")] {
        let project = Project::new();
        project.write("b.cu", content);
        let error = project.run(&[]).unwrap_err().to_string();
        assert!(error.contains(words) && error.contains("b.cu"), "{error}");
        assert!(read_manifest(&project.path("target/kernels")).is_none(), "no manifest of half a build");
    }
}

#[test]
fn the_defaults_are_those_of_the_command_without_arguments() {
    let args = Defaults::try_parse_from(["kernels"]).unwrap().args;
    let archs: Vec<String> = args.arch.iter().map(ToString::to_string).collect();
    assert_eq!(archs, ["80", "90a", "ptx"]);
    assert!(!args.force && !args.check && args.out.is_none() && args.nvcc.is_none() && args.world.is_empty());
    assert!(workspace().join(SOURCES).join("fill.cu").is_file());
}
