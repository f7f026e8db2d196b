//! The house rules that no compiler checks, as a test over the repository's files.

#![allow(clippy::unwrap_used, reason = "a test program: what cannot be read fails the test")]

use std::path::{Path, PathBuf};

/// A file longer than this does more than one thing.
const LONGEST: usize = 500;
/// A file of tests may list more cases than that.
const LONGEST_OF_TESTS: usize = 800;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn rust_files() -> Vec<(PathBuf, String)> {
    let mut files = Vec::new();
    let mut folders = vec![root().join("crates"), root().join("examples"), root().join("xtask")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                if path.file_name().is_some_and(|name| name != "target") {
                    folders.push(path);
                }
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = std::fs::read_to_string(&path).unwrap();
                files.push((path, text));
            }
        }
    }
    assert!(files.len() > 20, "the repository's sources were not found");
    files
}

/// Whether the file holds tests only.
fn is_tests(path: &Path) -> bool {
    path.ends_with("tests.rs") || path.components().any(|part| part.as_os_str() == "tests")
}

/// The code of a file's lines: comments are left out.
fn code(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let lines = text.lines().enumerate().map(|(index, line)| (index + 1, line));
    lines.filter(|(_, line)| !line.trim_start().starts_with("//"))
}

fn complain(problems: &[String]) {
    assert!(problems.is_empty(), "\n{}", problems.join("\n"));
}

#[test]
fn every_module_says_what_it_owns() {
    // The unit tests of a module stand in a file of their own under the module's documentation.
    let problems: Vec<String> = (rust_files().iter())
        .filter(|(path, text)| !path.ends_with("tests.rs") && !text.starts_with("//!"))
        .map(|(path, _)| format!("{} has no module documentation", path.display()))
        .collect();
    complain(&problems);
}

#[test]
fn files_stay_short_enough_to_do_one_thing() {
    let mut problems = Vec::new();
    for (path, text) in rust_files() {
        let (lines, limit) = (text.lines().count(), if is_tests(&path) { LONGEST_OF_TESTS } else { LONGEST });
        if lines > limit {
            problems.push(format!("{} has {lines} lines, more than {limit}", path.display()));
        }
    }
    complain(&problems);
}

#[test]
fn nothing_is_left_undone_or_switched_off() {
    // Put together here, so that this file does not find itself.
    let words = [["to", "do!("], ["unimplemen", "ted!("], ["#[ig", "nore"], ["db", "g!("], ["FIX", "ME"]]
        .map(|w| w.concat());
    let mut problems = Vec::new();
    for (path, text) in rust_files() {
        for (line, code) in code(&text) {
            for word in words.iter().filter(|word| code.contains(word.as_str())) {
                problems.push(format!("{}:{line}: {word}", path.display()));
            }
        }
    }
    complain(&problems);
}

#[test]
fn every_crate_takes_the_workspaces_lints() {
    let members = |folder| std::fs::read_dir(root().join(folder)).unwrap().map(|entry| entry.unwrap().path());
    let problems: Vec<String> = (members("crates").chain(members("examples")).chain([root().join("xtask")]))
        .filter(|path| {
            let manifest = std::fs::read_to_string(path.join("Cargo.toml")).unwrap();
            !manifest.contains("[lints]\nworkspace = true")
        })
        .map(|path| format!("{} has lints of its own", path.display()))
        .collect();
    complain(&problems);
}

#[test]
fn nothing_asks_for_multicast() {
    // NVLink multicast stays off: it is not allowed on all machines.
    let call = ["cuMulticast", "Create"].concat();
    let problems: Vec<String> = (rust_files().iter())
        .filter(|(_, text)| text.contains(&format!("{call}(")))
        .map(|(path, _)| format!("{} calls {call}", path.display()))
        .collect();
    complain(&problems);
}

/// What a user can set stands in one place.
#[test]
fn every_variable_is_in_the_list_of_settings() {
    let listed = std::fs::read_to_string(root().join("docs/settings.md")).unwrap();
    let internal = ["COMM_XTASK_", "COMM_KERNELS_SOURCES_SHA256"];
    let mut problems = Vec::new();
    for (path, text) in rust_files().iter().filter(|(path, _)| !is_tests(path)) {
        for (number, line) in code(text) {
            for name in line.split('"').filter(|name| is_variable(name)) {
                let known = listed.contains(&format!("`{name}`"));
                if !known && !internal.iter().any(|own| name.starts_with(own)) {
                    problems.push(format!("{}:{number}: {name} is not in docs/settings.md", path.display()));
                }
            }
        }
    }
    complain(&problems);
}

fn is_variable(text: &str) -> bool {
    text.strip_prefix("COMM_").is_some_and(|rest| {
        !rest.is_empty()
            && rest.bytes().all(|byte| byte.is_ascii_uppercase() || byte.is_ascii_digit() || byte == b'_')
    })
}
