//! Loading compiled modules by the driver API: the one place that does.
//!
//! A module is loaded once per context and belongs to the context from then on: it is never unloaded by hand, because
//! that would wait for running kernels, and goes when the context goes.

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::sync::{Arc, Mutex, PoisonError};

use comm_core::{CommError, Result, StreamHandle};
use cudarc::driver::{CudaContext, result, sys};

use crate::driver;
use crate::launched::{self, Flag};
use crate::locate::KernelSet;
use crate::manifest::WORLDS;

/// A loaded module. Copies name the same module.
#[derive(Clone, Copy, Debug)]
pub struct Module {
    raw: sys::CUmodule,
    name: &'static str,
}

// SAFETY: a CUmodule is a handle into the driver, which may be used from any thread (CUDA Driver API, "Difference
// between the driver and runtime APIs": contexts and what belongs to them are not bound to a thread).
unsafe impl Send for Module {}
// SAFETY: as above; the driver serialises access.
unsafe impl Sync for Module {}

/// A kernel of a loaded module.
#[derive(Clone, Copy, Debug)]
pub struct Function {
    raw: sys::CUfunction,
    name: &'static str,
    /// What its launches set, where they are noted.
    flag: Option<Flag>,
}

// SAFETY: a CUfunction is a handle into the driver, usable from any thread, like its module.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

/// Whether a kernel may become resident while the stream's kernel before it still runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Overlap {
    /// If that one permits it (programmatic dependent launch). Kernels that permit it at their very beginning can so be
    /// resident in any number: the successor of one that is itself only waiting for its turn may begin as well.
    Allowed,
    /// One of the stream's kernels is resident at a time.
    Never,
}

