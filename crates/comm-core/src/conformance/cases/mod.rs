//! The cases, by what they try.

mod arguments;
mod block2d;
mod groups;
mod issue;
mod life;
mod memory;
mod mismatch;
mod moves;
mod norm;
mod p2p;
mod quantized;
mod quantized_norm;
mod reductions;
mod two_group;

use super::runner::Runner;
use crate::dtype::DType;

pub(super) fn run_all(runner: &mut Runner<'_>) {
    life::before(runner);
    reductions::run(runner);
    quantized::run(runner);
    moves::run(runner);
    p2p::run(runner);
    block2d::run(runner);
    norm::run(runner);
    two_group::run(runner);
    groups::run(runner);
    memory::run(runner);
    arguments::run(runner);
    mismatch::run(runner);
    life::run(runner);
    life::end(runner);
}

/// The counts that every type and reduction is tried with.
fn counts(quick: bool) -> &'static [usize] {
    if quick { &[0, 1, 3, 8, 257, 1000] } else { &[0, 1, 2, 3, 7, 8, 31, 255, 256, 257, 1000, 4099] }
}

/// Uneven counts with many empty parts: one rank, which changes from call to call, has everything, among `world` ranks that
/// have `count` on average.
fn all_at_one(world: usize, count: usize, turn: usize) -> Vec<usize> {
    (0..world).map(|rank| if rank == turn % world { world * count } else { 0 }).collect()
}

/// Offsets of `send` and `recv` in elements, which change from call to call.
fn offsets(step: usize, dtype: DType) -> (usize, usize) {
    let (send, recv) = [(0, 0), (1, 0), (0, 1), (3, 1), (1, 1), (2, 5), (0, 0), (7, 2)][step % 8];
    (send * dtype.size(), recv * dtype.size())
}
