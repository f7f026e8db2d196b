//! Barriers with a rank that is late: what is behind one on any rank's stream starts after what is before it on all.
//!
//! That is seen on the host, by functions that the streams call on either side of each barrier.

use std::ffi::c_void;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use comm_core::DeviceMemory as _;
use cudarc::driver::result::stream::launch_host_function;
use cudarc::driver::sys::CUstream;

use super::STALL;
use crate::common::{PATIENT, Rank, world};
use crate::data::{SMALL, timed};
use crate::setting::two_worlds;

const BARRIERS: usize = 60;
const LATE: Duration = Duration::from_micros(300);

/// Of all ranks together: how many came to a barrier, and how many left one to which somebody had yet to come.
#[derive(Default)]
struct Crowd {
    came: AtomicUsize,
    early: AtomicUsize,
}

/// One rank's way through one barrier.
struct Passage {
    crowd: &'static Crowd,
    /// Who must have come by the time that it leaves: all ranks to this barrier and those before.
    all: usize,
    late: bool,
}

unsafe extern "C" fn come(passage: *mut c_void) {
    // SAFETY: `enqueue` passes one that lives for ever.
    let passage = unsafe { &*passage.cast::<Passage>() };
    if passage.late {
        std::thread::sleep(LATE);
    }
    passage.crowd.came.fetch_add(1, Ordering::SeqCst);
}

unsafe extern "C" fn leave(passage: *mut c_void) {
    // SAFETY: as above.
    let passage = unsafe { &*passage.cast::<Passage>() };
    if passage.crowd.came.load(Ordering::SeqCst) < passage.all {
        passage.crowd.early.fetch_add(1, Ordering::SeqCst);
    }
}

fn enqueue(rank: &Rank, function: unsafe extern "C" fn(*mut c_void), passage: &'static Passage) {
    let (stream, passage) = (rank.stream().0 as usize as CUstream, std::ptr::from_ref(passage).cast_mut());
    unsafe { launch_host_function(stream, function, passage.cast()).unwrap() };
}

/// How many left early. `meets`: whether there are barriers at all.
fn early(size: usize, late: usize, meets: bool) -> usize {
    // For ever, because the driver may call a function after the test has failed.
    let crowd: &'static Crowd = Box::leak(Box::default());
    let late_rank = late.to_string();
    let options = [&SMALL[..], &[("p2p.stall_ns", STALL), ("p2p.stall_rank", &late_rank)]].concat();
    world(size, PATIENT, &options, |rank| {
        rank.meet();
        for turn in 1..=BARRIERS {
            let late = rank.rank == late;
            let passage: &'static _ = Box::leak(Box::new(Passage { crowd, all: size * turn, late }));
            enqueue(&rank, come, passage);
            if meets {
                unsafe { rank.comm.barrier(rank.stream()).unwrap() };
            }
            enqueue(&rank, leave, passage);
        }
        rank.memory.synchronize().unwrap();
        rank.comm.close().unwrap();
    });
    crowd.early.load(Ordering::SeqCst)
}

#[test]
fn nobody_leaves_a_barrier_before_a_late_rank_has_come() {
    timed("stall, barriers", || {
        for size in two_worlds() {
            for late in [0, size - 1] {
                assert_eq!(early(size, late, true), 0, "{size} ranks, rank {late} is late");
            }
            // The control.
            assert_ne!(early(size, 0, false), 0, "without a barrier nobody was early");
        }
    });
}
