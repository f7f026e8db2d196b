//! Operands of captured calls that the ranks get to know after the capture.
//!
//! A call that is captured on an unregistered result, and would be faster on a registered one, gets an entry of a table
//! in device memory. Its kernel learns from that, at each replay, where the other ranks' results lie. The entry is unset
//! until [`register`] has the ranks exchange their addresses, and is cleared and used again when the graph is gone.

mod entries;
pub(crate) mod register;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use comm_core::{CommError, DeviceAddr, Result};
use comm_kernels::capture::{CapturingGraph, when_gone};
use comm_kernels::p2p::{CAPTURED_ENTRY_BYTES, CapturedEntry, CapturedKernels, Overlap};
use comm_kernels::raw::{self, check};
use cudarc::driver::{CudaContext, sys};

use self::entries::{Entries, Entry, Number};
use crate::state::{Shared, lock};
use crate::stream::Stream;
use crate::symmetric::ipc::Opened;

/// How long clearing a few entries is waited for, with calls kept waiting meanwhile.
const CLEAR_TIME: Duration = Duration::from_millis(1);

/// The table and what launches by it. Its context is current whenever it is used, and when it is dropped.
pub(crate) struct Captured {
    pub(crate) kernels: CapturedKernels,
    memory: DeviceAddr,
    entries: Entries<Vec<Opened>>,
    /// Operands whose graphs are gone, told by the driver, who may not be kept waiting.
    gone: Arc<Mutex<Vec<Number>>>,
    /// What clears entries.
    clearing: Stream,
    /// Operands of graphs that are gone whose clearing has been enqueued, and others that have been cleared. The
    /// watchdog lets go of what those mapped.
    leaving: Vec<Entry<Vec<Opened>>>,
    cleared: Vec<Entry<Vec<Opened>>>,
}

impl Captured {
    /// A table of `capacity` unset entries.
    pub(crate) fn new(
        context: &Arc<CudaContext>,
        (world, overlap): (usize, Overlap),
        capacity: u32,
    ) -> Result<Self> {
        let kernels = CapturedKernels::load(context, world, overlap)?;
        let bytes = capacity as usize * CAPTURED_ENTRY_BYTES;
        let clearing = Stream::new()?;
        let memory = raw::allocate(bytes)?;
        let table = Self {
            kernels,
            memory,
            entries: Entries::new(capacity),
            gone: Arc::default(),
            clearing,
            leaving: Vec::new(),
            cleared: Vec::new(),
        };
        // SAFETY: the memory has just been allocated.
        unsafe { raw::zero(memory, bytes) }?;
        Ok(table)
    }

    fn at(&self, slot: u32) -> DeviceAddr {
        self.memory.offset(u64::from(slot) * CAPTURED_ENTRY_BYTES as u64)
    }

    /// An entry for a result of `bytes` bytes, until the graph is gone.
    pub(crate) fn reserve(
        &mut self,
        graph: CapturingGraph,
        recv: DeviceAddr,
        bytes: usize,
    ) -> Result<DeviceAddr> {
        let Some((number, slot)) = self.entries.reserve(recv, bytes) else {
            return Err(CommError::invalid(
                "stream",
                "it is being captured, but all entries for captured operands are taken: drop graphs, or raise \
                 p2p.graph_entries",
            ));
        };
        let gone = Arc::clone(&self.gone);
        when_gone(graph, move || lock(&gone).push(number))?;
        Ok(self.at(slot))
    }

    /// Writes entries that no running kernel reads.
    fn write(&self, entries: &[(u32, CapturedEntry)]) -> Result<()> {
        if entries.is_empty() {
            return Ok(());
        }
        let stream = Stream::new()?;
        let images: Vec<_> = entries.iter().map(|(slot, entry)| (self.at(*slot), entry.bytes())).collect();
        let copy = |(at, image): &(DeviceAddr, [u8; CAPTURED_ENTRY_BYTES])| {
            // SAFETY: the slot lies in the table; the image lives until the stream has been waited for, below.
            let code =
                unsafe { sys::cuMemcpyHtoDAsync_v2(at.0, image.as_ptr().cast(), image.len(), stream.raw()) };
            check("cuMemcpyHtoDAsync", code)
        };
        let copied = images.iter().try_for_each(copy);
        stream.wait().and(copied)
    }

    /// Has the entries of graphs that are gone cleared, after which their slots can be used again. A device that is full
    /// may not get to it within [`CLEAR_TIME`]; the rest is then left for the next time.
    fn take_back(&mut self) -> Result<()> {
        let gone = std::mem::take(&mut *lock(&self.gone));
        for number in gone {
            let Some(entry) = self.entries.remove(number) else { continue };
            let at = self.at(entry.slot);
            self.leaving.push(entry);
            // SAFETY: the slot lies in the table, the only graph whose kernels read it is gone, and nobody gets it anew
            // before this is done.
            let code = unsafe { sys::cuMemsetD8Async(at.0, 0, CAPTURED_ENTRY_BYTES, self.clearing.raw()) };
            check("cuMemsetD8Async", code)?;
        }
        if self.leaving.is_empty() || !self.clearing.is_done_within(CLEAR_TIME)? {
            return Ok(());
        }
        self.leaving.iter().for_each(|entry| self.entries.recycle(entry.slot));
        self.cleared.append(&mut self.leaving);
        Ok(())
    }
}

impl Drop for Captured {
    fn drop(&mut self) {
        // SAFETY: the owner sees to it that no kernel runs any more.
        unsafe { raw::free(self.memory) };
    }
}

/// Takes back what graphs have let go of, unless a call is under way. The context is current.
pub(crate) fn take_back(shared: &Shared) -> Result<()> {
    let cleared = {
        let Ok(mut owned) = shared.owned.try_lock() else { return Ok(()) };
        let Some(captured) = &mut owned.captured else { return Ok(()) };
        captured.take_back()?;
        std::mem::take(&mut captured.cleared)
    };
    // Closing what was mapped may wait for the device, so calls must not wait for that.
    drop(cleared);
    Ok(())
}
