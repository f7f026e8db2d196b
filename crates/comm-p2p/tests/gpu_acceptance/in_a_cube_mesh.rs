//! Cases in an imposed hybrid cube mesh of eight ranks. The addresses of what is no neighbour are null there, so a kernel
//! that touched one would end the device.

use comm_core::{DType, OpKind};

use crate::common::{PATIENT, world};
use crate::data::{Judge, SUM, sums as data, timed};
use crate::setting::Setting;
use crate::{alternating, graphs, groups, sums};

fn run(body: impl FnOnce(&Setting)) {
    if let Some(setting) = Setting::in_a_cube_mesh() {
        body(&setting);
    }
}

/// What the other tests here are worth: in their setting sums and gathers go by the mesh's own kernels, and all else
/// through staging memory, whatever the results are registered for.
#[test]
fn calls_keep_to_neighbours() {
    run(|setting| {
        timed("algorithms of a cube mesh", || {
            world(8, PATIENT, &setting.options(&[]), |rank| {
                let judge = Judge::new(&rank);
                let (dtype, most, stream) = (DType::F32, 8 * 300_000, rank.stream());
                let (send, recv) = (rank.space(most * 4), rank.comm.allocate(most * 4).unwrap());
                let pattern = data(1, 8);
                judge.fill(&rank, (send, most, dtype), &pattern, rank.rank, 0).unwrap();
                // In one hop and in slices.
                for count in [1000, 300_000] {
                    rank.reduce(&*rank.comm, (send, recv), count, dtype).unwrap();
                    judge.expect(&rank, (recv, count, dtype), &pattern, SUM, 0, 0).unwrap();
                    unsafe { rank.comm.all_gather(send, recv, count, dtype, stream).unwrap() };
                    unsafe { rank.comm.broadcast(send, recv, count, dtype, 5, stream).unwrap() };
                }
                judge.all_right(&rank, "cube mesh");
                let mut used: Vec<_> = (rank.comm.usage().into_iter())
                    .map(|used| (used.op, used.algorithm.into_owned(), used.calls))
                    .collect();
                used.sort_by_key(|(op, ..)| op.name());
                let by = |op, algorithm: &str| (op, algorithm.to_owned(), 2);
                let expected = [
                    by(OpKind::AllGather, "cube_mesh"),
                    by(OpKind::AllReduce, "cube_mesh"),
                    by(OpKind::Broadcast, "staged"),
                ];
                assert_eq!(used, expected);
                rank.comm.close().unwrap();
            });
        });
    });
}

#[test]
fn sums_are_exact() {
    run(|setting| {
        sums::integers(setting);
        sums::guard_regions(setting);
    });
}

#[test]
fn sums_are_in_rank_order_and_keep_signs() {
    run(|setting| {
        sums::larger_than_the_scratch(setting);
        sums::signed_zeros(setting);
    });
}

#[test]
fn graphs_are_replayed() {
    run(|setting| {
        graphs::two_calls(setting);
        graphs::overwritten_inputs(setting);
        graphs::six_calls(setting);
    });
}

#[test]
fn graphs_of_odd_and_even_numbers_of_calls() {
    run(graphs::odd_and_even);
}

#[test]
fn sizes_and_grids_alternate() {
    run(|setting| {
        alternating::sizes(setting);
        alternating::grids(setting);
        alternating::chains(setting);
    });
}

#[test]
fn groups_may_make_different_numbers_of_calls() {
    run(groups::different_numbers_of_calls);
}
