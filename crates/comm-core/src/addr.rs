//! Raw operands: where a buffer lies and which stream orders the work.

use std::fmt;

/// An address that a backend's ranks can dereference: a CUDA device address, or a host address for the host backend.
///
/// It carries no length and no lifetime; the `unsafe` methods of [`DeviceComm`](crate::DeviceComm) state what must hold.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[repr(transparent)]
pub struct DeviceAddr(pub u64);

impl DeviceAddr {
    /// The null address. Accepted where the element count is zero, an error elsewhere.
    pub const NULL: Self = Self(0);

    /// The address `bytes` further on.
    ///
    /// Wraps on overflow; the argument checks of [`check`](crate::check) refuse ranges that do.
    #[must_use]
    pub const fn offset(self, bytes: u64) -> Self {
        Self(self.0.wrapping_add(bytes))
    }

    /// Whether this is the null address.
    #[must_use]
    pub const fn is_null(self) -> bool {
        self.0 == 0
    }

    /// Whether the address is a multiple of `align` bytes. An `align` of zero counts as one.
    #[must_use]
    pub const fn is_aligned_to(self, align: u64) -> bool {
        align == 0 || self.0.is_multiple_of(align)
    }

    /// The address of the first element of a host slice.
    #[must_use]
    pub fn of_slice<T>(slice: &[T]) -> Self {
        Self(slice.as_ptr() as u64)
    }

    /// The address of the first element of a host slice that will be written.
    #[must_use]
    pub fn of_slice_mut<T>(slice: &mut [T]) -> Self {
        Self(slice.as_mut_ptr() as u64)
    }
}

impl fmt::Debug for DeviceAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// The queue that orders a collective among a device's other work: a `CUstream` as an integer.
///
/// Backends over host memory ignore it: their calls have completed when they return.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
#[repr(transparent)]
pub struct StreamHandle(pub u64);

impl StreamHandle {
    /// The default stream (and the only one for host memory).
    pub const NULL: Self = Self(0);
}
