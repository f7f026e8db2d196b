//! The cases, by what they try.

mod moves;
mod reductions;

use super::runner::Runner;
use crate::dtype::DType;

pub(super) fn run_all(runner: &mut Runner<'_>) {
    reductions::run(runner);
    moves::run(runner);
}

/// The counts that every type and reduction is tried with.
fn counts(quick: bool) -> &'static [usize] {
    if quick { &[0, 1, 3, 8, 257, 1000] } else { &[0, 1, 2, 3, 7, 8, 31, 255, 256, 257, 1000, 4099] }
}

/// Offsets of `send` and `recv` in elements, which change from call to call.
fn offsets(step: usize, dtype: DType) -> (usize, usize) {
    let (send, recv) = [(0, 0), (1, 0), (0, 1), (3, 1), (1, 1), (2, 5), (0, 0), (7, 2)][step % 8];
    (send * dtype.size(), recv * dtype.size())
}
