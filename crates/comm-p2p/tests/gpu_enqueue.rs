//! What enqueueing a collective costs the host, over the driver's own launch.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::ffi::c_void;
use std::time::{Duration, Instant};

use comm_core::{DType, Deadline, DeviceMemory as _, ReduceOp};
use comm_kernels::raw;
use common::{PATIENT, Rank, skipped_where_shared, world, world_size};
use cudarc::driver::sys;

/// The most that a call may cost beyond a launch.
const LIMIT: Duration = Duration::from_micros(3);
/// Calls in a row: few enough that the driver's queue never fills, which would make the host wait for the device.
const BURST: usize = 100;
const BURSTS: usize = 60;

/// A kernel that does nothing, with a parameter block as large as an all-reduce's.
const EMPTY: &str = "\
.version 7.8
.target sm_90
.address_size 64
.visible .entry empty(.param .align 8 .b8 link[144], .param .u64 send, .param .u64 recv, .param .u64 count)
{
    ret;
}
\0";

struct Empty {
    function: sys::CUfunction,
}

impl Empty {
    /// The context is current. The module stays until the context goes.
    fn load() -> Self {
        let (mut module, mut function) = (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: the text ends with a zero; the pointers are valid for the writes.
        unsafe {
            raw::check("cuModuleLoadData", sys::cuModuleLoadData(&raw mut module, EMPTY.as_ptr().cast()))
                .unwrap();
            let found = sys::cuModuleGetFunction(&raw mut function, module, c"empty".as_ptr());
            raw::check("cuModuleGetFunction", found).unwrap();
        }
        Self { function }
    }

    fn launch(&self, grid: u32, block: u32, stream: sys::CUstream) {
        let (mut link, mut words) = ([0_u8; 144], [0_u64; 3]);
        let [send, recv, count] = &mut words;
        let mut parameters: [*mut c_void; 4] = [
            link.as_mut_ptr().cast(),
            std::ptr::from_mut(send).cast(),
            std::ptr::from_mut(recv).cast(),
            std::ptr::from_mut(count).cast(),
        ];
        // SAFETY: the structures are plain data, for which zero is a valid value.
        let mut attribute: sys::CUlaunchAttribute = unsafe { std::mem::zeroed() };
        attribute.id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
        attribute.value.programmaticStreamSerializationAllowed = 1;
        // SAFETY: as above.
        let mut config: sys::CUlaunchConfig = unsafe { std::mem::zeroed() };
        (config.gridDimX, config.gridDimY, config.gridDimZ) = (grid, 1, 1);
        (config.blockDimX, config.blockDimY, config.blockDimZ) = (block, 1, 1);
        config.hStream = stream;
        config.attrs = &raw mut attribute;
        config.numAttrs = 1;
        // SAFETY: the configuration and the parameters outlive the call; the kernel reads none of them.
        let code = unsafe {
            sys::cuLaunchKernelEx(
                &raw const config,
                self.function,
                parameters.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        };
        raw::check("cuLaunchKernelEx", code).unwrap();
    }
}

/// The median over bursts of the host's time for one call. All ranks make their bursts at the same time.
fn per_call(rank: &Rank, mut call: impl FnMut()) -> Duration {
    let mut bursts: Vec<Duration> = (0..BURSTS)
        .map(|_| {
            rank.memory.synchronize().unwrap();
            rank.host.barrier(Deadline::after(PATIENT)).unwrap();
            let start = Instant::now();
            (0..BURST).for_each(|_| call());
            start.elapsed() / BURST as u32
        })
        .collect();
    rank.memory.synchronize().unwrap();
    bursts.sort_unstable();
    bursts[BURSTS / 2]
}

#[test]
fn a_call_costs_little_more_than_a_launch() {
    let Some(size) = world_size() else { return };
    if skipped_where_shared("times mean nothing") {
        return;
    }
    let lines = world(size, PATIENT, &[], |rank| {
        let most = 64 << 10;
        let (send, recv) = (rank.buffer(most, 1.0), rank.buffer(most, 0.0));
        let _current = raw::Current::enter(rank.memory.context()).unwrap();
        let empty = Empty::load();
        let stream = rank.stream();
        let launched = per_call(&rank, || empty.launch(8, 128, raw::stream(stream)));
        let mut costs = Vec::new();
        // In one hop, in two, and an all-gather.
        for count in [1024, most] {
            let cost = per_call(&rank, || rank.sum(send, recv, count).unwrap());
            costs.push((format!("all_reduce of {} bytes", count * 4), cost));
        }
        let part = 1024 / size;
        let cost = per_call(&rank, || {
            // SAFETY: the buffers are large enough and outlive the work.
            unsafe { rank.comm.all_gather(send, recv, part, DType::F32, stream).unwrap() };
        });
        costs.push((format!("all_gather of {} bytes a rank", part * 4), cost));
        // Twice the same, to see what the measurement itself is worth.
        let again = per_call(&rank, || empty.launch(8, 128, raw::stream(stream)));
        // SAFETY: as above.
        let staged = per_call(&rank, || unsafe {
            rank.comm.all_reduce(send, recv, 64, DType::F32, ReduceOp::Max, stream).unwrap();
        });
        println!(
            "rank {}: cuLaunchKernelEx {launched:?} and {again:?}; {}; staged, for comparison: {staged:?} for five \
             launches",
            rank.rank,
            costs.iter().map(|(name, cost)| format!("{name} {cost:?}")).collect::<Vec<_>>().join("; ")
        );
        rank.comm.close().unwrap();
        (launched.max(again), costs)
    });
    if cfg!(debug_assertions) {
        println!("SKIP: the limit is for optimised builds (cargo test --release)");
        return;
    }
    for (rank, (launched, costs)) in lines.into_iter().enumerate() {
        for (name, cost) in costs {
            let over = cost.saturating_sub(launched);
            assert!(over <= LIMIT, "rank {rank}: {name} costs {over:?} more than a launch of {launched:?}");
        }
    }
}
