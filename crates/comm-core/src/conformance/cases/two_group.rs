//! The two-group fused norm with uneven tokens.

use std::ops::Range;

use super::super::case::Case;
use super::super::data;
use super::super::reference::Equality;
use super::super::runner::Runner;
use super::norm::{EPS, TYPES, bias, encode, normalise, or_null, partial, residual, tolerance, weight};
use super::quantized_norm::Fp8;
use crate::device_comm::DeviceComm;
use crate::dtype::DType;
use crate::error::Result;
use crate::fused::TwoGroupNormArgs;
use crate::op::{OpKind, OpQuery};

const KINDS: [OpKind; 2] = [OpKind::AllReduceRmsNormTwoGroup, OpKind::AllReduceRmsNormTwoGroupQuantized];

pub(super) fn run(runner: &mut Runner<'_>) {
    let hiddens: &[usize] = if runner.config.quick { &[7, 1024] } else { &[7, 1000, 2880] };
    for dtype in TYPES {
        for (name, reduce_parts, gather_parts) in
            [("whole_whole", 1, 1), ("half_whole", 2, 1), ("whole_half", 1, 2)]
        {
            for kind in KINDS {
                runner.case(kind, &format!("{kind}/{dtype}/{name}"), |case| {
                    if reduce_parts * gather_parts > 1 && !case.world.is_multiple_of(2) {
                        case.skipped = Some("halves need an even number of ranks".into());
                        return Ok(());
                    }
                    if !case.supported(&OpQuery::new(kind, dtype, hiddens[0])) {
                        return Ok(());
                    }
                    if reduce_parts * gather_parts == 1 {
                        let comm = case.comm;
                        return groups(case, kind, dtype, hiddens, comm, comm, [1, 1]);
                    }
                    if !case.supported(&OpQuery::new(OpKind::Split, DType::U8, 0)) {
                        return Ok(());
                    }
                    case.at = "split into halves".into();
                    let color = (case.rank * 2 / case.world) as u32;
                    let Some(half) = case.comm.split(Some(color), case.rank as i32)? else {
                        case.fail("a rank that passed a color got no group");
                        return Ok(());
                    };
                    let whole = case.comm;
                    let (reduce, gather) = if reduce_parts == 2 { (&*half, whole) } else { (whole, &*half) };
                    groups(case, kind, dtype, hiddens, reduce, gather, [reduce_parts, gather_parts])?;
                    half.close()
                });
            }
        }
    }
}

fn groups(
    case: &mut Case<'_, '_>,
    kind: OpKind,
    dtype: DType,
    hiddens: &[usize],
    reduce: &dyn DeviceComm,
    gather: &dyn DeviceComm,
    parts: [usize; 2],
) -> Result<()> {
    let patterns: [&dyn Fn(usize) -> usize; 4] =
        [&|_| 1, &|rank| (rank * 3 + 2) % 5, &|rank| if rank == 0 { 6 } else { 0 }, &|_| 0];
    for (turn, tokens) in patterns.iter().enumerate() {
        let tokens: Vec<usize> = (0..case.world).map(tokens).collect();
        for &hidden in hiddens {
            one(case, kind, dtype, hidden, &tokens, reduce, gather, parts, turn)?;
        }
    }
    Ok(())
}

/// The ranks of the group that a rank is in, of `parts` contiguous groups.
fn members(rank: usize, world: usize, parts: usize) -> Range<usize> {
    let size = world / parts;
    let first = rank / size * size;
    first..first + size
}

