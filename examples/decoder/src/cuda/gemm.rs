//! Matrix products by cuBLASLt.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::c_void;
use std::ptr::from_ref;
use std::sync::Arc;

use comm_core::{CommError, DeviceAddr, DeviceMemory, Result, StreamHandle};
use comm_kernels::{CudaMemory, driver};
use cudarc::cublaslt::{result, sys};
use cudarc::driver::CudaContext;

use super::library;
use crate::device::Linear;

/// What NVIDIA recommends for Hopper (cuBLAS manual, `cublasSetWorkspace`).
const WORKSPACE: usize = 32 << 20;

/// cuBLASLt on one device, for products of bf16 matrices with sums in f32. A product is planned at its first use; after
/// that it is enqueued without an allocation, so that it can be captured in a CUDA graph.
pub struct Gemms {
    context: Arc<CudaContext>,
    handle: sys::cublasLtHandle_t,
    workspace: DeviceAddr,
    /// By inputs, outputs and tokens.
    plans: RefCell<HashMap<(usize, usize, usize), Plan>>,
}

impl Gemms {
    /// # Errors
    /// [`CommError::Library`] without cuBLASLt; [`CommError::Backend`] when it fails.
    pub fn new(memory: &CudaMemory) -> Result<Self> {
        library::ensure()?;
        let context = Arc::clone(memory.context());
        bind(&context)?;
        let workspace = memory.allocate(WORKSPACE)?;
        let handle = result::create_handle().map_err(failed("cublasLtCreate"))?;
        Ok(Self { context, handle, workspace, plans: RefCell::default() })
    }

    /// Enqueues `output = input * transpose(weight)`: `[tokens, inputs]` to `[tokens, outputs]`.
    ///
    /// # Errors
    /// [`CommError::Backend`], [`CommError::Cuda`].
    ///
    /// # Safety
    /// The three matrices are valid on this device until the work has completed, the output is apart from the others, and
    /// `stream` is a live stream of the device, the same one in all calls: they share a workspace.
    pub unsafe fn enqueue(
        &self,
        linear: &Linear,
        (input, output): (DeviceAddr, DeviceAddr),
        tokens: usize,
        stream: StreamHandle,
    ) -> Result<()> {
        bind(&self.context)?;
        let mut plans = self.plans.borrow_mut();
        let key = (linear.inputs, linear.outputs, tokens);
        let plan = match plans.entry(key) {
            std::collections::hash_map::Entry::Occupied(known) => known.into_mut(),
            std::collections::hash_map::Entry::Vacant(free) => {
                free.insert(Plan::new(self.handle, linear, tokens)?)
            }
        };
        let (one, zero) = (1.0_f32, 0.0_f32);
        let pointer = |addr: DeviceAddr| addr.0 as *mut c_void;
        // SAFETY: handle and plan are live; the layouts are those of the matrices, for which the caller vouches; the
        // workspace is used by this stream alone.
        unsafe {
            result::matmul(
                self.handle,
                plan.product,
                from_ref(&one).cast(),
                from_ref(&zero).cast(),
                pointer(linear.weight),
                plan.weight,
                pointer(input),
                plan.input,
                pointer(output),
                plan.output,
                pointer(output),
                plan.output,
                &raw const plan.algorithm,
                pointer(self.workspace),
                WORKSPACE,
                stream.0 as sys::cudaStream_t,
            )
        }
        .map_err(failed("cublasLtMatmul"))
    }
}

impl Drop for Gemms {
    fn drop(&mut self) {
        self.plans.get_mut().clear();
        if bind(&self.context).is_ok() {
            // SAFETY: the handle is live and not used again. The workspace belongs to the memory that it came from.
            let _ = unsafe { result::destroy_handle(self.handle) };
        }
    }
}

