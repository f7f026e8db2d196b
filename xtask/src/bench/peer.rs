//! PyTorch's NCCL collectives on the same GPUs, right after ours: finding it, running its ranks, reading what they print.
//!
//! Owns the interface of the scripts in `bench/peers`, which are part of this program so that it finds them wherever it
//! runs. It never judges a figure; [`versus`](crate::bench::versus) does.

use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use comm_core::{DType, OpKind};
use serde::{Deserialize, Serialize};

use crate::bench::row::Row;
use crate::command::output_of;
use crate::job;
use crate::launch::{Exit, LaunchReport, LaunchSpec, Mode, launch};

/// Prints what PyTorch there is.
pub const PROBE: &str = include_str!("../../../bench/peers/torch_probe.py");
/// Measures its collectives.
pub const SCRIPT: &str = include_str!("../../../bench/peers/torch_nccl.py");
/// Importing PyTorch from a cold disk takes many seconds.
const PROBE_PATIENCE: Duration = Duration::from_secs(90);

/// Another system to measure.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Peer {
    /// `python3`'s PyTorch, with its NCCL process group.
    Torch,
}

/// The PyTorch that was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Torch {
    /// Its version.
    pub version: String,
    /// The version of its NCCL.
    pub nccl: String,
    /// The file of its NCCL, where that is a file of its own.
    pub library: Option<PathBuf>,
}

impl Torch {
    /// The PyTorch of a Python interpreter, as `probe` prints it.
    ///
    /// # Errors
    /// Why it cannot be measured.
    pub fn find(python: &Path, probe: &str) -> Result<Self> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Answer {
            Problem { problem: String },
            Torch(Torch),
        }
        let text =
            output_of(Command::new(python).args(["-c", probe]), PROBE_PATIENCE).with_context(|| {
                format!("{} does not run, or did not tell which PyTorch it has", python.display())
            })?;
        let answer = text.trim().lines().last().unwrap_or_default();
        match serde_json::from_str(answer)
            .with_context(|| format!("{} answered {answer:?}", python.display()))?
        {
            Answer::Problem { problem } => bail!("{}: {problem}", python.display()),
            Answer::Torch(torch) => Ok(torch),
        }
    }

    /// Its versions and where its NCCL lies.
    pub fn describe(&self) -> String {
        match &self.library {
            Some(file) => format!("PyTorch {} with NCCL {} at {}", self.version, self.nccl, file.display()),
            None => format!("PyTorch {} with NCCL {} linked in", self.version, self.nccl),
        }
    }
}

/// One figure of the peer's, or why there is none. As the script prints it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Figure {
    /// The operation's name.
    pub op: String,
    /// Element type.
    pub dtype: String,
    /// Bytes of the full buffer.
    pub bytes: u64,
    /// Ranks.
    pub world: usize,
    /// Whether the operands coincide.
    #[serde(default)]
    pub in_place: bool,
    /// Microseconds per operation: the median over the repetitions, of the slowest rank.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub us: Option<f64>,
    /// Why it was not measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// Why the peer's script cannot measure what a row measured.
pub fn cannot_measure(row: &Row) -> Option<String> {
    const OPS: [OpKind; 6] = [
        OpKind::AllReduce,
        OpKind::AllGather,
        OpKind::ReduceScatter,
        OpKind::Broadcast,
        OpKind::Reduce,
        OpKind::AllToAll,
    ];
    const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];
    if let Some(reason) = &row.skipped {
        return Some(format!("not measured here: {reason}"));
    }
    if !row.graph {
        return Some("PyTorch is measured on GPUs and in CUDA graphs only".into());
    }
    if !OPS.iter().any(|op| op.name() == row.op) {
        return Some("PyTorch has no such operation, or its script does not measure it".into());
    }
    if row.redop.as_deref().is_some_and(|redop| redop != "sum") {
        return Some("PyTorch is measured with sum only".into());
    }
    if row.bytes == 0 {
        return Some("there is nothing to send".into());
    }
    (!DTYPES.iter().any(|dtype| dtype.name() == row.dtype))
        .then(|| "PyTorch is measured with f32, f16 and bf16 only".into())
}

