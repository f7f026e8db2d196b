//! The suite passes on a right backend.
#![cfg(feature = "conformance")]

mod support;

use std::sync::Arc;

use comm_core::HostMemory;
use comm_core::conformance::{Config, Report, run_threads};
use support::GatherFactory;

fn run(world: usize, config: &Config) -> Report {
    run_threads(Arc::new(GatherFactory::right()), world, |_| Box::new(HostMemory::new()), config)
}

#[test]
fn full_suite_passes_at_world_4() {
    let report = run(4, &Config::full());
    println!("{report}");
    assert!(report.is_success(), "{report}");
}

#[test]
fn quick_suite_passes_at_other_worlds() {
    for world in [1, 2, 3, 5] {
        let report = run(world, &Config::quick());
        println!("{report}");
        assert!(report.is_success(), "world {world}: {report}");
    }
}
