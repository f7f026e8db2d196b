//! Exchanges through staging memory: right for every type, reduction and count, with two kernels and a barrier a chunk.
//!
//! The two halves of the staging memory alternate, so that one barrier a chunk is enough: when a rank writes a half
//! again, the barrier in between has shown that all ranks have read it. A last barrier ends the exchange, so that the
//! next one, or a replay of this one, may begin with the first half.
//!
//! In a mesh with gaps, a second step precedes every reading: each rank copies what it holds for others, and another
//! barrier follows. Reading then touches neighbours' memory alone.
//!
//! # After a wait that was given up
//! A rank that has given up a barrier must not write its halves again, nor what it holds for others: the barrier was to
//! show that the others have read them, and one that is only late reads on and may then complete, because this rank's flags
//! came before. So whatever copies or sums behind a barrier looks at the word that says so when it starts: here, and for
//! the messages of pairs (`pairs.rs`). What such a rank would read from others, or write to the caller's result, only it
//! could see; one rule for all is the simpler one, and it lets the others' memory alone.

use comm_core::{DType, DeviceAddr, ReduceOp, Result, StreamHandle};
use comm_kernels::p2p::Peers;

use crate::call::Call;
use crate::state::Channels;
use crate::symmetric::shifted;

/// One exchange under way.
pub(crate) struct Staging<'a> {
    call: &'a Call<'a>,
    channels: &'a Channels,
    stream: StreamHandle,
    chunk: usize,
    /// Bytes of a half that the chunk uses.
    used: usize,
}

impl<'a> Staging<'a> {
    pub(crate) const fn new(call: &'a Call<'a>, channels: &'a Channels, stream: StreamHandle) -> Self {
        Self { call, channels, stream, chunk: 0, used: channels.half }
    }

    /// Bytes of a chunk, with `parts` of them side by side in a half, for elements of `size` bytes.
    pub(crate) const fn room(&self, parts: usize, size: usize) -> usize {
        // Chunks keep the operands' alignment to 16 bytes, where there is one.
        let room = self.channels.half / parts / 16 * 16;
        if room < size { size } else { room / size * size }
    }

    /// Copies bytes to or from this rank's memory, from any address that it can reach, unless this rank has given up a
    /// wait.
    pub(crate) fn copy(&self, from: DeviceAddr, to: DeviceAddr, bytes: usize) -> Result<()> {
        copy_unless_broken(self.call, self.channels, from, to, bytes, self.stream)
    }

    /// The same for `rows` rows of `width` bytes, which begin the given bytes apart.
    pub(crate) fn copy_rows(
        &self,
        from: (DeviceAddr, usize),
        to: (DeviceAddr, usize),
        width: usize,
        rows: usize,
    ) -> Result<()> {
        if from.0 == to.0 {
            return Ok(());
        }
        let (kernels, unless) = (&self.call.shared.base.kernels, silence(self.call, self.channels));
        // SAFETY: the operation's caller vouches for its operands; a half of the staging memory is as large as the chunk;
        // the word lives as long as the channels.
        self.call.fatal(unsafe { kernels.copy_rows_unless(unless, from, to, width, rows, self.stream) })
    }

    /// Says how many bytes of a half the next chunks use, from its beginning on, so that no more is copied for others.
    pub(crate) const fn uses(&mut self, bytes: usize) {
        self.used = if bytes < self.channels.half { bytes } else { self.channels.half };
    }

    /// Which half the chunk uses: the one that the last chunk did not, unless a test wants to see what happens then.
    fn turn(&self) -> usize {
        if self.call.shared.base.options.single_buffer { 0 } else { self.chunk % 2 }
    }

    fn halves(&self) -> Peers {
        let (staging, half) = (&self.channels.staging, self.channels.half);
        let offset = self.turn() * half;
        match &self.channels.mesh {
            None => shifted(staging, offset),
            Some(mesh) => mesh.halves(staging, 2 * half, offset),
        }
    }

    /// Lets every rank read what every rank has written to its half.
    fn publish(&self) -> Result<()> {
        self.barrier()?;
        let Some(mesh) = &self.channels.mesh else { return Ok(()) };
        let (staging, half) = (&self.channels.staging, self.channels.half);
        for (from, to) in mesh.copies(staging, 2 * half, self.turn() * half) {
            self.copy(from, to, self.used)?;
        }
        self.barrier()
    }

