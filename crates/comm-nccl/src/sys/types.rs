//! Types and constants of NCCL's C interface, laid out as NCCL 2.28 declares them.

use std::ffi::{c_char, c_int, c_uint, c_void};

/// A communicator (`ncclComm_t`). Only ever handled as a pointer.
#[repr(C)]
pub struct Comm {
    _opaque: [u8; 0],
}

/// A memory window (`ncclWindow_t`). Only ever handled as a pointer.
#[repr(C)]
pub struct Window {
    _opaque: [u8; 0],
}

/// A `cudaStream_t`, which is a `CUstream`.
pub type Stream = *mut c_void;

/// A status (`ncclResult_t`).
pub type Status = c_int;

/// `ncclSuccess`.
pub const SUCCESS: Status = 0;
/// `ncclUnhandledCudaError`.
pub const UNHANDLED_CUDA_ERROR: Status = 1;
/// `ncclSystemError`.
pub const SYSTEM_ERROR: Status = 2;
/// `ncclInternalError`.
pub const INTERNAL_ERROR: Status = 3;
/// `ncclInvalidArgument`.
pub const INVALID_ARGUMENT: Status = 4;
/// `ncclInvalidUsage`.
pub const INVALID_USAGE: Status = 5;
/// `ncclRemoteError`.
pub const REMOTE_ERROR: Status = 6;
/// `ncclInProgress`: a non-blocking call has been accepted and goes on in the background.
pub const IN_PROGRESS: Status = 7;

/// An element type (`ncclDataType_t`).
pub type DataType = c_int;

/// `ncclInt8`.
pub const INT8: DataType = 0;
/// `ncclUint8`.
pub const UINT8: DataType = 1;
/// `ncclInt32`.
pub const INT32: DataType = 2;
/// `ncclUint32`.
pub const UINT32: DataType = 3;
/// `ncclInt64`.
pub const INT64: DataType = 4;
/// `ncclUint64`.
pub const UINT64: DataType = 5;
/// `ncclFloat16`.
pub const FLOAT16: DataType = 6;
/// `ncclFloat32`.
pub const FLOAT32: DataType = 7;
/// `ncclFloat64`.
pub const FLOAT64: DataType = 8;
/// `ncclBfloat16`.
pub const BFLOAT16: DataType = 9;
/// `ncclFloat8e4m3`, since 2.24.
pub const FLOAT8E4M3: DataType = 10;
/// `ncclFloat8e5m2`, since 2.24.
pub const FLOAT8E5M2: DataType = 11;

/// A reduction (`ncclRedOp_t`).
pub type RedOp = c_int;

/// `ncclSum`.
pub const SUM: RedOp = 0;
/// `ncclProd`.
pub const PROD: RedOp = 1;
/// `ncclMax`.
pub const MAX: RedOp = 2;
/// `ncclMin`.
pub const MIN: RedOp = 3;
/// `ncclAvg`.
pub const AVG: RedOp = 4;

/// `NCCL_SPLIT_NOCOLOR`: the calling rank joins no group.
pub const SPLIT_NO_COLOR: c_int = -1;

/// `NCCL_CONFIG_UNDEF_INT`: the library chooses.
pub const UNDEFINED: c_int = c_int::MIN;

/// What rank 0 makes and every rank needs to meet the others (`ncclUniqueId`).
#[derive(Clone, Copy)]
#[repr(C)]
pub struct UniqueId {
    /// Opaque bytes.
    pub internal: [u8; Self::BYTES],
}

impl UniqueId {
    /// `NCCL_UNIQUE_ID_BYTES`.
    pub const BYTES: usize = 128;
}

