//! Creation succeeds on all ranks, or fails on all with the same cause.

#![allow(clippy::unwrap_used, reason = "these are tests, though not all of it is test functions")]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use comm_core::{
    BackendFactory, Capability, CommError, CreateContext, DeviceComm, HostComm, MemoryKind, OpKind, Registry,
    Result, run_threads,
};
use support::{GatherBackend, GatherFactory};

const TIMEOUT: Duration = Duration::from_secs(2);

fn context(host: Arc<dyn HostComm>) -> CreateContext {
    CreateContext {
        host,
        memory: MemoryKind::Host,
        timeout: TIMEOUT,
        checked: false,
        options: Default::default(),
    }
}

type Step = fn(usize) -> Result<()>;

/// A factory whose steps may fail on some ranks.
struct Shaky {
    probe: Step,
    create: Step,
    /// Communicates while creating, as a backend that exchanges handles does.
    meets: bool,
}

impl Shaky {
    fn new(probe: Step, create: Step) -> Self {
        Self { probe, create, meets: false }
    }
}

impl BackendFactory for Shaky {
    fn name(&self) -> &str {
        "shaky"
    }

    fn probe(&self, context: &CreateContext) -> Result<Capability> {
        (self.probe)(context.host.rank())?;
        Ok(Capability { protocol: 1, ..Capability::default() })
    }

    fn create(&self, context: &CreateContext, capabilities: &[Capability]) -> Result<Arc<dyn DeviceComm>> {
        assert_eq!(capabilities.len(), context.host.size());
        (self.create)(context.host.rank())?;
        if self.meets {
            context.host.barrier(comm_core::Deadline::after(context.timeout))?;
        }
        Ok(Arc::new(GatherBackend::new("shaky", context.host.clone(), context.timeout)))
    }
}

/// Creates on `size` ranks, each with a registry of its own, and returns the ranks' errors.
fn errors(size: usize, make: impl Fn(usize) -> (Registry, CreateContext) + Sync) -> Vec<CommError> {
    let make = &make;
    run_threads(size, TIMEOUT, move |host| {
        let (registry, template) = make(host.rank());
        let context = CreateContext { host, ..template };
        registry.create("shaky", &context).map(drop).unwrap_err()
    })
    .unwrap()
}

fn with(shaky: Shaky) -> Registry {
    let mut registry = Registry::new();
    assert!(registry.register(Box::new(shaky)).is_none());
    registry
}

/// A context whose host communicator is put in by `errors`.
fn template() -> CreateContext {
    let mut hosts = comm_core::ThreadComm::create(1, TIMEOUT).unwrap();
    context(Arc::new(hosts.remove(0)))
}

fn same_cause(errors: &[CommError], rank: usize) -> &CommError {
    assert!(errors.iter().all(|error| *error == errors[0]), "{errors:#?}");
    match &errors[0] {
        CommError::CreationFailed { backend, rank: found, cause } => {
            assert_eq!((&**backend, *found), ("shaky", rank));
            cause
        }
        other => panic!("{other}"),
    }
}

fn fine(_: usize) -> Result<()> {
    Ok(())
}

fn no_device(rank: usize) -> Result<()> {
    if rank >= 2 { Err(CommError::invalid("device", format!("none for rank {rank}"))) } else { Ok(()) }
}

fn panics(rank: usize) -> Result<()> {
    assert_ne!(rank, 1, "no such luck");
    Ok(())
}

#[test]
fn creates_by_name() {
    let sizes = run_threads(3, TIMEOUT, |host| {
        let mut registry = Registry::new();
        registry.register(Box::new(GatherFactory::right()));
        registry.register(Box::new(Shaky::new(fine, fine)));
        assert_eq!(registry.names(), ["gather", "shaky"]);
        let comm = registry.create("gather", &context(host)).unwrap();
        (comm.rank(), comm.size(), comm.info().backend.to_string())
    })
    .unwrap();
    assert_eq!(sizes[2], (2, 3, "gather".to_owned()));
}

#[test]
fn a_failed_probe_fails_on_all_ranks_with_the_lowest_ranks_cause() {
    let errors = errors(4, |_| (with(Shaky::new(no_device, fine)), template()));
    assert_eq!(*same_cause(&errors, 2), CommError::invalid("device", "none for rank 2"));
}

