//! NCCL's functions with [`Result`]s in place of statuses.
//!
//! All are `unsafe` for the same reason: they pass raw communicators, addresses and streams on unchecked. NCCL's manual
//! demands that no two threads are inside NCCL on one communicator, that the communicator is live, and that the ranges
//! and the stream stay valid until the work is done.

use std::ffi::{c_int, c_void};
use std::marker::PhantomData;

use comm_core::{DeviceAddr, Result, StreamHandle};

use super::library::NcclLibrary;
use crate::sys::{self, Comm, Config, DataType, RedOp, Status, UniqueId};

/// How far a call on a non-blocking communicator got.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use]
pub enum Progress {
    /// It is done.
    Done,
    /// It goes on in the background; the communicator takes no other call until its async error is no longer
    /// `ncclInProgress`.
    Running,
}

const fn pointer(addr: DeviceAddr) -> *mut c_void {
    addr.0 as *mut c_void
}

const fn stream_of(stream: StreamHandle) -> sys::Stream {
    stream.0 as sys::Stream
}

/// NCCL's `int` for a rank, root, peer or colour. The values come from a live communicator, whose size NCCL itself
/// counts in an `int`.
#[allow(clippy::cast_possible_truncation, clippy::cast_possible_wrap, reason = "see above")]
const fn int(value: usize) -> c_int {
    value as c_int
}

macro_rules! collectives {
    ($($(#[$doc:meta])* $name:ident ($($argument:ident : $ty:ty => $pass:expr),* $(,)?) = $symbol:literal;)*) => {
        #[allow(clippy::missing_errors_doc, reason = "all: the library's status as CommError::Backend")]
        #[allow(clippy::missing_safety_doc, reason = "all: see the module")]
        impl NcclLibrary {
            $(
                $(#[$doc])*
                pub unsafe fn $name(
                    &self,
                    $($argument: $ty,)*
                    comm: *mut Comm,
                    stream: StreamHandle,
                ) -> Result<Progress> {
                    // SAFETY: the caller vouches for everything that the module's documentation demands.
                    let status = unsafe { (self.api().$name)($($pass,)* comm, stream_of(stream)) };
                    self.progress($symbol, status)
                }
            )*
        }
    };
}

collectives! {
    /// `ncclAllReduce`.
    all_reduce(
        send: DeviceAddr => pointer(send), recv: DeviceAddr => pointer(recv), count: usize => count,
        dtype: DataType => dtype, op: RedOp => op,
    ) = "ncclAllReduce";
    /// `ncclAllGather`.
    all_gather(
        send: DeviceAddr => pointer(send), recv: DeviceAddr => pointer(recv), count: usize => count,
        dtype: DataType => dtype,
    ) = "ncclAllGather";
    /// `ncclReduceScatter`.
    reduce_scatter(
        send: DeviceAddr => pointer(send), recv: DeviceAddr => pointer(recv), count: usize => count,
        dtype: DataType => dtype, op: RedOp => op,
    ) = "ncclReduceScatter";
    /// `ncclBroadcast`.
    broadcast(
        send: DeviceAddr => pointer(send), recv: DeviceAddr => pointer(recv), count: usize => count,
        dtype: DataType => dtype, root: usize => int(root),
    ) = "ncclBroadcast";
    /// `ncclReduce`.
    reduce(
        send: DeviceAddr => pointer(send), recv: DeviceAddr => pointer(recv), count: usize => count,
        dtype: DataType => dtype, op: RedOp => op, root: usize => int(root),
    ) = "ncclReduce";
    /// `ncclSend`.
    send(addr: DeviceAddr => pointer(addr), count: usize => count, dtype: DataType => dtype, peer: usize => int(peer))
        = "ncclSend";
    /// `ncclRecv`.
    recv(addr: DeviceAddr => pointer(addr), count: usize => count, dtype: DataType => dtype, peer: usize => int(peer))
        = "ncclRecv";
}

/// A group that is being put together on this thread. Ends it when dropped, so that an early return cannot leave the
/// thread inside a group.
pub(crate) struct Group<'a> {
    library: &'a NcclLibrary,
    open: bool,
    /// NCCL counts a thread's open groups, so this ends on the thread that it began on.
    _thread: PhantomData<*const ()>,
}

/// Which of these implementations is meant is ambiguous, and the build fails, if a group can leave its thread.
const _: () = {
    trait Either<A> {
        const STAYS: () = ();
    }
    impl<T> Either<()> for T {}
    struct IfSend;
    impl<T: Send> Either<IfSend> for T {}
    <Group<'_> as Either<_>>::STAYS
};

impl Group<'_> {
    /// Hands the group to NCCL (`ncclGroupEnd`).
    ///
    /// # Errors
    /// The library's status.
    pub(crate) fn end(mut self) -> Result<Progress> {
        self.open = false;
        // SAFETY: the group was started on this thread (the type is not Send), and what it holds was vouched for by
        // the calls that put it there.
        let status = unsafe { (self.library.api().group_end)() };
        self.library.progress("ncclGroupEnd", status)
    }
}

impl Drop for Group<'_> {
    fn drop(&mut self) {
        if self.open {
            // SAFETY: as in `end`. A call of the group failed, so NCCL discards it and the status repeats that failure.
            let _ = unsafe { (self.library.api().group_end)() };
        }
    }
}

