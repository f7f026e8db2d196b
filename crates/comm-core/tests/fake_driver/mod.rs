//! A CUDA driver that keeps a device's memory on the host (`cuda.c`), for a process of its own.

use std::io::ErrorKind;
use std::process::Command;

/// Says to a process that its driver is the fake one.
const FAKE: &str = "COMM_TEST_FAKE_CUDA";

/// Runs the checks with the fake driver: in another process, which runs the same `test` of this program, because cudarc
/// takes the first driver that it finds when it first needs one. Takes a C compiler (`cc`, or what `CC` names), or prints
/// that there is none.
pub(crate) fn run(test: &str, checks: &[(&str, fn())]) {
    if std::env::var_os(FAKE).is_some() {
        for (name, check) in checks {
            println!("check: {name}");
            check();
        }
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let compiler = std::env::var("CC").unwrap_or_else(|_| "cc".into());
    let built = Command::new(&compiler)
        .args(["-shared", "-fPIC", "-pthread", "-O1", "-o"])
        // cudarc looks for this name first.
        .arg(folder.path().join("libcuda.so"))
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fake_driver/cuda.c"))
        .output();
    let built = match built {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            println!("SKIP: there is no {compiler}");
            return;
        }
        built => built.unwrap(),
    };
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    let ran = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env("LD_LIBRARY_PATH", folder.path())
        .env(FAKE, "1")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&ran.stdout);
    let begun = said.matches("check: ").count();
    assert!(ran.status.success(), "{said}{}", String::from_utf8_lossy(&ran.stderr));
    assert_eq!(begun, checks.len(), "{said}");
}
