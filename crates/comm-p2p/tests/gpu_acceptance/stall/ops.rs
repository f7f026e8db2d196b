//! The operations that are tried with a stalled rank: calls of them back to back, each with data and a place of its own,
//! and what each must have given.

use comm_core::{
    Block2d, DType, DeviceAddr, F8E4M3, NormQuantScale, NormQuantization, OpKind, ReduceOp, RmsNormArgs,
    TwoGroupNormArgs, quantize,
};
use comm_kernels::pattern::{self, Expected, Pattern};

use crate::common::Rank;
use crate::data::{SUM, decode, encode};

pub(super) const DTYPE: DType = DType::F32;
/// Elements of a rank, and of a norm.
pub(super) const COUNT: usize = 1000;
const HIDDEN: usize = 250;
const TOKENS: usize = COUNT / HIDDEN;
const EPS: f32 = 1e-5;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Op {
    AllReduce,
    ReduceScatter,
    AllGather,
    Broadcast,
    ReduceScatterV,
    AllGatherV,
    Average,
    ScatteredAverage,
    ScatteredAverageV,
    AllToAll,
    AllGather2d,
    Quantized,
    Norm,
    Fp8Norm,
    TwoGroupNorm,
}

pub(super) const OPS: [Op; 15] = [
    Op::AllReduce,
    Op::ReduceScatter,
    Op::AllGather,
    Op::Broadcast,
    Op::ReduceScatterV,
    Op::AllGatherV,
    Op::Average,
    Op::ScatteredAverage,
    Op::ScatteredAverageV,
    Op::AllToAll,
    Op::AllGather2d,
    Op::Quantized,
    Op::Norm,
    Op::Fp8Norm,
    Op::TwoGroupNorm,
];

/// Where a call's operands are. `send` and `recv` have room for [`COUNT`] elements of every rank.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub(super) send: DeviceAddr,
    pub(super) recv: DeviceAddr,
    /// The norms' residual and weights, the same for all calls: zeros, so that the new residual is the sum, and ones.
    pub(super) zeros: DeviceAddr,
    pub(super) ones: DeviceAddr,
}

impl Place {
    /// Of a norm, in `send`, behind what is sent.
    fn normed(&self) -> DeviceAddr {
        self.send.offset((COUNT * DTYPE.size()) as u64)
    }

    /// Of a norm's fp8 result, in `recv`, behind the new residual.
    fn fp8(&self) -> DeviceAddr {
        self.recv.offset((COUNT * DTYPE.size()) as u64)
    }

    fn scales(&self) -> DeviceAddr {
        self.fp8().offset(COUNT as u64)
    }
}

/// The first rank, which is late, has nothing, the second most, the others a little.
fn uneven(size: usize) -> Vec<usize> {
    (0..size).map(|rank| [0, COUNT, 3][rank.min(2)]).collect()
}

/// Rows of each rank in a two-group norm, [`TOKENS`] at most.
fn rows(size: usize) -> Vec<usize> {
    (0..size).map(|rank| 1 + rank % 3).collect()
}

fn before(counts: &[usize], rank: usize) -> usize {
    counts[..rank].iter().sum()
}

fn block(size: usize) -> Block2d {
    Block2d {
        height: TOKENS,
        width: HIDDEN,
        row_pitch: HIDDEN * size,
        rank_stride: HIDDEN,
        send_pitch: HIDDEN,
        dtype: DTYPE,
        first: true,
        last: true,
    }
}

impl Op {
    /// Whether forcing this algorithm makes a difference to the operation.
    pub(super) fn has(self, algorithm: Option<&str>) -> bool {
        let Some(name) = algorithm else { return true };
        match self {
            Self::AllToAll | Self::AllGather2d | Self::Quantized => false,
            Self::Average | Self::ScatteredAverage | Self::ScatteredAverageV => {
                matches!(name, "one_shot" | "two_shot")
            }
            Self::Norm | Self::Fp8Norm => matches!(name, "one_shot" | "lamport" | "two_shot" | "composed"),
            // A scatter and a gather of uneven parts.
            Self::TwoGroupNorm => matches!(name, "two_shot" | "cells" | "packets" | "direct" | "staged"),
            _ => true,
        }
    }

    /// What the calls must count as, where the algorithm is what they are tried for.
    pub(super) fn counted(self, algorithm: Option<&str>) -> Option<(OpKind, &str)> {
        match self {
            Self::Norm => Some((OpKind::AllReduceRmsNorm, algorithm?)),
            Self::Fp8Norm => Some((OpKind::AllReduceRmsNormQuantized, algorithm?)),
            Self::Quantized => Some((OpKind::AllReduceQuantized, "two_shot")),
            _ => None,
        }
    }

