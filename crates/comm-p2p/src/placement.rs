//! Which ranks are on which device, and the room that leaves each: pure functions of what all ranks report.
//!
//! Every rank comes to the same verdict for the same reports, so all of them fail or none.

use std::collections::BTreeMap;

use comm_core::{Capability, CommError, OpKind, Result};

use crate::factory::fact;
use crate::options::SHARE_DEVICES;
use crate::room::Room;

/// How many streams' work the driver keeps apart on a device, at most.
const MOST_CONNECTIONS: usize = 32;
/// The variable that says how many it does keep apart.
const CONNECTIONS: &str = "CUDA_DEVICE_MAX_CONNECTIONS";

/// What every rank's kernels have of its device. `same_process`: the ranks are threads of one. `connections`: see
/// [`connections`].
pub(crate) fn room(capabilities: &[Capability], same_process: bool, connections: usize) -> Result<Room> {
    same_host(capabilities)?;
    // Launch shapes must be the same on all ranks, so the smallest device decides, and the one with most ranks.
    let multiprocessors = |c: &Capability| c.facts.get(fact::MULTIPROCESSORS)?.parse().ok();
    let smallest = capabilities.iter().filter_map(multiprocessors).min().unwrap_or(1).max(1);
    let most = most_on_one_device(capabilities)?;
    if most < 2 {
        return Ok(Room::alone(smallest));
    }
    if same_process && connections < MOST_CONNECTIONS {
        return Err(CommError::invalid(
            CONNECTIONS,
            format!(
                "it is {connections}: streams of ranks that share a device would be put in line behind one another, and \
                 a kernel that waits for another rank would keep that rank's from starting. Where they are threads of one \
                 process, set it to {MOST_CONNECTIONS} before the process uses CUDA"
            ),
        ));
    }
    Ok(Room::shared(smallest, most))
}

/// Of this process: streams of one context that are kept apart.
pub(crate) fn connections() -> usize {
    const DEFAULT: usize = 8;
    std::env::var(CONNECTIONS).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(DEFAULT)
}

fn fact_of(capability: &Capability, name: &str) -> String {
    capability.facts.get(name).cloned().unwrap_or_default()
}

fn same_host(capabilities: &[Capability]) -> Result<()> {
    let hosts: Vec<String> = capabilities.iter().map(|c| fact_of(c, fact::HOST)).collect();
    match hosts.iter().position(|host| *host != hosts[0]) {
        None => Ok(()),
        Some(rank) => Err(CommError::unsupported(
            OpKind::Create,
            crate::NAME,
            format!(
                "rank {rank} is on host {:?} and rank 0 on {:?}; it takes ranks of one host",
                hosts[rank], hosts[0]
            ),
        )),
    }
}

/// The number of ranks on the device that has most of them. More than one must be allowed, by all.
fn most_on_one_device(capabilities: &[Capability]) -> Result<usize> {
    let allowed: Vec<String> = capabilities.iter().map(|c| fact_of(c, fact::SHARE_DEVICES)).collect();
    if let Some(rank) = allowed.iter().position(|other| *other != allowed[0]) {
        return Err(CommError::invalid(
            "p2p.share_devices",
            format!(
                "{:?} on rank {rank}, but {:?} on rank 0; give all ranks the same p2p.share_devices and {SHARE_DEVICES}",
                allowed[rank], allowed[0]
            ),
        ));
    }
    let mut devices: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    for (rank, capability) in capabilities.iter().enumerate() {
        devices.entry(fact_of(capability, fact::GPU)).or_default().push(rank);
    }
    let shared = devices.values().find(|ranks| ranks.len() > 1);
    if let Some(ranks) = shared
        && allowed[0] != fact::ON
    {
        return Err(CommError::invalid(
            "memory",
            format!(
                "ranks {} and {} are on the same GPU; each needs one of its own. To test results where there are fewer \
                 GPUs than ranks, and not speed, set p2p.share_devices = on or {SHARE_DEVICES}=on on all ranks",
                ranks[0], ranks[1]
            ),
        ));
    }
    Ok(devices.values().map(Vec::len).max().unwrap_or(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rank(host: &str, gpu: &str, share: &str) -> Capability {
        let facts = [
            (fact::HOST, host),
            (fact::GPU, gpu),
            (fact::MULTIPROCESSORS, "132"),
            (fact::SHARE_DEVICES, share),
        ];
        Capability {
            protocol: 0,
            facts: facts.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect(),
        }
    }

    fn ranks(gpus: &[&str], share: &str) -> Vec<Capability> {
        gpus.iter().map(|gpu| rank("a", gpu, share)).collect()
    }

    #[test]
    fn ranks_share_a_host_and_no_gpu() {
        assert_eq!(room(&ranks(&["1", "2"], "off"), true, 8), Ok(Room::alone(132)));
        let same = room(&ranks(&["1", "2", "1"], "off"), true, 32).unwrap_err().to_string();
        assert!(same.contains("ranks 0 and 2") && same.contains("p2p.share_devices"), "{same}");
        let apart = room(&[rank("a", "1", "off"), rank("b", "2", "off")], true, 32).unwrap_err();
        // A refusal, which a tiered communicator can do without: the ranks may be right for another backend.
        assert!(matches!(apart, CommError::Unsupported { op: OpKind::Create, .. }), "{apart}");
        assert!(apart.to_string().contains("rank 1"), "{apart}");
        // What does not say is off.
        let mut silent = ranks(&["1", "1"], "off");
        silent.iter_mut().for_each(|rank| drop(rank.facts.remove(fact::SHARE_DEVICES)));
        assert!(room(&silent, true, 32).is_err());
    }

    #[test]
    fn with_the_option_the_fullest_gpu_decides() {
        assert_eq!(room(&ranks(&["1", "2", "3"], "on"), true, 8), Ok(Room::alone(132)));
        let five = ["1", "2", "1", "2", "1"];
        assert_eq!(room(&ranks(&five, "on"), true, 32), Ok(Room::shared(132, 3)));
        assert_eq!(room(&ranks(&["1"; 8], "on"), true, 32), Ok(Room::shared(132, 8)));
    }

    #[test]
    fn the_option_must_be_the_same_everywhere() {
        let mixed = [rank("a", "1", "on"), rank("a", "1", "on"), rank("a", "2", "off")];
        let error = room(&mixed, true, 32).unwrap_err().to_string();
        assert!(error.contains("rank 2") && error.contains(SHARE_DEVICES), "{error}");
    }

    #[test]
    fn threads_on_one_gpu_need_streams_that_are_kept_apart() {
        let error = room(&ranks(&["1", "1"], "on"), true, 8).unwrap_err().to_string();
        assert!(error.contains("CUDA_DEVICE_MAX_CONNECTIONS") && error.contains("32"), "{error}");
        // Processes have a context each.
        assert_eq!(room(&ranks(&["1", "1"], "on"), false, 8), Ok(Room::shared(132, 2)));
    }
}
