//! What the GPU tests share: a device if there is one, and buffers with guard bytes.

#![allow(dead_code, reason = "each test uses its part")]

use std::ffi::c_void;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use comm_core::{DeviceAddr, DeviceMemory, StreamHandle};
use comm_kernels::pattern::Mismatches;
use comm_kernels::{CudaMemory, Kernels, driver};
use cudarc::driver::sys;

pub(crate) const GUARD: u8 = 0xA5;
pub(crate) const MARGIN: usize = 256;

pub(crate) struct Device {
    pub(crate) memory: CudaMemory,
    pub(crate) kernels: Arc<Kernels>,
}

/// Device 0, or `None` after printing why the test is skipped. Where `COMM_REQUIRE_GPUS` asks for GPUs, their absence
/// is a failure.
pub(crate) fn device() -> Option<Device> {
    let required = std::env::var("COMM_REQUIRE_GPUS").map_or(0, |text| text.parse::<usize>().unwrap());
    match driver::device_count() {
        Ok(count) if count > 0 && count >= required => {
            let memory = CudaMemory::new(0).unwrap();
            let kernels = Kernels::load(memory.context()).unwrap();
            Some(Device { memory, kernels })
        }
        Ok(count) if required > 0 => panic!("COMM_REQUIRE_GPUS is {required}, but there are {count} GPUs"),
        Err(error) if required > 0 => panic!("COMM_REQUIRE_GPUS is {required}, but: {error}"),
        Ok(count) => {
            println!("SKIP: there are {count} GPUs");
            None
        }
        Err(error) => {
            println!("SKIP: {error}");
            None
        }
    }
}

impl Device {
    pub(crate) fn stream(&self) -> StreamHandle {
        self.memory.stream()
    }

    /// A buffer of `bytes` bytes that begins `offset` bytes after an aligned address.
    pub(crate) fn buffer(&self, bytes: usize, offset: usize) -> Buffer<'_> {
        assert!(offset <= MARGIN);
        let whole = bytes + 2 * MARGIN;
        let base = self.memory.allocate(whole).unwrap();
        // SAFETY: the range is the allocation.
        unsafe { self.memory.upload(base, &vec![GUARD; whole]).unwrap() };
        Buffer { device: self, base, start: MARGIN / 2 + offset, bytes, whole }
    }

    pub(crate) fn filled(&self, content: &[u8], offset: usize) -> Buffer<'_> {
        let buffer = self.buffer(content.len(), offset);
        // SAFETY: the buffer has that many bytes.
        unsafe { self.memory.upload(buffer.addr(), content).unwrap() };
        buffer
    }

    /// Two words for the verification's result.
    pub(crate) fn mismatches(&self, result: &Buffer<'_>) -> Mismatches {
        let bytes = result.content();
        let word = |i: usize| u64::from_le_bytes(bytes[8 * i..][..8].try_into().unwrap());
        Mismatches::from_words([word(0), word(1)])
    }
}

pub(crate) struct Buffer<'a> {
    device: &'a Device,
    base: DeviceAddr,
    start: usize,
    bytes: usize,
    whole: usize,
}

impl Buffer<'_> {
    pub(crate) fn addr(&self) -> DeviceAddr {
        self.base.offset(self.start as u64)
    }

    /// The content, after checking that nothing around it was written.
    pub(crate) fn content(&self) -> Vec<u8> {
        let mut all = vec![0; self.whole];
        // SAFETY: the range is the allocation.
        unsafe { self.device.memory.download(&mut all, self.base).unwrap() };
        let after = all.split_off(self.start + self.bytes);
        let content = all.split_off(self.start);
        assert!(all.iter().all(|&byte| byte == GUARD), "written before the buffer");
        assert!(after.iter().all(|&byte| byte == GUARD), "written after the buffer");
        content
    }
}

impl Drop for Buffer<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.device.memory.synchronize() {
            println!("not freed: {error}");
            return;
        }
        // SAFETY: the stream is idle and the buffer is going away.
        if let Err(error) = unsafe { self.device.memory.free(self.base) } {
            println!("not freed: {error}");
        }
    }
}

/// A place in a stream that is passed only while it is open: a host function that waits. What is behind a closed one is
/// late, without using the device.
pub(crate) struct Gate(&'static AtomicBool);

impl Gate {
    /// An open one.
    pub(crate) fn new() -> Self {
        // The driver may look at it after a failed test is over.
        Self(Box::leak(Box::new(AtomicBool::new(true))))
    }

    pub(crate) fn close(&self) {
        self.0.store(false, Ordering::Release);
    }

    pub(crate) fn open(&self) {
        self.0.store(true, Ordering::Release);
    }

    /// Puts it into the stream, here.
    pub(crate) fn put(&self, stream: StreamHandle) {
        let place = std::ptr::from_ref(self.0).cast_mut().cast::<c_void>();
        // SAFETY: the stream is live; the function gets the word that it takes, which lives for ever.
        let code = unsafe { sys::cuLaunchHostFunc(stream.0 as sys::CUstream, Some(pass_when_open), place) };
        assert_eq!(code, sys::CUresult::CUDA_SUCCESS);
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.open();
    }
}

unsafe extern "C" fn pass_when_open(place: *mut c_void) {
    // SAFETY: the pointer is the one that `put` gave.
    let open = unsafe { &*place.cast::<AtomicBool>() };
    let start = Instant::now();
    while !open.load(Ordering::Acquire) && start.elapsed() < Duration::from_secs(60) {
        std::thread::sleep(Duration::from_millis(1));
    }
}
