//! What the device needs for a copy of its own: the measure of what operands cost that no other rank reaches.

use std::collections::BTreeMap;

use anyhow::Result;
use comm_core::{HostCommExt, HostReduceOp};

use crate::bench::measure::{Bench, Buffer};
use crate::bench::stats::median;

/// Times of copies by their bytes, so that rows of one size have one figure.
#[derive(Debug, Default)]
pub struct Copies(BTreeMap<u64, f64>);

impl Copies {
    /// Microseconds of a copy of `bytes` bytes within the device, timed as operations are: back to back, the slowest rank's
    /// median. `None` where there is nothing to copy. Collective.
    ///
    /// # Errors
    /// The device's or the host communicator's.
    pub fn time(&mut self, bench: &Bench<'_>, bytes: u64) -> Result<Option<f64>> {
        if bytes == 0 {
            return Ok(None);
        }
        if let Some(&us) = self.0.get(&bytes) {
            return Ok(Some(us));
        }
        let (memory, host) = (bench.device.memory(), &*bench.context.host);
        let length = usize::try_from(bytes)?;
        let (from, to) = (Buffer::new(memory, length)?, Buffer::new(memory, length)?);
        // SAFETY: the buffer has that length. Written first, because host memory that never was is no memory yet.
        unsafe { bench.device.poison(from.addr, length)? };
        // SAFETY: both buffers have that length and outlive the work, which `time` waits for.
        let mut issue = || unsafe { bench.device.copy(to.addr, from.addr, length) };
        let samples = bench.device.time(host, &bench.job.effort, bytes, &mut issue)?;
        let mine = median(&samples.means).unwrap_or(f64::NAN);
        let slowest = host.all_reduce(&[mine], HostReduceOp::Max)?[0];
        self.0.insert(bytes, slowest);
        Ok(Some(slowest))
    }
}
