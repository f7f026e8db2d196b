//! Every operation of the host backend against a naive reference, exactly, between threads and through shared memory.

#![cfg(feature = "host-backend")]
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod host_backend_support;

use comm_core::{
    Block2d, DType, DeviceAddr, DeviceComm, Element, F8E4M3, F8E5M2, P2pOp, ReduceOp, RmsNormArgs,
    StreamHandle, TwoGroupNormArgs,
};
use half::{bf16, f16};
use host_backend_support::{TRANSPORTS, on_ranks, random};

const S: StreamHandle = StreamHandle::NULL;
const COUNTS: [usize; 6] = [0, 1, 3, 1021, 40_001, 400_003];

/// An element type with the arithmetic that the reductions are defined by, written down once more.
trait Reference: Element {
    fn sample(bits: u64) -> Self;
    fn fold(values: &[Self], op: ReduceOp) -> Self;
    fn bits(self) -> u64;
}

macro_rules! floats {
    ($($ty:ty, $acc:ty, $wide:expr, $narrow:expr, $bits:expr;)*) => {$(
        impl Reference for $ty {
            fn sample(bits: u64) -> Self {
                ($narrow)(((bits % 4001) as $acc - 2000.0) / 512.0)
            }
            fn fold(values: &[Self], op: ReduceOp) -> Self {
                let mut acc: $acc = ($wide)(values[0]);
                for &value in &values[1..] {
                    let x: $acc = ($wide)(value);
                    acc = match op {
                        ReduceOp::Sum | ReduceOp::Avg => acc + x,
                        ReduceOp::Prod => acc * x,
                        ReduceOp::Min => if x < acc { x } else { acc },
                        ReduceOp::Max => if x > acc { x } else { acc },
                    };
                }
                if op == ReduceOp::Avg { acc /= values.len() as $acc; }
                ($narrow)(acc)
            }
            fn bits(self) -> u64 { u64::from(($bits)(self)) }
        }
    )*};
}
floats! {
    f64, f64, |x: f64| x, |x: f64| x, f64::to_bits;
    f32, f32, |x: f32| x, |x: f32| x, f32::to_bits;
    f16, f32, f16::to_f32, f16::from_f32, f16::to_bits;
    bf16, f32, bf16::to_f32, bf16::from_f32, bf16::to_bits;
    F8E4M3, f32, |x: F8E4M3| x.to_f32(), F8E4M3::from_f32, |x: F8E4M3| x.to_bits();
    F8E5M2, f32, |x: F8E5M2| x.to_f32(), F8E5M2::from_f32, |x: F8E5M2| x.to_bits();
}

macro_rules! integers {
    ($($ty:ty),*) => {$(
        impl Reference for $ty {
            fn sample(bits: u64) -> Self { bits as $ty }
            fn fold(values: &[Self], op: ReduceOp) -> Self {
                let mut acc = values[0];
                for &x in &values[1..] {
                    acc = match op {
                        ReduceOp::Sum | ReduceOp::Avg => acc.wrapping_add(x),
                        ReduceOp::Prod => acc.wrapping_mul(x),
                        ReduceOp::Min => acc.min(x),
                        ReduceOp::Max => acc.max(x),
                    };
                }
                if op == ReduceOp::Avg { (acc as i128 / values.len() as i128) as $ty } else { acc }
            }
            fn bits(self) -> u64 { self as u64 }
        }
    )*};
}
integers!(i8, u8, i32, u32, i64, u64);

fn data<T: Reference>(rank: usize, seed: u64, count: usize) -> Vec<T> {
    (0..count).map(|i| T::sample(random(seed, rank, i))).collect()
}

fn reduced<T: Reference>(size: usize, seed: u64, count: usize, op: ReduceOp) -> Vec<T> {
    let ranks: Vec<Vec<T>> = (0..size).map(|rank| data(rank, seed, count)).collect();
    let mut column = Vec::with_capacity(size);
    (0..count)
        .map(|i| {
            column.clear();
            column.extend(ranks.iter().map(|rank| rank[i]));
            T::fold(&column, op)
        })
        .collect()
}

