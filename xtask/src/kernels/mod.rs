//! `cargo xtask kernels`: every `.cu` file of comm-kernels to one fat binary, and a manifest beside them.
//!
//! Owns what is built and when it is up to date. Never loads or runs a kernel.

mod arch;
mod compile;
mod ptxas;
mod toolchain;

use std::collections::{BTreeMap, VecDeque};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::thread;

use anyhow::{Context as _, bail};
use clap::{Args, Parser};
use comm_kernels::locate::{KernelSet, VARIABLE};
use comm_kernels::manifest::{self, Manifest, Module, WORLDS};
use indicatif::{ProgressBar, ProgressStyle};

use self::arch::Arch;
use self::compile::Compiler;
use self::toolchain::Nvcc;

/// The sources, in the workspace.
const SOURCES: &str = "crates/comm-kernels/cuda";

/// Arguments of `cargo xtask kernels`.
#[derive(Args, Debug)]
pub(crate) struct KernelsArgs {
    /// Architectures to compile for; `ptx` adds PTX for GPUs that have no machine code of their own here.
    #[arg(long, value_delimiter = ',', default_value = "80,90a,ptx")]
    arch: Vec<Arch>,
    /// Numbers of ranks to compile p2p's kernels for, comma separated [default: 2 to 8]. Fewer take less time; others have no
    /// p2p then.
    #[arg(long, value_delimiter = ',', value_parser = world)]
    world: Vec<usize>,
    /// Compile also what is up to date.
    #[arg(long)]
    force: bool,
    /// The compiler to use, instead of the first one found.
    #[arg(long, value_name = "PATH")]
    nvcc: Option<PathBuf>,
    /// Where the compiled kernels go [default: kernels in the target folder].
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Files to compile at the same time [default: one per CPU].
    #[arg(long, short)]
    jobs: Option<usize>,
    /// Compile nothing: fail if something is missing or out of date.
    #[arg(long, conflicts_with = "force")]
    check: bool,
    /// Show the compiler's command lines and each kernel's use of registers and memory.
    #[arg(long, short)]
    verbose: bool,
}

/// Builds (or with `--check` inspects) the kernels.
pub(crate) fn run(args: &KernelsArgs) -> anyhow::Result<()> {
    build(args, &workspace().join(SOURCES), &target_folder())
}

/// The same for the sources in `cuda`, with `target` for the target folder.
fn build(args: &KernelsArgs, cuda: &Path, target: &Path) -> anyhow::Result<()> {
    let out = args.out.clone().unwrap_or_else(|| target.join("kernels"));
    let fingerprint =
        manifest::sources_sha256(cuda).with_context(|| format!("reading {}", cuda.display()))?;
    let mut archs = args.arch.clone();
    archs.sort();
    archs.dedup();
    let arch_names: Vec<String> = archs.iter().map(ToString::to_string).collect();
    let worlds: Vec<usize> =
        WORLDS.into_iter().filter(|world| args.world.is_empty() || args.world.contains(world)).collect();
    let previous = read_manifest(&out);

    if args.check {
        return check(&out, previous.as_ref(), &fingerprint, &arch_names, &worlds);
    }
    let nvcc = match toolchain::find(args.nvcc.as_deref(), target)? {
        Some(nvcc) => nvcc,
        None => toolchain::install(target)?,
    };
    println!("nvcc {} at {}", nvcc.version, nvcc.path.display());
    fs::create_dir_all(&out).with_context(|| format!("creating {}", out.display()))?;
    let compiler = Compiler::new(&nvcc, (&archs, &worlds), cuda, &out, args.verbose)?;
    let modules = build_all(args, &compiler, cuda, previous.as_ref())?;
    let manifest = Manifest {
        schema: manifest::SCHEMA,
        sources_sha256: fingerprint,
        nvcc: nvcc.version.clone(),
        archs: arch_names,
        worlds,
        modules,
    };
    if previous.as_ref() != Some(&manifest) {
        let mut text = serde_json::to_vec_pretty(&manifest)?;
        text.push(b'\n');
        compile::write_atomically(&out.join(manifest::FILE_NAME), &text)?;
    }
    remove_strays(&out, previous.as_ref(), &manifest)?;
    report(&manifest, args.verbose);
    println!("kernels and manifest are in {}", out.display());
    Ok(())
}

