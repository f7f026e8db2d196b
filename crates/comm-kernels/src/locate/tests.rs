use std::collections::BTreeMap;

use super::*;
use crate::manifest::Module;

fn manifest() -> Manifest {
    let module = Module {
        file: "fill.fatbin".into(),
        sha256: manifest::sha256(b"not really a fat binary"),
        inputs_sha256: String::new(),
        kernels: BTreeMap::new(),
    };
    Manifest {
        schema: SCHEMA,
        sources_sha256: SOURCES_SHA256.into(),
        nvcc: "13.0.88".into(),
        archs: vec!["90a".into()],
        worlds: manifest::WORLDS.to_vec(),
        modules: BTreeMap::from([("fill".to_owned(), module)]),
    }
}

fn write(dir: &Path, manifest: &Manifest) {
    fs::create_dir_all(dir).unwrap();
    fs::write(dir.join(FILE_NAME), serde_json::to_vec(manifest).unwrap()).unwrap();
    fs::write(dir.join("fill.fatbin"), b"not really a fat binary").unwrap();
}

fn search<'a>(variable: Option<&Path>, exe: Option<&'a Path>, cwd: Option<&'a Path>) -> Search<'a> {
    Search {
        variable: variable.map(Path::to_path_buf),
        embedded: None,
        exe,
        cwd,
        user: rustix::process::geteuid().as_raw(),
    }
}

fn complaint<T: fmt::Debug>(result: Result<T>) -> String {
    let error = result.unwrap_err();
    assert!(matches!(error, CommError::Library { .. }), "{error:?}");
    let text = error.to_string();
    assert!(text.contains("cargo xtask kernels"), "{text}");
    text
}

#[test]
fn the_variable_comes_first_and_is_never_passed_over() {
    let home = tempfile::tempdir().unwrap();
    let (named, beside) = (home.path().join("named"), home.path().join("bin/kernels"));
    write(&beside, &manifest());
    let exe = home.path().join("bin/program");
    let text = complaint(search(Some(&named), Some(&exe), None).run());
    assert!(text.contains("COMM_KERNELS_DIR is"), "{text}");
    write(&named, &manifest());
    let set = search(Some(&named), Some(&exe), None).run().unwrap();
    assert_eq!(set.origin(), &Origin::Folder(named));
}

#[test]
fn a_bundle_and_a_checkout_are_searched() {
    let home = tempfile::tempdir().unwrap();
    let exe = home.path().join("target/debug/deps/program");
    let cwd = home.path().join("crates/some");
    let text = complaint(search(None, Some(&exe), Some(&cwd)).run());
    assert!(text.contains("target/debug/deps/kernels") && text.contains("COMM_KERNELS_DIR"), "{text}");

    // Program and current directory lie in one tree; each of its folders is named once.
    assert_eq!(text.matches(&format!("{}/target/kernels", home.path().display())).count(), 1, "{text}");

    write(&home.path().join("target/kernels"), &manifest());
    for (exe, cwd) in [(Some(exe.as_path()), None), (None, Some(cwd.as_path()))] {
        let set = search(None, exe, cwd).run().unwrap();
        assert_eq!(set.origin(), &Origin::Folder(home.path().join("target/kernels")));
    }
    write(&home.path().join("target/debug/deps/kernels"), &manifest());
    let set = search(None, Some(&exe), None).run().unwrap();
    assert_eq!(set.origin(), &Origin::Folder(home.path().join("target/debug/deps/kernels")));
}

#[test]
fn kernels_that_do_not_fit_are_refused() {
    let home = tempfile::tempdir().unwrap();
    let dir = home.path();
    let other = Manifest { sources_sha256: "0123456789abcdef".into(), ..manifest() };
    write(dir, &other);
    assert!(complaint(search(Some(dir), None, None).run()).contains("other sources"));
    write(dir, &Manifest { schema: SCHEMA + 1, ..manifest() });
    assert!(complaint(search(Some(dir), None, None).run()).contains("format"));
    fs::write(dir.join(FILE_NAME), b"{").unwrap();
    assert!(complaint(search(Some(dir), None, None).run()).contains("JSON"));
}

#[test]
fn images_are_checked_and_padded() {
    let home = tempfile::tempdir().unwrap();
    write(home.path(), &manifest());
    let set = search(Some(home.path()), None, None).run().unwrap();
    let image = set.image("fill").unwrap();
    assert_eq!((image.len(), image.as_ptr() as usize % 8), (23, 0));
    assert!(complaint(set.image("reduce")).contains("reduce"));
    fs::write(home.path().join("fill.fatbin"), b"something else").unwrap();
    assert!(complaint(set.image("fill")).contains("manifest describes"));
}

#[test]
fn what_is_embedded_is_whole() {
    let Some(text) = embedded::MANIFEST else {
        assert!(embedded::MODULES.is_empty());
        return;
    };
    let set = parse(text.as_bytes(), Origin::Embedded).unwrap();
    assert_eq!(set.manifest().modules.len(), embedded::MODULES.len());
    for name in set.manifest().modules.keys() {
        assert!(!set.image(name).unwrap().is_empty());
    }
}

#[test]
fn others_kernels_are_passed_over_unless_they_are_named() {
    use std::os::unix::fs::PermissionsExt as _;
    let home = tempfile::tempdir().unwrap();
    let cwd = home.path().join("work");
    let dir = home.path().join("target/kernels");
    write(&dir, &manifest());
    fs::set_permissions(dir.join(FILE_NAME), fs::Permissions::from_mode(0o666)).unwrap();
    assert!(complaint(search(None, None, Some(&cwd)).run()).contains("everyone may write it"));
    assert!(search(Some(&dir), None, None).run().is_ok());
    fs::set_permissions(dir.join(FILE_NAME), fs::Permissions::from_mode(0o644)).unwrap();
    assert!(search(None, None, Some(&cwd)).run().is_ok());

    // Only root can give a file to another user, and root's own would count for anyone.
    if !rustix::process::geteuid().is_root() {
        let other = Search { user: u32::MAX - 1, ..search(None, None, Some(&cwd)) };
        assert!(complaint(other.run()).contains("another user"));
        return;
    }
    std::os::unix::fs::chown(dir.join(FILE_NAME), Some(12_345), None).unwrap();
    let text = complaint(search(None, None, Some(&cwd)).run());
    assert!(text.contains("another user (12345)") && text.contains("target/kernels/manifest.json"), "{text}");
    let owner = Search { user: 12_345, ..search(None, None, Some(&cwd)) };
    assert!(owner.run().is_ok());
}
