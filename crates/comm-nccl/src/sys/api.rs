//! The functions of NCCL's C interface, looked up at run time.

use std::ffi::{c_char, c_int, c_void};

use libloading::Library;

use super::types::{Comm, Config, DataType, RedOp, SimInfo, Status, Stream, UniqueId, Window};

macro_rules! functions {
    (
        required { $($field:ident = $symbol:literal: fn($($argument:ty),*) -> $output:ty;)* }
        optional { $($opt_field:ident = $opt_symbol:literal: fn($($opt_argument:ty),*) -> $opt_output:ty;)* }
    ) => {
        /// Pointers to the library's functions, under their names without the `nccl` prefix.
        ///
        /// Functions that every supported version has are plain; younger ones are `None` where the library lacks them.
        /// They are valid only while the library stays loaded.
        #[derive(Clone, Copy)]
        pub struct Api {
            $(#[doc = concat!("`", $symbol, "`.")] pub $field: unsafe extern "C" fn($($argument),*) -> $output,)*
            $(#[doc = concat!("`", $opt_symbol, "`.")]
              pub $opt_field: Option<unsafe extern "C" fn($($opt_argument),*) -> $opt_output>,)*
        }

        impl Api {
            /// Looks all functions up.
            ///
            /// # Errors
            /// The name of the first required function that the library lacks.
            ///
            /// # Safety
            /// The library is NCCL: its symbols have the types that NCCL's header declares.
            pub unsafe fn load(library: &Library) -> Result<Self, &'static str> {
                Ok(Self {
                    $(
                        // SAFETY: the caller vouches that the symbol has this type.
                        $field: *unsafe { library.get(concat!($symbol, "\0")) }.map_err(|_| $symbol)?,
                    )*
                    $(
                        // SAFETY: as above.
                        $opt_field: unsafe { library.get(concat!($opt_symbol, "\0")) }.ok().map(|symbol| *symbol),
                    )*
                })
            }

            /// The optional functions and whether the library has them.
            #[must_use]
            pub fn optional(&self) -> Vec<(&'static str, bool)> {
                vec![$(($opt_symbol, self.$opt_field.is_some())),*]
            }
        }
    };
}

functions! {
    required {
        get_version = "ncclGetVersion": fn(*mut c_int) -> Status;
        get_unique_id = "ncclGetUniqueId": fn(*mut UniqueId) -> Status;
        get_error_string = "ncclGetErrorString": fn(Status) -> *const c_char;
        comm_init_rank_config = "ncclCommInitRankConfig":
            fn(*mut *mut Comm, c_int, UniqueId, c_int, *mut Config) -> Status;
        comm_finalize = "ncclCommFinalize": fn(*mut Comm) -> Status;
        comm_destroy = "ncclCommDestroy": fn(*mut Comm) -> Status;
        comm_abort = "ncclCommAbort": fn(*mut Comm) -> Status;
        comm_get_async_error = "ncclCommGetAsyncError": fn(*mut Comm, *mut Status) -> Status;
        comm_count = "ncclCommCount": fn(*const Comm, *mut c_int) -> Status;
        comm_cu_device = "ncclCommCuDevice": fn(*const Comm, *mut c_int) -> Status;
        comm_user_rank = "ncclCommUserRank": fn(*const Comm, *mut c_int) -> Status;
        all_reduce = "ncclAllReduce":
            fn(*const c_void, *mut c_void, usize, DataType, RedOp, *mut Comm, Stream) -> Status;
        all_gather = "ncclAllGather":
            fn(*const c_void, *mut c_void, usize, DataType, *mut Comm, Stream) -> Status;
        reduce_scatter = "ncclReduceScatter":
            fn(*const c_void, *mut c_void, usize, DataType, RedOp, *mut Comm, Stream) -> Status;
        broadcast = "ncclBroadcast":
            fn(*const c_void, *mut c_void, usize, DataType, c_int, *mut Comm, Stream) -> Status;
        reduce = "ncclReduce":
            fn(*const c_void, *mut c_void, usize, DataType, RedOp, c_int, *mut Comm, Stream) -> Status;
        send = "ncclSend": fn(*const c_void, usize, DataType, c_int, *mut Comm, Stream) -> Status;
        recv = "ncclRecv": fn(*mut c_void, usize, DataType, c_int, *mut Comm, Stream) -> Status;
        group_start = "ncclGroupStart": fn() -> Status;
        group_end = "ncclGroupEnd": fn() -> Status;
    }
    optional {
        get_last_error = "ncclGetLastError": fn(*mut Comm) -> *const c_char;
        comm_init_rank = "ncclCommInitRank": fn(*mut *mut Comm, c_int, UniqueId, c_int) -> Status;
        comm_init_all = "ncclCommInitAll": fn(*mut *mut Comm, c_int, *const c_int) -> Status;
        comm_init_rank_scalable = "ncclCommInitRankScalable":
            fn(*mut *mut Comm, c_int, c_int, c_int, *mut UniqueId, *mut Config) -> Status;
        comm_split = "ncclCommSplit": fn(*mut Comm, c_int, c_int, *mut *mut Comm, *mut Config) -> Status;
        comm_shrink = "ncclCommShrink":
            fn(*mut Comm, *mut c_int, c_int, *mut *mut Comm, *mut Config, c_int) -> Status;
        comm_revoke = "ncclCommRevoke": fn(*mut Comm, c_int) -> Status;
        mem_alloc = "ncclMemAlloc": fn(*mut *mut c_void, usize) -> Status;
        mem_free = "ncclMemFree": fn(*mut c_void) -> Status;
        comm_register = "ncclCommRegister": fn(*const Comm, *mut c_void, usize, *mut *mut c_void) -> Status;
        comm_deregister = "ncclCommDeregister": fn(*const Comm, *mut c_void) -> Status;
        comm_window_register = "ncclCommWindowRegister":
            fn(*mut Comm, *mut c_void, usize, *mut *mut Window, c_int) -> Status;
        comm_window_deregister = "ncclCommWindowDeregister": fn(*mut Comm, *mut Window) -> Status;
        red_op_create_pre_mul_sum = "ncclRedOpCreatePreMulSum":
            fn(*mut RedOp, *mut c_void, DataType, c_int, *mut Comm) -> Status;
        red_op_destroy = "ncclRedOpDestroy": fn(RedOp, *mut Comm) -> Status;
        bcast = "ncclBcast": fn(*mut c_void, usize, DataType, c_int, *mut Comm, Stream) -> Status;
        all_to_all = "ncclAlltoAll":
            fn(*const c_void, *mut c_void, usize, DataType, *mut Comm, Stream) -> Status;
        gather = "ncclGather":
            fn(*const c_void, *mut c_void, usize, DataType, c_int, *mut Comm, Stream) -> Status;
        scatter = "ncclScatter":
            fn(*const c_void, *mut c_void, usize, DataType, c_int, *mut Comm, Stream) -> Status;
        group_simulate_end = "ncclGroupSimulateEnd": fn(*mut SimInfo) -> Status;
    }
}
