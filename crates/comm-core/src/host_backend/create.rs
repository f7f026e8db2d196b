//! Making a communicator: the factory, and how ranks come to share a control block.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use super::backend::HostBackend;
use super::control::Control;
use super::core::Core;
use super::memory::agree;
use super::remote;
use super::segment::Segment;
use crate::device_comm::{CommInfo, DeviceComm};
use crate::error::{CommError, Result};
use crate::host_comm::{Deadline, HostComm};
use crate::memory::MemoryKind;
use crate::op::OpKind;
use crate::registry::{BackendFactory, Capability, CreateContext};

const TRANSPORT: &str = "host.transport";
const CROSS: &str = "host.cross_read";
const SMALL: &str = "host.one_shot_bytes";
/// Up to here operands go through the staging windows at once, unless peers can read them in place.
const SMALL_BYTES: usize = 32 << 10;
/// Up to here they do so even then: one synchronisation costs more than copying this much.
const TINY_BYTES: usize = 1 << 10;
const PROTOCOL: u32 = 1;

/// Makes communicators over host memory, named `host`.
///
/// Ranks may be threads of one process, which read each other's operands where they lie, or processes of one host, which
/// share memory. Options of the [`CreateContext`], equal on all ranks:
/// - `host.transport`: `auto` (the default), `direct` (threads only) or `shm` (also between threads);
/// - `host.cross_read`: `off` keeps processes from reading each other's memory through the kernel, which they otherwise
///   do for large gathers where the system lets them;
/// - `host.one_shot_bytes`: operands up to this size go through shared memory at once (at most 131072; 32768 unless
///   told otherwise, and 1024 where peers can read them in place).
#[derive(Clone, Copy, Default, Debug)]
pub struct HostFactory;

fn direct(context: &CreateContext) -> Result<bool> {
    let same = context.host.same_process();
    match context.options.get(TRANSPORT).map_or("auto", String::as_str) {
        "auto" => Ok(same),
        "shm" => Ok(false),
        "direct" if same => Ok(true),
        "direct" => {
            Err(CommError::invalid(TRANSPORT, "direct needs all ranks in one process; use shm or auto"))
        }
        other => Err(CommError::invalid(
            TRANSPORT,
            format!("unknown transport {other:?}; known are auto, direct, shm"),
        )),
    }
}

fn small(options: &BTreeMap<String, String>) -> Result<(usize, usize)> {
    let Some(text) = options.get(SMALL) else { return Ok((SMALL_BYTES, TINY_BYTES)) };
    text.parse::<usize>()
        .ok()
        .filter(|&bytes| bytes <= 128 << 10)
        .map(|bytes| (bytes, bytes))
        .ok_or_else(|| CommError::invalid(SMALL, format!("{text:?} is not a number of bytes up to 131072")))
}

impl BackendFactory for HostFactory {
    fn name(&self) -> &str {
        super::NAME
    }

    fn probe(&self, context: &CreateContext) -> Result<Capability> {
        if context.memory != MemoryKind::Host {
            return Err(CommError::invalid("memory", "the host backend works on host memory only"));
        }
        if context.host.size() > 1 && !context.host.can_exchange_fds() {
            return Err(CommError::unsupported(
                OpKind::Create,
                super::NAME,
                "it needs all ranks on one host, joined by a host communicator that passes file descriptors \
                 (threads, or a unix socket)",
            ));
        }
        small(&context.options)?;
        let transport = if direct(context)? { "direct" } else { "shm" };
        let facts = BTreeMap::from([("transport".to_owned(), transport.to_owned())]);
        Ok(Capability { protocol: PROTOCOL, facts })
    }

    fn create(&self, context: &CreateContext, capabilities: &[Capability]) -> Result<Arc<dyn DeviceComm>> {
        let own = self.probe(context)?;
        if let Some(rank) = capabilities.iter().position(|other| *other != own) {
            return Err(CommError::invalid(
                "capabilities",
                format!("rank {rank} has {:?}, but this rank has {own:?}", capabilities[rank]),
            ));
        }
        let settings = (context.timeout, context.checked, context.options.clone());
        let deadline = Deadline::after(context.timeout);
        let core = connect(context.host.clone(), settings, direct(context)?, deadline)?;
        Ok(Arc::new(HostBackend::new(core)))
    }
}

/// This rank's end of a new communicator between the ranks of `host`. Succeeds on all ranks or on none.
pub(super) fn connect(
    host: Arc<dyn HostComm>,
    settings: (Duration, bool, BTreeMap<String, String>),
    direct: bool,
    deadline: Deadline,
) -> Result<Core> {
    let control = control(&*host, deadline);
    let error = match &control {
        // The host communicator itself failed, here and on all ranks.
        Err(Failure::Host(error)) => return Err(error.clone()),
        Err(Failure::Local(error)) => Some(error.clone()),
        Ok(_) => None,
    };
    if let Ok(control) = &control {
        remote::introduce(control);
    }
    if let Some((rank, cause)) = agree(&error, |mine| host.all_gather_bytes(mine, deadline))? {
        let (backend, cause) = (super::NAME.into(), Box::new(cause));
        return Err(CommError::CreationFailed { backend, rank, cause });
    }
    let control = match control {
        Ok(control) => control,
        Err(Failure::Host(error) | Failure::Local(error)) => return Err(error),
    };
    let info = CommInfo {
        name: host.name().to_owned(),
        backend: super::NAME.into(),
        rank: host.rank(),
        size: host.size(),
        memory: MemoryKind::Host,
    };
    let small = small(&settings.2)?;
    let direct = direct || info.size == 1;
    let wanted = settings.2.get(CROSS).is_none_or(|wanted| wanted != "off");
    let cross = !direct && wanted && {
        let able = [u8::from(remote::possible(&control))];
        host.all_gather_bytes(&able, deadline)?.iter().all(|able| able == &[1])
    };
    Ok(Core::new(info, control, host, settings, (direct, cross), small))
}

enum Failure {
    Host(CommError),
    Local(CommError),
}

/// The block that rank 0 makes and everyone maps.
fn control(host: &dyn HostComm, deadline: Deadline) -> Result<Control, Failure> {
    let (rank, size) = (host.rank(), host.size());
    let len = Control::bytes(size).map_err(Failure::Local)?;
    if size == 1 {
        let segment = Segment::private(len).map_err(Failure::Local)?;
        return Control::new(segment, size, rank).map_err(Failure::Local);
    }
    // A rank that cannot make the block takes part all the same, and all learn why.
    let made = (rank == 0).then(|| Segment::shareable(len)).transpose();
    let mine: Vec<_> = made.iter().flatten().map(AsFd::as_fd).collect();
    let all = host.exchange_fds(&mine, deadline).map_err(Failure::Host)?;
    made.as_ref().map_err(|error| Failure::Local(error.clone()))?;
    let fd = all.first().and_then(|fds| fds.first()).ok_or_else(|| {
        Failure::Local(CommError::Io {
            context: "sharing the control block".into(),
            message: "rank 0 could not make it".into(),
        })
    })?;
    let segment = Segment::map(fd.as_fd(), len).map_err(Failure::Local)?;
    Control::new(segment, size, rank).map_err(Failure::Local)
}
