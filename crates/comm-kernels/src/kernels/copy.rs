//! Copies of rows that lie apart.

use comm_core::{CommError, DeviceAddr, Result, StreamHandle};

use super::{Kernels, THREADS, parameters};

impl Kernels {
    /// Copies `rows` rows of `width` bytes, each pitch the bytes from one row to the next. Fastest when 16 divides
    /// addresses, pitches and width. With `unless`, an aligned 32-bit word of this device's memory, nothing is copied if
    /// the word is not zero when the kernel starts.
    ///
    /// # Errors
    /// [`CommError::InvalidArgument`] for a null address, [`CommError::Cuda`].
    ///
    /// # Safety
    /// The source is valid for reads and the destination for writes from this device until the work has completed, they
    /// do not overlap, nothing else writes what is read or touches what is written in that time, the word is valid for
    /// reads, and `stream` is a live stream of this context.
    pub unsafe fn copy_rows(
        &self,
        (from, from_pitch): (DeviceAddr, usize),
        (to, to_pitch): (DeviceAddr, usize),
        width: usize,
        rows: usize,
        unless: Option<DeviceAddr>,
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
        let grid = self.grid(width / unit as usize * rows);
        let (from_pitch, to_pitch, width, rows) =
            (from_pitch as u64, to_pitch as u64, width as u64, rows as u64);
        let unless = unless.unwrap_or(DeviceAddr::NULL);
        let mut parameters = parameters![to, to_pitch, from, from_pitch, width, rows, unit, unless];
        // SAFETY: these are the kernel's parameters, in order; it touches the rows alone, for which the caller vouches.
        unsafe { self.copy_rows.launch(&self.context, grid, (THREADS, 1), stream, &mut parameters) }
    }
}

/// The largest unit that divides all of these.
fn unit(values: [u64; 5]) -> u32 {
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
