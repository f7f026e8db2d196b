//! Operands of captured calls that the ranks get to know after the capture.
//!
//! A call that is captured on an unregistered result, and would be faster on a registered one, gets an entry of a table
//! in device memory. Its kernel learns from that, at each replay, where the other ranks' results lie. The entry is unset
//! until [`register`] has the ranks exchange their addresses, and is cleared and used again when the graph is gone.

mod entries;
pub(crate) mod register;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use comm_core::{CommError, Deadline, DeviceAddr, Result};
use comm_kernels::capture::{CapturingGraph, when_gone};
use comm_kernels::p2p::{CAPTURED_ENTRY_BYTES, CapturedEntry, CapturedKernels, Overlap};
use comm_kernels::raw::{RelaxedCapture, check};
use cudarc::driver::{CudaContext, sys};

use self::entries::{Entries, Entry, Number};
use crate::state::{Shared, lock};
use crate::stream::Stream;
use crate::symmetric::ipc::Opened;
use crate::symmetric::vmm::{Mapping, Physical};

/// How long clearing a few entries is waited for, with calls kept waiting meanwhile.
const CLEAR_TIME: Duration = Duration::from_millis(1);
/// How long a captured call waits for a slot: the driver tells of graphs that are gone a little later, by a thread of its own.
const RECYCLE_TIME: Duration = Duration::from_millis(20);

/// The table and what launches by it. Its context is current whenever it is used, and when it is dropped.
pub(crate) struct Captured {
    pub(crate) kernels: CapturedKernels,
    memory: Mapping,
    entries: Entries<Vec<Opened>>,
    /// Operands whose graphs are gone, told by the driver, who may not be kept waiting.
    gone: Arc<Mutex<Vec<Number>>>,
    /// What clears entries.
    clearing: Stream,
    /// Operands of graphs that are gone whose clearing has been enqueued.
    leaving: Vec<Entry<Vec<Opened>>>,
}

impl Captured {
    /// A table of `capacity` unset entries, on device `ordinal`, whose context is current. It is mapped, not allocated,
    /// since the driver waits for the whole device where it frees memory, but not where it unmaps it.
    pub(crate) fn new(
        (context, ordinal): (&Arc<CudaContext>, usize),
        (world, overlap): (usize, Overlap),
        capacity: u32,
    ) -> Result<Self> {
        let kernels = CapturedKernels::load(context, world, overlap)?;
        let bytes = capacity as usize * CAPTURED_ENTRY_BYTES;
        let clearing = Stream::new()?;
        let memory = Physical::create(ordinal, bytes)?.map(ordinal)?;
        memory.fill(0, 0, bytes)?;
        let entries = Entries::new(capacity);
        Ok(Self { kernels, memory, entries, gone: Arc::default(), clearing, leaving: Vec::new() })
    }

    fn at(&self, slot: u32) -> DeviceAddr {
        self.memory.addr().offset(u64::from(slot) * CAPTURED_ENTRY_BYTES as u64)
    }

    /// An entry for a result of `bytes` bytes, until the graph is gone.
    pub(crate) fn reserve(
        &mut self,
        graph: CapturingGraph,
        recv: DeviceAddr,
        bytes: usize,
    ) -> Result<DeviceAddr> {
        // A slot may only be waiting to be asked for, and what one rank refuses the others must not have captured.
        if self.entries.is_full() {
            let _relaxed = RelaxedCapture::new();
            let patience = Deadline::after(RECYCLE_TIME);
            while self.entries.is_full() && !patience.has_passed() {
                self.take_back()?;
            }
        }
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
        // What was opened for them is not closed here (`ipc::close_unused`).
        self.leaving.drain(..).for_each(|entry| self.entries.recycle(entry.slot));
        Ok(())
    }
}

impl Drop for Captured {
    fn drop(&mut self) {
        // The owner sees to it that no kernel runs any more; entries may still be being cleared.
        let _ = self.clearing.wait();
    }
}

/// Takes back what graphs have let go of, unless a call is under way. The context is current.
pub(crate) fn take_back(shared: &Shared) -> Result<()> {
    let Ok(mut owned) = shared.owned.try_lock() else { return Ok(()) };
    owned.captured.as_mut().map_or(Ok(()), Captured::take_back)
}