/// How the peer is measured: as ours was.
pub struct Method<'a> {
    /// The interpreter.
    pub python: &'a Path,
    /// What it runs as every rank.
    pub script: &'a str,
    /// Repetitions of the graph.
    pub reps: usize,
    /// Operations in it; by size when absent.
    pub iters: Option<usize>,
    /// After this long it is ended.
    pub timeout: Duration,
}

/// Measures what `rows` did, for those rows that the script can measure. A script that ends badly leaves the figures
/// it had, and why it ended.
///
/// # Errors
/// When the ranks cannot be started.
pub fn measure(rows: &[Row], gpus: &[String], method: &Method<'_>) -> Result<(Vec<Figure>, Option<String>)> {
    let rows: Vec<&Row> = rows.iter().filter(|row| cannot_measure(row).is_none()).collect();
    let Some(first) = rows.first() else { return Ok((Vec::new(), None)) };
    let mut script = tempfile::Builder::new().prefix("comm-peer-").suffix(".py").tempfile()?;
    script.write_all(method.script.as_bytes()).context("writing PyTorch's script")?;

    let figures = Arc::new(Mutex::new(Vec::new()));
    let output: crate::launch::LineSink = {
        let figures = Arc::clone(&figures);
        Arc::new(move |line: &str| {
            let figure = line.strip_prefix("[0] ").and_then(|line| serde_json::from_str::<Figure>(line).ok());
            match figure {
                Some(figure) => figures.lock().unwrap_or_else(PoisonError::into_inner).push(figure),
                None => eprintln!("PyTorch {line}"),
            }
        })
    };
    let spec = job::spec(first.world, Mode::Processes, method.timeout, Duration::from_secs(30))?;
    let spec = LaunchSpec {
        program: method.python.into(),
        args: arguments(script.path().into(), &rows, method),
        // What torchrun sets: with a thread per processor in every rank, the ranks disturb each other.
        env: vec![("OMP_NUM_THREADS".into(), "1".into())],
        output,
        ..spec.with_gpus(gpus, true)?
    };
    let outcome = launch(&spec, &mut |_| {})?;
    let figures = std::mem::take(&mut *figures.lock().unwrap_or_else(PoisonError::into_inner));
    Ok((figures, bad_end(&outcome)))
}

fn arguments(script: OsString, rows: &[&Row], method: &Method<'_>) -> Vec<OsString> {
    let list = |mut values: Vec<String>| {
        let mut seen = std::collections::BTreeSet::new();
        values.retain(|value| seen.insert(value.clone()));
        OsString::from(values.join(","))
    };
    let ops = list(rows.iter().map(|row| row.op.clone()).collect());
    let bytes = list(rows.iter().map(|row| row.bytes.to_string()).collect());
    let dtype = rows.first().map_or_else(String::new, |row| row.dtype.clone());
    let mut arguments =
        vec![script, "--ops".into(), ops, "--bytes".into(), bytes, "--dtype".into(), dtype.into()];
    arguments.extend(["--replays".into(), method.reps.to_string().into()]);
    if let Some(iters) = method.iters {
        arguments.extend(["--iters".into(), iters.to_string().into()]);
    }
    arguments
}