fn read_manifest(out: &Path) -> Option<Manifest> {
    let manifest: Manifest = serde_json::from_slice(&fs::read(out.join(manifest::FILE_NAME)).ok()?).ok()?;
    (manifest.schema == manifest::SCHEMA).then_some(manifest)
}

/// A number of ranks that there are kernels for.
fn world(text: &str) -> Result<usize, String> {
    let [least, .., most] = WORLDS;
    text.parse().ok().filter(|world| WORLDS.contains(world)).ok_or_else(|| format!("{least} to {most}"))
}

fn check(
    out: &Path,
    manifest: Option<&Manifest>,
    fingerprint: &str,
    archs: &[String],
    worlds: &[usize],
) -> anyhow::Result<()> {
    let Some(manifest) = manifest else {
        bail!("there are no kernels in {}; run `cargo xtask kernels`", out.display());
    };
    if manifest.sources_sha256 != fingerprint {
        bail!("the kernels in {} were built from other sources; run `cargo xtask kernels`", out.display());
    }
    if let Some(missing) = archs.iter().find(|arch| !manifest.archs.contains(arch)) {
        bail!("the kernels in {} lack architecture {missing}", out.display());
    }
    if let Some(missing) = worlds.iter().find(|world| !manifest.worlds.contains(world)) {
        bail!("the kernels in {} are not for {missing} ranks; run `cargo xtask kernels`", out.display());
    }
    for (name, module) in &manifest.modules {
        if !compile::is_intact(out, module) {
            bail!("module {name} in {} is missing or altered; run `cargo xtask kernels`", out.display());
        }
    }
    println!("{} modules in {} are up to date", manifest.modules.len(), out.display());
    Ok(())
}

/// Compiles what is not up to date, several files at a time. The first failure ends the build, after the compilations
/// in flight.
fn build_all(
    args: &KernelsArgs,
    compiler: &Compiler<'_>,
    cuda: &Path,
    previous: Option<&Manifest>,
) -> anyhow::Result<BTreeMap<String, Module>> {
    let sources = manifest::sources(cuda)?;
    let sources: VecDeque<PathBuf> = sources
        .into_iter()
        .filter(|path| path.extension().is_some_and(|e| e == "cu"))
        .map(|path| path.strip_prefix(cuda).map(Path::to_path_buf))
        .collect::<Result<_, _>>()?;
    if sources.is_empty() {
        bail!("there is no .cu file in {}", cuda.display());
    }
    let cpus = thread::available_parallelism().map_or(1, usize::from);
    let jobs = args.jobs.unwrap_or(cpus).clamp(1, sources.len());
    let progress = ProgressBar::new(sources.len() as u64);
    progress.set_style(ProgressStyle::with_template("{bar:24} {pos}/{len} {wide_msg}")?);
    let queue = Mutex::new(sources);
    let done = Mutex::new((BTreeMap::new(), None::<anyhow::Error>));
    thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                loop {
                    if done.lock().unwrap_or_else(PoisonError::into_inner).1.is_some() {
                        return;
                    }
                    let Some(source) = queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
                    else {
                        return;
                    };
                    let name = manifest::module_name(&source);
                    progress.set_message(name.clone());
                    let old = previous.and_then(|m| m.modules.get(&name)).filter(|_| !args.force);
                    let result = compiler.build(&name, &source, old);
                    let mut done = done.lock().unwrap_or_else(PoisonError::into_inner);
                    match result {
                        Ok((module, compiled)) => {
                            let note = if compiled { "compiled" } else { "up to date" };
                            if progress.is_hidden() {
                                println!("{name}: {note}");
                            } else {
                                progress.println(format!("{name}: {note}"));
                            }
                            done.0.insert(name, module);
                        }
                        Err(error) => {
                            done.1.get_or_insert(error);
                        }
                    }
                    progress.inc(1);
                }
            });
        }
    });
    progress.finish_and_clear();
    let (modules, error) = done.into_inner().unwrap_or_else(PoisonError::into_inner);
    error.map_or(Ok(modules), Err)
}

