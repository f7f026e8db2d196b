//! Captured calls: replayed with new inputs, with inputs overwritten at once, in odd and even numbers.

use comm_core::DType;
use comm_kernels::pattern::{Expected, Pattern};

use crate::common::{PATIENT, world};
use crate::data::{FLOATS, Judge, SUM, at, encode, integer, sums, timed};
use crate::setting::Setting;

/// From one packet a thread up to several rounds of every algorithm.
const COUNTS: [usize; 5] = [1, 512, 40_960, 524_288, 2_097_152];

#[test]
fn two_captured_calls_replayed_with_new_inputs() {
    two_calls(&Setting::usual());
}

pub(crate) fn two_calls(setting: &Setting) {
    let counts = if setting.brief { &COUNTS[..COUNTS.len() - 1] } else { &COUNTS };
    timed("two captured calls", || {
        for &size in &setting.sizes {
            world(size, PATIENT, &setting.options(&[]), |rank| {
                let most = counts[counts.len() - 1] * 4;
                let sends = [rank.space(most), rank.space(most)];
                // One result in memory of the communicator, one in the rank's own.
                let results = [rank.comm.allocate(most).unwrap(), rank.space(most)];
                let mut seed = 100;
                for &count in counts {
                    for dtype in FLOATS {
                        let mut graph = rank.capture(|| {
                            let pairs = sends.into_iter().zip(results);
                            pairs
                                .into_iter()
                                .try_for_each(|pair| rank.reduce(&*rank.comm, pair, count, dtype))
                        });
                        for replay in 0..3 {
                            seed += 2;
                            for (seed, send) in (seed..).zip(sends) {
                                let own = (0..count).map(|i| integer(seed, rank.rank, i));
                                rank.upload(send, &encode(dtype, own));
                            }
                            unsafe { graph.launch(rank.stream()).unwrap() };
                            for (seed, recv) in (seed..).zip(results) {
                                let sum = |i| (0..size).map(|r| integer(seed, r, i)).sum::<f32>();
                                let sums = encode(dtype, (0..count).map(sum));
                                let found = rank.download(recv, sums.len());
                                assert!(found == sums, "{count} {dtype}, {size} ranks, replay {replay}");
                            }
                        }
                    }
                }
                rank.comm.close().unwrap();
            });
        }
    });
}

#[test]
fn inputs_overwritten_right_after_the_call_were_summed_as_they_were() {
    overwritten_inputs(&Setting::usual());
}

pub(crate) fn overwritten_inputs(setting: &Setting) {
    // The last is large enough for stores into the other ranks' results.
    const COUNTS: [usize; 4] = [100, 40_000, 1_000_000, 7_000_000];
    let counts = if setting.brief { &COUNTS[..3] } else { &COUNTS };
    timed("overwritten inputs", || {
        for &size in &setting.sizes {
            world(size, PATIENT, &setting.options(&[]), |rank| {
                let dtype = DType::BF16;
                let judge = Judge::new(&rank);
                let bytes = counts[counts.len() - 1] * 2;
                let (send, recv) = (rank.space(bytes), rank.comm.allocate(bytes).unwrap());
                let mut seed = 0;
                for &count in counts {
                    let call_and_overwrite = || {
                        rank.reduce(&*rank.comm, (send, recv), count, dtype)?;
                        judge.poison(&rank, send, count * 2)
                    };
                    let mut graph = rank.capture(call_and_overwrite);
                    for turn in 0..8 {
                        seed += 1;
                        let data = sums(seed, size);
                        judge.fill(&rank, (send, count, dtype), &data, rank.rank, 0).unwrap();
                        if turn % 2 == 0 {
                            unsafe { graph.launch(rank.stream()).unwrap() };
                        } else {
                            call_and_overwrite().unwrap();
                        }
                        judge.expect(&rank, (recv, count, dtype), &data, SUM, 0, 0).unwrap();
                    }
                    judge.all_right(&rank, &format!("{count} elements"));
                }
                rank.comm.close().unwrap();
            });
        }
    });
}

/// As a server's batches come and go.
const TOKENS: [usize; 10] = [1, 6, 12, 8, 16, 3, 5, 2, 4, 1];

#[test]
fn a_graph_per_token_count_launched_without_a_wait_between() {
    graph_per_token_count(&Setting::usual());
}

pub(crate) fn graph_per_token_count(setting: &Setting) {
    const HIDDEN: usize = 4096;
    timed("token counts", || {
        for &size in &setting.sizes {
            world(size, PATIENT, &setting.options(&[]), |rank| {
                let dtype = DType::BF16;
                let judge = Judge::new(&rank);
                let most = 16 * HIDDEN;
                let (sends, results) =
                    (rank.space(TOKENS.len() * most * 2), rank.space(TOKENS.len() * most * 2));
                let place = |base, turn: usize| at(base, turn * most, dtype);
                let mut graphs: Vec<_> = (TOKENS.into_iter().enumerate())
                    .map(|(turn, tokens)| {
                        let pair = (place(sends, turn), place(results, turn));
                        let call = || rank.reduce(&*rank.comm, pair, tokens * HIDDEN, dtype);
                        rank.capture(call)
                    })
                    .collect();
                for replay in 0..10 {
                    let data = |turn: usize| sums(1000 + replay * 100 + turn, size);
                    for turn in 0..TOKENS.len() {
                        let lane = (place(sends, turn), most, dtype);
                        judge.fill(&rank, lane, &data(turn), rank.rank, 0).unwrap();
                    }
                    for (turn, graph) in graphs.iter_mut().enumerate() {
                        if replay % 2 == 0 {
                            unsafe { graph.launch(rank.stream()).unwrap() };
                        } else {
                            let pair = (place(sends, turn), place(results, turn));
                            rank.reduce(&*rank.comm, pair, TOKENS[turn] * HIDDEN, dtype).unwrap();
                        }
                    }
                    for (turn, tokens) in TOKENS.into_iter().enumerate() {
                        let lane = (place(results, turn), tokens * HIDDEN, dtype);
                        judge.expect(&rank, lane, &data(turn), SUM, 0, turn * most).unwrap();
                    }
                }
                judge.all_right(&rank, "token counts");
                drop(graphs);
                rank.comm.close().unwrap();
            });
        }
    });
}