/// A script is no rank of ours and reports no end of its work, so its exit must do.
fn bad_end(outcome: &LaunchReport) -> Option<String> {
    if outcome.interrupted {
        return Some("interrupted".into());
    }
    if outcome.timed_out {
        return Some("time was up".into());
    }
    let bad = outcome.ranks.iter().enumerate().find(|(_, end)| end.exit != Exit::Code(0));
    bad.map(|(rank, end)| format!("its rank {rank} ended with {:?}", end.exit))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::table::tests::row;

    #[test]
    fn what_the_script_cannot_measure_is_left_out_with_a_reason() {
        let good = row(OpKind::AllReduce, 1024, 5.0);
        assert_eq!(cannot_measure(&good), None);
        let change = |change: &dyn Fn(&mut Row)| {
            let mut row = good.clone();
            change(&mut row);
            cannot_measure(&row).unwrap_or_default()
        };
        assert!(change(&|row| row.op = "all_gather_2d".into()).contains("no such operation"));
        assert!(change(&|row| row.graph = false).contains("graphs"));
        assert!(change(&|row| row.redop = Some("max".into())).contains("sum"));
        assert!(change(&|row| row.dtype = "u8".into()).contains("bf16"));
        assert!(change(&|row| row.skipped = Some("lacks it".into())).contains("lacks it"));
    }

    #[test]
    fn the_script_is_asked_for_every_operation_and_size_once() {
        let rows = [
            row(OpKind::AllReduce, 4096, 5.0),
            row(OpKind::AllReduce, 1024, 5.0),
            row(OpKind::AllGather, 1024, 5.0),
        ];
        let method = Method {
            python: Path::new("python3"),
            script: "",
            reps: 5,
            iters: Some(9),
            timeout: Duration::from_secs(1),
        };
        let words = arguments("s.py".into(), &rows.iter().collect::<Vec<_>>(), &method);
        let words: Vec<_> = words.iter().map(|word| word.to_string_lossy()).collect();
        let expected =
            "s.py --ops all_reduce,all_gather --bytes 4096,1024 --dtype bf16 --replays 5 --iters 9";
        assert_eq!(words.join(" "), expected);
    }

    /// With a shell in the interpreter's place.
    fn measure_with(script: &str) -> (Vec<Figure>, Option<String>) {
        let mut small = row(OpKind::AllReduce, 1024, 5.0);
        small.world = 2;
        let method = Method {
            python: Path::new("/bin/sh"),
            script,
            reps: 5,
            iters: None,
            timeout: Duration::from_secs(20),
        };
        let gpus = ["GPU-of-a-test-0".to_owned(), "GPU-of-a-test-1".to_owned()];
        measure(&[small], &gpus, &method).unwrap()
    }

    const LINE: &str =
        r#"echo '{"op":"all_reduce","dtype":"bf16","bytes":1024,"world":2,"in_place":true,"us":7.5}'"#;

    #[test]
    fn its_ranks_are_started_as_torchrun_would_with_multicast_off() {
        let script = format!(
            r#"[ -s "$0" ] && [ "$WORLD_SIZE" = 2 ] && [ -n "$MASTER_ADDR$MASTER_PORT" ] && [ "$LOCAL_RANK" = "$RANK" ] || exit 4
               [ "$NCCL_NVLS_ENABLE$TORCH_SYMM_MEM_DISABLE_MULTICAST" = 01 ] || exit 5
               [ "$CUDA_VISIBLE_DEVICES" = GPU-of-a-test-0,GPU-of-a-test-1 ] || exit 6
               echo a warning; {LINE}"#
        );
        let (figures, bad_end) = measure_with(&script);
        assert_eq!(bad_end, None);
        // Every rank printed the line; rank 0's is the one that counts.
        assert_eq!(figures.iter().map(|figure| figure.us).collect::<Vec<_>>(), [Some(7.5)]);
    }

    #[test]
    fn a_rank_that_fails_is_named_and_its_figures_are_kept() {
        let (figures, bad_end) = measure_with(&format!("{LINE}; exit $((RANK * 3))"));
        assert_eq!((figures.len(), bad_end.as_deref()), (1, Some("its rank 1 ended with Code(3)")));
    }

    #[test]
    fn an_interpreter_tells_what_it_has_or_why_not() {
        let find = |script: &str| Torch::find(Path::new("/bin/sh"), script);
        let torch =
            find(r#"echo noise; echo '{"version":"2.11","nccl":"2.28.9","library":"/x/libnccl.so.2"}'"#)
                .unwrap();
        assert_eq!(torch.describe(), "PyTorch 2.11 with NCCL 2.28.9 at /x/libnccl.so.2");
        let error = |script: &str| format!("{:#}", find(script).unwrap_err());
        assert!(error(r#"echo '{"problem":"it has no PyTorch"}'"#).contains("has no PyTorch"));
        assert!(error("echo nonsense").contains("nonsense"));
        assert!(error("exit 1").contains("does not run"));
    }

    #[test]
    fn lines_of_the_script_are_read() {
        let line = r#"{"op": "all_reduce", "dtype": "bf16", "bytes": 1024, "world": 8, "in_place": true, "us": 20.5}"#;
        let figure: Figure = serde_json::from_str(line).unwrap();
        assert_eq!((figure.us, figure.in_place, figure.reason), (Some(20.5), true, None));
        let line = r#"{"op": "all_gather", "dtype": "bf16", "bytes": 2, "world": 8, "reason": "odd"}"#;
        let figure: Figure = serde_json::from_str(line).unwrap();
        assert_eq!((figure.us, figure.reason.as_deref()), (None, Some("odd")));
    }
}
