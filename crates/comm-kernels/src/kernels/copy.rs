//! Copies of rows by a kernel.

use comm_core::{DeviceAddr, Result, StreamHandle};

use super::{Kernels, THREADS, parameters};

impl Kernels {
    /// Copies `rows` rows of `width` bytes, which begin the given bytes apart, unless the 32-bit word in device memory at
    /// `unless` is nonzero when the kernel runs: nothing is read or written then.
    ///
    /// Fastest when addresses, pitches and width are multiples of 16.
    ///
    /// # Errors
    /// [`CommError::Cuda`](comm_core::CommError::Cuda).
    ///
    /// # Safety
    /// The source is valid for reads and the destination for writes from this device until the work has completed, they
    /// are disjoint, and nothing else writes what is read or touches what is written in that time. The word is null, or
    /// valid for reads, aligned, and not written while the kernel runs. `stream` is a live stream of this context.
    pub unsafe fn copy_rows_unless(
        &self,
        unless: DeviceAddr,
        (from, from_pitch): (DeviceAddr, usize),
        (to, to_pitch): (DeviceAddr, usize),
        width: usize,
        rows: usize,
        stream: StreamHandle,
    ) -> Result<()> {
        if width == 0 || rows == 0 {
            return Ok(());
        }
        let bits = from.0 | to.0 | from_pitch as u64 | to_pitch as u64 | width as u64;
        let unit = if bits.is_multiple_of(16) {
            16
        } else if bits.is_multiple_of(4) {
            4
        } else {
            1
        };
        let grid = self.grid((width / unit).saturating_mul(rows));
        let (from_pitch, to_pitch, width, rows) =
            (from_pitch as u64, to_pitch as u64, width as u64, rows as u64);
        let mut parameters = parameters![to, to_pitch, from, from_pitch, width, rows, unless];
        // SAFETY: these are the kernel's parameters, in order; the caller vouches for what they name.
        unsafe { self.copy_rows.launch(&self.context, grid, (THREADS, 1), stream, &mut parameters) }
    }
}
