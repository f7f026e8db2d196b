//! The conformance suite, over threads, at every world size that the machine allows.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::sync::Arc;
use std::time::Duration;

use comm_core::conformance::{Config, run_threads};
use comm_p2p::P2pFactory;
use common::{shared, world_size};

fn config(options: &[(&str, &str)]) -> Config {
    Config {
        timeout: Duration::from_secs(5),
        // Where devices are shared, small kernels take their time.
        limit: Duration::from_secs(if shared() { 160 } else { 40 }),
        options: options.iter().map(|&(name, value)| (name.to_owned(), value.to_owned())).collect(),
        ..Config::quick()
    }
}

fn run(world: usize, config: &Config) {
    let memory = |rank| Box::new(common::memory(rank).unwrap()) as Box<dyn comm_core::DeviceMemory>;
    let report = run_threads(Arc::new(P2pFactory), world, memory, config);
    println!("world {world} {:?}: {report}", config.options);
    assert!(report.is_success(), "world {world}, {:?}", config.options);
}

#[test]
fn every_world_size() {
    let Some(most) = world_size() else { return };
    for world in 2..=most {
        run(world, &config(&[]));
    }
}

#[test]
fn tiny_staging_and_rounds_that_wrap() {
    let Some(most) = world_size() else { return };
    let options =
        [("p2p.staging_bytes", "8192"), ("p2p.pair_bytes", "512"), ("p2p.first_round", "4294967290")];
    run(most, &config(&options));
}

#[test]
fn every_algorithm() {
    let Some(most) = world_size() else { return };
    let algorithms = [
        "one_shot", "two_shot", "cells", "steps", "packets", "relayed", "lamport", "lines", "direct",
        "spread", "staged", "composed", "pull",
    ];
    for algorithm in algorithms {
        // The suite's operands lie alike on all ranks.
        let options = [
            ("p2p.algorithm", algorithm),
            ("p2p.packet_slots", "1024"),
            ("p2p.lamport_slots", "1024"),
            ("p2p.line_slots", "512"),
            ("p2p.symmetric_operands", "on"),
            // Numbers wrap within the suite.
            ("p2p.first_round", "4294967200"),
        ];
        for case in ["all_", "reduce_scatter/", "reduce_scatter_v/", "broadcast", "register", "allocate"] {
            run(most, &config(&options).only(case));
        }
    }
}

#[test]
fn checked_mode() {
    let Some(most) = world_size() else { return };
    run(most, &Config { checked: true, ..config(&[]) });
}

/// With the addresses of all that is no neighbour null, a kernel that touched one would end the device.
#[test]
fn an_imposed_cube_mesh_and_its_parts() {
    const CUBE: (&str, &str) = ("p2p.topology", "hybrid_cube_mesh");
    let Some(most) = world_size() else { return };
    // Up to 4 ranks have no gaps; of 5, 6 or 7, the suite splits off groups that do not reach each other, and are refused.
    // The suite's splits of 8 have parts with gaps among them.
    if most < 8 {
        println!("SKIP: {most} GPUs are not the whole mesh");
        return;
    }
    run(8, &config(&[CUBE]));
    run(8, &config(&[CUBE, ("p2p.algorithm", "staged")]));
    run(8, &Config { checked: true, ..config(&[CUBE]) });
    // Several rounds for a few kilobytes, and numbers that wrap within a call.
    let small = [
        CUBE,
        ("p2p.packet_slots", "512"),
        ("p2p.staging_bytes", "8192"),
        ("p2p.pair_bytes", "512"),
        ("p2p.first_round", "4294967290"),
    ];
    run(8, &config(&small));
}
