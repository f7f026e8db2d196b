//! The architectures that kernels are compiled for.

use std::fmt;
use std::str::FromStr;

/// The architecture whose PTX stands in for all later GPUs.
const PTX_BASE: u32 = 80;

/// One target of the compilation.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Arch {
    /// Machine code for `sm_<name>`.
    Machine(String),
    /// PTX, compiled by the driver when it loads the module.
    Ptx,
}

impl Arch {
    /// The compiler option that asks for it; `None` for machine code below architecture `least`. PTX is raised to it.
    pub(crate) fn gencode(&self, least: u32) -> Option<String> {
        match self {
            Self::Machine(name) => {
                let number: u32 = name.trim_end_matches(['a', 'f']).parse().ok()?;
                (number >= least).then(|| format!("-gencode=arch=compute_{name},code=sm_{name}"))
            }
            Self::Ptx => {
                let base = PTX_BASE.max(least);
                Some(format!("-gencode=arch=compute_{base},code=compute_{base}"))
            }
        }
    }
}

impl fmt::Display for Arch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Machine(name) => name,
            Self::Ptx => "ptx",
        })
    }
}

impl FromStr for Arch {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "ptx" {
            return Ok(Self::Ptx);
        }
        let name = text.strip_prefix("sm_").unwrap_or(text);
        let number = name.strip_suffix(['a', 'f']).unwrap_or(name);
        match number.parse::<u32>() {
            Ok(80..=999) => Ok(Self::Machine(name.to_owned())),
            _ => {
                Err(format!("{text:?} is neither `ptx` nor an architecture such as 80 or 90a (80 at least)"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn architectures_parse_and_print() {
        for (text, name) in [("80", "80"), ("sm_90a", "90a"), ("ptx", "ptx"), ("100f", "100f")] {
            assert_eq!(text.parse::<Arch>().unwrap().to_string(), name);
        }
        for bad in ["", "70", "90b", "sm_", "compute_80", "-1"] {
            assert!(bad.parse::<Arch>().is_err(), "{bad}");
        }
    }
}
