//! Groups of one world that make different numbers of calls, eagerly and in graphs, with calls of the world between.

use comm_core::DType;

use crate::common::{PATIENT, world};
use crate::data::{Judge, SUM, at, sums, timed};
use crate::setting::Setting;

const COUNT: usize = 6000;

#[test]
fn groups_may_make_different_numbers_of_calls() {
    different_numbers_of_calls(&Setting::of_every_size());
}

pub(crate) fn different_numbers_of_calls(setting: &Setting) {
    timed("groups", || {
        for &size in &setting.sizes {
            world(size, PATIENT, &setting.options(&[]), |rank| {
                let dtype = DType::BF16;
                let judge = Judge::new(&rank);
                let color = rank.rank % 2;
                let group = rank.comm.split(Some(color as u32), rank.rank as i32).unwrap().unwrap();
                // An odd and an even number, so that the groups' rounds and the world's do not keep step.
                let calls = if color == 0 { 3 } else { 8 };
                let (send, recv) = (rank.space(8 * COUNT * 2), rank.space(8 * COUNT * 2));
                let (world_send, world_recv) = (rank.space(COUNT * 2), rank.space(COUNT * 2));
                let in_groups = |calls: usize| {
                    (0..calls).try_for_each(|call| {
                        let pair = (at(send, call * COUNT, dtype), at(recv, call * COUNT, dtype));
                        rank.reduce(&*group, pair, COUNT, dtype)
                    })
                };
                let in_world = || rank.reduce(&*rank.comm, (world_send, world_recv), COUNT, dtype);
                let mut groups_only = rank.capture(|| in_groups(calls));
                let mut both = rank.capture(|| {
                    in_groups(calls)?;
                    in_world()
                });
                for turn in 0..12_usize {
                    let seed = 100 + turn * 10;
                    let (data, world_data) = (sums(seed + color, group.size()), sums(seed + 5, size));
                    let lane = (send, calls * COUNT, dtype);
                    judge.fill(&rank, lane, &data, group.rank(), 0).unwrap();
                    judge.fill(&rank, (world_send, COUNT, dtype), &world_data, rank.rank, 0).unwrap();
                    let stream = rank.stream();
                    let with_world = match turn % 3 {
                        0 => {
                            unsafe { groups_only.launch(stream).unwrap() };
                            false
                        }
                        1 => {
                            unsafe { both.launch(stream).unwrap() };
                            true
                        }
                        _ => {
                            in_groups(calls).unwrap();
                            in_world().unwrap();
                            true
                        }
                    };
                    judge.expect(&rank, (recv, calls * COUNT, dtype), &data, SUM, 0, 0).unwrap();
                    if with_world {
                        let lane = (world_recv, COUNT, dtype);
                        judge.expect(&rank, lane, &world_data, SUM, 0, 1 << 32).unwrap();
                    }
                }
                judge.all_right(&rank, "groups");
                drop((groups_only, both));
                group.close().unwrap();
                rank.comm.close().unwrap();
            });
        }
    });
}
