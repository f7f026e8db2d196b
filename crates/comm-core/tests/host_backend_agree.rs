//! Where the ranks of a host communicator must be of one mind: what they free, what they normalise, memory that one of
//! them cannot have, and reads that the kernel refuses one of them.

#![cfg(feature = "host-backend")]
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod host_backend_support;

use std::sync::Arc;
use std::time::Duration;

use comm_core::{
    CommError, DType, DeviceAddr, DeviceComm, OpKind, P2pOp, ReduceOp, RmsNormArgs, StreamHandle,
    TwoGroupNormArgs, run_threads,
};
use host_backend_support::{TRANSPORTS, context, create};

const S: StreamHandle = StreamHandle::NULL;
const T: Duration = Duration::from_secs(5);

fn on_ranks(size: usize, transport: &str, checked: bool, rank_main: impl Fn(Arc<dyn DeviceComm>) + Sync) {
    run_threads(size, 2 * T, |host| rank_main(create(&context(host, transport, T, checked)))).unwrap();
}

#[track_caller]
fn refused(result: Result<(), CommError>, op: OpKind) {
    let error = result.unwrap_err();
    assert!(matches!(&error, CommError::Mismatch { at, .. } if at.op == op), "{error:?}");
}

fn works(comm: &dyn DeviceComm) {
    let mut ones = [1_i32; 5];
    let place = DeviceAddr::of_slice_mut(&mut ones);
    // SAFETY: in place in an array of five elements.
    unsafe { comm.all_reduce(place, place, 5, DType::I32, ReduceOp::Sum, S).unwrap() };
    assert_eq!(ones, [comm.size() as i32; 5]);
}

#[test]
fn freeing_different_allocations_is_refused_everywhere() {
    for transport in TRANSPORTS {
        on_ranks(2, transport, true, |comm| {
            let own = [comm.allocate(4096).unwrap(), comm.allocate(4096).unwrap()];
            // SAFETY: nothing uses the allocations.
            unsafe {
                refused(comm.free(own[comm.rank()]), OpKind::Free);
                works(&*comm);
                own.into_iter().for_each(|addr| comm.free(addr).unwrap());
            }
            comm.close().unwrap();
        });
    }
}

#[test]
fn deregistering_different_ranges_is_refused_everywhere() {
    on_ranks(2, "direct", true, |comm| {
        let memory = [0_u8; 64];
        let at = DeviceAddr::of_slice(&memory);
        // SAFETY: the array outlives both registrations, and nothing uses it.
        unsafe {
            let own = [comm.register(at, 32).unwrap(), comm.register(at.offset(32), 32).unwrap()];
            refused(comm.deregister(&own[comm.rank()]), OpKind::Deregister);
            works(&*comm);
            own.iter().for_each(|registration| comm.deregister(registration).unwrap());
        }
        comm.close().unwrap();
    });
}

#[test]
fn memory_that_there_is_not_harms_no_communicator() {
    for transport in TRANSPORTS {
        on_ranks(3, transport, false, |comm| {
            for bytes in [1 << 50, usize::MAX] {
                let error = comm.allocate(bytes).unwrap_err();
                assert!(matches!(error, CommError::InvalidArgument { .. }), "{error:?}");
            }
            works(&*comm);
            let addr = comm.allocate(4096).unwrap();
            // SAFETY: nothing uses the allocation.
            unsafe { comm.free(addr).unwrap() };
            comm.close().unwrap();
        });
    }
}

#[test]
fn norms_of_different_shapes_are_refused_everywhere() {
    for transport in TRANSPORTS {
        on_ranks(2, transport, true, |comm| {
            let odd = comm.rank() == 1;
            let (mut input, residual, weight) = ([1_f32; 16], [2_f32; 16], [1_f32; 16]);
            let mut residual_out = [7_f32; 16];
            let place = DeviceAddr::of_slice_mut(&mut input);
            let args = RmsNormArgs {
                input: place,
                residual: DeviceAddr::of_slice(&residual),
                residual_out: DeviceAddr::of_slice_mut(&mut residual_out),
                bias: None,
                weight: DeviceAddr::of_slice(&weight),
                output: place,
                tokens: 2,
                hidden: 8,
                dtype: DType::F32,
                eps: 1e-5,
                weight_offset: 0.0,
            };
            let others = [
                RmsNormArgs { tokens: 4, hidden: 4, ..args },
                RmsNormArgs { eps: 1e-6, ..args },
                RmsNormArgs { weight_offset: 1.0, ..args },
                RmsNormArgs { bias: Some(DeviceAddr::of_slice(&weight)), ..args },
            ];
            // SAFETY: every operand holds sixteen elements.
            unsafe {
                for other in others {
                    let args = if odd { &other } else { &args };
                    refused(comm.all_reduce_rmsnorm(args, S), OpKind::AllReduceRmsNorm);
                }
                if odd {
                    let sum = comm.all_reduce(place, place, 16, DType::F32, ReduceOp::Sum, S);
                    refused(sum, OpKind::AllReduce);
                } else {
                    refused(comm.all_reduce_rmsnorm(&args, S), OpKind::AllReduceRmsNorm);
                }
            }
            assert_eq!((input, residual_out), ([1.0; 16], [7.0; 16]), "no data moved");
            works(&*comm);
            comm.close().unwrap();
        });
    }
}

