//! Operands of more than 4 GiB, whose sizes and offsets no 32-bit number holds.

#![cfg(feature = "host-backend")]
#![allow(clippy::unwrap_used, reason = "tests")]

mod host_backend_support;

use std::time::Duration;

use comm_core::{DType, DeviceAddr, StreamHandle, run_threads};
use host_backend_support::{context, create};

const COUNT: usize = (4 << 30) + 3;
/// What the test touches at most, and a margin.
const NEEDED: usize = 10 << 30;
/// Places in an operand: its ends, and both sides of where 31 and 32 bits end.
const PLACES: [usize; 8] = [0, 1, (2 << 30) - 1, 2 << 30, (4 << 30) - 1, 4 << 30, COUNT - 2, COUNT - 1];

fn available() -> usize {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() * 1024
}

/// A byte that depends on the place and the rank, and is never zero.
fn mark(rank: usize, place: usize) -> u8 {
    1 + ((place ^ place >> 29).wrapping_mul(37) + rank * 101) as u8 % 255
}

#[test]
fn more_than_four_gigabytes() {
    if available() < NEEDED {
        println!("SKIP: needs {} GiB of free memory, there are {}", NEEDED >> 30, available() >> 30);
        return;
    }
    let timeout = Duration::from_secs(120);
    run_threads(2, timeout, |host| {
        let comm = create(&context(host, "direct", timeout, false));
        let rank = comm.rank();
        // Rank 0 is in place throughout. Zeroed memory takes room only where it is written, so its operand costs nothing;
        // rank 1's is written by both operations.
        let mut all = vec![0_u8; COUNT + 5];
        let to = DeviceAddr::of_slice_mut(&mut all);
        if rank == 0 {
            for place in PLACES {
                all[place] = mark(0, place);
            }
        }
        // SAFETY: in place on the root, and the others ignore `send`; `all` holds COUNT elements.
        unsafe { comm.broadcast(to, to, COUNT, DType::U8, 0, StreamHandle::NULL).unwrap() };
        check(&mut all, rank, "broadcast");
        let mine = [mark(1, 0), mark(1, 1), mark(1, 2), mark(1, 3), mark(1, 4)];
        // Rank 1's part lies beyond 4 GiB.
        let from = if rank == 0 { to } else { DeviceAddr::of_slice(&mine) };
        // SAFETY: in place on rank 0; on rank 1 `mine` holds its count. `all` holds both.
        unsafe { comm.all_gather_v(from, to, &[COUNT, 5], DType::U8, StreamHandle::NULL).unwrap() };
        assert_eq!(all[COUNT..], mine);
        all.truncate(COUNT);
        check(&mut all, rank, "all_gather_v");
        comm.close().unwrap();
    })
    .unwrap();
}

/// Rank 0's operand must still hold its marks, and rank 1's exactly those: they are taken out there, so that the next
/// operation has to bring them again.
fn check(all: &mut [u8], rank: usize, what: &str) {
    for place in PLACES {
        assert_eq!(all[place], mark(0, place), "{what} on rank {rank}, place {place}");
    }
    if rank == 1 {
        PLACES.iter().for_each(|&place| all[place] = 0);
        let zeros = vec![0_u8; 1 << 20];
        assert!(all.chunks(zeros.len()).all(|chunk| *chunk == zeros[..chunk.len()]), "{what}: a stray byte");
    }
}
