//! Element-wise reduction of several buffers.

use comm_core::{CommError, DType, DeviceAddr, ReduceOp, Result, StreamHandle, check};

use super::data::op_number;
use super::{Kernels, THREADS, index_of, parameters};

/// The most buffers that one [`Kernels::reduce`] takes.
pub const MAX_REDUCE_INPUTS: usize = 32;

/// The kernel's by-value parameter: as in `reduce.cu`.
#[repr(C)]
struct Inputs {
    address: [u64; MAX_REDUCE_INPUTS],
}

impl Kernels {
    /// `output[i] = inputs[0][i] op inputs[1][i] op ...`, in that order, for `i < count`; semantics as
    /// [`ReduceOp`] documents, with the number of inputs for the number of ranks.
    ///
    /// 1 to [`MAX_REDUCE_INPUTS`] inputs; they may repeat. Fastest when all addresses are equal modulo 16.
    ///
    /// # Errors
    /// [`CommError::InvalidArgument`] also when `output` overlaps an input without being the same range;
    /// [`CommError::Cuda`].
    ///
    /// # Safety
    /// The inputs are valid for reads and the output for writes from this device until the work has completed, nothing
    /// else writes what is read or touches what is written in that time, and `stream` is a live stream of this
    /// context.
    pub unsafe fn reduce(
        &self,
        inputs: &[DeviceAddr],
        output: DeviceAddr,
        count: usize,
        dtype: DType,
        op: ReduceOp,
        stream: StreamHandle,
    ) -> Result<()> {
        // SAFETY: as this function's.
        unsafe { self.reduce_unless(DeviceAddr::NULL, inputs, output, count, (dtype, op), stream) }
    }

    /// [`reduce`](Self::reduce), unless the 32-bit word in device memory at `unless` is 1 when the kernel starts:
    /// nothing is read or written then.
    ///
    /// # Errors
    /// As [`reduce`](Self::reduce).
    ///
    /// # Safety
    /// As [`reduce`](Self::reduce). The word is null, or valid for reads and aligned; if it becomes nonzero while the kernel
    /// runs, the reduction may be done in part.
    pub unsafe fn reduce_unless(
        &self,
        unless: DeviceAddr,
        inputs: &[DeviceAddr],
        output: DeviceAddr,
        count: usize,
        (dtype, op): (DType, ReduceOp),
        stream: StreamHandle,
    ) -> Result<()> {
        let packed = pack(inputs, output, count, dtype)?;
        if count == 0 {
            return Ok(());
        }
        // `pack` has limited the number.
        let (number, elements, op) = (inputs.len() as u32, count as u64, op_number(op));
        let mut parameters = parameters![output, packed, number, elements, op, unless];
        let same_phase = inputs.iter().all(|input| input.0 % 16 == output.0 % 16);
        let units = if same_phase { count.div_ceil(16 / dtype.size()) } else { count };
        // SAFETY: these are `reduce`'s parameters, in order; it reads `count` elements of each input and writes as many
        // to the output, for which the caller vouches.
        unsafe {
            self.reduce[index_of(dtype)].launch(
                &self.context,
                self.grid(units),
                (THREADS, 1),
                stream,
                &mut parameters,
            )
        }
    }
}

fn pack(inputs: &[DeviceAddr], output: DeviceAddr, count: usize, dtype: DType) -> Result<Inputs> {
    if inputs.is_empty() || inputs.len() > MAX_REDUCE_INPUTS {
        return Err(CommError::invalid(
            "inputs",
            format!("{} buffers given; 1 to {MAX_REDUCE_INPUTS} can be reduced at once", inputs.len()),
        ));
    }
    let mut address = [0; MAX_REDUCE_INPUTS];
    for (place, &input) in address.iter_mut().zip(inputs) {
        check::same_size(input, output, count, dtype)?;
        *place = input.0;
    }
    Ok(Inputs { address })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inputs_are_counted_and_kept_apart_from_the_output() {
        let at = DeviceAddr;
        assert!(pack(&[], at(256), 4, DType::F32).is_err());
        assert!(pack(&[at(256); 33], at(256), 4, DType::F32).is_err());
        assert!(pack(&[at(256), at(260)], at(256), 4, DType::F32).is_err());
        assert!(pack(&[at(256), DeviceAddr::NULL], at(256), 4, DType::F32).is_err());
        let packed = pack(&[at(256), at(512)], at(256), 4, DType::F32).unwrap();
        assert_eq!(packed.address[..3], [256, 512, 0]);
    }
}
