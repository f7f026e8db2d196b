//! Faults that can be put into a running job.

use std::str::FromStr;

use anyhow::{Result, anyhow, bail};
use serde::{Deserialize, Serialize};

/// What goes wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum FaultKind {
    /// The rank's process gets SIGKILL.
    Kill,
    /// The rank's process gets SIGSTOP.
    Stop,
    /// The rank does not make the call the others wait in.
    Late,
    /// The rank's device fails.
    CudaError,
    /// Another thread of the rank aborts the communicator.
    Abort,
}

impl FaultKind {
    /// Every fault.
    pub const ALL: [Self; 5] = [Self::Kill, Self::Stop, Self::Late, Self::CudaError, Self::Abort];

    /// The name on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Kill => "kill",
            Self::Stop => "stop",
            Self::Late => "late",
            Self::CudaError => "cuda-error",
            Self::Abort => "abort",
        }
    }

    /// Whether the launcher brings it about by a signal; otherwise the rank does it to itself.
    pub const fn is_signal(self) -> bool {
        matches!(self, Self::Kill | Self::Stop)
    }
}

/// A fault, whom it hits, and in which kind of case.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Fault {
    /// What goes wrong.
    pub kind: FaultKind,
    /// The rank it hits.
    pub rank: usize,
    /// Restricts the cases it is put into: `eager` or `graph`.
    pub case: Option<String>,
}

impl FromStr for Fault {
    type Err = anyhow::Error;

    /// `KIND:RANK` or `KIND:RANK@CASE`, for example `kill:1@graph`.
    fn from_str(text: &str) -> Result<Self> {
        let (head, case) = match text.split_once('@') {
            Some((head, case)) => (head, Some(case.to_owned())),
            None => (text, None),
        };
        let (kind, rank) = head
            .split_once(':')
            .ok_or_else(|| anyhow!("a fault is KIND:RANK or KIND:RANK@CASE, for example kill:1@graph"))?;
        let Some(kind) = FaultKind::ALL.into_iter().find(|known| known.name() == kind) else {
            let names = FaultKind::ALL.map(FaultKind::name).join(", ");
            bail!("unknown fault {kind:?}; known are {names}");
        };
        if let Some(case) = case.as_deref().filter(|case| !["eager", "graph"].contains(case)) {
            bail!("unknown case {case:?}; known are eager, graph");
        }
        let rank = rank.parse().map_err(|_| anyhow!("{rank:?} is not a rank"))?;
        Ok(Self { kind, rank, case })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_parse_or_say_what_is_known() {
        let fault: Fault = "kill:3@graph".parse().unwrap();
        assert_eq!(fault, Fault { kind: FaultKind::Kill, rank: 3, case: Some("graph".into()) });
        assert_eq!("cuda-error:0".parse::<Fault>().unwrap().kind, FaultKind::CudaError);
        for (text, part) in [
            ("kill", "KIND:RANK"),
            ("melt:1", "known are kill"),
            ("stop:x", "not a rank"),
            ("stop:1@y", "eager"),
        ] {
            let message = text.parse::<Fault>().unwrap_err().to_string();
            assert!(message.contains(part), "{text}: {message}");
        }
    }
}
