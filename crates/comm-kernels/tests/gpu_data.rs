//! Generated data and its verification on the device, against the same functions on the host.

#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]
#![allow(
    clippy::undocumented_unsafe_blocks,
    reason = "all buffers are of the right size and outlive the work"
)]

mod common;

use comm_core::{DType, DeviceMemory, ReduceOp};
use comm_kernels::pattern::{self, Expected, Mismatches, Pattern};

const COUNTS: [usize; 9] = [0, 1, 3, 15, 16, 17, 255, 4099, 100_003];

#[test]
fn fill_is_the_same_on_device_and_host() {
    let Some(device) = common::device() else { return };
    for dtype in DType::ALL {
        for op in [None, Some(ReduceOp::Sum), Some(ReduceOp::Prod), Some(ReduceOp::Avg)] {
            let pattern = Pattern::new(0xdead_beef, op, 7);
            for count in COUNTS {
                for offset in [0, 1, 3] {
                    let buffer = device.buffer(count * dtype.size(), offset * dtype.size());
                    let (addr, first) = (buffer.addr(), 1 << 40);
                    unsafe { device.kernels.fill(addr, count, dtype, &pattern, 5, first, device.stream()) }
                        .unwrap();
                    let mut expected = vec![0; count * dtype.size()];
                    pattern::fill(&mut expected, dtype, &pattern, 5, first).unwrap();
                    assert!(buffer.content() == expected, "{dtype} {op:?} count {count} offset {offset}");
                }
            }
        }
    }
}

#[test]
fn reduced_data_verifies_and_one_wrong_element_is_found() {
    let Some(device) = common::device() else { return };
    let count = 5003;
    let result = device.buffer(16, 0);
    for dtype in DType::ALL {
        for op in ReduceOp::ALL {
            for world in [1, 3, 8] {
                let pattern = Pattern::new(77, Some(op), world);
                let what = format!("{dtype} {op} over {world}");
                let inputs: Vec<Vec<u8>> = (0..world)
                    .map(|rank| {
                        let mut bytes = vec![0; count * dtype.size()];
                        pattern::fill(&mut bytes, dtype, &pattern, rank, 9).unwrap();
                        bytes
                    })
                    .collect();
                let inputs: Vec<&[u8]> = inputs.iter().map(Vec::as_slice).collect();
                let mut sums = vec![0; count * dtype.size()];
                comm_kernels::reference::reduce(&inputs, &mut sums, dtype, op).unwrap();
                let expected = Expected::Reduced(op);
                for wrong in [None, Some(0), Some(4001), Some(count - 1)] {
                    let mut bytes = sums.clone();
                    if let Some(index) = wrong {
                        bytes[index * dtype.size()] ^= 1;
                    }
                    let data = device.filled(&bytes, dtype.size());
                    let stream = device.stream();
                    unsafe {
                        device.kernels.verify_reset(result.addr(), stream).unwrap();
                        device
                            .kernels
                            .verify(
                                data.addr(),
                                count,
                                dtype,
                                &pattern,
                                expected,
                                9,
                                1000,
                                result.addr(),
                                stream,
                            )
                            .unwrap();
                    }
                    let found = device.mismatches(&result);
                    assert_eq!(found.wrong, u64::from(wrong.is_some()), "{what}");
                    assert_eq!(found.first, wrong.map(|index| 1000 + index as u64), "{what}");
                    let host = pattern::verify(&bytes, dtype, &pattern, expected, 9, 1000).unwrap();
                    assert_eq!(host, found, "{what}: host and device disagree");
                }
            }
        }
    }
}

#[test]
fn several_verifications_add_up() {
    let Some(device) = common::device() else { return };
    let (result, stream) = (device.buffer(16, 0), device.stream());
    let pattern = Pattern::new(3, None, 4);
    let parts: Vec<_> = (0..4).map(|_| device.buffer(4000, 0)).collect();
    unsafe {
        device.kernels.verify_reset(result.addr(), stream).unwrap();
        for (rank, part) in parts.iter().enumerate() {
            // Rank 2's part holds rank 0's data.
            let filled = if rank == 2 { 0 } else { rank };
            device.kernels.fill(part.addr(), 1000, DType::F32, &pattern, filled, 0, stream).unwrap();
            let (base, expected) = (1000 * rank as u64, Expected::Sent(rank));
            device
                .kernels
                .verify(part.addr(), 1000, DType::F32, &pattern, expected, 0, base, result.addr(), stream)
                .unwrap();
        }
    }
    assert_eq!(device.mismatches(&result), Mismatches { wrong: 1000, first: Some(2000) });
}

#[test]
fn more_than_two_to_the_31_elements() {
    let Some(device) = common::device() else { return };
    let count = (1_usize << 32) + 12_345;
    let (free, _) = device.memory.context().mem_get_info().unwrap();
    if free < count + (1 << 30) {
        println!("SKIP: {free} bytes of device memory are free, {count} are needed");
        return;
    }
    let (memory, stream, result) = (&device.memory, device.stream(), device.buffer(16, 0));
    let pattern = Pattern::new(21, Some(ReduceOp::Sum), 1);
    let addr = memory.allocate(count).unwrap();
    let last = addr.offset(count as u64 - 1);
    let verify = || unsafe {
        device.kernels.verify_reset(result.addr(), stream).unwrap();
        let expected = Expected::Reduced(ReduceOp::Sum);
        device
            .kernels
            .verify(addr, count, DType::U8, &pattern, expected, 0, 0, result.addr(), stream)
            .unwrap();
    };
    unsafe {
        device.kernels.fill(addr, count, DType::U8, &pattern, 0, 0, stream).unwrap();
        // A reduction of one buffer, in place, changes nothing.
        device.kernels.reduce(&[addr], addr, count, DType::U8, ReduceOp::Sum, stream).unwrap();
        verify();
        assert_eq!(device.mismatches(&result), Mismatches::default());
        let mut byte = [0];
        memory.download(&mut byte, last).unwrap();
        memory.upload(last, &[byte[0] ^ 0x80]).unwrap();
        verify();
        assert_eq!(device.mismatches(&result), Mismatches { wrong: 1, first: Some(count as u64 - 1) });
        memory.free(addr).unwrap();
    }
}

#[test]
fn bad_arguments_are_refused() {
    let Some(device) = common::device() else { return };
    let (buffer, stream, pattern) = (device.buffer(64, 0), device.stream(), Pattern::new(1, None, 2));
    let null = comm_core::DeviceAddr::NULL;
    unsafe {
        let kernels = &device.kernels;
        assert!(kernels.fill(null, 1, DType::U8, &pattern, 0, 0, stream).is_err());
        assert!(kernels.fill(buffer.addr().offset(1), 1, DType::F32, &pattern, 0, 0, stream).is_err());
        assert!(kernels.fill(buffer.addr(), usize::MAX, DType::F32, &pattern, 0, 0, stream).is_err());
        assert!(kernels.verify_reset(null, stream).is_err());
        let at = buffer.addr();
        let inside = kernels.verify(at, 64, DType::U8, &pattern, Expected::Sent(0), 0, 0, at, stream);
        assert!(inside.is_err());
        assert!(kernels.fill(null, 0, DType::U8, &pattern, 0, 0, stream).is_ok());
    }
}
