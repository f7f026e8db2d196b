//! The element-wise reduction on the device, against the reference on the host.

#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]
#![allow(
    clippy::undocumented_unsafe_blocks,
    reason = "all buffers are of the right size and outlive the work"
)]

mod common;

use comm_core::{DType, F8E4M3, F8E5M2, ReduceOp};
use comm_kernels::pattern::{self, Pattern};
use comm_kernels::reference;
use half::{bf16, f16};

/// Whether two elements are equal bit for bit, or both NaN: NaNs may differ in their payload.
fn same(dtype: DType, a: &[u8], b: &[u8]) -> bool {
    fn nan(dtype: DType, raw: &[u8]) -> bool {
        match dtype {
            DType::F64 => f64::from_le_bytes(raw.try_into().unwrap()).is_nan(),
            DType::F32 => f32::from_le_bytes(raw.try_into().unwrap()).is_nan(),
            DType::F16 => f16::from_le_bytes(raw.try_into().unwrap()).is_nan(),
            DType::BF16 => bf16::from_le_bytes(raw.try_into().unwrap()).is_nan(),
            DType::F8E4M3 => F8E4M3::from_bits(raw[0]).to_f32().is_nan(),
            DType::F8E5M2 => F8E5M2::from_bits(raw[0]).to_f32().is_nan(),
            _ => false,
        }
    }
    a == b || (nan(dtype, a) && nan(dtype, b))
}

/// `phases`: how far each input lies from alignment, in elements, in turn; the last one is the output's.
fn check(device: &common::Device, dtype: DType, op: ReduceOp, number: usize, count: usize, phases: &[usize]) {
    // Any bits at all: infinities, NaNs, subnormals and every rounding occur.
    let pattern = Pattern::new(count as u64, None, 1);
    let contents: Vec<Vec<u8>> = (0..number)
        .map(|rank| {
            let mut bytes = vec![0; count * dtype.size()];
            pattern::fill(&mut bytes, dtype, &pattern, rank, 0).unwrap();
            bytes
        })
        .collect();
    let slices: Vec<&[u8]> = contents.iter().map(Vec::as_slice).collect();
    let mut expected = vec![0; count * dtype.size()];
    reference::reduce(&slices, &mut expected, dtype, op).unwrap();

    let buffers: Vec<_> = contents
        .iter()
        .zip(phases.iter().cycle())
        .map(|(bytes, phase)| device.filled(bytes, phase * dtype.size()))
        .collect();
    let inputs: Vec<_> = buffers.iter().map(common::Buffer::addr).collect();
    let output = device.buffer(count * dtype.size(), phases[phases.len() - 1] * dtype.size());
    for in_place in [false, true] {
        let target = if in_place { &buffers[number - 1] } else { &output };
        unsafe { device.kernels.reduce(&inputs, target.addr(), count, dtype, op, device.stream()) }.unwrap();
        let result = target.content();
        let mut pairs = result.chunks(dtype.size()).zip(expected.chunks(dtype.size()));
        let wrong = pairs.position(|(a, b)| !same(dtype, a, b));
        assert_eq!(
            wrong, None,
            "{dtype} {op} of {number}, count {count}, phases {phases:?}, in place {in_place}"
        );
    }
    for (buffer, bytes) in buffers.iter().zip(&contents).take(number - 1) {
        assert!(buffer.content() == *bytes, "an input was written");
    }
}

#[test]
fn every_type_and_reduction() {
    let Some(device) = common::device() else { return };
    for dtype in DType::ALL {
        for op in ReduceOp::ALL {
            for number in [1, 2, 5, 8] {
                check(&device, dtype, op, number, 2051, &[0]);
            }
        }
    }
}

#[test]
fn every_number_of_inputs() {
    let Some(device) = common::device() else { return };
    for number in 1..=comm_kernels::MAX_REDUCE_INPUTS {
        check(&device, DType::BF16, ReduceOp::Sum, number, 1000, &[0]);
        check(&device, DType::F8E4M3, ReduceOp::Avg, number, 77, &[0]);
    }
}

#[test]
fn odd_counts_and_misaligned_buffers() {
    let Some(device) = common::device() else { return };
    for dtype in [DType::F64, DType::F32, DType::BF16, DType::U8] {
        for count in [1, 2, 15, 16, 17, 31, 4097, 300_001] {
            for phases in [&[1][..], &[3], &[0, 1], &[1, 0, 2]] {
                check(&device, dtype, ReduceOp::Sum, 3, count, phases);
            }
        }
    }
}

#[test]
fn nothing_to_do_and_bad_arguments() {
    let Some(device) = common::device() else { return };
    let (buffer, stream) = (device.buffer(64, 0), device.stream());
    let (at, null) = (buffer.addr(), comm_core::DeviceAddr::NULL);
    let kernels = &device.kernels;
    unsafe {
        assert!(kernels.reduce(&[null], null, 0, DType::F32, ReduceOp::Sum, stream).is_ok());
        assert!(kernels.reduce(&[], at, 4, DType::F32, ReduceOp::Sum, stream).is_err());
        assert!(kernels.reduce(&[at], at.offset(4), 4, DType::F32, ReduceOp::Sum, stream).is_err());
    }
}

#[test]
fn nothing_is_done_while_the_word_is_set() {
    let Some(device) = common::device() else { return };
    let (kernels, stream) = (&device.kernels, device.stream());
    let content: Vec<u8> = (0..12_000).map(|i| (i % 251) as u8).collect();
    for word in [0_u32, 1, 0x100] {
        let unless = device.filled(&word.to_le_bytes(), 0);
        let (from, to) = (device.filled(&content, 0), device.buffer(content.len(), 0));
        let what = (DType::U8, ReduceOp::Sum);
        unsafe {
            let inputs = [from.addr()];
            kernels.reduce_unless(unless.addr(), &inputs, to.addr(), content.len(), what, stream).unwrap();
        }
        let expected = if word == 0 { content.clone() } else { vec![common::GUARD; content.len()] };
        assert!(to.content() == expected, "the word is {word:#x}");
    }
}
