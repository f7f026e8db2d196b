//! Filling buffers with generated data, and checking results.

use comm_core::{CommError, DType, DeviceAddr, ReduceOp, Result, StreamHandle, check};

use super::{Kernels, THREADS, index_of, parameters};
use crate::pattern::{Expected, Pattern};

/// What the verification kernel takes for "as sent": no reduction has this number.
const SENT: u32 = u32::MAX;

pub(super) const fn op_number(op: ReduceOp) -> u32 {
    match op {
        ReduceOp::Sum => 0,
        ReduceOp::Prod => 1,
        ReduceOp::Min => 2,
        ReduceOp::Max => 3,
        ReduceOp::Avg => 4,
    }
}

impl Kernels {
    /// Fills `count` elements at `dst` with what `rank` sends, from its element `first_index` on: on the device what
    /// [`pattern::fill`](crate::pattern::fill) does on the host.
    ///
    /// # Errors
    /// [`CommError::InvalidArgument`], [`CommError::Cuda`].
    ///
    /// # Safety
    /// The range is valid for writes on this device until the work has completed, nothing else uses it in that time,
    /// and `stream` is a live stream of this context.
    pub unsafe fn fill(
        &self,
        dst: DeviceAddr,
        count: usize,
        dtype: DType,
        pattern: &Pattern,
        rank: usize,
        first_index: u64,
        stream: StreamHandle,
    ) -> Result<()> {
        check::span("dst", dst, count, dtype)?;
        let world = pattern.check()?;
        if count == 0 {
            return Ok(());
        }
        let (elements, seed, rank, kind) = (count as u64, pattern.seed, rank as u64, pattern.kind as u32);
        let mut parameters = parameters![dst, elements, seed, rank, first_index, kind, world];
        let grid = self.grid(count.div_ceil(16 / dtype.size()));
        // SAFETY: these are `fill`'s parameters, in order; it writes `count` elements at `dst`, for which the caller
        // vouches.
        unsafe {
            self.fill[index_of(dtype)].launch(&self.context, grid, (THREADS, 1), stream, &mut parameters)
        }
    }

    /// Sets the two words at `result` to "nothing wrong so far": before the first [`verify`](Self::verify).
    ///
    /// # Errors
    /// [`CommError::InvalidArgument`], [`CommError::Cuda`].
    ///
    /// # Safety
    /// Two `u64`s at `result` are valid for writes on this device until the work has completed, nothing else uses them
    /// in that time, and `stream` is a live stream of this context.
    pub unsafe fn verify_reset(&self, result: DeviceAddr, stream: StreamHandle) -> Result<()> {
        check::span("result", result, 2, DType::U64)?;
        let mut parameters = parameters![result];
        // SAFETY: this is `verify_reset`'s parameter; it writes two words, for which the caller vouches.
        unsafe { self.verify_reset.launch(&self.context, 1, (1, 1), stream, &mut parameters) }
    }

    /// Compares `count` elements at `data`, bit for bit, with what they should be from element `first_index` on, and
    /// adds what it finds to the two words at `result`: the number of wrong elements, and the lowest index of one
    /// (`u64::MAX` for none). Indices count from `report_base`. Several calls can add to one result.
    ///
    /// Read the words with [`Mismatches::from_words`](crate::pattern::Mismatches::from_words).
    ///
    /// # Errors
    /// [`CommError::InvalidArgument`], [`CommError::Cuda`].
    ///
    /// # Safety
    /// `data` is valid for reads and the two words at `result` for writes on this device until the work has completed,
    /// nothing else writes them in that time, and `stream` is a live stream of this context.
    pub unsafe fn verify(
        &self,
        data: DeviceAddr,
        count: usize,
        dtype: DType,
        pattern: &Pattern,
        expected: Expected,
        first_index: u64,
        report_base: u64,
        result: DeviceAddr,
        stream: StreamHandle,
    ) -> Result<()> {
        let data_range = check::span("data", data, count, dtype)?;
        let result_range = check::span("result", result, 2, DType::U64)?;
        let world = pattern.check()?;
        if count == 0 {
            return Ok(());
        }
        if data_range.start < result_range.end && result_range.start < data_range.end {
            return Err(CommError::invalid("result", "lies inside the data"));
        }
        let (op, rank) = match expected {
            Expected::Sent(rank) => (SENT, rank as u64),
            Expected::Reduced(op) => (op_number(op), 0),
        };
        let (elements, seed, kind) = (count as u64, pattern.seed, pattern.kind as u32);
        let mut parameters =
            parameters![data, elements, seed, rank, first_index, report_base, kind, world, op, result];
        // SAFETY: these are `verify`'s parameters, in order; it reads `count` elements at `data` and updates two words
        // at `result`, for which the caller vouches.
        unsafe {
            self.verify[index_of(dtype)].launch(
                &self.context,
                self.grid(count),
                (THREADS, 1),
                stream,
                &mut parameters,
            )
        }
    }
}
