//! Embeds compiled kernels, where there are any: those of `COMM_KERNELS_DIR`, or those that `cargo xtask kernels` left
//! in the target folder. Without them the crate compiles just the same, and looks for kernels at run time; so it does
//! with `COMM_KERNELS_EMBED=0`, for programs that lie beside one copy of the kernels that they share.

use std::env;
use std::error::Error;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

#[path = "src/manifest.rs"]
#[allow(dead_code, unreachable_pub, reason = "the library uses the rest")]
mod manifest;

use manifest::{FILE_NAME, Manifest, SCHEMA, WORLDS};

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=src/manifest.rs");
    println!("cargo::rerun-if-changed=cuda");
    println!("cargo::rerun-if-env-changed=COMM_KERNELS_DIR");
    println!("cargo::rerun-if-env-changed=COMM_KERNELS_EMBED");

    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    let package = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").ok_or("CARGO_MANIFEST_DIR is not set")?);
    let fingerprint = manifest::sources_sha256(&package.join("cuda"))?;
    println!("cargo::rustc-env=COMM_KERNELS_SOURCES_SHA256={fingerprint}");

    let mut code = None;
    let wanted = env::var_os("COMM_KERNELS_EMBED").is_none_or(|value| value != "0");
    if wanted && let Some(dir) = kernels_dir(&out, &package) {
        println!("cargo::rerun-if-changed={}", dir.display());
        match embed(&dir, &fingerprint, &out) {
            Ok(embedded) => code = embedded,
            Err(error) => println!("cargo::warning=kernels in {} are not embedded: {error}", dir.display()),
        }
    }
    let code = code.unwrap_or_else(|| {
        "pub(crate) const MANIFEST: Option<&str> = None;\n\
         pub(crate) const MODULES: &[(&str, &[u8])] = &[];\n"
            .to_owned()
    });
    fs::write(out.join("embedded.rs"), code)?;
    Ok(())
}

/// The folder to embed from and to watch.
fn kernels_dir(out: &Path, package: &Path) -> Option<PathBuf> {
    if let Some(dir) = env::var_os("COMM_KERNELS_DIR") {
        return Some(PathBuf::from(dir));
    }
    let target = out.ancestors().find(|dir| dir.join("CACHEDIR.TAG").is_file())?;
    let dir = target.join("kernels");
    // Cargo takes a watched path that does not exist for one that always changes, and would rebuild every time. So in
    // this project's own workspace the folder is made to exist.
    if !dir.is_dir() && package.join("../../xtask/Cargo.toml").is_file() {
        let _ = fs::create_dir_all(&dir);
    }
    dir.is_dir().then_some(dir)
}

/// The code that embeds what is in `dir`: copies, so that a later kernel build cannot change what is being compiled in.
fn embed(dir: &Path, fingerprint: &str, out: &Path) -> Result<Option<String>, Box<dyn Error>> {
    let path = dir.join(FILE_NAME);
    if !path.is_file() {
        return Ok(None);
    }
    let text = fs::read(&path)?;
    let manifest: Manifest = serde_json::from_slice(&text)?;
    if manifest.schema != SCHEMA || manifest.sources_sha256 != fingerprint {
        return Err("they were built from other sources; run `cargo xtask kernels`".into());
    }
    if manifest.worlds != WORLDS {
        println!("cargo::warning=the embedded kernels of p2p are for {:?} ranks only", manifest.worlds);
    }
    let copy = out.join(FILE_NAME);
    fs::write(&copy, text)?;
    let mut code = format!("pub(crate) const MANIFEST: Option<&str> = Some(include_str!({copy:?}));\n");
    code.push_str("pub(crate) const MODULES: &[(&str, &[u8])] = &[\n");
    for (name, module) in &manifest.modules {
        let file = dir.join(&module.file);
        let bytes = fs::read(&file)?;
        if manifest::sha256(&bytes) != module.sha256 {
            return Err(format!("{} is not the file that the manifest describes", file.display()).into());
        }
        let copy = out.join(format!("{name}.fatbin"));
        fs::write(&copy, bytes)?;
        writeln!(code, "    ({name:?}, include_bytes!({copy:?})),")?;
    }
    code.push_str("];\n");
    Ok(Some(code))
}
