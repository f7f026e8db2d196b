//! NVIDIA's tools from PyPI, into the target folder and nowhere else.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};

use crate::command::output_of;

/// How long a program may take to say who it is, from a cold disk too.
pub const ANSWER: Duration = Duration::from_secs(30);
/// How long an installation may take: minutes at a megabyte a second.
const INSTALLATION: Duration = Duration::from_secs(30 * 60);

/// Installs `wheels`, pinned names without what they need, as the folder `place`; one that is there is replaced.
///
/// # Errors
/// When Python or pip is missing (`what_to_do` says what else helps), when pip fails, or `place` cannot be written.
pub fn install(place: &Path, wheels: &[&str], what_to_do: &str) -> Result<()> {
    require(&["python3", "-m", "pip", "--version"], what_to_do)?;
    let folder = place.parent().context("nowhere to install to")?;
    fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
    // Installed beside its place and then moved, so that an interrupted installation is never taken for a whole one.
    let scratch = tempfile::Builder::new().prefix("from-pypi-").tempdir_in(folder)?;
    run(scratch.path(), wheels)?;
    if place.exists() {
        fs::remove_dir_all(place).with_context(|| format!("removing {}", place.display()))?;
    }
    fs::rename(scratch.keep(), place).with_context(|| format!("moving to {}", place.display()))
}

/// Whether a command answers; if not, `what_to_do`.
///
/// # Errors
/// When it does not.
pub fn require(command: &[&str], what_to_do: &str) -> Result<()> {
    if output_of(Command::new(command[0]).args(&command[1..]), ANSWER).is_none() {
        bail!("`{}` does not work: {what_to_do}", command.join(" "));
    }
    Ok(())
}

fn run(into: &Path, wheels: &[&str]) -> Result<()> {
    let spinner = ProgressBar::new_spinner();
    spinner.set_style(ProgressStyle::with_template("{spinner} {elapsed} {wide_msg}")?);
    spinner.enable_steady_tick(Duration::from_millis(100));
    let mut child = Command::new("python3")
        .args(["-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--progress-bar=off"])
        .args(["--timeout=30", "--retries=3", "--no-compile", "--no-deps", "--target"])
        .arg(into)
        .args(wheels)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("starting pip")?;
    let mut errors = child.stderr.take().context("pip without standard error")?;
    let reader = std::thread::spawn(move || {
        let mut text = String::new();
        let _ = std::io::Read::read_to_string(&mut errors, &mut text);
        text
    });
    let output = child.stdout.take().context("pip without standard output")?;
    let shown = spinner.clone();
    std::thread::spawn(move || {
        for line in BufReader::new(output).lines().map_while(Result::ok) {
            let words = ["Collecting", "Downloading", "Installing", "Successfully"];
            if words.iter().any(|word| line.trim_start().starts_with(word)) {
                if shown.is_hidden() {
                    println!("{}", line.trim());
                }
                shown.set_message(line.trim().to_owned());
            }
        }
    });
    let give_up = Instant::now() + INSTALLATION;
    let status = loop {
        if let Some(status) = child.try_wait().context("waiting for pip")? {
            break status;
        }
        if Instant::now() >= give_up {
            let _ = child.kill();
            let _ = child.wait();
            bail!("pip has not installed {} within {INSTALLATION:?}", wheels.join(" "));
        }
        std::thread::sleep(Duration::from_millis(50));
    };
    spinner.finish_and_clear();
    if !status.success() {
        let text = reader.join().unwrap_or_default();
        bail!("pip could not install {} ({status}):\n{text}", wheels.join(" "));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_answer_is_an_error_that_says_what_to_do() {
        assert!(require(&["true"], "").is_ok());
        let error = require(&["/nonexistent/python3", "-m", "pip"], "install it").unwrap_err().to_string();
        assert!(error.contains("/nonexistent/python3 -m pip") && error.contains("install it"), "{error}");
    }
}
