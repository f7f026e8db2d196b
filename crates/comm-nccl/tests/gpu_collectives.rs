//! Every operation between ranks that are threads, each with a device of its own.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::time::Duration;

use comm_core::{
    Block2d, CommError, DType, DeviceAddr, DeviceMemory, F8E4M3, OpKind, OpQuery, P2pOp, ReduceOp,
    RmsNormArgs, TwoGroupNormArgs,
};
use common::{Branch, Gate, PATIENT, Rank, few, world, world_size};

/// A value that names its rank and place.
fn mark(rank: usize, index: usize) -> f32 {
    (rank * 1000 + index) as f32
}

fn marks(rank: usize, count: usize) -> Vec<f32> {
    (0..count).map(|index| mark(rank, index)).collect()
}

#[test]
fn reductions_are_right_for_every_type_and_op() {
    let Some(size) = world_size() else { return };
    world(size, PATIENT, false, |rank| {
        macro_rules! check {
            ($ty:ty, $dtype:ident, $from:expr) => {
                for (op, expected) in
                    [(ReduceOp::Sum, (1..=size).sum::<usize>()), (ReduceOp::Min, 1), (ReduceOp::Max, size)]
                {
                    let send = rank.buffer(&[$from(rank.rank + 1); 37]);
                    let recv = rank.buffer(&[$from(0); 37]);
                    // SAFETY: both buffers hold 37 elements and live until they are read, which waits.
                    unsafe {
                        rank.comm
                            .all_reduce(send.addr, recv.addr, 37, DType::$dtype, op, rank.stream())
                            .unwrap()
                    };
                    assert_eq!(recv.read(), [$from(expected); 37], "{} {op}", DType::$dtype);
                    assert_eq!(send.read(), [$from(rank.rank + 1); 37], "the input was changed");
                }
            };
        }
        check!(f64, F64, |v: usize| v as f64);
        check!(f32, F32, |v: usize| v as f32);
        check!(i8, I8, |v: usize| v as i8);
        check!(u8, U8, |v: usize| v as u8);
        check!(i32, I32, |v: usize| v as i32);
        check!(u32, U32, |v: usize| v as u32);
        check!(i64, I64, |v: usize| v as i64);
        check!(u64, U64, |v: usize| v as u64);
        let fp8 = OpQuery::new(OpKind::AllReduce, DType::F8E4M3, 37).with_reduce(ReduceOp::Max);
        if rank.comm.supports(&fp8).is_supported() {
            let at = rank.buffer(&[F8E4M3::from_f32((rank.rank + 1) as f32); 37]);
            // SAFETY: the buffer holds 37 elements and lives until it is read, which waits.
            unsafe {
                rank.comm
                    .all_reduce(at.addr, at.addr, 37, DType::F8E4M3, ReduceOp::Max, rank.stream())
                    .unwrap()
            };
            assert_eq!(at.read(), [F8E4M3::from_f32(size as f32); 37]);
        }
        rank.comm.close().unwrap();
    });
}

