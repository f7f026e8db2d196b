//! Operands of more than 4 GiB, whose sizes and offsets no 32-bit number holds.

#![cfg(feature = "host-backend")]
#![allow(clippy::unwrap_used, reason = "tests")]

mod host_backend_support;

use comm_core::{DType, DeviceAddr, StreamHandle};
use host_backend_support::on_ranks;

const COUNT: usize = (4 << 30) + 3;
/// What the test touches at most, and a margin.
const NEEDED: usize = 14 << 30;
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
    on_ranks(2, "direct", |comm| {
        let rank = comm.rank();
        // Zeroed memory takes room only where it is written, so the operands that are read cost next to nothing.
        let mut send = vec![0_u8; COUNT];
        for place in PLACES {
            send[place] = mark(rank, place);
        }
        // Room for a whole broadcast, and on rank 1 for the gathered parts of both ranks.
        let gathers = rank == 1;
        let mut recv = vec![0_u8; if gathers { COUNT } else { 0 }];
        let (from, to) = (DeviceAddr::of_slice_mut(&mut send), DeviceAddr::of_slice_mut(&mut recv));
        // SAFETY: on rank 0 the broadcast is in place, and on rank 1 `recv` holds COUNT elements.
        unsafe {
            let to = if gathers { to } else { from };
            comm.broadcast(from, to, COUNT, DType::U8, 0, StreamHandle::NULL).unwrap();
        }
        if gathers {
            for place in PLACES {
                assert_eq!(recv[place], mark(0, place), "broadcast, place {place}");
            }
            assert_eq!(recv.iter().filter(|byte| **byte != 0).count(), PLACES.len());
        }
        drop(recv);
        // Rank 0's part is longer than 4 GiB, so rank 1's lies beyond: uneven, so that one copy is enough.
        let counts = [COUNT, 5];
        let mut all = vec![0_u8; COUNT + 5];
        let to = DeviceAddr::of_slice_mut(&mut all);
        // SAFETY: `send` holds at least the rank's count and `all` both.
        unsafe { comm.all_gather_v(from, to, &counts, DType::U8, StreamHandle::NULL).unwrap() };
        for place in PLACES {
            assert_eq!(all[place], mark(0, place), "all_gather_v, place {place}");
        }
        assert_eq!(all[COUNT..], [mark(1, 0), mark(1, 1), 0, 0, 0]);
        comm.close().unwrap();
    });
}
