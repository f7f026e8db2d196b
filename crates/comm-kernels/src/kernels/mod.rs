//! The launchers, one file per kernel.
//!
//! Each checks its arguments, chooses the launch shape, and enqueues one kernel: no allocation, no copy, no wait.

mod copy;
mod data;
mod mark;
mod reduce;
mod rmsnorm;

use std::fmt;
use std::sync::Arc;

use comm_core::{DType, Result};
use cudarc::driver::{CudaContext, sys};

pub use self::mark::{Mark, MarkNode};
pub use self::reduce::MAX_REDUCE_INPUTS;
use crate::driver;
use crate::module::{Function, Module};

/// Threads of a block in the element-wise kernels; what their launch bounds say.
const THREADS: u32 = 256;

/// Blocks per multiprocessor in the element-wise kernels: all that can be resident, so that a grid-stride loop keeps
/// the device busy without a second wave.
const BLOCKS_PER_SM: u32 = 8;

/// One kernel per element type, in the order of [`DType::ALL`].
type PerType = [Function; 12];

/// The kernels, loaded into one context.
///
/// Cheap to load a second time: the modules are loaded once per context.
pub struct Kernels {
    context: Arc<CudaContext>,
    multiprocessors: u32,
    fill: PerType,
    verify: PerType,
    verify_reset: Function,
    mark: Function,
    mark_two: Function,
    reduce: PerType,
    copy_rows: Function,
    rmsnorm: rmsnorm::Variants,
    rmsnorm_fp8: rmsnorm::Variants,
}

impl fmt::Debug for Kernels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kernels").field("ordinal", &self.context.ordinal()).finish_non_exhaustive()
    }
}

macro_rules! per_type {
    ($module:expr, $prefix:literal) => {
        [
            $module.function(concat!($prefix, "_f64"))?,
            $module.function(concat!($prefix, "_f32"))?,
            $module.function(concat!($prefix, "_f16"))?,
            $module.function(concat!($prefix, "_bf16"))?,
            $module.function(concat!($prefix, "_f8e4m3"))?,
            $module.function(concat!($prefix, "_f8e5m2"))?,
            $module.function(concat!($prefix, "_i8"))?,
            $module.function(concat!($prefix, "_u8"))?,
            $module.function(concat!($prefix, "_i32"))?,
            $module.function(concat!($prefix, "_u32"))?,
            $module.function(concat!($prefix, "_i64"))?,
            $module.function(concat!($prefix, "_u64"))?,
        ]
    };
}

impl Kernels {
    /// Loads the kernels into `context`.
    ///
    /// # Errors
    /// [`Library`](comm_core::CommError::Library) when no compiled kernels are found, or they do not fit this program
    /// or this GPU; [`Cuda`](comm_core::CommError::Cuda) otherwise.
    pub fn load(context: &Arc<CudaContext>) -> Result<Arc<Self>> {
        let (fill, verify) = (Module::load(context, "fill")?, Module::load(context, "verify")?);
        let (reduce, mark) = (Module::load(context, "reduce")?, Module::load(context, "mark")?);
        let attribute = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let multiprocessors = context.attribute(attribute).map_err(driver::failed("cuDeviceGetAttribute"))?;
        Ok(Arc::new(Self {
            multiprocessors: u32::try_from(multiprocessors).unwrap_or(1).max(1),
            fill: per_type!(fill, "fill"),
            verify: per_type!(verify, "verify"),
            verify_reset: verify.function("verify_reset")?,
            mark: mark.function("mark")?,
            mark_two: mark.function("mark_two")?,
            reduce: per_type!(reduce, "reduce"),
            copy_rows: Module::load(context, "copy")?.function("copy_rows")?,
            rmsnorm: rmsnorm::Variants::load(&Module::load(context, "rmsnorm")?)?,
            rmsnorm_fp8: rmsnorm::Variants::load_fp8(&Module::load(context, "rmsnorm_fp8")?)?,
            context: Arc::clone(context),
        }))
    }

    /// The context that the kernels are loaded into.
    #[must_use]
    pub const fn context(&self) -> &Arc<CudaContext> {
        &self.context
    }

    /// The blocks to launch for `units` pieces of work, one per thread at a time.
    fn grid(&self, units: usize) -> u32 {
        grid(units, self.multiprocessors)
    }
}

fn grid(units: usize, multiprocessors: u32) -> u32 {
    let most = multiprocessors.saturating_mul(BLOCKS_PER_SM);
    u32::try_from(units.div_ceil(THREADS as usize)).unwrap_or(u32::MAX).clamp(1, most)
}

fn index_of(dtype: DType) -> usize {
    match dtype {
        DType::F64 => 0,
        DType::F32 => 1,
        DType::F16 => 2,
        DType::BF16 => 3,
        DType::F8E4M3 => 4,
        DType::F8E5M2 => 5,
        DType::I8 => 6,
        DType::U8 => 7,
        DType::I32 => 8,
        DType::U32 => 9,
        DType::I64 => 10,
        DType::U64 => 11,
    }
}

/// The array of parameter addresses that a launch takes. The values must outlive the launch call.
macro_rules! parameters {
    ($($value:expr),* $(,)?) => {
        [$((&raw const $value).cast_mut().cast::<std::ffi::c_void>()),*]
    };
}
pub(crate) use parameters;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_are_numbered_in_their_order() {
        for (index, dtype) in DType::ALL.into_iter().enumerate() {
            assert_eq!(index_of(dtype), index);
        }
    }

    #[test]
    fn grids_fit_the_work_and_the_device() {
        assert_eq!(grid(0, 132), 1);
        assert_eq!(grid(256, 132), 1);
        assert_eq!(grid(257, 132), 2);
        assert_eq!(grid(usize::MAX, 132), 132 * 8);
    }
}