#[test]
fn every_rank_s_data_comes_where_it_belongs() {
    let Some(size) = world_size() else { return };
    world(size, PATIENT, false, |rank| {
        let (comm, me, stream) = (&rank.comm, rank.rank, rank.stream());
        let (f32s, sum) = (DType::F32, ReduceOp::Sum);
        let own = rank.buffer(&marks(me, 5));
        let all = rank.buffer(&vec![-1.0_f32; size * 5]);
        let expected: Vec<f32> = (0..size).flat_map(|r| marks(r, 5)).collect();
        // SAFETY: here and below, buffers hold what the calls name and live until they are read, which waits.
        unsafe { comm.all_gather(own.addr, all.addr, 5, f32s, stream).unwrap() };
        assert_eq!(all.read(), expected);

        let one = rank.buffer(&[-1.0_f32; 5]);
        // SAFETY: see above.
        unsafe { comm.reduce_scatter(all.addr, one.addr, 5, f32s, sum, stream).unwrap() };
        let scaled: Vec<f32> = marks(me, 5).iter().map(|v| v * size as f32).collect();
        assert_eq!(one.read(), scaled);

        let root = size - 1;
        // SAFETY: see above.
        unsafe { comm.broadcast(own.addr, one.addr, 5, f32s, root, stream).unwrap() };
        assert_eq!(one.read(), marks(root, 5));

        let ones = rank.buffer(&[1.0_f32; 5]);
        let untouched = rank.buffer(&[-1.0_f32; 5]);
        // SAFETY: see above.
        unsafe { comm.reduce(ones.addr, untouched.addr, 5, f32s, sum, root, stream).unwrap() };
        let want = if me == root { size as f32 } else { -1.0 };
        assert_eq!(untouched.read(), [want; 5]);

        let outgoing = rank.buffer(&(0..size).map(|to| mark(me, to)).collect::<Vec<f32>>());
        let incoming = rank.buffer(&vec![-1.0_f32; size]);
        // SAFETY: see above.
        unsafe { comm.all_to_all(outgoing.addr, incoming.addr, 1, f32s, stream).unwrap() };
        assert_eq!(incoming.read(), (0..size).map(|from| mark(from, me)).collect::<Vec<f32>>());

        let (next, previous) = ((me + 1) % size, (me + size - 1) % size);
        let ring = rank.buffer(&[-1.0_f32; 5]);
        let ops = [
            P2pOp::Send { addr: own.addr, count: 5, dtype: f32s, peer: next },
            P2pOp::Recv { addr: ring.addr, count: 5, dtype: f32s, peer: previous },
        ];
        // SAFETY: see above.
        unsafe { comm.group(&ops, stream).unwrap() };
        assert_eq!(ring.read(), marks(previous, 5));
        // SAFETY: see above.
        unsafe {
            if me == 0 {
                comm.send(own.addr, 5, f32s, 1, stream).unwrap();
            } else if me == 1 {
                comm.recv(ring.addr, 5, f32s, 0, stream).unwrap();
                assert_eq!(ring.read(), marks(0, 5));
            }
            comm.barrier(stream).unwrap();
        }
        rank.memory.synchronize().unwrap();
        let used: Vec<_> = comm.usage().into_iter().map(|usage| usage.op).collect();
        assert!(used.contains(&OpKind::AllToAll) && used.contains(&OpKind::Barrier), "{used:?}");
        rank.comm.close().unwrap();
    });
}

#[test]
fn uneven_parts_small_and_large_in_and_out_of_place() {
    let Some(size) = world_size() else { return };
    world(size, PATIENT, false, |rank| {
        for unit in [3, 300_000] {
            // The middle rank has nothing.
            let counts: Vec<usize> =
                (0..size).map(|r| if r == size / 2 { 0 } else { (r + 1) * unit }).collect();
            let begin: usize = counts[..rank.rank].iter().sum();
            let expected: Vec<f32> = (0..size).flat_map(|r| vec![r as f32 + 0.5; counts[r]]).collect();
            let own = rank.buffer(&vec![rank.rank as f32 + 0.5; counts[rank.rank]]);
            let out = rank.buffer(&vec![-1.0_f32; expected.len()]);
            let mut seed = vec![-1.0_f32; expected.len()];
            seed[begin..begin + counts[rank.rank]].fill(rank.rank as f32 + 0.5);
            let within = rank.buffer(&seed);
            // SAFETY: the buffers hold what the calls name and live until they are read, which waits.
            unsafe {
                rank.comm.all_gather_v(own.addr, out.addr, &counts, DType::F32, rank.stream()).unwrap();
                rank.comm
                    .all_gather_v(within.at(begin), within.addr, &counts, DType::F32, rank.stream())
                    .unwrap();
            }
            assert!(out.read() == expected && within.read() == expected, "{unit}");
            let part = rank.buffer(&vec![-1.0_f32; counts[rank.rank]]);
            // SAFETY: as above.
            unsafe {
                rank.comm
                    .reduce_scatter_v(out.addr, part.addr, &counts, DType::F32, ReduceOp::Sum, rank.stream())
                    .unwrap();
            }
            let sum = (rank.rank as f32 + 0.5) * size as f32;
            assert!(part.read() == vec![sum; counts[rank.rank]], "{unit}");
        }
        rank.comm.close().unwrap();
    });
}

fn gathers(rank: &Rank, block: &Block2d) {
    let size = rank.size;
    let value = |r: usize, row: usize, col: usize| (r * 100_000 + row * 100 + col) as f32;
    let mut source = vec![-7.0_f32; block.height * block.send_pitch];
    for (row, line) in source.chunks_mut(block.send_pitch).enumerate() {
        for (col, cell) in line[..block.width].iter_mut().enumerate() {
            *cell = value(rank.rank, row, col);
        }
    }
    let extent = (size - 1) * block.rank_stride + (block.height - 1) * block.row_pitch + block.width;
    let mut expected = vec![-1.0_f32; extent];
    for r in 0..size {
        for row in 0..block.height {
            for col in 0..block.width {
                expected[r * block.rank_stride + row * block.row_pitch + col] = value(r, row, col);
            }
        }
    }
    let (send, recv) = (rank.buffer(&source), rank.buffer(&vec![-1.0_f32; extent]));
    // SAFETY: the buffers hold what the block names and live until they are read, which waits.
    unsafe { rank.comm.all_gather_2d(send.addr, recv.addr, block, rank.stream()).unwrap() };
    assert_eq!(recv.read(), expected, "{block:?}");
}

