//! Many iterations of all-reduce at the token counts of a served model, in the whole world and in halves of it.

use comm_core::{DType, DeviceComm};

use crate::common::{PATIENT, Rank, shared, world, world_size};
use crate::data::{Judge, SUM, at, sums, timed};
use crate::setting::Setting;

const HIDDEN: usize = 2048;
const DTYPE: DType = DType::F16;
pub(crate) const TOKENS: [usize; 26] = [
    1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096,
    8192, 16_384,
];
const CALLS_OF_A_GRAPH: usize = 100;
const REPLAYS: usize = 100;
/// Where ranks share devices, and every call takes much longer, and where the number is not the point.
const FEW_REPLAYS: usize = 3;
/// Results of different calls of a graph that are looked at after it, as far as this many bytes hold them.
const LOOKED_AT: usize = 32 << 20;
const MOST: usize = 2 * TOKENS[TOKENS.len() - 1] * HIDDEN;

/// 100 calls a replay for every token count. A graph's calls take turns over the places of one buffer, whose content is
/// new at every replay; so no result of an earlier replay can pass.
fn iterate(rank: &Rank, comm: &dyn DeviceComm, seed: usize, replays: usize) {
    let judge = Judge::new(rank);
    let send = rank.space(MOST * DTYPE.size());
    let recv = comm.allocate(MOST * DTYPE.size()).unwrap();
    for (turn, tokens) in TOKENS.into_iter().enumerate() {
        let count = tokens * HIDDEN;
        let places = (LOOKED_AT / (count * DTYPE.size())).clamp(2, CALLS_OF_A_GRAPH);
        let mut graph = rank.capture(|| {
            (0..CALLS_OF_A_GRAPH).try_for_each(|call| {
                let first = call % places * count;
                rank.reduce(comm, (at(send, first, DTYPE), at(recv, first, DTYPE)), count, DTYPE)
            })
        });
        for replay in 0..replays {
            let data = sums(seed + turn * REPLAYS + replay, comm.size());
            judge.fill(rank, (send, places * count, DTYPE), &data, comm.rank(), 0).unwrap();
            unsafe { graph.launch(rank.stream()).unwrap() };
            judge.expect(rank, (recv, places * count, DTYPE), &data, SUM, 0, replay << 40).unwrap();
        }
        judge.all_right(rank, &format!("{tokens} tokens"));
    }
}

fn replays() -> usize {
    if shared() { FEW_REPLAYS } else { REPLAYS }
}

#[test]
fn ten_thousand_iterations_at_every_token_count() {
    let Some(size) = world_size() else { return };
    timed("iterations of the whole world", || {
        world(size, PATIENT, &[], |rank| {
            iterate(&rank, &*rank.comm, 0, replays());
            rank.comm.close().unwrap();
        });
    });
}

/// The same calls, fewer of them.
pub(crate) fn every_token_count(setting: &Setting) {
    timed("token counts of a served model", || {
        for &size in &setting.sizes {
            world(size, PATIENT, &setting.options(&[]), |rank| {
                iterate(&rank, &*rank.comm, 0, FEW_REPLAYS);
                rank.comm.close().unwrap();
            });
        }
    });
}

#[test]
fn ten_thousand_iterations_in_two_halves_at_once() {
    let Some(size) = world_size() else { return };
    if size < 4 {
        println!("SKIP: two groups of at least two need 4 GPUs");
        return;
    }
    let half = size / 2;
    timed("iterations of two halves", || {
        // One group may be done long before the other, and waits for it in the end.
        world(size, 3 * PATIENT, &[], |rank| {
            let color = u32::from(rank.rank >= half);
            let group = rank.comm.split(Some(color), rank.rank as i32).unwrap().unwrap();
            iterate(&rank, &*group, (1 + color as usize) << 20, replays());
            if shared() {
                // A close waits for the whole device, which may not be while another rank captures there.
                rank.host.barrier(comm_core::Deadline::after(3 * PATIENT)).unwrap();
            }
            group.close().unwrap();
            rank.comm.close().unwrap();
        });
    });
}
