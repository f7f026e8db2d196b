//! Launchers of the peer-to-peer kernels.
//!
//! Each checks what the kernel cannot, and enqueues one kernel. Which one, in what shape and on which memory is for the
//! caller to decide; every rank of the communicator must decide alike.

mod average;
mod captured;
mod functions;
mod lines;
mod link;
mod mesh;
mod norm;
mod quantized;
mod steps;
mod uneven;

use std::ffi::c_void;
use std::fmt;
use std::sync::Arc;

use comm_core::{CommError, DType, DeviceAddr, Result, StreamHandle};
use cudarc::driver::CudaContext;

pub use self::captured::{CAPTURED_ENTRY_BYTES, CapturedEntry, CapturedKernels};
use self::functions::{Functions, float_index};
pub use self::lines::{BURST_BYTES, BURST_PACKS, MAX_LINE_BLOCK};
pub use self::link::{
    AHEAD, BUFFERS, Channel, ErrorRecord, FLAG_BYTES, FLAG_CTAS, HUSHED, Link, MAX_RANKS, PACK_BYTES,
    PAIR_COUNTERS_BYTES, Peers, TILE_BYTES, buffer_bytes, cells_bytes, lines_bytes, scratch_bytes, tiles,
};
pub use self::mesh::{CUBE_ROW_PAIRS, CubeRoles, MeshRoutes};
pub use self::quantized::{QUANTIZED_PACKS, QUANTIZED_ROW};
pub use self::uneven::Parts;
use crate::kernels::parameters;
use crate::module::Function;
pub use crate::module::Overlap;

/// Packs that a thread moves per slice and chunk in kernels by cells: more make longer bursts per peer, which the links
/// carry better, and need a longer message to fill the pipeline.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Units {
    /// Two blocks of 512 threads fit on a multiprocessor.
    Two = 0,
    /// One does.
    Four = 1,
}

/// The format of the packs that one hop sends, each on a channel of its own.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Wire {
    /// 12 bytes of payload and a round number in 16: the least latency.
    Packet = 0,
    /// 16 bytes of payload, marks to be put back: less on the wire.
    Lamport = 1,
}

impl Wire {
    /// Bytes of payload in a pack.
    #[must_use]
    pub const fn payload(self) -> usize {
        match self {
            Self::Packet => 12,
            Self::Lamport => 16,
        }
    }
}

/// How a kernel is launched: blocks, and threads of a block (at most 512).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Shape {
    /// Blocks. All of them must be resident at once.
    pub grid: u32,
    /// Threads of a block.
    pub block: u32,
}

impl Shape {
    /// Threads in all.
    #[must_use]
    pub const fn threads(self) -> u64 {
        self.grid as u64 * self.block as u64
    }
}

/// One step of a pair's handshake, each a kernel of one thread.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PairStep {
    /// Sender: wait until the receiver is through with the last message.
    AwaitFree = 0,
    /// Sender: tell the receiver that the staging buffer holds the next message.
    Announce = 1,
    /// Receiver: wait for that.
    AwaitFull = 2,
    /// Receiver: the staging buffer has been read.
    Release = 3,
}

/// The peer-to-peer kernels of one world size, loaded into one context.
pub struct P2pKernels {
    context: Arc<CudaContext>,
    world: usize,
    overlap: Overlap,
    functions: Functions,
}

impl fmt::Debug for P2pKernels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("P2pKernels").field("world", &self.world).finish_non_exhaustive()
    }
}

/// Most threads of a block, as the kernels' launch bounds say.
const MAX_BLOCK: u32 = 512;

/// Whole warps: what a kernel's threads have at least that the protocols' arguments count on, and what cells' rows are cut
/// by.
fn check_shape(shape: Shape, most_threads: u64) -> Result<()> {
    let Shape { grid, block } = shape;
    let whole = block != 0 && block <= MAX_BLOCK && block.is_multiple_of(32);
    if grid == 0 || !whole || shape.threads() > most_threads {
        return Err(CommError::invalid(
            "shape",
            format!(
                "{grid} blocks of {block} threads; whole warps, at most {MAX_BLOCK} threads a block and {most_threads} in all"
            ),
        ));
    }
    Ok(())
}