#[test]
fn blocks_are_gathered_in_every_layout() {
    let Some(size) = world_size() else { return };
    world(size, PATIENT, false, |rank| {
        for (height, width, send_pitch) in
            [(1, 7, 7), (3, 5, 5), (40, 6, 9), (3, 2000, 2000), (20, 2000, 2001)]
        {
            let block = |row_pitch, rank_stride| Block2d {
                height,
                width,
                row_pitch,
                rank_stride,
                send_pitch,
                dtype: DType::F32,
                first: true,
                last: true,
            };
            gathers(&rank, &block(width, height * width));
            gathers(&rank, &block(size * width, width));
            gathers(&rank, &block(size * (width + 1) + 3, width + 1));
            gathers(&rank, &block(width + 2, height * (width + 2)));
        }
        rank.comm.close().unwrap();
    });
}

/// Two gathers by way of the staging buffer on two streams, of which the first is held up: the second one's rows must not get
/// into the buffer before the first one's are out of it.
#[test]
fn staged_gathers_on_two_streams_take_turns() {
    let Some(size) = world_size().map(few) else { return };
    world(size, PATIENT, false, |rank| {
        // Neither contiguous nor side by side, so it is staged.
        let (height, width, row_pitch) = (4, 8, 10);
        let block = Block2d {
            height,
            width,
            row_pitch,
            rank_stride: height * row_pitch,
            send_pitch: width,
            dtype: DType::F32,
            first: true,
            last: true,
        };
        // Once outside, so that connections exist.
        gathers(&rank, &block);
        let (branch, gate) = (Branch::new(&rank), Gate::new());
        let rows = |call: usize, r: usize| vec![(call * 100 + r) as f32; height * width];
        let sends = [1, 2].map(|call| rank.buffer(&rows(call, rank.rank)));
        let recvs = [1, 2].map(|_| rank.buffer(&vec![-1.0_f32; size * height * row_pitch]));
        let gather = |call: usize, stream| {
            // SAFETY: the buffers hold what the block names and live until both streams have been waited for.
            unsafe { rank.comm.all_gather_2d(sends[call].addr, recvs[call].addr, &block, stream).unwrap() };
        };
        gate.close();
        gate.put(branch.stream());
        gather(0, branch.stream());
        gather(1, rank.stream());
        // Time enough for the second one's rows, if nothing keeps them.
        std::thread::sleep(Duration::from_millis(50));
        gate.open();
        branch.order(branch.stream(), rank.stream());
        for (call, recv) in recvs.iter().enumerate() {
            let got = recv.read();
            for (r, part) in got.chunks(height * row_pitch).enumerate() {
                let expected = (100 * (call + 1) + r) as f32;
                assert!(part.chunks(row_pitch).all(|row| row[..width] == [expected; 8]), "{call} {got:?}");
            }
        }
        // In one capture the calls are ordered as well: the branch is forked off and joined again.
        let mut graph = rank
            .memory
            .capture(|| {
                branch.order(rank.stream(), branch.stream());
                gather(0, branch.stream());
                gather(1, rank.stream());
                branch.order(branch.stream(), rank.stream());
                Ok(())
            })
            .unwrap();
        for _ in 0..20 {
            // SAFETY: the graph's operands are alive.
            unsafe { graph.launch(rank.stream()).unwrap() };
            for (call, recv) in recvs.iter().enumerate() {
                let expected = (100 * (call + 1)) as f32;
                assert_eq!(recv.read()[..width], [expected; 8]);
            }
        }
        drop(graph);
        rank.comm.close().unwrap();
    });
}

/// Residual + RMSNorm of one row that every rank contributes the same to.
fn normalised(sum: f32, residual: f32, bias: f32) -> (f32, f32) {
    let r = sum + residual + bias;
    (r, r / (r * r + 1e-6_f32).sqrt() * 2.0)
}

