//! Memory in use on a job's GPUs before and after it, as NVML tells: all of it must have come back once the job's processes
//! are gone.
//!
//! NVML says how much is in use, not by whom. So nothing is concluded while another program is on a GPU.

use std::time::{Duration, Instant};

use comm_kernels::nvml::nvml;

use crate::bench::human;
use crate::gpus;

/// What may be in use more than before: the driver's own books.
const SLACK: u64 = 2 << 20;
/// How long what a process had is waited for: the driver may take it back after the process has ended.
const PATIENCE: Duration = Duration::from_secs(5);
/// Between two looks.
const LOOK: Duration = Duration::from_millis(50);

/// What NVML says of a GPU, or why it does not.
type Reading = Result<Used, String>;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Used {
    bytes: u64,
    /// Programs that compute there.
    programs: usize,
}

/// The GPUs before the job.
pub struct Before {
    gpus: Vec<(String, Reading)>,
}

/// What has become of the GPUs' memory.
#[derive(Default, PartialEq, Eq, Debug)]
pub struct Changes {
    /// GPUs of whose memory more is in use than before, in words.
    pub leaks: Vec<String>,
    /// GPUs of which that cannot be told, and why.
    pub untold: Vec<String>,
}

impl Before {
    /// Looks at GPUs, as `CUDA_VISIBLE_DEVICES` spells them, that no other job has.
    pub fn look(gpus: &[String]) -> Self {
        Self { gpus: gpus.iter().map(|gpu| (gpu.clone(), read(gpu))).collect() }
    }

    /// Looks again, now that the job's processes are gone, and once more where memory has yet to come back.
    pub fn changes(&self) -> Changes {
        let start = Instant::now();
        loop {
            let after: Vec<Reading> = self.gpus.iter().map(|(gpu, _)| read(gpu)).collect();
            let waiting = self.gpus.iter().zip(&after).any(|((_, before), after)| may_settle(before, after));
            if !waiting || start.elapsed() > PATIENCE {
                return compare(&self.gpus, &after);
            }
            std::thread::sleep(LOOK);
        }
    }
}

/// NVML is kept, so that a GPU which nobody else uses is not started anew between two looks.
fn read(gpu: &str) -> Reading {
    let ask = || {
        let device = gpus::device(nvml()?, gpu)?;
        let programs = device.running_compute_processes()?.len();
        Ok(Used { bytes: device.memory_info()?.used, programs })
    };
    ask().map_err(|error: nvml_wrapper::error::NvmlError| error.to_string())
}

/// Whether another look may be better: nobody was there before, and somebody still is, or memory has not come back.
fn may_settle(before: &Reading, after: &Reading) -> bool {
    let (Ok(before), Ok(after)) = (before, after) else { return false };
    before.programs == 0 && (after.programs > 0 || after.bytes > before.bytes.saturating_add(SLACK))
}

fn compare(before: &[(String, Reading)], after: &[Reading]) -> Changes {
    let mut changes = Changes::default();
    for ((gpu, before), after) in before.iter().zip(after) {
        let untold = match (before, after) {
            (Err(reason), _) | (_, Err(reason)) => Some(format!("NVML does not say: {reason}")),
            (Ok(before), Ok(after)) if before.programs + after.programs > 0 => {
                Some("another program is on it".to_owned())
            }
            (Ok(before), Ok(after)) => {
                let more = after.bytes.saturating_sub(before.bytes);
                if more > SLACK {
                    let (more, before) = (human(more), human(before.bytes));
                    changes
                        .leaks
                        .push(format!("{more} of memory on GPU {gpu}, where {before} was in use before"));
                }
                None
            }
        };
        let untold =
            untold.map(|why| format!("whether memory of GPU {gpu} was left behind is not known: {why}"));
        changes.untold.extend(untold);
    }
    changes
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn used(bytes: u64, programs: usize) -> Reading {
        Ok(Used { bytes, programs })
    }

    fn of(before: Reading, after: Reading) -> Changes {
        compare(&[("5".to_owned(), before)], &[after])
    }

    #[test]
    fn what_is_in_use_more_than_before_is_a_leak() {
        assert_eq!(of(used(600 * MIB, 0), used(602 * MIB, 0)), Changes::default());
        assert_eq!(of(used(600 * MIB, 0), used(4 * MIB, 0)), Changes::default());
        let leaks = of(used(600 * MIB, 0), used(602 * MIB + 1, 0)).leaks;
        assert!(leaks.len() == 1 && leaks[0].contains("GPU 5"), "{leaks:?}");
    }

    #[test]
    fn nothing_is_concluded_where_nobody_can_tell() {
        for (before, after, why) in [
            (used(MIB, 1), used(90 * MIB, 0), "another program"),
            (used(MIB, 0), used(90 * MIB, 2), "another program"),
            (Err("not supported".to_owned()), used(90 * MIB, 0), "not supported"),
            (used(MIB, 0), Err("the GPU is lost".to_owned()), "lost"),
        ] {
            let changes = of(before, after);
            assert!(changes.leaks.is_empty() && changes.untold[0].contains(why), "{changes:?}");
        }
    }

    #[test]
    fn only_what_may_still_come_back_is_waited_for() {
        assert!(may_settle(&used(MIB, 0), &used(90 * MIB, 0)));
        assert!(may_settle(&used(MIB, 0), &used(MIB, 1)));
        assert!(!may_settle(&used(MIB, 0), &used(2 * MIB, 0)));
        assert!(!may_settle(&used(MIB, 1), &used(90 * MIB, 1)));
        assert!(!may_settle(&used(MIB, 0), &Err(String::new())));
    }
}