    /// One chunk: `write` fills this rank's half, given its address; then `read` uses everybody's.
    pub(crate) fn exchange(
        &mut self,
        write: impl FnOnce(&Self, DeviceAddr) -> Result<()>,
        read: impl FnOnce(&Self, &Peers) -> Result<()>,
    ) -> Result<()> {
        let halves = self.halves();
        write(self, halves[self.call.shared.info.rank])?;
        self.publish()?;
        read(self, &halves)?;
        self.chunk += 1;
        Ok(())
    }

    /// One chunk in two steps: between them every rank has done `combine`, which may write this rank's half where no
    /// other rank has read it.
    pub(crate) fn exchange_twice(
        &mut self,
        write: impl FnOnce(&Self, DeviceAddr) -> Result<()>,
        combine: impl FnOnce(&Self, &Peers) -> Result<()>,
        read: impl FnOnce(&Self, &Peers) -> Result<()>,
    ) -> Result<()> {
        self.exchange(write, |staging, halves| {
            combine(staging, halves)?;
            staging.publish()?;
            read(staging, halves)
        })
    }

    /// Reduces what every rank has at `offset` of its half to an operand of this rank or, where no other rank reads it
    /// yet, to its half, unless this rank has given up a wait.
    pub(crate) fn reduce(
        &self,
        halves: &Peers,
        offset: usize,
        to: DeviceAddr,
        count: usize,
        reduction: (DType, ReduceOp),
    ) -> Result<()> {
        let inputs = shifted(halves, offset);
        let inputs = &inputs[..self.call.shared.info.size];
        // SAFETY: staging memory of all ranks, written before the barrier; the caller of the operation vouches for the
        // output; the word as above.
        self.call.fatal(unsafe {
            let unless = silence(self.call, self.channels);
            let kernels = &self.call.shared.base.kernels;
            kernels.reduce_unless(unless, inputs, to, count, reduction, self.stream)
        })
    }

    /// Ends the exchange.
    pub(crate) fn finish(self) -> Result<()> {
        if self.chunk > 0 { self.barrier() } else { Ok(()) }
    }

    fn barrier(&self) -> Result<()> {
        barrier(self.call, self.channels, self.stream)
    }
}

/// All ranks' streams meet.
pub(crate) fn barrier(call: &Call<'_>, channels: &Channels, stream: StreamHandle) -> Result<()> {
    let (link, kernels) = (call.link(&channels.barrier), &channels.kernels);
    // SAFETY: the channel is live while the call is; every rank makes the same calls in the same order.
    call.fatal(unsafe {
        match &channels.mesh {
            None => kernels.barrier(&link, stream),
            Some(mesh) => kernels.barrier_mesh(&link, &mesh.barrier, stream),
        }
    })
}

/// The word that keeps kernels behind a wait from copying once this rank has given one up. All channels have the same, and
/// it lives as long as they do. Null, which keeps nothing, where a test wants to see what happens then.
fn silence(call: &Call<'_>, channels: &Channels) -> DeviceAddr {
    match call.shared.base.options.copies_when_broken {
        false => channels.barrier.broken,
        true => DeviceAddr::NULL,
    }
}

/// Copies bytes between operands of this rank, behind no wait.
pub(crate) fn copy(
    call: &Call<'_>,
    from: DeviceAddr,
    to: DeviceAddr,
    bytes: usize,
    stream: StreamHandle,
) -> Result<()> {
    copy_unless(call, DeviceAddr::NULL, (from, to), bytes, stream)
}

/// The same behind a wait for other ranks: nothing is copied once this rank has given one up.
pub(crate) fn copy_unless_broken(
    call: &Call<'_>,
    channels: &Channels,
    from: DeviceAddr,
    to: DeviceAddr,
    bytes: usize,
    stream: StreamHandle,
) -> Result<()> {
    copy_unless(call, silence(call, channels), (from, to), bytes, stream)
}

fn copy_unless(
    call: &Call<'_>,
    unless: DeviceAddr,
    (from, to): (DeviceAddr, DeviceAddr),
    bytes: usize,
    stream: StreamHandle,
) -> Result<()> {
    if bytes == 0 || from == to {
        return Ok(());
    }
    let kernels = &call.shared.base.kernels;
    // A kernel rather than a copy command: it is ordered with the other kernels at no extra cost, reads other devices'
    // memory at the speed of the link, and can be captured whatever the memory. Nor does it stand in line for a copy engine,
    // where ranks share a device, behind a copy that waits for this rank. A sum of one input is a copy.
    // SAFETY: the callers vouch for both ranges, and the word lives as long as the channels.
    call.fatal(unsafe {
        kernels.reduce_unless(unless, &[from], to, bytes, (DType::U8, ReduceOp::Sum), stream)
    })
}
