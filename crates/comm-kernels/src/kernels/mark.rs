//! Marking progress on a stream.

use comm_core::{CommError, DType, DeviceAddr, Result, StreamHandle, check};

use super::{Kernels, parameters};

impl Kernels {
    /// When the stream gets here, adds one to the `u64` at `counter` and writes the new count and `tag`, two `u64`s, to
    /// slot `count % slot_count` at `slots`. Slots are 16 bytes; host memory that the device sees makes them a way to
    /// watch the progress of replayed graphs.
    ///
    /// # Errors
    /// [`CommError::InvalidArgument`], [`CommError::Cuda`].
    ///
    /// # Safety
    /// `counter` and `slot_count` slots at `slots` are valid for writes on this device until the work has completed, also
    /// in every replay of a graph that it was captured into; the device writes them with this function alone. `stream`
    /// is a live stream of this context.
    pub unsafe fn mark(
        &self,
        counter: DeviceAddr,
        slots: DeviceAddr,
        slot_count: u32,
        tag: u64,
        stream: StreamHandle,
    ) -> Result<()> {
        check::span("counter", counter, 1, DType::U64)?;
        check::span("slots", slots, 2 * slot_count as usize, DType::U64)?;
        if slot_count == 0 || !slots.is_aligned_to(16) {
            return Err(CommError::invalid("slots", "there must be at least one, aligned to 16 bytes"));
        }
        let mut parameters = parameters![counter, slots, slot_count, tag];
        // SAFETY: these are `mark`'s parameters, in order; it updates the counter and one slot, for which the caller
        // vouches.
        unsafe { self.mark.launch(&self.context, 1, (1, 1), stream, &mut parameters) }
    }
}
