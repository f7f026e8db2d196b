//! Communicators and data for the host backend's tests.

#![allow(dead_code, reason = "each test program uses a part of it")]
#![allow(clippy::unwrap_used, reason = "part of tests, though not a test itself")]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use comm_core::{BackendFactory, CreateContext, DeviceComm, HostComm, HostFactory, MemoryKind, run_threads};

/// Peers' memory directly; as between processes, by shared memory and the kernel; and by shared memory alone.
pub(crate) const TRANSPORTS: [&str; 3] = ["direct", "shm", "staged"];

/// What `rank` needs to make a communicator.
pub(crate) fn context(
    host: Arc<dyn HostComm>,
    transport: &str,
    timeout: Duration,
    checked: bool,
) -> CreateContext {
    let (transport, cross) = if transport == "staged" { ("shm", "off") } else { (transport, "on") };
    let options = [("host.transport", transport), ("host.cross_read", cross)];
    let options: BTreeMap<_, _> = options.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
    CreateContext { host, memory: MemoryKind::Host, timeout, checked, options }
}

/// This rank's end of a new communicator.
pub(crate) fn create(context: &CreateContext) -> Arc<dyn DeviceComm> {
    let own = HostFactory.probe(context).unwrap();
    HostFactory.create(context, &vec![own; context.host.size()]).unwrap()
}

/// Runs `rank_main` on `size` threads with a communicator each.
pub(crate) fn on_ranks(size: usize, transport: &str, rank_main: impl Fn(Arc<dyn DeviceComm>) + Sync) {
    let timeout = Duration::from_secs(20);
    run_threads(size, timeout, |host| rank_main(create(&context(host, transport, timeout, false)))).unwrap();
}

/// A number that depends on nothing but its arguments.
pub(crate) fn random(seed: u64, rank: usize, index: usize) -> u64 {
    let mut x = seed << 48 ^ (rank as u64) << 40 ^ index as u64;
    for _ in 0..2 {
        x = (x ^ x >> 31).wrapping_add(0x9e37_79b9_7f4a_7c15).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    }
    x >> 16
}