#[test]
fn the_fused_norms_agree_with_arithmetic() {
    let Some(size) = world_size() else { return };
    world(size, PATIENT, false, |rank| {
        let query = OpQuery::new(OpKind::AllReduceRmsNorm, DType::F32, 1);
        if let comm_core::Support::No { reason } = rank.comm.supports(&query) {
            println!("SKIP: {reason}");
            return;
        }
        let (tokens, hidden) = (3, 64);
        let n = tokens * hidden;
        let sum = (1..=size).sum::<usize>() as f32;
        let (input, residual, output) = (
            rank.buffer(&vec![(rank.rank + 1) as f32; n]),
            rank.buffer(&vec![0.5_f32; n]),
            rank.buffer(&vec![-1.0_f32; n]),
        );
        let (bias, weight) = (rank.buffer(&vec![0.25_f32; hidden]), rank.buffer(&vec![1.0_f32; hidden]));
        let args = RmsNormArgs {
            input: input.addr,
            residual: residual.addr,
            residual_out: residual.addr,
            bias: Some(bias.addr),
            weight: weight.addr,
            output: output.addr,
            tokens,
            hidden,
            dtype: DType::F32,
            eps: 1e-6,
            weight_offset: 1.0,
        };
        // SAFETY: the buffers hold what the arguments name and live until they are read, which waits.
        unsafe { rank.comm.all_reduce_rmsnorm(&args, rank.stream()).unwrap() };
        let (r, y) = normalised(sum, 0.5, 0.25);
        assert_eq!(residual.read(), vec![r; n]);
        assert!(output.read().iter().all(|v| (v - y).abs() < 1e-5));
        assert_eq!(input.read(), vec![(rank.rank + 1) as f32; n], "the input was changed");

        // Both groups are the whole world; the last rank owns no rows.
        let gather = rank.comm.split(Some(0), i32::try_from(rank.rank).unwrap()).unwrap().unwrap();
        let own: Vec<usize> = (0..size).map(|r| if r + 1 == size { 0 } else { r + 1 }).collect();
        let rows: usize = own.iter().sum();
        let states = rank.buffer(&vec![(rank.rank + 1) as f32; rows * hidden]);
        let mine = rank.buffer(&vec![0.5_f32; own[rank.rank].max(1) * hidden]);
        let two = TwoGroupNormArgs {
            hidden_states: states.addr,
            residual: mine.addr,
            bias: Some(bias.addr),
            weight: weight.addr,
            reduce_first_row: 0,
            reduce_tokens: &own,
            gather_first_row: 0,
            gather_tokens: &own,
            hidden,
            dtype: DType::F32,
            eps: 1e-6,
            weight_offset: 1.0,
        };
        // SAFETY: as above.
        unsafe { rank.comm.all_reduce_rmsnorm_two_group(&*gather, &two, rank.stream()).unwrap() };
        assert!(states.read().iter().all(|v| (v - y).abs() < 1e-5));
        assert_eq!(mine.read()[..own[rank.rank] * hidden], vec![r; own[rank.rank] * hidden]);
        gather.close().unwrap();
        rank.comm.close().unwrap();
    });
}

#[test]
fn wrong_arguments_are_refused_and_harm_nothing() {
    let Some(size) = world_size() else { return };
    world(size, PATIENT, false, |rank| {
        let (comm, stream, null) = (&rank.comm, rank.stream(), DeviceAddr::NULL);
        let at = rank.buffer(&[0.0_f32; 64]);
        // SAFETY: every call is refused before it touches memory, or has nothing to touch.
        unsafe {
            let refused = [
                comm.all_reduce(null, at.addr, 4, DType::F32, ReduceOp::Sum, stream),
                comm.all_reduce(at.addr.offset(1), at.addr, 4, DType::F32, ReduceOp::Sum, stream),
                comm.all_reduce(at.addr, at.at(1), 4, DType::F32, ReduceOp::Sum, stream),
                comm.all_reduce(at.addr, at.addr, usize::MAX, DType::F32, ReduceOp::Sum, stream),
                comm.broadcast(at.addr, at.addr, 4, DType::F32, size, stream),
                comm.all_gather_v(at.addr, at.at(32), &[1], DType::F32, stream),
                comm.send(at.addr, 1, DType::F32, rank.rank, stream),
            ];
            for outcome in refused {
                assert!(matches!(outcome, Err(CommError::InvalidArgument { .. })), "{outcome:?}");
            }
            comm.all_reduce(null, null, 0, DType::F32, ReduceOp::Sum, stream).unwrap();
            comm.all_gather_v(null, null, &vec![0; size], DType::F32, stream).unwrap();
            comm.group(&[], stream).unwrap();
        }
        rank.try_sum().unwrap();
        rank.comm.close().unwrap();
        assert!(matches!(rank.comm.poll(), Err(CommError::Closed { .. })));
        assert!(matches!(rank.comm.close(), Err(CommError::Closed { .. })));
    });
}