#[track_caller]
fn same<T: Reference>(found: &[T], expected: &[T], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (i, (f, e)) in found.iter().zip(expected).enumerate() {
        assert_eq!(f.bits(), e.bits(), "{what}: element {i} of {} {}", found.len(), T::DTYPE);
    }
}

fn at<T>(values: &[T]) -> DeviceAddr {
    DeviceAddr::of_slice(values)
}

fn at_mut<T>(values: &mut [T]) -> DeviceAddr {
    DeviceAddr::of_slice_mut(values)
}

/// All reductions of one type and count, in and out of place, at an address aligned to the element only.
fn reductions<T: Reference>(comm: &dyn DeviceComm, count: usize, seed: u64) {
    let (rank, size) = (comm.rank(), comm.size());
    for (index, op) in ReduceOp::ALL.into_iter().enumerate() {
        if count > 2000 && T::DTYPE != DType::F32 && op != ReduceOp::Sum {
            continue;
        }
        let seed = seed + index as u64;
        let expected: Vec<T> = reduced(size, seed, count, op);
        let what = format!("{op} {count}");
        let mut send = vec![T::sample(0)];
        send.extend(data::<T>(rank, seed, count));
        let mut recv = vec![T::sample(1); count + 2];
        let root = (seed as usize) % size;
        // SAFETY: the vectors hold `count` elements from number 1 on and live across the calls.
        unsafe {
            comm.all_reduce(at(&send[1..]), at_mut(&mut recv[1..]), count, T::DTYPE, op, S).unwrap();
            same(&recv[1..=count], &expected, &what);
            assert_eq!((recv[0].bits(), recv[count + 1].bits()), (T::sample(1).bits(), T::sample(1).bits()));
            let before = send.clone();
            comm.reduce(at(&send[1..]), at_mut(&mut recv[1..]), count, T::DTYPE, op, root, S).unwrap();
            if rank == root {
                same(&recv[1..=count], &expected, &what);
            }
            same(&send, &before, "send stays as it was");
            let place = at_mut(&mut send[1..]);
            comm.all_reduce(place, place, count, T::DTYPE, op, S).unwrap();
            same(&send[1..], &expected, &what);
        }
        let part = count / size;
        let mut send: Vec<T> = data(rank, seed, part * size);
        let mut recv = vec![T::sample(1); part];
        let expected: Vec<T> = reduced(size, seed, part * size, op);
        let own = &expected[rank * part..(rank + 1) * part];
        // SAFETY: `send` holds a part for each rank.
        unsafe {
            comm.reduce_scatter(at(&send), at_mut(&mut recv), part, T::DTYPE, op, S).unwrap();
            same(&recv, own, &what);
            let start = at_mut(&mut send);
            let place = start.offset((rank * part * size_of::<T>()) as u64);
            comm.reduce_scatter(start, place, part, T::DTYPE, op, S).unwrap();
            same(&send[rank * part..(rank + 1) * part], own, &what);
        }
    }
}

fn every_type(comm: &dyn DeviceComm, count: usize, seed: u64) {
    reductions::<f32>(comm, count, seed);
    reductions::<bf16>(comm, count, seed);
    if count > 50_000 {
        return;
    }
    reductions::<f16>(comm, count, seed);
    reductions::<i32>(comm, count, seed);
    reductions::<F8E4M3>(comm, count, seed);
    reductions::<F8E5M2>(comm, count, seed);
    reductions::<f64>(comm, count, seed);
    reductions::<i8>(comm, count, seed);
    reductions::<u8>(comm, count, seed);
    reductions::<u32>(comm, count, seed);
    reductions::<i64>(comm, count, seed);
    reductions::<u64>(comm, count, seed);
}

#[test]
fn reductions_are_exact() {
    for transport in TRANSPORTS {
        for size in [1, 2, 3, 4] {
            on_ranks(size, transport, |comm| {
                for (index, count) in COUNTS.into_iter().enumerate() {
                    if size == 4 || count < 50_000 {
                        every_type(&*comm, count, 1000 * index as u64);
                    }
                }
                comm.close().unwrap();
            });
        }
    }
}

#[test]
fn a_reduction_of_several_windows() {
    for transport in TRANSPORTS {
        on_ranks(2, transport, |comm| {
            reductions::<f32>(&*comm, 3_000_001, 5);
            comm.close().unwrap();
        });
    }
}