#[test]
fn norms_of_two_groups_that_differ_are_refused_everywhere() {
    const KIND: OpKind = OpKind::AllReduceRmsNormTwoGroup;
    for transport in TRANSPORTS {
        on_ranks(2, transport, true, |comm| {
            let odd = comm.rank() == 1;
            // Reduces alone, so that only the gather group can tell, and the other way round.
            let alone = comm.split(Some(comm.rank() as u32), 0).unwrap().unwrap();
            let both = comm.split(Some(0), 0).unwrap().unwrap();
            let (mut states, mut residual, weight) = ([1_f32; 16], [2_f32; 16], [1_f32; 16]);
            let args = TwoGroupNormArgs {
                hidden_states: DeviceAddr::of_slice_mut(&mut states),
                residual: DeviceAddr::of_slice_mut(&mut residual),
                bias: None,
                weight: DeviceAddr::of_slice(&weight),
                reduce_first_row: usize::from(odd),
                reduce_tokens: &[1],
                gather_first_row: 0,
                gather_tokens: &[1, 1],
                hidden: 8,
                dtype: DType::F32,
                eps: if odd { 1e-5 } else { 1e-6 },
                weight_offset: 0.0,
            };
            // SAFETY: every operand holds sixteen elements.
            unsafe {
                refused(alone.all_reduce_rmsnorm_two_group(&*both, &args, S), KIND);
                let args = TwoGroupNormArgs {
                    reduce_first_row: 0,
                    reduce_tokens: &[1, 1],
                    gather_first_row: usize::from(odd),
                    gather_tokens: &[1],
                    ..args
                };
                refused(both.all_reduce_rmsnorm_two_group(&*alone, &args, S), KIND);
            }
            assert_eq!((states, residual), ([1.0; 16], [2.0; 16]), "no data moved");
            [&both, &alone, &comm].into_iter().for_each(|comm| works(&**comm));
            [&both, &alone, &comm].into_iter().for_each(|comm| comm.close().unwrap());
        });
    }
}

/// Makes the kernel refuse this thread to read other processes' memory, as a sandbox that is entered late does.
fn forbid_reading() {
    let instruction = |code: u32, jf: u8, k: u32| libc::sock_filter { code: code as u16, jt: 0, jf, k };
    let refusal = libc::SECCOMP_RET_ERRNO | libc::EPERM as u32;
    let mut program = [
        instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0),
        instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 1, libc::SYS_process_vm_readv as u32),
        instruction(libc::BPF_RET | libc::BPF_K, 0, refusal),
        instruction(libc::BPF_RET | libc::BPF_K, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: the filter and its program live until the calls return; they concern this thread alone.
    let done = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
            && libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const filter) == 0
    };
    assert!(done, "{}", std::io::Error::last_os_error());
}

#[test]
fn a_gather_that_the_kernel_refuses_one_rank_is_staged_for_all() {
    const COUNT: usize = 300_000;
    on_ranks(3, "shm", false, |comm| {
        let rank = comm.rank();
        let mine = vec![rank as u32 + 1; COUNT];
        let cross = |comm: &dyn DeviceComm| comm.usage().iter().any(|used| used.algorithm == "cross_read");
        for round in 0..3 {
            let mut all = vec![0_u32; 3 * COUNT];
            let (from, to) = (DeviceAddr::of_slice(&mine), DeviceAddr::of_slice_mut(&mut all));
            if round == 1 && rank == 1 {
                forbid_reading();
            }
            // SAFETY: `mine` holds COUNT elements and `all` as many for each rank.
            unsafe { comm.all_gather(from, to, COUNT, DType::U32, S).unwrap() };
            for (sender, part) in all.chunks(COUNT).enumerate() {
                assert!(part.iter().all(|x| *x == sender as u32 + 1), "round {round}");
            }
        }
        assert!(cross(&*comm), "nothing was read through the kernel, so nothing was refused");
        assert!(comm.usage().iter().any(|used| used.algorithm == "shm_pipeline"), "{:?}", comm.usage());
        works(&*comm);
        comm.close().unwrap();
    });
}

#[test]
fn ranks_that_left_are_no_obstacle_to_a_pair() {
    for transport in TRANSPORTS {
        let turns = std::sync::Barrier::new(4);
        on_ranks(4, transport, false, |comm| {
            let rank = comm.rank();
            works(&*comm);
            let mut comm = Some(comm);
            for leaver in [2, 3] {
                if rank == leaver {
                    drop(comm.take());
                    std::thread::sleep(Duration::from_millis(20));
                }
                turns.wait();
            }
            let Some(comm) = comm else { return };
            for count in [1 << 22, 64] {
                let mut buffer = vec![rank as u8; count];
                let addr = DeviceAddr::of_slice_mut(&mut buffer);
                let op = match rank {
                    0 => P2pOp::Send { addr, count, dtype: DType::U8, peer: 1 },
                    _ => P2pOp::Recv { addr, count, dtype: DType::U8, peer: 0 },
                };
                // SAFETY: the vector holds `count` bytes.
                unsafe { comm.group(&[op], S).unwrap() };
                assert!(buffer.iter().all(|x| *x == 0));
            }
        });
    }
}
