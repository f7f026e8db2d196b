//! Backends by name, and their creation: on all ranks, or on none with the same cause everywhere.
//!
//! A registry is a value that the program makes and fills; nothing registers itself.

mod agree;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::device_comm::DeviceComm;
use crate::error::{CommError, Result};
use crate::host_comm::HostComm;
use crate::memory::MemoryKind;
use crate::tiered::{SkippedTier, TieredComm};

#[cfg(feature = "conformance")]
pub(crate) use agree::panic_message;

/// What a backend needs to make a communicator.
#[derive(Clone)]
pub struct CreateContext {
    /// How the ranks meet. The new communicator has its ranks, in its order.
    pub host: Arc<dyn HostComm>,
    /// The memory that this rank's operands lie in.
    pub memory: MemoryKind,
    /// The longest that any wait of the new communicator may take.
    pub timeout: Duration,
    /// Checked mode: before each launch the ranks compare what they are about to do, and a difference is a
    /// [`Mismatch`](crate::CommError::Mismatch). For finding bugs: it synchronises the host with the other ranks.
    pub checked: bool,
    /// Settings for one backend or another, by name; all ranks pass the same. Backends ignore those they do not know.
    pub options: BTreeMap<String, String>,
}

impl CreateContext {
    /// A context for `memory` with the host communicator's timeout, unchecked, and no settings.
    #[must_use]
    pub fn new(host: Arc<dyn HostComm>, memory: MemoryKind) -> Self {
        let timeout = host.timeout();
        Self { host, memory, timeout, checked: false, options: BTreeMap::new() }
    }
}

/// What one rank can do, exchanged when a communicator is created.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Capability {
    /// The backend's protocol version: ranks whose versions differ cannot form a communicator.
    pub protocol: u32,
    /// Facts that the backend's ranks decide by, for example a library version or a device's UUID.
    pub facts: BTreeMap<String, String>,
}

/// A way of making communicators of one backend.
pub trait BackendFactory: Send + Sync {
    /// The backend's name, as configuration spells it.
    fn name(&self) -> &str;

    /// What this rank can do. Local: it does not communicate.
    ///
    /// # Errors
    /// When this rank cannot take part: then creation fails on every rank, with this cause.
    fn probe(&self, context: &CreateContext) -> Result<Capability>;

    /// Makes this rank's end of a communicator. Called on all ranks, only after every rank's probe succeeded;
    /// `capabilities` holds them in rank order. May use `context.host`.
    ///
    /// # Errors
    /// Reported on every rank. Some obstacles show only when ranks meet: devices that do not reach each other, say. That
    /// these ranks cannot use the backend, though each was admitted by its probe, is said by
    /// [`Unsupported`](crate::CommError::Unsupported) of [`OpKind::Create`](crate::OpKind::Create), on one rank or several:
    /// a tiered communicator then does without the backend. Everything else is a failure. Either way nothing may be left
    /// of the attempt: no memory, and no thread or peer that waits for this rank.
    fn create(&self, context: &CreateContext, capabilities: &[Capability]) -> Result<Arc<dyn DeviceComm>>;
}

/// Creates a communicator with one factory; see [`Registry::create`].
///
/// # Errors
/// As [`Registry::create`].
pub fn create_with(factory: &dyn BackendFactory, context: &CreateContext) -> Result<Arc<dyn DeviceComm>> {
    let name = factory.name().to_owned();
    create_one(&name, Ok(factory), context)
}

fn create_one(
    name: &str,
    factory: Result<&dyn BackendFactory>,
    context: &CreateContext,
) -> Result<Arc<dyn DeviceComm>> {
    agree::same_request(&[name], context)?;
    let mut probes = agree::probe_all(&[(name, factory.clone())], context)?;
    let capabilities = probes.pop().unwrap_or_else(|| Ok(Vec::new()))?;
    agree::create_all(name, factory?, context, &capabilities)
}