#[test]
fn gathers_move_every_element() {
    for transport in TRANSPORTS {
        for size in [1, 2, 4] {
            on_ranks(size, transport, |comm| {
                for (index, count) in COUNTS.into_iter().enumerate() {
                    gathers::<f32>(&*comm, count, index as u64);
                    gathers::<u8>(&*comm, count, 100 + index as u64);
                }
                comm.close().unwrap();
            });
        }
    }
}

fn gathers<T: Reference>(comm: &dyn DeviceComm, count: usize, seed: u64) {
    let (rank, size) = (comm.rank(), comm.size());
    let send: Vec<T> = data(rank, seed, count);
    let all: Vec<T> = (0..size).flat_map(|r| data::<T>(r, seed, count)).collect();
    let blank = T::sample(77);
    let mut recv = vec![blank; count * size];
    // SAFETY: the vectors hold what the counts say.
    unsafe {
        comm.all_gather(at(&send), at_mut(&mut recv), count, T::DTYPE, S).unwrap();
        same(&recv, &all, "all_gather");
        recv.fill(blank);
        recv[rank * count..][..count].copy_from_slice(&send);
        let start = at_mut(&mut recv);
        let own = start.offset((rank * count * size_of::<T>()) as u64);
        comm.all_gather(own, start, count, T::DTYPE, S).unwrap();
        same(&recv, &all, "all_gather in place");

        let root = size - 1;
        let mut recv = vec![blank; count];
        let from = if rank == root { at(&send) } else { DeviceAddr::NULL };
        comm.broadcast(from, at_mut(&mut recv), count, T::DTYPE, root, S).unwrap();
        same(&recv, &data::<T>(root, seed, count), "broadcast");
        let mut buffer = send.clone();
        let place = at_mut(&mut buffer);
        comm.broadcast(place, place, count, T::DTYPE, root, S).unwrap();
        same(&buffer, &data::<T>(root, seed, count), "broadcast in place");

        let send: Vec<T> = data(rank, seed, count * size);
        let mut recv = vec![blank; count * size];
        comm.all_to_all(at(&send), at_mut(&mut recv), count, T::DTYPE, S).unwrap();
        let expected: Vec<T> = (0..size)
            .flat_map(|r| data::<T>(r, seed, count * size)[rank * count..][..count].to_vec())
            .collect();
        same(&recv, &expected, "all_to_all");

        // Uneven, one of them empty.
        let counts: Vec<usize> = (0..size).map(|r| if r == 1 { 0 } else { count + 3 * r }).collect();
        let total: usize = counts.iter().sum();
        let before: usize = counts[..rank].iter().sum();
        let expected: Vec<T> = (0..size).flat_map(|r| data::<T>(r, seed, counts[r])).collect();
        let send: Vec<T> = data(rank, seed, counts[rank]);
        let mut recv = vec![blank; total];
        comm.all_gather_v(at(&send), at_mut(&mut recv), &counts, T::DTYPE, S).unwrap();
        same(&recv, &expected, "all_gather_v");
        let send: Vec<T> = data(rank, seed, total);
        let mut recv = vec![blank; counts[rank]];
        comm.reduce_scatter_v(at(&send), at_mut(&mut recv), &counts, T::DTYPE, ReduceOp::Sum, S).unwrap();
        let expected: Vec<T> = reduced(size, seed, total, ReduceOp::Sum);
        same(&recv, &expected[before..][..counts[rank]], "reduce_scatter_v");
    }
}

