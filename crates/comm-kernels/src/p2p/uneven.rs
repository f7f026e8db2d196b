//! Launchers of all-gather and reduce-scatter of parts that differ from rank to rank: `cuda/p2p/uneven.cu`.

use std::sync::Arc;

use comm_core::{CommError, DType, DeviceAddr, Result, StreamHandle};
use cudarc::driver::CudaContext;

use super::functions::{PerFloat, by_world, float_index, per_float};
use super::link::MAX_RANKS;
use super::{Link, P2pKernels, Peers, Shape, Units, check_direct, check_flags, check_shape};
use crate::kernels::parameters;
use crate::module::{Function, Module};

/// Where each rank's part of a whole begins, in bytes, and where the last one ends.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Parts {
    begin: [u64; MAX_RANKS + 1],
}

impl Parts {
    /// Parts of these lengths, in bytes, laid end to end.
    ///
    /// # Errors
    /// [`CommError::InvalidArgument`] for more parts than ranks can be, or if their sum overflows.
    pub fn new(lengths: &[usize]) -> Result<Self> {
        if lengths.len() > MAX_RANKS {
            return Err(CommError::invalid(
                "counts",
                format!("{} parts; at most {MAX_RANKS}", lengths.len()),
            ));
        }
        let mut begin = [0_u64; MAX_RANKS + 1];
        for place in 0..MAX_RANKS {
            let length = lengths.get(place).map_or(0, |&length| length as u64);
            begin[place + 1] = begin[place]
                .checked_add(length)
                .ok_or_else(|| CommError::invalid("counts", "the parts' sum overflows"))?;
        }
        Ok(Self { begin })
    }

    pub(super) fn check(&self) -> Result<()> {
        if self.longest() == 0 {
            return Err(CommError::invalid("counts", "all parts are empty"));
        }
        Ok(())
    }

    /// Bytes of the longest part.
    #[must_use]
    pub fn longest(&self) -> usize {
        let lengths = self.begin.iter().zip(&self.begin[1..]).map(|(begin, end)| end - begin);
        lengths.max().map_or(0, |longest| usize::try_from(longest).unwrap_or(usize::MAX))
    }
}

/// The entry points of one world size.
pub(super) struct UnevenFunctions {
    packets: Function,
    direct: Function,
    reduce_scatter: PerFloat,
    /// Two packs per thread, slice and chunk, then four.
    cells: [PerFloat; 2],
}

impl UnevenFunctions {
    pub(super) fn load(context: &Arc<CudaContext>, world: usize) -> Result<Self> {
        let uneven = Module::load(context, "p2p_uneven")?;
        Ok(Self {
            packets: uneven.function(by_world!(world, "p2p_agv_packet"))?,
            direct: uneven.function(by_world!(world, "p2p_agv_direct"))?,
            reduce_scatter: per_float!(uneven, world, "p2p_rsv"),
            cells: [per_float!(uneven, world, "p2p_rsvc2"), per_float!(uneven, world, "p2p_rsvc4")],
        })
    }
}

/// The safety contract is that of [`P2pKernels`]' other launchers. The operand of an empty part is not touched.
#[allow(clippy::missing_safety_doc, reason = "the block's comment holds for every method")]
impl P2pKernels {
    /// All-gather of uneven parts by packets; `recv` holds all parts.
    ///
    /// # Errors
    /// [`CommError::InvalidArgument`], [`CommError::Cuda`].
    pub unsafe fn all_gather_v_packets(
        &self,
        link: &Link,
        (send, recv): (DeviceAddr, DeviceAddr),
        parts: &Parts,
        shape: Shape,
        stream: StreamHandle,
    ) -> Result<()> {
        parts.check()?;
        check_shape(shape, link.slot_packs.into())?;
        let function = &self.functions.uneven.packets;
        // SAFETY: these are the kernel's parameters; the caller vouches for what they name.
        unsafe { self.launch(function, shape, stream, &mut parameters![*link, send, recv, *parts]) }
    }

    /// All-gather of uneven parts by stores into the peers' results; `chunk` as for
    /// [`all_gather_direct`](Self::all_gather_direct).
    ///
    /// # Errors
    /// [`CommError::InvalidArgument`], [`CommError::Cuda`].
    pub unsafe fn all_gather_v_direct(
        &self,
        link: &Link,
        send: DeviceAddr,
        recv: &Peers,
        (parts, chunk): (&Parts, u32),
        shape: Shape,
        stream: StreamHandle,
    ) -> Result<()> {
        parts.check()?;
        check_direct(shape, chunk)?;
        let function = &self.functions.uneven.direct;
        // SAFETY: as above.
        unsafe { self.launch(function, shape, stream, &mut parameters![*link, send, *recv, *parts, chunk]) }
    }

    /// Sum reduce-scatter of uneven parts, of whole elements: by Lamport packs, or by cells where `cells` says with how
    /// many units (`link` is then the cells' channel).
    ///
    /// # Errors
    /// [`CommError::InvalidArgument`], [`CommError::Cuda`].
    pub unsafe fn reduce_scatter_v(
        &self,
        link: &Link,
        cells: Option<Units>,
        (send, recv): (DeviceAddr, DeviceAddr),
        parts: &Parts,
        dtype: DType,
        shape: Shape,
        stream: StreamHandle,
    ) -> Result<()> {
        parts.check()?;
        match cells {
            Some(_) => check_flags(shape, u64::MAX)?,
            None => check_shape(shape, link.slot_packs.into())?,
        }
        let uneven = &self.functions.uneven;
        let table = cells.map_or(&uneven.reduce_scatter, |units| &uneven.cells[units as usize]);
        let function = &table[float_index(dtype)?];
        // SAFETY: as above.
        unsafe { self.launch(function, shape, stream, &mut parameters![*link, send, recv, *parts]) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_lie_end_to_end_as_the_kernels_read_them() {
        assert_eq!(size_of::<Parts>(), 8 * (MAX_RANKS + 1));
        let parts = Parts::new(&[4, 0, 6]).unwrap();
        assert_eq!(parts.begin, [0, 4, 4, 10, 10, 10, 10, 10, 10]);
        assert_eq!(parts.longest(), 6);
        assert!(parts.check().is_ok());
        assert!(Parts::new(&[0; 8]).unwrap().check().is_err());
        assert!(Parts::new(&[1; 9]).is_err());
        assert!(Parts::new(&[usize::MAX, 1]).is_err());
    }
}
