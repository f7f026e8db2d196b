//! Libraries, the compiler and the compiled kernels: where they were found, and in which version.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use comm_kernels::locate::KernelSet;
use comm_nccl::NcclLibrary;

use crate::command;
use crate::doctor::Findings;
use crate::kernels;

/// The longest that a program is given to tell its version.
const PATIENCE: Duration = Duration::from_secs(10);

/// Looks for them.
pub fn look(findings: &mut Findings) {
    findings.section("Libraries and tools");
    match comm_kernels::driver::version() {
        Ok((major, minor)) => findings.fact("libcuda.so.1", format!("CUDA {major}.{minor}")),
        Err(error) => {
            findings.missing("libcuda.so.1", error, "CUDA: libcuda.so.1 comes with NVIDIA's driver");
        }
    }
    match NcclLibrary::load() {
        Ok(library) => {
            findings.fact("NCCL", format!("{} at {}", library.version(), library.path().display()));
        }
        Err(error) => findings.missing(
            "NCCL",
            error,
            "NCCL: `pip install nvidia-nccl-cu13`, or name a libnccl.so.2 in COMM_NCCL_LIBRARY",
        ),
    }
    let site = python_site_packages();
    let optional = [
        ("NVSHMEM", "libnvshmem_host.so.3", "nvidia/nvshmem/lib", "pip install nvidia-nvshmem-cu13"),
        ("CUDA runtime", "libcudart.so.13", "nvidia/cu13/lib", "pip install nvidia-cuda-runtime"),
    ];
    for (name, file, folder, how) in optional {
        match find_library(file, folder, &site) {
            Some(place) => findings.fact(name, place),
            // Nothing in the workspace needs them, so their absence is no gap.
            None => findings.fact(name, format!("not found ({how}); nothing here needs it")),
        }
    }
    compiler(findings);
    match KernelSet::locate() {
        Ok(set) => {
            let (archs, worlds) = (set.manifest().archs.join(", "), &set.manifest().worlds);
            let worlds: Vec<String> = worlds.iter().map(ToString::to_string).collect();
            let what = format!("for {archs}; p2p's for {} ranks; {}", worlds.join(", "), set.origin());
            findings.fact("compiled kernels", what);
        }
        Err(error) => {
            findings.missing("compiled kernels", error, "kernels: `cargo xtask kernels` compiles them")
        }
    }
}

/// The compiler that `cargo xtask kernels` would use, so that the two cannot disagree.
fn compiler(findings: &mut Findings) {
    match kernels::find_nvcc() {
        Ok(Some(nvcc)) => {
            findings.fact("nvcc", format!("{} at {}", nvcc.version, nvcc.path.display()));
            return;
        }
        Ok(None) => {
            findings.fact("nvcc", "not found; `cargo xtask kernels` installs it into the target folder")
        }
        Err(error) => {
            findings.missing("nvcc", format!("{error:#}"), "nvcc: unset NVCC, or name a compiler that works");
            return;
        }
    }
    if output_of(Command::new("python3").args(["-m", "pip", "--version"])).is_none() {
        findings.missing(
            "python3 with pip",
            "it does not run",
            "nvcc: install python3 and pip, or a CUDA toolkit",
        );
    }
    if output_of(Command::new("g++").arg("--version")).is_none() {
        findings.missing("g++", "it does not run", "nvcc: install g++, which it compiles host code with");
    }
}

/// Where the loader, or else a Python environment, has the library.
fn find_library(file: &str, folder: &str, site: &[PathBuf]) -> Option<String> {
    // SAFETY: these are NVIDIA's own libraries, whose initialisers do nothing but set up their own state.
    if unsafe { libloading::Library::new(file) }.is_ok() {
        return Some(format!("{file} on the loader's path"));
    }
    site.iter()
        .map(|site| site.join(folder).join(file))
        .find(|path| path.exists())
        .map(|path| path.display().to_string())
}

fn python_site_packages() -> Vec<PathBuf> {
    let script =
        "import site,sysconfig;print('\\n'.join([sysconfig.get_path('purelib'),*site.getsitepackages()]))";
    let text = output_of(Command::new("python3").args(["-c", script])).unwrap_or_default();
    text.lines().map(PathBuf::from).collect()
}

fn output_of(command: &mut Command) -> Option<String> {
    command::output_of(command, PATIENCE)
}