fn one(
    case: &mut Case<'_, '_>,
    kind: OpKind,
    dtype: DType,
    hidden: usize,
    tokens: &[usize],
    reduce: &dyn DeviceComm,
    gather: &dyn DeviceComm,
    [reduce_parts, gather_parts]: [usize; 2],
    turn: usize,
) -> Result<()> {
    let (seed, world, own) = (case.next_seed(), case.world, case.rank);
    let weight_offset = f32::from(u8::from(turn % 2 == 1));
    let with_bias = turn < 2;
    case.at = format!(
        "{kind} {dtype}, hidden {hidden}, tokens {tokens:?}, reduce group of {}, gather group of {}, bias {with_bias}, \
         weight offset {weight_offset}",
        reduce.size(),
        gather.size()
    );
    case.calls += 1;
    let size = dtype.size();
    let rows: usize = tokens.iter().sum();
    let first_row = |rank: usize| tokens[..rank].iter().sum::<usize>();
    let (reducers, gatherers) = (members(own, world, reduce_parts), members(own, world, gather_parts));
    let own_rows = first_row(own)..first_row(own) + tokens[own];
    let states = encode(dtype, (0..rows * hidden).map(|i| partial(dtype, reduce.size(), seed, own, i)));
    let before =
        encode(dtype, (own_rows.start * hidden..own_rows.end * hidden).map(|i| residual(dtype, seed, i)));
    let weights = encode(dtype, (0..hidden).map(|i| weight(dtype, seed, i)));
    let biases = encode(dtype, (0..hidden).map(|i| bias(dtype, seed, i)));
    let arena = &mut *case.arena;
    let states_at = arena.lay(0, size, states.len())?;
    let residual_at = arena.lay(2, 3 * size, before.len())?;
    let weight_at = arena.lay(4, 0, weights.len())?;
    let bias_at = arena.lay(5, size, biases.len())?;
    arena.put(&states_at, &states)?;
    arena.put(&residual_at, &before)?;
    arena.put(&weight_at, &weights)?;
    arena.put(&bias_at, &biases)?;
    let args = TwoGroupNormArgs {
        hidden_states: or_null(states_at.addr(), rows),
        residual: or_null(residual_at.addr(), tokens[own]),
        bias: with_bias.then(|| bias_at.addr()),
        weight: weight_at.addr(),
        reduce_first_row: first_row(reducers.start),
        reduce_tokens: &tokens[reducers],
        gather_first_row: first_row(gatherers.start),
        gather_tokens: &tokens[gatherers.clone()],
        hidden,
        dtype,
        eps: EPS,
        weight_offset,
    };
    let fp8 = match kind {
        OpKind::AllReduceRmsNormTwoGroup => None,
        _ => Some(Fp8::lay(case, turn.is_multiple_of(2), (rows, hidden), turn)?),
    };
    // SAFETY: every operand holds the elements that the arguments say, in live memory that only this call uses.
    unsafe {
        match &fp8 {
            Some(fp8) => {
                reduce.all_reduce_rmsnorm_two_group_quantized(gather, &args, &fp8.args(true), case.stream())
            }
            None => reduce.all_reduce_rmsnorm_two_group(gather, &args, case.stream()),
        }
    }?;

    let weight_values: Vec<f64> = (0..hidden).map(|i| weight(dtype, seed, i).0).collect();
    let got = case.fetch(&states_at, "hidden_states")?;
    let got_residual = case.fetch(&residual_at, "residual")?;
    let at = std::mem::take(&mut case.at);
    for owner in gatherers.clone() {
        let peers = members(owner, world, reduce_parts);
        for row in first_row(owner)..first_row(owner) + tokens[owner] {
            let values: Vec<f64> = (0..hidden)
                .map(|h| {
                    let i = row * hidden + h;
                    let sum: f64 =
                        peers.clone().map(|rank| partial(dtype, reduce.size(), seed, rank, i).0).sum();
                    sum + residual(dtype, seed, i).0 + if with_bias { bias(dtype, seed, h).0 } else { 0.0 }
                })
                .collect();
            let bytes = row * hidden * size..(row + 1) * hidden * size;
            case.at = format!("{at}: row {row}, owned by rank {owner}");
            let expected = normalise(dtype, &values, &weight_values, weight_offset);
            case.expect(dtype, &expected, &got[bytes.clone()], tolerance(dtype));
            if owner == own {
                let mut sums = Vec::new();
                values.iter().for_each(|&x| data::push(&mut sums, dtype, data::from_f64(dtype, x)));
                let start = (row - own_rows.start) * hidden * size;
                case.at = format!("{at}: residual of row {row}");
                case.expect(dtype, &sums, &got_residual[start..start + sums.len()], Equality::Value);
            }
        }
    }
    case.at = at;
    if let Some(fp8) = fp8 {
        let gathered = first_row(gatherers.start)..first_row(gatherers.end);
        let quantised = fp8.fetch(case)?;
        fp8.check(case, dtype, &got, &quantised, gathered.clone());
        // The same without the unquantised result.
        fp8.poison(case)?;
        case.arena.put(&states_at, &states)?;
        case.arena.put(&residual_at, &before)?;
        case.calls += 1;
        // SAFETY: as above.
        unsafe {
            reduce.all_reduce_rmsnorm_two_group_quantized(gather, &args, &fp8.args(false), case.stream())
        }?;
        let again = fp8.fetch(case)?;
        fp8.check(case, dtype, &got, &again, gathered);
        if case.fetch(&residual_at, "residual")? != got_residual {
            case.fail("the residual differs where the unquantised result is not kept");
        }
    }
    if case.fetch(&weight_at, "weight")? != weights || case.fetch(&bias_at, "bias")? != biases {
        case.fail("the weight or the bias was modified");
    }
    Ok(())
}
