//! The suite passes on right backends.
#![cfg(feature = "conformance")]

mod support;

use std::sync::Arc;
use std::time::Duration;

use comm_core::conformance::{Config, Report, run_threads};
use comm_core::{BackendFactory, HostMemory};
use support::GatherFactory;

fn run(factory: Arc<dyn BackendFactory>, world: usize, config: &Config) -> Report {
    let report = run_threads(factory, world, |_| Box::new(HostMemory::new()), config);
    println!("{report}");
    report
}

fn gather() -> Arc<dyn BackendFactory> {
    Arc::new(GatherFactory::right())
}

#[test]
fn full_suite_passes_at_world_2() {
    let report = run(gather(), 2, &Config::full());
    assert!(report.is_success(), "{report}");
}

#[test]
fn quick_suite_passes_at_other_worlds() {
    for world in [1, 2, 3, 5] {
        let report = run(gather(), world, &Config::quick());
        assert!(report.is_success(), "world {world}: {report}");
    }
}

#[test]
fn a_run_without_time_limits_is_taken_at_its_word() {
    let config = Config { timeout: Duration::MAX, limit: Duration::MAX, ..Config::quick() };
    let report = run(gather(), 2, &config.only("all_gather/"));
    assert!(report.is_success(), "{report}");
}

#[cfg(feature = "host-backend")]
mod host {
    use super::*;
    use comm_core::HostFactory;

    fn transport(name: &str, config: Config) -> Config {
        Config { options: vec![("host.transport".into(), name.into())], ..config }
    }

    #[test]
    fn host_backend_passes_the_full_suite_between_threads() {
        let report = run(Arc::new(HostFactory), 4, &transport("direct", Config::full()));
        assert!(report.is_success(), "{report}");
    }

    #[test]
    fn host_backend_passes_the_full_suite_through_shared_memory() {
        let report = run(Arc::new(HostFactory), 4, &transport("shm", Config::full()));
        assert!(report.is_success(), "{report}");
    }

    #[test]
    fn host_backend_passes_the_quick_suite_at_other_worlds_and_in_checked_mode() {
        for world in [1, 2, 3, 6] {
            let config = Config { checked: world % 2 == 1, ..Config::quick() };
            let report = run(Arc::new(HostFactory), world, &config);
            assert!(report.is_success(), "world {world}: {report}");
        }
    }
}
