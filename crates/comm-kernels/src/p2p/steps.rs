//! Launchers of what the largest buffers go by: `cuda/p2p/steps.cu`.

use comm_core::{CommError, DType, DeviceAddr, Result, StreamHandle};

use super::functions::float_index;
use super::{FLAG_CTAS, Link, P2pKernels, Peers, Shape, TILE_BYTES, tiles};
use crate::kernels::parameters;

/// Threads of a block that sums: a mover, two warps that raise flags, and those that add.
const SUM_BLOCK: u32 = 512;
/// Threads of a block that gathers in steps: a mover.
const MOVE_BLOCK: u32 = 32;
/// Threads of a block that spreads.
const SPREAD_BLOCK: u32 = 64;
/// Bytes of a tile where nothing is summed: the shorter, the more sharply a step ends.
const MOVE_TILE: u32 = 8 << 10;
/// A queue's places are 32-bit numbers.
const MOST_PLACES: u64 = u32::MAX as u64 / 2;

fn check_grid(grid: u32) -> Result<()> {
    if grid == 0 || grid > FLAG_CTAS {
        return Err(CommError::invalid("grid", format!("{grid} blocks; 1 to {FLAG_CTAS}")));
    }
    Ok(())
}

/// The safety contract is that of [`P2pKernels`]' other launchers.
#[allow(clippy::missing_safety_doc, reason = "the block's comment holds for every method")]
impl P2pKernels {
    /// Sum all-reduce in steps; `recv[r]` is rank `r`'s result. `link` is the cells' channel, of `ctas` cells. `grid`
    /// blocks, one on a multiprocessor.
    ///
    /// # Errors
    /// [`CommError::InvalidArgument`], [`CommError::Cuda`].
    pub unsafe fn all_reduce_steps(
        &self,
        (link, ctas): (&Link, usize),
        send: DeviceAddr,
        recv: &Peers,
        count: usize,
        dtype: DType,
        grid: u32,
        stream: StreamHandle,
    ) -> Result<()> {
        check_grid(grid)?;
        let function = &self.functions.all_reduce_steps[float_index(dtype)?];
        let (count, tile, tiles) = (count as u64, TILE_BYTES, tiles(ctas));
        let shape = Shape { grid, block: SUM_BLOCK };
        let mut parameters = parameters![*link, send, *recv, count, tile, tiles];
        // SAFETY: these are the kernel's parameters; the caller vouches for what they name.
        unsafe { self.launch(function, shape, stream, &mut parameters) }
    }

    /// Sum reduce-scatter in steps, `count` elements a rank. `link`, `ctas` and `grid` as for the all-reduce.
    ///
    /// # Errors
    /// [`CommError::InvalidArgument`], [`CommError::Cuda`].
    pub unsafe fn reduce_scatter_steps(
        &self,
        (link, ctas): (&Link, usize),
        (send, recv): (DeviceAddr, DeviceAddr),
        count: usize,
        dtype: DType,
        grid: u32,
        stream: StreamHandle,
    ) -> Result<()> {
        check_grid(grid)?;
        let function = &self.functions.reduce_scatter_steps[float_index(dtype)?];
        let (count, tile, tiles) = (count as u64, TILE_BYTES, tiles(ctas));
        let shape = Shape { grid, block: SUM_BLOCK };
        let mut parameters = parameters![*link, send, recv, count, tile, tiles];
        // SAFETY: as above.
        unsafe { self.launch(function, shape, stream, &mut parameters) }
    }

    /// All-gather in steps, `bytes` bytes a rank; `recv[r]` is rank `r`'s result. `link` is any channel with flags.
    ///
    /// # Errors
    /// [`CommError::InvalidArgument`], [`CommError::Cuda`].
    pub unsafe fn all_gather_steps(
        &self,
        link: &Link,
        send: DeviceAddr,
        recv: &Peers,
        bytes: usize,
        grid: u32,
        stream: StreamHandle,
    ) -> Result<()> {
        check_grid(grid)?;
        let bytes = bytes as u64;
        // Longer tiles where the queue would have too many places.
        let places = |tile: u32| bytes.div_ceil(tile.into()) * (self.world() as u64 - 1);
        let tile = if places(MOVE_TILE) <= MOST_PLACES { MOVE_TILE } else { TILE_BYTES };
        if places(tile) > MOST_PLACES {
            return Err(CommError::invalid("bytes", format!("{bytes} a rank are too many")));
        }
        let function = &self.functions.all_gather_steps;
        let shape = Shape { grid, block: MOVE_BLOCK };
        // SAFETY: as above.
        unsafe { self.launch(function, shape, stream, &mut parameters![*link, send, *recv, bytes, tile]) }
    }

    /// All-gather by one read and stores to all, `bytes` bytes a rank; `recv[r]` is rank `r`'s result. `link` is any
    /// channel with flags.
    ///
    /// # Errors
    /// [`CommError::InvalidArgument`], [`CommError::Cuda`].
    pub unsafe fn all_gather_spread(
        &self,
        link: &Link,
        send: DeviceAddr,
        recv: &Peers,
        bytes: usize,
        grid: u32,
        stream: StreamHandle,
    ) -> Result<()> {
        check_grid(grid)?;
        let bytes = bytes as u64;
        let function = &self.functions.all_gather_spread;
        let shape = Shape { grid, block: SPREAD_BLOCK };
        // SAFETY: as above.
        unsafe { self.launch(function, shape, stream, &mut parameters![*link, send, *recv, bytes]) }
    }
}