#[test]
fn blocks_gather_side_by_side() {
    for transport in TRANSPORTS {
        on_ranks(3, transport, |comm| {
            let (rank, size) = (comm.rank(), comm.size());
            for (height, width) in [(5, 7), (300, 129), (1, 4), (0, 3)] {
                for (send_pitch, in_place) in [(width, false), (width + 5, false), (size * width + 2, true)] {
                    let row_pitch = size * width + 2;
                    let block = Block2d {
                        height,
                        width,
                        row_pitch,
                        rank_stride: width,
                        // Rank 1 is in place where the others are not.
                        send_pitch: if in_place && rank != 1 { width } else { send_pitch },
                        dtype: DType::I32,
                        first: true,
                        last: true,
                    };
                    let value = |r: usize, row: usize, col: usize| (r * 1_000_000 + row * 1000 + col) as i32;
                    let mut recv = vec![-1_i32; height * row_pitch];
                    let mut send = vec![-2_i32; height * block.send_pitch];
                    for row in 0..height {
                        for col in 0..width {
                            send[row * block.send_pitch + col] = value(rank, row, col);
                            recv[row * row_pitch + rank * width + col] = value(rank, row, col);
                        }
                    }
                    let to = at_mut(&mut recv);
                    let from =
                        if in_place && rank == 1 { to.offset((rank * width * 4) as u64) } else { at(&send) };
                    // SAFETY: both matrices hold the block's rows.
                    unsafe { comm.all_gather_2d(from, to, &block, S).unwrap() };
                    for row in 0..height {
                        for col in 0..row_pitch {
                            let expected =
                                if col < size * width { value(col / width, row, col % width) } else { -1 };
                            assert_eq!(recv[row * row_pitch + col], expected, "row {row} col {col}");
                        }
                    }
                }
            }
            comm.close().unwrap();
        });
    }
}

#[test]
fn transfers_match_in_order_and_groups_cannot_deadlock() {
    for transport in TRANSPORTS {
        on_ranks(3, transport, |comm| {
            let (rank, size) = (comm.rank(), comm.size());
            let (next, previous) = ((rank + 1) % size, (rank + size - 1) % size);
            for count in [0, 1, 5000, 200_001] {
                // Everyone sends twice before anyone receives, to the neighbour and to itself.
                let sends: Vec<Vec<f32>> = (0..3).map(|m| data(rank, m, count)).collect();
                let mut recvs = vec![vec![0_f32; count]; 3];
                let [a, b, c] = &mut recvs[..] else { unreachable!() };
                let dtype = DType::F32;
                let send = |m: usize, peer| P2pOp::Send { addr: at(&sends[m]), count, dtype, peer };
                let recv = |to: &mut [f32], peer| P2pOp::Recv { addr: at_mut(to), count, dtype, peer };
                let ops = [
                    send(0, next),
                    send(1, next),
                    send(2, rank),
                    recv(a, previous),
                    recv(b, previous),
                    recv(c, rank),
                ];
                // SAFETY: every vector holds `count` elements.
                unsafe { comm.group(&ops, S).unwrap() };
                same(&recvs[0], &data::<f32>(previous, 0, count), "first");
                same(&recvs[1], &data::<f32>(previous, 1, count), "second");
                same(&recvs[2], &data::<f32>(rank, 2, count), "to itself");
                // A chain of plain sends and receives.
                let mut received = vec![0_f32; count];
                // SAFETY: as above.
                unsafe {
                    if rank > 0 {
                        comm.recv(at_mut(&mut received), count, dtype, rank - 1, S).unwrap();
                        same(&received, &data::<f32>(0, 0, count), "passed on");
                    } else {
                        received.copy_from_slice(&sends[0]);
                    }
                    if rank + 1 < size {
                        comm.send(at(&received), count, dtype, rank + 1, S).unwrap();
                    }
                    comm.barrier(S).unwrap();
                }
            }
            comm.close().unwrap();
        });
    }
}