    /// Whether `recv` is updated where it lies, and so has to be zero before.
    pub(super) const fn updates(self) -> bool {
        matches!(self, Self::TwoGroupNorm)
    }

    pub(super) fn issue(self, rank: &Rank, place: &Place) -> comm_core::Result<()> {
        let (comm, stream, size) = (&rank.comm, rank.stream(), rank.size);
        let (sum, avg) = (ReduceOp::Sum, ReduceOp::Avg);
        let Place { send, recv, zeros, ones } = *place;
        unsafe {
            match self {
                Self::AllReduce => comm.all_reduce(send, recv, COUNT, DTYPE, sum, stream),
                Self::Average => comm.all_reduce(send, recv, COUNT, DTYPE, avg, stream),
                Self::ReduceScatter => comm.reduce_scatter(send, recv, COUNT, DTYPE, sum, stream),
                Self::ScatteredAverage => comm.reduce_scatter(send, recv, COUNT, DTYPE, avg, stream),
                Self::ReduceScatterV => comm.reduce_scatter_v(send, recv, &uneven(size), DTYPE, sum, stream),
                Self::ScatteredAverageV => {
                    comm.reduce_scatter_v(send, recv, &uneven(size), DTYPE, avg, stream)
                }
                Self::AllGather => comm.all_gather(send, recv, COUNT, DTYPE, stream),
                Self::AllGatherV => comm.all_gather_v(send, recv, &uneven(size), DTYPE, stream),
                Self::AllGather2d => comm.all_gather_2d(send, recv, &block(size), stream),
                Self::Broadcast => comm.broadcast(send, recv, COUNT, DTYPE, 1, stream),
                Self::AllToAll => comm.all_to_all(send, recv, COUNT, DTYPE, stream),
                Self::Quantized => comm.all_reduce_quantized(send, recv, COUNT, DTYPE, stream),
                Self::Norm | Self::Fp8Norm => {
                    let args = RmsNormArgs {
                        input: send,
                        residual: zeros,
                        residual_out: recv,
                        bias: None,
                        weight: ones,
                        output: place.normed(),
                        tokens: TOKENS,
                        hidden: HIDDEN,
                        dtype: DTYPE,
                        eps: EPS,
                        weight_offset: 0.0,
                    };
                    let scale = NormQuantScale::PerToken(place.scales());
                    let fp8 = NormQuantization { output: place.fp8(), scale, keep_unquantized: true };
                    match self {
                        Self::Norm => comm.all_reduce_rmsnorm(&args, stream),
                        _ => comm.all_reduce_rmsnorm_quantized(&args, &fp8, stream),
                    }
                }
                Self::TwoGroupNorm => {
                    let tokens = rows(size);
                    let args = TwoGroupNormArgs {
                        hidden_states: send,
                        residual: recv,
                        bias: None,
                        weight: ones,
                        reduce_first_row: 0,
                        reduce_tokens: &tokens,
                        gather_first_row: 0,
                        gather_tokens: &tokens,
                        hidden: HIDDEN,
                        dtype: DTYPE,
                        eps: EPS,
                        weight_offset: 0.0,
                    };
                    comm.all_reduce_rmsnorm_two_group(&**comm, &args, stream)
                }
            }
        }
    }

    /// What `recv` must hold, as far as a device can check it: where and how much, what, and from which element on.
    pub(super) fn result(self, rank: &Rank) -> Vec<((usize, usize), Expected, usize)> {
        let (me, size, counts) = (rank.rank, rank.size, uneven(rank.size));
        let (all, avg) = (0..size, Expected::Reduced(ReduceOp::Avg));
        let own = (0, counts[me]);
        match self {
            Self::AllReduce | Self::Norm | Self::Fp8Norm => vec![((0, COUNT), SUM, 0)],
            Self::Average => vec![((0, COUNT), avg, 0)],
            Self::ReduceScatter => vec![((0, COUNT), SUM, me * COUNT)],
            Self::ScatteredAverage => vec![((0, COUNT), avg, me * COUNT)],
            Self::ReduceScatterV => vec![(own, SUM, before(&counts, me))],
            Self::ScatteredAverageV => vec![(own, avg, before(&counts, me))],
            Self::AllGather => all.map(|from| ((from * COUNT, COUNT), Expected::Sent(from), 0)).collect(),
            Self::AllGatherV => {
                all.map(|from| ((before(&counts, from), counts[from]), Expected::Sent(from), 0)).collect()
            }
            Self::AllGather2d => {
                let row = |from, row| {
                    let at = (row * size + from) * HIDDEN;
                    ((at, HIDDEN), Expected::Sent(from), row * HIDDEN)
                };
                all.flat_map(|from| (0..TOKENS).map(move |line| row(from, line))).collect()
            }
            Self::Broadcast => vec![((0, COUNT), Expected::Sent(1), 0)],
            Self::AllToAll => {
                all.map(|from| ((from * COUNT, COUNT), Expected::Sent(from), me * COUNT)).collect()
            }
            Self::Quantized => Vec::new(),
            Self::TwoGroupNorm => {
                let tokens = rows(size);
                vec![((0, tokens[me] * HIDDEN), SUM, before(&tokens, me) * HIDDEN)]
            }
        }
    }

