//! The whole program, on host memory: what a machine without a GPU shows.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::process::{Command, Output};

fn decoder(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_decoder")).arg("--host").args(args).output().unwrap()
}

#[test]
fn the_program_prints_its_table_and_writes_its_files() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (json, plot) = (path("decoder.json"), path("decoder.svg"));
    let output = decoder(&["--samples", "2", "--tokens", "1,5", "--json", &json, "--plot", &plot]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    for part in ["| tokens | no communication | host | host, fused norm |", "4 ranks", "all outputs equal"] {
        assert!(text.contains(part), "{part:?} is not in\n{text}");
    }
    let report: serde_json::Value = serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap();
    for (row, tokens) in [(0, 1), (1, 5)] {
        let row = &report["rows"][row];
        assert_eq!(row["tokens"], tokens);
        for figure in 0..3 {
            assert!(row["figures"][figure]["us_per_layer"].as_f64().unwrap() > 0.0, "{report}");
        }
        assert_eq!(row["figures"][2]["name"], "host_fused");
        assert_eq!(row["figures"][2]["equal_on_all_ranks"], true);
    }
    assert!(std::fs::read_to_string(plot).unwrap().contains("5 tokens"));
}

#[test]
fn a_world_that_cannot_share_the_layer_is_refused() {
    for (args, words) in
        [(&["--world", "3"][..], "3 ranks cannot share"), (&["--tokens", "0"], "--tokens must be at least 1")]
    {
        let output = decoder(args);
        assert!(!output.status.success());
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(text.contains(words), "{text}");
    }
}