/// For kernels whose blocks have flags of their own.
fn check_flags(shape: Shape, most_threads: u64) -> Result<()> {
    check_shape(shape, most_threads)?;
    if shape.grid > FLAG_CTAS {
        return Err(CommError::invalid(
            "shape",
            format!("{} blocks; at most {FLAG_CTAS} have flags", shape.grid),
        ));
    }
    Ok(())
}

fn check_direct(shape: Shape, chunk: u32) -> Result<()> {
    check_flags(shape, u64::MAX)?;
    if chunk == 0 || !chunk.is_multiple_of(4096) {
        return Err(CommError::invalid("chunk", format!("{chunk} is no multiple of 4096")));
    }
    Ok(())
}

/// # Safety contract shared by all launchers
/// `link` describes live memory of the layout that the kernels document, on all ranks; operands are valid, for reads or
/// writes, until the work has completed; all ranks launch the same kernel with equal counts and shapes, in the same
/// order on each channel; `stream` is a live stream of this context.
#[allow(clippy::missing_safety_doc, reason = "the block's comment holds for every method")]
impl P2pKernels {
    /// Loads the kernels for `world` ranks (2 to 8) into `context`, code included, so that no launch has to. `overlap`:
    /// between a kernel and the one before it on its stream, whichever that is.
    ///
    /// # Errors
    /// [`CommError::InvalidArgument`] for another number of ranks; [`CommError::Library`] when the kernels are missing
    /// or have no code for this GPU (Hopper or later); [`CommError::Cuda`].
    pub fn load(context: &Arc<CudaContext>, world: usize, overlap: Overlap) -> Result<Self> {
        Ok(Self { context: Arc::clone(context), world, overlap, functions: Functions::load(context, world)? })
    }

    /// The number of ranks that the kernels are for.
    #[must_use]
    pub const fn world(&self) -> usize {
        self.world
    }

    unsafe fn launch(
        &self,
        function: &Function,
        shape: Shape,
        stream: StreamHandle,
        parameters: &mut [*mut c_void],
    ) -> Result<()> {
        let threads = (shape.grid, shape.block);
        // SAFETY: the callers vouch for the parameters; the kernels wait for their predecessor before they touch memory.
        unsafe { function.launch_after(&self.context, threads, 1, self.overlap, stream, parameters) }
    }

    /// Sum all-reduce of bf16, f16 or f32 in one hop: at most `slot_packs` packs. `link` is the wire's channel's.
    ///
    /// # Errors
    /// [`CommError::InvalidArgument`], [`CommError::Cuda`].
    pub unsafe fn all_reduce_one_shot(
        &self,
        (link, wire): (&Link, Wire),
        (send, recv): (DeviceAddr, DeviceAddr),
        count: usize,
        dtype: DType,
        shape: Shape,
        stream: StreamHandle,
    ) -> Result<()> {
        let packs = (count * dtype.size()).div_ceil(wire.payload());
        if packs > link.slot_packs as usize {
            return Err(CommError::invalid("count", format!("{packs} packs, {} fit", link.slot_packs)));
        }
        check_shape(shape, u64::MAX)?;
        let function = &self.functions.one_shot[wire as usize][float_index(dtype)?];
        let count = count as u64;
        // SAFETY: these are the kernel's parameters; the caller vouches for what they name.
        unsafe { self.launch(function, shape, stream, &mut parameters![*link, send, recv, count]) }
    }

    /// Sum all-reduce in two hops, by Lamport packs; any count.
    ///
    /// # Errors
    /// [`CommError::InvalidArgument`], [`CommError::Cuda`].
    pub unsafe fn all_reduce_two_shot(
        &self,
        link: &Link,
        (send, recv): (DeviceAddr, DeviceAddr),
        count: usize,
        dtype: DType,
        shape: Shape,
        stream: StreamHandle,
    ) -> Result<()> {
        check_shape(shape, link.slot_packs.into())?;
        let function = &self.functions.two_shot[float_index(dtype)?];
        let count = count as u64;
        // SAFETY: as above.
        unsafe { self.launch(function, shape, stream, &mut parameters![*link, send, recv, count]) }
    }

