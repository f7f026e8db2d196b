//! Norms, of one device and fused with sums over the ranks, with and without an fp8 result: against the host's.

use anyhow::{Context, Result};
use comm_core::{
    DType, DeviceAddr, DeviceComm, DeviceMemory, NormQuantScale, NormQuantization, RmsNormArgs,
    TwoGroupNormArgs,
};

use super::host::{self, NormData};
use super::{Bench, FLOATS};

/// Rows and columns: several rows; a row in a cluster; slices that are not even.
const SHAPES: [(usize, usize); 3] = [(3, 264), (1, 1000), (2, 101)];
/// Small enough that some elements are larger than fp8 numbers get.
const SCALE: f32 = 0.006;

/// A norm's call, with an fp8 result or without.
pub(super) type Call<'a> = &'a dyn Fn(&RmsNormArgs, Option<&NormQuantization>) -> comm_core::Result<()>;

/// How the operands of a norm lie.
#[derive(Clone, Copy, Debug)]
pub(super) struct Form {
    pub(super) rows: usize,
    pub(super) dtype: DType,
    /// The results take the operands' places.
    pub(super) in_place: bool,
    /// Elements by which all operands are off a 16-byte boundary.
    pub(super) skip: usize,
}

/// Memory for a norm's operands. Lives until the rank's end.
pub(super) struct Operands {
    bytes: usize,
    input: DeviceAddr,
    residual: DeviceAddr,
    updated: DeviceAddr,
    output: DeviceAddr,
    weight: DeviceAddr,
    bias: DeviceAddr,
    fp8: DeviceAddr,
    scales: DeviceAddr,
}

impl Bench {
    /// Memory for norms whose matrices have up to `bytes` bytes.
    pub(super) fn operands(&self, bytes: usize) -> Result<Operands> {
        let buffer = || self.memory.allocate(bytes);
        Ok(Operands {
            bytes,
            input: buffer()?,
            residual: buffer()?,
            updated: buffer()?,
            output: buffer()?,
            weight: buffer()?,
            bias: buffer()?,
            fp8: buffer()?,
            scales: buffer()?,
        })
    }

