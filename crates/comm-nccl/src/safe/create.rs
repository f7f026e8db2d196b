//! Making a communicator: from nothing by a unique id, or from a native one that a split has made.

use std::sync::Arc;

use comm_core::{
    CommError, CommInfo, CreateContext, Deadline, DeviceAddr, HostComm, HostCommExt, MemoryKind, OpKind,
    Result,
};
use comm_kernels::order::CallOrder;

use super::comm::NcclComm;
use super::farewell::Farewell;
use super::remains;
use super::state::{Base, Hosts, Pause, Scratch, Shared, lock};
use super::track::Tracker;
use super::watchdog;
use crate::driver::{self, Current};
use crate::result::Progress;
use crate::sys::{self, Config, UniqueId};

/// What NCCL may write to, or read, after the call that was given it has returned.
///
/// NCCL's own thread may write the communicator late, so if the wait for it ends early the structure is leaked.
struct Slot {
    comm: *mut sys::Comm,
    config: Config,
}

/// A communicator in the making: `info` and `hosts` settled, nothing native yet.
pub(crate) struct Draft {
    pub(crate) shared: Arc<Shared>,
    pub(crate) comm: NcclComm,
}

/// Makes the hosts of a new communicator from the host communicator that has its ranks.
pub(crate) fn hosts(
    control: Arc<dyn HostComm>,
    parent: Option<Arc<dyn HostComm>>,
    deadline: Deadline,
) -> Result<Hosts> {
    let diagnosis = sibling(&*control, deadline)?;
    let farewell = Farewell::new(sibling(&*control, deadline)?);
    Ok(Hosts { parent, control, diagnosis, farewell })
}

/// A host communicator of the same ranks in the same order.
fn sibling(host: &dyn HostComm, deadline: Deadline) -> Result<Arc<dyn HostComm>> {
    let key = i64::try_from(host.rank()).unwrap_or(i64::MAX);
    host.split(Some(0), key, deadline)?.ok_or_else(|| CommError::Io {
        context: format!("splitting host communicator {:?}", host.name()),
        message: "it returned no communicator for a rank with a colour".into(),
    })
}

/// Sets up everything but the native communicator, and starts the watchdog.
pub(crate) fn draft(base: Base, hosts: Hosts, ordinal: usize) -> Result<Draft> {
    let info = CommInfo {
        name: hosts.control.name().to_owned(),
        backend: crate::NAME.into(),
        rank: hosts.control.rank(),
        size: hosts.control.size(),
        memory: MemoryKind::Cuda { ordinal },
    };
    let _current = Current::enter(&base.context)?;
    let mut scratch = Scratch {
        barrier: driver::allocate(256)?,
        staging: DeviceAddr::NULL,
        staging_bytes: base.options.staging_bytes,
    };
    let watched =
        equip(&base, &mut scratch).inspect_err(|_| remains::give_back_device(None, None, scratch))?;
    let shared = Arc::new(Shared::new(info, base, scratch, watched, hosts));
    watchdog::spawn(shared.clone()).inspect_err(|_| {
        let mut native = lock(&shared.native);
        remains::give_back_device(native.tracker.take(), native.staged.take(), scratch);
    })?;
    Ok(Draft { comm: NcclComm::new(shared.clone()), shared })
}

/// What a communicator has of its device besides the first part of `scratch`, which it completes. The context is current.
fn equip(base: &Base, scratch: &mut Scratch) -> Result<(Tracker, CallOrder)> {
    if scratch.staging_bytes > 0 {
        scratch.staging = driver::allocate(scratch.staging_bytes)?;
    }
    let staged = CallOrder::new()?;
    match Tracker::new(base.graph_watch(), base.timeout) {
        Ok(tracker) => Ok((tracker, staged)),
        Err(error) => {
            staged.destroy();
            Err(error)
        }
    }
}

/// Makes this rank's end of a new communicator. A rank without a base takes part all the same, so that the others learn
/// why there will be none.
pub(crate) fn create(context: &CreateContext, base: Result<Base>, ordinal: usize) -> Result<NcclComm> {
    let deadline = Deadline::after(context.timeout);
    let control = sibling(&*context.host, deadline)?;
    let hosts = hosts(control, Some(context.host.clone()), deadline)?;
    let control = hosts.control.clone();
    let drafted = base.and_then(|base| draft(base, hosts, ordinal));
    // The id is made after the draft, so that a rank that could not even draft is known before anyone waits for it.
    let (draft, id) = meet(&*control, drafted, Deadline::after(context.timeout))?;
    draft.shared.initialise(id)?;
    Ok(draft.comm)
}