    /// Sum all-reduce by cells; `recv[r]` is rank `r`'s result. `link` is the cells' channel, of at least `shape.grid`
    /// cells.
    ///
    /// # Errors
    /// [`CommError::InvalidArgument`], [`CommError::Cuda`].
    pub unsafe fn all_reduce_cells(
        &self,
        link: &Link,
        units: Units,
        send: DeviceAddr,
        recv: &Peers,
        count: usize,
        dtype: DType,
        shape: Shape,
        stream: StreamHandle,
    ) -> Result<()> {
        check_flags(shape, u64::MAX)?;
        let function = &self.functions.all_reduce_cells[units as usize][float_index(dtype)?];
        let count = count as u64;
        // SAFETY: as above.
        unsafe { self.launch(function, shape, stream, &mut parameters![*link, send, *recv, count]) }
    }

    /// Sum reduce-scatter, `count` elements a rank: by Lamport packs, or by cells where `cells` says with how many
    /// units (`link` is then the cells' channel).
    ///
    /// # Errors
    /// [`CommError::InvalidArgument`], [`CommError::Cuda`].
    pub unsafe fn reduce_scatter(
        &self,
        link: &Link,
        cells: Option<Units>,
        (send, recv): (DeviceAddr, DeviceAddr),
        count: usize,
        dtype: DType,
        shape: Shape,
        stream: StreamHandle,
    ) -> Result<()> {
        match cells {
            Some(_) => check_flags(shape, u64::MAX)?,
            None => check_shape(shape, link.slot_packs.into())?,
        }
        let table = match cells {
            Some(units) => &self.functions.reduce_scatter_cells[units as usize],
            None => &self.functions.reduce_scatter,
        };
        let function = &table[float_index(dtype)?];
        let count = count as u64;
        // SAFETY: as above.
        unsafe { self.launch(function, shape, stream, &mut parameters![*link, send, recv, count]) }
    }

    /// All-gather by packets, `bytes` bytes a rank.
    ///
    /// # Errors
    /// [`CommError::InvalidArgument`], [`CommError::Cuda`].
    pub unsafe fn all_gather_packets(
        &self,
        link: &Link,
        (send, recv): (DeviceAddr, DeviceAddr),
        bytes: usize,
        shape: Shape,
        stream: StreamHandle,
    ) -> Result<()> {
        check_shape(shape, link.slot_packs.into())?;
        let bytes = bytes as u64;
        let function = &self.functions.all_gather_packets;
        // SAFETY: as above.
        unsafe { self.launch(function, shape, stream, &mut parameters![*link, send, recv, bytes]) }
    }

    /// All-gather by stores into the peers' results, `bytes` bytes a rank. `chunk`: bytes that a warp stores to one
    /// peer before it turns to the next, a multiple of 4096.
    ///
    /// # Errors
    /// [`CommError::InvalidArgument`], [`CommError::Cuda`].
    pub unsafe fn all_gather_direct(
        &self,
        link: &Link,
        send: DeviceAddr,
        recv: &Peers,
        (bytes, chunk): (usize, u32),
        shape: Shape,
        stream: StreamHandle,
    ) -> Result<()> {
        check_direct(shape, chunk)?;
        let bytes = bytes as u64;
        let function = &self.functions.all_gather_direct;
        // SAFETY: as above.
        unsafe { self.launch(function, shape, stream, &mut parameters![*link, send, *recv, bytes, chunk]) }
    }