#[test]
fn allocated_memory_is_used_in_place() {
    for transport in TRANSPORTS {
        on_ranks(3, transport, |comm| {
            let count = 300_001;
            let bytes = count * 4;
            let base = comm.allocate(2 * bytes).unwrap();
            assert!(base.is_aligned_to(256));
            let second = comm.allocate(100).unwrap();
            let recv = base.offset(bytes as u64);
            for seed in 0..3 {
                let send: Vec<f32> = data(comm.rank(), seed, count);
                // SAFETY: the allocation holds two such vectors, and this rank alone uses its own part.
                unsafe {
                    std::slice::from_raw_parts_mut(base.0 as *mut f32, count).copy_from_slice(&send);
                    comm.all_reduce(base, recv, count, DType::F32, ReduceOp::Sum, S).unwrap();
                    let found = std::slice::from_raw_parts(recv.0 as *const f32, count);
                    same(found, &reduced::<f32>(comm.size(), seed, count, ReduceOp::Sum), "allocated");
                    // One rank's operand elsewhere: all ranks fall back together.
                    let mut other = vec![0_f32; count];
                    let to = if comm.rank() == 1 { at_mut(&mut other) } else { recv };
                    comm.all_reduce(base, to, count, DType::F32, ReduceOp::Max, S).unwrap();
                    let found = std::slice::from_raw_parts(to.0 as *const f32, count);
                    same(found, &reduced::<f32>(comm.size(), seed, count, ReduceOp::Max), "mixed");
                }
            }
            assert!(comm.usage().iter().any(|usage| usage.algorithm == "two_shot" && usage.calls >= 3));
            // SAFETY: nothing uses the allocations any more.
            unsafe {
                assert!(comm.free(DeviceAddr(base.0 + 64)).is_err());
                comm.free(base).unwrap();
                comm.free(second).unwrap();
                assert!(comm.free(base).is_err());
            }
            comm.close().unwrap();
        });
    }
}

#[test]
fn groups_have_orders_of_their_own() {
    for transport in TRANSPORTS {
        on_ranks(4, transport, |comm| {
            let color = (comm.rank() % 2) as u32;
            let half = comm.split(Some(color), -(comm.rank() as i32)).unwrap().unwrap();
            assert_eq!((half.size(), half.rank()), (2, 1 - comm.rank() / 2));
            assert_ne!(half.info().name, comm.info().name);
            let lone = comm.split((comm.rank() == 2).then_some(9), 0).unwrap();
            assert_eq!(lone.is_some(), comm.rank() == 2);
            for call in 0..(5 + 20 * color as usize) {
                let mut value = [comm.rank() as i32 + call as i32];
                let place = at_mut(&mut value);
                // SAFETY: one element, in place.
                unsafe { half.all_reduce(place, place, 1, DType::I32, ReduceOp::Sum, S).unwrap() };
                assert_eq!(value[0], 2 * color as i32 + 2 + 2 * call as i32);
            }
            let mut value = [1_u32];
            let place = at_mut(&mut value);
            // SAFETY: one element, in place.
            unsafe { comm.all_reduce(place, place, 1, DType::U32, ReduceOp::Sum, S).unwrap() };
            assert_eq!(value[0], 4);
            half.close().unwrap();
            comm.close().unwrap();
        });
    }
}

