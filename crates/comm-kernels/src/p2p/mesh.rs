//! Launchers of the kernels for meshes with gaps, and of the all-reduce by reading.

use std::sync::Arc;

use comm_core::{CommError, DType, DeviceAddr, Result, StreamHandle};
use cudarc::driver::CudaContext;

use super::functions::{PerFloat, float_index};
use super::link::MAX_RANKS;
use super::{FLAG_CTAS, Link, P2pKernels, PairStep, Peers, Shape, check_shape};
use crate::kernels::parameters;
use crate::module::{Function, Module};

/// Rows of a cube's buffer, in pairs: [`scratch_bytes`](super::scratch_bytes) and [`buffer_bytes`](super::buffer_bytes)
/// of so many ranks are those of a packet channel for the cube's kernels.
pub const CUBE_ROW_PAIRS: usize = 12;

/// Ranks of a hybrid cube mesh.
const CUBE_RANKS: usize = 8;

/// One rank's part in a hybrid cube mesh of eight.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CubeRoles {
    /// The three neighbours besides the relay.
    pub quad: [u32; 3],
    /// The neighbour in the other quad.
    pub relay: u32,
    /// The relay of each of `quad`.
    pub far: [u32; 3],
    #[doc(hidden)]
    pub reserved: u32,
}

/// How a rank's token reaches all ranks of a mesh with gaps, as seen by one rank.
#[repr(C)]
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct MeshRoutes {
    /// Bit `r`: rank `r` is a neighbour.
    pub neighbours: u32,
    /// Bit `x` of entry `y`: this rank passes `y`'s token on to `x`.
    pub forwards: [u8; MAX_RANKS],
    /// Who brings `y`'s token to this rank.
    pub via: [u8; MAX_RANKS],
}

/// The entry points, which are the same for all world sizes.
pub(super) struct MeshFunctions {
    one_shot: PerFloat,
    two_shot: PerFloat,
    all_gather: Function,
    barrier: Function,
    pair: Function,
    pull: PerFloat,
}

impl MeshFunctions {
    pub(super) fn load(context: &Arc<CudaContext>) -> Result<Self> {
        let cube = Module::load(context, "p2p_cube")?;
        let mesh = Module::load(context, "p2p_mesh")?;
        let pull = Module::load(context, "p2p_pull")?;
        let per_float = |module: &Module, names: [&'static str; 3]| -> Result<PerFloat> {
            Ok([module.function(names[0])?, module.function(names[1])?, module.function(names[2])?])
        };
        Ok(Self {
            one_shot: per_float(&cube, ["p2p_cube1_bf16", "p2p_cube1_f16", "p2p_cube1_f32"])?,
            two_shot: per_float(&cube, ["p2p_cube2_bf16", "p2p_cube2_f16", "p2p_cube2_f32"])?,
            all_gather: cube.function("p2p_cube_ag")?,
            barrier: mesh.function("p2p_mesh_barrier")?,
            pair: mesh.function("p2p_mesh_pair")?,
            pull: per_float(&pull, ["p2p_pull_bf16", "p2p_pull_f16", "p2p_pull_f32"])?,
        })
    }
}

#[allow(clippy::missing_safety_doc, reason = "as for the other launchers")]
impl P2pKernels {
    fn check_cube(&self, shape: Shape, most_threads: u64) -> Result<()> {
        check_shape(shape, most_threads)?;
        if self.world != CUBE_RANKS || shape.threads() < 32 {
            let found = format!("{} ranks, {} threads", self.world, shape.threads());
            return Err(CommError::invalid(
                "shape",
                format!("{found}; a cube takes 8 ranks, 32 threads at least"),
            ));
        }
        Ok(())
    }

    /// Sum all-reduce of bf16, f16 or f32 in a hybrid cube mesh. `link` is a packet channel's of [`CUBE_ROW_PAIRS`].
    /// `slices`: every rank adds up an eighth, for any count; else everything, of at most `slot_packs` packs of 12
    /// bytes.
    ///
    /// # Errors
    /// [`CommError::InvalidArgument`], [`CommError::Cuda`].
    pub unsafe fn all_reduce_cube(
        &self,
        link: &Link,
        roles: &CubeRoles,
        slices: bool,
        (send, recv): (DeviceAddr, DeviceAddr),
        count: usize,
        dtype: DType,
        shape: Shape,
        stream: StreamHandle,
    ) -> Result<()> {
        let packs = (count * dtype.size()).div_ceil(12);
        if !slices && packs > link.slot_packs as usize {
            return Err(CommError::invalid("count", format!("{packs} packs, {} fit", link.slot_packs)));
        }
        self.check_cube(shape, if slices { link.slot_packs.into() } else { u64::MAX })?;
        let mesh = &self.functions.mesh;
        let function = &(if slices { &mesh.two_shot } else { &mesh.one_shot })[float_index(dtype)?];
        let count = count as u64;
        // SAFETY: these are the kernel's parameters; the caller vouches for what they name.
        unsafe { self.launch(function, shape, stream, &mut parameters![*link, *roles, send, recv, count]) }
    }

