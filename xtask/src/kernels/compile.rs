//! Compiling one module, and knowing when that is not needed.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, bail};
use comm_kernels::manifest::{self, Module, WORLDS};

use super::arch::Arch;
use super::ptxas;
use super::toolchain::Nvcc;

/// The least architecture of the kernels that are launched ahead of their predecessors and in clusters.
const HOPPER: u32 = 90;

/// How modules are compiled in one run.
pub(crate) struct Compiler<'a> {
    nvcc: &'a Nvcc,
    flags: Vec<String>,
    archs: Vec<Arch>,
    worlds: Vec<usize>,
    cuda: PathBuf,
    out: PathBuf,
    verbose: bool,
}

impl<'a> Compiler<'a> {
    pub(crate) fn new(
        nvcc: &'a Nvcc,
        (archs, worlds): (&[Arch], &[usize]),
        cuda: &Path,
        out: &Path,
        verbose: bool,
    ) -> anyhow::Result<Self> {
        let mut flags: Vec<String> =
            ["--fatbin", "-std=c++17", "-O3", "-DNDEBUG", "-Xptxas=-v"].map(str::to_owned).to_vec();
        if nvcc.compresses() {
            flags.push("--compress-mode=size".to_owned());
        }
        Ok(Self {
            nvcc,
            flags,
            archs: archs.to_vec(),
            worlds: worlds.to_vec(),
            cuda: fs::canonicalize(cuda).with_context(|| format!("finding {}", cuda.display()))?,
            out: fs::canonicalize(out).with_context(|| format!("finding {}", out.display()))?,
            verbose,
        })
    }

    /// Options that choose the architectures for one source: those given, less those that it cannot run on.
    ///
    /// # Errors
    /// When none is left.
    fn targets(&self, source: &Path) -> anyhow::Result<Vec<String>> {
        let least = if is_p2p(source) { HOPPER } else { 0 };
        let targets: Vec<String> = self.archs.iter().filter_map(|arch| arch.gencode(least)).collect();
        if targets.is_empty() {
            bail!("{} needs an architecture of {least} at least", source.display());
        }
        Ok(targets)
    }

    /// What tells a source of p2p the numbers of ranks, where they are not all: the macro that lists them.
    fn worlds(&self, source: &Path) -> Option<String> {
        let listed: String = self.worlds.iter().map(|world| format!("X({world})")).collect();
        (is_p2p(source) && self.worlds != WORLDS).then(|| format!("-DP2P_WORLDS(X)={listed}"))
    }

    /// Compiles `source`, a path relative to the sources' folder, unless `old` is still what the compilation would give. Says whether it compiled.
    pub(crate) fn build(
        &self,
        name: &str,
        source: &Path,
        old: Option<&Module>,
    ) -> anyhow::Result<(Module, bool)> {
        let dependencies_file = dependencies_file(&self.out, name);
        if let Some(old) = old
            && let Ok(text) = fs::read_to_string(&dependencies_file)
            && self.inputs_sha256(source, &text).is_ok_and(|inputs| inputs == old.inputs_sha256)
            && is_intact(&self.out, old)
        {
            return Ok((old.clone(), false));
        }

        let scratch = tempfile::tempdir_in(&self.out).context("creating a scratch folder")?;
        let (fatbin, depfile) = (scratch.path().join("module.fatbin"), scratch.path().join("module.d"));
        let mut command = Command::new(&self.nvcc.path);
        command
            .args(&self.flags)
            .args(self.targets(source)?)
            .args(self.worlds(source))
            .arg("-I")
            .arg(&self.cuda);
        command.arg("-MD").arg("-MF").arg(&depfile).arg("-o").arg(&fatbin);
        // The source by its relative path, so that no path of this machine gets into the output.
        command.arg(source).current_dir(&self.cuda);
        if self.verbose {
            println!("{command:?}");
        }
        let output = command.output().with_context(|| format!("running {}", self.nvcc.path.display()))?;
        let text =
            format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        if !output.status.success() {
            bail!("nvcc failed on {} ({}):\n{text}", source.display(), output.status);
        }
        if let Some(line) = ptxas::fatal_warning(&text) {
            bail!("{}: a warning that must not pass:\n{line}", source.display());
        }
        for line in text.lines().filter(|line| line.contains("warning")) {
            println!("{line}");
        }

        let bytes = fs::read(&fatbin).with_context(|| format!("nvcc left no {}", fatbin.display()))?;
        let dependencies = fs::read_to_string(&depfile)
            .with_context(|| format!("nvcc left no dependency file for {}", source.display()))?;
        let module = Module {
            file: format!("{name}.fatbin"),
            sha256: manifest::sha256(&bytes),
            inputs_sha256: self.inputs_sha256(source, &dependencies)?,
            kernels: ptxas::parse(&text),
        };
        write_atomically(&self.out.join(&module.file), &bytes)?;
        write_atomically(&dependencies_file, dependencies.as_bytes())?;
        Ok((module, true))
    }

