//! [`Device`] on the host's memory and processor: slow and plain, so that the program runs, and its results can be
//! checked, on any machine.

use std::time::{Duration, Instant};

use comm_core::{
    Deadline, DeviceAddr, DeviceMemory, HostComm, HostMemory, Result, RmsNormArgs, norm::rmsnorm_host,
};
use comm_kernels::layer::{Heads, UniformBlock, silu_mul};
use half::bf16;

use crate::device::{Device, Effort, Linear, median};

/// Partial sums of a dot product: as many as the compiler can add at once.
const LANES: usize = 16;

/// One rank's part of the host.
#[derive(Default)]
pub struct HostDevice {
    memory: HostMemory,
}

/// # Safety
/// The range is inside a live allocation that nobody writes while the slice lives.
unsafe fn read<'a>(addr: DeviceAddr, count: usize) -> &'a [bf16] {
    // SAFETY: as the caller vouches; allocations are aligned.
    unsafe { std::slice::from_raw_parts(addr.0 as *const bf16, count) }
}

/// # Safety
/// The range is inside a live allocation that nobody else uses while the slice lives.
unsafe fn write<'a>(addr: DeviceAddr, count: usize) -> &'a mut [bf16] {
    // SAFETY: as the caller vouches; allocations are aligned.
    unsafe { std::slice::from_raw_parts_mut(addr.0 as *mut bf16, count) }
}

fn dot(weight: &[bf16], input: &[f32]) -> f32 {
    let mut sums = [0.0_f32; LANES];
    for (w, x) in weight.chunks(LANES).zip(input.chunks(LANES)) {
        for ((sum, w), x) in sums.iter_mut().zip(w).zip(x) {
            *sum += f32::from_bits(u32::from(w.to_bits()) << 16) * x;
        }
    }
    sums.iter().sum()
}

impl Device for HostDevice {
    fn memory(&self) -> &dyn DeviceMemory {
        &self.memory
    }

    fn name(&self) -> String {
        "host memory".into()
    }

    unsafe fn uniform(&self, out: DeviceAddr, block: &UniformBlock) -> Result<()> {
        // SAFETY: the caller vouches for the block's elements.
        let out = unsafe { write(out, block.rows * block.columns) };
        out.iter_mut().zip(block.values()).for_each(|(to, value)| *to = value);
        Ok(())
    }

    unsafe fn linear(
        &self,
        linear: &Linear,
        input: DeviceAddr,
        output: DeviceAddr,
        tokens: usize,
    ) -> Result<()> {
        let &Linear { weight, inputs, outputs } = linear;
        // SAFETY: the caller vouches for the three matrices.
        let (weight, input, output) = unsafe {
            (read(weight, inputs * outputs), read(input, tokens * inputs), write(output, tokens * outputs))
        };
        let mut row = vec![0.0; inputs];
        for (from, to) in input.chunks(inputs).zip(output.chunks_mut(outputs)) {
            row.iter_mut().zip(from).for_each(|(wide, value)| *wide = value.to_f32());
            for (sum, weight) in to.iter_mut().zip(weight.chunks(inputs)) {
                *sum = bf16::from_f32(dot(weight, &row));
            }
        }
        Ok(())
    }

    unsafe fn attend_self(
        &self,
        qkv: DeviceAddr,
        output: DeviceAddr,
        tokens: usize,
        heads: Heads,
    ) -> Result<()> {
        let (row, width) = (heads.qkv(), heads.query * heads.size);
        // SAFETY: the caller vouches for both matrices.
        let (qkv, output) = unsafe { (read(qkv, tokens * row), write(output, tokens * width)) };
        for (from, to) in qkv.chunks(row).zip(output.chunks_mut(width)) {
            to.iter_mut().enumerate().for_each(|(at, value)| *value = from[heads.value_of(at)]);
        }
        Ok(())
    }

    unsafe fn silu_mul(
        &self,
        gate_up: DeviceAddr,
        output: DeviceAddr,
        tokens: usize,
        width: usize,
    ) -> Result<()> {
        // SAFETY: the caller vouches for both matrices.
        let (gate_up, output) = unsafe { (read(gate_up, tokens * 2 * width), write(output, tokens * width)) };
        for (from, to) in gate_up.chunks(2 * width).zip(output.chunks_mut(width)) {
            let (gate, up) = from.split_at(width);
            to.iter_mut().zip(gate.iter().zip(up)).for_each(|(to, (&gate, &up))| *to = silu_mul(gate, up));
        }
        Ok(())
    }

    unsafe fn rmsnorm(&self, args: &RmsNormArgs) -> Result<()> {
        // SAFETY: as the caller vouches.
        unsafe { rmsnorm_host(args) }
    }

    fn time(
        &self,
        host: &dyn HostComm,
        effort: Effort,
        forward: &dyn Fn() -> Result<()>,
    ) -> Result<Duration> {
        let mut samples = Vec::with_capacity(effort.samples);
        for _ in 0..effort.samples {
            host.barrier(Deadline::after(host.timeout()))?;
            let start = Instant::now();
            for _ in 0..effort.passes {
                forward()?;
            }
            samples.push(start.elapsed() / effort.passes.max(1) as u32);
        }
        Ok(median(samples))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_product_by_hand() {
        let device = HostDevice::default();
        let matrix = |values: &[f32]| {
            let addr = device.memory.allocate(values.len() * 2).unwrap();
            let bytes: Vec<u8> =
                values.iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes()).collect();
            // SAFETY: the buffer is as long.
            unsafe { device.memory.upload(addr, &bytes).unwrap() };
            addr
        };
        let weight = matrix(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        let linear = Linear { weight, inputs: 3, outputs: 2 };
        let (input, output) = (matrix(&[1.0, 0.0, -1.0, 2.0, 2.0, 0.0]), matrix(&[0.0; 4]));
        // SAFETY: the three matrices are as large as the arguments say.
        let found = unsafe {
            device.linear(&linear, input, output, 2).unwrap();
            read(output, 4)
        };
        assert_eq!(found.iter().map(|value| value.to_f32()).collect::<Vec<_>>(), [-2.0, -2.0, 6.0, 18.0]);
    }
}