    /// All-gather of `bytes` bytes a rank in a hybrid cube mesh; `link` as for
    /// [`all_reduce_cube`](Self::all_reduce_cube).
    ///
    /// # Errors
    /// [`CommError::InvalidArgument`], [`CommError::Cuda`].
    pub unsafe fn all_gather_cube(
        &self,
        link: &Link,
        roles: &CubeRoles,
        (send, recv): (DeviceAddr, DeviceAddr),
        bytes: usize,
        shape: Shape,
        stream: StreamHandle,
    ) -> Result<()> {
        self.check_cube(shape, link.slot_packs.into())?;
        let bytes = bytes as u64;
        let function = &self.functions.mesh.all_gather;
        // SAFETY: as above.
        unsafe { self.launch(function, shape, stream, &mut parameters![*link, *roles, send, recv, bytes]) }
    }

    /// Sum all-reduce by reading: `staging[r]` is rank `r`'s memory for `count` elements, aligned to 16 bytes. `link` is
    /// the packet channel's.
    ///
    /// # Errors
    /// [`CommError::InvalidArgument`], [`CommError::Cuda`].
    pub unsafe fn all_reduce_pull(
        &self,
        link: &Link,
        (send, recv): (DeviceAddr, DeviceAddr),
        count: usize,
        dtype: DType,
        staging: &Peers,
        shape: Shape,
        stream: StreamHandle,
    ) -> Result<()> {
        check_shape(shape, u64::MAX)?;
        if shape.grid > FLAG_CTAS || shape.block < 32 {
            let found = format!("{} blocks of {} threads", shape.grid, shape.block);
            return Err(CommError::invalid("shape", format!("{found}; at most {FLAG_CTAS}, of 32 at least")));
        }
        let function = &self.functions.mesh.pull[float_index(dtype)?];
        let (count, world) = (count as u64, self.world as u32);
        let mut parameters = parameters![*link, send, recv, count, *staging, world];
        // SAFETY: as above.
        unsafe { self.launch(function, shape, stream, &mut parameters) }
    }

    /// All ranks' streams meet, through neighbours' memory alone.
    ///
    /// # Errors
    /// [`CommError::Cuda`].
    pub unsafe fn barrier_mesh(&self, link: &Link, routes: &MeshRoutes, stream: StreamHandle) -> Result<()> {
        let function = &self.functions.mesh.barrier;
        let world = self.world as u32;
        let mut parameters = parameters![*link, *routes, world];
        // SAFETY: as above; without leave to start early, because its first access is not behind a wait.
        unsafe { function.launch(&self.context, 1, (32 * world, 1), stream, &mut parameters) }
    }

    /// One step of the handshake with a `peer` that is no neighbour, in box `mailbox` of the memory of `holder`.
    ///
    /// # Errors
    /// [`CommError::InvalidArgument`], [`CommError::Cuda`].
    pub unsafe fn pair_mesh(
        &self,
        link: &Link,
        counters: DeviceAddr,
        (peer, step): (usize, PairStep),
        (holder, mailbox): (usize, usize),
        stream: StreamHandle,
    ) -> Result<()> {
        // Place 0 is the neighbours'.
        let place = mailbox + 1;
        if place >= FLAG_CTAS as usize || holder >= self.world {
            return Err(CommError::invalid("mailbox", format!("there is no box {mailbox} at rank {holder}")));
        }
        let (peer, step, holder, place) = (peer as u32, step as u32, holder as u32, place as u32);
        let function = &self.functions.mesh.pair;
        let mut parameters = parameters![*link, counters, peer, step, holder, place];
        // SAFETY: as for the barrier.
        unsafe { function.launch(&self.context, 1, (32, 1), stream, &mut parameters) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_are_those_of_the_kernels() {
        assert_eq!(size_of::<CubeRoles>(), 32);
        assert_eq!(size_of::<MeshRoutes>(), 20);
    }
}