    /// The hash of what the output depends on: compiler, flags, and the project's own files among the dependencies.
    /// The toolkit's headers are covered by the compiler's version.
    fn inputs_sha256(&self, source: &Path, dependencies: &str) -> anyhow::Result<String> {
        let mut files = BTreeMap::new();
        // A file that cannot be read says nothing of what has changed since, so it never stands for an old module.
        let Some(paths) = parse_depfile(dependencies) else {
            bail!("the dependency file of {} cannot be read", source.display());
        };
        for path in paths {
            let full = self.cuda.join(path);
            let Ok(full) = fs::canonicalize(&full) else { bail!("{} is gone", full.display()) };
            if let Ok(relative) = full.strip_prefix(&self.cuda) {
                let content = fs::read(&full).with_context(|| format!("reading {}", full.display()))?;
                files.insert(relative.to_path_buf(), manifest::sha256(&content));
            }
        }
        let options: Vec<String> = self.targets(source)?.into_iter().chain(self.worlds(source)).collect();
        let key = (&self.nvcc.version, &self.flags, options, files);
        Ok(manifest::sha256(&serde_json::to_vec(&key)?))
    }
}

fn is_p2p(source: &Path) -> bool {
    source.starts_with("p2p")
}

/// Where it is kept what a module was made from.
pub(crate) fn dependencies_file(out: &Path, name: &str) -> PathBuf {
    out.join(format!("{name}.d"))
}

/// Whether the module's file is there and is what the manifest says.
pub(crate) fn is_intact(out: &Path, module: &Module) -> bool {
    fs::read(out.join(&module.file)).is_ok_and(|bytes| manifest::sha256(&bytes) == module.sha256)
}

/// Writes a file so that readers see the old content or the new one, and nothing between.
pub(crate) fn write_atomically(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    let dir = path.parent().context("a file without a folder")?;
    let write = || -> anyhow::Result<()> {
        let mut file = tempfile::NamedTempFile::new_in(dir)?;
        file.write_all(bytes)?;
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt as _;
            file.as_file().set_permissions(fs::Permissions::from_mode(0o644))?;
        }
        file.persist(path)?;
        Ok(())
    };
    write().with_context(|| format!("writing {}", path.display()))
}

/// The prerequisites of a make rule: what follows the colon, with line continuations and escaped spaces. `None` when it is
/// no rule, or names nothing.
fn parse_depfile(text: &str) -> Option<Vec<PathBuf>> {
    let (_, prerequisites) = text.split_once(": ")?;
    let mut paths = Vec::new();
    let mut word = String::new();
    let mut characters = prerequisites.chars().peekable();
    while let Some(character) = characters.next() {
        match character {
            '\\' if characters.peek() == Some(&'\n') => {}
            '\\' if characters.peek() == Some(&' ') => word.extend(characters.next()),
            c if c.is_whitespace() => {
                if !word.is_empty() {
                    paths.push(PathBuf::from(std::mem::take(&mut word)));
                }
            }
            c => word.push(c),
        }
    }
    if !word.is_empty() {
        paths.push(PathBuf::from(word));
    }
    (!paths.is_empty()).then_some(paths)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependency_files_are_read() {
        let text = "module.fatbin : fill.cu \\\n    /opt/a\\ b/cuda_fp8.h \\\n    dtype.cuh\n";
        let paths = parse_depfile(text).unwrap();
        assert_eq!(paths, ["fill.cu", "/opt/a b/cuda_fp8.h", "dtype.cuh"].map(PathBuf::from));
    }

    #[test]
    fn a_dependency_file_that_says_nothing_is_not_read_as_no_dependencies() {
        for text in ["", "module.fatbin", "module.fatbin : ", "module.fatbin : \\\n  \n"] {
            assert_eq!(parse_depfile(text), None, "{text:?}");
        }
    }
}
