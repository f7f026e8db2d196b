//! Reading what the assembler says: each kernel's resources, and the warnings that must not pass.

use std::collections::BTreeMap;

use comm_kernels::manifest::Resources;

/// Warnings that mean slow or wrong code: C7508, a `setmaxnreg` that is ignored; C7510, `wgmma` that is serialised.
const FATAL: [&str; 2] = ["C7508", "C7510"];

/// Kernel name -> architecture -> what it uses.
pub(crate) type Report = BTreeMap<String, BTreeMap<String, Resources>>;

/// The first line that carries a fatal warning.
pub(crate) fn fatal_warning(output: &str) -> Option<&str> {
    output.lines().find(|line| FATAL.iter().any(|code| line.contains(code)))
}

/// Reads the output of `ptxas -v`.
pub(crate) fn parse(output: &str) -> Report {
    let mut report = Report::new();
    let mut current: Option<(String, String)> = None;
    for line in output.lines() {
        if line.contains("Compiling entry function") {
            let mut quoted = line.split('\'').skip(1).step_by(2);
            current = quoted.next().zip(quoted.next()).map(|(a, b)| (a.to_owned(), b.to_owned()));
        }
        let Some((kernel, arch)) = &current else { continue };
        let resources = report.entry(kernel.clone()).or_default().entry(arch.clone()).or_default();
        let number = |after: &str| number_before(line, after);
        if line.contains("bytes stack frame") {
            resources.stack = number("bytes stack frame");
            resources.spill_stores = number("bytes spill stores");
            resources.spill_loads = number("bytes spill loads");
        } else if line.contains("Used ") && line.contains(" registers") {
            resources.registers = number("registers");
            resources.shared = number("bytes smem");
            current = None;
        }
    }
    report
}

/// The number that stands right before `unit`, or 0.
fn number_before(line: &str, unit: &str) -> u32 {
    line.split_once(unit)
        .and_then(|(before, _)| before.trim_end().rsplit([' ', ',']).next())
        .and_then(|number| number.parse().ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'copy' for 'sm_80'
ptxas info    : Function properties for copy
    8 bytes stack frame, 16 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 132 bytes smem, 400 bytes cmem[0]
ptxas info    : Compiling entry function 'copy' for 'sm_90a'
ptxas info    : Function properties for copy
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers, used 0 barriers
ptxas info    : Compile time = 1.000 ms
";

    #[test]
    fn resources_are_read_per_kernel_and_architecture() {
        let report = parse(OUTPUT);
        let expected = Resources { registers: 40, shared: 132, stack: 8, spill_stores: 16, spill_loads: 24 };
        assert_eq!(report["copy"]["sm_80"], expected);
        assert_eq!(report["copy"]["sm_90a"], Resources { registers: 12, ..Resources::default() });
    }

    #[test]
    fn fatal_warnings_are_found() {
        assert_eq!(fatal_warning(OUTPUT), None);
        let line =
            "ptxas info : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized";
        assert_eq!(fatal_warning(&format!("{OUTPUT}{line}\n")), Some(line));
    }
}