/// A product's layouts, and the way that cuBLASLt thinks fastest.
///
/// cuBLASLt counts columns first. A row-major matrix is its own transpose to it, and so the product is
/// `transpose(output) = weight * transpose(input)`, with the weight the one operand that is transposed once more.
struct Plan {
    product: sys::cublasLtMatmulDesc_t,
    weight: sys::cublasLtMatrixLayout_t,
    input: sys::cublasLtMatrixLayout_t,
    output: sys::cublasLtMatrixLayout_t,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

impl Plan {
    fn new(handle: sys::cublasLtHandle_t, linear: &Linear, tokens: usize) -> Result<Self> {
        use sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA;
        /// `CUBLAS_OP_T`, of cuBLAS's own header.
        const TRANSPOSE: i32 = 1;
        // Filled step by step, so that a failure gives back what there is.
        let mut plan = Self {
            product: std::ptr::null_mut(),
            weight: std::ptr::null_mut(),
            input: std::ptr::null_mut(),
            output: std::ptr::null_mut(),
            algorithm: sys::cublasLtMatmulAlgo_t { data: [0; 8] },
        };
        let sums = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        plan.product = result::create_matmul_desc(sums, sys::cudaDataType::CUDA_R_32F)
            .map_err(failed("cublasLtMatmulDescCreate"))?;
        // SAFETY: the description is live; the attribute is an int.
        unsafe {
            result::set_matmul_desc_attribute(
                plan.product,
                CUBLASLT_MATMUL_DESC_TRANSA,
                from_ref(&TRANSPOSE).cast(),
                size_of::<i32>(),
            )
        }
        .map_err(failed("cublasLtMatmulDescSetAttribute"))?;
        plan.weight = layout(linear.inputs, linear.outputs)?;
        plan.input = layout(linear.inputs, tokens)?;
        plan.output = layout(linear.outputs, tokens)?;
        plan.algorithm = plan.choose(handle)?;
        Ok(plan)
    }

    /// Asks cuBLASLt for the way to go, given the workspace.
    fn choose(&self, handle: sys::cublasLtHandle_t) -> Result<sys::cublasLtMatmulAlgo_t> {
        use sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
        let preference = result::create_matmul_pref().map_err(failed("cublasLtMatmulPreferenceCreate"))?;
        let limit: u64 = WORKSPACE as u64;
        // SAFETY: the preference and the layouts are live; the attribute is a 64-bit integer.
        let chosen = unsafe {
            result::set_matmul_pref_attribute(
                preference,
                CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                from_ref(&limit).cast(),
                size_of::<u64>(),
            )
            .and_then(|()| {
                result::get_matmul_algo_heuristic(
                    handle,
                    self.product,
                    self.weight,
                    self.input,
                    self.output,
                    self.output,
                    preference,
                )
            })
        };
        // SAFETY: the preference is live and not used again.
        let _ = unsafe { result::destroy_matmul_pref(preference) };
        chosen.map(|chosen| chosen.algo).map_err(failed("cublasLtMatmulAlgoGetHeuristic"))
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        for layout in [self.weight, self.input, self.output].into_iter().filter(|layout| !layout.is_null()) {
            // SAFETY: this plan owns the layout. It is host memory: enqueued work needs it no more.
            let _ = unsafe { result::destroy_matrix_layout(layout) };
        }
        if !self.product.is_null() {
            // SAFETY: as above.
            let _ = unsafe { result::destroy_matmul_desc(self.product) };
        }
    }
}

/// A dense matrix as cuBLASLt counts: `rows` elements lie next to each other.
fn layout(rows: usize, columns: usize) -> Result<sys::cublasLtMatrixLayout_t> {
    let kind = sys::cudaDataType::CUDA_R_16BF;
    result::create_matrix_layout(kind, rows as u64, columns as u64, rows as i64)
        .map_err(failed("cublasLtMatrixLayoutCreate"))
}

fn bind(context: &CudaContext) -> Result<()> {
    context.bind_to_thread().map_err(|failure| driver::error("cuCtxSetCurrent", failure.0))
}

/// For `map_err`: the failure of `call` as an error.
fn failed(call: &'static str) -> impl Fn(result::CublasError) -> CommError {
    move |result::CublasError(status)| CommError::Backend {
        backend: "cublasLt".into(),
        call: call.into(),
        code: status as i64,
        message: format!("{status:?}"),
    }
}
