//! The decoder layer's small kernels against their functions on the host.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use comm_kernels::layer::{Heads, LayerKernels, UniformBlock, silu_mul};
use common::device;
use half::bf16;

fn bytes(values: impl IntoIterator<Item = bf16>) -> Vec<u8> {
    values.into_iter().flat_map(bf16::to_le_bytes).collect()
}

fn values(bytes: &[u8]) -> Vec<bf16> {
    bytes.chunks_exact(2).map(|pair| bf16::from_le_bytes([pair[0], pair[1]])).collect()
}

/// Random values in `-scale..scale`.
fn random(rows: usize, columns: usize, seed: u64, scale: f32) -> UniformBlock {
    UniformBlock { rows, columns, first_row: 0, first_column: 0, whole_columns: columns, seed, scale }
}

#[test]
fn blocks_of_random_matrices_have_the_host_s_bits() {
    let Some(device) = device() else { return };
    let kernels = LayerKernels::load(device.memory.context()).unwrap();
    for (rows, columns, first_row, first_column) in [(1, 1, 0, 0), (7, 300, 11, 5), (3000, 33, 2, 1000)] {
        let block =
            UniformBlock { first_row, first_column, whole_columns: 1100, ..random(rows, columns, 9, 0.3) };
        let out = device.buffer(rows * columns * 2, 0);
        // SAFETY: the buffer holds the block and outlives the download in `content`.
        unsafe { kernels.uniform(out.addr(), &block, device.stream()).unwrap() };
        assert!(out.content() == bytes(block.values()), "{block:?}");
    }
}

#[test]
fn attention_to_oneself_returns_the_values_of_each_head_s_group() {
    let Some(device) = device() else { return };
    let kernels = LayerKernels::load(device.memory.context()).unwrap();
    for (query, key_value) in [(8, 1), (64, 8), (4, 4)] {
        let heads = Heads { query, key_value, size: 128 };
        for tokens in [1, 5, 70] {
            let (row, width) = (heads.qkv(), query * 128);
            let input: Vec<bf16> = random(tokens, row, 5, 1.0).values().collect();
            let (qkv, out) =
                (device.filled(&bytes(input.iter().copied()), 0), device.buffer(tokens * width * 2, 0));
            // SAFETY: both buffers are as large as the heads say and outlive the download in `content`.
            unsafe { kernels.attend_self(qkv.addr(), out.addr(), tokens, heads, device.stream()).unwrap() };
            let expected = (0..tokens * width).map(|i| input[i / width * row + heads.value_of(i % width)]);
            assert!(out.content() == bytes(expected), "{heads:?} {tokens}");
        }
    }
}

#[test]
fn the_gated_activation_is_the_host_s_to_one_unit_in_the_last_place() {
    let Some(device) = device() else { return };
    let kernels = LayerKernels::load(device.memory.context()).unwrap();
    for (tokens, width) in [(1, 8), (3, 3584), (130, 72)] {
        let input: Vec<bf16> = random(tokens, 2 * width, 7, 12.0).values().collect();
        let (both, out) =
            (device.filled(&bytes(input.iter().copied()), 0), device.buffer(tokens * width * 2, 0));
        // SAFETY: both buffers are as large as the arguments say and outlive the download in `content`.
        unsafe { kernels.silu_mul(both.addr(), out.addr(), tokens, width, device.stream()).unwrap() };
        for (at, found) in values(&out.content()).into_iter().enumerate() {
            let row = &input[at / width * 2 * width..][..2 * width];
            let expected = silu_mul(row[at % width], row[width + at % width]).to_f32();
            let off = (found.to_f32() - expected).abs();
            assert!(off <= expected.abs() / 128.0 + f32::MIN_POSITIVE, "{at}: {found} instead of {expected}");
        }
    }
}
