//! What is refused and what is not.

use super::*;
use crate::memory::MemoryKind;

fn info(rank: usize, size: usize) -> CommInfo {
    CommInfo { name: "world".into(), backend: "test".into(), rank, size, memory: MemoryKind::Host }
}

#[test]
fn overlaps_are_refused_unless_in_place() {
    let at = DeviceAddr;
    assert!(same_size(at(256), at(256), 8, DType::F32).is_ok());
    assert!(same_size(at(256), at(288), 8, DType::F32).is_ok());
    assert!(same_size(at(256), at(260), 8, DType::F32).is_err());
    assert!(all_gather(&info(1, 2), at(288), at(256), 8, DType::F32).is_ok());
    assert!(all_gather(&info(0, 2), at(288), at(256), 8, DType::F32).is_err());
    assert!(reduce_scatter(&info(1, 2), at(256), at(288), 8, DType::F32).is_ok());
    assert!(reduce_scatter(&info(0, 2), at(256), at(288), 8, DType::F32).is_err());
    assert!(all_to_all(&info(0, 2), at(256), at(256), 8, DType::F32).is_err());
}

#[test]
fn null_misaligned_and_oversized_are_refused_but_empty_is_not() {
    let at = DeviceAddr;
    assert!(same_size(DeviceAddr::NULL, DeviceAddr::NULL, 0, DType::F32).is_ok());
    assert!(same_size(DeviceAddr::NULL, at(256), 1, DType::F32).is_err());
    assert!(same_size(at(257), at(512), 1, DType::BF16).is_err());
    assert!(same_size(at(256), at(512), usize::MAX / 2, DType::F64).is_err());
    assert!(same_size(at(u64::MAX - 7), at(256), 8, DType::U8).is_err());
    assert!(all_gather_v(&info(0, 3), at(256), at(512), &[1, 2], DType::U8).is_err());
    assert!(broadcast(&info(0, 3), at(256), at(512), 1, DType::U8, 3).is_err());
}

#[test]
fn a_group_may_read_twice_but_not_write_what_is_used() {
    let send = |addr| P2pOp::Send { addr: DeviceAddr(addr), count: 16, dtype: DType::U8, peer: 0 };
    let recv = |addr| P2pOp::Recv { addr: DeviceAddr(addr), count: 16, dtype: DType::U8, peer: 0 };
    assert!(group(&info(0, 2), &[send(256), send(256), recv(512)]).is_ok());
    assert!(group(&info(0, 2), &[send(256), recv(264)]).is_err());
    assert!(group(&info(0, 2), &[recv(256), recv(264)]).is_err());
}

#[test]
fn blocks_lie_side_by_side_or_one_after_another() {
    let block = |row_pitch, rank_stride| Block2d {
        height: 3,
        width: 4,
        row_pitch,
        rank_stride,
        send_pitch: 4,
        dtype: DType::F32,
        first: true,
        last: true,
    };
    let check = |b: &Block2d| all_gather_2d(&info(0, 2), DeviceAddr(4096), DeviceAddr(8192), b);
    assert!(check(&block(8, 4)).is_ok());
    assert!(check(&block(4, 12)).is_ok());
    assert!(check(&block(8, 3)).is_err());
    assert!(check(&block(4, 8)).is_err());
    assert!(check(&block(3, 12)).is_err());
}

#[test]
fn token_counts_and_rows_that_overflow_are_refused() {
    let group = info(0, 1);
    let args = |first, tokens| crate::fused::TwoGroupNormArgs {
        hidden_states: DeviceAddr(4096),
        residual: DeviceAddr(8192),
        bias: None,
        weight: DeviceAddr(256),
        reduce_first_row: first,
        reduce_tokens: tokens,
        gather_first_row: first,
        gather_tokens: tokens,
        hidden: 4,
        dtype: DType::F32,
        eps: 0.0,
        weight_offset: 0.0,
    };
    assert!(two_group_norm(&group, &group, &args(1, &[2])).is_ok());
    assert!(two_group_norm(&group, &group, &args(usize::MAX, &[2])).is_err());
    assert!(two_group_norm(&group, &group, &args(usize::MAX / 2, &[1])).is_err());
}