/// Exchanges the drafts' outcomes, and rank 0's unique id.
fn meet(control: &dyn HostComm, drafted: Result<Draft>, deadline: Deadline) -> Result<(Draft, UniqueId)> {
    let own: Result<Vec<u8>> = match &drafted {
        Ok(draft) if control.rank() == 0 => draft.unique_id().map(|id| id.internal.to_vec()),
        Ok(_) => Ok(Vec::new()),
        Err(error) => Err(error.clone()),
    };
    let all: Vec<Result<Vec<u8>>> = control.all_gather_by(&own, deadline)?;
    let draft = drafted?;
    let mut id = None;
    for (rank, outcome) in all.into_iter().enumerate() {
        match outcome {
            Ok(bytes) if rank == 0 => id = bytes.try_into().ok(),
            Ok(_) => {}
            Err(cause) if rank == control.rank() => return Err(cause),
            Err(cause) => {
                let at = draft.shared.at(OpKind::Create, 0);
                return Err(CommError::PeerFailed { at, rank, cause: Box::new(cause) });
            }
        }
    }
    let internal: [u8; UniqueId::BYTES] = id.ok_or_else(|| CommError::Serialization {
        action: "decode".into(),
        type_name: "ncclUniqueId".into(),
        reason: format!("rank 0 did not send {} bytes", UniqueId::BYTES),
    })?;
    Ok((draft, UniqueId { internal }))
}

impl Draft {
    fn unique_id(&self) -> Result<UniqueId> {
        let _current = Current::enter(&self.shared.base.context)?;
        self.shared.base.library.unique_id()
    }
}

impl Shared {
    /// Makes the native communicator by its id. Collective.
    fn initialise(&self, id: UniqueId) -> Result<()> {
        let mut call = self.begin(OpKind::Create)?;
        let slot =
            Box::into_raw(Box::new(Slot { comm: std::ptr::null_mut(), config: self.base.options.config() }));
        let (size, rank) = (self.info.size, self.info.rank);
        // SAFETY: the slot is live, and stays so until NCCL is through with it; the device is current.
        let started = unsafe {
            self.base.library.comm_init_rank_config(
                &raw mut (*slot).comm,
                size,
                id,
                rank,
                &raw mut (*slot).config,
            )
        };
        // SAFETY: the slot is live; NCCL writes the handle of a non-blocking communicator before it returns.
        let comm = unsafe { (&raw const (*slot).comm).read_volatile() };
        call.native.comm = comm;
        match started {
            Ok(_) if !comm.is_null() => call.settle(comm)?,
            Ok(_) => return Err(self.fail(no_communicator(&self.base, "ncclCommInitRankConfig"))),
            Err(error) => return Err(self.blame(error)),
        }
        // SAFETY: it came from `Box::into_raw`, and the communicator is ready, so NCCL is through with it.
        drop(unsafe { Box::from_raw(slot) });
        Ok(())
    }

    /// Splits the native communicator. Collective. `color` is below the number of ranks.
    pub(crate) fn split_off(&self, color: Option<usize>, key: i32) -> Result<*mut sys::Comm> {
        let call = self.begin(OpKind::Split)?;
        let slot =
            Box::into_raw(Box::new(Slot { comm: std::ptr::null_mut(), config: self.base.options.config() }));
        call.nccl(|library, comm| {
            // SAFETY: the communicator is live under the lock; the slot is live until NCCL is through with it.
            let _ = unsafe {
                library.comm_split(comm, color, key, &raw mut (*slot).comm, &raw mut (*slot).config)
            }?;
            // A split on a non-blocking communicator goes on in the background even where the call reports success;
            // only the parent's state tells when the new handle has been written.
            Ok(Progress::Running)
        })?;
        // SAFETY: the slot is live; NCCL writes the handle from its own thread.
        let child = || unsafe { (&raw const (*slot).comm).read_volatile() };
        // The parent is ready again, so the handle is there already; the wait is for versions that tell too early.
        let mut pause = Pause::new();
        while color.is_some() && child().is_null() {
            if pause.wait() > self.base.timeout {
                return Err(self.fail(no_communicator(&self.base, "ncclCommSplit")));
            }
            self.healthy()?;
        }
        // SAFETY: it came from `Box::into_raw`, and the handle, which NCCL writes last, is there.
        Ok(unsafe { Box::from_raw(slot) }.comm)
    }

    /// Takes a native communicator that a split has made and waits until it is ready. Collective.
    pub(crate) fn adopt(&self, comm: *mut sys::Comm) -> Result<()> {
        lock(&self.native).comm = comm;
        let call = self.begin(OpKind::Create)?;
        call.settle(comm)
    }
}

fn no_communicator(base: &Base, call: &'static str) -> CommError {
    base.library.error(call, sys::INTERNAL_ERROR)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use comm_core::ThreadComm;

    use super::*;

    /// The communicator's own timeout counts, however patient the host communicator is.
    #[test]
    fn creation_waits_no_longer_than_its_own_timeout() {
        let patient = Duration::from_secs(60);
        let ranks = ThreadComm::create(2, patient).unwrap();
        let start = Instant::now();
        let drafted = Err(CommError::invalid("memory", "this rank has none"));
        let error =
            meet(&ranks[0], drafted, Deadline::after(Duration::from_millis(50))).map(drop).unwrap_err();
        assert!(matches!(&error, CommError::Timeout { missing, .. } if *missing == [1]), "{error}");
        assert!(start.elapsed() < patient / 2, "{:?}", start.elapsed());
    }
}