#[test]
fn six_calls_a_graph_with_inputs_changed_in_place() {
    six_calls(&Setting::usual());
}

pub(crate) fn six_calls(setting: &Setting) {
    timed("six calls a graph", || {
        for &size in &setting.sizes {
            world(size, PATIENT, &setting.options(&[]), |rank| {
                let judge = Judge::new(&rank);
                let counts = [512_usize, 65_536, 65_536, 3, 262_144, 8192];
                let dtype = DType::F16;
                let most = 262_144 * 2;
                let sends: Vec<_> = counts.iter().map(|_| rank.space(most)).collect();
                let results: Vec<_> = counts.iter().map(|_| rank.space(most)).collect();
                let mut graph = rank.capture(|| {
                    (0..counts.len()).try_for_each(|call| {
                        let pair = (sends[call], results[call]);
                        rank.reduce(&*rank.comm, pair, counts[call], dtype)
                    })
                });
                for replay in 0..20 {
                    let data = |call: usize| sums(5000 + replay * 10 + call, size);
                    for (call, &send) in sends.iter().enumerate() {
                        judge.fill(&rank, (send, counts[call], dtype), &data(call), rank.rank, 0).unwrap();
                    }
                    unsafe { graph.launch(rank.stream()).unwrap() };
                    for (call, &recv) in results.iter().enumerate() {
                        let report = call << 32;
                        let lane = (recv, counts[call], dtype);
                        judge.expect(&rank, lane, &data(call), SUM, 0, report).unwrap();
                    }
                }
                judge.all_right(&rank, "six calls");
                drop(graph);
                rank.comm.close().unwrap();
            });
        }
    });
}

#[test]
fn graphs_of_odd_and_even_numbers_of_calls() {
    odd_and_even(&Setting::usual());
}

pub(crate) fn odd_and_even(setting: &Setting) {
    // One hop, two hops, stores straight into the results, and many rounds of lines.
    let connected = [
        (2048_usize, None),
        (2048, Some("lamport")),
        (40_000, Some("two_shot")),
        (40_000, Some("cells")),
        (40_000, Some("lines")),
    ];
    // In a cube mesh: one hop, slices, and copies through staging memory.
    let in_a_cube_mesh = [(2048, None), (40_000, None), (40_000, Some("staged"))];
    let cases = if setting.is_cube_mesh() { &in_a_cube_mesh[..] } else { &connected };
    let small = [("p2p.lamport_slots", "2048"), ("p2p.line_slots", "128"), ("p2p.cell_ctas", "2")];
    timed("odd and even graphs", || {
        for &size in &setting.sizes {
            for &(count, algorithm) in cases {
                let mut options = setting.options(&small);
                options.extend(algorithm.map(|name| ("p2p.algorithm", name)));
                world(size, PATIENT, &options, |rank| {
                    let dtype = DType::F32;
                    let judge = Judge::new(&rank);
                    let bytes = 4 * count * dtype.size();
                    let send = rank.space(bytes);
                    let recv = rank.comm.allocate(bytes * (size + 1)).unwrap();
                    let gathered = recv.offset(bytes as u64);
                    let lane = |base, call: usize| at(base, call * count, dtype);
                    let all = |call: usize| at(gathered, call * count * size, dtype);
                    let capture = |calls: usize| {
                        rank.capture(|| {
                            (0..calls).try_for_each(|call| {
                                let pair = (lane(send, call), lane(recv, call));
                                rank.reduce(&*rank.comm, pair, count, dtype)?;
                                let stream = rank.stream();
                                unsafe { rank.comm.all_gather(pair.0, all(call), count, dtype, stream) }
                            })
                        })
                    };
                    let mut graphs = [(3, capture(3)), (4, capture(4))];
                    for replay in 0..16_usize {
                        for (calls, graph) in &mut graphs {
                            let data: Pattern = sums(9000 + replay * 10 + *calls, size);
                            judge.fill(&rank, (send, 4 * count, dtype), &data, rank.rank, 0).unwrap();
                            unsafe { graph.launch(rank.stream()).unwrap() };
                            for call in 0..*calls {
                                let first = call * count;
                                let sum = (lane(recv, call), count, dtype);
                                judge.expect(&rank, sum, &data, SUM, first, call << 32).unwrap();
                                for from in 0..size {
                                    let part = (at(all(call), from * count, dtype), count, dtype);
                                    let sent = Expected::Sent(from);
                                    judge.expect(&rank, part, &data, sent, first, call << 32).unwrap();
                                }
                            }
                        }
                    }
                    judge.all_right(&rank, &format!("{count} elements, {algorithm:?}"));
                    drop(graphs);
                    rank.comm.close().unwrap();
                });
            }
        }
    });
}