#[test]
fn fused_norms() {
    for transport in TRANSPORTS {
        on_ranks(4, transport, |comm| {
            let (rank, size) = (comm.rank(), comm.size());
            // Rows that every rank normalises, and such as they share out.
            for (tokens, hidden) in [(6, 200), (7, 9000), (103, 200)] {
                let input: Vec<f32> = data(rank, 1, tokens * hidden);
                let residual: Vec<f32> = data(0, 2, tokens * hidden);
                let (weight, bias): (Vec<f32>, Vec<f32>) = (data(0, 3, hidden), data(0, 4, hidden));
                let sums: Vec<f32> = reduced(size, 1, tokens * hidden, ReduceOp::Sum);
                let expected = |row: usize| -> (Vec<f32>, Vec<f32>) {
                    let r: Vec<f32> = (0..hidden)
                        .map(|h| sums[row * hidden + h] + residual[row * hidden + h] + bias[h])
                        .collect();
                    let mean = r.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / hidden as f64;
                    let scale = 1.0 / (mean + 1e-5).sqrt();
                    let out = r
                        .iter()
                        .zip(&weight)
                        .map(|(x, w)| (f64::from(*x) * scale * f64::from(*w + 1.0)) as f32);
                    (r.clone(), out.collect())
                };
                let close = |found: &[f32], row: usize| {
                    for (f, e) in found.iter().zip(expected(row).1) {
                        assert!((f - e).abs() <= 1e-5 * (1.0 + e.abs()), "row {row}: {f} {e}");
                    }
                };
                let mut residual_out = vec![0_f32; tokens * hidden];
                let mut output = vec![0_f32; tokens * hidden];
                let args = RmsNormArgs {
                    input: at(&input),
                    residual: at(&residual),
                    residual_out: at_mut(&mut residual_out),
                    bias: Some(at(&bias)),
                    weight: at(&weight),
                    output: at_mut(&mut output),
                    tokens,
                    hidden,
                    dtype: DType::F32,
                    eps: 1e-5,
                    weight_offset: 1.0,
                };
                // SAFETY: all operands hold what the arguments say.
                unsafe { comm.all_reduce_rmsnorm(&args, S).unwrap() };
                for row in 0..tokens {
                    same(&residual_out[row * hidden..][..hidden], &expected(row).0, "residual");
                    close(&output[row * hidden..][..hidden], row);
                }

                let in_place = RmsNormArgs { input: args.output, residual: args.residual_out, ..args };
                let (first_output, first_residual) = (output.clone(), residual_out.clone());
                output.copy_from_slice(&input);
                residual_out.copy_from_slice(&residual);
                // SAFETY: as above, in place.
                unsafe { comm.all_reduce_rmsnorm(&in_place, S).unwrap() };
                same(&output, &first_output, "output in place");
                same(&residual_out, &first_residual, "residual in place");
                // Reduce over all four ranks, gather in pairs {0,1} and {2,3}.
                let gather = comm.split(Some(rank as u32 / 2), 0).unwrap().unwrap();
                let reduce_tokens = [1, 2, 0, 3];
                let (first, gather_tokens) = if rank < 2 { (0, [1, 2]) } else { (3, [0, 3]) };
                let own: usize = reduce_tokens[..rank].iter().sum();
                let mut states = input.clone();
                let mut own_residual = residual[own * hidden..][..reduce_tokens[rank] * hidden].to_vec();
                let args = TwoGroupNormArgs {
                    hidden_states: at_mut(&mut states),
                    residual: at_mut(&mut own_residual),
                    bias: Some(at(&bias)),
                    weight: at(&weight),
                    reduce_first_row: 0,
                    reduce_tokens: &reduce_tokens,
                    gather_first_row: first,
                    gather_tokens: &gather_tokens,
                    hidden,
                    dtype: DType::F32,
                    eps: 1e-5,
                    weight_offset: 1.0,
                };
                // SAFETY: as above.
                unsafe { comm.all_reduce_rmsnorm_two_group(&*gather, &args, S).unwrap() };
                for row in first..first + 3 {
                    close(&states[row * hidden..][..hidden], row);
                }
                for row in 0..reduce_tokens[rank] {
                    same(&own_residual[row * hidden..][..hidden], &expected(own + row).0, "own residual");
                }
                gather.close().unwrap();
            }
            comm.close().unwrap();
        });
    }
}

#[test]
fn bad_arguments_are_refused_and_harmless() {
    on_ranks(2, "auto", |comm| {
        let mut buffer = [0_f32; 8];
        let addr = at_mut(&mut buffer);
        // SAFETY: every call is refused before it touches memory.
        unsafe {
            for result in [
                comm.all_reduce(DeviceAddr::NULL, addr, 4, DType::F32, ReduceOp::Sum, S),
                comm.all_reduce(addr.offset(1), addr, 4, DType::F32, ReduceOp::Sum, S),
                comm.all_reduce(addr.offset(4), addr, 4, DType::F32, ReduceOp::Sum, S),
                comm.all_reduce(addr, addr, usize::MAX, DType::F32, ReduceOp::Sum, S),
                comm.broadcast(addr, addr, 1, DType::F32, 2, S),
                comm.send(addr, 1, DType::F32, 7, S),
                comm.all_gather_v(addr, addr, &[1, 2, 3], DType::F32, S),
            ] {
                assert!(matches!(result, Err(comm_core::CommError::InvalidArgument { .. })), "{result:?}");
            }
            comm.all_reduce(DeviceAddr::NULL, DeviceAddr::NULL, 0, DType::F32, ReduceOp::Sum, S).unwrap();
        }
        comm.close().unwrap();
        // SAFETY: a closed communicator touches nothing.
        let closed = unsafe { comm.barrier(S) };
        assert!(matches!(closed, Err(comm_core::CommError::Closed { .. })));
    });
}
