//! The one place that knows which backends there are and what each runs on.

use anyhow::{Result, bail};
use comm_core::{HostFactory, Registry};
use comm_nccl::NcclFactory;
use comm_p2p::P2pFactory;

use crate::cuda_device::CudaDevice;
use crate::device::{Device, HostDevice};
use crate::gpus;

/// Memory of a rank that shares its GPU: more than the conformance suite and the fault tests use.
const RESERVE: usize = 512 << 20;

/// A backend by name, and what it needs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Backend {
    /// The name that configuration spells.
    pub name: &'static str,
    /// Whether every rank needs a GPU of its own.
    pub on_gpus: bool,
    /// Whether it sums in rank order, as [`comm_core::ReduceOp`] says.
    pub ordered_sums: bool,
    /// Whether minima and maxima of NaNs are NaN.
    pub nan_propagates: bool,
}

/// Every backend of the workspace.
pub const BACKENDS: [Backend; 3] = [
    Backend { name: "host", on_gpus: false, ordered_sums: true, nan_propagates: true },
    Backend { name: "p2p", on_gpus: true, ordered_sums: true, nan_propagates: true },
    // NCCL's order of summation is its algorithm's, and its minima are its own.
    Backend { name: "nccl", on_gpus: true, ordered_sums: false, nan_propagates: false },
];

/// The backend called `name`.
///
/// # Errors
/// When there is none; the message names those there are.
pub fn find(name: &str) -> Result<Backend> {
    match BACKENDS.into_iter().find(|backend| backend.name == name) {
        Some(backend) => Ok(backend),
        None => {
            bail!("unknown backend {name:?}; known are {}", BACKENDS.map(|backend| backend.name).join(", "))
        }
    }
}

/// A registry of all of them.
pub fn registry() -> Registry {
    let mut registry = Registry::new();
    registry.register(Box::new(HostFactory));
    registry.register(Box::new(NcclFactory::new()));
    registry.register(Box::new(P2pFactory));
    registry
}

/// The device that rank `local_rank` of this host works on. Where ranks share GPUs, it takes its memory at once: later the
/// driver might wait for the other ranks' kernels.
///
/// # Errors
/// When the backend is unknown, or the rank's GPU or its kernels cannot be used.
pub fn open_device(backend: &str, local_rank: usize) -> Result<Box<dyn Device>> {
    if find(backend)?.on_gpus {
        if !gpus::are_shared() {
            return Ok(Box::new(CudaDevice::open(local_rank, None)?));
        }
        let ordinal = gpus::of_rank(local_rank, comm_kernels::driver::device_count()?, true);
        return Ok(Box::new(CudaDevice::open(ordinal, Some(RESERVE))?));
    }
    Ok(Box::new(HostDevice::default()))
}

/// Which library the backend works with, in the process that asks; `None` for a backend that needs none.
pub fn library(backend: &str) -> Option<String> {
    if backend != comm_nccl::NAME {
        return None;
    }
    let library = comm_nccl::NcclLibrary::load().ok()?;
    Some(format!("NCCL {} at {}", library.version(), library.path().display()))
}

/// Whether NCCL can be loaded here.
///
/// # Errors
/// Why not, and what to do.
pub fn nccl_is_there() -> Result<()> {
    comm_nccl::NcclLibrary::load().map(drop).map_err(Into::into)
}
