//! Negative controls: what tests switch off, in order to see that they notice.
//!
//! Nothing here does anything unless an option that is documented as being for tests asks for it.

use comm_core::{Result, StreamHandle};
use comm_kernels::p2p::{AHEAD, BUFFERS, Link};
use comm_kernels::raw;
use cudarc::driver::sys;

use crate::call::{CALL_KIND_BITS, Call};
use crate::comm::P2pComm;

/// More rounds than a call of a test takes, and a multiple of the number of buffers. Fewer than a flag may be ahead of what
/// is waited for: a rank that is a call ahead has raised its next call's.
const ROUNDS_OF_A_CALL: u32 = 1 << 9;
const _: () = assert!(ROUNDS_OF_A_CALL < AHEAD && ROUNDS_OF_A_CALL.is_multiple_of(BUFFERS as u32));

/// The round that call number `seq` begins with when all calls share a buffer: rounds still differ from call to call,
/// as the packets' marks must, but all first ones have the same remainder by the number of buffers.
const fn first_round(start: u32, seq: u32) -> u32 {
    start.wrapping_add(seq.wrapping_mul(ROUNDS_OF_A_CALL))
}

impl P2pComm {
    /// With `p2p.test_single_buffer`, has the kernel that is enqueued next on `link` begin in the buffer that all
    /// others began in, so that a rank that is ahead overwrites what a late one has not read.
    ///
    /// For calls that are made once: a captured one would begin every replay with one round number.
    pub(crate) fn share_a_buffer(&self, call: &Call<'_>, link: &Link, stream: StreamHandle) -> Result<()> {
        let options = &self.shared().base.options;
        if !options.single_buffer {
            return Ok(());
        }
        let round = first_round(options.first_round, link.op >> CALL_KIND_BITS);
        // SAFETY: the channel's counters are this rank's, `round` is their first word, and only kernels on this stream
        // use them; the stream is the caller's, who vouches for it.
        let code = unsafe { sys::cuMemsetD32Async(link.channel.0, round, 1, raw::stream(stream)) };
        call.fatal(raw::check("cuMemsetD32Async", code))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_rounds_differ_and_share_their_buffer() {
        let rounds: Vec<u32> = (0..4).map(|seq| first_round(u32::MAX - 1, seq)).collect();
        assert!(rounds.windows(2).all(|pair| pair[0] != pair[1]));
        let buffers = BUFFERS as u32;
        assert!(rounds.iter().all(|round| round % buffers == rounds[0] % buffers));
    }
}