    /// The norms fused with an all-reduce, in every form.
    pub(super) fn norms(&mut self, comm: &dyn DeviceComm) -> Result<()> {
        let (stream, operands) = (self.memory.stream(), self.operands(16 << 10)?);
        let call: Call<'_> = &|args, quantized| {
            // SAFETY: every buffer holds more than the largest shape has, and lives until the rank's end.
            unsafe {
                match quantized {
                    Some(quantized) => comm.all_reduce_rmsnorm_quantized(args, quantized, stream),
                    None => comm.all_reduce_rmsnorm(args, stream),
                }
            }
        };
        for dtype in FLOATS {
            for (turn, (rows, hidden)) in SHAPES.into_iter().enumerate() {
                let (rank, ranks) = (self.rank, self.world);
                let (seed, bias, weight_offset) = (self.next_seed(), turn != 1, turn as f32 / 2.0);
                let data = NormData { seed, rank, ranks, hidden, bias, weight_offset };
                let form = Form { rows, dtype, in_place: turn == 1, skip: usize::from(turn == 2) };
                self.norm(&operands, data, form, call)?;
            }
        }
        Ok(())
    }

    /// One norm: plain, then with fp8 results of either scale, with and without the one in the operands' type.
    pub(super) fn norm(
        &mut self,
        operands: &Operands,
        data: NormData,
        form: Form,
        call: Call<'_>,
    ) -> Result<()> {
        let Form { rows, dtype, in_place, skip } = form;
        let NormData { hidden, bias, weight_offset, .. } = data;
        let count = rows * hidden;
        let at = |base: DeviceAddr| base.offset((skip * dtype.size()) as u64);
        let args = RmsNormArgs {
            input: at(operands.input),
            residual: at(operands.residual),
            residual_out: at(if in_place { operands.residual } else { operands.updated }),
            bias: bias.then(|| at(operands.bias)),
            weight: at(operands.weight),
            output: at(if in_place { operands.input } else { operands.output }),
            tokens: rows,
            hidden,
            dtype,
            eps: host::EPS,
            weight_offset,
        };
        let (updated, results) = data.rows(0..rows);
        let tolerance = host::norm_tolerance(dtype);
        for per_token in [None, Some(false), Some(true)] {
            let what = format!("norm of {data:?}, {form:?}, a scale per token: {per_token:?}");
            self.lay(operands, data, form)?;
            let quantized = per_token.map(|per_token| operands.quantized(per_token, true));
            call(&args, quantized.as_ref())?;
            let found = self.fetch(args.output, count * dtype.size())?;
            let residual = self.fetch(args.residual_out, count * dtype.size())?;
            self.must_hold(&what, "result", host::difference(dtype, &results, &found, tolerance));
            self.must_hold(&what, "residual", host::difference(dtype, &updated, &residual, 0));
            let Some(per_token) = per_token else { continue };
            let fp8 = self.fp8(operands, (rows, count))?;
            let scale = (!per_token).then_some(SCALE);
            let values = host::numbers(dtype, &found);
            let scales = host::numbers(DType::F32, &fp8.1);
            self.must_hold(
                &what,
                "fp8 result",
                host::fp8_difference(&values, hidden, scale, (&fp8.0, &scales)),
            );

            self.lay(operands, data, form)?;
            call(&args, Some(&operands.quantized(per_token, false)))?;
            let alone = self.fp8(operands, (rows, count))?;
            let residual = self.fetch(args.residual_out, count * dtype.size())?;
            self.must_hold(&what, "fp8 result alone", host::other_bits(DType::U8, &fp8.0, &alone.0));
            if per_token {
                self.must_hold(&what, "scales alone", host::other_bits(DType::F32, &fp8.1, &alone.1));
            }
            self.must_hold(&what, "residual of fp8 alone", host::difference(dtype, &updated, &residual, 0));
        }
        Ok(())
    }

    /// Fresh operands, and poison where results go.
    fn lay(&self, operands: &Operands, data: NormData, Form { rows, dtype, skip, .. }: Form) -> Result<()> {
        let count = rows * data.hidden;
        for addr in [operands.updated, operands.output, operands.fp8, operands.scales] {
            self.poison(addr, operands.bytes)?;
        }
        let numbers = |number: &dyn Fn(usize) -> f32| (0..count).map(number).collect::<Vec<f32>>();
        let put = |base: DeviceAddr, values: &[f32]| {
            self.put(base.offset((skip * dtype.size()) as u64), &host::elements(dtype, values))
        };
        put(operands.input, &numbers(&|index| data.own(index)))?;
        put(operands.residual, &numbers(&|index| data.residual(index)))?;
        put(operands.bias, &data.biases())?;
        put(operands.weight, &data.weights())?;
        // Read where one scale is given, and overwritten where each row gets its own.
        self.put(operands.scales, &SCALE.to_le_bytes())
    }

    /// The fp8 elements and the scales of some rows.
    fn fp8(&self, operands: &Operands, (rows, count): (usize, usize)) -> Result<(Vec<u8>, Vec<u8>)> {
        Ok((self.fetch(operands.fp8, count)?, self.fetch(operands.scales, 4 * rows)?))
    }

    /// The norm between two groups, which are two communicators of all ranks here: plain, and with an fp8 result.
    pub(super) fn two_groups(&mut self, comm: &dyn DeviceComm) -> Result<()> {
        let gather = comm.split(Some(0), self.rank as i32)?.context("a rank with a colour got no group")?;
        let operands = self.operands(64 << 10)?;
        for dtype in FLOATS {
            for per_token in [None, Some(false), Some(true)] {
                self.two_group(comm, &*gather, &operands, dtype, per_token)?;
            }
        }
        gather.close()?;
        Ok(())
    }

    fn two_group(
        &mut self,
        comm: &dyn DeviceComm,
        gather: &dyn DeviceComm,
        operands: &Operands,
        dtype: DType,
        per_token: Option<bool>,
    ) -> Result<()> {
        let (ranks, rank, size) = (self.world, self.rank, dtype.size());
        let seed = self.next_seed();
        let data = NormData { seed, rank, ranks, hidden: 264, bias: true, weight_offset: 1.0 };
        let what = format!("two-group norm of {data:?}, {dtype}, a scale per token: {per_token:?}");
        // A row more on each rank than on the one before.
        let tokens: Vec<usize> = (1..=ranks).collect();
        let begin: usize = tokens[..rank].iter().sum();
        let (rows, own) = (tokens.iter().sum::<usize>(), begin..begin + tokens[rank]);
        let count = rows * data.hidden;
        let (updated, results) = data.rows(0..rows);
        let own = own.start * data.hidden..own.end * data.hidden;
        let args = TwoGroupNormArgs {
            hidden_states: operands.input,
            residual: operands.residual,
            bias: Some(operands.bias),
            weight: operands.weight,
            reduce_first_row: 0,
            reduce_tokens: &tokens,
            gather_first_row: 0,
            gather_tokens: &tokens,
            hidden: data.hidden,
            dtype,
            eps: host::EPS,
            weight_offset: data.weight_offset,
        };
        let lay = || {
            self.lay(operands, data, Form { rows, dtype, in_place: true, skip: 0 })?;
            let residual: Vec<f32> = own.clone().map(|index| data.residual(index)).collect();
            self.put(operands.residual, &host::elements(dtype, &residual))
        };
        lay()?;
        let stream = self.memory.stream();
        // SAFETY: here and below, the buffers hold the rows of all ranks and live until the rank's end.
        unsafe {
            match per_token.map(|per_token| operands.quantized(per_token, true)) {
                Some(to) => comm.all_reduce_rmsnorm_two_group_quantized(gather, &args, &to, stream)?,
                None => comm.all_reduce_rmsnorm_two_group(gather, &args, stream)?,
            }
        }
        let found = self.fetch(operands.input, count * size)?;
        let residual = self.fetch(operands.residual, own.len() * size)?;
        let fp8 = self.fp8(operands, (rows, count))?;
        let alone = match per_token {
            None => fp8.clone(),
            Some(per_token) => {
                lay()?;
                let to = operands.quantized(per_token, false);
                // SAFETY: see above.
                unsafe { comm.all_reduce_rmsnorm_two_group_quantized(gather, &args, &to, stream)? };
                self.fp8(operands, (rows, count))?
            }
        };
        let tolerance = host::norm_tolerance(dtype);
        self.must_hold(&what, "result", host::difference(dtype, &results, &found, tolerance));
        self.must_hold(&what, "residual", host::difference(dtype, &updated[own], &residual, 0));
        if let Some(per_token) = per_token {
            let (values, scales) = (host::numbers(dtype, &found), host::numbers(DType::F32, &fp8.1));
            let scale = (!per_token).then_some(SCALE);
            let problem = host::fp8_difference(&values, data.hidden, scale, (&fp8.0, &scales));
            self.must_hold(&what, "fp8 result", problem);
            self.must_hold(&what, "fp8 result alone", host::other_bits(DType::U8, &fp8.0, &alone.0));
            if per_token {
                self.must_hold(&what, "scales alone", host::other_bits(DType::F32, &fp8.1, &alone.1));
            }
        }
        Ok(())
    }
}

impl Operands {
    fn quantized(&self, per_token: bool, keep_unquantized: bool) -> NormQuantization {
        NormQuantization {
            output: self.fp8,
            scale: match per_token {
                true => NormQuantScale::PerToken(self.scales),
                false => NormQuantScale::PerTensor(self.scales),
            },
            keep_unquantized,
        }
    }
}