/// How a communicator is made (`ncclConfig_t` of 2.28). The library reads as much of it as `size` and `version` say it
/// has, so one layout serves older and newer libraries.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Config {
    /// `sizeof(ncclConfig_t)`.
    pub size: usize,
    /// [`Config::MAGIC`].
    pub magic: c_uint,
    /// [`Config::VERSION`].
    pub version: c_uint,
    /// 0: calls return before their work is done, and say so.
    pub blocking: c_int,
    /// CTAs in a cluster.
    pub cga_cluster_size: c_int,
    /// Fewest CTAs of a kernel.
    pub min_ctas: c_int,
    /// Most CTAs of a kernel.
    pub max_ctas: c_int,
    /// The network module, a C string, or null.
    pub net_name: *const c_char,
    /// Whether a split communicator shares its parent's resources.
    pub split_share: c_int,
    /// The network's traffic class.
    pub traffic_class: c_int,
    /// A name for logs, a C string, or null.
    pub comm_name: *const c_char,
    /// Whether CollNet is used.
    pub collnet_enable: c_int,
    /// `NCCL_CTA_POLICY_*`.
    pub cta_policy: c_int,
    /// Whether a shrunk communicator shares its parent's resources.
    pub shrink_share: c_int,
    /// CTAs of NVLink SHARP kernels.
    pub nvls_ctas: c_int,
    /// Channels per network peer.
    pub n_channels_per_net_peer: c_int,
    /// Whether scheduling favours NVLink.
    pub nvlink_centric_sched: c_int,
}

impl Config {
    /// Marks an initialised structure.
    pub const MAGIC: c_uint = 0xcafe_beef;
    /// The version whose layout this is.
    pub const VERSION: c_uint = 22809;

    /// Everything left to the library, as `NCCL_CONFIG_INITIALIZER` does.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            size: size_of::<Self>(),
            magic: Self::MAGIC,
            version: Self::VERSION,
            blocking: UNDEFINED,
            cga_cluster_size: UNDEFINED,
            min_ctas: UNDEFINED,
            max_ctas: UNDEFINED,
            net_name: std::ptr::null(),
            split_share: UNDEFINED,
            traffic_class: UNDEFINED,
            comm_name: std::ptr::null(),
            collnet_enable: UNDEFINED,
            cta_policy: UNDEFINED,
            shrink_share: UNDEFINED,
            nvls_ctas: UNDEFINED,
            n_channels_per_net_peer: UNDEFINED,
            nvlink_centric_sched: UNDEFINED,
        }
    }
}

impl Default for Config {
    fn default() -> Self {
        Self::new()
    }
}

/// What `ncclGroupSimulateEnd` fills in (`ncclSimInfo_t`).
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct SimInfo {
    /// `sizeof(ncclSimInfo_t)`.
    pub size: usize,
    /// `0x74685283`.
    pub magic: c_uint,
    /// [`Config::VERSION`].
    pub version: c_uint,
    /// Microseconds.
    pub estimated_time: f32,
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use super::*;

    #[test]
    fn the_layout_is_the_header_s_of_2_28() {
        assert_eq!(size_of::<Config>(), 80);
        assert_eq!(align_of::<Config>(), 8);
        assert_eq!(offset_of!(Config, magic), 8);
        assert_eq!(offset_of!(Config, version), 12);
        assert_eq!(offset_of!(Config, blocking), 16);
        assert_eq!(offset_of!(Config, cga_cluster_size), 20);
        assert_eq!(offset_of!(Config, min_ctas), 24);
        assert_eq!(offset_of!(Config, max_ctas), 28);
        assert_eq!(offset_of!(Config, net_name), 32);
        assert_eq!(offset_of!(Config, split_share), 40);
        assert_eq!(offset_of!(Config, traffic_class), 44);
        assert_eq!(offset_of!(Config, comm_name), 48);
        assert_eq!(offset_of!(Config, collnet_enable), 56);
        assert_eq!(offset_of!(Config, cta_policy), 60);
        assert_eq!(offset_of!(Config, shrink_share), 64);
        assert_eq!(offset_of!(Config, nvls_ctas), 68);
        assert_eq!(offset_of!(Config, n_channels_per_net_peer), 72);
        assert_eq!(offset_of!(Config, nvlink_centric_sched), 76);
        assert_eq!(size_of::<UniqueId>(), 128);
        assert_eq!(align_of::<UniqueId>(), 1);
        assert_eq!(size_of::<SimInfo>(), 24);
    }
}
