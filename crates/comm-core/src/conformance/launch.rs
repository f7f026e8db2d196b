//! A whole run with one call: ranks as threads of this process.

use std::collections::BTreeMap;
use std::sync::{Arc, mpsc};

use super::{Config, Report, run_rank};
use crate::error::Result;
use crate::host_comm::{Deadline, HostComm, ThreadComm};
use crate::memory::DeviceMemory;
use crate::op::OpKind;
use crate::registry::{BackendFactory, CreateContext, create_with};

/// Creates a communicator of `world` ranks with `factory`, each a thread with the memory that `memory` makes for its
/// rank, and runs the suite on it.
///
/// Returns within [`Config::limit`] even if the backend hangs; the hanging threads are then left behind.
pub fn run_threads<M>(factory: Arc<dyn BackendFactory>, world: usize, memory: M, config: &Config) -> Report
where
    M: Fn(usize) -> Box<dyn DeviceMemory> + Send + Sync + 'static,
{
    let mut report = Report::default();
    let comms = match ThreadComm::create(world, config.patience()) {
        Ok(comms) => comms,
        Err(error) => {
            report.fail("create", OpKind::Create, 0, error.to_string());
            return report;
        }
    };
    let memory = Arc::new(memory);
    let (sender, receiver) = mpsc::channel();
    for (rank, host) in comms.into_iter().enumerate() {
        let (factory, memory, config, sender) =
            (factory.clone(), memory.clone(), config.clone(), sender.clone());
        // Not scoped: a rank that hangs must not keep the caller.
        let run = move || {
            let result = run_one(&*factory, Arc::new(host), &*memory(rank), &config);
            drop(sender.send((rank, result)));
        };
        if let Err(error) = std::thread::Builder::new().name(format!("rank {rank}")).spawn(run) {
            report.fail("create", OpKind::Create, rank, format!("spawning its thread: {error}"));
            return report;
        }
    }
    drop(sender);
    collect(world, &receiver, config)
}

fn run_one(
    factory: &dyn BackendFactory,
    host: Arc<dyn HostComm>,
    memory: &dyn DeviceMemory,
    config: &Config,
) -> Result<Report> {
    let own_host = host.split(Some(0), host.rank() as i64, Deadline::after(config.patience()))?;
    let context = CreateContext {
        host: own_host.unwrap_or_else(|| host.clone()),
        memory: memory.kind(),
        timeout: config.timeout,
        checked: config.checked,
        options: config.options.iter().cloned().collect::<BTreeMap<_, _>>(),
    };
    let comm = create_with(factory, &context)?;
    Ok(run_rank(&comm, memory, &*host, config))
}

/// Waits for the ranks' reports, which are equal unless something is badly wrong.
fn collect(world: usize, receiver: &mpsc::Receiver<(usize, Result<Report>)>, config: &Config) -> Report {
    let mut first: Option<Report> = None;
    let mut missing: Vec<usize> = (0..world).collect();
    // Through `Deadline`, because a configuration may say "for ever".
    let mut end = Deadline::after(config.limit);
    while !missing.is_empty() {
        match receiver.recv_timeout(end.remaining()) {
            Ok((rank, Ok(report))) => {
                missing.retain(|&other| other != rank);
                // The others agreed with this rank a moment ago, so they cannot be long.
                let soon = Deadline::after(config.patience());
                end = if soon.instant() < end.instant() { soon } else { end };
                let first = first.get_or_insert_with(|| report.clone());
                for failure in report.failures() {
                    if !first.failures().contains(failure) {
                        first.fail(&failure.case, failure.op, failure.rank, failure.message.clone());
                    }
                }
            }
            Ok((rank, Err(error))) => {
                missing.retain(|&other| other != rank);
                first.get_or_insert_default().fail("create", OpKind::Create, rank, error.to_string());
            }
            Err(_) => {
                let report = first.get_or_insert_default();
                for &rank in &missing {
                    report.fail("hang", OpKind::Close, rank, "the rank did not return or its thread died");
                }
                break;
            }
        }
    }
    first.unwrap_or_default()
}
