//! Device memory, graph capture and event timing.

#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]
#![allow(
    clippy::undocumented_unsafe_blocks,
    reason = "all buffers are of the right size and outlive the work"
)]

mod common;

use std::time::Duration;

use comm_core::{CommError, DType, DeviceAddr, DeviceMemory, MemoryKind};
use comm_kernels::capture::position;
use comm_kernels::pattern::{Expected, Mismatches, Pattern};
use comm_kernels::raw::HostPage;
use comm_kernels::{CudaMemory, EventTimer, Kernels, Mark};
use common::Gate;

#[test]
fn memory_keeps_what_is_written() {
    let Some(device) = common::device() else { return };
    let memory = &device.memory;
    assert_eq!(memory.kind(), MemoryKind::Cuda { ordinal: 0 });
    assert_ne!(memory.stream().0, 0, "not the default stream");
    for bytes in [0, 1, 1000, 1 << 20] {
        let addr = memory.allocate(bytes).unwrap();
        assert!(addr.is_aligned_to(256) && !addr.is_null());
        let data: Vec<u8> = (0..bytes).map(|i| (i * 7 % 251) as u8).collect();
        let mut back = vec![0; bytes];
        unsafe {
            memory.upload(addr, &data).unwrap();
            memory.download(&mut back, addr).unwrap();
            memory.free(addr).unwrap();
            assert!(memory.free(addr).is_err(), "freed twice");
        }
        assert!(data == back);
    }
    assert!(unsafe { memory.free(DeviceAddr(0x1234)) }.is_err());
}

#[test]
fn a_reserve_is_handed_out_and_taken_over_without_the_driver() {
    let Some(_device) = common::device() else { return };
    let memory = CudaMemory::new(0).unwrap().with_reserve(64 << 20).unwrap();
    let places: Vec<_> = (0..60).map(|_| memory.allocate(1 << 20).unwrap()).collect();
    assert!(places.iter().all(|place| place.is_aligned_to(256)));
    let data: Vec<u8> = (0..1 << 20).map(|i| (i * 7 % 251) as u8).collect();
    let mut back = vec![0; 1 << 20];
    unsafe {
        memory.upload(places[59], &data).unwrap();
        memory.download(&mut back, places[59]).unwrap();
        memory.free(places[3]).unwrap();
        assert!(memory.free(places[3]).is_err(), "freed twice");
    }
    assert!(data == back);
    let first = places[0];
    drop(memory);
    let next = CudaMemory::new(0).unwrap().with_reserve(64 << 20).unwrap();
    assert_eq!(next.allocate(1).unwrap(), first);
    // More than it has room for comes from the driver.
    assert!(!next.allocate(100 << 20).unwrap().is_null());
}

#[test]
fn what_cannot_be_had_is_an_error() {
    let Some(device) = common::device() else { return };
    assert!(matches!(CudaMemory::new(1000), Err(CommError::InvalidArgument { .. })));
    let error = device.memory.allocate(1 << 50).unwrap_err();
    assert!(
        matches!(&error, CommError::Cuda { message, .. } if message.contains("OUT_OF_MEMORY")),
        "{error}"
    );
    let addr = device.memory.allocate(256).unwrap();
    device.memory.synchronize().unwrap();
    unsafe { device.memory.free(addr) }.unwrap();
}

#[test]
fn kernels_are_loaded_once_and_used_from_many_threads() {
    let Some(device) = common::device() else { return };
    std::thread::scope(|scope| {
        for rank in 0..4 {
            let device = &device;
            scope.spawn(move || {
                let memory = CudaMemory::new(0).unwrap();
                let kernels = Kernels::load(memory.context()).unwrap();
                assert_eq!(memory.context().cu_ctx(), device.memory.context().cu_ctx());
                let (data, result) = (memory.allocate(40_000).unwrap(), memory.allocate(16).unwrap());
                let (pattern, stream) = (Pattern::new(1, None, 4), memory.stream());
                let mut words = [0; 16];
                unsafe {
                    kernels.fill(data, 10_000, DType::F32, &pattern, rank, 0, stream).unwrap();
                    kernels.verify_reset(result, stream).unwrap();
                    let expected = Expected::Sent(rank);
                    kernels
                        .verify(data, 10_000, DType::F32, &pattern, expected, 0, 0, result, stream)
                        .unwrap();
                    memory.download(&mut words, result).unwrap();
                }
                assert_eq!(words[..8], [0; 8]);
            });
        }
    });
}

