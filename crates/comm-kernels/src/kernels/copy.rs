//! Copies of rows by a kernel.

use comm_core::{CommError, DeviceAddr, Result, StreamHandle};

use super::{Kernels, THREADS, parameters};

impl Kernels {
    /// Copies `rows` rows of `width` bytes, which begin the given bytes apart, unless the 32-bit word in device memory at
    /// `unless` is nonzero when the kernel starts: nothing is read or written then.
    ///
    /// Fastest when addresses, pitches and width are multiples of 16.
    ///
    /// # Errors
    /// [`CommError::InvalidArgument`] for a null address of rows, [`CommError::Cuda`].
    ///
    /// # Safety
    /// The source is valid for reads and the destination for writes from this device until the work has completed, they
    /// are disjoint, and nothing else writes what is read or touches what is written in that time. The word is null, or
    /// valid for reads and aligned; if it becomes nonzero while the kernel runs, the copy may be done in part. `stream` is
    /// a live stream of this context.
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
        for (name, addr) in [("from", from), ("to", to)] {
            if addr.is_null() {
                return Err(CommError::invalid(name, "the address is null"));
            }
        }
        let unit = unit([from.0, to.0, from_pitch as u64, to_pitch as u64, width as u64]);
        let grid = self.grid((width / unit).saturating_mul(rows));
        let (from_pitch, to_pitch, width, rows) =
            (from_pitch as u64, to_pitch as u64, width as u64, rows as u64);
        let mut parameters = parameters![to, to_pitch, from, from_pitch, width, rows, unless];
        // SAFETY: these are the kernel's parameters, in order; the caller vouches for what they name.
        unsafe { self.copy_rows.launch(&self.context, grid, (THREADS, 1), stream, &mut parameters) }
    }
}

/// The bytes that a thread copies at a time, as the kernel chooses them: the largest unit that divides all of these.
fn unit(values: [u64; 5]) -> usize {
    let bits = values.into_iter().fold(16, |bits, value| bits | value);
    1 << bits.trailing_zeros()
}

#[cfg(test)]
mod tests {
    use super::unit;

    #[test]
    fn units_divide_everything() {
        assert_eq!(unit([256, 4096, 32, 64, 160]), 16);
        assert_eq!(unit([256, 4096, 32, 64, 24]), 8);
        assert_eq!(unit([256, 4098, 32, 64, 24]), 2);
        assert_eq!(unit([256, 4096, 32, 7, 24]), 1);
    }
}