/// Backends that a program can create by name.
///
/// ```
/// use comm_core::Registry;
/// let registry = Registry::new();
/// assert!(registry.names().is_empty());
/// ```
#[derive(Default)]
pub struct Registry {
    factories: BTreeMap<String, Box<dyn BackendFactory>>,
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registry").field("names", &self.names()).finish()
    }
}

impl Registry {
    /// A registry without backends.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a backend under its own name, in place of an earlier one of that name, which is returned.
    pub fn register(&mut self, factory: Box<dyn BackendFactory>) -> Option<Box<dyn BackendFactory>> {
        self.factories.insert(factory.name().to_owned(), factory)
    }

    /// The registered names, sorted.
    #[must_use]
    pub fn names(&self) -> Vec<&str> {
        self.factories.keys().map(String::as_str).collect()
    }

    fn factory(&self, name: &str) -> Result<&dyn BackendFactory> {
        self.factories.get(name).map(|factory| &**factory).ok_or_else(|| {
            let known = self.names().join(", ");
            CommError::invalid("backend", format!("{name:?} is not registered; known are: {known}"))
        })
    }

    /// Creates a communicator of the backend `name` over the ranks of `context.host`. Collective.
    ///
    /// # Errors
    /// [`CreationFailed`](crate::CommError::CreationFailed), with the same rank and cause on every rank, when the ranks
    /// ask for different things (the cause is then a [`Mismatch`](crate::CommError::Mismatch)), or a rank does not know
    /// the backend, fails its probe, speaks another protocol version, fails to create, or panics. A failure of the host
    /// communicator itself (a dead or absent rank) is returned as it is.
    pub fn create(&self, name: &str, context: &CreateContext) -> Result<Arc<dyn DeviceComm>> {
        create_one(name, self.factory(name), context)
    }

    /// Creates a communicator that sends each call to the first of the backends `names` that supports it. Collective.
    ///
    /// A backend that some rank does not know, whose probe fails on some rank, or which finds at its creation that these
    /// ranks cannot use it ([`BackendFactory::create`] tells how), is left out on all ranks; [`TieredComm::skipped`] says
    /// why. Every other failure of a creation is one of the whole.
    ///
    /// # Errors
    /// As [`create`](Self::create); and [`CreationFailed`](crate::CommError::CreationFailed) with the first backend's
    /// cause when none is left. Without names: [`InvalidArgument`](crate::CommError::InvalidArgument).
    pub fn create_tiered(&self, names: &[&str], context: &CreateContext) -> Result<Arc<TieredComm>> {
        agree::same_request(names, context)?;
        let factories: Vec<_> = names.iter().map(|&name| (name, self.factory(name))).collect();
        let probes = agree::probe_all(&factories, context)?;
        // Before there is any tier to give back, should a rank be gone.
        let host = agree::own_host(context)?;
        let mut tiers: Vec<Arc<dyn DeviceComm>> = Vec::new();
        let mut skipped = Vec::new();
        for ((name, factory), probe) in factories.into_iter().zip(probes) {
            let created = match (factory, probe) {
                (Ok(factory), Ok(capabilities)) => agree::create_all(name, factory, context, &capabilities),
                (Err(reason), Ok(_)) | (_, Err(reason)) => {
                    skipped.push(SkippedTier { backend: name.to_owned(), reason });
                    continue;
                }
            };
            match created {
                Ok(comm) => tiers.push(comm),
                // All ranks hold this same verdict, so all of them go on to the next backend.
                Err(reason) if agree::was_refused(&reason) => {
                    skipped.push(SkippedTier { backend: name.to_owned(), reason });
                }
                Err(error) => {
                    // The failure is known on all ranks, so all of them are here to close with.
                    tiers.iter().for_each(|tier| drop(tier.close()));
                    return Err(error);
                }
            }
        }
        if tiers.is_empty()
            && let Some(first) = skipped.first()
        {
            return Err(first.reason.clone());
        }
        TieredComm::new(host, context.timeout, tiers, skipped).map(Arc::new)
    }
}
