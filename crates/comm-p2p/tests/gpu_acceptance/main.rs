//! What users of such a library expect to hold, case by case: sums, graphs, order, stalls, counters, norms, endurance.
//! Ranks are threads, at every world size that the machine has GPUs for; some cases are tried between processes as well,
//! and some in a hybrid cube mesh.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(
    clippy::undocumented_unsafe_blocks,
    reason = "buffers are as large as the calls need and live as long as the rank's memory, which goes last; streams are \
              the memory's own"
)]
#![allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, reason = "small numbers")]

#[path = "../common/mod.rs"]
mod common;

mod alternating;
mod between_processes;
mod data;
mod graphs;
mod groups;
mod in_a_cube_mesh;
mod lines;
mod norm;
mod setting;
mod soak;
mod stall;
mod sums;
mod tokens;
mod two_group;
mod uneven;
mod usage;
