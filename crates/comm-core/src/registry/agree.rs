//! How ranks agree on what is created and on how it went.
//!
//! Every step is one all-gather, after which all ranks hold the same facts and draw the same conclusion. A step never
//! leaves a rank behind: a failure, an unknown name and a panic are all facts to exchange.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::{BackendFactory, Capability, CreateContext};
use crate::device_comm::DeviceComm;
use crate::error::{CallSite, CommError, Result};
use crate::host_comm::{Deadline, HostComm};
use crate::memory::MemoryKind;
use crate::op::OpKind;

/// The longest that a rank may lag behind the others outside the waits that the context's timeout bounds.
const SLACK: Duration = Duration::from_secs(1);

/// What all ranks must ask for alike.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
struct Proposal {
    backends: Vec<String>,
    cuda: bool,
    timeout: Duration,
    checked: bool,
    options: Vec<(String, String)>,
}

fn gather<T: Serialize + DeserializeOwned>(context: &CreateContext, value: &T, waits: u32) -> Result<Vec<T>> {
    let codec = |action: &'static str, error: postcard::Error| CommError::Serialization {
        action: action.into(),
        type_name: std::any::type_name::<T>().into(),
        reason: error.to_string(),
    };
    let bytes = postcard::to_stdvec(value).map_err(|error| codec("encode", error))?;
    let patience = context.timeout.saturating_mul(waits).max(context.host.timeout()).saturating_add(SLACK);
    let all = context.host.all_gather_bytes(&bytes, Deadline::after(patience))?;
    all.iter().map(|bytes| postcard::from_bytes(bytes).map_err(|error| codec("decode", error))).collect()
}

fn failed(backend: &str, rank: usize, cause: CommError) -> CommError {
    CommError::CreationFailed { backend: backend.to_owned().into(), rank, cause: Box::new(cause) }
}

fn mismatch(host: &dyn HostComm, rank: usize, expected: String, found: String) -> CommError {
    CommError::Mismatch { at: CallSite::new(host.name(), OpKind::Create, 0), rank, expected, found }
}

/// A panic of a backend as an error, so that the other ranks learn of it instead of waiting.
pub(super) fn no_panic<T>(backend: &str, call: &'static str, f: impl FnOnce() -> Result<T>) -> Result<T> {
    // The backend's half-made state is dropped with the closure, so nothing can observe it broken.
    catch_unwind(AssertUnwindSafe(f)).unwrap_or_else(|panic| {
        Err(CommError::Backend {
            backend: backend.to_owned().into(),
            call: call.into(),
            code: 0,
            message: format!("panicked: {}", panic_message(&*panic)),
        })
    })
}

/// What a panic said.
pub(crate) fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|s| (*s).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".into())
}

/// Fails on all ranks alike unless all ask for the same backends with the same settings.
pub(super) fn same_request(backends: &[&str], context: &CreateContext) -> Result<()> {
    let own = Proposal {
        backends: backends.iter().map(|&name| name.to_owned()).collect(),
        cuda: matches!(context.memory, MemoryKind::Cuda { .. }),
        timeout: context.timeout,
        checked: context.checked,
        options: context.options.clone().into_iter().collect(),
    };
    let all = gather(context, &own, 1)?;
    let Some(rank) = all.iter().position(|other| other != &all[0]) else { return Ok(()) };
    let cause = mismatch(&*context.host, rank, format!("{:?}", all[0]), format!("{:?}", all[rank]));
    Err(failed(&all[0].backends.join("+"), rank, cause))
}

/// The capabilities of all ranks for each backend, or why that backend cannot be created: the same on all ranks.
pub(super) fn probe_all(
    backends: &[(&str, Result<&dyn BackendFactory>)],
    context: &CreateContext,
) -> Result<Vec<Result<Vec<Capability>>>> {
    let own: Vec<Result<Capability>> = backends
        .iter()
        .map(|(name, factory)| match factory {
            Ok(factory) => no_panic(name, "probe", || factory.probe(context)),
            Err(error) => Err(error.clone()),
        })
        .collect();
    let all = gather(context, &own, 1)?;
    let verdict = |(index, (name, _)): (usize, &(&str, Result<&dyn BackendFactory>))| {
        let mut capabilities = Vec::with_capacity(all.len());
        for (rank, answers) in all.iter().enumerate() {
            match &answers[index] {
                Ok(capability) => capabilities.push(capability.clone()),
                Err(cause) => return Err(failed(name, rank, cause.clone())),
            }
        }
        let version = |rank: usize| format!("protocol version {}", capabilities[rank].protocol);
        match capabilities.iter().position(|other| other.protocol != capabilities[0].protocol) {
            None => Ok(capabilities),
            Some(rank) => Err(failed(name, rank, mismatch(&*context.host, rank, version(0), version(rank)))),
        }
    };
    Ok(backends.iter().enumerate().map(verdict).collect())
}

