//! Which kernels a run must have launched: every one that was compiled, but for those that it has a reason to leave out.
//!
//! Compares names alone. That a launched kernel also did the right thing is for whoever launched it to see.

use std::collections::{BTreeMap, BTreeSet};

/// What a run had to do with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Run {
    /// Ranks.
    pub(super) world: usize,
    /// Whether lines could be sent.
    pub(super) lines: bool,
    /// Whether ranks share GPUs: then some algorithms have no shape that fits, and others take their place.
    pub(super) shared: bool,
}

const DOES_NOT_FIT: &str = "no shape of theirs fits a share of a GPU: --world N on N GPUs runs them";

/// The number of ranks whose mesh may have gaps.
pub(super) const CUBE: usize = 8;

/// Kernels that keep to neighbours' memory.
const WITH_GAPS: [&str; 2] = ["p2p_cube", "p2p_mesh_"];

impl Run {
    /// Why a kernel need not have been launched; `None` if it must have been.
    fn excuse(&self, kernel: &str) -> Option<&'static str> {
        if of_world(kernel).is_some_and(|world| world != self.world) {
            return Some("for another number of ranks: --world N runs those for N");
        }
        if self.world != CUBE && WITH_GAPS.iter().any(|prefix| kernel.starts_with(prefix)) {
            return Some("for a hybrid cube mesh: --world 8 runs them, with --share-gpus on fewer GPUs");
        }
        if !self.lines && kernel.contains("_lines_") {
            return Some("lines are sent only where NVLink joins every pair of ranks");
        }
        None
    }

    /// How many kernels were left out for which reason.
    ///
    /// # Errors
    /// The kernels that were neither launched nor left out for a reason, and those that were launched for all the reasons
    /// not to: then the reason is wrong, and would hide the kernel the day it is not launched any more.
    pub(super) fn judge<'a>(
        &self,
        compiled: impl Iterator<Item = &'a str>,
        launched: &BTreeSet<String>,
    ) -> Result<BTreeMap<&'static str, usize>, String> {
        let mut left_out = BTreeMap::new();
        let (mut missed, mut excused) = (Vec::new(), Vec::new());
        for kernel in compiled {
            match (self.excuse(kernel), launched.contains(kernel)) {
                (None, true) => {}
                (None, false) if self.shared => *left_out.entry(DOES_NOT_FIT).or_insert(0) += 1,
                (None, false) => missed.push(kernel),
                (Some(_), true) => excused.push(kernel),
                (Some(reason), false) => *left_out.entry(reason).or_insert(0) += 1,
            }
        }
        let problem = |what: &str, kernels: &[&str]| {
            (!kernels.is_empty()).then(|| format!("{} kernels {what}: {}", kernels.len(), kernels.join(", ")))
        };
        let problems = [
            problem("were never launched", &missed),
            problem("were launched, though there is a reason to leave them out", &excused),
        ];
        let problems: Vec<String> = problems.into_iter().flatten().collect();
        if problems.is_empty() { Ok(left_out) } else { Err(problems.join("; ")) }
    }
}

/// The number of ranks that a kernel is for, where its name ends in one.
fn of_world(kernel: &str) -> Option<usize> {
    kernel.rsplit_once("_w")?.1.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const COMPILED: [&str; 7] = [
        "fill_f32",
        "p2p_ar1_bf16_w2",
        "p2p_ar1_bf16_w8",
        "p2p_rs_lines_f32_w2",
        "p2p_cube_ag",
        "p2p_mesh_pair",
        "p2p_pair",
    ];

    fn judge(world: usize, lines: bool, launched: &[&str]) -> Result<usize, String> {
        let launched = launched.iter().map(|&name| name.to_owned()).collect();
        let left_out = Run { world, lines, shared: false }.judge(COMPILED.into_iter(), &launched);
        left_out.map(|left_out| left_out.into_values().sum())
    }

    #[test]
    fn what_is_neither_launched_nor_excused_is_named() {
        let all = ["fill_f32", "p2p_ar1_bf16_w2", "p2p_rs_lines_f32_w2", "p2p_pair"];
        assert_eq!(judge(2, true, &all), Ok(3));
        for (index, missed) in all.iter().enumerate() {
            let mut launched = all.to_vec();
            launched.remove(index);
            let problem = judge(2, true, &launched).unwrap_err();
            assert!(
                problem.contains("1 kernels were never launched") && problem.contains(missed),
                "{problem}"
            );
        }
        let cube = ["fill_f32", "p2p_ar1_bf16_w8", "p2p_cube_ag", "p2p_mesh_pair", "p2p_pair"];
        assert_eq!(judge(8, true, &cube), Ok(2));
        assert!(judge(8, true, &cube[..3]).unwrap_err().contains("p2p_mesh_pair, p2p_pair"));
    }

    #[test]
    fn on_shared_gpus_some_have_no_shape() {
        let launched = ["fill_f32".to_owned(), "p2p_pair".to_owned()].into();
        let left_out =
            Run { world: 2, lines: false, shared: true }.judge(COMPILED.into_iter(), &launched).unwrap();
        assert_eq!(left_out[DOES_NOT_FIT], 1);
    }

    #[test]
    fn a_reason_that_does_not_hold_is_no_excuse() {
        let all = ["fill_f32", "p2p_ar1_bf16_w2", "p2p_pair"];
        assert_eq!(judge(2, false, &all), Ok(4));
        let with_lines = [&all[..], &["p2p_rs_lines_f32_w2"]].concat();
        assert!(judge(2, false, &with_lines).unwrap_err().contains("reason to leave them out: p2p_rs_lines"));
        let with_cube = [&with_lines[..], &["p2p_cube_ag"]].concat();
        assert!(judge(2, true, &with_cube).unwrap_err().contains("p2p_cube_ag"));
    }

    #[test]
    fn the_number_of_ranks_is_what_a_name_ends_in() {
        assert_eq!(["p2p_ag_steps_w8", "silu_mul_bf16", "p2p_x_wide"].map(of_world), [Some(8), None, None]);
    }
}
