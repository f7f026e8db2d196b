//! `cargo xtask bundle`: everything that a GPU machine without cargo and without the source tree needs, in one folder.
//!
//! ```text
//! bundle/run            a script that sets the environment and starts the runner: ./run test-gpus --world 2,4,8
//! bundle/runner         this program
//! bundle/examples/      example programs: ./run example decoder --world 8
//! bundle/tests/         GPU test programs named <package>__<test>, run by test-gpus
//! bundle/kernels/       compiled kernels; the programs embed none, so that these are all there are
//! bundle/targets/       bench targets
//! ```

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;

use crate::bench::human;
use crate::kernels;
use crate::launch::MULTICAST_OFF;

/// What a bundle may weigh.
const LIMIT: u64 = 64 << 20;

/// The example, a workspace member of its own, that travels along.
const EXAMPLE: &str = "decoder";

/// Options of `cargo xtask bundle`.
#[derive(Args, Debug)]
pub struct BundleArgs {
    /// The folder to make; an older bundle there is replaced.
    #[arg(long, default_value = "bundle")]
    out: PathBuf,
    /// Leave the compiled kernels out.
    #[arg(long)]
    no_kernels: bool,
    /// Architectures of the kernels, as for `kernels`: the fewer, the lighter.
    #[arg(long, value_name = "ARCH", conflicts_with = "no_kernels")]
    arch: Option<String>,
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
    // Before the long build, which would be for nothing if they cannot be had.
    let compiled = if args.no_kernels { None } else { Some(kernels::ready_to_ship(args.arch.as_deref())?) };
    std::fs::create_dir_all(out.join("tests")).with_context(|| format!("creating {}", out.display()))?;

    std::fs::create_dir_all(out.join("examples"))?;
    // In one command, so that what they share is built once.
    let programs =
        build(&["build", "--release", "--package", "xtask", "--package", EXAMPLE, "--bins"], |artifact| {
            artifact["target"]["kind"][0] == "bin"
        })?;
    for (program, to) in [("xtask", "runner".into()), (EXAMPLE, format!("examples/{EXAMPLE}"))] {
        let found: Vec<_> =
            programs.iter().filter(|(name, _)| *name == bundled_name(program, program)).collect();
        let [(_, path)] = &found[..] else { bail!("cargo built {} programs named {program}", found.len()) };
        copy(path, &out.join(to))?;
    }

    let tests =
        build(&["test", "--release", "--no-run", "--workspace", "--all-features", "--tests"], |artifact| {
            artifact["target"]["kind"][0] == "test"
                && artifact["target"]["name"].as_str().is_some_and(is_gpu_test)
        })?;
    for (program, path) in &tests {
        let to = out.join("tests").join(program);
        ensure!(!to.exists(), "two test programs are named {program}; rename one of them");
        copy(path, &to)?;
    }
    match &compiled {
        Some(folder) => copy_folder(folder, &out.join("kernels"))?,
        None => println!("kernels are left out: tests and benchmarks that need them will say so"),
    }
    // Whatever folder of the workspace the command is given in.
    copy_folder(&kernels::workspace().join("bench/targets"), &out.join("targets"))?;
    write_script(&out.join("run"))?;

    let size = size_of_folder(out)?;
    println!("{}: {} test programs, {}", out.display(), tests.len(), human(size));
    ensure!(size <= LIMIT, "the bundle weighs {}, more than the {} it may", human(size), human(LIMIT));
    Ok(())
}

/// Whether a test program is meant for GPUs: those are named so.
pub fn is_gpu_test(name: &str) -> bool {
    name.starts_with("gpu_") || name == "gpu"
}

/// The name of a test program in a bundle: packages may have tests of the same name.
///
/// A package's id is a URL that ends with `#name@version`, or with `folder#version` where the folder has its name.
fn bundled_name(package_id: &str, target: &str) -> String {
    let (url, fragment) = package_id.rsplit_once('#').unwrap_or((package_id, ""));
    let package = match fragment.split_once('@') {
        Some((name, _)) => name,
        None => url.rsplit('/').next().unwrap_or(url),
    };
    format!("{package}__{target}")
}

/// Runs cargo and returns the bundled name and the path of the programs it made that `wanted` selects.
fn build(args: &[&str], wanted: impl Fn(&serde_json::Value) -> bool) -> Result<Vec<(String, PathBuf)>> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(&cargo)
        .args(args)
        .arg("--message-format=json-render-diagnostics")
        .env("COMM_KERNELS_EMBED", "0")
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
            && let Some(package) = message["package_id"].as_str()
            && let Some(path) = message["executable"].as_str()
        {
            programs.push((bundled_name(package, name), PathBuf::from(path)));
        }
    }
    Ok(programs)
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
         # or an example: ./run example decoder --world 8\n\
         here=$(CDPATH= cd -- \"$(dirname -- \"$0\")\" && pwd) || exit\n\
         if [ -f \"$here/kernels/manifest.json\" ]; then export COMM_KERNELS_DIR=\"$here/kernels\"; fi\n",
    );
    for (name, value) in MULTICAST_OFF {
        script += &format!("export {name}={value}\n");
    }
    script += "if [ \"$1\" = example ]; then\n    shift\n    program=$1\n    shift\n    exec \"$here/examples/$program\" \"$@\"\nfi\n\
               exec \"$here/runner\" \"$@\"\n";
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

        std::fs::create_dir(dir.path().join("examples")).unwrap();
        std::fs::copy(&runner, dir.path().join("examples/decoder")).unwrap();
        let words = ["example", "decoder", "--world", "8"];
        let output = Command::new("/bin/sh").arg(dir.path().join("run")).args(words).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(text.contains("/kernels 0 --world"), "{text}{}", String::from_utf8_lossy(&output.stderr));
    }

    #[test]
    fn an_existing_folder_that_is_no_bundle_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("precious"), "x").unwrap();
        let args = BundleArgs { out: dir.path().to_owned(), no_kernels: true, arch: None };
        assert!(run(&args).unwrap_err().to_string().contains("no bundle"));
        assert!(dir.path().join("precious").exists());
    }

    #[test]
    fn the_targets_are_found_from_any_folder() {
        assert!(kernels::workspace().is_absolute());
        let dir = tempfile::tempdir().unwrap();
        copy_folder(&kernels::workspace().join("bench/targets"), dir.path()).unwrap();
        assert!(dir.path().join("8xh200.json").is_file());
    }

    #[test]
    fn tests_of_one_name_in_two_packages_stay_apart() {
        let name = |id| bundled_name(id, "gpu_faults");
        assert_eq!(name("path+file:///src/crates/comm-nccl#0.1.0"), "comm-nccl__gpu_faults");
        assert_eq!(name("path+file:///src/crates/p2p#comm-p2p@0.1.0"), "comm-p2p__gpu_faults");
    }

    #[test]
    fn gpu_tests_are_known_by_their_names() {
        assert!(is_gpu_test("gpu_kernels") && !is_gpu_test("host_backend"));
    }
}