/// A host communicator of the same ranks, with an order of calls of its own.
pub(super) fn own_host(context: &CreateContext) -> Result<Arc<dyn HostComm>> {
    let patience = context.timeout.max(context.host.timeout()).saturating_add(SLACK);
    let key = i64::try_from(context.host.rank()).unwrap_or(i64::MAX);
    context.host.split(Some(0), key, Deadline::after(patience))?.ok_or_else(|| {
        CommError::invalid("host", "a split of the host communicator left this rank in no group")
    })
}

/// Creates one backend's communicator on all ranks, or on none.
pub(super) fn create_all(
    name: &str,
    factory: &dyn BackendFactory,
    context: &CreateContext,
    capabilities: &[Capability],
) -> Result<Arc<dyn DeviceComm>> {
    // The factory gets a host communicator of its own: a rank that fails half-way must not have its report taken for a
    // message of a peer that is still creating.
    let own_host = own_host(context)?;
    let own_context = CreateContext { host: own_host.clone(), ..context.clone() };
    let created = no_panic(name, "create", || factory.create(&own_context, capabilities)).and_then(|comm| {
        let info = comm.info();
        if info.rank == context.host.rank() && info.size == context.host.size() {
            return Ok(comm);
        }
        let found = format!("made rank {} of {}", info.rank, info.size);
        comm.abort();
        Err(CommError::Backend {
            backend: name.to_owned().into(),
            call: "create".into(),
            code: 0,
            message: format!("{found}, but this is rank {} of {}", context.host.rank(), context.host.size()),
        })
    });
    if let Err(cause) = &created {
        // Ends the waits of ranks that are still creating, long before their timeout.
        own_host.report_failure(cause);
    }
    let outcome = gather(context, &created.as_ref().map(drop).map_err(Clone::clone), 2);
    let verdict = outcome.and_then(|all| match culprit(&all) {
        Some((rank, cause)) => Err(failed(name, rank, cause)),
        None => Ok(()),
    });
    match (created, verdict) {
        (Ok(comm), Ok(())) => Ok(comm),
        (Ok(comm), Err(error)) => {
            discard(&*comm);
            Err(error)
        }
        (Err(error), Ok(())) | (Err(_), Err(error)) => Err(error),
    }
}

/// Gives back a communicator whose peers do not exist.
pub(super) fn discard(comm: &dyn DeviceComm) {
    // After an abort nothing is waited for; what close then reports is the abort itself.
    comm.abort();
    drop(comm.close());
}

/// Whether a backend, asked to create, has found that these ranks cannot use it; see [`BackendFactory::create`].
const fn is_refusal(error: &CommError) -> bool {
    matches!(error, CommError::Unsupported { op: OpKind::Create, .. })
}

/// Whether that is what a creation came to. [`create_all`] returns this on all ranks or on none: it is the verdict on what
/// all of them exchanged.
pub(super) fn was_refused(error: &CommError) -> bool {
    matches!(error, CommError::CreationFailed { cause, .. } if is_refusal(cause))
}

/// The rank that is to blame: the lowest that failed by itself, or else the lowest that refused, or else the lowest that
/// failed because of another. So a backend counts as refused only where nothing else went wrong.
fn culprit(all: &[Result<()>]) -> Option<(usize, CommError)> {
    let order = |error: &CommError| match error {
        CommError::PeerFailed { .. } | CommError::PeerDied { .. } | CommError::Timeout { .. } => 2,
        refusal if is_refusal(refusal) => 1,
        _ => 0,
    };
    let failures = all.iter().enumerate().filter_map(|(rank, outcome)| Some((rank, outcome.as_ref().err()?)));
    let (rank, cause) = failures.min_by_key(|&(rank, error)| (order(error), rank))?;
    Some((rank, cause.clone()))
}
