//! What enqueueing costs the host, beside NCCL's own calls. The benchmark `enqueue` measures the same with more care; this
//! needs no cargo, so a bundle can carry it.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;
#[path = "common/enqueue.rs"]
mod measure;

use common::world_size;
use measure::{NAMES, with_ranks};

/// Host microseconds that the backend may add to NCCL's own call in the mode that it uses.
const ALLOWED: f64 = 3.0;
/// Calls in one sample.
const CALLS: u64 = 256;
const ROUNDS: usize = 15;

fn median(mut samples: Vec<f64>) -> f64 {
    samples.sort_by(f64::total_cmp);
    samples[samples.len() / 2]
}

#[test]
fn the_backend_adds_little_to_nccl_s_own_call() {
    if world_size().is_none() {
        return;
    }
    let medians = with_ranks(|run| {
        let mut samples = NAMES.map(|_| Vec::new());
        // By turns, so that what disturbs one disturbs all; the first round warms up.
        for round in 0..=ROUNDS {
            for (which, samples) in samples.iter_mut().enumerate() {
                let time = run(which, CALLS).unwrap();
                if round > 0 {
                    samples.push(time.as_secs_f64() * 1e6 / CALLS as f64);
                }
            }
        }
        samples.map(median)
    })
    .unwrap();
    for (name, us) in NAMES.iter().zip(medians) {
        println!("    enqueue all_reduce, two threads, {name}: {us:.2} us");
    }
    let [_, raw, ours] = medians;
    assert!(
        ours <= raw + ALLOWED,
        "the backend takes {ours:.2} us, NCCL's own non-blocking call {raw:.2} us"
    );
}
