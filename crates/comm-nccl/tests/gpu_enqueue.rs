//! What enqueueing costs the host, beside NCCL's own calls. The benchmark `enqueue` measures the same with more care; this
//! needs no cargo, so a bundle can carry it.
//!
//! NCCL starts a thread for each call on a non-blocking communicator, and what that takes drifts by more than what the
//! backend adds. So the two are compared in pairs of short batches, made right after one another in changing order: what
//! drifts is the same in both of a pair, and what disturbs a single batch does not move the median of the differences.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;
#[path = "common/enqueue.rs"]
mod measure;

use std::time::{Duration, Instant};

use common::world_size;
use measure::{NAMES, with_ranks};

/// Host microseconds that the backend may add to NCCL's own call in the mode that it uses.
const ALLOWED: f64 = 3.0;
/// Calls in one batch: short beside the drift, long enough to hide the clock.
const CALLS: u64 = 16;
/// Rounds that are not counted.
const WARM_UP: usize = 20;
/// Rounds that are enough, and without which the median says little.
const ROUNDS: std::ops::RangeInclusive<usize> = 100..=2000;
/// The bound on all of the rounds together.
const TIME: Duration = Duration::from_secs(8);

/// The value below which `part` of the samples lie.
fn quantile(samples: &mut [f64], part: f64) -> f64 {
    samples.sort_by(f64::total_cmp);
    samples[((samples.len() - 1) as f64 * part).round() as usize]
}

#[test]
fn the_backend_adds_little_to_nccl_s_own_call() {
    if world_size().is_none() {
        return;
    }
    let mut samples = with_ranks(|run| {
        let mut samples = NAMES.map(|_| Vec::new());
        let start = Instant::now();
        for round in 0..WARM_UP + ROUNDS.end() {
            if start.elapsed() > TIME {
                break;
            }
            // Each of the two that are compared follows the other as often as it follows the blocking call.
            for which in [[0, 1, 2], [0, 2, 1]][round % 2] {
                let time = run(which, CALLS).unwrap();
                if round >= WARM_UP {
                    samples[which].push(time.as_secs_f64() * 1e6 / CALLS as f64);
                }
            }
        }
        samples
    })
    .unwrap();
    let mut added: Vec<f64> = samples[2].iter().zip(&samples[1]).map(|(ours, raw)| ours - raw).collect();
    assert!(added.len() >= *ROUNDS.start(), "only {} pairs were measured within {TIME:?}", added.len());
    for (name, samples) in NAMES.iter().zip(&mut samples) {
        println!("    enqueue all_reduce, two threads, {name}: {:.2} us", quantile(samples, 0.5));
    }
    let [low, middle, high] = [0.25, 0.5, 0.75].map(|part| quantile(&mut added, part));
    println!(
        "    enqueue all_reduce, two threads, added by comm-nccl: {middle:.2} us (median of {} pairs; half of them \
         between {low:.2} and {high:.2})",
        added.len()
    );
    assert!(
        middle <= ALLOWED,
        "the backend adds {middle:.2} us to NCCL's own non-blocking call, {ALLOWED} are allowed"
    );
}