    /// How many elements are wrong of what takes the host to check. Waits for the stream.
    pub(super) fn wrong_on_host(self, rank: &Rank, data: &Pattern, place: &Place) -> u64 {
        let floats = |at, count| decode(DTYPE, &rank.download(at, count * DTYPE.size()));
        let differing = |wrong: bool| u64::from(wrong);
        match self {
            Self::Quantized => {
                let inputs: Vec<_> = (0..rank.size).map(|who| sent(data, who, COUNT)).collect();
                let sources: Vec<_> = inputs.iter().map(Vec::as_ptr).collect();
                let mut wanted = vec![0; COUNT * DTYPE.size()];
                unsafe { quantize::sum_host(wanted.as_mut_ptr(), &sources, COUNT, DTYPE).unwrap() };
                let found = rank.download(place.recv, wanted.len());
                let pairs = found.chunks(DTYPE.size()).zip(wanted.chunks(DTYPE.size()));
                pairs.map(|(found, wanted)| differing(found != wanted)).sum()
            }
            Self::Norm => wrong_rows(&floats(place.normed(), COUNT), data, rank.size),
            Self::Fp8Norm => {
                let normed = floats(place.normed(), COUNT);
                let fp8 = rank.download(place.fp8(), COUNT);
                let scales = floats(place.scales(), TOKENS);
                // By definition what the unquantised result says, to the last bit.
                let rows = normed.chunks(HIDDEN).zip(fp8.chunks(HIDDEN)).zip(scales);
                let wrong: u64 = rows
                    .map(|((normed, fp8), found)| {
                        let (scale, inverse) = quantize::scale(quantize::amax(normed));
                        let right = |x: f32| quantize::to_e4m3(x * inverse);
                        let elements = normed.iter().zip(fp8);
                        let wrong = elements.map(|(&x, &q)| differing(right(x) != F8E4M3::from_bits(q)));
                        wrong.sum::<u64>() + differing(scale.to_bits() != found.to_bits())
                    })
                    .sum();
                wrong + wrong_rows(&normed, data, rank.size)
            }
            Self::TwoGroupNorm => {
                let count = rows(rank.size).iter().sum::<usize>() * HIDDEN;
                wrong_rows(&floats(place.send, count), data, rank.size)
            }
            _ => 0,
        }
    }
}

/// The first elements of what `who` sends, on the host.
fn sent(data: &Pattern, who: usize, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count * DTYPE.size()];
    pattern::fill(&mut bytes, DTYPE, data, who, 0).unwrap();
    bytes
}

/// Rows of a norm, whose sums are whole numbers that `f32` holds, against the norm in `f64`.
fn wrong_rows(normed: &[f32], data: &Pattern, size: usize) -> u64 {
    let mut sums = vec![0.0; normed.len()];
    for who in 0..size {
        let sent = decode(DTYPE, &sent(data, who, normed.len()));
        sums.iter_mut().zip(sent).for_each(|(sum, x)| *sum += f64::from(x));
    }
    let rows = normed.chunks(HIDDEN).zip(sums.chunks(HIDDEN));
    rows.map(|(normed, sums)| {
        let square = sums.iter().map(|sum| sum * sum).sum::<f64>() / HIDDEN as f64;
        let factor = 1.0 / (square + f64::from(EPS)).sqrt();
        // Which no NaN is.
        let is_right = |(&found, &sum): (&f32, &f64)| {
            let right = sum * factor;
            (f64::from(found) - right).abs() <= 1e-6 + 1e-5 * right.abs()
        };
        normed.iter().zip(sums).filter(|&pair| !is_right(pair)).count() as u64
    })
    .sum()
}

/// A rank's vectors for the norms.
pub(super) fn constants(rank: &Rank) -> (DeviceAddr, DeviceAddr) {
    let filled = |value: f32| {
        let at = rank.space(COUNT * DTYPE.size());
        rank.upload(at, &encode(DTYPE, (0..COUNT).map(|_| value)));
        at
    };
    (filled(0.0), filled(1.0))
}