/// The modules of one context, by its id: ids are never used twice, so an entry of a context that is gone is inert.
type Loaded = HashMap<(u64, &'static str), Module>;

static LOADED: Mutex<Option<Loaded>> = Mutex::new(None);

/// The driver's number for a context, different for every context of the process's life.
pub(crate) fn context_id(context: &Arc<CudaContext>) -> Result<u64> {
    driver::probe()?;
    let mut id = 0;
    // SAFETY: the context is alive, its owner is borrowed; `id` is a valid place for the result.
    unsafe { sys::cuCtxGetId(context.cu_ctx(), &raw mut id) }
        .result()
        .map_err(driver::failed("cuCtxGetId"))?;
    Ok(id)
}

impl Module {
    /// The module called `name` in `context`, loaded now if it was not before.
    ///
    /// # Errors
    /// [`CommError::Library`] when the module cannot be found or does not fit, or has no code for this GPU;
    /// [`CommError::Cuda`] otherwise.
    pub fn load(context: &Arc<CudaContext>, name: &'static str) -> Result<Self> {
        let id = context_id(context)?;
        let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
        let loaded = loaded.get_or_insert_default();
        if let Some(&module) = loaded.get(&(id, name)) {
            return Ok(module);
        }
        let set = KernelSet::locate()?;
        let image = set.image(name)?;
        context.bind_to_thread().map_err(driver::failed("cuCtxSetCurrent"))?;
        // SAFETY: the image is a complete fat binary: its hash is the one that the build wrote down. It is aligned
        // and outlives the call; the driver copies what it keeps.
        let raw = unsafe { result::module::load_data(image.as_ptr()) }.map_err(|failure| match failure.0 {
            sys::CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU
            | sys::CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION => CommError::Library {
                library: "CUDA kernels".into(),
                reason: format!(
                    "module {name:?} at {} was compiled for {} and does not run on this GPU; run `cargo xtask \
                     kernels --arch` with its architecture",
                    set.origin(),
                    set.manifest().archs.join(", ")
                ),
            },
            code => driver::error("cuModuleLoadData", code),
        })?;
        tracing::debug!(module = name, origin = %set.origin(), bytes = image.len(), "loaded a kernel module");
        let module = Self { raw, name };
        loaded.insert((id, name), module);
        Ok(module)
    }

    /// The kernel called `name`, its code loaded.
    ///
    /// # Errors
    /// [`CommError::Library`] when the module has no such kernel; [`CommError::Cuda`] otherwise.
    pub fn function(&self, name: &'static str) -> Result<Function> {
        let symbol = CString::new(name).map_err(|_| CommError::invalid("name", format!("{name:?}")))?;
        // SAFETY: the module was loaded and is never unloaded by hand.
        let raw =
            unsafe { result::module::get_function(self.raw, symbol) }.map_err(|failure| match failure.0 {
                sys::CUresult::CUDA_ERROR_NOT_FOUND => CommError::Library {
                    library: "CUDA kernels".into(),
                    reason: format!(
                        "module {:?} has no kernel {name:?}{}",
                        self.name,
                        left_out(name, &compiled_worlds())
                    ),
                },
                code => driver::error("cuModuleGetFunction", code),
            })?;
        // The driver would load the code at the first launch, and may wait for the device then, on which a kernel may be
        // waiting for what this very thread is to launch next.
        // SAFETY: the function belongs to a module that stays loaded.
        unsafe { sys::cuFuncLoad(raw) }.result().map_err(driver::failed("cuFuncLoad"))?;
        Ok(Function { raw, name, flag: launched::flag_of(name) })
    }
}

fn compiled_worlds() -> Vec<usize> {
    KernelSet::locate().map_or_else(|_| WORLDS.to_vec(), |set| set.manifest().worlds.clone())
}

/// In words, to be added to a kernel's not being there: that kernels for its number of ranks are not among the `compiled`.
fn left_out(kernel: &str, compiled: &[usize]) -> String {
    let world = kernel.rsplit_once("_w").and_then(|(_, world)| world.parse().ok());
    match world.filter(|world| WORLDS.contains(world) && !compiled.contains(world)) {
        Some(world) => format!(": for {world} ranks none were compiled; run `cargo xtask kernels`"),
        None => String::new(),
    }
}

impl Function {
    /// Its name in the module.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        self.name
    }

    /// The driver's handle, for a node of a graph; valid as long as the context. Counts as a launch.
    pub(crate) fn raw(&self) -> sys::CUfunction {
        launched::note(self.flag);
        self.raw
    }

    /// Launches on `stream`: `grid` blocks in x, `block` threads in x and y. The context is current afterwards.
    ///
    /// # Errors
    /// [`CommError::Cuda`].
    ///
    /// # Safety
    /// `parameters` point to values of the kernel's parameter types, in order, all of them. What the kernel does with
    /// them is sound: see the kernel. `stream` is a live stream of `context`, which is the function's.
    pub unsafe fn launch(
        &self,
        context: &Arc<CudaContext>,
        grid: u32,
        block: (u32, u32),
        stream: StreamHandle,
        parameters: &mut [*mut c_void],
    ) -> Result<()> {
        launched::note(self.flag);
        context.bind_to_thread().map_err(driver::failed("cuCtxSetCurrent"))?;
        // SAFETY: the function belongs to a module that stays loaded; the caller vouches for the rest.
        unsafe {
            result::launch_kernel(
                self.raw,
                (grid, 1, 1),
                (block.0, block.1, 1),
                0,
                stream.0 as sys::CUstream,
                parameters,
            )
        }
        .map_err(driver::failed("cuLaunchKernel"))
    }

    /// Launches as [`launch`](Self::launch) does, in clusters of `cluster` blocks, with `overlap` between the kernel and
    /// the stream's kernel before it.
    ///
    /// # Errors
    /// [`CommError::Cuda`].
    ///
    /// # Safety
    /// As for [`launch`](Self::launch); and the kernel waits for its predecessors (`griddepcontrol.wait`) before it
    /// touches memory.
    pub unsafe fn launch_after(
        &self,
        context: &Arc<CudaContext>,
        (grid, block): (u32, u32),
        cluster: u32,
        overlap: Overlap,
        stream: StreamHandle,
        parameters: &mut [*mut c_void],
    ) -> Result<()> {
        launched::note(self.flag);
        context.bind_to_thread().map_err(driver::failed("cuCtxSetCurrent"))?;
        // SAFETY: the structures are plain data, for which zero is a valid value.
        let mut attributes: [sys::CUlaunchAttribute; 2] = unsafe { std::mem::zeroed() };
        let mut used = 0;
        if overlap == Overlap::Allowed {
            attributes[used].id =
                sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
            attributes[used].value.programmaticStreamSerializationAllowed = 1;
            used += 1;
        }
        if cluster > 1 {
            attributes[used].id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
            attributes[used].value.clusterDim.x = cluster;
            attributes[used].value.clusterDim.y = 1;
            attributes[used].value.clusterDim.z = 1;
            used += 1;
        }
        // SAFETY: as above.
        let mut config: sys::CUlaunchConfig = unsafe { std::mem::zeroed() };
        (config.gridDimX, config.gridDimY, config.gridDimZ) = (grid, 1, 1);
        (config.blockDimX, config.blockDimY, config.blockDimZ) = (block, 1, 1);
        config.hStream = stream.0 as sys::CUstream;
        config.attrs = attributes.as_mut_ptr();
        config.numAttrs = used as u32;
        // SAFETY: the configuration and its attributes outlive the call; the function belongs to a module that stays
        // loaded; the caller vouches for the rest.
        unsafe {
            sys::cuLaunchKernelEx(&raw const config, self.raw, parameters.as_mut_ptr(), std::ptr::null_mut())
        }
        .result()
        .map_err(driver::failed("cuLaunchKernelEx"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_kernel_is_put_down_to_its_world_only_if_that_was_left_out() {
        assert!(left_out("p2p_ar1_bf16_w4", &[2, 8]).contains("for 4 ranks"));
        for (kernel, compiled) in [
            ("p2p_ar1_bf16_w2", &[2, 8][..]),
            ("p2p_ar1_bf16_w4", &WORLDS),
            ("fill_wide", &[2]),
            ("x_w9", &[2]),
        ] {
            assert_eq!(left_out(kernel, compiled), "");
        }
    }
}
