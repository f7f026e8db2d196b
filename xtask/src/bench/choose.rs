//! Which backends are measured where none is named: those that can be made on this machine, or host memory.

use anyhow::{Result, bail};
use comm_core::CommError;

use crate::backends::{self, Backend};
use crate::bench::row::Row;

/// What came of measuring one backend.
#[derive(Debug)]
pub enum Outcome {
    /// Its rows.
    Rows(Vec<Row>),
    /// The machine is not one for it; why.
    NotMade(String),
}

/// The backends to try on a machine with or without GPUs where none is named.
const fn candidates(gpus: bool) -> &'static [&'static str] {
    if gpus { &[comm_p2p::NAME, comm_nccl::NAME] } else { &[HOST] }
}

/// What works everywhere.
const HOST: &str = "host";

/// Measures the backends that are named, all of which must do; or, where none is, each that can be made, with a line by
/// `say` for each that cannot, and host memory where none can. `gpus`: whether there are any, or why there are none.
///
/// # Errors
/// When a name is unknown, a named backend cannot be made, or measuring fails.
pub fn measure_each(
    named: &[String],
    gpus: Result<(), String>,
    measure: &mut dyn FnMut(Backend) -> Result<Outcome>,
    say: &mut dyn FnMut(&str),
) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    if !named.is_empty() {
        // A mistyped name must not cost the measurement of those before it.
        for backend in named.iter().map(|name| backends::find(name)).collect::<Result<Vec<_>>>()? {
            match measure(backend)? {
                Outcome::Rows(new) => rows.extend(new),
                Outcome::NotMade(reason) => {
                    bail!("no {} communicator can be made here: {reason}", backend.name)
                }
            }
        }
        return Ok(rows);
    }
    if let Err(reason) = &gpus {
        say(&format!("{reason}; benchmarking ranks on host memory"));
    }
    let mut any = false;
    for name in candidates(gpus.is_ok()) {
        match measure(backends::find(name)?)? {
            Outcome::Rows(new) => {
                any = true;
                rows.extend(new);
            }
            Outcome::NotMade(reason) => say(&format!("{name} is left out: {reason}")),
        }
    }
    if !any && gpus.is_ok() {
        say("no backend can be made on these GPUs; benchmarking ranks on host memory");
        if let Outcome::Rows(new) = measure(backends::find(HOST)?)? {
            rows.extend(new);
        }
    }
    Ok(rows)
}

/// Whether `backend` may be among those measured.
pub fn may_measure(named: &[String], gpus: bool, backend: &str) -> bool {
    if named.is_empty() {
        candidates(gpus).contains(&backend)
    } else {
        named.iter().any(|name| name == backend)
    }
}

/// Why there can be no communicator on a machine like this one, out of the error with which creating one failed: no
/// library, or GPUs, or as many ranks, as the backend does without. `None` for what should not have happened.
pub fn obstacle(error: &CommError) -> Option<String> {
    let CommError::CreationFailed { cause, .. } = error else { return None };
    let mut root: &CommError = cause;
    while let CommError::PeerFailed { cause, .. } = root {
        root = cause;
    }
    match root {
        CommError::Library { .. } | CommError::Unsupported { .. } => Some(root.to_string()),
        // These are given by what the ranks run on; other arguments are somebody's mistake.
        CommError::InvalidArgument { argument, reason } if ["memory", "host"].contains(&&**argument) => {
            Some(reason.clone())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::table::tests::row;
    use comm_core::{CallSite, OpKind};

    /// The backends whose rows came back and what was said, with those in `missing` not to be made.
    fn measured(
        named: &[&str],
        gpus: Result<(), String>,
        missing: &[&str],
    ) -> (Result<Vec<String>>, Vec<String>) {
        let named: Vec<String> = named.iter().map(|&name| name.to_owned()).collect();
        let mut said = Vec::new();
        let mut measure = |backend: Backend| {
            if missing.contains(&backend.name) {
                return Ok(Outcome::NotMade(format!("{} wants other GPUs", backend.name)));
            }
            Ok(Outcome::Rows(vec![Row { backend: backend.name.into(), ..row(OpKind::AllReduce, 1024, 1.0) }]))
        };
        let rows = measure_each(&named, gpus, &mut measure, &mut |text| said.push(text.to_owned()));
        (rows.map(|rows| rows.into_iter().map(|row| row.backend).collect()), said)
    }

    #[test]
    fn on_gpus_every_backend_that_can_be_made_is_measured() {
        let (rows, said) = measured(&[], Ok(()), &[]);
        assert_eq!((rows.unwrap(), said), (vec!["p2p".into(), "nccl".into()], Vec::new()));
        let (rows, said) = measured(&[], Ok(()), &["p2p"]);
        assert_eq!(rows.unwrap(), ["nccl"]);
        assert_eq!(said, ["p2p is left out: p2p wants other GPUs"]);
        let (rows, said) = measured(&[], Ok(()), &["p2p", "nccl"]);
        assert_eq!(rows.unwrap(), ["host"]);
        assert!(said.len() == 3 && said[2].contains("host memory"), "{said:?}");
    }

    #[test]
    fn without_gpus_it_is_host_memory_with_the_reason() {
        let (rows, said) = measured(&[], Err("no driver".into()), &[]);
        assert_eq!(rows.unwrap(), ["host"]);
        assert!(said.len() == 1 && said[0].contains("no driver"), "{said:?}");
    }

    #[test]
    fn what_is_named_must_be_made() {
        assert_eq!(measured(&["nccl"], Ok(()), &["p2p"]).0.unwrap(), ["nccl"]);
        let error = measured(&["nccl", "p2p"], Ok(()), &["p2p"]).0.unwrap_err().to_string();
        assert!(error.contains("p2p wants other GPUs"), "{error}");
        let names = ["host".to_owned(), "nothing".to_owned()];
        let error =
            measure_each(&names, Ok(()), &mut |_| panic!("measured before all names were read"), &mut |_| {});
        assert!(error.unwrap_err().to_string().contains("\"nothing\""));
    }

    #[test]
    fn what_may_be_measured_is_known_before() {
        let named = ["p2p".to_owned()];
        assert!(may_measure(&named, true, "p2p") && !may_measure(&named, true, "nccl"));
        assert!(may_measure(&[], true, "nccl") && !may_measure(&[], false, "nccl"));
    }

    #[test]
    fn only_what_the_machine_lacks_is_an_obstacle() {
        let failed =
            |cause| CommError::CreationFailed { backend: "p2p".into(), rank: 1, cause: Box::new(cause) };
        let old = CommError::invalid("memory", "the GPU is too old");
        assert_eq!(obstacle(&failed(old.clone())).unwrap(), "the GPU is too old");
        let at = CallSite::new("world", OpKind::Create, 0);
        let told = CommError::PeerFailed { at: at.clone(), rank: 0, cause: Box::new(old.clone()) };
        assert!(obstacle(&failed(told)).is_some());
        let library = CommError::Library { library: "libnccl.so.2".into(), reason: "not found".into() };
        assert!(obstacle(&failed(library)).unwrap().contains("libnccl.so.2"));
        for other in [
            CommError::invalid("COMM_P2P_ALGO", "no such algorithm"),
            CommError::Timeout {
                at: at.clone(),
                missing: vec![1],
                waited: std::time::Duration::from_secs(1),
            },
            CommError::PeerDied { at, rank: 1 },
        ] {
            assert_eq!(obstacle(&failed(other)), None);
        }
        // Not from creating one.
        assert_eq!(obstacle(&old), None);
    }
}