#[test]
fn a_captured_graph_runs_when_it_is_replayed_and_not_before() {
    let Some(device) = common::device() else { return };
    let (memory, kernels, stream) = (&device.memory, &device.kernels, device.stream());
    let (data, result) = (device.buffer(40_000, 0), device.buffer(16, 0));
    let pattern = Pattern::new(8, None, 1);
    let verify = || unsafe {
        kernels.verify_reset(result.addr(), stream)?;
        let expected = Expected::Sent(0);
        kernels.verify(data.addr(), 10_000, DType::F32, &pattern, expected, 0, 0, result.addr(), stream)
    };
    let mut fill = memory
        .capture(|| unsafe { kernels.fill(data.addr(), 10_000, DType::F32, &pattern, 0, 0, stream) })
        .unwrap();
    let mut both = memory.capture(verify).unwrap();
    assert_eq!((fill.nodes().unwrap(), both.nodes().unwrap()), (1, 2));

    unsafe { both.launch(stream) }.unwrap();
    assert_eq!(device.mismatches(&result).wrong, 10_000, "filled before the replay");
    let mut timer = EventTimer::new(memory.context(), Duration::from_secs(10)).unwrap();
    unsafe {
        fill.upload(stream).unwrap();
        timer.start(stream).unwrap();
        for _ in 0..10 {
            fill.launch(stream).unwrap();
            both.launch(stream).unwrap();
        }
        timer.stop(stream).unwrap();
    }
    let elapsed = timer.elapsed().unwrap();
    assert!(elapsed > Duration::ZERO && elapsed < Duration::from_secs(1), "{elapsed:?}");
    assert_eq!(device.mismatches(&result), Mismatches::default());
    drop(both);
    memory.synchronize().unwrap();
}

#[test]
fn marks_count_the_replays() {
    let Some(device) = common::device() else { return };
    let (memory, kernels, stream) = (&device.memory, &device.kernels, device.stream());
    let (counter, slots) = (device.filled(&[0; 8], 0), device.filled(&[0; 4 * 16], 0));
    let mark = |tag| Mark { counter: counter.addr(), slots: slots.addr(), slot_count: 4, adds: 3, tag };
    let mut graph = memory.capture(|| unsafe { kernels.mark(mark(0xabc), stream) }).unwrap();
    for _ in 0..6 {
        unsafe { graph.launch(stream) }.unwrap();
    }
    unsafe { kernels.mark(mark(0xdef), stream) }.unwrap();
    let words: Vec<u64> =
        slots.content().chunks(8).map(|bytes| u64::from_le_bytes(bytes.try_into().unwrap())).collect();
    // One slot after another, whatever is added.
    assert_eq!(words, [12, 0xabc, 15, 0xabc, 18, 0xabc, 21, 0xdef]);
    assert_eq!(counter.content(), (7_u64 << 48 | 21).to_le_bytes());
    let refused = |slots, slot_count| unsafe { kernels.mark(Mark { slots, slot_count, ..mark(0) }, stream) };
    assert!(refused(slots.addr(), 0).is_err() && refused(slots.addr(), 3).is_err());
    assert!(refused(slots.addr().offset(8), 2).is_err());
}

#[test]
fn marks_beside_a_chain_count_its_replays() {
    let Some(device) = common::device() else { return };
    let (memory, kernels, stream) = (&device.memory, &device.kernels, device.stream());
    let (counters, slots) = (device.filled(&[0; 2 * 8], 0), device.filled(&[0; 2 * 8 * 16], 0));
    let data = device.buffer(4000, 0);
    let pattern = Pattern::new(8, None, 1);
    let fill = || unsafe { kernels.fill(data.addr(), 1000, DType::F32, &pattern, 0, 0, stream) };
    let mark = |point: u64, tag| Mark {
        counter: counters.addr().offset(8 * point),
        slots: slots.addr().offset(8 * 16 * point),
        slot_count: 8,
        adds: 1,
        tag,
    };
    let here = || Ok(unsafe { position(stream) }?.unwrap());
    let beside = |mark, before| unsafe { kernels.mark_beside(mark, before, here()?) };
    let mut graph = memory
        .capture(|| {
            let start = beside(mark(0, 1), None)?;
            fill()?;
            // Not where the start was, so a node of its own; the next start joins it, and then it is full.
            let both = beside(mark(1, 1), Some(start))?;
            let both = beside(mark(0, 2), Some(both))?;
            fill()?;
            beside(mark(1, 2), Some(both)).map(drop)
        })
        .unwrap();
    assert_eq!(graph.nodes().unwrap(), 2 + 3);
    for _ in 0..3 {
        unsafe { graph.launch(stream) }.unwrap();
    }
    memory.synchronize().unwrap();
    let counts: Vec<u8> = [6_u64, 6].iter().flat_map(|count| (count << 48 | count).to_le_bytes()).collect();
    assert_eq!(counters.content(), counts);
    let words: Vec<u64> =
        slots.content().chunks(8).map(|bytes| u64::from_le_bytes(bytes.try_into().unwrap())).collect();
    for point in words.chunks(16) {
        let mut tags: Vec<u64> = (1..=6).map(|count| point[2 * count + 1]).collect();
        assert!((1..=6).all(|count| point[2 * count] == count as u64), "{point:?}");
        tags.sort_unstable();
        assert_eq!(tags, [1, 1, 1, 2, 2, 2]);
    }
    // Nothing is captured, so there is nothing to mark beside.
    assert_eq!(unsafe { position(stream) }.unwrap(), None);
}

