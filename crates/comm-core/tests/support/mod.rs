//! A right and complete backend for tests: every call is one all-gather of bytes over the host communicator, and every
//! rank then works out its own result. Nothing about it is fast.

#![allow(dead_code, unused_imports, reason = "each test file uses its own part")]
#![allow(clippy::unwrap_used, reason = "these are tests, though not test functions")]

pub(crate) mod arithmetic;
pub(crate) mod backend;
pub(crate) mod wrong;

use std::sync::Arc;

use comm_core::{BackendFactory, Capability, CreateContext, DeviceComm, Result};

pub(crate) use backend::GatherBackend;

/// Puts something around a communicator.
pub(crate) type Wrap = Arc<dyn Fn(Arc<dyn DeviceComm>) -> Arc<dyn DeviceComm> + Send + Sync>;

/// Makes communicators of [`GatherBackend`], and hands each through a wrapper.
pub(crate) struct GatherFactory {
    pub(crate) name: &'static str,
    pub(crate) protocol: fn(usize) -> u32,
    pub(crate) wrap: Wrap,
}

impl GatherFactory {
    pub(crate) fn right() -> Self {
        Self { name: "gather", protocol: |_| 1, wrap: Arc::new(|comm| comm) }
    }
}

impl BackendFactory for GatherFactory {
    fn name(&self) -> &str {
        self.name
    }

    fn probe(&self, context: &CreateContext) -> Result<Capability> {
        Ok(Capability { protocol: (self.protocol)(context.host.rank()), ..Capability::default() })
    }

    fn create(&self, context: &CreateContext, _: &[Capability]) -> Result<Arc<dyn DeviceComm>> {
        let comm = GatherBackend::new(self.name, context.host.clone(), context.timeout);
        Ok((self.wrap)(Arc::new(comm)))
    }
}
