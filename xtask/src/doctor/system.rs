//! What the operating system grants: processors, shared memory, locked memory, descriptors.

use rustix::process::{Resource, getrlimit};

use crate::bench::human;
use crate::doctor::Findings;

/// NCCL's and a host backend's segments fit into this.
const ENOUGH_SHM: u64 = 1 << 30;

/// Looks at them.
pub fn look(findings: &mut Findings) {
    findings.section("System");
    let uname = rustix::system::uname();
    findings.fact(
        "kernel",
        format!("{} {}", uname.release().to_string_lossy(), uname.machine().to_string_lossy()),
    );
    findings.fact("processors", std::thread::available_parallelism().map_or(0, std::num::NonZero::get));
    match rustix::fs::statvfs("/dev/shm") {
        Ok(stat) => {
            let size = stat.f_blocks * stat.f_frsize;
            findings.fact(
                "shared memory",
                format!("{} free of {}", human(stat.f_bavail * stat.f_frsize), human(size)),
            );
            if size < ENOUGH_SHM {
                findings.fact(
                    "",
                    format!(
                        "less than {}: in a container, --shm-size=1g or --ipc=host helps NCCL",
                        human(ENOUGH_SHM)
                    ),
                );
            }
        }
        Err(error) => findings.missing("shared memory", error, "shared memory: mount a tmpfs at /dev/shm"),
    }
    for (name, resource) in [("locked memory", Resource::Memlock), ("open files", Resource::Nofile)] {
        let limit = getrlimit(resource).current;
        findings.fact(name, limit.map_or_else(|| "unlimited".to_owned(), |limit| limit.to_string()));
    }
}
