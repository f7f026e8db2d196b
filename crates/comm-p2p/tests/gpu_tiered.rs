//! Where the check of the devices finds that stores between two of them are lost, calls go over NCCL, and the
//! communicator says why.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::sync::Arc;

use comm_core::{
    CommError, CreateContext, DType, Deadline, DeviceComm as _, DeviceMemory as _, HostComm, OpKind, OpQuery,
    ReduceOp, Registry, SkippedTier, TieredComm, create_with, run_threads,
};
use comm_kernels::CudaMemory;
use comm_nccl::NcclFactory;
use comm_p2p::P2pFactory;
use common::{PATIENT, memory, skipped_where_shared, world_size};

const COUNT: usize = 3001;

/// The size of the world, where ranks have devices of their own: NCCL takes no others.
fn size() -> Option<usize> {
    world_size().filter(|_| !skipped_where_shared("NCCL wants a device for every rank"))
}

fn context(host: &Arc<dyn HostComm>, memory: &CudaMemory, corrupt: Option<&str>) -> CreateContext {
    let options = corrupt.map(|pair| ("p2p.test_corrupt_pair".to_owned(), pair.to_owned()));
    CreateContext {
        timeout: PATIENT,
        options: options.into_iter().collect(),
        ..CreateContext::new(host.clone(), memory.kind())
    }
}

fn tiered(host: &Arc<dyn HostComm>, memory: &CudaMemory, corrupt: Option<&str>) -> Arc<TieredComm> {
    let mut registry = Registry::new();
    registry.register(Box::new(P2pFactory));
    registry.register(Box::new(NcclFactory::new()));
    registry.create_tiered(&["p2p", "nccl"], &context(host, memory, corrupt)).unwrap()
}

/// A sum that goes over `backend` and is right.
fn sums_over(backend: &str, comm: &TieredComm, memory: &CudaMemory) {
    let query = OpQuery::new(OpKind::AllReduce, DType::F32, COUNT).with_reduce(ReduceOp::Sum);
    assert_eq!(comm.backend_for(&query), Some(backend));
    let at = memory.allocate(COUNT * 4).unwrap();
    let own: Vec<u8> = (0..COUNT).flat_map(|i| ((comm.rank() * 1000 + i) as f32).to_le_bytes()).collect();
    let mut found = vec![0; COUNT * 4];
    // SAFETY: the buffer holds as many elements, and the download waits for the sum before it is freed.
    unsafe {
        memory.upload(at, &own).unwrap();
        comm.all_reduce(at, at, COUNT, DType::F32, ReduceOp::Sum, memory.stream()).unwrap();
        memory.download(&mut found, at).unwrap();
        memory.free(at).unwrap();
    }
    // Whole numbers far below 2^24, so the order of the sum does not show.
    let ranks = comm.size();
    let expected = |i: usize| (1000 * ranks * (ranks - 1) / 2 + ranks * i) as f32;
    let wrong = found.chunks_exact(4).zip(0..).filter(|(bytes, i)| *bytes != expected(*i).to_le_bytes());
    assert_eq!(wrong.count(), 0);
    let (used, prefix) = (comm.usage(), format!("{backend}:"));
    assert!(!used.is_empty() && used.iter().all(|used| used.algorithm.starts_with(&prefix)), "{used:?}");
    comm.poll().unwrap();
}

/// The refusal that names the pair, found by the rank that nothing arrives at.
fn names_the_pair(error: &CommError, from: usize, to: usize) {
    let CommError::CreationFailed { cause, .. } = error else { panic!("{error}") };
    let CommError::Unsupported { op: OpKind::Create, reason, .. } = &**cause else { panic!("{cause}") };
    let found = format!("what rank {from}'s GPU stores into rank {to}'s memory does not arrive");
    // Of several pairs it would be one, and be followed by others.
    assert!(reason.contains(&found) && !reason.contains("; "), "{reason}");
}

#[test]
fn a_broken_pair_is_told_of_and_nccl_serves_the_calls() {
    let Some(size) = size() else { return };
    for (from, to) in [(0, 1), (size - 1, 0)] {
        let pair = format!("{from}-{to}");
        let skipped: Vec<Vec<SkippedTier>> = run_threads(size, PATIENT, |host| {
            let memory = memory(host.rank()).unwrap();
            let comm = tiered(&host, &memory, Some(&pair));
            sums_over("nccl", &comm, &memory);
            comm.close().unwrap();
            comm.skipped().to_vec()
        })
        .unwrap();
        for own in &skipped {
            assert_eq!(own, &skipped[0], "the ranks do not say the same");
            let [tier] = &own[..] else { panic!("{own:?}") };
            assert_eq!(tier.backend, "p2p");
            names_the_pair(&tier.reason, from, to);
        }
    }
}

/// A kept verdict of the whole devices does not hide the broken pair, and the broken pair leaves none behind.
#[test]
fn whole_devices_are_served_by_p2p_before_and_after_a_check_that_was_made_to_fail() {
    let Some(size) = size() else { return };
    run_threads(size, PATIENT, |host| {
        let memory = memory(host.rank()).unwrap();
        for corrupt in [None, Some("1-0"), None] {
            let comm = tiered(&host, &memory, corrupt);
            assert_eq!(comm.skipped().len(), usize::from(corrupt.is_some()));
            sums_over(if corrupt.is_some() { "nccl" } else { "p2p" }, &comm, &memory);
            comm.close().unwrap();
        }
    })
    .unwrap();
}

#[test]
fn an_attempt_that_was_refused_leaves_no_memory_behind() {
    let Some(size) = size() else { return };
    run_threads(size, PATIENT, |host| {
        let memory = memory(host.rank()).unwrap();
        let attempt = || {
            let error =
                create_with(&P2pFactory, &context(&host, &memory, Some("0-1"))).map(drop).unwrap_err();
            names_the_pair(&error, 0, 1);
            host.barrier(Deadline::after(PATIENT)).unwrap();
            let (free, total) = memory.context().mem_get_info().unwrap();
            host.barrier(Deadline::after(PATIENT)).unwrap();
            total - free
        };
        // What the first leaves is what the process needs once: modules, for example.
        let first = attempt();
        let last = (0..4).fold(first, |_, _| attempt());
        // Less than a communicator's scratch memory, and what else a driver may round up to.
        assert!(last < first + (16 << 20), "{} MiB more than after the first attempt", (last - first) >> 20);
    })
    .unwrap();
}