/// Removes modules whose source is gone.
fn remove_strays(out: &Path, previous: Option<&Manifest>, now: &Manifest) -> anyhow::Result<()> {
    let Some(previous) = previous else { return Ok(()) };
    for (name, module) in &previous.modules {
        if now.modules.contains_key(name) {
            continue;
        }
        for path in [out.join(&module.file), compile::dependencies_file(out, name)] {
            if path.is_file() {
                fs::remove_file(&path).with_context(|| format!("removing {}", path.display()))?;
            }
        }
    }
    Ok(())
}

fn report(manifest: &Manifest, verbose: bool) {
    for (name, module) in &manifest.modules {
        for (kernel, archs) in &module.kernels {
            for (arch, used) in archs {
                let spills = used.spill_stores + used.spill_loads;
                if verbose || spills > 0 {
                    println!(
                        "{name}/{kernel} {arch}: {} registers, {} B shared, {} B stack, {spills} B spilled",
                        used.registers, used.shared, used.stack
                    );
                }
            }
        }
    }
}

/// The compiler that [`run`] would use, and what it calls itself; `None` when it would install one.
///
/// Looks only; installs nothing.
///
/// # Errors
/// When `NVCC` names one that does not work.
pub(crate) fn find_nvcc() -> anyhow::Result<Option<Nvcc>> {
    toolchain::find(None, &target_folder())
}

/// The source tree that this program was built from.
pub(crate) fn workspace() -> &'static Path {
    let xtask = Path::new(env!("CARGO_MANIFEST_DIR"));
    xtask.parent().unwrap_or(xtask)
}

fn target_folder() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace().join("target"), PathBuf::from)
}

/// The target folder, if the source tree that this program was built from is still there: as it is not for a bundle's.
pub(crate) fn target_of_source_tree() -> Option<PathBuf> {
    workspace().join(SOURCES).is_dir().then(target_folder)
}

/// Builds the kernels if this program finds none that fit it and was built from a source tree that is still there: so
/// that what needs them needs no command before it. Elsewhere whoever uses a kernel says what to do.
///
/// # Errors
/// When they cannot be built.
pub(crate) fn ensure() -> anyhow::Result<()> {
    let Err(reason) = KernelSet::locate() else { return Ok(()) };
    if std::env::var_os(VARIABLE).is_some() || target_of_source_tree().is_none() {
        return Ok(());
    }
    println!("building the CUDA kernels, because {reason}");
    let args = Defaults::try_parse_from(["kernels"])?.args;
    run(&args).context("building the CUDA kernels (`cargo xtask kernels`)")
}

/// The folder of up-to-date kernels for a bundle: that of `COMM_KERNELS_DIR`, or the target folder's, built if need be.
/// For the architectures that `arch` names, as the option of `kernels` does, or its default.
///
/// # Errors
/// When those that the variable names are not up to date, or the others cannot be built.
pub(crate) fn ready_to_ship(arch: Option<&str>) -> anyhow::Result<PathBuf> {
    let arch = arch.map(|arch| format!("--arch={arch}"));
    let mut args = Defaults::try_parse_from(["kernels", "--check"].into_iter().chain(arch.as_deref()))?.args;
    if let Some(named) = std::env::var_os(VARIABLE).map(PathBuf::from) {
        args.out = Some(named.clone());
        run(&args).with_context(|| format!("{VARIABLE} (--no-kernels leaves the kernels out)"))?;
        return Ok(named);
    }
    if let Err(reason) = run(&args) {
        println!("building the CUDA kernels, because {reason}");
        args.check = false;
        run(&args).context("the bundle's kernels (--no-kernels leaves them out)")?;
    }
    Ok(target_folder().join("kernels"))
}

/// [`KernelsArgs`] as no argument leaves them.
#[derive(Parser)]
struct Defaults {
    #[command(flatten)]
    args: KernelsArgs,
}

#[cfg(test)]
mod tests;
