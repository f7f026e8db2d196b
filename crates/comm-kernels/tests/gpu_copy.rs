//! Copies of rows on the device, and the word that keeps them from being made.

#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]
#![allow(
    clippy::undocumented_unsafe_blocks,
    reason = "all buffers are of the right size and outlive the work"
)]

mod common;

use comm_core::DeviceAddr;

fn bytes(count: usize) -> Vec<u8> {
    (0..count).map(|i| (i * 31 + i / 251) as u8).collect()
}

/// What lies between the rows of the destination must stay: its guard.
fn check(
    device: &common::Device,
    (rows, width): (usize, usize),
    pitches: (usize, usize),
    phases: (usize, usize),
) {
    let content = bytes((rows - 1) * pitches.0 + width);
    let from = device.filled(&content, phases.0);
    let to = device.buffer((rows - 1) * pitches.1 + width, phases.1);
    let mut expected = vec![common::GUARD; (rows - 1) * pitches.1 + width];
    for row in 0..rows {
        expected[row * pitches.1..][..width].copy_from_slice(&content[row * pitches.0..][..width]);
    }
    let (source, target) = ((from.addr(), pitches.0), (to.addr(), pitches.1));
    let (kernels, none, stream) = (&device.kernels, DeviceAddr::NULL, device.stream());
    unsafe { kernels.copy_rows_unless(none, source, target, width, rows, stream) }.unwrap();
    assert!(to.content() == expected, "{rows} rows of {width}, pitches {pitches:?}, phases {phases:?}");
}

#[test]
fn rows_of_every_unit() {
    let Some(device) = common::device() else { return };
    for (rows, width) in [(1, 1), (1, 100_000), (3, 16), (7, 48), (1000, 2), (257, 1028), (33, 6000)] {
        for (more_from, more_to) in [(0, 0), (16, 0), (0, 8), (5, 3), (2, 64)] {
            for phases in [(0, 0), (1, 0), (2, 4), (16, 8)] {
                check(&device, (rows, width), (width + more_from, width + more_to), phases);
            }
        }
    }
}

#[test]
fn a_word_stops_them() {
    let Some(device) = common::device() else { return };
    let content = bytes(4096);
    let (from, stream, kernels) = (device.filled(&content, 0), device.stream(), &device.kernels);
    for set in [0_u32, 1, 0x100] {
        let word = device.filled(&set.to_le_bytes(), 0);
        // By every unit.
        for width in [64, 8, 4, 2, 1] {
            let to = device.buffer(4096, 0);
            let (source, target) = ((from.addr(), width), (to.addr(), width));
            unsafe {
                kernels.copy_rows_unless(word.addr(), source, target, width, 4096 / width, stream).unwrap();
            }
            let expected = if set == 0 { content.clone() } else { vec![common::GUARD; 4096] };
            assert!(to.content() == expected, "{set:#x}, rows of {width}");
        }
    }
}

#[test]
fn nothing_to_do_and_bad_arguments() {
    let Some(device) = common::device() else { return };
    let (kernels, buffer, stream) = (&device.kernels, device.buffer(64, 0), device.stream());
    let (none, null, at) = (DeviceAddr::NULL, (DeviceAddr::NULL, 8), (buffer.addr(), 8));
    unsafe {
        assert!(kernels.copy_rows_unless(none, null, null, 0, 4, stream).is_ok());
        assert!(kernels.copy_rows_unless(none, null, null, 4, 0, stream).is_ok());
        assert!(kernels.copy_rows_unless(none, null, at, 4, 1, stream).is_err());
        assert!(kernels.copy_rows_unless(none, at, null, 4, 1, stream).is_err());
    }
}