#[allow(clippy::missing_errors_doc, reason = "all: the library's status as CommError::Backend")]
#[allow(clippy::missing_safety_doc, reason = "all: see the module")]
impl NcclLibrary {
    pub(crate) fn progress(&self, call: &'static str, status: Status) -> Result<Progress> {
        match status {
            sys::SUCCESS => Ok(Progress::Done),
            sys::IN_PROGRESS => Ok(Progress::Running),
            status => Err(self.error(call, status)),
        }
    }

    fn done(&self, call: &'static str, status: Status) -> Result<()> {
        if status == sys::SUCCESS { Ok(()) } else { Err(self.error(call, status)) }
    }

    /// `ncclGroupStart`: calls of this thread take effect together at [`Group::end`].
    pub(crate) fn group(&self) -> Result<Group<'_>> {
        // SAFETY: it takes nothing and only counts.
        let status = unsafe { (self.api().group_start)() };
        self.done("ncclGroupStart", status)?;
        Ok(Group { library: self, open: true, _thread: PhantomData })
    }

    /// `ncclGetUniqueId`: a new identity for a communicator, on one rank.
    pub fn unique_id(&self) -> Result<UniqueId> {
        let mut id = UniqueId { internal: [0; UniqueId::BYTES] };
        // SAFETY: the pointer is valid for the write.
        let status = unsafe { (self.api().get_unique_id)(&raw mut id) };
        self.done("ncclGetUniqueId", status)?;
        Ok(id)
    }

    /// `ncclCommInitRankConfig`. `comm` and `config` must stay where they are until the communicator is ready.
    pub unsafe fn comm_init_rank_config(
        &self,
        comm: *mut *mut Comm,
        size: usize,
        id: UniqueId,
        rank: usize,
        config: *mut Config,
    ) -> Result<Progress> {
        // SAFETY: the caller vouches for the pointers.
        let status = unsafe { (self.api().comm_init_rank_config)(comm, int(size), id, int(rank), config) };
        self.progress("ncclCommInitRankConfig", status)
    }

    /// `ncclCommSplit`. `child` is written when `comm` is ready again, and null with no colour.
    pub unsafe fn comm_split(
        &self,
        comm: *mut Comm,
        color: Option<usize>,
        key: i32,
        child: *mut *mut Comm,
        config: *mut Config,
    ) -> Result<Progress> {
        let split = self.need(self.api().comm_split, "ncclCommSplit")?;
        // SAFETY: the caller vouches for the pointers.
        let status = unsafe { split(comm, color.map_or(sys::SPLIT_NO_COLOR, int), key, child, config) };
        self.progress("ncclCommSplit", status)
    }

    /// `ncclCommGetAsyncError`: the state of what goes on in the background.
    pub unsafe fn comm_state(&self, comm: *mut Comm) -> Result<Progress> {
        let mut state = sys::SUCCESS;
        // SAFETY: the caller vouches for the communicator; the pointer is valid for the write.
        let status = unsafe { (self.api().comm_get_async_error)(comm, &raw mut state) };
        self.done("ncclCommGetAsyncError", status)?;
        self.progress("asynchronous work", state)
    }

    /// `ncclCommFinalize`: flushes, collectively.
    pub unsafe fn comm_finalize(&self, comm: *mut Comm) -> Result<Progress> {
        // SAFETY: the caller vouches for the communicator.
        let status = unsafe { (self.api().comm_finalize)(comm) };
        self.progress("ncclCommFinalize", status)
    }

    /// `ncclCommDestroy`: the communicator is gone afterwards, whatever the result. May wait for graphs that hold it.
    pub unsafe fn comm_destroy(&self, comm: *mut Comm) -> Result<Progress> {
        // SAFETY: the caller vouches for the communicator.
        let status = unsafe { (self.api().comm_destroy)(comm) };
        self.progress("ncclCommDestroy", status)
    }

    /// `ncclCommAbort`: makes kernels leave, and the communicator is gone afterwards, whatever the result.
    pub unsafe fn comm_abort(&self, comm: *mut Comm) -> Result<Progress> {
        // SAFETY: the caller vouches for the communicator.
        let status = unsafe { (self.api().comm_abort)(comm) };
        self.progress("ncclCommAbort", status)
    }

    /// `ncclAlltoAll`.
    pub unsafe fn all_to_all(
        &self,
        send: DeviceAddr,
        recv: DeviceAddr,
        count: usize,
        dtype: DataType,
        comm: *mut Comm,
        stream: StreamHandle,
    ) -> Result<Progress> {
        let all_to_all = self.need(self.api().all_to_all, "ncclAlltoAll")?;
        // SAFETY: the caller vouches for everything that the module's documentation demands.
        let status =
            unsafe { all_to_all(pointer(send), pointer(recv), count, dtype, comm, stream_of(stream)) };
        self.progress("ncclAlltoAll", status)
    }

    /// `ncclMemAlloc`, on the current device.
    pub unsafe fn mem_alloc(&self, bytes: usize) -> Result<DeviceAddr> {
        let alloc = self.need(self.api().mem_alloc, "ncclMemAlloc")?;
        let mut address = std::ptr::null_mut();
        // SAFETY: the pointer is valid for the write; the caller has made a device current.
        let status = unsafe { alloc(&raw mut address, bytes) };
        self.done("ncclMemAlloc", status)?;
        Ok(DeviceAddr(address as u64))
    }

    /// `ncclMemFree`.
    pub unsafe fn mem_free(&self, addr: DeviceAddr) -> Result<()> {
        let free = self.need(self.api().mem_free, "ncclMemFree")?;
        // SAFETY: the caller vouches that the address is from `mem_alloc` and unused.
        let status = unsafe { free(pointer(addr)) };
        self.done("ncclMemFree", status)
    }

    /// `ncclCommRegister`: the handle to give back.
    pub unsafe fn comm_register(
        &self,
        comm: *mut Comm,
        addr: DeviceAddr,
        bytes: usize,
    ) -> Result<*mut c_void> {
        let register = self.need(self.api().comm_register, "ncclCommRegister")?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: the caller vouches for the communicator and the range; the pointer is valid for the write.
        let status = unsafe { register(comm, pointer(addr), bytes, &raw mut handle) };
        self.done("ncclCommRegister", status)?;
        Ok(handle)
    }

    /// `ncclCommDeregister`.
    pub unsafe fn comm_deregister(&self, comm: *mut Comm, handle: *mut c_void) -> Result<()> {
        let deregister = self.need(self.api().comm_deregister, "ncclCommDeregister")?;
        // SAFETY: the caller vouches for the communicator and that the handle is live.
        let status = unsafe { deregister(comm, handle) };
        self.done("ncclCommDeregister", status)
    }
}