#[test]
fn a_failed_creation_fails_on_all_ranks_and_ends_the_others_waits() {
    let start = Instant::now();
    let make = |_| (with(Shaky { meets: true, ..Shaky::new(fine, no_device) }), template());
    let errors = errors(4, make);
    assert_eq!(*same_cause(&errors, 2), CommError::invalid("device", "none for rank 2"));
    assert!(start.elapsed() < TIMEOUT / 2, "the others waited: {:?}", start.elapsed());
}

#[test]
fn a_panic_is_a_cause_like_any_other() {
    for make in [Shaky::new(panics, fine), Shaky { meets: true, ..Shaky::new(fine, panics) }] {
        let shaky = &make;
        let copy =
            |_| (with(Shaky { probe: shaky.probe, create: shaky.create, meets: shaky.meets }), template());
        let errors = errors(3, copy);
        let text = same_cause(&errors, 1).to_string();
        assert!(text.contains("panicked") && text.contains("no such luck"), "{text}");
    }
}

#[test]
fn an_unknown_name_on_one_rank_fails_on_all() {
    let make = |rank| (if rank == 1 { Registry::new() } else { with(Shaky::new(fine, fine)) }, template());
    let errors = errors(3, make);
    let text = same_cause(&errors, 1).to_string();
    assert!(text.contains("not registered"), "{text}");
}

#[test]
fn different_requests_are_a_mismatch_that_names_the_rank() {
    let make = |rank| {
        let checked = rank == 2;
        (with(Shaky::new(fine, fine)), CreateContext { checked, ..template() })
    };
    let errors = errors(3, make);
    assert!(
        matches!(same_cause(&errors, 2), CommError::Mismatch { rank: 2, at, .. } if at.op == OpKind::Create)
    );

    let make = |rank| {
        let mut options = std::collections::BTreeMap::new();
        options.insert("key".to_owned(), if rank == 0 { "a" } else { "b" }.to_owned());
        (with(Shaky::new(fine, fine)), CreateContext { options, ..template() })
    };
    let errors = self::errors(3, make);
    assert!(matches!(same_cause(&errors, 1), CommError::Mismatch { rank: 1, .. }));
}

#[test]
fn different_protocol_versions_cannot_form_a_communicator() {
    let causes = run_threads(3, TIMEOUT, |host| {
        let mut registry = Registry::new();
        let protocol = |rank| if rank == 1 { 8 } else { 7 };
        registry.register(Box::new(GatherFactory { protocol, ..GatherFactory::right() }));
        registry.create("gather", &context(host)).map(drop).unwrap_err()
    })
    .unwrap();
    assert!(causes.iter().all(|cause| *cause == causes[0]));
    let text = causes[0].to_string();
    assert!(text.contains("protocol version 7") && text.contains("protocol version 8"), "{text}");
}

#[test]
fn a_rank_that_is_missing_is_the_host_communicators_error() {
    let results = run_threads(3, Duration::from_millis(300), |host| {
        if host.rank() == 2 {
            return None;
        }
        let context = CreateContext { timeout: Duration::from_millis(300), ..context(host) };
        Some(with(Shaky::new(fine, fine)).create("shaky", &context).map(drop).unwrap_err())
    })
    .unwrap();
    for error in results.into_iter().flatten() {
        let named = matches!(&error, CommError::PeerDied { rank: 2, .. })
            || matches!(&error, CommError::Timeout { missing, .. } if missing == &[2])
            || matches!(&error, CommError::PeerFailed { .. });
        assert!(named, "{error}");
    }
}

#[test]
fn after_a_failure_the_same_ranks_can_create_again() {
    static TRIES: AtomicUsize = AtomicUsize::new(0);
    fn once(rank: usize) -> Result<()> {
        if rank == 1 && TRIES.fetch_add(1, Ordering::SeqCst) == 0 { no_device(3) } else { Ok(()) }
    }
    run_threads(3, TIMEOUT, |host| {
        let registry = with(Shaky::new(once, fine));
        let context = context(host);
        assert!(registry.create("shaky", &context).is_err());
        assert_eq!(registry.create("shaky", &context).unwrap().size(), 3);
    })
    .unwrap();
}
