//! Calls of changing size, one behind the other without a wait between, each with data of its own.

use comm_core::{DType, ReduceOp};
use comm_kernels::pattern::Expected;

use crate::common::{PATIENT, world};
use crate::data::{Judge, SUM, at, encode, integer, sums, timed};
use crate::setting::Setting;

#[test]
fn sizes_alternate_without_a_wait() {
    sizes(&Setting::usual());
}

pub(crate) fn sizes(setting: &Setting) {
    const HIDDEN: usize = 4096;
    const ROWS: [usize; 5] = [1, 16, 1, 96, 1];
    const CALLS: usize = 40 * ROWS.len();
    const PAYLOADS: usize = 4;
    timed("alternating sizes", || {
        for &size in &setting.sizes {
            world(size, PATIENT, &setting.options(&[]), |rank| {
                let judge = Judge::new(&rank);
                let most = 96 * HIDDEN;
                for (pass, dtype) in [DType::BF16, DType::F32, DType::F16].into_iter().enumerate() {
                    let sends: Vec<_> = (0..PAYLOADS).map(|_| rank.space(most * dtype.size())).collect();
                    let data = |payload: usize| sums(100 + pass * PAYLOADS + payload, size);
                    for (payload, &send) in sends.iter().enumerate() {
                        judge.fill(&rank, (send, most, dtype), &data(payload), rank.rank, 0).unwrap();
                    }
                    // Every call has a place of its own, so that nothing has to be looked at before the end.
                    let rows: usize = 40 * ROWS.iter().sum::<usize>();
                    let results = rank.space(rows * HIDDEN * dtype.size());
                    judge.poison(&rank, results, rows * HIDDEN * dtype.size()).unwrap();
                    let calls = (0..CALLS).scan(0, |row, call| {
                        let rows = ROWS[call % ROWS.len()];
                        *row += rows;
                        Some((
                            call,
                            call % PAYLOADS,
                            rows * HIDDEN,
                            at(results, (*row - rows) * HIDDEN, dtype),
                        ))
                    });
                    for (_, payload, count, recv) in calls.clone() {
                        rank.reduce(&*rank.comm, (sends[payload], recv), count, dtype).unwrap();
                    }
                    for (call, payload, count, recv) in calls {
                        judge
                            .expect(&rank, (recv, count, dtype), &data(payload), SUM, 0, call << 32)
                            .unwrap();
                    }
                    judge.all_right(&rank, &format!("{dtype}"));
                }
                rank.comm.close().unwrap();
            });
        }
    });
}

#[test]
fn grids_change_between_calls_of_several_operations() {
    grids(&Setting::usual());
}

pub(crate) fn grids(setting: &Setting) {
    const COUNTS: [usize; 8] = [3, 400_000, 64, 1_000_000, 20_000, 1, 130_000, 5000];
    timed("changing grids", || {
        for &size in &setting.sizes {
            world(size, PATIENT, &setting.options(&[]), |rank| {
                let dtype = DType::F16;
                let judge = Judge::new(&rank);
                let total: usize = 3 * COUNTS.iter().sum::<usize>();
                let most = 1_000_000;
                let send = rank.space(most * size * 2);
                let room = total * (size + 2) * 2;
                let results = rank.space(room);
                let data = sums(77, size);
                judge.fill(&rank, (send, most * size, dtype), &data, rank.rank, 0).unwrap();
                judge.poison(&rank, results, room).unwrap();
                let (mut place, mut turn) = (0, 0);
                // (where, elements, what, from which element on)
                let mut wanted: Vec<(usize, usize, Expected, usize)> = Vec::new();
                for _ in 0..3 {
                    for count in COUNTS {
                        let (recv, stream) = (at(results, place, dtype), rank.stream());
                        match turn % 4 {
                            0 | 2 => {
                                rank.reduce(&*rank.comm, (send, recv), count, dtype).unwrap();
                                wanted.push((place, count, SUM, 0));
                                place += count;
                            }
                            1 => {
                                unsafe { rank.comm.all_gather(send, recv, count, dtype, stream).unwrap() };
                                let part = |from| (place + from * count, count, Expected::Sent(from), 0);
                                wanted.extend((0..size).map(part));
                                place += count * size;
                            }
                            _ => {
                                let op = ReduceOp::Sum;
                                unsafe {
                                    rank.comm.reduce_scatter(send, recv, count, dtype, op, stream).unwrap();
                                }
                                wanted.push((place, count, SUM, rank.rank * count));
                                place += count;
                            }
                        }
                        turn += 1;
                    }
                    // Operations meet other sizes in the next pass.
                    turn += 1;
                }
                assert!(place * 2 <= room);
                for (call, (place, count, expected, first)) in wanted.into_iter().enumerate() {
                    let lane = (at(results, place, dtype), count, dtype);
                    judge.expect(&rank, lane, &data, expected, first, call << 32).unwrap();
                }
                judge.all_right(&rank, "changing grids");
                rank.comm.close().unwrap();
            });
        }
    });
}

#[test]
fn calls_may_be_chained() {
    chains(&Setting::usual());
}

pub(crate) fn chains(setting: &Setting) {
    // 15 * 8^6 is below 2^24: every sum is exact.
    const LINKS: usize = 6;
    timed("chained calls", || {
        for &size in &setting.sizes {
            world(size, PATIENT, &setting.options(&[]), |rank| {
                let dtype = DType::F32;
                for (seed, count) in (50..).zip([1_usize, 1000, 100_000, 1_000_000]) {
                    let own = encode(dtype, (0..count).map(|i| integer(seed, rank.rank, i)));
                    let chained = |i| {
                        let sum: f32 = (0..size).map(|r| integer(seed, r, i)).sum();
                        sum * (size as f32).powi(LINKS as i32 - 1)
                    };
                    let result = encode(dtype, (0..count).map(chained));
                    let buffers = [rank.space(count * 4), rank.space(count * 4)];
                    for in_place in [false, true] {
                        rank.upload(buffers[0], &own);
                        for link in 0..LINKS {
                            let (from, to) = if in_place { (0, 0) } else { (link % 2, (link + 1) % 2) };
                            rank.reduce(&*rank.comm, (buffers[from], buffers[to]), count, dtype).unwrap();
                        }
                        let last = if in_place { 0 } else { LINKS % 2 };
                        assert!(rank.download(buffers[last], count * 4) == result, "{count}, {size} ranks");
                    }
                }
                rank.comm.close().unwrap();
            });
        }
    });
}
