//! Cases whose ranks are processes: memory of the communicator crosses between them by descriptor, registered memory by
//! legacy IPC.

use crate::common::{as_processes, is_process};
use crate::data::timed;
use crate::setting::Setting;
use crate::{graphs, sums, tokens, uneven};

/// Runs `body` as the processes of the test of this name in this module.
fn run(name: &str, body: impl FnOnce(&Setting)) {
    let test = format!("between_processes::{name}");
    let start = || as_processes(&test, || body(&Setting::between_processes()));
    // A process's cases take the time themselves, each when its turn comes.
    if is_process() { start() } else { timed(&test, start) }
}

#[test]
fn sums_are_exact() {
    run("sums_are_exact", |setting| {
        sums::integers(setting);
        sums::guard_regions(setting);
        sums::larger_than_the_scratch(setting);
        sums::signed_zeros(setting);
    });
}

#[test]
fn graphs_are_replayed() {
    run("graphs_are_replayed", |setting| {
        graphs::two_calls(setting);
        graphs::overwritten_inputs(setting);
        graphs::graph_per_token_count(setting);
        graphs::six_calls(setting);
        graphs::odd_and_even(setting);
    });
}

#[test]
fn every_token_count_is_summed() {
    run("every_token_count_is_summed", tokens::every_token_count);
}

#[test]
fn parts_may_be_uneven() {
    run("parts_may_be_uneven", uneven::by_every_algorithm);
}