    /// Broadcast by packets, in one hop or `relayed` over the other ranks; at most
    /// [`broadcast_limit`](Self::broadcast_limit) bytes.
    ///
    /// # Errors
    /// [`CommError::InvalidArgument`], [`CommError::Cuda`].
    pub unsafe fn broadcast_packets(
        &self,
        link: &Link,
        relayed: bool,
        (send, recv): (DeviceAddr, DeviceAddr),
        bytes: usize,
        root: usize,
        shape: Shape,
        stream: StreamHandle,
    ) -> Result<()> {
        check_shape(shape, link.slot_packs.into())?;
        let most = self.broadcast_limit(relayed, shape);
        if bytes as u64 > most {
            return Err(CommError::invalid("bytes", format!("{bytes}; at most {most} at a time")));
        }
        let function =
            if relayed { &self.functions.broadcast_relayed } else { &self.functions.broadcast_packets };
        let (bytes, root) = (bytes as u64, root as u32);
        // SAFETY: as above.
        unsafe { self.launch(function, shape, stream, &mut parameters![*link, send, recv, bytes, root]) }
    }

    /// The most bytes that one broadcast by packets in this shape moves.
    #[must_use]
    pub const fn broadcast_limit(&self, relayed: bool, shape: Shape) -> u64 {
        let slices = if relayed { self.world as u64 - 1 } else { 1 };
        12 * 2 * shape.threads() * slices
    }

    /// Broadcast by stores into the peers' results, over relays. `chunk`: bytes of a block and slice between two flags,
    /// a multiple of 4096.
    ///
    /// # Errors
    /// [`CommError::InvalidArgument`], [`CommError::Cuda`].
    pub unsafe fn broadcast_direct(
        &self,
        link: &Link,
        send: DeviceAddr,
        recv: &Peers,
        bytes: usize,
        (root, chunk): (usize, u32),
        shape: Shape,
        stream: StreamHandle,
    ) -> Result<()> {
        check_direct(shape, chunk)?;
        let (bytes, root) = (bytes as u64, root as u32);
        let function = &self.functions.broadcast_direct;
        let mut parameters = parameters![*link, send, *recv, bytes, root, chunk];
        // SAFETY: as above.
        unsafe { self.launch(function, shape, stream, &mut parameters) }
    }

    /// All ranks' streams meet here.
    ///
    /// # Errors
    /// [`CommError::Cuda`].
    pub unsafe fn barrier(&self, link: &Link, stream: StreamHandle) -> Result<()> {
        let function = &self.functions.barrier;
        // SAFETY: as above; without leave to start early, because its first access is not behind a wait.
        unsafe { function.launch(&self.context, 1, (32, 1), stream, &mut parameters![*link]) }
    }

    /// Keeps flags that have not been raised for long from seeming to be ahead once the rounds have gone round 2^32. To be
    /// called at least once in 2^30 rounds of the channel, on any stream: it runs beside the channel's other kernels.
    ///
    /// # Errors
    /// [`CommError::Cuda`].
    pub unsafe fn lift(&self, link: &Link, stream: StreamHandle) -> Result<()> {
        const BLOCK: u32 = 256;
        let blocks = (FLAG_BYTES / size_of::<u32>()).div_ceil(BLOCK as usize) as u32;
        // SAFETY: as above; nothing on the stream is to be overtaken.
        unsafe {
            self.functions.lift.launch(&self.context, blocks, (BLOCK, 1), stream, &mut parameters![*link])
        }
    }

    /// One step of the handshake with `peer`. `counters`: [`PAIR_COUNTERS_BYTES`] of this rank's device memory.
    ///
    /// # Errors
    /// [`CommError::Cuda`].
    pub unsafe fn pair(
        &self,
        link: &Link,
        counters: DeviceAddr,
        peer: usize,
        step: PairStep,
        stream: StreamHandle,
    ) -> Result<()> {
        let (peer, step) = (peer as u32, step as u32);
        let function = &self.functions.pair;
        // SAFETY: as for the barrier.
        unsafe {
            let mut parameters = parameters![*link, counters, peer, step];
            function.launch(&self.context, 1, (32, 1), stream, &mut parameters)
        }
    }
}