#[test]
fn marks_beside_a_chain_can_move_along_it() {
    let Some(device) = common::device() else { return };
    let (memory, kernels, stream) = (&device.memory, &device.kernels, device.stream());
    let (counters, slots) = (device.filled(&[0; 2 * 8], 0), HostPage::new(2 * 2 * 2).unwrap());
    let data = device.buffer(4000, 0);
    let pattern = Pattern::new(8, None, 1);
    let fill = || unsafe { kernels.fill(data.addr(), 1000, DType::F32, &pattern, 0, 0, stream) };
    let mark = |point: u64, adds| Mark {
        counter: counters.addr().offset(8 * point),
        slots: slots.device(4 * point as usize),
        slot_count: 2,
        adds,
        tag: 7,
    };
    let here = || Ok(unsafe { position(stream) }?.unwrap());
    let gate = Gate::new();
    let mut graph = memory
        .capture(|| {
            fill()?;
            let mut node = unsafe { kernels.mark_beside(mark(0, 1), None, here()?) }?;
            let before = here()?;
            gate.put(stream);
            fill()?;
            let behind = here()?;
            assert!(before != behind && before.same_capture(&behind));
            assert_eq!(before.clone().and(&behind), behind.clone().and(&before));
            unsafe {
                kernels.change_mark(&mut node, mark(0, 5))?;
                kernels.move_mark(&mut node, behind.clone())?;
                // To where it is already.
                kernels.move_mark(&mut node, behind.clone())?;
            }
            assert_eq!(*node.position(), behind);
            // What joins it there keeps it there, and changes by itself.
            let mut both = unsafe { kernels.mark_beside(mark(1, 2), Some(node), behind) }?;
            assert!(unsafe { kernels.move_mark(&mut both, before) }.is_err());
            unsafe { kernels.change_mark(&mut both, mark(1, 3)) }
        })
        .unwrap();
    assert_eq!(graph.nodes().unwrap(), 2 + 1 + 1);
    gate.close();
    unsafe { graph.launch(stream) }.unwrap();
    // The mark waits for what it was moved behind, and that for the gate.
    std::thread::sleep(Duration::from_millis(100));
    assert!((0..8).all(|word| slots.read(word) == 0));
    gate.open();
    unsafe { graph.launch(stream) }.unwrap();
    memory.synchronize().unwrap();
    let expected: Vec<u8> = [10_u64, 6].iter().flat_map(|count| (2 << 48 | count).to_le_bytes()).collect();
    assert_eq!(counters.content(), expected);
    // A node that has its capture behind it does not go into another one.
    let mut left = None;
    memory
        .capture(|| {
            left = Some(unsafe { kernels.mark_beside(mark(0, 1), None, here()?) }?);
            fill()
        })
        .unwrap();
    let refused = memory.capture(|| unsafe { kernels.move_mark(left.as_mut().unwrap(), here()?) });
    assert!(refused.unwrap_err().to_string().contains("another capture"));
    drop(graph);
    slots.free();
}

#[test]
fn a_failed_capture_leaves_the_stream_usable() {
    let Some(device) = common::device() else { return };
    let (memory, stream, data) = (&device.memory, device.stream(), device.buffer(4000, 0));
    let pattern = Pattern::new(8, None, 1);
    let fill = || unsafe { device.kernels.fill(data.addr(), 1000, DType::F32, &pattern, 0, 0, stream) };
    let refused = memory.capture(|| {
        fill()?;
        Err(CommError::invalid("test", "on purpose"))
    });
    assert!(matches!(refused, Err(CommError::InvalidArgument { .. })));
    let forbidden = memory.capture(|| memory.synchronize());
    assert!(matches!(forbidden, Err(CommError::Cuda { .. })));
    fill().unwrap();
    memory.synchronize().unwrap();
}
