//! GPUs, driver and links, as NVML tells them, and peer access, as CUDA does.

use comm_kernels::nvml::nvml;
use nvml_wrapper::enum_wrappers::nv_link::Capability;
use nvml_wrapper::enums::device::DeviceArchitecture;
use nvml_wrapper::{Device, Nvml};

use crate::bench::human;
use crate::doctor::Findings;

/// Links that NVML numbers, at most.
const MOST_LINKS: u32 = 18;

/// Looks at the GPUs.
pub fn look(findings: &mut Findings) {
    findings.section("GPUs");
    let nvml = match nvml() {
        Ok(nvml) => nvml,
        Err(error) => {
            findings.missing(
                "NVIDIA driver",
                error,
                "GPUs: install NVIDIA's driver (580 or later for CUDA 13); without it everything runs on host memory",
            );
            return;
        }
    };
    findings.fact("driver", nvml.sys_driver_version().unwrap_or_else(|error| error.to_string()));
    match nvml.sys_cuda_driver_version() {
        Ok(version) => {
            findings.fact("CUDA of the driver", format!("{}.{}", version / 1000, version % 1000 / 10))
        }
        Err(error) => findings.fact("CUDA of the driver", error),
    }
    let count = nvml.device_count().unwrap_or(0);
    if count == 0 {
        findings.missing(
            "GPUs",
            "the driver has none",
            "GPUs: none is visible to the driver; see nvidia-smi",
        );
        return;
    }
    let devices: Vec<Device<'_>> = (0..count).filter_map(|index| nvml.device_by_index(index).ok()).collect();
    for (index, device) in devices.iter().enumerate() {
        findings.line(describe(index, device));
    }
    links(findings, &devices);
    peers(findings, nvml, &devices);
    match comm_kernels::driver::device_count() {
        Ok(count) => peer_access(findings, count, comm_kernels::raw::can_access_peer),
        Err(error) => findings.fact("peer access", error),
    }
}

/// Which GPUs can map which others' memory, which is what the p2p backend lives on. CUDA's numbers, which
/// `CUDA_VISIBLE_DEVICES` makes others than NVML's.
fn peer_access(findings: &mut Findings, count: usize, can: impl Fn(usize, usize) -> comm_core::Result<bool>) {
    if count < 2 {
        return;
    }
    findings.line("peer access of each GPU (row, CUDA's numbers) to each GPU:");
    let (mut closed, mut failure) = (0, None);
    for from in 0..count {
        let cells: Vec<&str> = (0..count)
            .map(|to| match (from == to, can(from, to)) {
                (true, _) => "-",
                (_, Ok(true)) => "yes",
                (_, Ok(false)) => {
                    closed += 1;
                    "no"
                }
                (_, Err(error)) => {
                    failure.get_or_insert(error);
                    "?"
                }
            })
            .collect();
        let cells: Vec<String> = cells.iter().map(|cell| format!("{cell:>3}")).collect();
        findings.line(format!("  {from}: {}", cells.join(" ")));
    }
    if closed > 0 {
        findings.missing(
            "peer access",
            format!("{closed} of {} pairs have none", count * (count - 1)),
            "peer access: the p2p backend needs it between all its ranks; see `nvidia-smi topo -p2p rw`",
        );
    }
    if let Some(error) = failure {
        findings.fact("peer access", error);
    }
}

fn describe(index: usize, device: &Device<'_>) -> String {
    let text =
        |result: Result<String, nvml_wrapper::error::NvmlError>| result.unwrap_or_else(|e| format!("({e})"));
    let memory = device.memory_info().map_or_else(|e| e.to_string(), |memory| human(memory.total));
    let capability = device
        .cuda_compute_capability()
        .map_or_else(|_| "?".to_owned(), |capability| format!("{}.{}", capability.major, capability.minor));
    let architecture = device.architecture().unwrap_or(DeviceArchitecture::Unknown);
    let bus = device.pci_info().map_or_else(|e| e.to_string(), |pci| pci.bus_id);
    format!(
        "{index}: {} ({architecture:?}, {capability}), {memory}, {bus}, {}",
        text(device.name()),
        text(device.uuid())
    )
}

/// Active NVLinks from each GPU to each other one, or to the switch.
fn links(findings: &mut Findings, devices: &[Device<'_>]) {
    let buses: Vec<Option<String>> =
        devices.iter().map(|device| device.pci_info().ok().map(|pci| pci.bus_id.to_lowercase())).collect();
    let mut matrix = vec![vec![0_u32; devices.len()]; devices.len()];
    let (mut to_switch, mut peer_access) = (vec![0_u32; devices.len()], false);
    for (from, device) in devices.iter().enumerate() {
        for number in 0..MOST_LINKS {
            let link = device.link_wrapper_for(number);
            if !link.is_active().unwrap_or(false) {
                continue;
            }
            peer_access |= link.has_capability(Capability::P2p).unwrap_or(false);
            let remote = link.remote_pci_info().ok().map(|pci| pci.bus_id.to_lowercase());
            match buses.iter().position(|bus| bus.is_some() && *bus == remote) {
                Some(to) => matrix[from][to] += 1,
                None => to_switch[from] += 1,
            }
        }
    }
    if to_switch.iter().all(|&n| n == 0) && matrix.iter().flatten().all(|&n| n == 0) {
        findings.fact("NVLink", "none; GPUs talk over PCIe");
        return;
    }
    findings.fact("NVLink peer access", if peer_access { "yes" } else { "no" });
    findings.line("NVLinks from each GPU (row) to each GPU, and to a switch:");
    for (from, row) in matrix.iter().enumerate() {
        let cells: Vec<String> = row.iter().map(|n| format!("{n:>3}")).collect();
        findings.line(format!("  {from}: {}   switch {}", cells.join(" "), to_switch[from]));
    }
    let meshed = to_switch.iter().all(|&n| n > 0)
        || (0..devices.len()).all(|a| (0..devices.len()).all(|b| a == b || matrix[a][b] > 0));
    findings.fact("mesh", if meshed { "fully connected" } else { "not fully connected" });
}

/// How each pair of GPUs is connected below NVLink.
fn peers(findings: &mut Findings, nvml: &Nvml, devices: &[Device<'_>]) {
    if devices.len() < 2 {
        return;
    }
    findings.line("nearest common ancestor of each pair of GPUs on PCIe:");
    for (a, device) in devices.iter().enumerate() {
        let level_to = |b: u32| device.topology_common_ancestor(nvml.device_by_index(b)?);
        let cells: Vec<String> = (0_u32..)
            .take(devices.len())
            .map(|b| match (a == b as usize, level_to(b)) {
                (true, _) => "-".to_owned(),
                (_, Ok(level)) => format!("{level:?}"),
                (_, Err(_)) => "?".to_owned(),
            })
            .collect();
        findings.line(format!("  {a}: {}", cells.join(" ")));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_without_peer_access_are_shown_and_advised_on() {
        let mut findings = Findings::default();
        peer_access(&mut findings, 3, |from, to| Ok((from, to) != (2, 0)));
        assert_eq!(findings.lines[1], "    0:   - yes yes");
        assert_eq!(findings.lines[3], "    2:  no yes   -");
        assert!(findings.lines[4].contains("1 of 6 pairs") && findings.advice.len() == 1);
        let mut one = Findings::default();
        peer_access(&mut one, 1, |_, _| Ok(true));
        assert!(one.lines.is_empty());
    }
}
