//! `cargo xtask bundle`: everything that a GPU machine without cargo and without the source tree needs, in one folder.
//!
//! ```text
//! bundle/run            a script that sets the environment and starts the runner: ./run test-gpus --world 2,4,8
//! bundle/runner         this program
//! bundle/tests/         GPU test programs, run by test-gpus
//! bundle/kernels/       compiled kernels
//! bundle/targets/       bench targets
//! ```

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use comm_kernels::locate::{KernelSet, Origin};

use crate::bench::human;
use crate::launch::MULTICAST_OFF;

/// What a bundle may weigh.
const LIMIT: u64 = 64 << 20;

/// Options of `cargo xtask bundle`.
#[derive(Args, Debug)]
pub struct BundleArgs {
    /// The folder to make; an older bundle there is replaced.
    #[arg(long, default_value = "bundle")]
    out: PathBuf,
    /// Leave the compiled kernels out.
    #[arg(long)]
    no_kernels: bool,
}

/// Runs the command.
///
/// # Errors
/// When something cannot be built or written, or the bundle is too large.
pub fn run(args: &BundleArgs) -> Result<()> {
    let out = &args.out;
    if out.exists() {
        // Only what is a bundle is removed: the option could name anything.
        ensure!(
            out.join("runner").is_file(),
            "{} exists and is no bundle; remove it or name another",
            out.display()
        );
        std::fs::remove_dir_all(out).with_context(|| format!("removing the old {}", out.display()))?;
    }
    std::fs::create_dir_all(out.join("tests")).with_context(|| format!("creating {}", out.display()))?;

    let runner = build(&["build", "--release", "--package", "xtask", "--bin", "xtask"], |artifact| {
        artifact["target"]["name"] == "xtask"
    })?;
    let [(_, runner)] = &runner[..] else { bail!("cargo built {} programs named xtask", runner.len()) };
    copy(runner, &out.join("runner"))?;

    let tests =
        build(&["test", "--release", "--no-run", "--workspace", "--all-features", "--tests"], |artifact| {
            artifact["target"]["kind"][0] == "test"
                && artifact["target"]["name"].as_str().is_some_and(is_gpu_test)
        })?;
    for (name, path) in &tests {
        copy(path, &out.join("tests").join(name))?;
    }

    if args.no_kernels {
        println!("kernels are left out: tests and benchmarks that need them will say so");
    } else {
        copy_kernels(&out.join("kernels"))?;
    }
    copy_folder(Path::new("bench/targets"), &out.join("targets"))?;
    write_script(&out.join("run"))?;

    let size = size_of_folder(out)?;
    println!("{}: {} test programs, {}", out.display(), tests.len(), human(size));
    ensure!(size <= LIMIT, "the bundle weighs {}, more than the {} it may", human(size), human(LIMIT));
    Ok(())
}

/// Whether a test program is meant for GPUs: those are named so.
fn is_gpu_test(name: &str) -> bool {
    name.starts_with("gpu_") || name == "gpu"
}

/// Runs cargo and returns the name and path of the programs it made that `wanted` selects.
fn build(args: &[&str], wanted: impl Fn(&serde_json::Value) -> bool) -> Result<Vec<(String, PathBuf)>> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(&cargo)
        .args(args)
        .arg("--message-format=json-render-diagnostics")
        .env("CARGO_PROFILE_RELEASE_DEBUG", "false")
        .env("CARGO_PROFILE_RELEASE_STRIP", "symbols")
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("starting {}", cargo.display()))?;
    ensure!(output.status.success(), "cargo {} failed", args.join(" "));
    let mut programs = Vec::new();
    for line in output.stdout.split(|&byte| byte == b'\n') {
        let Ok(message) = serde_json::from_slice::<serde_json::Value>(line) else { continue };
        if message["reason"] == "compiler-artifact"
            && wanted(&message)
            && let Some(name) = message["target"]["name"].as_str()
            && let Some(path) = message["executable"].as_str()
        {
            programs.push((name.to_owned(), PathBuf::from(path)));
        }
    }
    Ok(programs)
}

fn copy_kernels(to: &Path) -> Result<()> {
    let set = KernelSet::locate().context("the bundle's kernels (--no-kernels leaves them out)")?;
    match set.origin() {
        Origin::Folder(folder) => copy_folder(folder, to),
        Origin::Embedded => {
            // Embedded ones are in the runner and in the tests already.
            println!("kernels are embedded in the runner");
            Ok(())
        }
    }
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    std::fs::copy(from, to).with_context(|| format!("copying {} to {}", from.display(), to.display()))?;
    Ok(())
}

fn copy_folder(from: &Path, to: &Path) -> Result<()> {
    std::fs::create_dir_all(to).with_context(|| format!("creating {}", to.display()))?;
    let entries = std::fs::read_dir(from).with_context(|| format!("reading {}", from.display()))?;
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            copy(&entry.path(), &to.join(entry.file_name()))?;
        }
    }
    Ok(())
}

fn write_script(path: &Path) -> Result<()> {
    let mut script = String::from(
        "#!/bin/sh\n# Starts the bundle's runner: ./run doctor, ./run test-gpus --world 2,4,8, ./run bench --backend nccl\n\
         here=$(CDPATH= cd -- \"$(dirname -- \"$0\")\" && pwd) || exit\n\
         if [ -f \"$here/kernels/manifest.json\" ]; then export COMM_KERNELS_DIR=\"$here/kernels\"; fi\n",
    );
    for (name, value) in MULTICAST_OFF {
        script += &format!("export {name}={value}\n");
    }
    script += "exec \"$here/runner\" \"$@\"\n";
    std::fs::write(path, script).with_context(|| format!("writing {}", path.display()))?;
    std::fs::set_permissions(path, PermissionsExt::from_mode(0o755))?;
    Ok(())
}

fn size_of_folder(folder: &Path) -> Result<u64> {
    let mut size = 0;
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let meta = entry.metadata()?;
        size += if meta.is_dir() { size_of_folder(&entry.path())? } else { meta.len() };
    }
    Ok(size)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_script_finds_its_folder_and_keeps_multicast_off() {
        let dir = tempfile::tempdir().unwrap();
        write_script(&dir.path().join("run")).unwrap();
        std::fs::create_dir(dir.path().join("kernels")).unwrap();
        std::fs::write(dir.path().join("kernels/manifest.json"), "{}").unwrap();
        let runner = dir.path().join("runner");
        std::fs::write(&runner, "#!/bin/sh\necho \"$COMM_KERNELS_DIR $NCCL_NVLS_ENABLE $1\"\n").unwrap();
        std::fs::set_permissions(&runner, PermissionsExt::from_mode(0o755)).unwrap();
        // Through a shell: executing a file that was written a moment ago can meet a writer that another thread forked.
        let output = Command::new("/bin/sh").arg(dir.path().join("run")).arg("doctor").output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(text.contains("/kernels 0 doctor"), "{text}{}", String::from_utf8_lossy(&output.stderr));
    }

    #[test]
    fn an_existing_folder_that_is_no_bundle_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("precious"), "x").unwrap();
        let args = BundleArgs { out: dir.path().to_owned(), no_kernels: true };
        assert!(run(&args).unwrap_err().to_string().contains("no bundle"));
        assert!(dir.path().join("precious").exists());
    }

    #[test]
    fn gpu_tests_are_known_by_their_names() {
        assert!(is_gpu_test("gpu_kernels") && !is_gpu_test("host_backend"));
    }
}
